"""RMSNorm and LayerNorm in plain Torch, alone and after a residual sum: float32 inside, one rounding at the end."""

import torch
import torch.nn.functional as F

from refllm.kernels import arguments


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis: [..., E] -> [..., E], weight [E]. As `refllm.ops.rms_norm`.

    weight may be float32 beside a narrower x. Raises InputError for arguments that do not fit together.
    """
    arguments.check("rms_norm", x, weight)
    return (weight.float() * rms_normed(x, eps)).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """y = w * (x - mean(x)) / sqrt(var(x) + eps) + b over the last axis: [..., E] -> [..., E]; weight, bias [E].

    As `refllm.ops.layer_norm`. weight and bias may be float32 beside a narrower x. Raises InputError for arguments that
    do not fit together.
    """
    arguments.check("layer_norm", x, weight, bias)
    y = weight.float() * layer_normed(x, eps)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(r, weight, eps), r) with r = residual + x, rounded to their dtype. As `refllm.ops.add_rms_norm`.

    residual has the shape and dtype of x. Raises InputError for arguments that do not fit together.
    """
    arguments.check("add_rms_norm", x, residual, weight)
    r = (residual + x).contiguous()
    return rms_norm(r, weight, eps), r


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(r, weight, bias, eps), r) with r = residual + x, rounded to their dtype.

    As `refllm.ops.add_layer_norm`. residual has the shape and dtype of x. Raises InputError for arguments that do not
    fit together.
    """
    arguments.check("add_layer_norm", x, residual, weight, bias)
    r = (residual + x).contiguous()
    return layer_norm(r, weight, bias, eps), r


def rms_normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    x = x.float().contiguous()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layer_normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) over the last axis, in float32.

    Centred twice: the second mean is the rounding error of the first, which at a mean of 1000 hides all others.
    """
    x = x.float().contiguous()
    for _ in range(2):
        x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def eager_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch.nn.functional.rms_norm."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def eager_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, then the norm."""
    r = residual + x
    return eager_rms_norm(r, weight, eps), r


def eager_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """torch.nn.functional.layer_norm."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def eager_add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, then the norm."""
    r = residual + x
    return eager_layer_norm(r, weight, bias, eps), r
