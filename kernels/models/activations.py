"""The activations that have no fused operator, by their Hugging Face names (`refllm.ops.ACTIVATIONS`), in Torch."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from refllm.errors import InputError


def _laplace(x: torch.Tensor) -> torch.Tensor:
    # mu = sqrt(1/2), sigma = sqrt(1/(4 pi)) in the roundings of Ma et al. 2022, "Mega", section 3.3
    return (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))) / 2


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "laplace": _laplace,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """act(x) in the dtype of x, which should be float32; InputError for a name that is not known."""
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {name!r} is not known; use one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](x)
