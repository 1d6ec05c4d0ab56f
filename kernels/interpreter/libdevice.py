"""The functions of libdevice, through NumPy and Torch in the precision of their argument.

Triton's stubs of them have no body: its interpreter returns None. Results are those of a good library, so the last bit
may differ from the GPU's; 16-bit arguments are computed in float32 and rounded once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl

from refllm.kernels.interpreter import formats
from refllm.kernels.interpreter.errors import KernelError
from refllm.kernels.interpreter.semantic import SEMANTIC, make


def special(name: str) -> Callable[..., np.ndarray]:
    """A function of torch.special or torch on arrays; NumPy has no error or gamma functions."""
    function = getattr(torch.special, name)
    return lambda *arrays: function(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)).numpy()


def _rsqrt(x: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    **{
        name: getattr(np, name)
        for name in (
            "abs", "floor", "ceil", "trunc", "rint", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt",
            "cbrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "hypot", "fmod", "fmax", "fmin", "copysign",
            "nextafter", "isnan", "isinf", "signbit",
        )
    },
    **{name: special(name) for name in ("erf", "erfc", "erfinv", "erfcx")},
    "fabs": np.abs,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "atan2": np.arctan2,
    "pow": np.power,
    "rsqrt": _rsqrt,
    "lgamma": special("gammaln"),
    "nearbyint": np.rint,
    "round": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "finitef": np.isfinite,
    "isfinited": np.isfinite,
    "exp10": lambda x: np.power(np.asarray(10, x.dtype), x),
    "fma": lambda x, y, z: x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64),
    "div_rn": np.divide,
    "mul_rn": np.multiply,
    "add_rn": np.add,
    "sub_rn": np.subtract,
    "sqrt_rn": np.sqrt,
    "rsqrt_rn": _rsqrt,
    "rcp_rn": np.reciprocal,
    "fast_expf": np.exp,
    "fast_exp10f": lambda x: np.power(np.asarray(10, x.dtype), x),
    "fast_logf": np.log,
    "fast_log2f": np.log2,
    "fast_log10f": np.log10,
    "fast_sinf": np.sin,
    "fast_cosf": np.cos,
    "fast_tanf": np.tan,
    "fast_powf": np.power,
    "fast_dividef": np.divide,
    "fast_tanhf": np.tanh,
    "saturatef": lambda x: np.clip(np.nan_to_num(x, nan=0.0), 0, 1),
}  # fmt: skip


def _unsigned(x: np.ndarray) -> np.ndarray:
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    bits = 8 * x.dtype.itemsize
    shifts = np.arange(bits, dtype=np.uint64)
    set_ = (_unsigned(x)[..., None].astype(np.uint64) >> shifts) & np.uint64(1)
    return np.where(set_.any(axis=-1), set_[..., ::-1].argmax(axis=-1), bits)


def _first_set(x: np.ndarray) -> np.ndarray:
    """The place of the lowest bit that is set, from 1; 0 of 0."""
    shifts = np.arange(8 * x.dtype.itemsize, dtype=np.uint64)
    set_ = (_unsigned(x)[..., None].astype(np.uint64) >> shifts) & np.uint64(1)
    return np.where(set_.any(axis=-1), set_.argmax(axis=-1) + 1, 0)


def _reversed_bits(x: np.ndarray) -> np.ndarray:
    shifts = np.arange(8 * x.dtype.itemsize, dtype=np.uint64)
    set_ = (_unsigned(x)[..., None].astype(np.uint64) >> shifts) & np.uint64(1)
    return (set_ << shifts[::-1]).sum(axis=-1, dtype=np.uint64).astype(_unsigned(x).dtype).view(x.dtype)


def _high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The upper half of a product, exactly: by Python's integers."""
    wide = x.astype(object) * y.astype(object) >> 8 * x.dtype.itemsize
    return wide.astype(x.dtype)


def _byte_perm(x: np.ndarray, y: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte of the result is one of the eight of x (0 to 3) and y (4 to 7), by a digit of the selector."""
    eight = _unsigned(x).astype(np.uint64) | _unsigned(y).astype(np.uint64) << np.uint64(32)
    result = np.zeros(x.shape, np.uint64)
    for i in range(4):
        digit = (_unsigned(selector).astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(7)
        result |= ((eight >> (digit * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * i)
    return result.astype(np.uint32).view(np.int32)


def _rounding(function: Any, name: str) -> tuple[Any, Any]:
    """A conversion of floats to integers and its type: out of range is the nearest end, NaN is 0."""
    dtype = tl.int64 if name.startswith("ll") or "2ll" in name else tl.int32
    return lambda x: formats.to_integer(function(x), formats.numpy_type(dtype)), dtype


INTEGERS: dict[str, tuple[Callable[..., np.ndarray], Any]] = {
    "popc": (lambda x: np.bitwise_count(_unsigned(x)), tl.int32),
    "clz": (_leading_zeros, tl.int32),
    "ffs": (_first_set, tl.int32),
    "brev": (_reversed_bits, None),
    "mulhi": (_high, None),
    "mul24": (lambda x, y: ((x << 8) >> 8) * ((y << 8) >> 8), None),
    "byte_perm": (_byte_perm, tl.int32),
    "sad": (lambda x, y, z: np.abs(x.astype(np.int64) - y.astype(np.int64)).astype(x.dtype) + z, None),
    "hadd": (lambda x, y: ((x.astype(object) + y.astype(object)) >> 1).astype(x.dtype), None),
    "rhadd": (lambda x, y: ((x.astype(object) + y.astype(object) + 1) >> 1).astype(x.dtype), None),
    "abs": (np.abs, None),
}
"""Functions of integers, and the type of their result: None is that of the argument."""

CONVERSIONS: dict[str, tuple[Callable[..., np.ndarray], Any]] = {
    "float_as_int": (lambda x: x.astype(np.float32).view(np.int32), tl.int32),
    "float_as_uint": (lambda x: x.astype(np.float32).view(np.uint32), tl.uint32),
    "int_as_float": (lambda x: x.astype(np.int32).view(np.float32), tl.float32),
    "uint_as_float": (lambda x: x.astype(np.uint32).view(np.float32), tl.float32),
    "double_as_longlong": (lambda x: x.astype(np.float64).view(np.int64), tl.int64),
    "longlong_as_double": (lambda x: x.astype(np.int64).view(np.float64), tl.float64),
    **{name: _rounding(np.rint, name) for name in ("llrint", "float2int_rn", "float2ll_rn", "double2int_rn")},
    **{name: _rounding(np.trunc, name) for name in ("float2int_rz", "float2ll_rz", "double2int_rz")},
    **{name: _rounding(np.floor, name) for name in ("float2int_rd", "float2ll_rd", "double2int_rd")},
    **{name: _rounding(np.ceil, name) for name in ("float2int_ru", "float2ll_ru", "double2int_ru")},
    "llround": _rounding(lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), "llround"),
}
"""Functions whose result is of another kind than their argument, with its type."""

_TO_INT32 = ("isnan", "isinf", "signbit", "finitef", "isfinited")
"""The functions that return an int in libdevice, and not a bool."""


def function(name: str) -> Callable[..., Any]:
    """The libdevice function of this name on Triton tensors. Using one that is not known raises KernelError."""
    compute = FUNCTIONS.get(name)
    if compute is None and name not in INTEGERS and name not in CONVERSIONS:
        known = ", ".join(sorted({*FUNCTIONS, *INTEGERS, *CONVERSIONS}))
        message = f"the interpreter does not know libdevice.{name}; it knows {known}"

        def unknown(*_: Any, **__: Any) -> Any:
            raise KernelError(message)

        return unknown

    def apply(*args: Any, **_: Any) -> Any:
        operands = [SEMANTIC.to_tensor(a) for a in args]
        for i, operand in enumerate(operands[1:], 1):
            operands[0], operands[i] = SEMANTIC.broadcast_impl_value(operands[0], operand)
        first = operands[0]
        if name in CONVERSIONS or (name in INTEGERS and not first.dtype.is_floating()):
            return _of_bits(*(CONVERSIONS.get(name) or INTEGERS[name]), operands)
        if compute is None:
            raise KernelError(f"libdevice.{name} takes integers, not {first.dtype}")
        for i, operand in enumerate(operands):
            if not operand.dtype.is_floating():
                operands[i] = SEMANTIC.cast(operand, tl.float32 if not first.dtype.is_floating() else first.dtype)
        dtype = operands[0].dtype
        half = dtype in formats.HALF_TYPES
        arrays = [formats.widen(o.handle.data, o.dtype) for o in operands]
        arrays = [a.astype(np.float32) if half else a for a in arrays]
        result = np.asarray(compute(*arrays))
        if name in _TO_INT32:
            data, dtype = result.astype(np.int32), tl.int32
        else:
            data = formats.narrow(result, dtype)
        return make(data, dtype, scalar=not first.type.is_block())

    return apply


def _of_bits(compute: Callable[..., np.ndarray], dtype: Any, operands: list[Any]) -> Any:
    first = operands[0]
    dtype = first.dtype if dtype is None else dtype
    arrays = [formats.widen(o.handle.data, o.dtype) for o in operands]
    data = np.asarray(compute(*arrays)).astype(formats.numpy_type(dtype), copy=False)
    return make(data, dtype, scalar=not first.type.is_block())
