"""What a hypothesis does to a value of a page: to an array, or to one that carries the variance of its error.

Every function takes either and returns the same kind, so that a hypothesis is written once and has its own sigma.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from refllm.accuracy.propagation import Uncertain, ulp
from refllm.precision import rounding

Value = TypeVar("Value", np.ndarray, Uncertain)
_FLIPS = 0.8  # the mean of |e| over the standard deviation of a Gaussian e


def number(x: Any) -> np.ndarray:
    """The exact value alone."""
    return x.value if isinstance(x, Uncertain) else x


def certain_like(x: Value, value: np.ndarray) -> Value:
    """A value that both sides have exactly, of the kind that x is."""
    if isinstance(x, Uncertain):
        return replace(x, value=value, variance=np.zeros(value.shape, x.variance.dtype), shares={}, rounded=None)
    return value


def with_noise_of(x: Value, value: np.ndarray) -> Value:
    """Another value that errs as x does: for what differs from x in a step that hardly moves errors."""
    return replace(x, value=value, rounded=None) if isinstance(x, Uncertain) else value


def moved(x: Value, view: Callable[[np.ndarray], np.ndarray]) -> Value:
    """The same numbers in another order."""
    found: Any = replace(x.map(view), rounded=None) if isinstance(x, Uncertain) else view(x)
    return found


def times(x: Value, factor: Any) -> Value:
    """x times a number or an array that is known exactly."""
    if isinstance(x, Uncertain):
        variance = (x.variance * np.square(factor)).astype(x.variance.dtype)
        return replace(x, value=x.value * factor, variance=variance, rounded=None)
    return x * factor


def product(x: Value, y: Value) -> Value:
    """x times y; V(x y) = y^2 V_x + x^2 V_y."""
    if isinstance(x, Uncertain) and isinstance(y, Uncertain):
        variance = np.square(y.value) * x.variance + np.square(x.value) * y.variance
        return replace(x, value=x.value * y.value, variance=variance.astype(x.variance.dtype), rounded=None)
    return number(x) * number(y)


def mapped(x: Value, function: Callable[[np.ndarray], np.ndarray]) -> Value:
    """function(x) of an elementwise function, whose slope is taken by central differences."""
    if not isinstance(x, Uncertain):
        return function(x)
    step = 1e-5 * np.maximum(1, np.abs(x.value))
    slope = (function(x.value + step) - function(x.value - step)) / (2 * step)
    variance = (x.variance * np.square(slope)).astype(x.variance.dtype)
    return replace(x, value=function(x.value), variance=variance, rounded=None)


def joined(x: Value, y: Value, from_y: Any) -> Value:
    """x, with the elements at the index `from_y` of y."""

    def put(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = a.copy()
        out[from_y] = b[from_y]
        return out

    if isinstance(x, Uncertain) and isinstance(y, Uncertain):
        return replace(x, value=put(x.value, y.value), variance=put(x.variance, y.variance), rounded=None)
    return put(number(x), number(y))


def rounded(x: Value, dtype: str) -> Value:
    """x on the grid of a narrow format. An error e of x carries it over to the next number in |e| of u cases, u the
    distance of the numbers there: then the square of the error is u^2."""

    def grid(a: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(rounding(dtype)(np.asarray(a, np.float32)), np.float64)

    if not isinstance(x, Uncertain):
        return grid(x)
    flipped = _FLIPS * np.sqrt(x.variance) * ulp(x.value, dtype)
    variance = np.maximum(x.variance, flipped).astype(x.variance.dtype)
    return replace(x, value=grid(x.value), variance=variance, rounded=None)
