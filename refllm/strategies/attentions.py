"""Calls of attention, over keys and values at hand and over a cache of which only the first slots are filled."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refllm.strategies.arrays import FIRST_DIM, Array
from refllm.strategies.call import Call
from refllm.strategies.draws import (
    HEAD_DIMS,
    LENGTHS,
    Seeds,
    layouts,
    plant,
    scales,
    seeded,
    spot,
    values,
)

ROWS = ("mean 1000", "outlier 10000", "zero rows", "subnormal")
LOGITS = (
    "plain", "scale", "q is 0", "equal logits", "near ties", "logits shifted by -100000", "huge logits", *ROWS, "NaN",
)  # fmt: skip
KINDS = {
    "attention": (*LOGITS, "infinity", "masked values hold NaN", "masked values hold 10000", "rows without a key"),
    "decode_attention": (*LOGITS, "infinity", "slots past the length hold NaN", "slots past the length hold 10000"),
}
"""q is 0: the result is the mean of the visible values. equal logits: all keys are one. near ties: scores that differ
by little. logits shifted by -100000: by -28672 where scores are rounded to float16. huge logits: one weight is 1, the
others underflow. mean 1000, outlier 10000, zero rows, subnormal: of q, k or v, as in `draws.values`. NaN: in one
visible element. infinity: in one visible value. masked values, slots past the length:
what the contract says is never read; keys are as bad as values there."""
NEEDS_FUSED = (
    "masked values hold NaN", "slots past the length hold NaN", "rows without a key", "NaN", "infinity",
)  # fmt: skip
"""Kinds that eager code does not stand: 0 * NaN is NaN there, and a row without a key the mean of all values."""
CACHE_SLOTS = (*LENGTHS[:-1], 513, 1025, 0)
_TILES = 30
"""Work that a call stays below, in tiles of 64 queries, keys and dims: what an interpreter does in half a second."""


def kinds(operator: str, policy: str) -> tuple[str, ...]:
    """The kinds that a policy stands."""
    return tuple(f for f in KINDS[operator] if policy != "hf-eager" or f not in NEEDS_FUSED)


def attention(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """attention: q [B, H, S, D], k and v [B, K, T, D]; every flag, a key mask of every kind, T and S independent."""
    S, T = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
    D = draw(st.sampled_from(HEAD_DIMS))
    B, K, H = _heads(draw, S, T, D)
    kind = kind or draw(st.sampled_from(kinds(operator, policy)))
    causal = not draw(st.booleans())
    holes = _holes(draw, kind, B, T)
    if policy == "hf-eager":  # every query needs a key there
        S = min(S, T) if causal and T else S
        holes = () if _some_row_is_empty(B, S, T, causal, holes) else holes
    keywords: dict[str, object] = {} if causal else {"causal": False}
    lie = layouts(draw, (B, H, S, D), (B, K, T, D), (B, K, T, D))
    q, k, v = _arrays((B, H, S, D), (B, K, T, D), dtype, lie)
    q, k, v, keywords["scale"] = _logits(draw, kind, policy, q, k, v, visible=_visible_keys(B, T, holes))
    if kind.startswith("masked"):
        k, v = (_poisoned(x, holes, kind, policy) for x in (k, v))
    if keywords["scale"] is None:
        keywords.pop("scale") if not draw(st.booleans()) else None
    if draw(st.booleans()):
        keywords["return_lse"] = True
    q, k, v = seeded(Seeds(draw), q, k, v)
    if holes:
        keywords["key_mask"] = Array((B, T), "bool", "ones", planted=tuple((hole, 0) for hole in holes))
    return Call(operator, dtype, (q, k, v), tuple(keywords.items()), kind)


def decode(draw: st.DrawFn, operator: str, dtype: str, policy: str, kind: str | None) -> Call:
    """decode_attention: q [B, H, S, D] with S = 1..8, caches [B, K, N, D], lengths [B] in 0..N, each its own."""
    S, N = draw(st.integers(1, 8)), draw(st.sampled_from(CACHE_SLOTS))
    D = draw(st.sampled_from(HEAD_DIMS))
    B, K, H = _heads(draw, S, N, D)
    kind = kind or draw(st.sampled_from(kinds(operator, policy)))
    if policy == "hf-eager":
        N = max(N, S)
    fewest = S if policy == "hf-eager" else 0
    edges = st.sampled_from(sorted({fewest, min(1, N), min(S, N), N // 2, max(0, N - 1), N} - set(range(fewest))))
    lengths = [draw(edges | st.integers(fewest, N)) for _ in range(B)]
    lie = layouts(draw, (B, H, S, D), (B, K, N, D), (B, K, N, D))
    q, k, v = _arrays((B, H, S, D), (B, K, N, D), dtype, lie)
    visible = [(b, range(max(0, length - S) + 1)) for b, length in enumerate(lengths) if length]
    q, k, v, scale = _logits(draw, kind, policy, q, k, v, visible)
    if kind.startswith("slots past"):
        past = tuple((b, (length, None)) for b, length in enumerate(lengths) if length < N)
        k, v = (_poisoned(x, past, kind, policy) for x in (k, v))
    q, k, v = seeded(Seeds(draw), q, k, v)
    filled = Array((B,), "int64", "zeros", planted=tuple(((b,), n) for b, n in enumerate(lengths)))
    return Call(operator, dtype, (q, k, v, filled), () if scale is None else (("scale", scale),), kind)


def _heads(draw: st.DrawFn, S: int, T: int, D: int) -> tuple[int, int, int]:
    """B, K and H = K g, so many that a call is done soon. Often three batch rows: with one, strides are not seen."""
    most = max(1, _TILES // math.prod(max(1, -(-n // 64)) for n in (S, T, D)))
    B = draw(st.sampled_from([n for n in (1, 2, 3, 4, 0) if n <= most]))
    K = draw(st.sampled_from([n for n in (1, 2, 3) if n * max(1, B) <= most]))
    g = draw(st.sampled_from([n for n in (1, 2, 3, 5, 8) if n * K * max(1, B) <= most]))
    return B, K, K * g


def _arrays(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: str, lie: list[str]) -> tuple[Array, ...]:
    # Values with a mean: a mean of values near 0 looks like 0, and then a weight too many is not seen.
    return (
        Array(q_shape, dtype, layout=lie[0]),
        Array(k_shape, dtype, layout=lie[1]),
        Array(k_shape, dtype, mean=0.5, layout=lie[2]),
    )


def _logits(
    draw: st.DrawFn,
    kind: str,
    policy: str,
    q: Array,
    k: Array,
    v: Array,
    visible: list[tuple[int, range]],
) -> tuple[Array, Array, Array, float | None]:
    """q, k, v and scale of a kind of `LOGITS`; visible: per batch row the keys that some query certainly sees."""
    rounded = policy == "hf-eager" and q.dtype == "float16"  # scores must be float16 numbers
    if kind == "q is 0":
        return replace(q, values="zeros"), k, v, None
    if kind == "equal logits":
        return q, replace(k, values="ones"), v, None
    if kind == "near ties":
        return replace(q, values="ones", scale=0.25), replace(k, scale=0.01, mean=1.0), v, 1.0
    if kind == "logits shifted by -100000":
        # 256 * -392 = -100352, exactly, in every format
        low = -112.0 if rounded else -392.0
        q, k = (replace(x, values="eighths") for x in (q, k))  # so that float32 adds the scores without an error
        return plant(q, (FIRST_DIM, 256.0)), plant(k, (FIRST_DIM, low)), v, 1.0
    if kind == "huge logits":
        # Scores that are rounded: by so little that the error of a weight is still proportional to it.
        eager = {"bfloat16": [4.0], "float16": [30.0]}.get(q.dtype) if policy == "hf-eager" else None
        return q, k, v, draw(st.sampled_from(eager or [30.0, 300.0]))
    if kind in ROWS:
        return (*_special(draw, kind, policy, q, k, v), None)
    if kind == "scale":
        return replace(q, scale=draw(scales())), k, replace(v, scale=draw(scales())), draw(st.sampled_from([None, 0.1]))
    if kind in ("NaN", "infinity") and visible and 0 not in q.shape:
        b, keys = draw(st.sampled_from(visible))
        head, dim = spot(draw, (k.shape[1], k.shape[3]))
        place = (b, head, draw(st.sampled_from(sorted({keys[0], keys[-1]}))), dim)
        if kind == "infinity":
            return q, k, plant(v, (place, draw(st.sampled_from([float("inf"), float("-inf")])))), None
        which = draw(st.sampled_from("vkq"))
        if which == "q":
            return plant(q, (spot(draw, q.shape), float("nan"))), k, v, None
        return (q, k, plant(v, (place, float("nan"))), None) if which == "v" else (
            q, plant(k, (place, float("nan"))), v, None)  # fmt: skip
    return q, k, v, None


def _special(draw: st.DrawFn, kind: str, policy: str, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """One of q, k and v of a kind of `ROWS`. Only v where scores are rounded, of which an error must stay small; and
    never a subnormal v but in float16: the bfloat16 instructions of CPUs, and some libraries, take those for 0."""
    of_v = kind != "subnormal" or v.dtype == "float16"
    places = ([0, 1] if policy == "fused" else []) + ([2] if of_v else [])
    if not places:
        return q, k, v
    arrays, at = [q, k, v], draw(st.sampled_from(places))
    x = arrays[at]
    special = values(draw, kind, x.shape, x.dtype, x.layout)
    keeps_mean = kind in ("outlier 10000", "zero rows")
    arrays[at] = replace(special, mean=x.mean) if keeps_mean else special
    return arrays[0], arrays[1], arrays[2]


# ------------------------------------------------------------------------------------------------------------- masks


def _holes(draw: st.DrawFn, kind: str, B: int, T: int) -> tuple[tuple[object, ...], ...]:
    """Places of a [B, T] key mask that are False: none, padding on the left or right, holes, a whole row."""
    if not B or not T:
        return ()
    masks = ["none", "left", "right", "holes", "row"]
    mask = draw(st.sampled_from(masks[1:4] if kind.startswith("masked") else masks))
    mask = "row" if kind == "rows without a key" else mask
    if mask == "row":
        return ((draw(st.integers(0, B - 1)), (None, None)),)
    holes: list[tuple[object, ...]] = []
    for b in range(B if mask != "none" else 0):
        n = draw(st.integers(0 if b else 1, T))
        if mask == "holes":
            holes += [(b, draw(st.integers(0, T - 1))) for _ in range(min(n, 4))]
        elif n:
            holes.append((b, (None, n)) if mask == "left" else (b, (T - n, None)))
    return tuple(holes)


def _mask(B: int, T: int, holes: tuple[tuple[object, ...], ...]) -> np.ndarray:
    return Array((B, T), "bool", "ones", planted=tuple((hole, 0) for hole in holes)).array()


def _visible_keys(B: int, T: int, holes: tuple[tuple[object, ...], ...]) -> list[tuple[int, range]]:
    """One key for each batch row that the last query sees: the first that is not masked."""
    first = [(b, np.flatnonzero(row)) for b, row in enumerate(_mask(B, T, holes))] if T else []
    return [(b, range(int(keys[0]), int(keys[0]) + 1)) for b, keys in first if len(keys)]


def _some_row_is_empty(B: int, S: int, T: int, causal: bool, holes: tuple[tuple[object, ...], ...]) -> bool:
    mask = _mask(B, T, holes)
    first = mask[:, : max(0, T - S + 1)] if causal else mask  # what the first query sees
    return not first.any(-1).all()


def _poisoned(x: Array, places: tuple[tuple[object, ...], ...], kind: str, policy: str) -> Array:
    """x [B, K, T, D] with NaN or a large number at `places` of [B, T] in all heads and dims."""
    value = float("nan") if kind.endswith("NaN") else 1e4
    if policy == "hf-eager" and x.dtype == "float16":
        value = 100.0  # scores with it must stay finite in float16
    if x.layout == "expanded":  # the rows of the batch are one row
        x = replace(x, layout="dense")
    return plant(x, *_per_head(places, value))


def _per_head(places: tuple[tuple[object, ...], ...], value: float) -> Iterator[tuple[tuple[object, ...], float]]:
    for b, keys in places:
        yield (b, (None, None), keys), value
