"""What the operators, calls and conditions of a rewritten kernel do.

Each function here stands for one construct of the language and follows the compiler (triton/compiler/
code_generator.py, `visit_*`): tensors go to Triton's own semantic layer on top of the NumPy builder, everything else is
arithmetic at compile time. Nothing in the Triton language is patched.
"""

import builtins
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.jit import JITFunction

from refllm.kernels.interpreter import compatibility, formats, libdevice, reduction
from refllm.kernels.interpreter.arithmetic import quick
from refllm.kernels.interpreter.builder import through, wrapped
from refllm.kernels.interpreter.errors import AmbiguousError, DeviceAssertionError, KernelError, StaticAssertionError
from refllm.kernels.interpreter.semantic import SEMANTIC, Tensor, block, make

CHAINED_COMPARISONS = compatibility.CHAINED_COMPARISONS
"""Whether the compiler of this version accepts a < b < c."""

tensor = tl.tensor
constexpr = tl.constexpr


def unwrap(value: Any) -> Any:
    """The value inside a tl.constexpr; anything else as it is."""
    return value.value if isinstance(value, constexpr) else value


# -- operators ---------------------------------------------------------------------------------------------------------


def _bare(function: Any) -> Any:
    """A builtin of the language without the wrapper that only checks that `_semantic` was passed."""
    return getattr(function, "__wrapped__", function)


def _binary(name: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    forward, backward = (_bare(getattr(tensor, f"__{side}{name}__", None)) for side in ("", "r"))
    quickly = quick(name)

    def operation(left: Any, right: Any) -> Any:
        if (result := quickly(left, right)) is not None:
            return result
        if isinstance(left, tensor):
            if forward is None:
                raise KernelError(f"Triton's tensors have no operator `{name}`")
            return forward(left, right, _semantic=SEMANTIC)
        if isinstance(right, tensor):
            if backward is None:
                raise KernelError(f"Triton's tensors have no operator `{name}`")
            return backward(right, left, _semantic=SEMANTIC)
        return plain(left, right)

    operation.__name__ = operation.__qualname__ = name
    return operation


add, sub, mul = _binary("add", operator.add), _binary("sub", operator.sub), _binary("mul", operator.mul)
truediv, floordiv = _binary("truediv", operator.truediv), _binary("floordiv", operator.floordiv)
mod, pow = _binary("mod", operator.mod), _binary("pow", operator.pow)
lshift, rshift = _binary("lshift", operator.lshift), _binary("rshift", operator.rshift)
and_, or_, xor = _binary("and", operator.and_), _binary("or", operator.or_), _binary("xor", operator.xor)
eq, ne = _binary("eq", operator.eq), _binary("ne", operator.ne)
lt, le, gt, ge = (
    _binary("lt", operator.lt),
    _binary("le", operator.le),
    _binary("gt", operator.gt),
    _binary("ge", operator.ge),
)


def is_(left: Any, right: Any) -> bool:
    """`is`, by which kernels ask whether an argument is None."""
    return unwrap(left) is unwrap(right)


def is_not(left: Any, right: Any) -> bool:
    """`is not`."""
    return unwrap(left) is not unwrap(right)


def neg(value: Any) -> Any:
    """-value."""
    return _bare(tensor.__neg__)(value, _semantic=SEMANTIC) if isinstance(value, tensor) else -value


def pos(value: Any) -> Any:
    """+value."""
    return value if isinstance(value, tensor) else +value


def invert(value: Any) -> Any:
    """~value."""
    return _bare(tensor.__invert__)(value, _semantic=SEMANTIC) if isinstance(value, tensor) else ~value


def not_(value: Any) -> Any:
    """`not value`, element by element for a block."""
    return _bare(tensor.__not__)(value, _semantic=SEMANTIC) if isinstance(value, tensor) else not unwrap(value)


def both(*operands: Callable[[], Any]) -> Any:
    """`and`: stops at the first compile-time False; tensors are combined element by element."""
    return _logical(tensor.logical_and, False, operands)


def either(*operands: Callable[[], Any]) -> Any:
    """`or`: stops at the first compile-time True."""
    return _logical(tensor.logical_or, True, operands)


def chain(names: tuple[str, ...], *operands: Callable[[], Any]) -> Any:
    """a < b < c, in the versions of Triton that compile it: as `a < b and b < c`, with b evaluated once."""
    left, result = operands[0](), None
    for name, operand in zip(names, operands[1:], strict=True):
        right = operand()
        one = globals()[name](left, right)
        if not isinstance(one, tensor) and not unwrap(one):
            return one
        if isinstance(one, tensor):
            result = one if result is None else tensor.logical_and(result, one, _semantic=SEMANTIC)
        left = right
    return True if result is None else result


def _logical(combine: Any, decisive: bool, operands: tuple[Callable[[], Any], ...]) -> Any:
    result, value = None, None
    for operand in operands:
        value = operand()
        if not isinstance(value, tensor):
            if bool(unwrap(value)) is decisive:
                return value
        else:
            result = value if result is None else combine(result, value, _semantic=SEMANTIC)
    return value if result is None else result


# -- conditions and values ---------------------------------------------------------------------------------------------


def truth(value: Any) -> bool:
    """The condition of `if` and `while`. Raises KernelError for a block, which the compiler refuses too."""
    if not isinstance(value, tensor):
        return bool(unwrap(value))
    data = value.handle.data
    if data.size != 1:
        shape = [int(n) for n in value.shape]
        raise AmbiguousError(f"the truth of a block of shape {shape} is ambiguous: `if` and `while` need a scalar")
    return bool(data.reshape(-1)[0])


def assigned(value: Any) -> Any:
    """What a variable holds after `x = value`: a Python number becomes a tensor, unless x is annotated tl.constexpr."""
    kind = type(value)
    if kind is Tensor:
        return value
    if kind is constexpr:
        value = value.value
        kind = type(value)
    if kind in (int, float, bool):
        return SEMANTIC.to_tensor(value)
    if isinstance(value, tuple | tl.tuple):
        items = [assigned(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def constant(value: Any) -> Any:
    """What a variable annotated tl.constexpr holds. Raises KernelError for a value known only at run time."""
    if isinstance(value, tensor):
        raise KernelError("a tl.constexpr variable is assigned a value that is known only when the kernel runs")
    return unwrap(value)


def plain_global(name: str, value: Any) -> Any:
    """A number or string from outside the kernel. Raises KernelError unless this is allowed, as the compiler does."""
    if compatibility.plain_globals_allowed():
        return value
    raise KernelError(
        f"the global variable `{name}` is a plain {type(value).__name__}; write {name} = tl.constexpr(...)"
    )


def attribute(value: Any, name: str) -> Any:
    """`value.name` for a value of the kernel: methods that are jit functions are bound to it."""
    if isinstance(value, tensor):
        if name == "T":
            return SEMANTIC.permute(value, (1, 0))
    elif isinstance(value, constexpr):
        if name not in ("value", "type"):
            value = value.value
    elif name == "value" and not hasattr(value, "value"):
        return value  # tl.constexpr arguments are passed as bare values
    found = getattr(value, name)
    if isinstance(found, JITFunction) and isinstance(value, compatibility.base_value):
        return types.MethodType(_Method(found), value)
    return found


class _Method:
    """A jit function in a shape that types.MethodType accepts."""

    def __init__(self, jit: JITFunction) -> None:
        self.jit = jit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self.jit, *args, **kwargs)


def _only_new_axes(index: Any, axes: int) -> bool:
    """Whether an index takes each axis whole, with new ones between them."""
    whole = [i for i in index if i is not None]
    return len(whole) == axes and all(
        i.__class__ is builtins.slice and i.start is None and i.stop is None and i.step is None for i in whole
    )


_getitem = _bare(tensor.__getitem__)


def subscript(value: Any, index: Any) -> Any:
    """`value[index]`: new axes of a tensor, or an element of a tuple."""
    if isinstance(value, tensor):
        data, dtype = wrapped(value.handle), value.dtype
        if value.type is not dtype and index.__class__ is tuple and _only_new_axes(index, data.ndim):
            return Tensor(through(value.handle, lambda a: a[index]), block(dtype, data[index].shape), dtype)
        return _getitem(value, index, _semantic=SEMANTIC)
    return unwrap(value)[unwrap(index)]


slice_ = builtins.slice


# -- calls -------------------------------------------------------------------------------------------------------------


def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A call inside a kernel: of a jit function, of the language, or of Python at compile time."""
    kind = type(function)
    if kind is constexpr:
        function = function.value
        kind = type(function)
    if kind is JITFunction or isinstance(function, JITFunction):
        return twin(function)(*args, **kwargs)
    if kind is types.MethodType:
        return call(function.__func__, function.__self__, *args, **kwargs)
    if kind is _Method:
        return twin(function.jit)(*args, **kwargs)
    if kind is compatibility.ConstexprFunction:
        return function(*args, **kwargs)
    if kind is types.FunctionType:
        how = _how.get(function)
        if how is None:
            how = _how[function] = _interpretation(function)
        return how(*args, **kwargs)
    replaced = _REPLACED.get(function) if kind is type or kind is types.BuiltinFunctionType else None
    if replaced is not None:
        return replaced(*args, **kwargs)
    if kind is compatibility.BoundConstexprFunction:
        return function(*args, **kwargs)
    return function(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})


_twins: dict[int, tuple[JITFunction, str, Callable[..., Any]]] = {}


def twin(jit: JITFunction) -> Callable[..., Any]:
    """The interpreted form of a jit function, made once. By id: the hash of a jit function is that of its source."""
    known = _twins.get(id(jit))
    if known is None or known[1] is not jit.src:
        from refllm.kernels.interpreter.rewrite import rewrite

        known = _twins[id(jit)] = jit, jit.src, rewrite(jit)
    return known[2]


_how: dict[Callable[..., Any], Callable[..., Any]] = {}


def _interpretation(function: Any) -> Callable[..., Any]:
    """How to call a Python function that a kernel names."""
    if function in _REPLACED:
        return _REPLACED[function]
    if function.__module__.endswith(".libdevice"):
        return libdevice.function(function.__name__)
    if tl.core.is_builtin(function):
        bare = _bare(function)

        def builtin(*args: Any, **kwargs: Any) -> Any:
            result = bare(*args, _semantic=SEMANTIC, **kwargs)
            # The functions of tl.math make plain tensors.
            return Tensor(result.handle, result.type) if result.__class__ is tensor else result

        return builtin
    return lambda *args, **kwargs: function(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})


# -- parts of the language that the compiler implements itself ---------------------------------------------------------


def _range(first: Any, stop: Any = None, step: Any = None, **_: Any) -> Iterator[Any]:
    """range and tl.range: the variable is an int32 tensor, or int64 where a bound is."""
    start, stop = (0, first) if stop is None else (first, stop)
    bounds = [unwrap(b) for b in (start, stop, 1 if step is None else step)]
    dtype = tl.int32
    for bound in bounds:
        if isinstance(bound, tensor):
            if not bound.dtype.is_int():
                raise KernelError(f"range over {bound.dtype}: the bounds of a loop are integers")
            if bound.dtype.int_bitwidth > 32:
                dtype = tl.int64
    numpy_type = np.int64 if dtype is tl.int64 else np.int32
    for i in builtins.range(*(_integer(b) for b in bounds)):
        yield make(np.array([i], numpy_type), dtype, scalar=True)


def _static_range(first: Any, stop: Any = None, step: Any = None, **_: Any) -> builtins.range:
    """tl.static_range: unrolled by the compiler, so that the variable is a constant."""
    start, stop = (0, first) if stop is None else (first, stop)
    bounds = [unwrap(b) for b in (start, stop, 1 if step is None else step)]
    if any(isinstance(b, tensor) for b in bounds):
        raise KernelError("tl.static_range needs bounds that are known at compile time")
    return builtins.range(*bounds)


def _integer(value: Any) -> int:
    return int(value.handle.data.reshape(-1)[0]) if isinstance(value, tensor) else operator.index(value)


def device_assert(condition: Any, message: Any = "", mask: Any = None) -> None:
    """tl.device_assert and `assert`: checked always, as with TRITON_DEBUG=1 on a GPU."""
    data = np.asarray(condition.handle.data if isinstance(condition, tensor) else bool(unwrap(condition)))
    if mask is not None and isinstance(mask, tensor):
        data = data.astype(bool) | ~mask.handle.data.astype(bool)
    if not data.all():
        text = unwrap(message)
        raise DeviceAssertionError(f"the assertion failed{f': {text}' if text else ''}")


def _static_assert(condition: Any, message: Any = "") -> None:
    if isinstance(condition, tensor):
        raise KernelError("tl.static_assert needs a condition that is known at compile time; see tl.device_assert")
    if not unwrap(condition):
        text = unwrap(message)
        raise StaticAssertionError(f"tl.static_assert failed{f': {text}' if text else ''}")


def _to(value: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: Any = False) -> Any:
    """tl.cast, and the method `to` of a tensor."""
    if unwrap(bitcast):
        return SEMANTIC.bitcast(SEMANTIC.to_tensor(value), unwrap(dtype))
    return SEMANTIC.cast(SEMANTIC.to_tensor(value), unwrap(dtype), unwrap(fp_downcast_rounding))


def _print(*values: Any, **_: Any) -> None:
    """tl.device_print and print: once per program."""
    from refllm.kernels.interpreter.builder import BUILDER

    shown = [formats.widen(v.handle.data, v.dtype) if isinstance(v, tensor) else unwrap(v) for v in values]
    print(f"program {BUILDER.grid_idx}:", *shown)


def _hint(name: str) -> Callable[..., Any]:
    def hint(value: Any, values: Any) -> Any:
        """tl.multiple_of and its kin: a promise to the compiler. A false one about a scalar is an error."""
        promised = unwrap(values)
        if name == "multiple_of" and isinstance(value, tensor) and not value.type.is_block():
            promised = [unwrap(p) for p in promised] if isinstance(promised, list | tuple | tl.tuple) else [promised]
            if int(value.handle.data.reshape(-1)[0]) % int(promised[0]):
                raise KernelError(
                    f"tl.multiple_of promises a multiple of {promised[0]}, and the value is {value.handle.data[0]}"
                )
        return value

    return hint


def _maximum(*values: Any) -> Any:
    return _fold_builtin(tl.maximum, max, values)


def _minimum(*values: Any) -> Any:
    return _fold_builtin(tl.minimum, min, values)


def _fold_builtin(of_tensors: Any, of_numbers: Any, values: tuple[Any, ...]) -> Any:
    if not any(isinstance(v, tensor) for v in values):
        return of_numbers(*map(unwrap, values))
    result = values[0]
    for value in values[1:]:
        result = call(of_tensors, result, value)
    return result


def _map_elementwise(function: JITFunction, *args: Any, pack: int = 1) -> Any:
    return reduction.map_elementwise(twin(unwrap(function)), args, int(unwrap(pack)))


def _dot_scaled(lhs: Any, lhs_scale: Any, lhs_format: Any, rhs: Any, rhs_scale: Any, rhs_format: Any, *args: Any,
                **kwargs: Any) -> Any:  # fmt: skip
    """tl.dot_scaled, which asks its formats for the values of constants."""
    formats_ = [constexpr(unwrap(f)) for f in (lhs_format, rhs_format)]
    return _bare(tl.dot_scaled)(lhs, unwrap(lhs_scale), formats_[0], rhs, unwrap(rhs_scale), formats_[1],
                                *map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()},
                                _semantic=SEMANTIC)  # fmt: skip


_REPLACED: dict[Any, Callable[..., Any]] = {
    builtins.range: _range,
    builtins.max: _maximum,
    builtins.min: _minimum,
    builtins.print: _print,
    tl.cast: _to,
    tensor.to: _to,
    tl.range: _range,
    tl.static_range: _static_range,
    tl.static_assert: _static_assert,
    tl.static_print: lambda *values, **_: print(*map(unwrap, values)),
    tl.device_print: _print,
    tl.device_assert: device_assert,
    tl.multiple_of: _hint("multiple_of"),
    tl.max_contiguous: _hint("max_contiguous"),
    tl.max_constancy: _hint("max_constancy"),
    tl.reduce: lambda *args, **kwargs: reduction.reduce(call, *args, **kwargs),
    tl.associative_scan: lambda *args, **kwargs: reduction.associative_scan(call, *args, **kwargs),
    tl.core._reduce_with_indices: lambda *args, **kwargs: reduction.reduce_with_indices(call, *args, **kwargs),
    tl.dot_scaled: _dot_scaled,
}
for _name, _replacement in (("map_elementwise", _map_elementwise), ("condition", lambda value, **_: value)):
    if hasattr(tl, _name):
        _REPLACED[getattr(tl, _name)] = _replacement
