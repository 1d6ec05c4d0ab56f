"""tl.reduce and tl.associative_scan: neighbours are combined pairwise, whole blocks at a time.

The order is that of a tree, so that sums in 16 bits round at every step and the error of float32 sums grows with the
logarithm of their length, as on a GPU (which of the many trees a GPU uses depends on its layouts). A combine function
is called log2(n) times with blocks, and not once per element.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from refllm.kernels.interpreter import formats
from refllm.kernels.interpreter.errors import AmbiguousError, KernelError
from refllm.kernels.interpreter.semantic import SEMANTIC, make

Arrays = tuple[np.ndarray, ...]
Combine = Callable[[Arrays, Arrays], Arrays]

_KNOWN = {
    id(tl.standard._sum_combine): np.add,
    id(tl.standard._prod_combine): np.multiply,
    id(tl.standard._xor_combine): np.bitwise_xor,
    # Triton's max and min drop NaN unless asked otherwise, as the instructions of the GPU do.
    id(tl.standard._elementwise_max): np.fmax,
    id(tl.standard._elementwise_min): np.fmin,
}
"""NumPy's own form of the combine functions of the standard library, by id (the hash of a jit function is slow)."""


def reduce(call: Callable[..., Any], value: Any, axis: Any, combine_fn: Any, keep_dims: Any = False) -> Any:
    """tl.reduce of a tensor, or of several with one combine function; axis None is all axes."""
    values = value if isinstance(value, tuple | list | tl.tuple) else (value,)
    values = [_checked(v) for v in values]
    axis, keep = _plain(axis), bool(_plain(keep_dims))
    ndim = max(1, values[0].handle.data.ndim)
    arrays = tuple(v.handle.data.reshape(-1) if axis is None else v.handle.data for v in values)
    at = 0 if axis is None else _axis(axis, ndim)
    known = _KNOWN.get(id(combine_fn)) if len(values) == 1 else None
    if known is not None and not formats.is_emulated(values[0].dtype):
        arrays = (_folded(known, arrays[0], at),)
    else:
        combine = _combine(call, combine_fn, [v.dtype for v in values])
        while (n := arrays[0].shape[at]) > 1:
            half = n // 2
            left, right = (tuple(a[_along(a.ndim, at, part)] for a in arrays) for part in _halves(combine_fn, half))
            arrays = combine(left, right)
    results = []
    for array, v in zip(arrays, values, strict=True):
        if keep:
            array = array.reshape([1] * ndim) if axis is None else array
        elif axis is None or ndim == 1:
            array = array.reshape(1)
        else:
            array = array.squeeze(at)
        scalar = not keep and (axis is None or ndim == 1)
        results.append(make(array, v.dtype, scalar))
    return tuple(results) if isinstance(value, tuple | list | tl.tuple) else results[0]


def _folded(function: Any, array: np.ndarray, at: int) -> np.ndarray:
    """The reduction by one of NumPy's functions: the halves meet until one is left."""
    before = (slice(None),) * at
    while (half := array.shape[at] // 2) > 0:
        array = function(array[(*before, slice(0, half))], array[(*before, slice(half, 2 * half))])
    return array


def _halves(combine_fn: Any, half: int) -> tuple[slice, slice]:
    """Which elements meet: contiguous halves if order does not matter, neighbours if it may."""
    if id(combine_fn) in _KNOWN:
        return slice(0, half), slice(half, 2 * half)
    return slice(0, None, 2), slice(1, None, 2)


def reduce_with_indices(
    call: Callable[..., Any], value: Any, axis: Any, combine_fn: Any, keep_dims: Any = False
) -> tuple[Any, Any]:
    """The reduction behind tl.argmax and tl.argmin: the values together with their indices along `axis`."""
    data = value.handle.data
    at = _axis(_plain(axis), data.ndim)
    shape = [1] * data.ndim
    shape[at] = data.shape[at]
    index = np.broadcast_to(np.arange(data.shape[at], dtype=np.int32).reshape(shape), data.shape)
    return reduce(call, (value, make(index, tl.int32)), at, combine_fn, keep_dims)


def associative_scan(call: Callable[..., Any], value: Any, axis: Any, combine_fn: Any, reverse: Any = False) -> Any:
    """tl.associative_scan: the prefixes of a reduction along one axis."""
    values = value if isinstance(value, tuple | list | tl.tuple) else (value,)
    values = [_checked(v) for v in values]
    at = _axis(_plain(axis), values[0].handle.data.ndim)
    arrays = tuple(v.handle.data for v in values)
    if _plain(reverse):
        arrays = tuple(np.flip(a, at) for a in arrays)
    arrays = _scan(arrays, at, _combine(call, combine_fn, [v.dtype for v in values]))
    if _plain(reverse):
        arrays = tuple(np.flip(a, at) for a in arrays)
    results = tuple(make(a, v.dtype) for a, v in zip(arrays, values, strict=True))
    return results if isinstance(value, tuple | list | tl.tuple) else results[0]


def _scan(arrays: Arrays, at: int, combine: Combine) -> Arrays:
    """Prefixes of n elements from those of the n / 2 pairs of neighbours."""
    if arrays[0].shape[at] == 1:
        return arrays

    def part(every: Arrays, which: slice) -> Arrays:
        return tuple(a[_along(a.ndim, at, which)] for a in every)

    even, odd = part(arrays, slice(0, None, 2)), part(arrays, slice(1, None, 2))
    pairs = _scan(combine(even, odd), at, combine)
    # Prefix 2 k is that of the k pairs before it and element 2 k; number 0 has none before it and is set afterwards.
    before = tuple(np.concatenate([e[_along(e.ndim, at, slice(0, 1))], p[_along(p.ndim, at, slice(0, -1))]], at)
                   for e, p in zip(even, pairs, strict=True))  # fmt: skip
    starts = combine(before, even)
    results = []
    for start, e, pair in zip(starts, even, pairs, strict=True):
        start = start.copy()
        start[_along(start.ndim, at, slice(0, 1))] = e[_along(e.ndim, at, slice(0, 1))]
        both = np.stack([start, pair], at + 1)
        results.append(both.reshape([n * 2 if i == at else n for i, n in enumerate(start.shape)]))
    return tuple(results)


def map_elementwise(function: Callable[..., Any], args: tuple[Any, ...], pack: int = 1) -> Any:
    """tl.map_elementwise: one call of a scalar function per `pack` elements, which lie side by side.

    The function has `pack` arguments for every tensor, and `pack` results for every result.
    """
    data = np.broadcast_arrays(*(a.handle.data for a in args))
    shape, flat = data[0].shape, [d.reshape(-1) for d in data]
    if flat[0].size % pack:
        raise KernelError(f"tl.map_elementwise: {flat[0].size} elements are no multiple of pack={pack}")
    rows: list[list[Any]] = []
    single = False
    for start in range(0, flat[0].size, pack):
        scalars = [make(d[i : i + 1], a.dtype, scalar=True)
                   for d, a in zip(flat, args, strict=True) for i in range(start, start + pack)]  # fmt: skip
        result = function(*scalars)
        single = not isinstance(result, tuple | tl.tuple)
        rows.append([result] if single else list(result))
    results = []
    for first in range(0, len(rows[0]), pack):
        tensors = [SEMANTIC.to_tensor(value) for row in rows for value in row[first : first + pack]]
        values = np.concatenate([t.handle.data for t in tensors]).reshape(shape)
        results.append(make(values, tensors[0].dtype))
    return results[0] if single or len(results) == 1 else tuple(results)


def _combine(call: Callable[..., Any], combine_fn: Any, dtypes: list[Any]) -> Combine:
    """The combine function on arrays."""
    known = _KNOWN.get(id(combine_fn))
    if known is not None and len(dtypes) == 1:
        dtype = dtypes[0]
        if not formats.is_emulated(dtype):
            return lambda left, right: (known(left[0], right[0]),)
        return lambda left, right: (
            formats.narrow(known(formats.widen(left[0], dtype), formats.widen(right[0], dtype)), dtype),
        )

    def combine(left: Arrays, right: Arrays) -> Arrays:
        try:
            return combined(left, right, left[0].shape, scalar=False)
        except AmbiguousError:  # it branches: the compiler gives it two scalars at a time, as here
            first, second = ([a.reshape(-1) for a in side] for side in (left, right))
            each = [
                combined([a[i : i + 1] for a in first], [a[i : i + 1] for a in second], (1,), scalar=True)
                for i in range(first[0].size)
            ]
            columns = zip(*each, strict=True)
            return tuple(np.concatenate(column).reshape(left[0].shape) for column in columns)

    def combined(left: Any, right: Any, shape: tuple[int, ...], scalar: bool) -> Arrays:
        operands = [make(a, d, scalar) for side in (left, right) for a, d in zip(side, dtypes, strict=True)]
        result = call(combine_fn, *operands)
        result = result if isinstance(result, tuple | tl.tuple) else (result,)
        return tuple(np.broadcast_to(SEMANTIC.to_tensor(r).handle.data, shape) for r in result)

    return combine


def _checked(value: Any) -> Any:
    if not isinstance(value, tl.tensor):
        raise KernelError(f"a reduction or scan needs tensors, not {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise KernelError(f"axis {axis} of a block with {ndim} axes")
    return axis % ndim


def _along(ndim: int, at: int, which: slice) -> tuple[slice, ...]:
    return tuple(which if i == at else slice(None) for i in range(ndim))
