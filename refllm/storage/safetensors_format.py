"""The header of one safetensors file, checked before a single byte of its data is believed.

Layout of the format (https://huggingface.co/docs/safetensors, section "Format"):

    8 bytes    N, little-endian unsigned: length of the header
    N bytes    JSON object {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...};
               it may be padded with spaces; "__metadata__" maps strings to strings, or is null
    the rest   the tensors, row-major and little-endian; offsets count from here, without holes and without overlap

The safetensors library checks the same things, but it does not say where a tensor lies in the file, and a memory map
needs to know that. What `read_header` accepts is what the library loads; the tests hold the two against each other. Of
the library's parser come the rules that the format does not spell out: fields that it does not know are skipped, of a
name that appears twice the last one counts (the first one's data is then a hole), and nesting ends at `MAX_DEPTH`.
"""

import json
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from refllm.errors import CheckpointError
from refllm.storage import input_file

# The limit of the safetensors library, against headers that exhaust the memory of the reader.
MAX_HEADER_BYTES = 100_000_000
# Of a header and of an index of shards, in which a tensor takes eight and one: Python needs 100 times their bytes.
MAX_VALUES = 1_000_000
# numpy's own limit (NPY_MAXDIMS).
MAX_DIMENSIONS = 64
# Of lists and objects inside each other: that of the library's parser.
MAX_DEPTH = 127
_FIELDS = ("dtype", "shape", "data_offsets")

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
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        raise CheckpointError(f"{where}: the header starts with {quote(raw[:4])}, expected '{{' (is the file damaged?)")
    entries = _parse_header(raw, f"{where}: header")
    metadata = _metadata([value for name, value in entries if name == "__metadata__"], where)
    described = {name: _described(name, entry, where) for name, entry in entries if name != "__metadata__"}
    tensors = {name: _tensor(name, fields, 8 + length, where) for name, fields in described.items()}
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
    value = _parse(raw, where, object_pairs_hook=_unique_keys, parse_int=_natural)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object")
    return value


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order: of a key that appears twice it depends on the key which one counts."""


def _parse_header(raw: bytes, where: str) -> _Pairs:
    """The pairs of the header's object."""
    value = _parse(raw, where, object_pairs_hook=_Pairs, parse_int=_header_number, parse_float=_finite)
    if not isinstance(value, _Pairs):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object")
    if _depth(value) > MAX_DEPTH:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of this format")
    if b"\\ud" in raw.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
        raise CheckpointError(f"{where} is not valid JSON: it spells half of a character")
    return value


def _parse(raw: bytes, where: str, **hooks: Any) -> Any:
    try:
        input_file.count_values(raw, MAX_VALUES)
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant, **hooks)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of this format") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None


def _depth(value: Any) -> int:
    """How many lists and objects lie inside each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list)]:
        depth += 1
        level = [inner[1] if isinstance(item, _Pairs) else inner for item in level for inner in item]
    return depth


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


def _header_number(digits: str) -> int | float:
    """An integer that sizes and offsets can be, 0 .. 2^64 - 1; any other one as the fraction that no size is."""
    if digits.startswith("-") or len(digits) > 20 or int(digits) >= 2**64:
        return _finite(digits)
    return int(digits)


def _finite(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError(f"the number {quote(digits)} is out of range")
    return float(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def is_text(value: Any) -> bool:
    """Whether `value` is a string of Unicode characters: JSON escapes can also spell lone surrogates, which no file
    name and no terminal can hold."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _metadata(values: list[Any], where: str) -> dict[str, str]:
    """values: of every __metadata__ in the header, of which there may be one."""
    if len(values) > 1:
        raise CheckpointError(f"{where}: header: __metadata__ appears twice")
    value = values[0] if values else None
    if value is None:
        return {}
    if not isinstance(value, _Pairs) or not all(is_text(text) for pair in value for text in pair):
        raise CheckpointError(f"{where}: header: __metadata__ is {quote(_plain(value))}, expected an object of strings")
    return dict(value)


def _plain(value: Any) -> Any:
    """A value as Python shows it, for messages."""
    return dict(value) if isinstance(value, _Pairs) else value


def _fields(entry: Any) -> dict[str, Any] | None:
    """dtype, shape and data_offsets of a tensor, by name or in a list of these three; None for anything else."""
    if not isinstance(entry, _Pairs):
        return dict(zip(_FIELDS, entry, strict=True)) if isinstance(entry, list) and len(entry) == 3 else None
    known = [pair for pair in entry if pair[0] in _FIELDS]
    return dict(known) if sorted(name for name, _ in known) == sorted(_FIELDS) else None


def _described(name: str, entry: Any, where: str) -> dict[str, Any]:
    """What the header says of a tensor, of the right types."""
    at = f"{where}: tensor {quote(name)}"
    fields = _fields(entry)
    if fields is None:
        raise CheckpointError(
            f"{at} is described by {quote(_plain(entry))}, expected dtype, shape and data_offsets, once"
        )
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise CheckpointError(f"{at} has dtype {quote(fields['dtype'])}, expected one of {', '.join(DTYPES)}")
    if not _integers(fields["shape"]):
        raise CheckpointError(
            f"{at} has shape {quote(_plain(fields['shape']))}, expected a list of sizes that fit into memory"
        )
    offsets = fields["data_offsets"]
    if not _integers(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{at} has data_offsets {quote(_plain(offsets))}, expected [begin, end] with begin <= end"
        )
    return fields


def _tensor(name: str, fields: dict[str, Any], data_start: int, where: str) -> TensorInfo:
    at = f"{where}: tensor {quote(name)}"
    dtype, bits = DTYPES[fields["dtype"]]
    shape, offsets = fields["shape"], fields["data_offsets"]
    if len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) * bits >= 2**63:
        raise CheckpointError(f"{at} has shape {quote(shape)}, expected a list of sizes that fit into memory")
    if offsets[0] > offsets[1]:
        raise CheckpointError(f"{at} has data_offsets {quote(offsets)}, expected [begin, end] with begin <= end")
    total_bits, found = math.prod(shape) * bits, offsets[1] - offsets[0]
    if total_bits != found * 8:
        raise CheckpointError(
            f"{at} occupies {found} bytes, but shape {shape} of {fields['dtype']} takes {total_bits / 8:.15g}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _integers(value: Any) -> bool:
    return type(value) is list and all(type(item) is int for item in value)


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
