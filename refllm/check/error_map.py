"""Where in a value its error lies: a coarse picture of a tap, positions downwards, heads and channels across."""

import numpy as np

from refllm.accuracy.limits import ROW_FLOOR
from refllm.accuracy.measure import errors, ratio

LARGEST = 64
"""Most rows and columns of a map."""


def error_map(
    candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float = np.inf
) -> np.ndarray | None:
    """rms(error) / rms(sigma) of each block, float32, at most [LARGEST, LARGEST]; None without a predicted error.

    candidate, exact, variance: [N, n] or [N, H, n]. Rows are blocks of positions, columns blocks of channels, the heads
    beside each other (`row_edges`, `column_edges`). A block that holds a NaN or infinity of one side only is infinite.
    """
    error, V, wrong, _ = errors(candidate, exact, variance, overflow)
    mean_V = float(V.mean(dtype=np.float64)) if V.size else 0.0
    if not mean_V and not error.any() and not wrong.any():
        return None
    np.square(error, out=error)
    error[wrong] = np.inf
    rms_error, block_V = np.sqrt(_block_means(error)), _block_means(V)
    return np.asarray(ratio(rms_error, np.sqrt(np.maximum(block_V, ROW_FLOOR * mean_V))), np.float32)


def row_edges(positions: int) -> np.ndarray:
    """Where the blocks of positions begin, and the end."""
    return _edges(positions, LARGEST)


def column_edges(heads: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the blocks of heads begin, and the end; and the same for the channels within a head."""
    of_heads = _edges(heads, LARGEST)
    return of_heads, _edges(channels, LARGEST // (len(of_heads) - 1))


def _edges(n: int, most: int) -> np.ndarray:
    size = -(-n // min(n, most))
    return np.minimum(np.arange(-(-n // size) + 1) * size, n)


def _block_means(values: np.ndarray) -> np.ndarray:
    """Means over the blocks of [N, n] or [N, H, n]."""
    values = np.asarray(values if values.ndim == 3 else values[:, None, :], np.float64)
    of_heads, of_channels = column_edges(values.shape[1], values.shape[2])
    for axis, edges in ((2, of_channels), (1, of_heads), (0, row_edges(len(values)))):
        if len(edges) > values.shape[axis]:
            continue  # a block is one
        sizes = np.diff(edges).reshape([-1 if i == axis else 1 for i in range(3)])
        values = np.add.reduceat(values, edges[:-1], axis=axis) / sizes
    return values.reshape(len(values), -1)
