"""SwiGLU and squared ReLU in plain Torch: float32 inside, one rounding at the end."""

import torch
import torch.nn.functional as F

from refllm.kernels import arguments


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up, element by element; gate and up have one shape and dtype. As `refllm.ops.swiglu`.

    Raises InputError for arguments that do not fit together.
    """
    arguments.check("swiglu", gate, up)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype).contiguous()


def eager_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product is taken of a rounded silu(gate)."""
    return F.silu(gate) * up


def relu2(x: torch.Tensor) -> torch.Tensor:
    """y = max(x, 0)^2, element by element. As `refllm.ops.relu2`: float16 overflows to infinity above 255.9.

    Raises InputError if x is not a tensor of float32, float16 or bfloat16.
    """
    arguments.check("relu2", x)
    return F.relu(x.float()).square().to(x.dtype).contiguous()


def eager_relu2(x: torch.Tensor) -> torch.Tensor:
    """The square is taken of max(x, 0)."""
    return F.relu(x).square()
