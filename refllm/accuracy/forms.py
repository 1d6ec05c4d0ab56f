"""The operators once more, each as the order of steps in which people write it, with a name for every place to round.

    y = FORMS["glu"](Stores({"silu", OUT}, "bfloat16"), (gate, up), {"name": "silu"})

`refllm.ops` defines what an operator is; here is where code may put a value of its own into the format: `store(x,
"point")` rounds x if the point is in the set. Some points are not admissible, because what is rounded there is shared
by a row or is no rounding at all (`refllm.accuracy.profiles`). Float64 inside, so that the result is a prediction to
the bit wherever the order of float32 sums cannot matter. Arrays are rows [N, ...] of what the operators take as
[B, ..., S, ...]: samples of a value, or all of it.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy.parts import WHOLE, summed
from refllm.accuracy.propagation import ulp
from refllm.precision import rounding

OUT = "out"
"""The point at which the result itself is stored."""


class Stores:
    """Rounds at the points in the set: `x in store` asks, `store(x, point)` does."""

    def __init__(self, points: Collection[str], dtype: str) -> None:
        self.points, self.dtype = frozenset(points), dtype

    def __contains__(self, point: str) -> bool:
        return point in self.points

    def __call__(self, x: np.ndarray, point: str) -> np.ndarray:
        return self._put(x) if point in self.points else x

    def _put(self, x: np.ndarray) -> np.ndarray:
        return on_grid(x, self.dtype)


_MAY_BE_EXACT = ("products", "second product")
"""Points at which many values are on the grid before they are stored: a number of the format times a table of 1."""


class Nudges(Stores):
    """Rounds nowhere, but adds at one point the standard deviation of the rounding there, so that the change of the
    result is what that rounding does to it. Points that choose another order of the steps still do."""

    def __init__(self, points: Collection[str], dtype: str, at: str = "") -> None:
        super().__init__(points, dtype)
        self.at = at

    def __call__(self, x: np.ndarray, point: str) -> np.ndarray:
        if point != self.at or point not in self.points:
            return x
        by = ulp(x, self.dtype, x.dtype.type) * x.dtype.type(12**-0.5)
        return x + (np.where(on_grid(x, self.dtype) == x, 0, by) if point in _MAY_BE_EXACT else by)


def on_grid(x: np.ndarray, dtype: str) -> np.ndarray:
    """x, rounded to float32 and then to the format, as float64."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return rounding(dtype)(np.asarray(x).astype(np.float32)).astype(np.float64)


Form = Callable[[Stores, tuple[np.ndarray, ...], dict[str, Any]], np.ndarray]

# ---------------------------------------------------------------------------------------------------------------- norms


def _row_sum(x: np.ndarray, store: Stores) -> np.ndarray:
    """Kept sums over the last axis; at "partial sums" the running sum of 128 numbers at a time is rounded."""
    if "partial sums" not in store:
        return x.sum(axis=-1, keepdims=True)
    n = x.shape[-1]
    step = max(1, min(128, n // 4))
    total = np.zeros((*x.shape[:-1], 1))
    for start in range(0, n, step):
        total = store(total + x[..., start : start + step].sum(axis=-1, keepdims=True), "partial sums")
    return total


def _reciprocal_root(variance: np.ndarray, n: int, eps: float, store: Stores) -> np.ndarray:
    if "n - 1" in store:
        variance = variance * (n / max(1, n - 1))
    variance = store(variance, "variance")
    eps = eps * 10 if "eps times 10" in store else eps
    root = np.sqrt(variance) + eps if "eps outside the root" in store else np.sqrt(store(variance + eps, "with eps"))
    return store(1 / root, "reciprocal root")


def _rms_norm(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    (x,), weight, n = arrays, how["weight"], arrays[0].shape[-1]
    scale = _reciprocal_root(_row_sum(store(x * x, "squares"), store) / n, n, how["eps"], store)
    if "times weight" in store:
        return store(store(x * weight, "times weight") * scale, OUT)
    return store(weight * store(x * scale, "normalized"), OUT)


def _layer_norm(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    (x,), n = arrays, arrays[0].shape[-1]
    centred = x - store(_row_sum(x, store) / n, "mean")
    scale = _reciprocal_root(np.square(centred).sum(axis=-1, keepdims=True) / n, n, how["eps"], store)
    y = store(store(store(centred, "centred") * scale, "normalized") * how["weight"], "weighted")
    return store(y if how["bias"] is None else y + how["bias"], OUT)


# ----------------------------------------------------------------------------------------------------------------- RoPE


def _rope(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    """x [N, H, D], cos and sin [N, 1, R/2]."""
    x, cos, sin = arrays
    cos, sin = store(cos, "tables"), store(sin, "tables")
    half = cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if how["interleaved"]:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b, out = x[..., first], x[..., second], x.copy()

    def together(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return store(store(u, "products") + store(store(v, "products"), "second product"), OUT)

    out[..., first], out[..., second] = together(a * cos, -b * sin), together(b * cos, a * sin)
    return out


# ------------------------------------------------------------------------------------------------------------------ MLP


def _sigmoid(g: np.ndarray, store: Stores) -> np.ndarray:
    if "mirrored" in store:  # 1 - 1 / (1 + e^x) for x > 0: exponentials of positive numbers only
        part = store(1 / store(1 + store(np.exp(np.abs(g)), "exp"), "1 + exp"), "sigmoid of -|x|")
        return store(np.where(g < 0, part, 1 - part), "sigmoid")
    return store(1 / store(1 + store(np.exp(-g), "exp"), "1 + exp"), "sigmoid")


def _glu(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    gate, up = arrays
    if "gate and up swapped" in store:
        gate, up = up, gate
    if how["name"] not in ("silu", "swish"):
        return store(store(ops.activation(gate, how["name"]), "activation") * up, OUT)
    with np.errstate(over="ignore"):
        sigmoid = _sigmoid(gate, store)
    if "gate times up" in store:
        return store(store(gate * up, "gate times up") * sigmoid, OUT)
    return store(store(gate * sigmoid, "activation") * up, OUT)


def _activation(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    return store(ops.activation(arrays[0], how["name"]), OUT)


# ---------------------------------------------------------------------------------------------------- sums and products


def _add(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    """x + y; or, of three terms, x + (y + z)."""
    x, y, *rest = arrays
    return store(x + (store(y + rest[0], "attention and MLP") if rest else y), OUT)


def _linear(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    (x,), weight, bias = arrays, how["weight"], how["bias"]
    parts = how.get("parts", WHOLE)
    y = x @ weight.T if parts == WHOLE else summed(x, weight, parts, bias, store)
    y = store(y, "product")
    return store(y if bias is None or parts.biased else y + bias, OUT)


# ------------------------------------------------------------------------------------------------------------ attention


def scores(store: Stores, q: np.ndarray, k: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """q [N, H, D], k [K, T, D] -> [N, H, T], scaled."""
    scale = how["scale"]
    if "scale" in store:
        scale = store(np.asarray(scale), "scale")
    if "root of the scale" in store:
        root = store(np.sqrt(np.asarray(scale)), "root of the scale")
        q, k, scale = store(q * root, "scaled q"), store(k * root, "scaled q"), np.float64(1)
    elif "scaled q" in store:
        q, scale = store(q * scale, "scaled q"), np.float64(1)
    N, H, D = q.shape
    K, T = k.shape[:2]
    grouped = q.reshape(N, K, H // K, D).transpose(1, 0, 2, 3).reshape(K, -1, D)
    raw = (grouped @ k.transpose(0, 2, 1)).reshape(K, N, H // K, T).transpose(1, 0, 2, 3).reshape(N, H, T)
    return store(raw if "scaled q" in store else store(raw, "raw scores") * scale, "scores")


class Softmax:
    """The scaled scores [N, H, T] of which a query sees visible [N, T], and v [K, T, D]: a context before anybody says
    where it is rounded. What several profiles have in common is made once, for `Stores` that differ in points alone."""

    def __init__(self, s: np.ndarray, v: np.ndarray, visible: np.ndarray) -> None:
        self.s, self.v = np.where(visible[:, None], s, -np.inf), v
        self.top = self.s.max(axis=-1, keepdims=True)
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def exponentials(self, store: Stores) -> tuple[np.ndarray, np.ndarray]:
        """The exponentials of the scores less the largest, as they are and as they are stored."""
        narrow = "less the largest" in store
        e = self._once(("exp", narrow), lambda: np.exp(store(self.s - self.top, "less the largest")))
        return e, self._once(("stored", narrow), lambda: store(e, "exp")) if "exp" in store else e

    def weighted(self, store: Stores) -> np.ndarray:
        """The sum of v by the exponentials as they are stored, before it is divided."""
        _, stored = self.exponentials(store)
        return np.asarray(self._once(("sum", id(stored)), lambda: _weighted(stored, self.v)))

    def parts(self, tile: int, store: Stores) -> list[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """Tile after tile: its keys, the factor of what was added up before, and exponentials as `exponentials`."""
        return list(self._once(("tiles", tile), lambda: [*self._in_tiles(tile, store)]))

    def _in_tiles(self, tile: int, store: Stores) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        top = np.full_like(self.top, -np.inf)
        for start in range(0, self.s.shape[-1], tile):
            keys = slice(start, start + tile)
            part = self.s[..., keys]
            new = np.maximum(top, part.max(axis=-1, keepdims=True))
            seen = np.where(np.isneginf(new), 0, new)
            again, e = np.exp(top - seen), np.exp(part - seen)
            yield keys, again, e, store(e, f"exp in tiles of {tile}")
            top = new

    def accumulated(self, tile: int, store: Stores) -> np.ndarray:
        """The same sum, tile after tile."""

        def accumulate() -> np.ndarray:
            o = np.zeros(1)
            for keys, again, _, p in self.parts(tile, store):
                o = store(o * again + _weighted(p, self.v[:, keys]), "accumulator")
            return o

        return np.asarray(self._once(("sum", tile, "accumulator" in store), accumulate))


def in_tiles_of(keys: int, points: frozenset[str]) -> frozenset[str]:
    """The points of a profile of that many keys, where one tile that holds them all is like another."""
    several = [t for t in _TILES if t < keys]
    if len(several) == len(_TILES) or not any(f"exp in tiles of {t}" in points for t in _TILES[len(several) :]):
        return points
    return points - _IN_TILES | {f"exp in tiles of {_TILES[len(several)]}"}


_TILES = (16, 32, 64, 128)
_IN_TILES = frozenset(f"exp in tiles of {t}" for t in _TILES)


def context(store: Stores, softmax: Softmax) -> np.ndarray:
    """The context under a profile: [N, H, D]."""
    tile = next((t for t in _TILES if f"exp in tiles of {t}" in store), 0)
    if not tile:
        e, stored = softmax.exponentials(store)
        summed = stored if "sum of rounded" in store else e
        total = store(summed.sum(axis=-1, keepdims=True), "denominator")
        if "exp" in store and "probs" not in store:
            return store(softmax.weighted(store) / total, OUT)
        parts = stored * store(1 / total, "reciprocal") if "reciprocal" in store else stored / total
        return store(_weighted(store(parts, "probs"), softmax.v), OUT)
    total = np.zeros(1)
    for _, again, e, p in softmax.parts(tile, store):
        total = total * again + (p if "sum of rounded" in store else e).sum(axis=-1, keepdims=True)
    return store(softmax.accumulated(tile, store) / store(total, "denominator"), OUT)


def _weighted(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    (N, H, T), K = p.shape, v.shape[0]
    grouped = p.reshape(N, K, H // K, T).transpose(1, 0, 2, 3).reshape(K, -1, T)
    return (grouped @ v).reshape(K, N, H // K, -1).transpose(1, 0, 2, 3).reshape(N, H, -1)


def _attention(store: Stores, arrays: tuple[np.ndarray, ...], how: dict[str, Any]) -> np.ndarray:
    q, k, v = arrays
    if "scale off by 1%" in store:
        how = how | {"scale": how["scale"] * 1.01}
    return context(store, Softmax(scores(store, q, k, how), v, how["visible"]))


FORMS: dict[str, Form] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "glu": _glu,
    "activation": _activation,
    "add": _add,
    "linear": _linear,
    "attention": _attention,
}
"""Operator of a page -> its form."""
