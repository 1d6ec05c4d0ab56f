"""Memory that nobody has written, made visible: what torch.empty and its relatives hand out is filled first.

Filled with one value in one run and another in the next, an element of the result that nobody wrote, or that was
computed from a part of a workspace that nobody wrote, follows the filling.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FILLINGS = (float("nan"), 12345.0)
"""What memory holds before the first run, and before the second: that is finite in every format, and unlikely."""
_INTEGERS = (0x7EED, 3)


@contextlib.contextmanager
def filled(run: int, arrays: str, function: Any = None) -> Iterator[None]:
    """New memory holds `FILLINGS[run]` within the block; in integers a large number, or a small one.

    function: whose module may have imported an allocator by its name; that name is exchanged as well.
    """
    if arrays == "numpy":
        allocators: list[tuple[Any, str]] = [(np, "empty"), (np, "empty_like")]
        filler: Callable[[Any, int], None] = fill_array
    else:
        from refllm.kernels.interpreter.poison import ALLOCATORS

        allocators, filler = list(ALLOCATORS), fill
    with contextlib.ExitStack() as undo:
        exchanged: dict[int, Any] = {}
        for owner, name in allocators:
            original = getattr(owner, name)
            exchanged[id(original)] = _filling(original, run, filler)
            _set(owner, name, exchanged[id(original)], undo)
        names = getattr(inspect.unwrap(function) if function is not None else None, "__globals__", {})
        for name, value in [(n, v) for n, v in names.items() if id(v) in exchanged]:
            undo.callback(names.__setitem__, name, value)
            names[name] = exchanged[id(value)]
        yield


def _set(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:  # inherited from the class that is written in C
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _filling(allocate: Callable[..., Any], run: int, filler: Callable[[Any, int], None]) -> Callable[..., Any]:
    def allocate_filled(*args: Any, **kwargs: Any) -> Any:
        made = allocate(*args, **kwargs)
        filler(made, run)
        return made

    return allocate_filled


def fill_array(array: np.ndarray, run: int) -> None:
    """Fills a new array."""
    if array.dtype.kind in "fV":
        array[...] = FILLINGS[run]
    elif array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        array[...] = _INTEGERS[run]


def fill(tensor: Any, run: int) -> None:
    """Fills a new tensor; leaves alone what has no memory of its own (fake tensors, those of torch.compile)."""
    import torch

    if type(tensor) is not torch.Tensor or tensor.device.type == "meta" or torch.compiler.is_compiling():
        return
    if tensor.is_floating_point():
        tensor.fill_(FILLINGS[run])
    elif tensor.dtype == torch.bool:
        tensor.fill_(run == 0)
    elif not tensor.is_complex():
        tensor.fill_(_INTEGERS[run] if tensor.element_size() > 1 else 100 + run)
