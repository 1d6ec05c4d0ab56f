"""tl.dot_scaled: products of narrow numbers whose rows share scales along K, as the OCP Microscaling formats have them.

A scale is a power of two (e8m0: 2^(bits - 127), 255 is NaN) for 32 numbers, or a float8_e4m3fn number for 16.
"""

from typing import Any

import ml_dtypes
import numpy as np

_FORMATS = {
    "E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP16": np.dtype(np.float16),
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""The magnitudes of the 4-bit format, by its three low bits (OCP Microscaling Formats 1.0, section 5.3.3)."""


def operand(data: np.ndarray, scale: np.ndarray | None, scale_name: str, kind: Any, k_axis: int, packed_k: bool) -> Any:
    """The numbers of one operand in float32, with its scales in them.

    data: [..., M, K] with k_axis -1, or [..., K, N] with k_axis -2. scale: [..., M or N, K / 32 or 16] or None.
    packed_k: two numbers of the 4-bit format to a byte lie along K, else along the other axis.
    """
    if kind.name == "E2M1":
        values = _unpacked(data, k_axis if packed_k else -3 - k_axis)
    else:
        values = np.ascontiguousarray(data).view(_FORMATS[kind.name]).astype(np.float32)
    if scale is None:
        return values
    factors = np.repeat(_factors(scale, scale_name), values.shape[k_axis] // scale.shape[-1], axis=-1)
    return values * (factors if k_axis == -1 else np.swapaxes(factors, -1, -2))


def _unpacked(data: np.ndarray, axis: int) -> np.ndarray:
    """Two numbers per byte, the low half first, side by side along an axis."""
    axis %= data.ndim
    halves = np.stack([data & 15, data >> 4], axis + 1).astype(np.intp)
    values = np.where(halves & 8, -_E2M1[halves & 7], _E2M1[halves & 7])
    return values.reshape([2 * n if i == axis else n for i, n in enumerate(data.shape)])


def _factors(scale: np.ndarray, name: str) -> np.ndarray:
    bits = np.ascontiguousarray(scale).view(np.uint8)
    if name == "fp8e4nv":
        return bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return bits.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
