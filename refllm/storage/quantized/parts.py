"""What the pages of formats share: the stored parts of one weight, and sentences about what is wrong with them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.errors import CheckpointError
from refllm.storage.safetensors_format import quote


class Parts:
    """The stored tensors that one weight is made of, by what follows the name of its module and a dot. where: for
    messages: the checkpoint and the module."""

    def __init__(self, where: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.where, self._tensors = where, tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._tensors:
            raise self.wrong(f"it has no {quote(name)}, which its format needs")
        return self._tensors[name]

    def of(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """The part `name`. Raises CheckpointError for one that is stored in none of `dtypes`, or has another shape."""
        part = self[name]
        if part.dtype.name not in dtypes:
            raise self.wrong(f"{name} is stored as {part.dtype.name}, expected {' or '.join(dtypes)}")
        if shape is not None and part.shape != shape:
            raise self.wrong(f"{name} has shape {list(part.shape)}, expected {list(shape)}")
        return part

    def wrong(self, what: str) -> CheckpointError:
        """The error for a fault of this weight."""
        return CheckpointError(f"{self.where}: {what}")


FLOATS = ("float32", "bfloat16", "float16")


def wide(values: NDArray[Any]) -> NDArray[Any]:
    """Any stored numbers in float64, which holds all of them."""
    return values.astype(np.float64)


def unpacked(words: NDArray[Any], bits: int, axis: int) -> NDArray[Any]:
    """Numbers of so many bits out of int32 words along an axis, the lowest bits first, across the words where they do
    not divide 32 (three bits: 32 numbers in 3 words)."""
    along = np.moveaxis(np.ascontiguousarray(words).view(np.uint32), axis, -1)
    as_bytes = np.ascontiguousarray(along).view(np.uint8)
    stream = np.unpackbits(as_bytes, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    each = stream[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
    padded = np.packbits(each, axis=-1, bitorder="little")[..., 0]
    return np.moveaxis(padded.astype(np.int32), -1, axis)


def setting(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    """A field of quantization_config. Raises CheckpointError for one that is none of `allowed`."""
    value = config.get(key, default)
    if not any(type(value) is type(item) and value == item for item in allowed):
        shown = ", ".join(map(str, allowed))
        raise CheckpointError(f"quantization_config: {key} is {quote(value)}; refllm reads {shown}")
    return value


def size(config: Mapping[str, Any], key: str, default: Any = None) -> int:
    """A field of quantization_config that is a number of 1 or more, or -1 for a whole row."""
    value = config.get(key, default)
    if type(value) is not int or (value < 1 and value != -1):
        raise CheckpointError(f"quantization_config: {key} is {quote(value)}, expected a number of 1 or more, or -1")
    return value
