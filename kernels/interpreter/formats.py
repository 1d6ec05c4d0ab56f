"""Number formats as the interpreter holds them, and the roundings between them.

Triton's interpreter keeps bfloat16 and the 8-bit formats as bare integers of the same width, because NumPy has no such
numbers. ml_dtypes has: here they are widened to float32 for arithmetic and rounded back to nearest, ties to even.
"""

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl

EMULATED = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8e5": np.dtype(ml_dtypes.float8_e5m2),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8e4b8": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "fp8e5b16": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""Formats held as integers, by Triton's name. (fp8e4b15, of Turing GPUs only, is left to Triton.)"""

_CARRIER: dict[int, np.dtype] = {2: np.dtype(np.uint16), 1: np.dtype(np.uint8)}


def is_emulated(dtype: Any) -> bool:
    """Whether numbers of this Triton type are held as integers of the same width."""
    return dtype.scalar.name in EMULATED


def widen(data: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers of an emulated format as float32, exactly; of any other format as they are."""
    emulated = EMULATED.get(dtype.scalar.name)
    if emulated is None or data.dtype.kind == "f":
        return data
    return np.ascontiguousarray(data).view(emulated).astype(np.float32)


def narrow(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Floats, rounded once to a Triton floating-point type, as the interpreter holds it.

    8-bit formats saturate: that is what the conversion of the hardware does (PTX ISA, cvt.rn.satfinite).
    """
    emulated = EMULATED.get(dtype.scalar.name)
    if emulated is None:
        return np.asarray(values).astype(numpy_type(dtype), copy=False)
    values = np.asarray(values, np.float32)
    if emulated.itemsize == 1:
        largest = float(ml_dtypes.finfo(emulated).max)
        values = np.clip(values, -largest, largest)
    return values.astype(emulated).view(_CARRIER[emulated.itemsize])


def narrow_towards_zero(values: np.ndarray, dtype: Any) -> np.ndarray:
    """What `narrow` gives, but rounded towards zero (fp_downcast_rounding="rtz")."""
    values = np.asarray(values)
    emulated = EMULATED.get(dtype.scalar.name) or numpy_type(dtype)
    rounded = values.astype(emulated)
    too_large = np.abs(rounded.astype(np.float64)) > np.abs(values.astype(np.float64))
    # Of two neighbours in one format the one nearer to zero has the smaller bit pattern, whatever the sign.
    carrier = np.dtype(f"u{emulated.itemsize}")
    bits = rounded.view(carrier) - too_large.astype(carrier)
    return bits if is_emulated(dtype) else bits.view(emulated)


def numpy_type(dtype: Any) -> np.dtype:
    """The NumPy type in which the interpreter holds a Triton type."""
    dtype = dtype.scalar
    if dtype.is_ptr():
        return np.dtype(np.uint64)
    if dtype.name in EMULATED:
        return _CARRIER[EMULATED[dtype.name].itemsize]
    return _NUMPY[dtype.name]


_NUMPY = {
    "int1": np.dtype(bool),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    "fp8e4b15": np.dtype(np.uint8),
    **{f"{sign}int{width}": np.dtype(f"{sign}int{width}") for sign in ("", "u") for width in (8, 16, 32, 64)},
}


def truncate_tf32(values: np.ndarray) -> np.ndarray:
    """float32 as a tensor core reads it as TF32: the 13 low bits of the mantissa are dropped.

    Triton hands float32 registers to the tensor core as they are, and the hardware ignores those bits (PTX ISA, on
    .tf32 operands). Infinities and NaNs keep their meaning.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(values), np.float32(np.nan), bits.view(np.float32))


def round_tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to TF32, to nearest, ties away from zero (PTX ISA, cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def to_integer(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats truncated to integers; NaN becomes 0 and what is out of range the nearest end (PTX ISA, cvt.rzi)."""
    info = np.iinfo(dtype)
    wide = np.trunc(values.astype(np.float64))
    result = np.clip(np.nan_to_num(wide, nan=0.0, posinf=info.max, neginf=info.min), info.min, info.max)
    # float64 cannot hold the largest 64-bit integers: what was clipped is set as an integer.
    integers = np.where(np.abs(result) < 2.0**62, result, 0).astype(dtype)
    if info.bits == 64:
        large = np.abs(result) >= 2.0**62
        integers[large] = [min(max(int(v), info.min), info.max) for v in result[large]]
    return integers


HALF_TYPES = (tl.float16, tl.bfloat16)
