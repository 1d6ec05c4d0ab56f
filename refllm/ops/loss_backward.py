"""The gradients of the losses of the heads."""

import numpy as np

from refllm.ops.linear import linear
from refllm.ops.linear_backward import linear_backward
from refllm.ops.loss import IGNORE_INDEX, check_reduction, counted_rows
from refllm.precision import EXACT, Arithmetic

__all__ = [
    "binary_cross_entropy_backward",
    "cross_entropy_backward",
    "linear_cross_entropy_backward",
    "mean_squared_error_backward",
]


def cross_entropy_backward(
    dloss: np.ndarray,
    logits_NV: np.ndarray,
    labels_N: np.ndarray,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    ar: Arithmetic = EXACT,
) -> np.ndarray:
    """dlogits = (softmax(logits) - onehot(label)) dloss per counted row, over their number if the loss is their mean;
    exactly 0 in rows whose label is ignore_index, and everywhere if none is counted.

    dloss: a number, or [N] for reduction "none". The loss is log sum e^z - z_label, and the slope of the first is the
    softmax; both sum to 1, so the gradient of a row sums to 0.
    Raises InputError as `refllm.ops.cross_entropy`. Rounding: `cross_entropy.grad`.
    """
    logits_NV, labels_N = ar.array(logits_NV), np.asarray(labels_N)
    rows = counted_rows(labels_N, logits_NV.shape[-1], ignore_index)
    check_reduction(reduction)
    dlogits_NV = np.zeros(logits_NV.shape, ar.work)
    e = np.exp(logits_NV[rows] - logits_NV[rows].max(axis=-1, keepdims=True, initial=-np.inf))
    dlogits_NV[rows] = e / e.sum(axis=-1, keepdims=True)
    dlogits_NV[rows, labels_N[rows]] -= 1
    dloss_N = np.broadcast_to(ar.array(dloss), labels_N.shape) / (max(1, len(rows)) if reduction == "mean" else 1)
    dlogits_NV[rows] *= dloss_N[rows, None]
    return ar.round(dlogits_NV, "cross_entropy.grad")


def linear_cross_entropy_backward(
    dloss: np.ndarray,
    x_NE: np.ndarray,
    weight_VE: np.ndarray,
    labels_N: np.ndarray,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """dx = dlogits W and dW = dlogits^T x, of `cross_entropy_backward` at the logits x W^T. What a row holds whose
    label is ignored, NaN included, reaches nothing.

    Rounding: `linear` for the logits, then as `cross_entropy_backward` and `linear_backward`.
    """
    counted_N = np.asarray(labels_N) != ignore_index
    x_NE = np.where(counted_N[:, None], ar.array(x_NE), 0)
    logits_NV = linear(x_NE, weight_VE, ar=ar)
    dlogits_NV = cross_entropy_backward(
        dloss, logits_NV, labels_N, ignore_index=ignore_index, reduction=reduction, ar=ar
    )
    dx_NE, dweight_VE, _ = linear_backward(dlogits_NV, x_NE, weight_VE, ar=ar)
    return dx_NE, dweight_VE


def mean_squared_error_backward(
    dloss: np.ndarray, x: np.ndarray, target: np.ndarray, *, ar: Arithmetic = EXACT
) -> np.ndarray:
    """dx = 2 (x - target) dloss / n, n the number of elements. Rounding: `loss.grad`."""
    x, target = ar.array(x), ar.array(target)
    return ar.round(2 * (x - target) * (ar.array(dloss) / max(1, x.size)), "loss.grad")


def binary_cross_entropy_backward(
    dloss: np.ndarray, logits: np.ndarray, target: np.ndarray, *, ar: Arithmetic = EXACT
) -> np.ndarray:
    """dz = (s(z) - y) dloss / n, with the logistic s and n the number of elements. Rounding: `loss.grad`."""
    z, y = ar.array(logits), ar.array(target)
    with np.errstate(over="ignore"):
        return ar.round((1 / (1 + np.exp(-z)) - y) * (ar.array(dloss) / max(1, z.size)), "loss.grad")
