"""The losses in plain Torch, in float32: of logits, and of logits that are made a few rows at a time."""

from typing import Any

import torch
import torch.nn.functional as F

from refllm.kernels import arguments

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
    V = weight_VE.shape[0]
    _check("linear_cross_entropy", labels_N, V, ignore_index)
    rows = max(1, LOGITS // max(1, V))
    losses = [
        _losses(F.linear(x, weight_VE), labels, ignore_index)
        for x, labels in zip(x_NE.split(rows), labels_N.split(rows), strict=True)
    ]
    return _reduce(torch.cat(losses), labels_N, ignore_index, reduction)


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
