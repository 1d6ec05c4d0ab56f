"""The losses in plain Torch, in float32: of logits, and of logits that are made a few rows at a time."""

from typing import Any

import torch
import torch.nn.functional as F

from refllm.kernels import arguments
from refllm.kernels.plain.loss_backward import linear_cross_entropy_backward

LOGITS = 2**25
"""Logits that exist at a time in `linear_cross_entropy`: 128 MiB in float32."""


def cross_entropy(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """-log softmax(logits)[label] per row: logits [N, V], labels [N] int32 or int64. As `refllm.ops.cross_entropy`.

    reduction: "mean" over the rows whose label is not ignore_index (NaN if there are none), "sum", or "none" ([N], 0
    where ignored). Raises InputError for arguments that do not fit together, and for a label outside 0..V-1 if labels
    are on the CPU; on a GPU the loss of such a row is NaN.
    """
    arguments.check("cross_entropy", logits_NV, labels_N, reduction=reduction)
    _check("cross_entropy", labels_N, logits_NV.shape[1], ignore_index)
    return _reduce(_losses(logits_NV, labels_N, ignore_index), labels_N, ignore_index, reduction)


def linear_cross_entropy(
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """`cross_entropy` of the logits x W^T, rounded to their dtype: x [N, E], weight [V, E], labels [N].

    As `refllm.ops.linear_cross_entropy`; reduction and errors as `cross_entropy`. At most `LOGITS` logits exist at a
    time.
    """
    arguments.check("linear_cross_entropy", x_NE, weight_VE, labels_N, reduction=reduction)
    _check("linear_cross_entropy", labels_N, weight_VE.shape[0], ignore_index)
    if torch.is_grad_enabled() and (x_NE.requires_grad or weight_VE.requires_grad):
        found: torch.Tensor = _Followed.apply(x_NE, weight_VE, labels_N, ignore_index, reduction)
        return found
    return _in_parts(x_NE, weight_VE, labels_N, ignore_index, reduction)


def _in_parts(
    x_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    """The loss, of whose logits a few rows exist at a time."""
    rows = max(1, LOGITS // max(1, weight_VE.shape[0]))
    losses = [
        _losses(F.linear(x, weight_VE), labels, ignore_index)
        for x, labels in zip(x_NE.split(rows), labels_N.split(rows), strict=True)
    ]
    return _reduce(torch.cat(losses), labels_N, ignore_index, reduction)


class _Followed(torch.autograd.Function):
    """`_in_parts` with the gradients of `linear_cross_entropy_backward`: autograd itself would keep all logits, and add
    up the parts of dweight in the format of the weight, which in bfloat16 stops growing."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, labels: Any, ignore_index: int, reduction: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight, labels)
        ctx.how = {"ignore_index": ignore_index, "reduction": reduction}
        return _in_parts(x, weight, labels, ignore_index, reduction)

    @staticmethod
    def backward(ctx: Any, *dloss: Any) -> Any:
        return *linear_cross_entropy_backward(dloss[0], *ctx.saved_tensors, **ctx.how), None, None, None


def _check(operator: str, labels_N: torch.Tensor, V: int, ignore_index: int) -> None:
    if labels_N.device.type == "cpu":  # on a GPU a look at the values would mean waiting for it
        arguments.labels_exist(operator, labels_N, V, ignore_index)


def _losses(logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """[N] in float32. Torch stops the GPU for a label out of range, so such a label never reaches it."""
    counted = labels_N != ignore_index
    bad = counted & ((labels_N < 0) | (labels_N >= logits_NV.shape[1]))
    labels = torch.where(counted & ~bad, labels_N, -100).long()
    losses = F.cross_entropy(logits_NV.float(), labels, ignore_index=-100, reduction="none")
    return torch.where(bad, float("nan"), losses)


def _reduce(loss_N: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return loss_N
    return loss_N.sum() if reduction == "sum" else loss_N.sum() / (labels_N != ignore_index).sum()


def eager_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    """torch.nn.functional.cross_entropy in float32 or wider, as Transformers calls it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, **how)


def eager_linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    """The logits as a whole, then their cross-entropy."""
    return eager_cross_entropy(F.linear(x, weight), labels, **how)
