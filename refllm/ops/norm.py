"""RMSNorm and LayerNorm, alone and with the residual sum before them."""

import numpy as np

from refllm.precision import EXACT, Arithmetic

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis: [..., E] -> [..., E], weight [E].

    Rounding: `rms_norm.normalized` before the weight (Llama and Arcee; Helium multiplies first), `rms_norm` after it.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    x, weight = ar.array(x), ar.array(weight)
    y = x * (1 / np.sqrt(ar.mean(x * x) + eps))
    return ar.round(weight * ar.round(y, "rms_norm.normalized"), "rms_norm")


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float, *, ar: Arithmetic = EXACT
) -> np.ndarray:
    """y = w * (x - mean(x)) / sqrt(var(x) + eps) + b over the last axis, var the biased variance; weight, bias [E].

    Rounding: `layer_norm`, once, at the end. Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.
    """
    x, weight = ar.array(x), ar.array(weight)
    y = ar.scale_and_shift(ar.standardize(x, eps), weight, None if bias is None else ar.array(bias))
    return ar.round(y, "layer_norm")


def add_rms_norm(
    x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float, *, ar: Arithmetic = EXACT
) -> tuple[np.ndarray, np.ndarray]:
    """(rms_norm(r, weight, eps), r) with r = residual + x. Rounding: `add`, then as `rms_norm`."""
    r = ar.round(ar.array(residual) + ar.array(x), "add")
    return rms_norm(r, weight, eps, ar=ar), r


def add_layer_norm(
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    eps: float,
    *,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """(layer_norm(r, weight, bias, eps), r) with r = residual + x. Rounding: `add`, then as `layer_norm`."""
    r = ar.round(ar.array(residual) + ar.array(x), "add")
    return layer_norm(r, weight, bias, eps, ar=ar), r
