"""Operators on NumPy arrays, right and wrong, that `check-op --arrays numpy` is given."""

import numpy as np


def relu2(x: np.ndarray) -> np.ndarray:
    y = np.maximum(x.astype(np.float32), 0)
    return (y * y).astype(x.dtype)


def wrong(x: np.ndarray) -> np.ndarray:
    return relu2(x) * x.dtype.type(1.1)


def in_place(x: np.ndarray) -> np.ndarray:
    y = relu2(x)
    x[...] = 0
    return y
