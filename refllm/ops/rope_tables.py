"""Rotary frequencies of every RoPE type, and the cos and sin tables made from them.

A rotary embedding turns pair i of a head's R rotary dims by the angle position * inv_i. The types differ only in inv_i.
Below, R is the rotary dimension (even), i = 0 .. R/2-1, b = rope_theta, and f_i = b^(-2i/R) is the plain frequency.

`dtype` selects the arithmetic: np.float64 is exact to that precision; np.float32 repeats, operation by operation, what
Transformers (transformers/modeling_rope_utils.py and the models' RotaryEmbedding classes) computes on a CPU, where the
order of the operations decides the last bit of a frequency. Python scalars stay Python scalars there too: they do not
widen float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from refllm.precision import torch_elementary

RealArray = np.ndarray


def default_inv_freq(rotary_dim: int, theta: float, dtype: DTypeLike = np.float64) -> RealArray:
    """inv_i = f_i = b^(-2i/R), [R/2]. Su et al. 2021, "RoFormer", arXiv:2104.09864, section 3.2.2."""
    return 1 / _powers(rotary_dim, theta, dtype)


def linear_inv_freq(rotary_dim: int, theta: float, factor: float, dtype: DTypeLike = np.float64) -> RealArray:
    """inv_i = f_i / factor, [R/2]: positions squeezed by factor. Chen et al. 2023, arXiv:2306.15595."""
    return default_inv_freq(rotary_dim, theta, dtype) / factor


def dynamic_theta(
    rotary_dim: int, theta: float, factor: float, max_positions: int, length: int, dtype: DTypeLike = np.float64
) -> float:
    """b(s) = b * (factor * s / M - (factor - 1))^(R / (R - 2)) with s = max(length, M): the NTK-aware base.

    M is max_positions; b(M) = b. Its inv_i is `default_inv_freq` with b(s) for b. Reddit users bloc97 and emozilla,
    2023; Peng et al. 2023, "YaRN", arXiv:2309.00071, section 3.1 and appendix B.2. R = 2 divides by zero.
    """
    s, exponent = max(length, max_positions), rotary_dim / (rotary_dim - 2)
    if dtype == np.float64 or s == max_positions:
        return float(theta * ((factor * s / max_positions) - (factor - 1)) ** exponent)
    product = np.float32(factor * s if isinstance(factor, int) else np.float32(factor) * np.float32(s))
    stretch = product / np.float32(max_positions) - np.float32(factor - 1)
    return float(np.float32(theta) * torch_elementary.power_of_scalar(stretch, exponent))


def yarn_inv_freq(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
    dtype: DTypeLike = np.float64,
) -> RealArray:
    """inv_i = (f_i / factor) * ramp_i + f_i * (1 - ramp_i), [R/2]: only the slow pairs are interpolated.

    ramp_i = clip((i - lo) / (hi - lo), 0, 1), where pair lo turns beta_fast and pair hi turns beta_slow times within
    the original length: corr(r) = R ln(original_length / (2 pi r)) / (2 ln b), lo = max(floor corr(beta_fast), 0),
    hi = min(ceil corr(beta_slow), R - 1); without truncate neither floor nor ceil; hi + 0.001 where lo = hi.
    Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models", arXiv:2309.00071.
    """

    def corr(rotations: float) -> float:
        return (rotary_dim * math.log(original_length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    lo, hi = corr(beta_fast), corr(beta_slow)
    if truncate:
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(lo, 0), min(hi, rotary_dim - 1)
    if lo == hi:
        hi += 0.001
    powers = _powers(rotary_dim, theta, dtype)
    keep = 1 - np.clip((np.arange(rotary_dim // 2, dtype=dtype) - lo) / (hi - lo), 0, 1)
    return 1 / (factor * powers) * (1 - keep) + 1 / powers * keep


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """g(factor, mscale) / g(factor, mscale_all_dim) if both are given and not 0, else g(factor, 1).

    g(s, m) = 0.1 m ln(s) + 1 for s > 1, else 1. It multiplies cos and sin, and so the scores by its square.
    arXiv:2309.00071, section 3.4; the two mscales are those of DeepSeek-V2, arXiv:2405.04434.
    """

    def g(scale: float, m: float) -> float:
        return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0

    if mscale and mscale_all_dim:
        return g(factor, mscale) / g(factor, mscale_all_dim)
    return g(factor, 1)


def longrope_inv_freq(
    rotary_dim: int, theta: float, divisors: Sequence[float], dtype: DTypeLike = np.float64
) -> RealArray:
    """inv_i = 1 / (e_i b^(2i/R)), [R/2], with a searched divisor e_i per pair: one list for short, one for long input.

    Ding et al. 2024, "LongRoPE", arXiv:2402.13753.
    """
    return 1 / (np.asarray(divisors, dtype=dtype) * _powers(rotary_dim, theta, dtype))


def longrope_attention_factor(factor: float, original_length: int) -> float:
    """sqrt(1 + ln(factor) / ln(original_length)) for factor > 1, else 1. arXiv:2402.13753, as Phi-3 uses it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def llama3_inv_freq(
    rotary_dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_length: int,
    dtype: DTypeLike = np.float64,
) -> RealArray:
    """Interpolation by wavelength w_i = 2 pi / f_i against the original length L, [R/2]:

    w_i > L / low: inv_i = f_i / factor.     w_i < L / high: inv_i = f_i.
    In between: inv_i = (1 - t) f_i / factor + t f_i with t = (L / w_i - low) / (high - low).
    Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783; `apply_scaling` in the reference code of meta-llama).
    """
    low, high = low_freq_factor, high_freq_factor
    f = default_inv_freq(rotary_dim, theta, dtype)
    wavelength = (1 / f) * (2 * math.pi)  # torch divides a scalar by a tensor in this way
    t = ((1 / wavelength) * original_length - low) / (high - low)
    between = (1 - t) * f / factor + t * f
    inv = np.where(wavelength > original_length / low, f / factor, between)
    return np.where(wavelength < original_length / high, f, inv)


def proportional_inv_freq(
    head_dim: int, theta: float, proportion: float, factor: float = 1.0, dtype: DTypeLike = np.float64
) -> RealArray:
    """inv_i = b^(-2i/D) / factor for i < m and 0 for m <= i < D/2, with m = floor(proportion * D / 2); [D/2].

    A frequency of 0 leaves its pair as it is. The exponent has D, not the reduced size. `proportional` of
    transformers/modeling_rope_utils.py (Gemma 3n and later).
    """
    rotated = int(proportion * head_dim // 2)
    inv = np.zeros(head_dim // 2, dtype)
    inv[:rotated] = 1 / _powers(head_dim, theta, dtype, count=rotated) / factor
    return inv


def cos_sin_tables(
    inv_freq: RealArray, position_ids_BS: np.ndarray, attention_factor: float = 1.0
) -> tuple[RealArray, RealArray]:
    """cos and sin of position * inv_i times the attention factor, each [B, S, R/2] in the dtype of inv_freq.

    In float32 every step is one float32 operation: the position is rounded to float32 first, so that a large angle
    carries a relative error of 2^-24 and more. float64 has none of that. cos and sin of the float32 angle are correctly
    rounded; those of torch's math libraries are off by one ulp in 5 % of the angles (1 % beyond 10,000).
    """
    positions = position_ids_BS.astype(inv_freq.dtype)
    angles = (positions[..., None] * inv_freq).astype(np.float64)
    scale = inv_freq.dtype.type(attention_factor)
    return np.cos(angles).astype(inv_freq.dtype) * scale, np.sin(angles).astype(inv_freq.dtype) * scale


def _powers(rotary_dim: int, theta: float, dtype: DTypeLike, count: int | None = None) -> RealArray:
    """b^(2i/R), [R/2], or the first `count` of them."""
    stop = rotary_dim if count is None else 2 * count
    exponents = np.arange(0, stop, 2, dtype=dtype) / np.dtype(dtype).type(rotary_dim)
    return torch_elementary.power(theta, exponents) if exponents.dtype == np.float32 else theta**exponents
