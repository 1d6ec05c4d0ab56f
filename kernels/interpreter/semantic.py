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

from refllm.kernels.interpreter import formats
from refllm.kernels.interpreter.builder import BUILDER, Handle, through, wrapped
from refllm.kernels.interpreter.errors import IntegerOverflowError


class Tensor(tl.tensor):
    """A tensor of the language whose shape is worked out when it is asked for."""

    def __init__(self, handle: Any, type: Any, dtype: Any = None) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar if dtype is None else dtype

    @property
    def shape(self) -> Any:
        sizes = shape_of(self.type)
        known = _shapes.get(sizes)
        if known is None:
            known = _shapes[sizes] = tl.tuple([tl.constexpr(n) for n in sizes])
        return known

    @property
    def numel(self) -> Any:
        return tl.constexpr(math.prod(shape_of(self.type)))


_shapes: dict[tuple[int, ...], Any] = {}
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
    if type.__class__ is not tl.block_type:
        return ()
    try:
        return type.refllm_shape
    except AttributeError:
        type.refllm_shape = tuple(int(n) for n in type.shape)
        return type.refllm_shape


def make(data: np.ndarray, dtype: Any, scalar: bool = False) -> Tensor:
    """A tensor from an array; a scalar is an array of one number."""
    return Tensor(Handle(data, dtype), dtype if scalar else block(dtype, data.shape))


_ranges: dict[tuple[int, int], Tensor] = {}
_INTEGERS = ("int8", "int16", "int32", "int64")
_dots: dict[Any, tuple[Any, Any]] = {}
"""What `tl.dot` was asked for and Triton accepted: the type of the result, and the precision."""


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

    def arange(self, start: int, end: int, *, ret_ty: Any = None) -> Any:
        """The integers of a range; each range is made once, and never written to."""
        known = _ranges.get((start, end)) if ret_ty is None else None
        if known is None:
            known = super().arange(start, end, ret_ty=ret_ty)
            if ret_ty is None:
                known.handle.data.flags.writeable = False
                known = _ranges[start, end] = make(known.handle.data, tl.int32)
                known.handle.span = start, end - 1
        return known

    def splat(self, value: Any, shape: Any) -> Any:
        """A scalar in every place of a block: a view, which costs nothing, however large the shape."""
        if value.type.is_block() or not len(shape):
            return super().splat(value, shape)
        return self._spread(value, tuple(int(n) for n in shape))

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
        return Tensor(through(handle, lambda data: _repeated(data, shape)), block(value.dtype, shape))

    def _bool_like(self, v: Any) -> Any:
        return block(tl.int1, shape_of(v.type))

    def expand_dims(self, input: Any, axis: int) -> Any:
        """A new axis of length 1."""
        if not input.type.is_block():
            return super().expand_dims(input, axis)
        made = through(input.handle, lambda data: np.expand_dims(data, axis))
        return Tensor(made, block(input.dtype, wrapped(made).shape))

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        """A conversion. Those between standard floats need none of the questions that Triton's asks first."""
        target = dst_ty.scalar
        if input.dtype is target:
            return input
        source = input.dtype
        if fp_downcast_rounding is None:
            shape = shape_of(input.type)
            if target.name in _INTEGERS and (source.name in _INTEGERS or source.name == "int1"):
                data = input.handle.data.astype(formats.numpy_type(target))
                return Tensor(Handle(data, target), block(target, shape), target)
            if target.is_standard_floating() and (source.is_standard_floating() or source.name in _INTEGERS):
                return Tensor(BUILDER.cast_impl(input.handle, target), block(target, shape), target)
        return super().cast(input, dst_ty, fp_downcast_rounding)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Elements of `x` or of `y`."""
        numbers = isinstance(x, tl.tensor) and isinstance(y, tl.tensor) and condition.dtype is tl.int1
        if numbers and x.dtype is y.dtype and not x.dtype.is_ptr():
            shapes = [shape_of(t.type) for t in (condition, x, y)]
            known = {shape for shape in shapes if shape}
            if len(known) < 2:
                data = np.where(condition.handle.data, x.handle.data, y.handle.data)
                return Tensor(Handle(data, x.dtype), block(x.dtype, known.pop() if known else ()), x.dtype)
        return super().where(condition, x, y)

    def _load_legacy(self, ptr: Any, mask: Any, other: Any, boundary_check: Any, padding: Any, *hints: Any) -> Any:
        """A load through pointers. Where mask and `other` fit them, there is nothing to ask and nothing to spread."""
        dtype = ptr.dtype
        if dtype.is_ptr() and dtype.element_ty is not tl.int1 and not (boundary_check or padding):
            shape, element = shape_of(ptr.type), dtype.element_ty
            if mask is None and other is None:
                return Tensor(BUILDER.create_load(ptr.handle), block(element, shape), element)
            if (
                mask is not None
                and mask.dtype is tl.int1
                and _fits(mask, shape)
                and (other is None or _fits(other, shape))
            ):
                rest = None if other is None else self.cast(other, element).handle
                loaded = BUILDER.create_masked_load(ptr.handle, mask.handle, rest)
                return Tensor(loaded, block(element, shape), element)
        return super()._load_legacy(ptr, mask, other, boundary_check, padding, *hints)

    def _store_legacy(self, ptr: Any, val: Any, mask: Any, boundary_check: Any, *hints: Any) -> Any:
        """A store through pointers; see `_load_legacy`."""
        dtype = ptr.dtype
        if dtype.is_ptr() and dtype.element_ty is not tl.int1 and not boundary_check:
            shape = shape_of(ptr.type)
            if _fits(val, shape) and (mask is None or (mask.dtype is tl.int1 and _fits(mask, shape))):
                value = self.cast(val, dtype.element_ty)
                BUILDER.create_masked_store(ptr.handle, value.handle, None if mask is None else mask.handle)
                return Tensor(None, tl.void, tl.void)
        return super()._store_legacy(ptr, val, mask, boundary_check, *hints)

    def dot(
        self, lhs: Any, rhs: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any, out_dtype: Any
    ) -> Any:
        """A product. What Triton has accepted once, of the same types and shapes, is not examined again."""
        of_acc = None if acc is None else (acc.dtype, shape_of(acc.type))
        key = (lhs.dtype, shape_of(lhs.type), rhs.dtype, shape_of(rhs.type), of_acc, input_precision,
               max_num_imprecise_acc, out_dtype)  # fmt: skip
        known = _dots.get(key)
        if known is None:
            result = super().dot(lhs, rhs, acc, input_precision, max_num_imprecise_acc, out_dtype)
            asked = self.builder.options.default_dot_input_precision if input_precision is None else input_precision
            if result.dtype is tl.float32 and not lhs.dtype.is_fp8():
                _dots[key] = block(tl.float32, shape_of(result.type)), self._str_to_dot_input_precision(asked)
            return result
        type, precision = known
        start = _ZERO if acc is None else acc.handle
        return Tensor(BUILDER.create_dot(lhs.handle, rhs.handle, start, precision, 0), type, tl.float32)

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        """Raises IntegerOverflowError if an operation on integers leaves their type. Triton's own takes nine more."""
        if not BUILDER.settings.overflow or lhs.dtype.int_bitwidth >= 64 or lhs.handle.data.dtype == np.bool_:
            return
        if lhs.dtype.is_int_unsigned():  # it wraps, by its definition
            return
        if BUILDER.span_of(lhs.handle, rhs.handle, binary_op.__name__) is None:
            raise IntegerOverflowError(overflow_of(binary_op.__name__, lhs.dtype))


def overflow_of(name: str, dtype: Any) -> str:
    """What is said of an operation whose result is outside of its type."""
    return f"{_WORDS[name]} leaves the range of {dtype}; widen an operand with .to(tl.int64)"


def _fits(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a scalar or a block goes with pointers of that shape as it is, or along axes where it has length 1."""
    own = shape_of(value.type)
    return (
        own == shape
        or not own
        or (len(own) == len(shape) and all(n in (1, wanted) for n, wanted in zip(own, shape, strict=True)))
    )


_ZERO = Handle(np.zeros(1, np.float32), tl.float32)


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
