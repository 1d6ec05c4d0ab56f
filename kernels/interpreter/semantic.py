"""Triton's semantic layer (types, promotion, broadcasting) on the NumPy builder, with its costly parts remembered.

Triton describes a block's type with an object that takes longer to build than NumPy takes to add two blocks. Here a
type is built once per element type and shape, and operands that already agree are not converted and broadcast again.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic

from refllm.kernels.interpreter.builder import BUILDER, Handle
from refllm.kernels.interpreter.errors import IntegerOverflowError


class Tensor(tl.tensor):
    """A tensor of the language whose shape is worked out when it is asked for."""

    def __init__(self, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar

    @property
    def shape(self) -> Any:
        sizes = self.type.shape if self.type.is_block() else ()
        return tl.tuple([tl.constexpr(n) for n in sizes])

    @property
    def numel(self) -> Any:
        return tl.constexpr(math.prod(shape_of(self.type)))


_blocks: dict[tuple[int, tuple[int, ...]], tuple[Any, Any]] = {}


def block(dtype: Any, shape: Sequence[int]) -> Any:
    """The type of a block, built once. () is a scalar."""
    if not shape:
        return dtype
    key = id(dtype), tuple(shape)
    known = _blocks.get(key)
    if known is None:
        made = tl.block_type(dtype, list(key[1]))
        made.refllm_shape = key[1]
        known = _blocks[key] = dtype, made  # with dtype, whose id must not be used again
    return known[1]


def shape_of(type: Any) -> tuple[int, ...]:
    """The shape of a type as plain integers; () of a scalar."""
    if not isinstance(type, tl.block_type):
        return ()
    try:
        return type.refllm_shape
    except AttributeError:
        type.refllm_shape = tuple(int(n) for n in type.shape)
        return type.refllm_shape


def make(data: np.ndarray, dtype: Any, scalar: bool = False) -> Tensor:
    """A tensor from an array; a scalar is an array of one number."""
    return Tensor(Handle(data, dtype), dtype if scalar else block(dtype, data.shape))


class Semantic(TritonSemantic):
    """Triton's semantic layer for `BUILDER`."""

    tensor = Tensor

    def to_tensor(self, x: Any, check_type: bool = True) -> Any:
        """A number as a scalar; a tensor as it is (the functions of tl.math make plain ones)."""
        return x if isinstance(x, tl.tensor) else super().to_tensor(x, check_type)

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Converts two operands to their common type and shape."""
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            left, right = lhs.dtype, rhs.dtype
            if left.is_ptr():
                # Only an addition or subtraction allows a pointer, and says so with the first argument.
                if args and args[0] and right.is_int():
                    return self.broadcast_impl_value(lhs, rhs)
            elif left is right:
                # Division of 16-bit floats is done in float32; it is asked for with the last argument.
                divides = kwargs.get("div_or_mod") or len(args) > 3
                if not divides or left.primitive_bitwidth > 16 or left.is_int():
                    return self.broadcast_impl_value(lhs, rhs)
        return super().binary_op_type_checking_impl(lhs, rhs, *args, **kwargs)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        """Brings two operands to their common shape. Two scalars stay scalars."""
        left, right = shape_of(lhs.type), shape_of(rhs.type)
        if left == right:
            return lhs, rhs
        if not left:
            return self._spread(lhs, right), rhs
        if not right:
            return lhs, self._spread(rhs, left)
        if len(left) != len(right):
            return super().broadcast_impl_value(lhs, rhs)
        shape = []
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            if a != b and a != 1 and b != 1:
                raise ValueError(f"blocks of shape {list(left)} and {list(right)} do not fit together along axis {i}")
            shape.append(max(a, b))
        whole = tuple(shape)
        return (lhs if left == whole else self._spread(lhs, whole)), (
            rhs if right == whole else self._spread(rhs, whole)
        )

    def _spread(self, value: Any, shape: tuple[int, ...]) -> Tensor:
        handle = value.handle
        # The view costs nothing, however large the shape.
        spread = Handle(_repeated(handle.data, shape), handle.dtype.scalar, handle.attr)
        return Tensor(spread, block(value.dtype, shape))

    def _bool_like(self, v: Any) -> Any:
        return block(tl.int1, shape_of(v.type))

    def expand_dims(self, input: Any, axis: int) -> Any:
        """A new axis of length 1."""
        if not input.type.is_block():
            return super().expand_dims(input, axis)
        handle = input.handle
        data = np.expand_dims(handle.data, axis)
        return Tensor(Handle(data, handle.dtype.scalar, handle.attr), block(input.dtype, data.shape))

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        """A conversion. Those between standard floats need none of the questions that Triton's asks first."""
        target = dst_ty.scalar
        if input.dtype is target:
            return input
        standard = input.dtype.is_standard_floating() and target.is_standard_floating()
        if not standard or fp_downcast_rounding is not None:
            return super().cast(input, dst_ty, fp_downcast_rounding)
        return Tensor(BUILDER.cast_impl(input.handle, target), block(target, shape_of(input.type)))

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        """Raises IntegerOverflowError if an operation on integers leaves their type. Triton's own takes nine more."""
        if not BUILDER.settings.overflow or lhs.dtype.int_bitwidth >= 64 or lhs.handle.data.dtype == np.bool_:
            return
        name = binary_op.__name__
        if BUILDER.overflows(lhs.handle.data, rhs.handle.data, name):
            raise IntegerOverflowError(
                f"{_WORDS[name]} leaves the range of {lhs.dtype}; widen an operand with .to(tl.int64)"
            )


def _repeated(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`np.broadcast_to`, for a shape that fits, without its general machinery: it takes longer than most operations."""
    if data.size == 1:
        return np.ndarray(shape, data.dtype, data, 0, (0,) * len(shape))
    if data.ndim != len(shape) or not data.flags.c_contiguous:
        return np.broadcast_to(data, shape)
    steps = tuple(0 if n == 1 else step for n, step in zip(data.shape, data.strides, strict=True))
    return np.ndarray(shape, data.dtype, data, 0, steps)


_WORDS = {"add": "an addition", "sub": "a subtraction", "mul": "a multiplication"}

SEMANTIC = Semantic(BUILDER)
BUILDER.block_type = block
