"""Fixed calls of the level `basic` for operators whose other ones ask for more. See `refllm.strategies.levels`."""

from collections.abc import Callable, Iterator
from typing import Any

from refllm.strategies.arrays import Array
from refllm.strategies.call import Call


def attention(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """attention: as many queries as keys, as many key heads as query heads, causal, nothing hidden."""
    for kind, (B, H, S, D), scale in (
        ("17 tokens, larger queries", (2, 3, 17, 16), 3.0),
        ("129 tokens, head dim 40", (1, 2, 129, 40), 1.0),
    ):
        q, k = (Array((B, H, S, D), dtype, seed=seed, scale=s) for seed, s in ((0, scale), (1, 1.0)))
        yield Call(operator, dtype, (q, k, Array((B, H, S, D), dtype, seed=2, mean=0.5)), kind=kind)


def decode_attention(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """decode_attention: one token, as many key heads as query heads, lengths of at least 1."""
    for kind, (H, N, D), lengths in (
        ("one token, each row its own length", (2, 9, 8), (9, 1, 4)),
        ("65 slots, head dim 40", (1, 65, 40), (65, 33)),
        ("257 slots", (2, 257, 64), (257, 128)),
    ):
        B = len(lengths)
        filled = Array((B,), "int64", "zeros", planted=tuple(((b,), float(n)) for b, n in enumerate(lengths)))
        caches = (Array((B, H, N, D), dtype, seed=1), Array((B, H, N, D), dtype, seed=2, mean=0.5))
        yield Call(operator, dtype, (Array((B, H, 1, D), dtype), *caches, filled), kind=kind)
    # Two keys of one score. Of one all products lie between two numbers of bfloat16: rounded before they are summed,
    # they make another one.
    every, half = (0, (None, None)), (None, 32)
    k = Array(
        (1, 1, 2, 64), dtype, "ones", scale=1.5, planted=(((*every, 1, half), 1.0), ((*every, 1, (32, None)), 2.0))
    )
    v = Array((1, 1, 2, 64), dtype, "ones", planted=(((*every, 1), 0.0),))
    q, two = Array((1, 1, 1, 64), dtype, "ones", scale=8.0625), Array((1,), "int64", "zeros", planted=(((0,), 2.0),))
    yield Call(operator, dtype, (q, k, v, two), kind="products between two numbers")


def cross_entropy(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """cross_entropy: the mean over rows that all count."""
    for kind, (N, V), scale in (
        ("17 classes", (5, 17), 3.0),
        ("one row of 1025 classes", (1, 1025), 1.0),
        ("33 rows of 4097 classes", (33, 4097), 10.0),
    ):
        labels = Array((N,), "int64", "integers", scale=float(V), seed=1)
        yield Call(operator, dtype, (Array((N, V), dtype, scale=scale), labels), kind=kind)


def linear_cross_entropy(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """linear_cross_entropy: the mean over rows that all count."""
    for kind, (N, V, E) in (("33 classes", (5, 33, 17)), ("257 classes", (17, 257, 129))):
        labels = Array((N,), "int64", "integers", scale=float(V), seed=2)
        weight = Array((V, E), dtype, scale=2 * float(E) ** -0.5, seed=1)
        yield Call(operator, dtype, (Array((N, E), dtype), weight, labels), kind=kind)


CORNERS: dict[str, Callable[[str, str, str], Iterator[Any]]] = {
    "attention": attention,
    "decode_attention": decode_attention,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}
