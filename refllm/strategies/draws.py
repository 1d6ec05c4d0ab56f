"""What the strategies of all operators share: sizes at the edges of blocks, layouts, places, kinds of values.

The order of drawing is the order of shrinking: shapes first, then the kind, layouts, planted values, scales, and the
seed last. Every choice lists the plainest first, and that is where Hypothesis arrives.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from refllm.strategies.arrays import Array

BLOCKS = tuple(2**i for i in range(4, 13))
"""16 .. 4096: the sizes that kernels cut rows into."""
ROW_LENGTHS = (*range(1, 15), *(block + d for block in BLOCKS for d in (-1, 0, 1)), 769, 2560, 16384, 16385)
"""n = k * BLOCK + {-1, 0, 1} beside small ones; 769 and 2560 are real and no power of two."""
SHORT_ROWS = tuple(n for n in ROW_LENGTHS if n <= 257)
LENGTHS = (*range(1, 9), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 0)
"""How many queries, and how many keys. Nothing at all comes last: one of everything is plainer."""
HEAD_DIMS = (8, 16, 32, 64, 24, 40, 72, 80, 96, 128, 160, 256)
"""The real ones, and those around them that are no powers of two."""

NUMBERS = 40_000
"""Elements of one array that a strategy stays below where sizes multiply."""

VALUES = ("plain", "scale", "mean 1000", "outlier 10000", "zero rows", "subnormal", "all equal", "NaN", "infinity")
"""Kinds of values that every operator on rows must stand; `values` says what each is."""
SUBNORMAL = {"bfloat16": 1e-39, "float32": 1e-39, "float16": 6e-6, "float64": 1e-310}
"""Numbers of this size have lost bits to the exponent."""


class Seeds:
    """Different seeds for the arrays of one call, from one number that is drawn last: all weights are distinct."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._next = 100 * draw(st.integers(0, 999))

    def __call__(self) -> int:
        self._next += 1
        return self._next - 1


def row_shape(draw: st.DrawFn, lengths: Sequence[int] = ROW_LENGTHS) -> tuple[int, ...]:
    """[..., E]: E first, then how many rows, in one axis, none or two; small enough together."""
    E = draw(st.sampled_from(lengths))
    fronts = [(1,), (), (2,), (3,), (2, 3), (5,), (17,), (3, 11), (65,), (0,), (2, 0, 3)]
    front = draw(st.sampled_from([f for f in fronts if math.prod(f) * E <= NUMBERS]))
    return (*front, E)


def layouts(draw: st.DrawFn, *shapes: tuple[int, ...]) -> list[str]:
    """A layout for each array of a call, drawn independently; all dense in half of the calls."""
    if not draw(st.booleans()):
        return ["dense"] * len(shapes)
    return [draw(st.sampled_from(possible_layouts(shape))) for shape in shapes]


def possible_layouts(shape: tuple[int, ...]) -> list[str]:
    """Those of `refllm.strategies.arrays.LAYOUTS` that this shape can have; "far" is left to fixed calls."""
    names = ["dense", "wider", "shifted", "step"]
    names += ["gaps", "transposed"] if len(shape) > 1 else []
    names += ["heads"] if len(shape) > 2 else []
    return [*names, "expanded"] if len(shape) > 1 and shape[0] > 1 else names


def spot(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The place of one element: the first, the last or the middle along each axis, where bugs live."""
    return tuple(draw(st.sampled_from(sorted({0, n - 1, n // 2}))) for n in shape)


def values(draw: st.DrawFn, kind: str, shape: tuple[int, ...], dtype: str, layout: str = "dense") -> Array:
    """An array of normal values of that kind; its seed is set later, by `seeded`.

    scale: times 1e-3 .. 1e3. mean 1000: plus that. outlier 10000: one element. zero rows: one row or all. subnormal:
    all. all equal: 2. NaN, infinity: one or two elements of that. Any other kind: plain.
    """
    x = Array(shape, dtype, layout=layout)
    if kind == "mean 1000":
        return replace(x, mean=1000.0)
    if kind == "subnormal":
        return replace(x, scale=SUBNORMAL[dtype])
    if kind == "all equal":
        return replace(x, values="ones", mean=1.0)
    if kind == "scale":
        return replace(x, scale=draw(scales()))
    if 0 in shape:
        return x
    if kind == "zero rows":
        rows = draw(st.sampled_from([spot(draw, shape)[:-1], ()]))
        return plant(x, (rows, 0.0))
    if kind == "outlier 10000":
        return plant(x, (spot(draw, shape), draw(st.sampled_from([1e4, -1e4]))))
    if kind in ("NaN", "infinity"):
        bad = [float("nan")] if kind == "NaN" else [float("inf"), float("-inf")]
        places = [spot(draw, shape) for _ in range(draw(st.integers(1, 2)))]
        return plant(x, *((place, draw(st.sampled_from(bad))) for place in places))
    return x


def scales() -> st.SearchStrategy[float]:
    """1e-3 .. 1e3, without 1: that is the plain kind."""
    return st.sampled_from([10.0, 0.1, 100.0, 0.01, 1000.0, 0.001])


def plant(x: Array, *planted: tuple[Any, float]) -> Array:
    """x with more planted values; of an expanded array all entries are the first one."""
    if x.layout == "expanded":
        planted = tuple(((0, *index[1:]) if index else (), value) for index, value in planted)
    return replace(x, planted=(*x.planted, *planted))


def seeded(seeds: Seeds, *arrays: Array) -> list[Array]:
    """The arrays with seeds of their own."""
    return [replace(x, seed=seeds()) for x in arrays]


def beside(draw: st.DrawFn, dtype: str, policy: str) -> str:
    """The dtype of what may be float32 beside narrower activations, weights of a norm or tables: now and then it is.

    Eager code is not asked for that: it has one dtype.
    """
    if policy != "fused" or dtype not in ("bfloat16", "float16"):
        return dtype
    return draw(st.sampled_from([dtype, dtype, "float32"]))


def weights(shape: tuple[int, ...], dtype: str, layout: str = "dense") -> Array:
    """Weights of a norm: near 1, all different, so that one taken for another shows."""
    return Array(shape, dtype, scale=0.3, mean=1.0, layout=layout)
