"""The gradients of RMSNorm and LayerNorm in plain Torch, alone and after a residual sum: float32 inside, one rounding
at the end."""

import torch

from refllm.kernels import arguments
from refllm.kernels.plain.wide import wide


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = r (g - n mean(g n)) and dw = sum of dy n over rows, with r = 1 / sqrt(mean(x^2) + eps), n = r x, g = w dy.

    As `refllm.ops.rms_norm_backward`. Raises InputError for arguments that do not fit together.
    """
    arguments.check("rms_norm", x, weight)
    arguments.like("rms_norm_backward", "dy", dy, tuple(x.shape), x)
    dx, terms = through_rms_norm(wide(dy), wide(x), wide(weight), eps)
    return dx.to(x.dtype), over_rows(terms).to(weight.dtype)


def layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx = r (g - mean(g) - n mean(g n)), dw = sum of dy n and db = sum of dy over rows, with n = r (x - mean(x)),
    r = 1 / sqrt(var(x) + eps), g = w dy; db is None without bias.

    As `refllm.ops.layer_norm_backward`. Raises InputError for arguments that do not fit together.
    """
    arguments.check("layer_norm", x, weight, bias)
    arguments.like("layer_norm_backward", "dy", dy, tuple(x.shape), x)
    dx, terms = through_layer_norm(wide(dy), wide(x), wide(weight), eps)
    dbias = None if bias is None else over_rows(wide(dy)).to(bias.dtype)
    return dx.to(x.dtype), over_rows(terms).to(weight.dtype), dbias


def add_rms_norm_backward(
    dy: torch.Tensor, dsum: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx = dresidual = dsum + the dx of `rms_norm_backward` at residual + x, and its dw.

    As `refllm.ops.add_rms_norm_backward`. Raises InputError for arguments that do not fit together.
    """
    arguments.check("add_rms_norm", x, residual, weight)
    for name, d in (("dy", dy), ("dsum", dsum)):
        arguments.like("add_rms_norm_backward", name, d, tuple(x.shape), x)
    through, terms = through_rms_norm(wide(dy), wide(residual + x), wide(weight), eps)
    dx = (wide(dsum) + through).to(x.dtype)
    return dx, dx, over_rows(terms).to(weight.dtype)


def add_layer_norm_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx = dresidual = dsum + the dx of `layer_norm_backward` at residual + x, and its dw and db.

    As `refllm.ops.add_layer_norm_backward`. Raises InputError for arguments that do not fit together.
    """
    arguments.check("add_layer_norm", x, residual, weight, bias)
    for name, d in (("dy", dy), ("dsum", dsum)):
        arguments.like("add_layer_norm_backward", name, d, tuple(x.shape), x)
    through, terms = through_layer_norm(wide(dy), wide(residual + x), wide(weight), eps)
    dx = (wide(dsum) + through).to(x.dtype)
    dbias = None if bias is None else over_rows(wide(dy)).to(bias.dtype)
    return dx, dx, over_rows(terms).to(weight.dtype), dbias


def through_rms_norm(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and what dw is the sum of: dy n. Nothing is rounded; weight is [E], or [heads, 1, E] for heads of x."""
    r = 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    n, g = x * r, dy * weight
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    return dx, dy * n


def through_layer_norm(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and what dw is the sum of: dy n. Centred twice, as in the forward pass."""
    for _ in range(2):
        x = x - x.mean(-1, keepdim=True)
    r = 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    n, g = x * r, dy * weight
    dx = r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx, dy * n


def over_rows(terms: torch.Tensor) -> torch.Tensor:
    """The sum over all axes but the last."""
    return terms.reshape(-1, terms.shape[-1]).sum(0)
