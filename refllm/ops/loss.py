"""The losses of the heads: sums of logarithms, computed in at least float32 and never rounded."""

import numpy as np

from refllm.errors import InputError
from refllm.ops.linear import linear
from refllm.precision import EXACT, Arithmetic

__all__ = ["IGNORE_INDEX", "binary_cross_entropy", "cross_entropy", "linear_cross_entropy", "mean_squared_error"]

IGNORE_INDEX = -100
"""A label of this value is not counted (the convention of torch.nn.functional.cross_entropy)."""


def cross_entropy(
    logits_NV: np.ndarray,
    labels_N: np.ndarray,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    ar: Arithmetic = EXACT,
) -> np.ndarray:
    """-log softmax(logits)[label] over the rows whose label is not ignore_index.

    reduction: "mean" over the counted rows (NaN if there are none), "sum", or "none" ([N], 0 where ignored).
    Raises InputError for another reduction, or for labels that are not integers or outside 0..V-1.
    Source: torch.nn.functional.cross_entropy.
    """
    logits_NV, labels_N = ar.array(logits_NV), np.asarray(labels_N)
    rows = counted_rows(labels_N, logits_NV.shape[-1], ignore_index)
    shifted = logits_NV[rows] - logits_NV[rows].max(axis=-1, keepdims=True, initial=-np.inf)
    loss_N = np.zeros(labels_N.shape, ar.work)
    loss_N[rows] = np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(rows)), labels_N[rows]]
    return reduced(loss_N, len(rows), reduction)


def linear_cross_entropy(
    x_NE: np.ndarray,
    weight_VE: np.ndarray,
    labels_N: np.ndarray,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    ar: Arithmetic = EXACT,
) -> np.ndarray:
    """`cross_entropy` of the logits x W^T. Rounding: `linear` for the logits."""
    return cross_entropy(
        linear(x_NE, weight_VE, ar=ar), labels_N, ignore_index=ignore_index, reduction=reduction, ar=ar
    )


def mean_squared_error(x: np.ndarray, target: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """mean (x - target)^2 over all elements. Source: torch.nn.functional.mse_loss."""
    return np.mean((ar.array(x) - ar.array(target)) ** 2)


def binary_cross_entropy(logits: np.ndarray, target: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """mean of -y log s(z) - (1 - y) log(1 - s(z)), as max(z, 0) - z y + log(1 + e^-|z|).

    Source: torch.nn.functional.binary_cross_entropy_with_logits.
    """
    z, y = ar.array(logits), ar.array(target)
    return np.mean(np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z))))


def reduced(loss_N: np.ndarray, counted: int, reduction: str) -> np.ndarray:
    """The losses of all rows, 0 where they do not count, as `reduction` says; counted: how many do."""
    if reduction == "none":
        return loss_N
    if reduction == "sum":
        return loss_N.sum()
    check_reduction(reduction)
    return loss_N.sum() / counted if counted else loss_N.dtype.type(np.nan)


def counted_rows(labels_N: np.ndarray, V: int, ignore_index: int) -> np.ndarray:
    """The rows whose label counts. Raises InputError for labels that are not integers or outside 0..V-1."""
    if not np.issubdtype(labels_N.dtype, np.integer):
        raise InputError(f"labels: expected integers, found {labels_N.dtype}")
    counted = labels_N != ignore_index
    if ((labels_N < 0) | (labels_N >= V))[counted].any():
        bad = labels_N[counted & ((labels_N < 0) | (labels_N >= V))][0]
        raise InputError(f"labels: {bad} is outside 0..{V - 1}; use {ignore_index} for a position that does not count")
    return np.flatnonzero(counted)


def check_reduction(reduction: str) -> None:
    """Raises InputError for another reduction than "mean", "sum" or "none"."""
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f'reduction={reduction!r} is not known; use "mean", "sum" or "none"')
