"""The gradients of the losses in plain Torch: float32 inside, one rounding at the end."""

import torch
import torch.nn.functional as F

from refllm.kernels import arguments
from refllm.kernels.plain.wide import wide

LOGITS_BACKWARD = 2**25
"""Logits that exist at a time in `linear_cross_entropy_backward`: 128 MiB in float32."""


def cross_entropy_backward(
    dloss: torch.Tensor,
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """dlogits = (softmax(logits) - onehot(label)) dloss per counted row, over their number if the loss is their mean;
    exactly 0 in rows whose label is ignore_index. As `refllm.ops.cross_entropy_backward`.

    dloss: a number, or [N] for reduction "none". Raises InputError for arguments that do not fit together, and for a
    label outside 0..V-1 if labels are on the CPU.
    """
    arguments.check("cross_entropy", logits_NV, labels_N, reduction=reduction)
    _labels_exist("cross_entropy", labels_N, logits_NV.shape[1], ignore_index)
    each_N = _of_each_row(dloss, labels_N, ignore_index, reduction)
    return _dlogits(each_N, wide(logits_NV), labels_N, ignore_index).to(logits_NV.dtype)


def linear_cross_entropy_backward(
    dloss: torch.Tensor,
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = dlogits W and dW = dlogits^T x, of `cross_entropy_backward` at the logits x W^T, rounded to their dtype.

    As `refllm.ops.linear_cross_entropy_backward`. At most `LOGITS_BACKWARD` logits exist at a time; dW is summed in
    float32. dloss and errors: as `cross_entropy_backward`.
    """
    arguments.check("linear_cross_entropy", x_NE, weight_VE, labels_N, reduction=reduction)
    (N, _), V = x_NE.shape, weight_VE.shape[0]
    _labels_exist("linear_cross_entropy", labels_N, V, ignore_index)
    each_N = _of_each_row(dloss, labels_N, ignore_index, reduction)
    rows = max(1, LOGITS_BACKWARD // max(1, V))
    dx_NE, dweight_VE = wide(torch.zeros_like(x_NE)), wide(torch.zeros_like(weight_VE))
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits_NV = F.linear(x_NE[part], weight_VE)
        dlogits_NV = _dlogits(each_N[part], wide(logits_NV), labels_N[part], ignore_index)
        ignored_N1 = (labels_N[part] == ignore_index)[:, None]  # what these rows hold, NaN included, reaches nothing
        dx_NE[part] = (dlogits_NV @ wide(weight_VE)).masked_fill(ignored_N1, 0.0)
        dweight_VE += dlogits_NV.mT @ wide(x_NE[part]).masked_fill(ignored_N1, 0.0)
    return dx_NE.to(x_NE.dtype), dweight_VE.to(weight_VE.dtype)


def _labels_exist(operator: str, labels_N: torch.Tensor, V: int, ignore_index: int) -> None:
    if labels_N.device.type == "cpu":  # on a GPU a look at the values would mean waiting for it
        arguments.labels_exist(operator, labels_N, V, ignore_index)


def _of_each_row(dloss: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """The gradient of the loss of each row [N]: 0 where it does not count."""
    counted_N = labels_N != ignore_index
    each_N = wide(dloss).expand(labels_N.shape).masked_fill(~counted_N, 0.0)
    return each_N / counted_N.sum().clamp(min=1) if reduction == "mean" else each_N


def _dlogits(each_N: torch.Tensor, logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """(softmax - onehot) times the gradient of each row, 0 where the label is ignored."""
    ignored_N1 = (labels_N == ignore_index)[:, None]
    label_N1 = labels_N.long()[:, None].masked_fill(ignored_N1, 0)
    p_NV = logits_NV.softmax(-1)
    off_NV = p_NV.scatter_add(1, label_N1, torch.full_like(p_NV[:, :1], -1.0))
    return (off_NV * each_N[:, None]).masked_fill(ignored_N1, 0.0)
