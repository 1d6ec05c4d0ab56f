"""The gradients of SwiGLU and squared ReLU in plain Torch: float32 inside, one rounding at the end."""

import torch
import torch.nn.functional as F

from refllm.kernels import arguments
from refllm.kernels.plain.wide import wide


def swiglu_backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate = dh up silu'(gate) and dup = dh silu(gate), with silu'(x) = s (1 + x (1 - s)) and the logistic s(x).

    As `refllm.ops.swiglu_backward`. Raises InputError for arguments that do not fit together.
    """
    arguments.check("swiglu", gate, up)
    arguments.like("swiglu_backward", "dh", dh, tuple(gate.shape), gate)
    d, x, u = wide(dh), wide(gate), wide(up)
    s = torch.sigmoid(x)
    dgate = d * u * s * (1 + x * (1 - s))
    dup = d * F.silu(x)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def relu2_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dx = 2 max(x, 0) dy, element by element. As `refllm.ops.relu2_backward`.

    Raises InputError for arguments that do not fit together.
    """
    arguments.check("relu2", x)
    arguments.like("relu2_backward", "dy", dy, tuple(x.shape), x)
    dx = 2 * F.relu(wide(x)) * wide(dy)
    return dx.to(x.dtype).contiguous()
