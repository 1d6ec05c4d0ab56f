"""The header of one safetensors file, checked before a single byte of its data is believed.

Layout of the format (https://huggingface.co/docs/safetensors, section "Format"):

    8 bytes    N, little-endian unsigned: length of the header
    N bytes    JSON object {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...};
               it starts with "{" and may be padded with spaces; "__metadata__" maps strings to strings
    the rest   the tensors, row-major and little-endian; offsets count from here, without holes and without overlap

The safetensors library checks the same things, but it does not say where a tensor lies in the file, and a memory map
needs to know that. What `read_header` accepts, the library accepts; the tests hold the two against each other.
"""

import json
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from refllm import input_file
from refllm.errors import CheckpointError

# The limit of the safetensors library, against headers that exhaust the memory of the reader.
MAX_HEADER_BYTES = 100_000_000
# Of a header and of an index of shards, in which a tensor takes eight and one: Python needs 100 times their bytes.
MAX_VALUES = 1_000_000
# numpy's own limit (NPY_MAXDIMS).
MAX_DIMENSIONS = 64

# Format name -> (our name, bits per element). Only the first four can be model weights; the others can be listed.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F4": ("float4_e2m1fn", 4),
}
FORMAT_NAMES = {name: code for code, (name, _) in DTYPES.items()}
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: dtype ("bfloat16"), shape, and the byte range [begin, end) counted from the file start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def quote(text: Any) -> str:
    """A value from a file as it may appear in an error message: ASCII, on one line, of bounded length."""
    shown = ascii(text)
    return shown if len(shown) <= 120 else f"{shown[:80]}...{shown[-20:]}"


def read_header(file: BinaryIO, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in the order of their data) and metadata of the safetensors file open in `file`.

    `where` names the file in messages. Raises CheckpointError for anything that is not a complete, consistent file.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(
            f"{where}: {size} bytes is too short for a safetensors file, whose header length takes 8 bytes"
        )
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{where}: {_explain_length(prefix, length, size)}")
    raw = file.read(length)
    if len(raw) != length:
        raise CheckpointError(f"{where}: the file shrank while it was read, expected a header of {length} bytes")
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: the header starts with {quote(raw[:4])}, expected '{{' (is the file damaged?)")
    entries = parse_json_object(raw, f"{where}: header")
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    tensors = {name: _tensor(name, entry, 8 + length, where) for name, entry in entries.items()}
    return _in_file_order(tensors, 8 + length, size, where), metadata


def _explain_length(prefix: bytes, length: int, size: int) -> str:
    if prefix == b"version ":
        return "this is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'"
    if prefix.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "this is a PyTorch pickle, which can run code when it is opened; expected a safetensors file"
    if length > MAX_HEADER_BYTES:
        return f"header length {length} is above the limit of {MAX_HEADER_BYTES} bytes (is the file damaged?)"
    return f"the file is truncated: its header takes {length} bytes, but only {size - 8} follow the header length"


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from an untrusted file: UTF-8, no duplicate keys, no NaN, no negative integers."""
    try:
        input_file.count_values(raw, MAX_VALUES)
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_natural,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of this format") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if not is_text(key):
            raise ValueError(f"key {quote(key)} is not Unicode text")
        if key in table:
            raise ValueError(f"key {quote(key)} appears twice")
        table[key] = value
    return table


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20:
        raise ValueError(f"the number {quote(digits)} is outside 0 .. 2^64")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def is_text(value: Any) -> bool:
    """Whether `value` is a string of Unicode characters: JSON escapes can also spell lone surrogates, which no file
    name and no terminal can hold."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(is_text(text) for text in value.values()):
        raise CheckpointError(f"{where}: header: __metadata__ is {quote(value)}, expected an object of strings")
    return value


def _tensor(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    at = f"{where}: tensor {quote(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{at} is described by {quote(entry)}, expected dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{at} has dtype {quote(entry['dtype'])}, expected one of {', '.join(DTYPES)}")
    dtype, bits = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _integers(shape) or len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) * bits >= 2**63:
        raise CheckpointError(f"{at} has shape {quote(shape)}, expected a list of sizes that fit into memory")
    if not _integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{at} has data_offsets {quote(offsets)}, expected [begin, end] with begin <= end")
    total_bits, found = math.prod(shape) * bits, offsets[1] - offsets[0]
    if total_bits != found * 8:
        raise CheckpointError(
            f"{at} occupies {found} bytes, but shape {shape} of {entry['dtype']} takes {total_bits / 8:.15g}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _in_file_order(tensors: dict[str, TensorInfo], begin: int, size: int, where: str) -> dict[str, TensorInfo]:
    """The tensors sorted by position; refuses overlaps, holes, and data that ends before or after the file does."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for name, info in ordered:
        if info.begin != begin:
            fault = "overlaps the tensor before it" if info.begin < begin else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {quote(name)} begins at byte {info.begin} and {fault}, expected {begin}"
            )
        begin = info.end
    if begin > size:
        raise CheckpointError(f"{where}: the file is truncated: its tensors end at byte {begin}, the file at {size}")
    if begin < size:
        raise CheckpointError(f"{where}: {size - begin} bytes at the end of the file belong to no tensor")
    return dict(ordered)
