"""Designed inputs: a few small calls per operator, on which hypotheses differ from what is right and from each other.

No length is another's, or a multiple of a tile; eps is large enough to be seen; weights, heads and labels are all
different; means are not 0. One call per operator is longer than a tile or two, for what happens at its end.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np

from refllm.ops.backward_contracts import forward_name, is_backward
from refllm.strategies import corners_backward
from refllm.strategies.arrays import Array
from refllm.strategies.call import Call
from refllm.strategies.gradients import backward_call, stands

_INF, _NAN = float("inf"), float("nan")


class OfAKind(Protocol):
    """A call that says which kind it is."""

    @property
    def kind(self) -> str: ...


CORNER = "designed corner: "
"""What the kinds of those calls begin with that ask more than the formula: what overflows, is NaN, or has no key."""


def is_corner(call: OfAKind) -> bool:
    """Whether a call asks more than the formula."""
    return call.kind.startswith(CORNER)


def _kind(words: str) -> str:
    return words.replace("!", CORNER) if words.startswith("!") else f"designed: {words}"


@cache
def designed(operator: str, dtype: str) -> tuple[Call, ...]:
    """The designed calls of an operator, with all that floats in one dtype; none of one that has none yet."""
    if is_backward(operator):
        return tuple(_gradients(operator, dtype))
    return tuple(_OF[operator](operator, dtype)) if operator in _OF else ()


def _gradients(operator: str, dtype: str) -> Iterator[Call]:
    """The designed calls of the forward operator that ask no more than the formula, or some of its fixed calls, with an
    incoming gradient that has a mean, and along the input."""
    name = forward_name(operator)
    forward = [c for c in designed(name, dtype) if not is_corner(c)]
    forward = forward or list(corners_backward.ONLY[name](dtype))[:5]
    for call in forward:
        if stands(call):
            yield replace(backward_call(call), kind=call.kind)
            yield replace(backward_call(call, "along the input"), kind=f"{call.kind}, gradient along the input")


def _norms(operator: str, dtype: str) -> Iterator[Call]:
    def call(kind: str, x: Array, eps: float, residual: float = 1.0) -> Call:
        E = x.shape[-1:]
        after = [Array(E, dtype, scale=0.5, mean=1.0, seed=1)]
        after += [Array(E, dtype, seed=2, mean=0.5)] if "layer" in operator else []
        before = [x]
        if operator.startswith("add"):
            before.append(Array(x.shape, dtype, seed=3, mean=-0.5 * residual, scale=residual * max(x.scale, 0.7)))
        return Call(operator, dtype, (*before, *after, eps), kind=_kind(kind))

    yield call("eps of the size of the squares", Array((3, 11), dtype, mean=0.7), 0.25)
    yield call("a mean", Array((5, 6), dtype, mean=2.0, seed=5), 1e-5)
    yield call("small numbers", Array((4, 10), dtype, scale=1e-3, seed=6), 1e-5, 0.0)
    yield call("!a row of zeros", Array((4, 7), dtype, seed=7, planted=(((1,), 0.0),)), 1e-6, 0.0)
    yield call("a long row", Array((3, 1541), dtype, mean=0.5, seed=8), 0.1)
    yield call("many rows", Array((67, 5), dtype, mean=0.5, seed=9), 0.1)
    yield call("!NaN in a row", Array((3, 5), dtype, seed=10, planted=(((1, 2), _NAN),)), 0.1)


def _swiglu(operator: str, dtype: str) -> Iterator[Call]:
    def call(kind: str, gate: Array, **up: Any) -> Call:
        return Call(operator, dtype, (gate, Array(gate.shape, dtype, seed=1, mean=0.5, **up)), kind=_kind(kind))

    yield call("a few numbers", Array((3, 11), dtype, scale=2.0, mean=0.3))
    yield call("a few more", Array((7, 5), dtype, scale=3.0, mean=-0.5, seed=2))
    yield call("!large gates", Array((2, 7), dtype, "ramp", scale=2000.0, mean=-999.0), planted=(((0,), 3.0),))
    yield call("gates from -20", Array((1, 23), dtype, "ramp", scale=22.0, mean=-20.0))
    yield call("a long row", Array((2, 1541), dtype, seed=4))
    yield call("many rows", Array((67, 5), dtype, seed=5))
    yield call("!NaN", Array((2, 5), dtype, seed=6, planted=(((0, 1), _NAN),)), planted=(((1, 3), _NAN),))


def _relu2(operator: str, dtype: str) -> Iterator[Call]:
    def call(kind: str, x: Array) -> Call:
        return Call(operator, dtype, (x,), kind=_kind(kind))

    yield call("a few numbers", Array((3, 11), dtype, scale=2.0, mean=0.3))
    yield call("a few more", Array((7, 5), dtype, scale=8.0, seed=2))
    yield call("a long row", Array((2, 1541), dtype, seed=4))
    yield call("many rows", Array((67, 5), dtype, seed=5))
    yield call("!NaN and infinity", Array((2, 5), dtype, planted=(((0, 1), _NAN), ((1, 3), _INF), ((1, 1), -_INF))))
    square = {"float16": 1000.0}.get(dtype, 1e30)  # of which there is none in the format
    small = {"float16": 2e-3}.get(dtype, 3e-20)
    yield call("!squares beyond the format", Array((2, 5), dtype, seed=7, planted=(((0, 1), square), ((1, 2), 1.5))))
    yield call("!squares below the format", Array((2, 5), dtype, seed=8, planted=(((0, 1), small), ((1, 2), small))))


def _tables(S: int, half: int, dtype: str, batch: int = 0) -> tuple[Array, Array]:
    shape = (batch, S, half) if batch else (S, half)
    # With seed 0 the positions from 3 on, else others in every sequence.
    cos, sin = (Array(shape, dtype, v, mean=3.0, scale=0.01, seed=9 * bool(batch)) for v in ("cos", "sin"))
    return cos, sin


def _heads(B: int, H: int, S: int, D: int, dtype: str, seed: int) -> Array:
    return Array((B, H, S, D), dtype, seed=seed, mean=0.3)


def _rope(operator: str, dtype: str) -> Iterator[Call]:
    def call(kind: str, S: int, D: int, half: int, interleaved: bool, batch: int = 0) -> Call:
        q, k = _heads(2, 4, S, D, dtype, 1), _heads(2, 2, S, D, dtype, 2)
        words = (("interleaved", interleaved),)
        return Call(operator, dtype, (q, k, *_tables(S, half, dtype, batch)), words, _kind(kind))

    yield call("halves", 5, 10, 5, False)
    yield call("pairs", 5, 10, 5, True)
    yield call("halves, a part of the head", 5, 12, 4, False)
    yield call("pairs, a part of the head", 5, 12, 4, True)
    yield call("positions of their own", 6, 8, 4, False, batch=2)
    yield call("many positions", 67, 8, 4, True)


def _norm_rope(operator: str, dtype: str) -> Iterator[Call]:
    def call(
        norm: str,
        S: int,
        D: int,
        half: int,
        interleaved: bool,
        eps: float,
        batch: int = 0,
        size: float = 1.0,
        zero: bool = False,
    ) -> Call:
        planted: Any = ((((None, None), 1, 1), 0.0),) if zero else ()
        q, k = (Array((2, n, S, D), dtype, seed=n, mean=0.6 * size, scale=size, planted=planted) for n in (4, 2))
        weights = (Array((n, D), dtype, seed=n + 10, mean=1.0, scale=0.5) for n in (4, 2))
        words = (("norm", norm), ("interleaved", interleaved))
        kind = f"designed: {norm}, {'pairs' if interleaved else 'halves'}, {S} positions, of size {size:g}"
        kind = _kind("!a head of zeros, " + norm) if zero else kind
        return Call(operator, dtype, (q, k, *weights, *_tables(S, half, dtype, batch), eps), words, kind)

    yield call("rms", 5, 10, 5, False, 0.25)
    yield call("layer", 5, 10, 5, True, 0.25)
    yield call("rms", 5, 12, 4, True, 1e-5)
    yield call("layer", 5, 12, 4, False, 0.25)
    yield call("rms", 6, 10, 3, False, 0.25, batch=2)
    yield call("rms", 3, 10, 5, False, 1e-5, size=1e-3)
    yield call("layer", 3, 10, 5, True, 1e-5, size=1e-3)
    yield call("rms", 3, 10, 5, False, 1e-6, zero=True)
    yield call("layer", 3, 10, 5, False, 1e-6, zero=True)
    yield call("rms", 67, 8, 4, False, 0.1)


def _projected(operator: str, dtype: str) -> Iterator[Call]:
    def call(
        S: int, E: int, D: int, half: int, interleaved: bool, eps: float, batch: int = 0, zero: bool = False
    ) -> Call:
        H, K = 4, 2
        rows = (H + 2 * K) * D
        x = Array((2, S, E), dtype, seed=1, mean=0.6, planted=((((None, None), 1), 0.0),) if zero else ())
        weight = Array((E,), dtype, seed=2, mean=1.0, scale=0.5)
        w, b = Array((rows, E), dtype, seed=3, scale=E**-0.5), Array((rows,), dtype, seed=4)
        words = (("num_heads", H), ("num_kv_heads", K), ("interleaved", interleaved))
        kind = f"designed: {'pairs' if interleaved else 'halves'}, {S} positions, a row of {E}"
        kind = _kind("!a row of zeros") if zero else kind
        return Call(operator, dtype, (x, weight, w, b, *_tables(S, half, dtype, batch), eps), words, kind)

    yield call(5, 7, 8, 4, False, 0.25)
    yield call(5, 7, 8, 4, True, 0.25)
    yield call(5, 9, 10, 3, True, 1e-5)
    yield call(3, 9, 10, 3, False, 0.25)
    yield call(6, 7, 8, 3, False, 0.25, batch=2)
    yield call(3, 7, 8, 4, True, 1e-6, zero=True)
    yield call(3, 139, 8, 4, False, 0.1)
    yield call(67, 5, 8, 4, False, 0.1)


def _attention(operator: str, dtype: str) -> Iterator[Call]:
    def call(kind: str, S: int, T: int, D: int = 10, B: int = 2, K: int = 2, size: float = 1.0, **words: Any) -> Call:
        q = Array((B, 4, S, D), dtype, seed=1, scale=size)
        k, v = Array((B, K, T, D), dtype, seed=2, mean=0.3), Array((B, K, T, D), dtype, seed=3, mean=1.0)
        if size > 100:
            k = Array((B, 2, T, D), dtype, seed=2)
        return Call(operator, dtype, (q, k, v), tuple(words.items()), _kind(kind))

    yield call("a head of k for each of q", 5, 5, K=4)
    yield call("as many queries as keys", 5, 5)
    yield call("cached keys come first", 3, 7)
    yield call("with lse", 5, 5, 13, return_lse=True)
    yield call("not causal", 4, 9, causal=False, return_lse=True)
    yield call("a scale", 5, 5, scale=0.3)
    yield call("a negative scale", 3, 5, scale=-0.2, return_lse=True)
    hidden = (((0, 1), 0), ((0, 4), 0), ((1, 3), 0))
    yield call("a key mask", 5, 6, key_mask=Array((2, 6), "bool", "ones", planted=hidden))
    yield call(
        "a key mask, not causal",
        3,
        6,
        causal=False,
        return_lse=True,
        key_mask=Array((2, 6), "bool", "ones", planted=hidden),
    )
    blind = Array((2, 5), "bool", "ones", planted=(((0,), 0), ((1, 1), 0)))
    yield call("!no keys in a sequence", 3, 5, causal=False, return_lse=True, key_mask=blind)
    yield call("!large scores", 4, 5, 9, size=3000.0)
    yield _negative(operator, dtype)
    yield call("many keys", 67, 139, 9, size=3.0)
    yield call("many keys, not causal", 5, 197, 9, size=3.0, causal=False, return_lse=True)
    yield call("long heads", 3, 4, 203, B=1)


def _negative(operator: str, dtype: str) -> Call:
    """Scores of about -60000, smaller than what some mask with."""
    q = Array((2, 4, 4, 8), dtype, "ones", mean=1.0, planted=(((0, 1, 2, 3), 2.25),))
    k = Array((2, 2, 5, 8), dtype, "ones", planted=(((0, 0, 1, 2), 1.0625), ((1, 1, 3), 0.9375)))
    v = Array((2, 2, 5, 8), dtype, seed=3, mean=1.0)
    return Call(operator, dtype, (q, k, v), (("scale", -4000.0),), _kind("!very negative scores"))


def _decode(operator: str, dtype: str) -> Iterator[Call]:
    def call(
        kind: str, S: int, N: int, lengths: tuple[int, ...], D: int = 10, K: int = 2, size: float = 1.0, **words: Any
    ) -> Call:
        B = len(lengths)
        q = Array((B, 4, S, D), dtype, seed=1, scale=size)
        k, v = Array((B, K, N, D), dtype, seed=2, mean=0.3), Array((B, K, N, D), dtype, seed=3, mean=1.0)
        long = Array((B,), "int64", "zeros", planted=tuple(((b,), n) for b, n in enumerate(lengths)))
        return Call(operator, dtype, (q, k, v, long), tuple(words.items()), _kind(kind))

    yield call("a head of k for each of q", 1, 9, (5, 2, 7), K=4)
    yield call("one token", 1, 9, (5, 2, 7))
    yield call("three tokens", 3, 11, (6, 4, 9))
    yield call("a scale", 1, 7, (4, 6), scale=0.3)
    yield call("a negative scale", 2, 7, (4, 6), scale=-0.3)
    yield call("!no slots in a sequence", 1, 7, (4, 0, 3))
    yield call("!large scores", 1, 9, (5, 7), size=3000.0)
    yield call("many slots", 2, 301, (139, 267, 68), size=3.0)
    yield call("long heads", 1, 5, (4, 3), 203)


def _labels(n: int, classes: int, ignored: tuple[int, ...], value: int, first: int | None) -> Array:
    given = [(3 * i + 1) % classes for i in range(n)]
    given[0] = given[0] if first is None else first
    given = [value if i in ignored else label for i, label in enumerate(given)]
    return Array((n,), "int64", "zeros", planted=tuple(((i,), label) for i, label in enumerate(given)))


def _logits(rows: tuple[Array, ...]) -> np.ndarray:
    """Those of the first row."""
    first, *weight = (x.array() for x in rows)
    return first[0] @ weight[0].T if weight else first[0]


def _losses(operator: str, dtype: str) -> Iterator[Call]:
    linear = operator.startswith("linear")

    def call(
        kind: str,
        N: int,
        V: int,
        ignored: tuple[int, ...] = (),
        E: int = 6,
        size: float = 2.0,
        value: int = -100,
        **words: Any,
    ) -> Call:
        given = dict(words) | ({} if value == -100 else {"ignore_index": value})
        rows: tuple[Array, ...]
        if linear:
            rows = (Array((N, E), dtype, seed=1, scale=size), Array((V, E), dtype, seed=2, mean=0.2))
        else:
            rows = (Array((N, V), dtype, seed=1, scale=size, mean=0.5),)
        first = int(_logits(rows).argmax()) if size > 100 else None  # a label with the largest logit of its row
        labels = _labels(N, min(V, value) if value > 0 else V, ignored, value, first)
        return Call(operator, dtype, (*rows, labels), tuple(given.items()), _kind(kind))

    yield call("every row counts", 6, 7)
    yield call("every row counts, a loss per row", 6, 7, reduction="none")
    yield call("a loss per row", 7, 5, (2, 5), reduction="none")
    yield call("the mean", 9, 7, (1, 2, 7))
    yield call("the sum", 9, 7, (1, 7), reduction="sum")
    yield call("another ignore_index", 8, 6, (3, 4), value=4, reduction="none")
    yield call("the mean, another ignore_index", 8, 6, (3, 4), value=4)
    yield call("unlikely labels", 7, 9, (3,), size=4.0 if linear else 9.0, reduction="none")
    yield call("!ignore_index is -1", 8, 6, (3, 4), value=-1, reduction="none")
    yield call("!large logits", 5, 7, (1,), size=3000.0, reduction="none")
    yield call("!nothing to count", 3, 5, (0, 1, 2))
    yield call("many classes", 5, 301, (2,), reduction="none")
    yield call("the mean over many classes", 19, 301, (2, 3, 11))
    if linear:
        yield call("very many classes", 3, 587, reduction="none")
        yield call("a long row", 5, 7, (2,), 139, size=0.5, reduction="none")
    else:
        yield call("very many classes", 3, 2309, reduction="none")


_OF: dict[str, Callable[[str, str], Iterator[Call]]] = {
    **dict.fromkeys(("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"), _norms),
    "rope": _rope,
    "norm_rope": _norm_rope,
    "rms_norm_qkv_rope": _projected,
    "attention": _attention,
    "decode_attention": _decode,
    "swiglu": _swiglu,
    "relu2": _relu2,
    "cross_entropy": _losses,
    "linear_cross_entropy": _losses,
}
