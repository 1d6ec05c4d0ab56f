"""Hypotheses on attention: its scale, who sees whom, which head reads which, its softmax and its cache."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refllm.hypotheses.hypothesis import Hypothesis, decades, free, one_of
from refllm.hypotheses.setup import Call, DoesNotApplyError, Setup
from refllm.hypotheses.values import moved, number, rounded, times, with_noise_of

_SCORES = "scores probs context"
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""rule(query positions [S, 1], key positions [T]) -> bool [S, T]."""


def hypotheses(config: Any) -> Iterator[Hypothesis]:
    """All that have a meaning for a config."""
    yield from _scales(config)
    yield from _masks(config)
    yield from _pieces()
    yield from _heads(config)
    yield from _softmaxes()
    yield from _caches()


def _attend(name: str, says: str, wrong: Callable[..., Any], values: str = _SCORES, **how: bool) -> Hypothesis:
    return one_of(name, says, "attention", values, lambda s: s.operate("attention", wrong), **how)


# --------------------------------------------------------------------------------------------------------------- scale


def _scaled(value: float) -> Callable[..., Any]:
    return lambda call, q, k, v, scale=None, **masking: call.base(q, k, v, scale=value, **masking)


def _scales(config: Any) -> Iterator[Hypothesis]:
    D, E, H, K = config.head_dim, config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    right = D**-0.5
    found = {
        "scale missing": (1.0, "no scale of the scores"),
        "scale twice": (1 / D, f"scores times 1 / {D}, the scale twice"),
        "scale from the hidden size": (E**-0.5, f"scores times 1 / sqrt({E}), of the hidden size"),
        "scale from E / H": ((E / H) ** -0.5, f"scores times 1 / sqrt({E} / {H})"),
        "scale inverted": (D**0.5, f"scores times sqrt({D}) instead of divided by it"),
        "root of the scale": (D**-0.25, f"scores times {D}^(-1/4), the scale of q alone"),
        "scale from twice the dims": ((2 * D) ** -0.5, f"scores times 1 / sqrt({2 * D})"),
        "scale from half of the dims": ((D / 2) ** -0.5, f"scores times 1 / sqrt({D // 2})"),
        "scale from all keys' dims": ((K * D) ** -0.5, f"scores times 1 / sqrt({K * D}), of all key heads"),
        "softmax to the base 2": (right * math.log(2), "2 for e as the base of softmax"),
        "log2(e) twice": (right / math.log(2), "scores times log2(e) and a softmax to the base e"),
        "scores dropped": (0.0, "equal weights for all keys"),
    }
    grid = [m * right for m in (*decades(0.05, 20, 6), 0.9, 0.97, 1.03, 1.1)]

    def edit(setup: Setup, value: float) -> None:
        setup.operate("attention", _scaled(value))

    says_scale = lambda v: f"scores times {v:.6g} instead of {right:.6g}"  # noqa: E731
    family = free("scale", "attention", _SCORES, edit, grid, says_scale)
    seen: list[float] = [right]
    for name, (value, says) in found.items():
        if not any(math.isclose(value, other, rel_tol=1e-9) for other in seen):
            seen.append(value)
            yield family.at(value, name, says)
    yield family


# ---------------------------------------------------------------------------------------------------------------- mask


def _seen(rule: Rule, causal: bool = False) -> Callable[..., Any]:
    """Attention of which a query sees what the rule says and no mask hides. causal: only of what lies before it."""

    def wrong(call: Call, q: Any, k: Any, v: Any, *, mask: Any = None, **masking: Any) -> Any:
        S, T = q.shape[2], k.shape[2]
        seen = rule(np.arange(S)[:, None] + T - S, np.arange(T))[None, None]
        if mask is not None:
            seen = mask & seen if mask.dtype == bool else np.where(seen, mask, -np.inf)
        return call.base(q, k, v, mask=seen, **{**masking, "causal": causal and masking.get("causal", False)})

    return wrong


def _without(name: str) -> Callable[..., Any]:
    def wrong(call: Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
        if masking.get(name) is None:
            raise DoesNotApplyError
        return call.base(q, k, v, **{**masking, name: None})

    return wrong


def _masks(config: Any) -> Iterator[Hypothesis]:
    yield _attend("not causal", "no causal mask", _seen(lambda t, u: u >= 0 * t), ahead=True)
    for n in (1, 2):
        wide = _seen(partial(lambda n, t, u: u <= t + n, n))
        yield _attend(
            f"mask {n} too wide", f"a causal mask that is {n} too wide: a query sees {n} later", wide, ahead=True
        )
    yield _attend(
        "diagonal masked", "a mask that hides the diagonal", _seen(lambda t, u: (u < t) | ((t == 0) & (u == 0)))
    )
    yield _attend(
        "mask turned round",
        "the mask turned round: a query sees itself and what comes later",
        _seen(lambda t, u: u >= t),
    )
    yield _attend("first key hidden", "the first key hidden", _seen(lambda t, u: (u > 0) | (t == 0), True))

    def edit(setup: Setup, value: float) -> None:
        setup.operate("attention", _seen(lambda t, u: u > t - round(value), True))

    grid = [*range(1, 17), *(16 * i for i in range(2, 17))]
    says = lambda v: f"a window of {v:.0f} keys"  # noqa: E731
    windows = free("window", "attention", _SCORES, edit, grid, says, whole=True)
    yield windows.at(1, "itself alone", "a query that sees itself alone")
    yield from (windows.at(n) for n in (2, 4, 8, 16, 32, 64, 128))
    yield windows
    for n in (8, 16, 32, 64):
        chunk = _seen(partial(lambda n, t, u: u // n == t // n, n), True)
        yield _attend(f"chunks of {n}", f"attention within chunks of {n} tokens", chunk)
        whole = _seen(partial(lambda n, t, u: (u < len(u) // n * n) | (u == t), n), True)
        yield _attend(f"tail of {n} keys", f"keys past the last whole tile of {n} dropped", whole, ahead=True)
        ahead = _seen(partial(lambda n, t, u: u // n <= t // n, n))
        yield _attend(f"causal by tiles of {n}", f"a causal mask by whole tiles of {n}", ahead, ahead=True)
    yield _attend("padding seen", "a mask that lets padding be seen", _without("key_mask"))
    yield _attend("padding of row 0", "the padding of the first row for every row", _padding_of_row_0)
    if any(config.window(layer) is not None for layer in range(config.num_hidden_layers)):
        yield _attend("window ignored", "no window of keys", _without("window"))
        for by in (-1, 1):
            said = "wide" if by > 0 else "narrow"
            yield _attend(f"window one too {said}", f"a window that is one too {said}", _other_window(by))
    yield _attend(
        "masked scores 0", "masked scores of 0 instead of minus infinity", _masked_to(0.0, keeps=False), ahead=True
    )
    yield _attend(
        "mask added as 1", "a mask of ones and zeros added to the scores", _masked_to(-1.0, keeps=True), ahead=True
    )


def _padding_of_row_0(call: Call, q: Any, k: Any, v: Any, *, key_mask: Any = None, **masking: Any) -> Any:
    if key_mask is None or np.array_equal(key_mask, np.broadcast_to(key_mask[:1], key_mask.shape)):
        raise DoesNotApplyError
    return call.base(q, k, v, key_mask=np.broadcast_to(key_mask[:1], key_mask.shape), **masking)


def _other_window(by: int) -> Callable[..., Any]:
    def wrong(call: Call, q: Any, k: Any, v: Any, *, window: int | None = None, **masking: Any) -> Any:
        if window is None or window + by < 1:
            raise DoesNotApplyError
        return call.base(q, k, v, window=window + by, **masking)

    return wrong


def _masked_to(hidden: float, keeps: bool) -> Callable[..., Any]:
    """Later keys have the score `hidden`, or their own plus it."""

    def scores(s: np.ndarray) -> np.ndarray:
        later = np.triu(np.ones(s.shape[-2:], bool), 1 + s.shape[-1] - s.shape[-2])
        return np.where(later & ~np.isneginf(s), (s if keeps else 0) + hidden, s)

    return _by_scores(lambda s: _softmax(scores(s)), causal=False)


def _pieces() -> Iterator[Hypothesis]:
    """What goes wrong where several tokens meet a filled cache."""
    found: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]] = {
        "mask aligned at the top": (
            "a causal mask aligned at the top left of every cached piece", lambda t, u, start: u <= t - start
        ),
        "cache not read": ("a cache that is not read", lambda t, u, start: (u >= start) & (u <= t)),
        "no mask within a piece": ("no causal mask within a cached piece", lambda t, u, start: u < _ends(t, start)),
    }  # fmt: skip
    for name, (says, rule) in found.items():

        def edit(setup: Setup, rule: Any = rule) -> None:
            starts = np.array(setup.tokens.pieces)
            if len(starts) < 2:
                raise DoesNotApplyError

            def seen(t: np.ndarray, u: np.ndarray) -> np.ndarray:
                start = starts[np.searchsorted(starts, t, "right") - 1]
                return np.asarray(rule(t, u, start))

            setup.operate("attention", _seen(seen))

        yield one_of(name, says, "attention", _SCORES, edit)


def _ends(t: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Where the piece of every query ends."""
    return np.array([(t[start == s]).max() + 1 for s in start.ravel()]).reshape(start.shape)


# --------------------------------------------------------------------------------------------------------------- heads


def _read_by(index: Callable[[int, int, int], int], of: str = "kv") -> Callable[..., Any]:
    """Query head h reads head index(h, H, K) of the keys, the values, or both."""

    def wrong(call: Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
        H, K = q.shape[1], k.shape[1]
        heads = [index(h, H, K) for h in range(H)]
        right = [h * K // H for h in range(H)]
        if heads == right:
            raise DoesNotApplyError
        k, v = (
            moved(x, partial(lambda i, a: a[:, i], i))
            for x, i in ((k, heads if "k" in of else right), (v, heads if "v" in of else right))
        )
        return call.base(q, k, v, **masking)

    return wrong


def _heads(config: Any) -> Iterator[Hypothesis]:
    tiled = lambda h, H, K: h % K  # noqa: E731
    yield _attend("K/V heads tiled", "key and value heads tiled instead of repeated", _read_by(tiled))
    yield _attend("K heads tiled", "key heads tiled instead of repeated", _read_by(tiled, "k"))
    yield _attend("V heads tiled", "value heads tiled instead of repeated", _read_by(tiled, "v"), "context")
    yield _attend("first K/V head for all", "the first key and value head read by all", _read_by(lambda h, H, K: 0))
    yield _attend("last K/V head for all", "the last key and value head read by all", _read_by(lambda h, H, K: K - 1))
    yield _attend("heads reversed", "key and value heads in reverse", _read_by(lambda h, H, K: K - 1 - h * K // H))
    yield _attend(
        "next K/V head",
        "every head reading the next key and value head",
        _read_by(lambda h, H, K: (h * K // H + 1) % K),
    )
    yield _attend("k as v", "k in the place of v", lambda call, q, k, v, **m: call.base(q, k, k, **m), "context")
    yield _attend(
        "k and v swapped after RoPE",
        "k and v swapped after the rotation",
        lambda call, q, k, v, **m: call.base(q, v, k, **m),
    )
    yield one_of(
        "heads merged crosswise",
        "heads merged without moving them behind the positions",
        "attention",
        "o_proj",
        lambda s: s.operate("merge_heads", _merged_crosswise),
        ahead=True,
    )
    yield one_of(
        "heads split crosswise",
        "heads split without moving them before the positions",
        "attention",
        "q_rope k_rope",
        lambda s: s.operate("split_heads", _split_crosswise),
        ahead=True,
    )
    yield one_of(
        "dims before heads",
        "heads split with the dims of a head outside",
        "attention",
        "q_rope k_rope",
        lambda s: s.operate("split_heads", _split_dims_first),
    )


def _merged_crosswise(call: Call, x: Any) -> Any:
    B, H, S, D = x.shape
    return moved(x, lambda a: np.ascontiguousarray(a).reshape(B, S, H * D))


def _split_crosswise(call: Call, x: Any, heads: int) -> Any:
    B, S, n = x.shape
    return moved(x, lambda a: np.ascontiguousarray(a).reshape(B, heads, S, n // heads))


def _split_dims_first(call: Call, x: Any, heads: int) -> Any:
    B, S, n = x.shape
    return moved(x, lambda a: a.reshape(B, S, n // heads, heads).transpose(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------------------- softmax


def _softmax(s: np.ndarray, axis: int = -1, more: float = 0.0) -> np.ndarray:
    """more: what the denominator has besides, in units of e^0."""
    top = np.maximum(s.max(axis=axis, keepdims=True), 0.0 if more else -1e300)
    e = np.exp(s - top)
    return e / (e.sum(axis=axis, keepdims=True) + more * np.exp(-top))


def _by_scores(weights: Callable[[np.ndarray], np.ndarray], causal: bool = True) -> Callable[..., Any]:
    """Attention with other weights: weights(scores [B, H, S, T]), which are masked already if causal. Errors are taken
    to be those of the attention as it is."""

    def wrong(call: Call, q: Any, k: Any, v: Any, *, scale: float | None = None, **masking: Any) -> Any:
        right = call.base(q, k, v, scale=scale, **masking)
        a, b, c = (number(x) for x in (q, k, v))
        b, c = (np.repeat(x, a.shape[1] // x.shape[1], axis=1) for x in (b, c))
        scores = a @ b.swapaxes(-1, -2) * (a.shape[-1] ** -0.5 if scale is None else scale)
        hidden = _hidden(scores.shape, causal and masking.get("causal", True), masking)
        scores = np.where(hidden, -np.inf, scores)
        return with_noise_of(right, weights(scores) @ c)

    return wrong


def _hidden(shape: tuple[int, ...], causal: bool, masking: dict[str, Any]) -> np.ndarray:
    S, T = shape[-2:]
    hidden = np.broadcast_to(np.triu(np.ones((S, T), bool), 1 + T - S) & causal, shape)
    key_mask, mask = masking.get("key_mask"), masking.get("mask")
    if key_mask is not None:
        hidden = hidden | (np.asarray(key_mask) == 0)[:, None, None, :]
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype == bool else np.isneginf(mask))
    everything = hidden.all(axis=-1, keepdims=True)  # rows of padding, which are not compared
    return hidden & ~everything


def _capped(cap: float) -> Callable[..., Any]:
    return _by_scores(lambda s: _softmax(np.where(np.isneginf(s), s, cap * np.tanh(s / cap))))


def _softmaxes() -> Iterator[Hypothesis]:

    def edit(setup: Setup, value: float) -> None:
        setup.operate("attention", _capped(value))

    says = lambda v: f"scores capped at {v:.6g} by tanh"  # noqa: E731
    caps = free("score cap", "attention", _SCORES, edit, decades(1, 200, 5), says)
    yield from (caps.at(cap, f"scores capped at {cap:g}") for cap in (20.0, 30.0, 50.0))
    yield caps
    sink = _by_scores(lambda s: _softmax(s, more=1.0))
    yield _attend("sink", "a denominator of softmax with one more key of score 0", sink)
    yield _attend("softmax over queries", "a softmax over the queries", _by_scores(_over_queries), ahead=True)
    yield _attend("sigmoid for softmax", "a sigmoid for softmax", _by_scores(lambda s: 1 / (1 + np.exp(-s))))
    yield _attend(
        "squared relu for softmax", "max(0, score)^2 for softmax", _by_scores(lambda s: np.square(np.maximum(s, 0)))
    )
    hard = _by_scores(lambda s: (s == s.max(axis=-1, keepdims=True)).astype(float))
    yield _attend("largest score alone", "all weight on the largest score", hard)
    yield _attend("weights not divided", "softmax weights that are not divided by their sum", _by_scores(_undivided))
    yield _attend("mask after softmax", "the mask applied after softmax", _masked_late(), ahead=True)
    rescale = _by_scores(_not_rescaled)
    yield _attend(
        "online softmax without rescaling", "an online softmax without rescaling, in blocks of 16 keys", rescale
    )


def _over_queries(s: np.ndarray) -> np.ndarray:
    return _softmax(np.where(np.isneginf(s), -1e30, s), axis=-2) * ~np.isneginf(s)


def _undivided(s: np.ndarray) -> np.ndarray:
    return np.exp(s - s.max(axis=-1, keepdims=True))


def _masked_late() -> Callable[..., Any]:
    """Softmax over all keys, of which the weights of later ones are then set to 0."""

    def weights(s: np.ndarray) -> np.ndarray:
        later = np.triu(np.ones(s.shape[-2:], bool), 1 + s.shape[-1] - s.shape[-2])
        return np.where(later, 0, _softmax(s))

    return _by_scores(weights, causal=False)


def _not_rescaled(s: np.ndarray, tile: int = 16) -> np.ndarray:
    """Blocks of keys, each relative to the largest score so far."""
    top, total, out = np.full((*s.shape[:-1], 1), -np.inf), 0.0, np.zeros_like(s)
    for start in range(0, s.shape[-1], tile):
        block = s[..., start : start + tile]
        top = np.maximum(top, block.max(axis=-1, keepdims=True))
        out[..., start : start + tile] = np.exp(block - np.where(np.isneginf(top), 0, top))
        total = total + out[..., start : start + tile].sum(axis=-1, keepdims=True)
    return out / np.where(total == 0, 1, total)


# --------------------------------------------------------------------------------------------------------------- cache


def _caches() -> Iterator[Hypothesis]:
    for dtype in ("float16", "bfloat16"):

        def wrong(call: Call, q: Any, k: Any, v: Any, dtype: str = dtype, **masking: Any) -> Any:
            return call.base(q, rounded(k, dtype), rounded(v, dtype), **masking)

        yield _attend(f"cache in {dtype}", f"keys and values kept in {dtype}", wrong, places=True)

        def after(call: Call, q: Any, k: Any, v: Any, dtype: str = dtype, **masking: Any) -> Any:
            return rounded(call.base(q, k, v, **masking), dtype)

        yield _attend(f"context in {dtype}", f"attention's result in {dtype}", after, "context", places=True)
    says = "keys and values kept in float16, and queries and weights rounded to it for their products"
    yield _attend("attention by a cache in float16", says, _read_in_float16, places=True)
    yield _attend("cache in int8", "keys and values kept in int8, a scale for each head and position", _int8)

    def edit(setup: Setup, value: float) -> None:
        setup.operate("attention", lambda call, *a, **m: times(call.base(*a, **m), value))

    grid = [-1.0, 0.25, 0.5, 0.8, 0.95, 1.05, 1.25, 2.0, 4.0]
    yield free("factor of the context", "attention", "context", edit, grid, lambda v: f"the context times {v:.6g}")


def _read_in_float16(call: Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
    """As llama.cpp reads a cache in float16: what is multiplied by it is rounded to float16 first."""
    q, k, v = (rounded(x, "float16") for x in (q, k, v))
    return _by_scores(lambda s: rounded(_softmax(s), "float16"))(call, q, k, v, **masking)


def _int8(call: Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
    def kept(a: np.ndarray) -> np.ndarray:
        step = np.abs(a).max(axis=-1, keepdims=True) / 127
        return np.round(a / np.where(step == 0, 1, step)) * step

    k, v = (with_noise_of(x, kept(number(x))) for x in (k, v))
    return call.base(q, k, v, **masking)
