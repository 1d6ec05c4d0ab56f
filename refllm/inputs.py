"""Reading the arguments of a call, so that whatever cannot be one is refused by its name.

Tensors of Torch are taken wherever arrays are, and what is made of them can be given back as tensors. Torch is never
imported for that: who has a tensor has imported it.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from refllm.errors import InputError

_NOT_NUMBERS = "OUSMmc"  # NumPy's kinds for objects, text, bytes, times and complex numbers


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` (an array, nested lists, a CPU tensor) as an array of numbers. Raises InputError naming the argument."""
    try:
        array = to_numpy(value)
    except (ValueError, TypeError, RuntimeError):  # lists of unequal lengths; tensors that NumPy cannot read
        raise InputError(f"{name}: expected an array of real numbers or equally long lists of them") from None
    if array.dtype.kind in _NOT_NUMBERS:
        raise InputError(f"{name}: expected real numbers, found {type(value).__name__} of {array.dtype}")
    return array


def as_integers(name: str, value: Any) -> np.ndarray:
    """`as_array`, of integers, as int64."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name}: expected integers, found {array.dtype}")
    return array.astype(np.int64, copy=False)


def to_numpy(value: Any) -> np.ndarray:
    """An array, or a tensor of any dtype on any device, as an array; narrow floats become float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    return np.asarray(value)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of Torch."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_tensor(value: Any, dtype: str | None = None, device: Any = "cpu") -> Any:
    """Arrays, and tuples of them, as tensors. dtype: the name of the one that floats get; None leaves them theirs."""
    import torch

    if isinstance(value, tuple):
        return tuple(as_tensor(part, dtype, device) for part in value)
    if not isinstance(value, np.ndarray | np.generic):
        return value
    tensor = torch.from_numpy(np.require(value, requirements=["C", "W", "A"])).to(device)
    return tensor.to(getattr(torch, dtype)) if dtype is not None and tensor.is_floating_point() else tensor


def refuse_unknown(names: Iterable[str], known: Iterable[str], source: str) -> None:
    """Raises InputError where a name is not among the known ones; suggests the nearest."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; leave it out"
            raise InputError(f"{source}: unknown argument {name}{hint}")
