"""The gradients of the activations by their Hugging Face names, and of the gated unit."""

import math
from collections.abc import Callable

import numpy as np

from refllm.errors import InputError
from refllm.ops.activation import ACTIVATIONS, activation, softplus
from refllm.precision import EXACT, Arithmetic

__all__ = ["activation_backward", "glu_backward", "relu2_backward", "swiglu_backward"]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu(x: np.ndarray) -> np.ndarray:
    """Phi(x) + x phi(x), of the normal distribution."""
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return np.where(x == 0, 0.5, activation(x, "gelu").astype(x.dtype) / np.where(x == 0, 1, x)) + x * density


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x * x * x))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _quick_gelu(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


def _mish(x: np.ndarray) -> np.ndarray:
    t = np.tanh(softplus(x))
    return t + x * (1 - t * t) * _sigmoid(x)


def _laplace(x: np.ndarray) -> np.ndarray:
    """The density whose integral the activation is."""
    z = (x - 0.707107) / (0.282095 * math.sqrt(2))
    return np.exp(-z * z) / (math.sqrt(2 * math.pi) * 0.282095)


def _sqrtsoftplus(x: np.ndarray) -> np.ndarray:
    """s(x) / (2 sqrt(softplus(x))); far below 0, where both vanish, e^(x/2) / 2."""
    near = np.maximum(x, -40)
    return np.where(x < -40, np.exp(np.minimum(x, 0) / 2) / 2, _sigmoid(near) / (2 * np.sqrt(softplus(near))))


def _ones(where: np.ndarray, x: np.ndarray) -> np.ndarray:
    return where.astype(x.dtype)


_SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "swish": _silu,
    "relu": lambda x: _ones(x > 0, x),
    "relu2": lambda x: 2 * np.maximum(x, 0),
    "relu6": lambda x: _ones((x > 0) & (x < 6), x),
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: np.where(np.abs(activation(x, "gelu")) <= 10, _gelu(x), 0).astype(x.dtype),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), _gelu_tanh),
    "quick_gelu": _quick_gelu,
    "sigmoid": lambda x: _sigmoid(x) * _sigmoid(-x),
    "tanh": lambda x: 1 - np.tanh(x) ** 2,
    "linear": np.ones_like,
    "mish": _mish,
    "hardswish": lambda x: np.where(x <= -3, 0, np.where(x < 3, x / 3 + 0.5, 1)).astype(x.dtype),
    "leaky_relu": lambda x: np.where(x > 0, 1, 0.01).astype(x.dtype),
    "laplace": _laplace,
    "sqrtsoftplus": _sqrtsoftplus,
}
"""The derivative of each activation. At a corner (relu at 0, relu6 at 6) the value that torch.autograd takes."""


def activation_backward(dy: np.ndarray, x: np.ndarray, name: str, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """dx = dy act'(x), element by element, by its Hugging Face name; another name raises InputError.

    Rounding: `activation.grad`, once.
    """
    return ar.round(ar.array(dy) * _slope(ar.array(x), name), "activation.grad")


def relu2_backward(dy: np.ndarray, x: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """dx = 2 max(x, 0) dy. Rounding: `activation.grad`."""
    return activation_backward(dy, x, "relu2", ar=ar)


def glu_backward(
    dh: np.ndarray, gate: np.ndarray, up: np.ndarray, name: str, *, ar: Arithmetic = EXACT
) -> tuple[np.ndarray, np.ndarray]:
    """dgate = dh up act'(gate) and dup = dh act(gate): the product rule for h = act(gate) up.

    Rounding: `glu.activation` for act(gate), as in the forward pass, `glu.grad.activation` for dh up, `glu.grad`.
    """
    dh, gate, up = ar.array(dh), ar.array(gate), ar.array(up)
    inner = ar.round(_activated(gate, name), "glu.activation")
    dgate = ar.round(dh * up, "glu.grad.activation") * _slope(gate, name)
    return ar.round(dgate, "glu.grad"), ar.round(dh * inner, "glu.grad")


def swiglu_backward(
    dh: np.ndarray, gate: np.ndarray, up: np.ndarray, *, ar: Arithmetic = EXACT
) -> tuple[np.ndarray, np.ndarray]:
    """`glu_backward` with silu. Rounding: as there."""
    return glu_backward(dh, gate, up, "silu", ar=ar)


def _activated(x: np.ndarray, name: str) -> np.ndarray:
    """act(x) in the working precision, not rounded."""
    return np.asarray(activation(x, name), x.dtype)


def _slope(x: np.ndarray, name: str) -> np.ndarray:
    if name not in _SLOPES:
        raise InputError(f"activation {name!r} is not known; use one of {', '.join(ACTIVATIONS)}")
    with np.errstate(over="ignore"):
        return _SLOPES[name](x)
