"""Memory of torch.empty and its relatives, filled with a value that shows that nobody wrote it.

Floats become NaN with an unusual payload: arithmetic spreads it as NaN, and the exact bits tell an element that was
never stored from one that was computed to NaN. Integers become large, so that an index made of them is out of bounds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from refllm.kernels.interpreter import cuda_tensors
from refllm.kernels.interpreter.errors import KernelError

PATTERN = {
    torch.float16: 0x7EED,
    torch.bfloat16: 0x7FED,
    torch.float32: 0x7FEDFACE,
    torch.float64: 0x7FFDFACE7FEDFACE,
    torch.int16: 0x7EED,
    torch.int32: 0x7EEDFACE,
    torch.int64: 0x7EEDFACE7EEDFACE,
}
"""Bits by type. Quiet NaNs; the integers are near the end of their range. Other types are not poisoned."""

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_TELLING = {
    np.dtype(np.uint16): (0x7FED,),
    np.dtype(np.float16): (0x7EED,),
    np.dtype(np.float32): (0x7FEDFACE,),
    np.dtype(np.float64): (0x7FFDFACE7FEDFACE,),
    np.dtype(np.int32): (0x7EEDFACE,),
    np.dtype(np.int64): (0x7EEDFACE7EEDFACE,),
}
"""Bits that cannot be anything else, by the type in which the interpreter holds the numbers."""

_poisoned: dict[int, StorageWeakRef] = {}

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
"""The functions of Torch that return memory as they found it."""


def poisoning(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """`allocate`, with its result filled."""

    def allocate_poisoned(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        # Inside torch.compile there is nothing to fill.
        if not torch.compiler.is_compiling() and _is_plain(tensor):
            with cuda_tensors.as_they_are():
                fill(tensor)
        return tensor

    return allocate_poisoned


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor has memory of its own: no subclass (fake tensors are some), no wrapper of torch.func."""
    return type(tensor) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def fill(tensor: torch.Tensor) -> None:
    """Poisons the whole storage of a plain tensor on the CPU; does nothing for other tensors and types."""
    bits = PATTERN.get(tensor.dtype)
    if bits is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return
    array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    size = tensor.element_size()
    array[: len(array) // size * size].view(f"u{size}").fill(bits)
    _poisoned[storage.data_ptr()] = StorageWeakRef(storage)


def is_poisoned(storage: torch.UntypedStorage) -> bool:
    """Whether this storage was poisoned when it was allocated."""
    known = _poisoned.get(storage.data_ptr())
    if known is None:
        return False
    if known.expired() or known.cdata != storage._cdata:
        del _poisoned[storage.data_ptr()]
        return False
    return True


def unwritten_array(values: np.ndarray) -> np.ndarray | None:
    """Where these loaded numbers are poison; None for types in which that cannot be told."""
    telling = _TELLING.get(values.dtype)
    if telling is None:
        return None
    return values.view(f"u{values.dtype.itemsize}") == np.array(telling[0], f"u{values.dtype.itemsize}")


def unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """Where nobody has written a tensor that was allocated inside `interpreted()`: a bool tensor of its shape.

    Raises KernelError for a type of 8 bits or a bool, which have no value to spare.
    """
    bits = PATTERN.get(tensor.dtype)
    if bits is None:
        raise KernelError(f"unwritten: {tensor.dtype} has no value that could mean `nobody wrote this`")
    return tensor.detach().contiguous().view(_INTEGER[tensor.element_size()]) == bits
