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

_TO_INT32 = ("isnan", "isinf", "signbit", "finitef", "isfinited")
"""The functions that return an int in libdevice, and not a bool."""


def function(name: str) -> Callable[..., Any]:
    """The libdevice function of this name on Triton tensors. Using one that is not known raises KernelError."""
    compute = FUNCTIONS.get(name)
    if compute is None:
        message = f"the interpreter does not know libdevice.{name}; it knows {', '.join(sorted(FUNCTIONS))}"

        def unknown(*_: Any, **__: Any) -> Any:
            raise KernelError(message)

        return unknown

    def apply(*args: Any, **_: Any) -> Any:
        operands = [SEMANTIC.to_tensor(a) for a in args]
        for i, operand in enumerate(operands[1:], 1):
            operands[0], operands[i] = SEMANTIC.broadcast_impl_value(operands[0], operand)
        first = operands[0]
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
