"""Reading the arrays of a call, so that whatever cannot be one is refused by the name of its argument."""

from typing import Any

import numpy as np

from refllm.errors import InputError

_NOT_NUMBERS = "OUSMmc"  # NumPy's kinds for objects, text, bytes, times and complex numbers


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` (an array, nested lists, a CPU tensor) as an array of numbers. Raises InputError naming the argument."""
    try:
        array = np.asarray(value)
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
