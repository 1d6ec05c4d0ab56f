"""Numbers for designed calls: two digits after the point, so that they can be followed by hand."""

from typing import Any

import numpy as np


class Draws:
    """Drawn numbers, the same every time for one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int, size: float = 1.0, mean: float = 0.0) -> np.ndarray:
        """Around a mean, spread by a size."""
        return np.asarray((mean + size * self._rng.normal(size=shape)).round(2))

    def uniform(self, *shape: int, low: float, high: float) -> np.ndarray:
        """Evenly between two numbers."""
        return np.asarray(self._rng.uniform(low, high, shape).round(2))

    def weight(self, *shape: int) -> np.ndarray:
        """A norm's weight: near 1, and nowhere 0."""
        return np.asarray((1 + 0.5 * np.clip(self._rng.normal(size=shape), -1.5, 1.5)).round(2))

    def integers(self, top: int, *shape: int) -> np.ndarray:
        """Whole numbers below a top, from 0 on."""
        return np.asarray(self._rng.integers(0, top, shape))

    def distinct(self, top: int, n: int) -> np.ndarray:
        """n different ones of 0 to top - 1."""
        return np.asarray(self._rng.permutation(top)[:n])


def filled(x: np.ndarray, index: Any, value: float) -> np.ndarray:
    """A copy with some of its numbers replaced."""
    out = x.copy()
    out[index] = value
    return out
