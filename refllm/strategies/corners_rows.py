"""Fixed calls of the operators that work row by row: norms, activations, losses. See `refllm.strategies.fixed`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from refllm.strategies.arrays import Array
from refllm.strategies.call import Call

NAN = float("nan")


def norms(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """rms_norm, add_rms_norm, layer_norm, add_layer_norm."""
    bias = "layer" in operator

    def call(kind: str, x: Array, eps: float = 1e-5, with_bias: bool = True, weight: str = "dense") -> Call:
        E = x.shape[-1:]
        # Weights 1 apart by 2^-8 and more: "1 + w formed in bfloat16" and "no weight" show.
        w = Array(E, dtype, scale=0.3, mean=1.0, seed=1, layout=weight)
        b = Array(E, dtype, seed=2) if with_bias else None
        quiet = kind in ("tiny rows: eps decides", "zero rows", "mean 1000 in a row that fills no block")
        r = Array(x.shape, dtype, "zeros" if quiet else "normal", seed=3, scale=x.scale)
        first = (x, r, w) if operator.startswith("add") else (x, w)
        return Call(operator, dtype, (*first, *((b, eps) if bias else (eps,))), kind=kind)

    yield call("plain", Array((3, 8), dtype))  # one for the other, weight + 1, bias dropped or added twice, a wrong sum
    yield call(
        "tiny rows: eps decides", Array((2, 16), dtype, scale=1e-3), 1e-5, with_bias=False
    )  # eps wrong or outside
    # The mean of squares and not the variance, padding lanes that add (0 - mean)^2, a variance as E[x^2] - mean^2.
    yield call("mean 1000 in a row that fills no block", Array((2, 17), dtype, mean=1000.0, scale=30.0))
    yield call("zero rows", Array((3, 33), dtype, planted=(((1,), 0.0),)))  # 0 / 0
    yield call("outlier 10000", Array((2, 100), dtype, planted=(((1, 99), 1e4),)))  # squares that overflow float16
    yield call("NaN in one row", Array((3, 5), dtype, planted=(((1, 4), NAN),)))  # reaches its own row and no other
    yield call("strides", Array((3, 2, 24), dtype, layout="gaps"), weight="step")  # rows found by size, not by stride
    yield call("last axis not dense", Array((3, 40), dtype, layout="transposed"))
    yield call("view of a wider row", Array((5, 65), dtype, layout="shifted"))
    yield call("many rows", Array((67, 20), dtype), 0.1)  # more rows than a program takes at once; not the usual eps
    yield call("a row longer than 1024", Array((2, 1025), dtype))  # a tail that is never read or written
    yield call("a row longer than 4096", Array((1, 4097), dtype))
    yield call("no rows", Array((0, 8), dtype))
    yield call("offsets past 2^31", Array((3, 16), dtype, layout="far"))  # row * stride in 32 bits


def swiglu(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """swiglu."""

    def call(kind: str, gate: Array, up: str = "dense") -> Call:
        return Call(operator, dtype, (gate, Array(gate.shape, dtype, seed=1, layout=up)), kind=kind)

    yield call("plain", Array((3, 8), dtype))  # gate and up swapped, gelu for silu, no gate
    yield call("large gates", Array((2, 16), dtype, scale=100.0))  # e^-x overflows
    yield call("gates of 1000", Array((1, 16), dtype, "ramp", scale=2000.0, mean=-1000.0))
    yield call("gates from -16 to 0", Array((1, 65), dtype, "ramp", scale=16.0, mean=-16.0))  # small, and not 0
    yield call("small gates", Array((2, 16), dtype, scale=1e-3))  # silu rounded before the product
    yield call("NaN in one element", Array((2, 9), dtype, planted=(((1, 8), NAN),)))
    yield call("infinity in one element", Array((2, 9), dtype, planted=(((0, 3), float("inf")),)))
    yield call("halves of wider rows", Array((3, 33), dtype, layout="wider"), up="shifted")
    yield call("strides", Array((3, 2, 24), dtype, layout="gaps"), up="heads")
    yield call("last axis not dense", Array((5, 20), dtype, layout="transposed"), up="step")
    yield call("a row longer than 1024", Array((3, 1025), dtype))  # a tail that is dropped
    yield call("more than 4096 elements", Array((1, 4097), dtype))
    yield call("a real row", Array((2, 8193), dtype))
    yield call("nothing", Array((0, 8), dtype))
    yield call("offsets past 2^31", Array((3, 16), dtype, layout="far"))


def relu2(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """relu2."""
    x = Array((3, 8), dtype)
    large = replace(x, values="uniform", scale=10.0, mean=250.0) if dtype == "float16" else replace(x, scale=1e19)
    for kind, array in (
        ("plain", x),  # relu for relu^2, square without relu
        ("small values", replace(x, scale=1e-3)),
        ("near overflow", large),  # the square formed in a wider or narrower format than the result's
        ("subnormal squares", replace(x, scale=1e-4 if dtype == "float16" else 1e-20)),
        ("NaN in one element", replace(x, planted=(((1, 7), NAN),))),  # max(NaN, 0) is NaN
        ("infinity in one element", replace(x, planted=(((0, 3), float("inf")), ((2, 3), float("-inf"))))),
        ("strides", Array((3, 2, 24), dtype, layout="gaps")),
        ("view of a wider row", Array((5, 65), dtype, layout="shifted")),
        ("last axis not dense", Array((5, 20), dtype, layout="transposed")),
        ("a row longer than 1024", Array((3, 1025), dtype)),
        ("more than 4096 elements", Array((1, 4097), dtype)),
        ("a real row", Array((2, 8193), dtype)),
        ("nothing", Array((0, 8), dtype)),
        ("offsets past 2^31", Array((3, 16), dtype, layout="far")),
    ):
        yield Call(operator, dtype, (array,), kind=kind)


def cross_entropy(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """cross_entropy."""

    def call(
        kind: str, logits: Array, *labels: tuple[int, int], seed: int = 1, lie: str = "dense", **keywords: Any
    ) -> Call:
        N, V = logits.shape
        planted = tuple(((row,), float(label)) for row, label in labels)
        classes = Array((N,), "int64", "integers", scale=float(V), seed=seed, planted=planted, layout=lie)
        return Call(operator, dtype, (logits, classes), tuple(keywords.items()), kind)

    x = Array((3, 8), dtype, scale=3.0)
    yield call("plain", x)  # sum for mean, mean over all, labels shifted
    yield call("each row", x, reduction="none")
    ignored = replace(Array((4, 9), dtype, scale=3.0), planted=(((1,), NAN), ((3,), NAN)))
    yield call("ignored rows hold NaN", ignored, (1, -100), (3, -100))  # counted in the mean, or read
    yield call("ignored rows hold NaN, each row", ignored, (1, -100), (3, -100), reduction="none")
    yield call("all ignored", x, (0, -100), (1, -100), (2, -100))  # 0 / 0
    yield call("a class is ignored", x, (0, 0), (1, 7), (2, 3), ignore_index=7, reduction="sum")
    for other in (255, -1):  # what is no class must not be looked up, whatever stands for it
        yield call(f"{other} is ignored", x, (1, other), (2, 3), ignore_index=other)
    yield call("first and last class", Array((2, 17), dtype, scale=3.0), (0, 0), (1, 16), reduction="none")
    sure = replace(Array((2, 20), dtype), planted=(((0, 3), 20.0), ((1, 19), 30.0)))
    yield call("confident rows", sure, (0, 3), (1, 19), reduction="none")  # p -> 1, and log of 0 for the others
    low = -6e4 if dtype == "float16" else -1e5
    apart = {"bfloat16": 1024.0, "float16": 64.0}.get(dtype, 8.0)
    shifted = Array((2, 33), dtype, "eighths", scale=apart, mean=low)
    yield call("logits shifted by -100000", shifted, reduction="none")  # finite sentinels, e^x without the maximum
    yield call("huge logits", Array((2, 40), dtype, scale=5000.0), reduction="sum")
    hidden = replace(Array((2, 20), dtype), planted=(((0, 3), float("-inf")), ((1, 4), float("-inf"))))
    yield call("classes that cannot be", hidden, (0, 2), (1, 4), reduction="none")
    yield call("strides", Array((5, 33), dtype, scale=3.0, layout="shifted"), lie="step")
    yield call("a row longer than 1024", Array((2, 1025), dtype, "ramp", scale=8.0), (0, 1024), (1, 1024))
    yield call("a row longer than 4096", Array((1, 4097), dtype, "ramp", scale=-8.0), (0, 4096))
    yield call("no rows", Array((0, 8), dtype), reduction="sum")
    yield call("offsets past 2^31", Array((3, 16), dtype, scale=3.0, layout="far"), reduction="none")


def linear_cross_entropy(operator: str, dtype: str, policy: str) -> Iterator[Call]:
    """linear_cross_entropy."""

    def call(kind: str, x: Array, weight: Array, *labels: tuple[int, int], lie: str = "dense", **keywords: Any) -> Call:
        planted = tuple(((row,), float(label)) for row, label in labels)
        classes = Array(
            x.shape[:1], "int64", "integers", scale=float(weight.shape[0]), seed=2, planted=planted, layout=lie
        )
        return Call(operator, dtype, (x, weight, classes), tuple(keywords.items()), kind)

    def w(V: int, E: int, scale: float = 2.0, layout: str = "dense") -> Array:
        return Array((V, E), dtype, scale=scale * float(E) ** -0.5, seed=1, layout=layout)

    x = Array((3, 8), dtype)
    yield call("plain", x, w(9, 8))
    yield call("each row", x, w(17, 8), reduction="none")
    ignored = replace(Array((4, 16), dtype), planted=(((1,), NAN), ((3,), NAN)))
    yield call("ignored rows hold NaN", ignored, w(20, 16), (1, -100), (3, -100))
    yield call("all ignored", x, w(9, 8), (0, -100), (1, -100), (2, -100))
    yield call("a class is ignored", x, w(8, 8), (0, 0), (1, 7), (2, 3), ignore_index=7, reduction="sum")
    for other in (255, -1):
        yield call(f"{other} is ignored", x, w(9, 8), (1, other), (2, 3), ignore_index=other)
    yield call("first and last class", Array((2, 17), dtype), w(33, 17), (0, 0), (1, 32), reduction="none")
    yield call("huge logits", Array((3, 16), dtype), w(40, 16, 300.0), reduction="none")
    yield call("large logits: rounded before the loss", Array((3, 24), dtype), w(40, 24, 20.0), reduction="none")
    yield call("strides", Array((5, 33), dtype, layout="shifted"), w(40, 33, layout="gaps"), lie="step")
    yield call("weight not dense", Array((2, 20), dtype, layout="step"), w(24, 20, layout="transposed"))
    yield call("17 rows, 129 features, 257 classes", Array((17, 129), dtype), w(257, 129), (0, 256), reduction="none")
    yield call("1025 classes", Array((2, 16), dtype), w(1025, 16), (0, 1024), (1, 1024))
    yield call("no rows", Array((0, 8), dtype), w(8, 8), reduction="sum")


CORNERS: dict[str, Callable[[str, str, str], Iterator[Call]]] = {
    "rms_norm": norms,
    "add_rms_norm": norms,
    "layer_norm": norms,
    "add_layer_norm": norms,
    "swiglu": swiglu,
    "relu2": relu2,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}
