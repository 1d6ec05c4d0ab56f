"""Values of a forward pass that a tape follows, and the few things that may be done with them beside operators.

A head takes rows and columns of its logits and divides a loss; a page may compute with its weights (`1 + w`, or the
norms of all heads stacked). Each of these has its reverse here: what was taken from is given back to where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from refllm.errors import InputError
from refllm.ops.norm_backward import summed_to

if TYPE_CHECKING:
    from refllm.forward.tape import Tape

Gradients = Sequence[np.ndarray | None]


@dataclass(frozen=True)
class Step:
    """One kind of step of a forward pass, with its reverse.

    forward: arguments -> the result, or a tuple of them. backward: (gradients of the results, what was kept, which
    arguments are to have a gradient) -> one gradient for each argument, or None. keep: what of the arguments the
    reverse reads, so that the rest of them can go.
    operator: of `refllm.ops`, how: its keywords; "" for what stands beside operators. moves: nothing is computed, each
    number of a gradient goes where it belongs (and several that belong to one place are added).
    """

    forward: Callable[..., Any]
    backward: Callable[[list[np.ndarray], tuple[Any, ...], tuple[bool, ...]], Gradients]
    keep: Callable[..., tuple[Any, ...]]
    operator: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    moves: bool = False


class Traced(NDArrayOperatorsMixin):
    """A value on a tape. value: the array. number: what the tape calls it."""

    __slots__ = ("number", "tape", "value")

    def __init__(self, tape: "Tape", value: np.ndarray, number: int) -> None:
        self.tape, self.value, self.number = tape, value, number

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.value.dtype

    @property
    def size(self) -> int:
        return self.value.size

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Any:
        return self.tape.record(_taken(index, self.shape), (self,))

    def reshape(self, *shape: Any) -> Any:
        return self.tape.record(_reshaped(lambda x: x.reshape(*shape), self.shape), (self,))

    def squeeze(self, axis: Any = None) -> Any:
        return self.tape.record(_reshaped(lambda x: x.squeeze(axis), self.shape), (self,))

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise InputError("this step of the page or head has no known gradient: a value was read outside of `op`")

    def __array_function__(self, function: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if function not in (np.stack, np.concatenate):
            raise InputError(f"np.{function.__name__}: no gradient of it is known; write it in calls of `op`")
        parts, axis = arguments[0], keywords.get("axis", *arguments[1:2] or [0])
        return self.tape.record(_joined(function, axis), tuple(parts))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        if method != "__call__" or ufunc not in _SLOPES or keywords:
            raise InputError(f"np.{ufunc.__name__}: no gradient of it is known; write it in calls of `op`")
        return self.tape.record(_arithmetic(ufunc), inputs)


def value_of(x: Any) -> Any:
    """The array of a value, traced or not."""
    return x.value if isinstance(x, Traced) else x


def _taken(index: Any, shape: tuple[int, ...]) -> Step:
    """x[index]: the gradient goes back to where the numbers were taken, once for every time that they were."""
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts)

    def backward(grads: list[np.ndarray], _: tuple[Any, ...], __: tuple[bool, ...]) -> Gradients:
        dx = np.zeros(shape, grads[0].dtype)
        if plain:
            dx[index] = grads[0]
        else:
            np.add.at(dx, index, grads[0])
        return [dx]

    return Step(lambda x: x[index], backward, _nothing, moves=True)


def _reshaped(view: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Step:
    return Step(view, lambda grads, _, __: [grads[0].reshape(shape)], _nothing, moves=True)


def _joined(function: Any, axis: int) -> Step:
    """np.stack or np.concatenate of all arguments."""

    def backward(grads: list[np.ndarray], kept: tuple[Any, ...], _: tuple[bool, ...]) -> Gradients:
        if function is np.stack:
            return list(np.moveaxis(grads[0], axis, 0))
        return np.split(grads[0], np.cumsum([x.shape[axis] for x in kept])[:-1], axis=axis)

    keep = _nothing if function is np.stack else _everything
    return Step(lambda *parts: function(parts, axis=axis), backward, keep, moves=True)


_SLOPES: dict[Any, Callable[..., list[Any]]] = {
    np.add: lambda d, x, y: [d, d],
    np.subtract: lambda d, x, y: [d, -d],
    np.multiply: lambda d, x, y: [d * y, d * x],
    np.divide: lambda d, x, y: [d / y, -d * x / y**2],
    np.negative: lambda d, x: [-d],
}


def _arithmetic(ufunc: Any) -> Step:
    def backward(grads: list[np.ndarray], kept: tuple[Any, ...], _: tuple[bool, ...]) -> Gradients:
        slopes = _SLOPES[ufunc](grads[0], *kept)
        return [summed_to(np.asarray(d), np.shape(x)) for d, x in zip(slopes, kept, strict=True)]

    return Step(partial(_in_its_dtype, ufunc), backward, _everything)


def _in_its_dtype(ufunc: Any, *arguments: Any) -> np.ndarray:
    """The ufunc without the float64 that a Python number makes of a float32 scalar of no dims."""
    dtype = next(x.dtype for x in arguments if isinstance(x, np.ndarray | np.generic))
    return np.asarray(ufunc(*arguments), dtype)


def _nothing(*_: Any) -> tuple[Any, ...]:
    return ()


def _everything(*arguments: Any) -> tuple[Any, ...]:
    return arguments
