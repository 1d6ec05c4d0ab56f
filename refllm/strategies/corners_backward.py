"""Fixed calls of the backward operators: those of the forward ones with gradients, and what breaks gradients alone.
See `refllm.strategies.fixed`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from refllm.ops.backward_contracts import BACKWARD, forward_name
from refllm.strategies.arrays import Array
from refllm.strategies.call import Argument, Call
from refllm.strategies.gradients import GRADIENTS, backward_call, stands


def corners(operator: str, dtype: str, forward_calls: Iterable[Call]) -> Iterator[Call]:
    """The fixed calls of a backward operator: those of the forward one with plain gradients, every kind of gradient,
    and what breaks this gradient alone. forward_calls: of `refllm.strategies.fixed`, those of `ONLY` excepted."""
    name = forward_name(operator)
    forward = [call for call in (ONLY[name](dtype) if name in ONLY else forward_calls) if stands(call)]
    for call in forward:
        yield backward_call(call)
    base = next(_bases(operator, dtype), forward[0])
    for gradient in list(GRADIENTS)[1:]:
        made = replace(backward_call(base, gradient), kind=f"gradient {gradient}")
        if replace(made, kind=base.kind) != backward_call(base):
            yield made
    several = known_results(base)
    for i, name in enumerate(several if len(several) > 1 else ()):
        for gradient in ALONE:
            yield replace(backward_call(base, gradient, only=i), kind=f"{name} alone is {gradient}")
    for call, gradient, kind in _more(operator, dtype):
        yield replace(backward_call(call, gradient), kind=kind)
    if BACKWARD[operator].kept:
        yield replace(backward_call(base, kept=False), kind="nothing kept of the forward pass")


ALONE = ("transposed", "repeated over the batch", "of a sum: one number, stride 0", "a view of a wider one")
"""Layouts of one incoming gradient beside a plain one: who reads both with the strides of one is seen."""


def known_results(call: Call) -> tuple[str, ...]:
    """The incoming gradients that belong to a call of a forward operator."""
    given = backward_call(call)
    return tuple(name for name in BACKWARD[given.operator].incoming if name in given.dtypes)


def _norm(operator: str, dtype: str, shape: tuple[int, ...], mean: float = 1.0, eps: float = 1e-5, **x: Any) -> Call:
    """A norm of rows; weight 1 where mean is that and nothing is scattered around it."""
    E = shape[-1:]
    given = Array(shape, dtype, **x)
    weight = Array(E, dtype, scale=0.3, mean=mean, seed=1)
    first: tuple[Argument, ...] = (given, Array(shape, dtype, "zeros", seed=3), weight)
    first = first if operator.startswith("add") else (given, weight)
    bias: tuple[Argument, ...] = (Array(E, dtype, seed=2),) if "layer" in operator else ()
    return Call(operator, dtype, (*first, *bias, eps))


def _bases(operator: str, dtype: str) -> Iterator[Call]:
    """The call that is given every kind of gradient: three rows of a batch and more, whose sizes are all different."""
    name = forward_name(operator)
    if "norm" in name and "rope" not in name:
        yield _norm(name, dtype, (5, 24))
    elif name == "attention":
        arrays = Array((3, 4, 5, 16), dtype), Array((3, 2, 7, 16), dtype, seed=1), Array((3, 2, 7, 16), dtype, seed=2)
        yield Call(name, dtype, arrays, (("causal", False),))
    elif name in ("cross_entropy", "linear_cross_entropy"):
        labels = Array((5,), "int64", "integers", scale=17.0, seed=2)
        logits = (Array((5, 17), dtype, scale=3.0),)
        weight = Array((17, 12), dtype, scale=0.5, seed=1)
        given = logits if name == "cross_entropy" else (Array((5, 12), dtype), weight)
        yield Call(name, dtype, (*given, labels), (("reduction", "none"),))


def _more(operator: str, dtype: str) -> Iterator[tuple[Call, str, str]]:
    """(call, gradient, kind): what breaks the gradient of this operator alone."""
    name = forward_name(operator)
    if "norm" in name and "rope" not in name:
        # The second term is as large as the first, at any length; and rows that do not fill a block.
        yield _norm(name, dtype, (3, 17)), "along the input", "17 columns, gradient along the input"
        yield _norm(name, dtype, (2, 1025)), "along the input", "1025 columns, gradient along the input"
        yield _norm(name, dtype, (2, 64), mean=3.0), "along the input", "large weights, gradient along the input"
        one_sign: dict[str, Any] = {"values": "uniform", "mean": 0.5}
        yield _norm(name, dtype, (300, 8), **one_sign), "of one sign", "300 rows of one sign"
        yield _norm(name, dtype, (2049, 8), **one_sign), "of one sign", "2049 rows of one sign"
        yield _norm(name, dtype, (1025, 3)), "plain", "1025 narrow rows"
        yield _norm(name, dtype, (33, 1)), "plain", "rows of one element"
        yield _norm(name, dtype, (4, 33), eps=0.5), "along the input", "eps is large"
        yield _norm(name, dtype, (2, 8449), scale=3.0), "along the input", "8449 columns of size 3"
        if "layer" not in name:  # 1 / root is 0.5 (1 + 2^-8), between two numbers of bfloat16, of every row
            for E in (40, 8449):
                between = _norm(name, dtype, (3, E), eps=4 / (1 + 2.0**-8) ** 2 - 1, values="ones")
                yield between, "plain", f"{E} columns whose root lies between two numbers"
    elif name == "relu2":
        # Twice x is no number of the format, and twice x times a small gradient is one.
        x = Array((3, 8), dtype, "uniform", scale=1e3, mean=4e4 if dtype == "float16" else 2e38)
        x = replace(x, scale=1e36) if dtype != "float16" else x
        yield Call(name, dtype, (x,)), "small", "twice x overflows"
    elif name == "linear":
        yield _linear(dtype, 700, 5, 9, True), "of one sign", "700 rows of one sign"
    elif name == "embedding":
        one = Array((400,), "int64", "zeros")
        yield Call(name, dtype, (one, Array((5, 8), dtype))), "of one sign", "one id 400 times"
        few = Array((7, 40), "int64", "integers", scale=3.0, seed=1)
        yield Call(name, dtype, (few, Array((9, 24), dtype))), "plain", "three ids 280 times"
        yield Call(name, dtype, (one, Array((2, 3), dtype))), "of a sum: one number, stride 0", "one id, a sum"
    elif name == "attention":
        shape, T = (2, 2, 40, 16), 40
        q, k, v = (Array(shape, dtype, seed=i) for i in range(3))
        # What grows where the row's sum is taken over the wrong rows or from a rounded result: values with a mean.
        yield Call(name, dtype, (q, k, replace(v, mean=4.0))), "of one sign", "values with a mean, gradient of one sign"
        padded = Array((2, T), "bool", "ones", planted=(((0, (None, 7)), 0), ((1, (33, None)), 0)))
        yield Call(name, dtype, (q, k, v), (("key_mask", padded),)), "of a sum: one number, stride 0", "padded, a sum"
        many = Array((1, 8, 33, 8), dtype), *(Array((1, 1, 33, 8), dtype, seed=i) for i in (1, 2))
        yield Call(name, dtype, many), "of one sign", "eight heads read one"
        top = Array((1, 2, 5, 16), dtype), *(Array((1, 2, 9, 16), dtype, seed=i, mean=0.5) for i in (1, 2))
        yield Call(name, dtype, top), "along the input", "fewer queries, gradient along the queries"
        far = Array((1, 1, 3, 8), dtype, layout="far"), *(Array((1, 1, 3, 8), dtype, seed=i) for i in (1, 2))
        yield Call(name, dtype, far), "plain", "queries past 2^31"
    elif name in ("cross_entropy", "linear_cross_entropy"):
        yield from _losses(name, dtype)


def _losses(name: str, dtype: str) -> Iterator[tuple[Call, str, str]]:
    """Probabilities near 1, of which only what is left of 1 - p shows; unequal rows; most labels ignored; many rows."""
    labels = Array((4,), "int64", "zeros", planted=(((0,), 3.0), ((1,), 19.0), ((2,), 3.0)))
    sure = Array((4, 20), dtype, planted=(((0, 3), 9.0), ((1, 19), 12.0), ((2, 3), 7.0), ((3, 0), 10.0)))
    ignored = Array((9,), "int64", "integers", scale=20.0, seed=2, planted=((((None, 7),), -100.0),))
    if name == "cross_entropy":
        for reduction in ("none", "mean"):
            yield Call(name, dtype, (sure, labels), (("reduction", reduction),)), "plain", f"p near 1, {reduction}"
        yield Call(name, dtype, (Array((9, 20), dtype, scale=3.0), ignored)), "plain", "seven of nine ignored"
        shifted = Array((4, 20), dtype, scale=3.0), labels
        yield Call(name, dtype, shifted, (("reduction", "sum"),)), "plain", "the sum of the losses"
        return
    weight = Array((20, 16), dtype, scale=0.5, seed=1, planted=(((3, 0), 5.0), ((19, 0), 5.0)))
    x = Array((4, 16), dtype, planted=((((None, None), 0), 2.0),))
    yield Call(name, dtype, (x, weight, labels), (("reduction", "none"),)), "plain", "p near 1"
    # Kernels go over the words in chunks of thousands, and over the rows in chunks of hundreds.
    last = Array((2,), "int64", "zeros", planted=(((1,), 4199.0),))
    words = Array((2, 4), dtype, scale=2.0), Array((4200, 4), dtype, scale=0.5, seed=1), last
    yield Call(name, dtype, words, (("reduction", "none"),)), "plain", "4200 words"
    rows = Array((2049, 4), dtype, "uniform", mean=0.5), Array((7, 4), dtype, seed=1)
    yield Call(name, dtype, (*rows, Array((2049,), "int64", "zeros")), (("reduction", "sum"),)), "plain", "2049 rows"
    yield Call(name, dtype, (Array((9, 16), dtype), weight, ignored)), "plain", "seven of nine ignored"
    many = Array((600,), "int64", "zeros")
    one_sign = Array((600, 8), dtype, "uniform", mean=0.5)
    yield Call(name, dtype, (one_sign, Array((5, 8), dtype, scale=0.1, seed=1), many)), "plain", "600 rows of one label"


# ------------------------------------------------------------------------- forward calls of what has no forward kernel


def _linear(dtype: str, rows: int, E: int, F: int, bias: bool, **x: Any) -> Call:
    weight = Array((F, E), dtype, scale=float(E) ** -0.5, seed=1)
    return Call("linear", dtype, (Array((rows, E), dtype, **x), weight, Array((F,), dtype, seed=2) if bias else None))


def _linears(dtype: str) -> Iterator[Call]:
    yield replace(_linear(dtype, 3, 8, 5, True), kind="plain")
    yield replace(_linear(dtype, 4, 17, 9, False), kind="no bias")
    yield replace(_linear(dtype, 33, 65, 17, True), kind="tails of all tiles")
    yield replace(_linear(dtype, 5, 129, 3, True, layout="transposed"), kind="x transposed")
    x, weight = Array((2, 3, 24), dtype, layout="gaps"), Array((10, 24), dtype, scale=0.2, seed=1, layout="transposed")
    yield Call(
        "linear", dtype, (x, weight, Array((10,), dtype, seed=2, layout="step")), kind="strides, two axes of rows"
    )
    yield replace(_linear(dtype, 0, 8, 5, True), kind="no rows")


def _embeddings(dtype: str) -> Iterator[Call]:
    def call(kind: str, ids: Array, V: int, E: int, **weight: Any) -> Call:
        return Call("embedding", dtype, (ids, Array((V, E), dtype, seed=1, **weight)), kind=kind)

    yield call("plain", Array((5,), "int64", "integers", scale=9.0, seed=2), 9, 8)
    yield call("ids in two axes", Array((3, 5), "int64", "integers", scale=20.0, seed=2), 20, 17)
    yield call("first and last row", Array((2,), "int64", "zeros", planted=(((1,), 32.0),)), 33, 129)
    yield call("ids with gaps", Array((7,), "int64", "integers", scale=11.0, seed=2, layout="step"), 11, 24)
    yield call("one id for all", Array((4, 3), "int64", "ones"), 6, 40, layout="transposed")
    yield call("no ids", Array((0,), "int64", "zeros"), 6, 8)


def _softmaxes(dtype: str) -> Iterator[Call]:
    for kind, shape, scale in (
        ("plain", (3, 8), 1.0),
        ("a row longer than 1024", (2, 1025), 2.0),
        ("one weight has nearly all", (4, 33), 8.0),
        ("one key", (5, 1), 1.0),
        ("no rows", (0, 8), 1.0),
    ):
        yield Call("softmax", dtype, (Array(shape, dtype, scale=scale),), kind=kind)
    yield Call("softmax", dtype, (Array((2, 3, 40), dtype, layout="gaps"),), kind="strides, two axes of rows")


SMOOTH = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh", "mish", "leaky_relu")
"""Activations of the fixed calls; every other one is drawn."""


def _activations(dtype: str) -> Iterator[Call]:
    for name in SMOOTH:
        yield Call("activation", dtype, (Array((3, 40), dtype, scale=2.0), name), kind=name)
    yield Call("activation", dtype, (Array((2, 1025), dtype, scale=3.0), "silu"), kind="a row longer than 1024")
    yield Call("activation", dtype, (Array((1, 65), dtype, "ramp", scale=16.0, mean=-8.0), "gelu"), kind="-8 to 8")
    yield Call("activation", dtype, (Array((3, 2, 24), dtype, layout="gaps"), "silu"), kind="strides")
    yield Call("activation", dtype, (Array((0, 8), dtype), "silu"), kind="nothing")


def _glus(dtype: str) -> Iterator[Call]:
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu", "sigmoid"):
        yield Call("glu", dtype, (Array((3, 24), dtype, scale=2.0), Array((3, 24), dtype, seed=1), name), kind=name)
    gate, up = Array((3, 33), dtype, layout="wider"), Array((3, 33), dtype, seed=1, layout="shifted")
    yield Call("glu", dtype, (gate, up, "silu"), kind="halves of wider rows")
    yield Call(
        "glu", dtype, (Array((2, 1025), dtype), Array((2, 1025), dtype, seed=1), "silu"), kind="longer than 1024"
    )


def _regressions(operator: str) -> Callable[[str], Iterator[Call]]:
    def listed(dtype: str) -> Iterator[Call]:
        target: dict[str, Any] = {"values": "uniform"} if operator.startswith("binary") else {}
        for kind, shape, x in (
            ("plain", (3, 8), {}),
            ("a row longer than 1024", (2, 1025), {}),
            ("large values", (5, 17), {"scale": 20.0}),
            ("strides", (4, 2, 9), {"layout": "gaps"}),
            ("one number", (1, 1), {}),
        ):
            given = Array(shape, dtype, **x), Array(shape, dtype, seed=1, **target)
            yield Call(operator, dtype, given, kind=kind)

    return listed


ONLY: dict[str, Callable[[str], Iterator[Call]]] = {
    "linear": _linears,
    "embedding": _embeddings,
    "softmax": _softmaxes,
    "activation": _activations,
    "glu": _glus,
    "mean_squared_error": _regressions("mean_squared_error"),
    "binary_cross_entropy": _regressions("binary_cross_entropy"),
}
"""Fixed forward calls of the operators that have a backward pass, and no forward record of their own."""
