"""Writing a checkpoint that Transformers loads: streamed tensor by tensor, and never half-visible.

All shapes are known before the first byte is written, so headers and shards are planned first; then one tensor at a
time is converted, in blocks, straight into its file. The files get their names when all of them are complete, in an
order whose every state between is refused by who reads (`refllm.storage.output_file.publish_together`).
"""

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refllm.errors import CheckpointError
from refllm.parallel import blocks
from refllm.precision.dtype_names import dtype_name
from refllm.storage.output_file import NewFile, publish_together
from refllm.storage.safetensors_format import DTYPES, FORMAT_NAMES, MAX_HEADER_BYTES, WEIGHT_DTYPES, is_text, quote

WRITE_BLOCK = 1 << 20
Shapes = Mapping[str, Sequence[int]]
_OURS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")


def save_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]],
    dtype: str,
    *,
    shapes: Shapes | None = None,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Write `tensors` to `folder` as model.safetensors, or as shards with an index above `max_shard_bytes`.

    tensors: a mapping (a lazy one is asked for one tensor at a time, in its own order), or (name, array) pairs. With
        pairs, pass `shapes`, in the order of the pairs, to stream; without it all pairs are collected first. A mapping
        may have an attribute `shapes` of its own.
    dtype: "float32", "bfloat16", "float16" or "float64"; numbers are rounded to nearest even.
    metadata: strings for the header, {"format": "pt"} if None, which Transformers asks for.
    texts: other files of the same model by name, config.json among them, which take their places with the weights: who
        reads the folder finds the old model, or the new one, or no config.json and so no model.

    Returns the paths of the weights. A failure leaves the folder as it was; weight files of an earlier checkpoint in
    the folder are removed after success. Raises CheckpointError for what the format cannot hold.
    """
    dtype = dtype_name(dtype)
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"dtype={quote(dtype)} is not a weight dtype, expected one of {', '.join(WEIGHT_DTYPES)}")
    folder = Path(folder)
    plan, pairs = _plan(tensors, shapes)
    shards = _split(plan, dtype, max_shard_bytes)
    names = _file_names(len(shards))
    about = {"format": "pt"} if metadata is None else dict(metadata)
    final = [*names, _INDEX] if len(names) > 1 else names
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            new = {name: stack.enter_context(NewFile(folder / name)) for name in [*final, *texts]}
            for name, shard in zip(names, shards, strict=True):
                _write_shard(new[name].file, folder, shard, pairs, dtype, about)
            if next(pairs, None) is not None:
                raise CheckpointError(f"{folder}: more tensors were given than `shapes` announces")
            if len(names) > 1:
                new[_INDEX].write(_index(dict(zip(names, shards, strict=True)), dtype))
            for name, text in texts.items():
                new[name].write(text)
            # Shards under an index of another checkpoint would be read as a mixture, and weights under a config of
            # another model as a model that is neither.
            keys = [folder / name for name in ("config.json", _INDEX) if name in new]
            publish_together(list(new.values()), keys, _stale(folder, final))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
    return [folder / name for name in final]


_INDEX = "model.safetensors.index.json"


def _plan(tensors: Any, shapes: Shapes | None) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Name -> shape in the order of writing, and the iterator of (name, array) in that order."""
    if not isinstance(tensors, Mapping) and shapes is None:
        pairs = list(tensors)
        tensors = dict(pairs)
        if len(tensors) != len(pairs):
            raise CheckpointError("a tensor was given twice, expected distinct names")
    if shapes is None:
        shapes = getattr(tensors, "shapes", None) or {name: np.shape(array) for name, array in tensors.items()}
    plan = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    if not plan:
        raise CheckpointError("there are no tensors to write, expected at least one")
    for name in plan:
        if not is_text(name) or name == "__metadata__":
            raise CheckpointError(f"{quote(name)} cannot be the name of a tensor in a safetensors file")
    if isinstance(tensors, Mapping):
        return plan, ((name, tensors[name]) for name in plan)
    return plan, iter(tensors)


def _split(plan: Shapes, dtype: str, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes} is not positive")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in plan.items():
        size = _nbytes(shape, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tuple(shape)
        filled += size
    return shards


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[FORMAT_NAMES[dtype]][1] // 8


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(
    file: BinaryIO, folder: Path, shapes: Shapes, pairs: Any, dtype: str, metadata: Mapping[str, str]
) -> None:
    file.write(header({name: (shape, dtype) for name, shape in shapes.items()}, metadata))
    for name, shape in shapes.items():
        given, array = next(pairs, (None, None))
        if given != name:
            raise CheckpointError(f"{folder}: expected tensor {quote(name)} next, found {quote(given)}")
        _write_tensor(file, name, np.asarray(array), tuple(shape), dtype)


def header(tensors: Mapping[str, tuple[Sequence[int], str]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with; the numbers follow in this order. tensors: name -> (shape, dtype)."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + _nbytes(shape, dtype)
        entries[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces up to a multiple of 8, so that the tensors of any dtype start aligned in a memory map.
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"a header of {len(text)} bytes is above the limit of {MAX_HEADER_BYTES} of the format")
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape:
        raise CheckpointError(f"tensor {quote(name)} has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype.name not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"tensor {quote(name)} has dtype {array.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}"
        )
    flat = np.ascontiguousarray(array).reshape(-1)
    overflows = 0
    for part in blocks(flat.size, WRITE_BLOCK):
        stored = downcast(flat[part], dtype)
        if stored.itemsize < flat.itemsize:
            overflows += int(np.isfinite(flat[part]).sum() - np.isfinite(stored).sum())
        file.write(stored.view(np.uint8).data)
    if overflows:
        warnings.warn(
            f"tensor {quote(name)}: {overflows} finite numbers are too large for {dtype} and were written as infinity",
            UserWarning,
            stacklevel=4,
        )


def downcast(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """`values` in the little-endian stored form of `dtype`; float64 reaches a 16-bit type by way of float32, as in
    torch."""
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == np.float64 and dtype in ("bfloat16", "float16"):
            values = values.astype(np.float32)
        if dtype == "bfloat16":
            return values.astype(ml_dtypes.bfloat16)
        return values.astype(np.dtype(dtype).newbyteorder("<"), copy=False)


def _index(shards: Mapping[str, Shapes], dtype: str) -> str:
    weight_map = {tensor: file for file, shapes in shards.items() for tensor in shapes}
    all_shapes = [shape for shapes in shards.values() for shape in shapes.values()]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(shape) for shape in all_shapes),
            "total_size": sum(_nbytes(shape, dtype) for shape in all_shapes),
        },
        "weight_map": weight_map,
    }
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _stale(folder: Path, final: Collection[str]) -> list[Path]:
    """Weight files that an earlier checkpoint left, and that are no part of the new one."""
    return [entry for entry in folder.iterdir() if _OURS.fullmatch(entry.name) and entry.name not in final]
