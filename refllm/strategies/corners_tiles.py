"""Fixed calls at the sizes and places where tiles, chunks and 32-bit offsets end. See `refllm.strategies.fixed`."""

from collections.abc import Callable, Iterator
from typing import Any

from refllm.strategies.arrays import Array
from refllm.strategies.call import Call

NAN, INF, ALL = float("nan"), float("inf"), (None, None)
OFF_GRID = {"bfloat16": 1.0038, "float16": 1.00048}
"""Float32 numbers a little less than half a unit of the narrow format above 1: rounding shifts all of them one way."""
FAR: dict[str, Any] = {"layout": "far"}
"""4 GB of addresses (8 in float32), of which only the pages that hold a number take memory."""


def norms(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """rms_norm, add_rms_norm, layer_norm, add_layer_norm."""
    add, layer = operator.startswith("add"), "layer" in operator

    def call(kind: str, x: Array, residual: Array | None = None, weight: Array | None = None) -> Call:
        E = x.shape[-1:]
        w = weight or Array(E, dtype, scale=0.3, mean=1.0, seed=1)
        first = (x, residual or Array(x.shape, dtype, seed=3), w) if add else (x, w)
        bias = (Array(E, dtype, seed=2),) if layer else ()
        return Call(operator, dtype, (*first, *bias, 1e-5), kind=kind)

    if dtype in OFF_GRID and policy == "fused":
        x = Array((7, 40), dtype)
        yield call("float32 weights off the grid", x, weight=Array((40,), "float32", "ones", scale=OFF_GRID[dtype]))
    # A variance as mean(x^2) - mean(x)^2 has no digits left.
    x = Array((2, 17), dtype, mean=1000.0, scale=2.0)
    yield call("mean 1000, little spread", x, Array((2, 17), dtype, "zeros"))
    yield call("a row longer than 16384", Array((1, 16_385), dtype))  # rows of several tiles
    if add:
        yield call("x is 0", Array((2, 24), dtype, "zeros"))  # the residual given back, and not a copy
        yield call("residual past 2^31", Array((3, 16), dtype), Array((3, 16), dtype, seed=3, **FAR))


def rotations(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """rope and norm_rope."""

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int, int],
        wide: bool = False,
        q: dict[str, Any] | None = None,
        k: dict[str, Any] | None = None,
    ) -> Call:
        B, H, K, S, D, R = sizes
        table: dict[str, Any] = {"dtype": "float32" if wide else dtype, "mean": 1000.0}
        arrays = Array((B, H, S, D), dtype, **(q or {})), Array((B, K, S, D), dtype, **({"seed": 1} | (k or {})))
        tables = Array((S, R // 2), values="cos", **table), Array((S, R // 2), values="sin", **table)
        if operator == "rope":
            return Call(operator, dtype, (*arrays, *tables), (("interleaved", True),), kind)
        if wide:
            weights = tuple(Array((n, D), "float32", "ones", scale=OFF_GRID[dtype]) for n in (H, K))
        else:
            weights = tuple(Array((n, D), dtype, scale=0.3, mean=1.0, seed=5 + n) for n in (H, K))
        keywords = (("norm", "rms"), ("interleaved", True))
        return Call(operator, dtype, (*arrays, *weights, *tables, 1e-5), keywords, kind)

    if dtype in OFF_GRID and policy == "fused":
        yield call("float32 tables and weights off the grid", (2, 4, 2, 5, 16, 16), True)
    # An odd head_dim: strides may be counted in chunks, which an even one has.
    yield call("q past 2^31", (3, 1, 1, 1, 5, 4), q=FAR)
    yield call("k past 2^31", (3, 1, 1, 1, 5, 4), k=FAR)
    yield call("40 heads of 128 dims", (1, 40, 2, 1, 128, 128))  # heads after the first tile


def projection(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """rms_norm_qkv_rope."""

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int, int, int],
        x: dict[str, Any] | None = None,
        norm: float = 0.3,
        w: dict[str, Any] | None = None,
        bias: tuple[Any, ...] | None = None,
        interleaved: bool = True,
        eps: float = 1e-5,
    ) -> Call:
        B, S, E, H, K, D, R = sizes
        rows = (H + 2 * K) * D
        arguments = (
            Array((B, S, E), dtype, **(x or {})),
            Array((E,), dtype, scale=norm, mean=1.0, seed=1),
            Array((rows, E), dtype, scale=float(E) ** -0.5, seed=2, **(w or {})),
            None if bias is None else Array((rows,), dtype, seed=3, planted=bias),
            *(Array((S, R // 2), dtype, values, mean=1000.0) for values in ("cos", "sin")),
            eps,
        )
        heads = (("num_heads", H), ("num_kv_heads", K), ("interleaved", interleaved))
        return Call(operator, dtype, arguments, heads, kind)

    yield call("one token for all sequences", (3, 2, 24, 2, 1, 8, 8), {"layout": "expanded"})
    # What is not rotated passes: 0 times an infinite neighbour would be NaN. Dim 6 of q, dim 3 of v.
    infinite = (((6,), INF), ((27,), INF))
    yield call("infinite bias in dims past R", (1, 2, 24, 2, 1, 8, 4), bias=infinite)
    # x times the norm's weight, before it is scaled, ends in float16.
    yield call("large rows and norm weights", (1, 2, 24, 2, 1, 8, 8), {"scale": 300.0}, 300.0)
    # Partial sums that are kept narrow; an eps that is always the usual one.
    yield call("10 tokens, 513 features", (2, 5, 513, 1, 1, 8, 8), eps=0.1)
    yield call("x past 2^31", (3, 1, 16, 1, 1, 2, 2), FAR)
    yield call("weights past 2^31", (1, 1, 16, 1, 1, 2, 2), w=FAR)


def attention(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """attention."""

    def call(
        kind: str,
        sizes: tuple[int, int, int, int, int, int],
        q: dict[str, Any] | None = None,
        k: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> Call:
        B, H, K, S, T, D = sizes
        arrays = (
            Array((B, H, S, D), dtype, **(q or {})),
            Array((B, K, T, D), dtype, seed=1, **(k or {})),
            Array((B, K, T, D), dtype, seed=2, mean=0.5),
        )
        return Call(operator, dtype, arrays, tuple(keywords.items()), kind)

    yield call("negative scale", (1, 1, 1, 2, 5, 8), scale=-0.4)
    yield call("129 keys, all seen", (1, 1, 1, 1, 129, 8), causal=False)  # keys after the last whole tile
    hidden = Array((1, 130), "bool", "ones", planted=(((0, (3, 9)), 0),))
    yield call("key mask, 130 keys", (1, 1, 1, 2, 130, 8), key_mask=hidden)  # in a tile that is else seen whole
    yield call("sequences past 2^31", (3, 1, 1, 1, 2, 8), FAR)
    yield call("keys past 2^31", (1, 1, 1, 1, 3, 8), None, FAR)
    if dtype in OFF_GRID:
        yield call("ten tiles of keys", (1, 2, 1, 64, 600, 64))  # sums rounded after every tile


def decode_attention(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """decode_attention."""

    def call(kind: str, S: int, N: int, D: int, lengths: tuple[int, ...], k: Any = None, v: Any = None) -> Call:
        B = len(lengths)
        arrays = (
            Array((B, 2, S, D), dtype),
            Array((B, 1, N, D), dtype, seed=1, **(k or {})),
            Array((B, 1, N, D), dtype, seed=2, mean=0.5, **(v or {})),
            Array((B,), "int64", "zeros", planted=tuple(((b,), float(n)) for b, n in enumerate(lengths))),
        )
        return Call(operator, dtype, arrays, (), kind)

    if policy == "fused":
        newest = {"planted": (((0, ALL, 4), NAN),)}
        yield call("NaN in the newest slot", 3, 6, 8, (5, 6), v=newest)  # earlier tokens do not see it
    yield call("sequences past 2^31", 1, 2, 8, (2, 1, 2), FAR)


def cross_entropy(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """cross_entropy."""
    labels = Array((2,), "int64", "zeros", planted=(((0,), 8192.0), ((1,), 5.0)))
    one_by_one = (("reduction", "none"),)
    # The largest logit comes late: what was summed before must fade.
    growing = Array((2, 8193), dtype, "ramp", scale=60.0)
    yield Call(operator, dtype, (growing, labels), one_by_one, "a row longer than 8192, growing")
    last = Array((2, 8193), dtype, planted=(((ALL, 8192), 20.0),))
    yield Call(operator, dtype, (last, labels), one_by_one, "the largest logit after 8192")
    x, few = Array((3, 10), dtype, layout="transposed"), Array((3,), "int64", "integers", scale=10.0, seed=1)
    yield Call(operator, dtype, (x, few), one_by_one, "logits not dense")


def linear_cross_entropy(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """linear_cross_entropy."""

    def call(kind: str, N: int, V: int, E: int, x: Any = None, w: Any = None) -> Call:
        arrays = Array((N, E), dtype, **(x or {})), Array((V, E), dtype, seed=1, **(w or {}))
        labels = Array((N,), "int64", "integers", scale=float(V), seed=3, planted=(((0,), V - 1.0),))
        return Call(operator, dtype, (*arrays, labels), (("reduction", "none"),), kind)

    yield call("1025 classes, each row", 3, 1025, 24)  # chunks of the vocabulary, merged
    small = {"scale": 2 * 2049.0**-0.5}
    yield call("2049 features", 17, 33, 2049, None, small)  # partial sums that are kept narrow
    yield call("rows past 2^31", 3, 3, 8, FAR)
    yield call("weights past 2^31", 2, 3, 8, None, FAR)


CORNERS: dict[str, Callable[[str, str, str], Iterator[Call]]] = {
    "rms_norm": norms,
    "add_rms_norm": norms,
    "layer_norm": norms,
    "add_layer_norm": norms,
    "rope": rotations,
    "norm_rope": rotations,
    "rms_norm_qkv_rope": projection,
    "attention": attention,
    "decode_attention": decode_attention,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}
