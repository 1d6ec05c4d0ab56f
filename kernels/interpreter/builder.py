"""Triton's NumPy builder, with its numerics repaired.

The builder computes one operation of the language on arrays. Repaired here, because Triton's own computes it wrongly,
slowly or not at all: bfloat16 and 8-bit floats, conversions, dot, atomics, loads and stores, NaN in max and min.
"""

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle

from refllm.kernels.interpreter import assembly, compatibility, formats, scaled
from refllm.kernels.interpreter.errors import DeviceAssertionError, IntegerOverflowError, KernelError
from refllm.kernels.interpreter.memory import Argument, Memory
from refllm.kernels.interpreter.settings import Settings

ORIGIN = "refllm.origin"
"""The attribute of a handle that names the argument a pointer came from."""

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

_ATOMICS: dict[Any, Any] = {
    ir.ATOMIC_OP.ADD: np.add,
    ir.ATOMIC_OP.FADD: np.add,
    ir.ATOMIC_OP.MIN: np.minimum,
    ir.ATOMIC_OP.UMIN: np.minimum,
    ir.ATOMIC_OP.MAX: np.maximum,
    ir.ATOMIC_OP.UMAX: np.maximum,
    ir.ATOMIC_OP.AND: np.bitwise_and,
    ir.ATOMIC_OP.OR: np.bitwise_or,
    ir.ATOMIC_OP.XOR: np.bitwise_xor,
    ir.ATOMIC_OP.XCHG: lambda old, new: new,
    None: lambda old, new: old,
}
"""What each atomic operation makes of the old number and the operand; None is a load."""


class Handle(TensorHandle):
    """An array with a Triton type. As Triton's, without the check that one fits the other."""

    span: tuple[int, int] | None = None
    """Numbers between which all integers of the array lie, where somebody has worked them out."""

    def __init__(self, data: np.ndarray, dtype: Any, attr: dict[str, Any] | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


class Overflowed(Handle):
    """Integers of which some left their type, or pointers made of them: an error, unless no such lane is used.

    Whatever is not prepared for it asks for `data`, and that raises. wrapped: what the GPU computes. lost: where, bool.
    said: the error.
    """

    def __init__(self, wrapped: np.ndarray, lost: np.ndarray, said: str, dtype: Any, attr: Any = None) -> None:
        self.wrapped, self.said, self.dtype, self.attr = wrapped, said, dtype, {} if attr is None else attr
        self.lost = np.broadcast_to(lost, wrapped.shape)

    @property
    def data(self) -> np.ndarray:  # type: ignore[override]
        """Raises IntegerOverflowError."""
        raise IntegerOverflowError(self.said)

    def seen(self, view: Any) -> "Overflowed":
        """The same through a view: a function of an array."""
        return Overflowed(view(self.wrapped), view(self.lost), self.said, self.dtype, self.attr)

    def used(self, mask: np.ndarray | None) -> Handle:
        """The pointers, where no active lane lost its number. Raises IntegerOverflowError otherwise."""
        lost = self.lost if mask is None else self.lost & mask
        if lost.any():
            raise IntegerOverflowError(self.said)
        return Handle(self.wrapped, self.dtype, self.attr)


def wrapped(handle: TensorHandle) -> np.ndarray:
    """The numbers as the GPU has them, whether some left their type or not."""
    return handle.wrapped if handle.__class__ is Overflowed else handle.data


def lost(*handles: TensorHandle) -> np.ndarray | None:
    """Where one of the numbers left its type; None if none did."""
    found: np.ndarray | None = None
    for handle in handles:
        if handle.__class__ is Overflowed:
            found = handle.lost if found is None else found | handle.lost
    return found


def said(*handles: TensorHandle) -> str:
    """The error of the first of them that has one."""
    return next(h.said for h in handles if h.__class__ is Overflowed)


def through(handle: TensorHandle, view: Any) -> TensorHandle:
    """A view of a handle, of what points and what does not: a function of an array that moves and repeats elements."""
    if handle.__class__ is Overflowed:
        return handle.seen(view)
    return Handle(view(handle.data), handle.dtype.scalar, handle.attr)


def _data(handle: TensorHandle) -> np.ndarray:
    return formats.widen(handle.data, handle.dtype)


def _handle(values: np.ndarray, dtype: Any) -> TensorHandle:
    """The result of an operation, in the type that it has on the GPU."""
    values = np.asarray(values)
    if values.dtype == np.bool_:
        return Handle(values, tl.int1)
    if dtype.is_ptr() or not dtype.is_floating():
        return Handle(values.astype(formats.numpy_type(dtype), copy=False), dtype)
    return Handle(formats.narrow(values, dtype), dtype)


@dataclasses.dataclass(frozen=True)
class Options(InterpreterOptions):
    """Triton's, with what a kernel may ask of its launch."""

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 3


class Builder(InterpreterBuilder):
    """The operations of the language on arrays, for the launch in `memory`."""

    def __init__(self) -> None:
        super().__init__()
        self.codegen_fns["min_dot_size"] = compatibility.smallest_dot()
        precisions = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
        self.options = Options(debug=True, allowed_dot_input_precisions=precisions)
        self.memory: Memory | None = None
        self.block_type: Any = tl.block_type  # semantic.py puts its own here, which remembers
        self.grid_idx: tuple[int, ...] = (0, 0, 0)
        self.grid_dim = (1, 1, 1)

    @property
    def settings(self) -> Settings:
        """Those of the launch that runs."""
        assert self.memory is not None
        return self.memory.settings

    def get_block_ty(self, dtype: Any, shape: Any) -> Any:
        return self.block_type(dtype, [int(n) for n in shape])

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        dtype = lhs.dtype.scalar
        if op in _BITWISE or not formats.is_emulated(dtype):
            return _handle(op(lhs.data, rhs.data), dtype)
        return _handle(op(_data(lhs), _data(rhs)), dtype)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        return _handle(op(_data(arg)), arg.dtype.scalar)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        if op is np.where:
            return Handle(np.where(lhs.data, rhs.data, other.data), other.dtype.scalar)
        return _handle(op(_data(lhs), _data(rhs), _data(other)), other.dtype.scalar)

    # The instructions behind tl.maximum and tl.minimum drop NaN; those that keep it are asked for by name.
    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans: Any) -> TensorHandle:
        if propagate_nans == ir.PROPAGATE_NAN.ALL:
            return self.ternary_op(arg, lo, hi, lambda x, a, b: np.minimum(np.maximum(x, a), b))
        return self.ternary_op(arg, lo, hi, lambda x, a, b: np.fmin(np.fmax(x, a), b))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        # The product of two float32 is exact in float64: one rounding to float64, one to the result.
        wide = [_data(a).astype(np.float64) for a in (x, y, z)]
        return _handle(wide[0] * wide[1] + wide[2], z.dtype.scalar)

    def create_fabs(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, np.abs)

    def create_erf(self, arg: TensorHandle) -> TensorHandle:
        from refllm.kernels.interpreter import libdevice

        return self.unary_op(arg, libdevice.FUNCTIONS["erf"])

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        from refllm.kernels.interpreter import libdevice

        return self.unary_op(arg, libdevice.FUNCTIONS["rsqrt"])

    def create_ashr(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        signed = np.dtype(f"i{lhs.data.dtype.itemsize}")
        return Handle(np.right_shift(lhs.data.view(signed), rhs.data.astype(signed)), lhs.dtype.scalar)

    def create_idiv(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        remainder = np.fmod(lhs.data, rhs.data)
        return Handle((lhs.data - remainder) // rhs.data, lhs.dtype.scalar)

    def span_of(self, lhs: TensorHandle, rhs: TensorHandle, operation: str) -> tuple[int, int] | None:
        """Where the sum, difference or product of two integer arrays lies; None if it leaves their type.

        The span of a result follows from those of its operands, so that few arrays are ever searched for their ends.
        """
        limits = np.iinfo(lhs.data.dtype)
        span = _reached(_span(lhs), _span(rhs), operation)
        if limits.min <= span[0] and span[1] <= limits.max:
            return span
        # Spans are wider than what is there: the arrays themselves decide.
        op = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation]
        exact = op(lhs.data, rhs.data, dtype=np.int64)
        span = _ends(exact)
        return span if limits.min <= span[0] and span[1] <= limits.max else None

    # -- constants -------------------------------------------------------------------------------------------------

    def get_bf16(self, value: float) -> TensorHandle:
        return _handle(np.array([value], np.float32), tl.bfloat16)

    def get_null_value(self, type: Any) -> TensorHandle:
        return Handle(np.zeros(1, formats.numpy_type(type)), type.scalar)

    # -- conversions -----------------------------------------------------------------------------------------------

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        dst = dst_type.scalar
        values = _data(src)
        if dst.is_floating():
            return Handle(formats.narrow(values, dst), dst)
        target = formats.numpy_type(dst)
        if values.dtype.kind == "f" and target.kind in "iu":
            return Handle(formats.to_integer(values, target), dst)
        return Handle(values.astype(target, copy=False), dst)

    def create_int_cast(self, src: TensorHandle, dst_type: Any, is_signed: bool) -> TensorHandle:
        data = src.data
        if not is_signed and data.dtype.kind == "i":
            data = data.view(np.dtype(f"u{data.dtype.itemsize}"))
        return Handle(data.astype(formats.numpy_type(dst_type), copy=False), dst_type.scalar)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        dst = dst_type.scalar
        if tl.float8e4b15 in (src.dtype.scalar, dst):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            return Handle(formats.narrow_towards_zero(_data(src), dst), dst)
        return self.cast_impl(src, dst)

    def create_bitcast(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        data = np.ascontiguousarray(src.data).view(formats.numpy_type(dst_type))
        return _from(src, data, dst_type.scalar)

    create_int_to_ptr = create_bitcast
    create_ptr_to_int = create_bitcast

    # -- products --------------------------------------------------------------------------------------------------

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, max_num_imprecise_acc: int
    ) -> TensorHandle:
        left, right, start = _data(a), _data(b), _data(d)
        if start.dtype.kind in "iu":
            return _handle(_matmul(left.astype(np.int32), right.astype(np.int32)) + start, d.dtype.scalar)
        if start.dtype == np.float64:
            return _handle(_matmul(left, right) + start, d.dtype.scalar)
        left, right = left.astype(np.float32, copy=False), right.astype(np.float32, copy=False)
        if self.settings.tf32 and a.dtype.scalar == tl.float32:
            product = _product_of_float32(left, right, input_precision)
        else:
            product = _matmul(left, right)
        return _handle(product + start.astype(np.float32, copy=False), d.dtype.scalar)

    def create_dot_scaled(
        self,
        lhs: TensorHandle,
        lhs_scale: TensorHandle | None,
        lhs_format: Any,
        rhs: TensorHandle,
        rhs_scale: TensorHandle | None,
        rhs_format: Any,
        fast_math: bool,
        lhs_k_pack: bool,
        rhs_k_pack: bool,
        acc: TensorHandle,
    ) -> TensorHandle:
        def numbers(values: TensorHandle, scale: TensorHandle | None, kind: Any, axis: int, packed: bool) -> np.ndarray:
            factors, name = (None, "") if scale is None else (scale.data, scale.dtype.scalar.name)
            return scaled.operand(values.data, factors, name, kind, axis, packed)

        left = numbers(lhs, lhs_scale, lhs_format, -1, lhs_k_pack)
        right = numbers(rhs, rhs_scale, rhs_format, -2, rhs_k_pack)
        return _handle(_matmul(left, right) + _data(acc).astype(np.float32, copy=False), acc.dtype.scalar)

    # -- pointers --------------------------------------------------------------------------------------------------

    def create_addptr(self, ptr: TensorHandle, offset: TensorHandle) -> TensorHandle:
        width = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        steps = np.multiply(wrapped(offset), width, dtype=np.int64, casting="unsafe")
        address, missing = wrapped(ptr) + steps.view(np.uint64), lost(ptr, offset)
        if missing is not None:
            return Overflowed(address, missing, said(ptr, offset), ptr.dtype, ptr.attr)
        return Handle(address, ptr.dtype, ptr.attr)

    def create_splat(self, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
        return through(arg, lambda data: np.full(ret_ty.shape, data.reshape(-1)[0], data.dtype))

    def create_broadcast(self, arg: TensorHandle, shape: Any) -> TensorHandle:
        return through(arg, lambda data: np.broadcast_to(data, shape))

    def create_expand_dims(self, arg: TensorHandle, axis: int) -> TensorHandle:
        return through(arg, lambda data: np.expand_dims(data, axis))

    def create_reshape(self, arg: TensorHandle, shape: Any, allow_reorder: bool) -> TensorHandle:
        return through(arg, lambda data: data.reshape(shape))

    def create_trans(self, arg: TensorHandle, perm: Any) -> TensorHandle:
        return through(arg, lambda data: np.transpose(data, perm))

    def create_select(self, cond: TensorHandle, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        result = np.where(cond.data, lhs.data, rhs.data)
        same = lhs.attr.get(ORIGIN) is rhs.attr.get(ORIGIN)
        return _from(lhs, result, lhs.dtype.scalar) if same else Handle(result, lhs.dtype.scalar)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _access(self, what: str, ptrs: TensorHandle, mask: Any) -> Any:
        assert self.memory is not None
        if mask is not None:
            mask = _mask(mask, ptrs.data.shape)
        dtype = formats.numpy_type(ptrs.get_element_ty())
        return self.memory.access(what, ptrs.data, mask, dtype, ptrs.attr.get(ORIGIN)), mask

    # Hints on caching are ignored; their number differs between the versions of Triton.
    def create_load(self, ptr: TensorHandle, *_: Any) -> TensorHandle:
        return self.create_masked_load(ptr, None, None)

    def create_masked_load(self, ptrs: TensorHandle, mask: Any, other: Any, *_: Any, **__: Any) -> TensorHandle:
        assert self.memory is not None
        ptrs = _used(ptrs, mask)
        access, mask = self._access("tl.load", ptrs, mask)
        dtype = ptrs.get_element_ty()
        if mask is None:
            return Handle(self.memory.load(access).reshape(ptrs.data.shape), dtype)
        if other is not None:
            result = np.empty(ptrs.data.shape, other.data.dtype)
            result[...] = other.data
        else:
            result = self._undefined(ptrs.data.shape, dtype)
            if access is not None and not mask.all():
                self.memory.masked_off(access)
        if access is not None:
            result[mask] = self.memory.load(access)
        return Handle(result, dtype)

    def _undefined(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Lanes masked off without `other` are undefined: NaN shows if a result depends on them."""
        if self.settings.poison and self.settings.masked == "nan" and dtype.is_floating():
            return formats.narrow(np.full(shape, np.nan, np.float32), dtype)
        return np.zeros(shape, formats.numpy_type(dtype))

    def create_store(self, ptr: TensorHandle, val: TensorHandle, *_: Any) -> None:
        self.create_masked_store(ptr, val, None)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *_: Any, **__: Any) -> None:
        assert self.memory is not None
        ptrs = _used(ptrs, mask)
        access, mask = self._access("tl.store", ptrs, mask)
        if access is None:
            return
        values = value.data
        if values.shape != ptrs.data.shape:
            values = np.broadcast_to(values, ptrs.data.shape)
        values = values.ravel() if mask is None else values[mask]
        self.memory.store(access, values.astype(access.array.dtype, copy=False))

    def create_atomic_rmw(
        self, rmwOp: Any, ptr: TensorHandle, val: TensorHandle, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        assert self.memory is not None
        ptr = _used(ptr, mask)
        access, active = self._access("an atomic", ptr, mask)
        old = np.zeros(ptr.data.shape, val.data.dtype)
        if access is None:
            return Handle(old, val.dtype.scalar)
        if rmwOp != ir.ATOMIC_OP.XCHG:
            self.memory.must_be_written(access, "an atomic")
        if access.index.size == 1:
            self.memory.synchronize(access.argument.storage.base + int(access.index[0]) * val.data.dtype.itemsize)
        dtype, op = val.dtype.scalar, _ATOMICS[rmwOp]
        values = np.broadcast_to(val.data, ptr.data.shape)
        values = values.ravel() if active is None else values[active]
        array = access.array.view(val.data.dtype)

        def update(where: Any, operand: np.ndarray) -> np.ndarray:
            before = array[where]
            result = op(formats.widen(before, dtype), formats.widen(operand, dtype))
            array[where] = formats.narrow(result, dtype) if dtype.is_floating() else result
            return before

        if access.ascending or np.unique(access.index).size == access.index.size:
            before = update(access.index, values)
        else:  # lanes that meet at one address take turns
            before = np.concatenate([update(access.index[i : i + 1], values[i : i + 1]) for i in range(values.size)])
        if access.index.size == 1 and before.tobytes() == array[access.index].tobytes():
            self.memory.polled(access)
        old[... if active is None else active] = before.reshape(ptr.data.shape) if active is None else before
        return Handle(old, dtype)

    def create_atomic_cas(
        self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        assert self.memory is not None
        ptr = _used(ptr, None)
        access, _ = self._access("an atomic", ptr, None)
        self.memory.must_be_written(access, "an atomic")
        if access.index.size == 1:
            self.memory.synchronize(access.argument.storage.base + int(access.index[0]) * val.data.dtype.itemsize)
        array, shape = access.array.view(val.data.dtype), ptr.data.shape
        expected, new = (np.broadcast_to(h.data, shape).ravel() for h in (cmp, val))
        old = np.empty(expected.size, val.data.dtype)
        for lane, at in enumerate(access.index):
            old[lane] = array[at]
            if old[lane] == expected[lane]:
                array[at] = new[lane]
        if access.index.size == 1 and old[0] == array[access.index[0]]:
            self.memory.polled(access)
        return Handle(old.reshape(shape), cmp.dtype.scalar)

    # Triton 3.9 has loads and stores that are atomic, and a wait for a value.
    def create_atomic_load(self, ptr: TensorHandle, mask: Any, sem: Any, scope: Any) -> TensorHandle:
        nothing = Handle(np.zeros(1, formats.numpy_type(ptr.get_element_ty())), ptr.get_element_ty())
        return self.create_atomic_rmw(None, ptr, nothing, mask, sem, scope)

    def create_atomic_store(self, ptr: TensorHandle, val: TensorHandle, mask: Any, sem: Any, scope: Any) -> None:
        self.create_atomic_rmw(ir.ATOMIC_OP.XCHG, ptr, val, mask, sem, scope)

    def create_atomic_poll(self, ptr: TensorHandle, expected: TensorHandle, timeout: Any, *hints: Any) -> TensorHandle:
        found = self.create_atomic_load(ptr, None, None, None).data == expected.data
        if not found.all() and not isinstance(timeout, TensorHandle):  # nobody else runs meanwhile
            assert self.memory is not None
            access, _ = self._access("an atomic", ptr, None)
            self.memory.waits(access, int(access.index[np.argmin(found)]))
        return Handle(found, tl.int1)

    def create_grid_dependency_wait(self) -> None:
        """Returns at once: the grid before has ended."""

    def create_grid_dependency_launch_dependents(self) -> None:
        """Does nothing: the next grid begins when this one has ended."""

    # -- the rest --------------------------------------------------------------------------------------------------

    def create_histogram(self, data: TensorHandle, bins: int, mask: Any) -> TensorHandle:
        values = data.data if mask is None else data.data[mask.data.astype(bool)]
        values = values[(values >= 0) & (values < bins)]
        return Handle(np.bincount(values.ravel().astype(np.int64), minlength=bins).astype(np.int32), tl.int32)

    def create_assert(self, condition: TensorHandle, message: str, *_: Any) -> None:
        if not condition.data.all():
            raise DeviceAssertionError(f"the assertion failed: {message}")

    def create_assume(self, condition: TensorHandle) -> None:
        if not condition.data.all():
            raise DeviceAssertionError("tl.assume of something that is false")

    def create_extern_elementwise(self, *args: Any) -> TensorHandle:
        raise KernelError(f"the interpreter cannot run the external function {args[2] if len(args) > 2 else args}")

    def create_inline_asm(self, text: str, constraints: str, values: Any, types: Any, *_: Any) -> "Results":
        assert self.memory is not None
        arrays = assembly.run(text, self.memory.program, self.options.num_warps, values, types)
        return Results([Handle(array, t.scalar) for array, t in zip(arrays, types, strict=True)])

    def create_descriptor_reduce(self, kind: Any, desc: Any, value: TensorHandle, indices: Any) -> None:
        ptrs, mask = desc.materialize_pointers(indices)
        dtype = value.dtype.scalar
        floats = kind.name == "ADD" and dtype.is_floating()
        signed = "U" if kind.name in ("MIN", "MAX") and not dtype.is_floating() and dtype.is_int_unsigned() else ""
        operation = getattr(ir.ATOMIC_OP, "FADD" if floats else f"{signed}{kind.name}")
        pointers = Handle(ptrs.data, ptrs.dtype, desc.base.attr)
        used = mask if isinstance(mask, TensorHandle) else Handle(mask, tl.int1)  # an array before 3.8
        self.create_atomic_rmw(operation, pointers, value, used, None, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("create_"):
            raise KernelError(f"the interpreter has no operation {name.removeprefix('create_')}")
        raise AttributeError(name)


class Results:
    """What an operation with several results returns."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def get_result(self, i: int) -> Handle:
        """The i-th of them."""
        return self._handles[i]


def _mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.asarray(mask.data if isinstance(mask, TensorHandle) else mask, bool)
    return mask if mask.shape == shape else np.broadcast_to(mask, shape)


def _used(ptrs: TensorHandle, mask: Any) -> TensorHandle:
    """Pointers, where all that are used were computed within their types. Raises IntegerOverflowError otherwise."""
    if ptrs.__class__ is not Overflowed:
        return ptrs
    return ptrs.used(None if mask is None else _mask(mask, ptrs.wrapped.shape))


def _from(handle: TensorHandle, data: np.ndarray, dtype: Any) -> TensorHandle:
    """A handle that, if it is a pointer, points into the same argument as `handle` does."""
    return Handle(data, dtype, handle.attr)


def pointer(address: int, dtype: Any, origin: Argument) -> TensorHandle:
    """A pointer to an argument of the kernel."""
    return Handle(np.array([address], np.uint64), dtype, {ORIGIN: origin})


def _span(handle: TensorHandle) -> tuple[int, int]:
    known = getattr(handle, "span", None)
    if known is None:
        known = handle.span = _ends(handle.data)
    return known


def _ends(data: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest of some integers."""
    if data.size == 1:
        return (data.item(),) * 2
    return int(np.minimum.reduce(data, None)), int(np.maximum.reduce(data, None))


def _reached(left: tuple[int, int], right: tuple[int, int], operation: str) -> tuple[int, int]:
    (a, b), (c, d) = left, right
    if operation == "add":
        return a + c, b + d
    if operation == "sub":
        return a - d, b - c
    ends = (a * c, a * d, b * c, b * d)
    return min(ends), max(ends)


def _matmul(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right, [..., M, K] x [..., K, N], every element summed over k in the one order 0, 1, 2, ...

    So an element is the same in whatever row or column of a tile it stands, as on a GPU. Not np.matmul: its BLAS adds
    in an order that depends on the place in the tile, on the layout, and on which of its kernels suits the processor.
    """
    # einsum takes the order of its loops from the strides; of dense operands the innermost one is over N.
    return np.einsum("...mk,...kn->...mn", np.ascontiguousarray(left), np.ascontiguousarray(right))


def _product_of_float32(left: np.ndarray, right: np.ndarray, precision: Any) -> np.ndarray:
    """tl.dot of float32: exact products, or those of the narrower operands that the tensor cores are given."""
    if precision == ir.INPUT_PRECISION.TF32:
        return _matmul(formats.truncate_tf32(left), formats.truncate_tf32(right))
    if precision not in _SPLITS:
        return _matmul(left, right)
    rounding, parts, reach = _SPLITS[precision]
    lefts, rights = (_split(x, rounding, parts) for x in (left, right))
    product = np.zeros(1, np.float32)
    for order in range(reach, 0, -1):  # the smallest products first
        for i in range(order + 1):
            if i < parts and order - i < parts:
                product = product + _matmul(lefts[i], rights[order - i])
    # An infinity times the rest 0 of a number is NaN; Triton drops it (F32DotTC.cpp, replaceNansWithZeros).
    return np.where(np.isnan(product), 0, product) + _matmul(lefts[0], rights[0])


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    return formats.widen(formats.narrow(values, tl.bfloat16), tl.bfloat16)


_SPLITS = {
    ir.INPUT_PRECISION.TF32x3: (formats.round_tf32, 2, 1),
    ir.INPUT_PRECISION.BF16x3: (_to_bfloat16, 2, 1),
    ir.INPUT_PRECISION.BF16x6: (_to_bfloat16, 3, 2),
}
"""Each precision's rounding, into how many parts an operand is split, and which parts meet: i + j up to the last."""


def _split(values: np.ndarray, rounding: Any, parts: int) -> list[np.ndarray]:
    """A number as a sum of rounded parts; those behind an infinity or NaN are 0."""
    result = []
    for _ in range(parts):
        part = rounding(values)
        result.append(part)
        values = np.where(np.isfinite(part), values - np.where(np.isfinite(part), part, 0), 0).astype(np.float32)
    return result


BUILDER = Builder()
