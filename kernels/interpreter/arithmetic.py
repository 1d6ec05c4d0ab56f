"""Operators on the types that kernels are made of: the answers of Triton's semantic layer, without its questions.

Most operations of a kernel have two numbers of the same type, or an offset to a pointer. Their type is known from a
table, and NumPy broadcasts by itself. Everything else (other types, blocks of other ranks, mistakes) is left to Triton.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from refllm.kernels.interpreter.builder import BUILDER, Handle, Overflowed, lost, said, wrapped
from refllm.kernels.interpreter.semantic import SEMANTIC, Tensor, block, overflow_of

_INTEGERS = {("int32", "int32"): tl.int32, ("int32", "int64"): tl.int64, ("int64", "int32"): tl.int64,
             ("int64", "int64"): tl.int64}  # fmt: skip
_FLOATS = {("fp32", "fp32"): tl.float32, ("fp16", "fp16"): tl.float16}
_BITS = {(name, name): getattr(tl, name) for name in ("int1", "int32", "int64")}

_OPERATIONS: dict[str, tuple[Any, dict[tuple[str, str], Any]]] = {
    **{name: (function, _INTEGERS | _FLOATS)
       for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply))},
    **{name: (function, dict.fromkeys(_INTEGERS | _FLOATS, tl.int1))
       for name, function in (("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal),
                              ("gt", np.greater), ("ge", np.greater_equal))},
    **{name: (function, _BITS)
       for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))},
    "truediv": (np.divide, {("fp32", "fp32"): tl.float32}),
    "floordiv": (lambda left, right: (left - np.fmod(left, right)) // right, _INTEGERS),
    "mod": (np.fmod, _INTEGERS),
}  # fmt: skip
"""The operators: NumPy's form of it, and the type of the result by the names of the types of the operands."""


def quick(name: str) -> Callable[[Any, Any], Tensor | None]:
    """The operator `name` where the types leave nothing to ask: a function that returns None everywhere else."""
    if name not in _OPERATIONS:
        return lambda left, right: None
    function, table = _OPERATIONS[name]
    checks, adds = name in ("add", "sub", "mul"), name == "add"

    def operation(left: Any, right: Any) -> Tensor | None:
        if left.__class__ is not Tensor:
            if right.__class__ is not Tensor or (left := constant(left, right.dtype)) is None:
                return None
        elif right.__class__ is not Tensor and (right := constant(right, left.dtype)) is None:
            return None
        first, second = left.dtype, right.dtype
        result = table.get((first.name, second.name))
        scalar, other_is_scalar = left.type is first, right.type is second
        a, b = left.handle, right.handle
        if checks and (a.__class__ is Overflowed or b.__class__ is Overflowed):
            return overflowed(function, left, right, table)
        if not scalar and not other_is_scalar and a.data.ndim != b.data.ndim:
            return None
        try:
            if result is None:
                if not adds or first.__class__ is not tl.pointer_type or second.name not in ("int32", "int64"):
                    return None
                made, result = BUILDER.create_addptr(a, b), first
            else:
                made = Handle(function(a.data, b.data), result)
        except ValueError:  # the shapes do not fit, which Triton's layer says better
            return None
        if checks and result is tl.int32 and BUILDER.settings.overflow:
            made.span = BUILDER.span_of(a, b, name)
            if made.span is None:
                exact = function(a.data.astype(np.int64), b.data.astype(np.int64))
                made = Overflowed(made.data, exact != made.data, overflow_of(name, tl.int32), tl.int32)
        if scalar and other_is_scalar:
            return Tensor(made, result, result)
        return Tensor(made, block(result, wrapped(made).shape), result)

    return operation


def overflowed(function: Any, left: Any, right: Any, table: dict[tuple[str, str], Any]) -> Tensor | None:
    """A sum, difference or product with numbers of which some are lost already: so is what is made of them."""
    a, b = left.handle, right.handle
    scalar = left.type is left.dtype and right.type is right.dtype
    if left.dtype.__class__ is tl.pointer_type:
        made = BUILDER.create_addptr(a, b)
        return Tensor(made, block(left.dtype, () if scalar else made.wrapped.shape), left.dtype)
    dtype = table.get((left.dtype.name, right.dtype.name))
    first, second = wrapped(a), wrapped(b)
    if dtype is None or dtype.is_floating() or not (scalar or first.ndim == second.ndim):
        return None
    wide = function(first.astype(np.int64), second.astype(np.int64))
    missing = lost(a, b)
    assert missing is not None
    data = wide.astype(np.int64 if dtype is tl.int64 else np.int32)
    made = Overflowed(data, missing | (wide != data), said(a, b), dtype)
    return Tensor(made, block(dtype, () if scalar else data.shape), dtype)


_constants: dict[tuple[float, str], Tensor] = {}
_MOST_CONSTANTS = 10_000


def constant(value: Any, dtype: Any) -> Tensor | None:
    """A number beside a tensor of `dtype`, in that type; None if the type may become another, or does not hold it."""
    if value.__class__ is tl.constexpr:
        value = value.value
    kind, name = value.__class__, dtype.name
    if kind is not int and (kind is not float or name not in ("fp32", "fp16")):
        return None
    if value == 0 and math.copysign(1, value) < 0:  # -0.0 == 0, and from Triton 3.9 on they are two constants
        return None
    known = _constants.get((value, name))
    if known is not None:
        return known
    if kind is int and not (name in ("int32", "int64", "fp32", "fp16") and -(2**31) <= value < 2**31):
        return None
    made = SEMANTIC.scalar_constant(value, dtype)
    made.handle.data.flags.writeable = False  # it is shared from now on
    if len(_constants) < _MOST_CONSTANTS:
        _constants[value, name] = made
    return made
