"""What each hypothesis gives on the designed inputs, and how far its rounding may move that.

Everything is computed once per operator and format, when it is asked for first. The rounding of a changed operator is
predicted as that of the right one: its inputs are moved by roundings of the format, and what that does to its results
is what honest code inside may do; the results are rounded besides.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

from refllm.accuracy.propagation import ulp
from refllm.hypotheses.operators.designed import designed
from refllm.hypotheses.operators.hypothesis import OpHypothesis, Outputs, Variant
from refllm.ops.contracts import contract_of
from refllm.precision import largest

_DRAWS, _DRAWS_OF_ROUNDED = 4, 32
"""How often inputs are moved; and those of a hypothesis that rounds, where a move may carry a number over a border."""
_INSIDE = {"float32": 6.0, "bfloat16": 3.0, "float16": 3.0}
"""How much more than its inputs' roundings move it an honest result may be off: steps inside round too."""
_CHAIN = 16
"""Terms of a float32 sum from which the roundings of one chain of additions are granted besides."""
_SMALLEST = np.finfo(np.float32).smallest_subnormal
_DIGITS = {"float32": 24, "bfloat16": 8, "float16": 11}


class Given(Protocol):
    """A call of a definition, as `refllm.strategies.Call` is."""

    @property
    def kind(self) -> str: ...

    @property
    def keywords(self) -> tuple[tuple[str, Any], ...]: ...

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of its arguments' axes, by name."""
        ...

    def arrays(self) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords)."""
        ...


class Outcomes:
    """The results of a definition's hypotheses on its designed calls.

    right: the definition itself. names, formats: of its results. dtype: of the inputs and results. inside: the format
    in which steps inside may round; float32 is what a fused kernel does, the dtype what a plain one may. floor: the
    standard deviation that is granted everywhere, as a share of the median of a result: where the definition cancels
    to 0 exactly, other right code may not.
    """

    def __init__(
        self,
        right: Variant,
        calls: Sequence[Given],
        names: Sequence[str],
        formats: Sequence[str],
        dtype: str,
        inside: str,
        floor: float = 0.0,
    ) -> None:
        self.right, self.calls, self.names = right, calls, names
        self.dtype, self.inside, self._formats, self._floor = dtype, inside, formats, floor
        self._arrays: dict[int, tuple[list[Any], dict[str, Any]]] = {}
        self._results: dict[tuple[Variant, int], Outputs | None] = {}
        self._sigmas: dict[tuple[Variant, int], Outputs] = {}

    def results(self, variant: Variant, n: int) -> Outputs | None:
        """What a variant returns on call n, in float64, infinite where the format has no such number; None where it
        cannot be computed."""
        if (variant, n) not in self._results:
            out = variant(*self.arrays(n))
            self._results[variant, n] = None if out is None else tuple(map(_in_format, out, self._formats))
        return self._results[variant, n]

    def sigmas(self, variant: Variant, n: int) -> Outputs:
        """The standard deviation of rounding of every element of those results."""
        if (variant, n) not in self._sigmas:
            self._sigmas[variant, n] = self._spread(variant, n)
        return self._sigmas[variant, n]

    def arrays(self, n: int) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of call n, in float64."""
        if n not in self._arrays:
            arguments, keywords = self.calls[n].arrays()
            self._arrays[n] = [_exact(x) for x in arguments], {name: _exact(x) for name, x in keywords.items()}
        return self._arrays[n]

    def _spread(self, variant: Variant, n: int) -> Outputs:
        results = self.results(variant, n)
        assert results is not None
        arguments, keywords = self.arrays(n)
        rng = np.random.default_rng(0xD0)
        squares = [np.zeros(x.shape) for x in results]
        draws = _DRAWS_OF_ROUNDED if "narrow(" in variant.text else _DRAWS
        for _ in range(draws):
            self._add(squares, results, variant([self._moved(x, rng) for x in arguments], keywords), draws)
        # Float32 loses what is added to a larger number, which no move of the inputs shows.
        self._add(squares, results, variant([_in_float32(x) for x in arguments], keywords), 1)
        longest = max((max(x.shape, default=1) for x in arguments if isinstance(x, np.ndarray)), default=1)
        inside = _INSIDE[self.inside] * (np.sqrt(1 + longest / _CHAIN) if self.inside == "float32" else 1.0)
        return tuple(
            np.hypot(inside * np.sqrt(square), _spacing(x, dtype) / np.sqrt(12)) + _SMALLEST + self._floor * _middle(x)
            for square, x, dtype in zip(squares, results, self._formats, strict=False)
        )

    @staticmethod
    def _add(squares: list[np.ndarray], results: Outputs, near: Outputs | None, draws: int) -> None:
        for square, x, y in zip(squares, results, near or results, strict=True):
            square += _row_square(np.nan_to_num(_distance(x, y), posinf=0.0)) / draws

    def _moved(self, x: Any, rng: np.random.Generator) -> Any:
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        return x * (1 + 2.0 ** (1 - _DIGITS[self.inside]) / np.sqrt(12) * rng.standard_normal(x.shape))


@cache
def outcomes(operator: str, dtype: str, inside: str = "float32") -> Outcomes:
    """Those of an operator in a format, which are kept."""
    known = contract_of(operator)
    formats = ["float32" if name in known.float32 else dtype for name in known.outputs]
    right = Variant(OpHypothesis("right", "", operator, ((),)), ())
    return Outcomes(right, designed(operator, dtype), list(known.outputs), formats, dtype, inside)


def _exact(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def _in_float32(x: Any) -> Any:
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def _middle(x: np.ndarray) -> float:
    """The median magnitude of what is finite and not 0."""
    size = np.abs(x[np.isfinite(x) & (x != 0)])
    return float(np.median(size)) if size.size else 0.0


def _in_format(x: np.ndarray, dtype: str) -> np.ndarray:
    top = largest(dtype)
    return np.where(np.abs(x) > top, np.copysign(np.inf, x), x)


def _spacing(x: np.ndarray, dtype: str) -> np.ndarray:
    found: np.ndarray = ulp(np.where(np.isfinite(x), x, 0.0), dtype)
    return np.asarray(found, np.float64)


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(x - y)


def _row_square(error: np.ndarray) -> np.ndarray:
    """The square of an error, or the mean of its row's if that is more: its own may be small by luck."""
    square = np.square(error)
    return np.maximum(square, square.mean(axis=-1, keepdims=True)) if square.ndim and square.size else square
