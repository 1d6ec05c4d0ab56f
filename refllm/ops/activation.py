"""Activations by their Hugging Face names, and the gated unit of Helium, Llama and StableLM."""

import math
from collections.abc import Callable

import numpy as np

from refllm.errors import InputError
from refllm.precision import EXACT, Arithmetic

__all__ = ["ACTIVATIONS", "activation", "glu", "relu2", "swiglu"]

_erf = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has no erf; exact beats fast here


def _sigmoid(x: np.ndarray, ar: Arithmetic) -> np.ndarray:
    return 1 / (1 + ar.exp(-x))


def _silu(x: np.ndarray, ar: Arithmetic) -> np.ndarray:
    return x / (1 + ar.exp(-x))


def _gelu(x: np.ndarray, ar: Arithmetic) -> np.ndarray:
    return x * (1 + _erf(x * math.sqrt(0.5)).astype(x.dtype)) / 2


def _gelu_tanh(x: np.ndarray, ar: Arithmetic) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _relu(x: np.ndarray, ar: Arithmetic) -> np.ndarray:
    return np.maximum(x, 0)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x), in the precision of x."""
    return np.logaddexp(x, np.zeros((), x.dtype))


def _laplace(x: np.ndarray, ar: Arithmetic) -> np.ndarray:
    # mu = sqrt(1/2), sigma = sqrt(1/(4 pi)) in the roundings of Ma et al. 2022, "Mega", section 3.3
    return (1 + _erf((x - 0.707107) / (0.282095 * math.sqrt(2))).astype(x.dtype)) / 2


_ACTIVATIONS: dict[str, Callable[[np.ndarray, Arithmetic], np.ndarray]] = {
    "silu": _silu,
    "swish": _silu,
    "relu": _relu,
    "relu2": lambda x, ar: _relu(x, ar) * _relu(x, ar),
    "relu6": lambda x, ar: np.clip(x, 0, 6),
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_10": lambda x, ar: np.clip(_gelu(x, ar), -10, 10),
    "quick_gelu": lambda x, ar: x * _sigmoid(1.702 * x, ar),
    "sigmoid": _sigmoid,
    "tanh": lambda x, ar: np.tanh(x),
    "linear": lambda x, ar: x,
    "mish": lambda x, ar: x * np.tanh(softplus(x)),
    "hardswish": lambda x, ar: x * np.clip(x + 3, 0, 6) / 6,
    "leaky_relu": lambda x, ar: np.where(x > 0, x, 0.01 * x).astype(x.dtype),
    "laplace": _laplace,
    # sqrt(softplus(x)) in Transformers' spelling
    "sqrtsoftplus": lambda x, ar: np.sqrt(softplus(x)),
}

ACTIVATIONS = tuple(_ACTIVATIONS)
"""The names that `hidden_act` may have."""


def activation(x: np.ndarray, name: str, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """act(x), element by element, by its Hugging Face name (`ACTIVATIONS`); another name raises InputError.

    Rounding: `activation`, once. Source of the names: transformers.activations.ACT2FN.
    """
    return ar.round(_apply(ar.array(x), name, ar), "activation")


def _apply(x: np.ndarray, name: str, ar: Arithmetic) -> np.ndarray:
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {name!r} is not known; use one of {', '.join(ACTIVATIONS)}")
    with np.errstate(over="ignore"):  # exp(-x) may become infinite, and then silu is 0 as it should be
        return _ACTIVATIONS[name](x, ar)


def relu2(x: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """max(x, 0)^2. Rounding: `activation`. Overflows float16 above 255.9. Source: So et al. 2021, "Primer"."""
    return activation(x, "relu2", ar=ar)


def glu(gate: np.ndarray, up: np.ndarray, name: str, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """act(gate) * up for the activation `name`. Rounding: `glu.activation` for the factor, `glu` for the product."""
    return ar.round(ar.round(_apply(ar.array(gate), name, ar), "glu.activation") * ar.array(up), "glu")


def swiglu(gate: np.ndarray, up: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """silu(gate) * up with silu(x) = x / (1 + e^-x). Rounding: as `glu`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """
    return glu(gate, up, "silu", ar=ar)
