"""Checkpoint files: what other libraries write is read, what we write they read, what is broken is refused."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from refllm.errors import CheckpointError
from refllm.storage import checkpoint_writer
from refllm.storage.checkpoint import Checkpoint, save_checkpoint
from refllm.storage.safetensors_format import DTYPES, MAX_HEADER_BYTES, WEIGHT_DTYPES

INDEX = "model.safetensors.index.json"


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def torch_bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refusal(path: Path) -> str:
    """The message with which a checkpoint is refused: one line, of a length that a person reads."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500 + 2 * len(str(path))
    return message


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, and with a false header length on demand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator, dtype=torch.float64) * 1e-3
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-7, 65504.0, 1e-40])
    return {
        "matrix": values.to(dtype),
        "special": special.to(dtype),
        "scalar": torch.tensor(3.0, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "name with spaces, \u00fcml\u00e4ut": torch.ones(3, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_file_written_by_safetensors_reads_equal(tmp_path: Path, dtype: str) -> None:
    tensors = tensors_of(getattr(torch, dtype))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.names) == set(tensors)
        assert checkpoint.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert checkpoint.dtype(name) == dtype
            assert checkpoint.shape(name) == tuple(tensor.shape) == checkpoint.view(name).shape
            assert bits(checkpoint.view(name)) == torch_bits(tensor)
            for target in (np.float32, np.float64):
                expected = tensor.to(torch.float64 if target is np.float64 else torch.float32).numpy()
                np.testing.assert_array_equal(checkpoint.read(name, target), expected)
                assert checkpoint.read(name, target).dtype == target


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_upcast_is_exact_for_every_number_of_a_16_bit_dtype(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    save_file({"all": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("all"), tensor.float().numpy())
    np.testing.assert_array_equal(checkpoint.read("all", np.float64), tensor.double().numpy())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("max_shard_bytes", [64, 5_000_000_000])
def test_written_checkpoint_holds_what_torch_rounds_to(tmp_path: Path, dtype: str, max_shard_bytes: int) -> None:
    tensors = tensors_of(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = save_checkpoint(
            tmp_path, {name: tensor.numpy() for name, tensor in tensors.items()}, dtype, max_shard_bytes=max_shard_bytes
        )
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert len(paths) == 1 or {path.name for path in paths} >= {
        INDEX,
        f"model-00001-of-{len(paths) - 1:05d}.safetensors",
    }
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            found |= load_file(path)
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    assert set(found) == set(tensors)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            expected = tensor.to(getattr(torch, dtype))
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name].nan_to_num(7.0), expected.nan_to_num(7.0))
            assert bits(checkpoint.view(name)) == torch_bits(found[name])


def test_a_tensor_is_written_in_the_bytes_of_safetensors(tmp_path: Path) -> None:
    tensor = torch.arange(3, dtype=torch.float32)
    save_file({"\u00fcml\u00e4ut": tensor}, tmp_path / "theirs", metadata={"format": "pt"})
    (path,) = save_checkpoint(tmp_path / "ours", {"\u00fcml\u00e4ut": tensor.numpy()}, "float32")
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(WEIGHT_DTYPES))
@settings(max_examples=examples(150, 300))
def test_downcast_equals_torch(values: list[float], dtype: str) -> None:
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(getattr(torch, dtype))
    assert bits(checkpoint_writer.downcast(array, dtype)) == torch_bits(expected)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_downcast_of_float64_equals_torch_which_rounds_twice(dtype: str) -> None:
    # Just above a tie of bfloat16, and of float16: float32 puts them on the tie, which then goes to the even neighbour.
    values = np.array([1 + 2**-8 + 2**-40, 1 + 2**-11 + 2**-40, 1e300, -1e-300, np.pi])
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    assert bits(checkpoint_writer.downcast(values, dtype)) == torch_bits(expected)


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), limit=st.integers(1, 60))
@settings(max_examples=examples(50, 100))
def test_shards_are_filled_in_order_up_to_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    save_checkpoint(folder, {f"t{i}": np.zeros(size) for i, size in enumerate(sizes)}, "float32", max_shard_bytes=limit)
    shards = [
        [4 * shape[0] for shape, _ in (library_reads(path) or {}).values()] for path in Checkpoint.open(folder).files
    ]
    assert len(list(folder.glob("*.safetensors"))) == len(shards), "an empty shard"
    assert sum(map(len, shards)) == len(sizes)
    assert all(sum(shard) <= limit or len(shard) == 1 for shard in shards)
    rest = [4 * size for size in sizes]
    for shard, following in pairwise(shards):
        rest = rest[len(shard) :]
        assert sum(shard) + rest[0] > limit, "the next tensor would have fitted"
        assert following


def test_tensors_are_aligned_and_read_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"odd name": np.ones(3), "b": np.ones((2, 2))}, "float64")
    for name in ("odd name", "b"):
        view = Checkpoint.open(tmp_path).view(name)
        assert view.flags.aligned
        assert not view.flags.writeable


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    data = np.arange(6, dtype="<f4").tobytes()
    header = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}' + b" "
    assert (8 + len(header)) % 4
    checkpoint = Checkpoint.open(raw_file(tmp_path / "model.safetensors", header, data).parent)
    assert not checkpoint.view("a").flags.aligned
    np.testing.assert_array_equal(checkpoint.read("a"), np.arange(6).reshape(2, 3))


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": np.ones(5)}, "float32")
    checkpoint = Checkpoint.open(tmp_path)
    view = checkpoint.view("a")
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(view, 1)
    with pytest.raises(CheckpointError, match="was closed before"):
        checkpoint.view("a")


def test_single_file_is_preferred_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": np.ones(5)}, "float32")
    (tmp_path / INDEX).write_text("not even JSON")
    assert Checkpoint.open(tmp_path).names == ("a",)
    assert Checkpoint.open(tmp_path / "model.safetensors").names == ("a",)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": np.ones(5), "b": np.ones(5)}, "float32", max_shard_bytes=20)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def pairs() -> Any:
        yield "a", np.zeros(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, pairs(), "float32", shapes={"a": (5,), "b": (5,)}, max_shard_bytes=20)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_crash_between_renames_never_leaves_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new shards have the same names, sizes and tensors: only the order of the renames keeps them apart."""

    def save(value: float) -> None:
        save_checkpoint(
            tmp_path, {name: np.full(5, value) for name in "abc"}, "float32", max_shard_bytes=20, metadata={}
        )

    replace = os.replace
    for crash_at in range(4):
        save(1.0)
        renames = iter(range(10))

        def crash(source: Any, target: Any, *, at: int = crash_at, renames: Any = renames) -> None:
            if next(renames) == at:
                raise OSError(5, "crash")
            replace(source, target)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(2.0)
        monkeypatch.setattr(os, "replace", replace)
        refusal(tmp_path)


@pytest.mark.parametrize(("first", "second"), [(20, 1000), (1000, 20), (20, 40), (40, 20)])
def test_saving_again_replaces_the_earlier_checkpoint(tmp_path: Path, first: int, second: int) -> None:
    (tmp_path / "other.safetensors").write_text("not ours")
    save_checkpoint(tmp_path, {name: np.ones(5) for name in "abcd"}, "float32", max_shard_bytes=first)
    paths = save_checkpoint(tmp_path, {name: np.zeros(5) for name in "abcd"}, "float32", max_shard_bytes=second)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths} | {"other.safetensors"}
    checkpoint = Checkpoint.open(tmp_path)
    assert all(not checkpoint.read(name).any() for name in "abcd")


class Lazy(Mapping[str, np.ndarray]):
    """Tensors that are made on demand, and a list of the demands."""

    def __init__(self) -> None:
        self.shapes = {"a": (4,), "b": (2, 3)}
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> np.ndarray:
        self.asked.append(name)
        return np.zeros(self.shapes[name], np.float32)

    def __iter__(self) -> Any:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_lazy_mapping_is_asked_once_per_tensor(tmp_path: Path) -> None:
    lazy = Lazy()
    save_checkpoint(tmp_path, lazy, "bfloat16")
    assert lazy.asked == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tensors": {}, "dtype": "float32"}, "no tensors to write"),
        ({"tensors": {"a": np.ones(2)}, "dtype": "int8"}, "dtype='int8' is not a weight dtype"),
        ({"tensors": {"a": np.ones(2, np.int64)}, "dtype": "float32"}, "'a' has dtype int64"),
        ({"tensors": {"__metadata__": np.ones(2)}, "dtype": "float32"}, "cannot be the name of a tensor"),
        ({"tensors": {"a\ud800": np.ones(2)}, "dtype": "float32"}, "cannot be the name of a tensor"),
        ({"tensors": {"a": np.ones(2)}, "dtype": "float32", "shapes": {"a": (3,)}}, r"shape \[2\], expected \[3\]"),
        ({"tensors": [("b", np.ones(2))], "dtype": "float32", "shapes": {"a": (2,)}}, "'a' next, found 'b'"),
        ({"tensors": [], "dtype": "float32", "shapes": {"a": (2,)}}, "'a' next, found None"),
        ({"tensors": [("a", np.ones(2))] * 2, "dtype": "float32"}, "given twice"),
        ({"tensors": [("a", np.ones(2))] * 2, "dtype": "float32", "shapes": {"a": (2,)}}, "more tensors were given"),
        ({"tensors": {"a": np.ones(2)}, "dtype": "float32", "max_shard_bytes": 0}, "max_shard_bytes=0"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_appears(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        save_checkpoint(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file", {"a": np.ones(2)}, "float32")


def test_numbers_too_large_for_the_dtype_are_reported(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'a': 2 finite numbers are too large for float16"):
        save_checkpoint(tmp_path, {"a": np.array([1e5, 1.0, -1e6, np.inf, np.nan], np.float32)}, "float16")


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    return path


def test_truncation_at_every_byte_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    Checkpoint.open(small.parent).close()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        assert ("truncated" if length >= 8 else "too short") in refusal(small.parent)
    small.write_bytes(whole + b"\0")
    assert "1 bytes at the end of the file belong to no tensor" in refusal(small.parent)


def library_reads(path: Path) -> dict[str, tuple[list[int], bytes]] | None:
    """Shapes and bytes of the weights as the safetensors library sees them, or None where it refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: part.get_shape() for name, part in slices.items()}
            weights = [name for name, part in slices.items() if DTYPES[part.get_dtype()][0] in WEIGHT_DTYPES]
            return {name: (shapes[name], torch_bits(file.get_tensor(name))) for name in weights}
    except Exception:
        return None


def read_or_refused(path: Path) -> bool:
    """Open and read everything; True if that works, and then the library must see the same. Only CheckpointError may
    come out otherwise."""
    ours, message = None, ""
    try:
        with Checkpoint.open(path) as checkpoint:
            ours = {
                name: (list(checkpoint.shape(name)), bits(checkpoint.weight(name)))
                for name in checkpoint.names
                if checkpoint.dtype(name) in WEIGHT_DTYPES
            }
            for name in ours:
                checkpoint.read(name)
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()
    if message and not ("fit into memory" in message or "holds no tensors" in message):
        with pytest.raises(SafetensorError):
            safe_open(path, "np")
    assert message or library_reads(path) == ours
    return not message


def test_every_flipped_bit_of_the_header_is_read_as_the_library_does_or_refused(small: Path) -> None:
    whole = small.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    accepted = 0
    for bit in range(8 * header):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        small.write_bytes(damaged)
        accepted += read_or_refused(small)
    # Flips inside a name or a metadata string, or of F32 into U32 or I32, give another legal file.
    assert 0 < accepted < 2 * header


@pytest.mark.parametrize("length", [0, 1, 7, MAX_HEADER_BYTES + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_absurd_header_length_is_refused(tmp_path: Path, length: int) -> None:
    header = {"a": entry("F32", [1], 0, 4)}
    raw_file(tmp_path / "model.safetensors", header, b"1234", length=length)
    message = refusal(tmp_path)
    if length > MAX_HEADER_BYTES:
        assert f"header length {length} is above the limit" in message


def test_header_larger_than_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 3 * MAX_HEADER_BYTES)  # sparse: takes no room on the disk
    assert "above the limit" in refusal(tmp_path)


A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EIGHT = b"\0" * 8
BROKEN_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12, "overlaps"),
    "same bytes twice": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, EIGHT, "overlaps"),
    "hole": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12, "leaves a hole"),
    "hole at the start": ({"a": entry("F32", [1], 4, 8)}, EIGHT, "leaves a hole"),
    "past the end": ({"a": entry("F32", [2**40], 0, 2**42)}, EIGHT, "truncated"),
    "data left over": ({"a": entry("F32", [1], 0, 4)}, EIGHT, "4 bytes at the end"),
    "offsets reversed": ({"a": entry("F32", [2], 8, 0)}, EIGHT, "begin <= end"),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, EIGHT, "begin <= end"),
    "negative offset": ({"a": entry("F32", [2], -8, 0)}, EIGHT, "begin <= end"),
    "offset of 2^80": ({"a": entry("F32", [2], 0, 2**80)}, EIGHT, "begin <= end"),
    "fractional offset": ({"a": entry("F32", [2], 0, 8.0)}, EIGHT, "begin <= end"),  # type: ignore[arg-type]
    "boolean offset": ({"a": entry("U8", [1], False, True)}, b"\0", "begin <= end"),
    "shape too large": ({"a": entry("F32", [3], 0, 8)}, EIGHT, "occupies 8 bytes, but shape [3] of F32 takes 12"),
    "shape too small": ({"a": entry("F32", [1], 0, 8)}, EIGHT, "takes 4"),
    "negative shape": ({"a": entry("F32", [-1, -2], 0, 8)}, EIGHT, "fit into memory"),
    "shape that overflows": ({"a": entry("F32", [2**62, 4, 0], 0, 0)}, b"", "fit into memory"),
    "shape of 65 axes": ({"a": entry("F32", [1] * 64 + [2], 0, 8)}, EIGHT, "fit into memory"),
    "shape that is no list": ({"a": entry("F32", 2, 0, 8)}, EIGHT, "fit into memory"),  # type: ignore[arg-type]
    "half a byte": ({"a": entry("F4", [1], 0, 0)}, b"", "takes 0.5"),
    "unknown dtype": ({"a": entry("F7", [2], 0, 8)}, EIGHT, "dtype 'F7', expected one of F64, F32"),
    "lower-case dtype": ({"a": entry("f32", [2], 0, 8)}, EIGHT, "dtype 'f32'"),
    "dtype list": ({"a": entry(["F32"], [2], 0, 8)}, EIGHT, "has dtype ['F32']"),  # type: ignore[arg-type]
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT, "expected dtype, shape and data_offsets"),
    "tensor null": ({"a": None}, b"", "described by None"),
    "duplicate tensor of other bytes": (f"{{{A},{A.replace('0,8', '8,16')}}}".encode(), EIGHT * 2, "leaves a hole"),
    "duplicate tensor, the first null": (f'{{"a":null,{A}}}'.encode(), EIGHT, "described by None"),
    "duplicate dtype": (b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,8]}}', EIGHT, "once"),
    "duplicate metadata": (f'{{"__metadata__":null,"__metadata__":{{}},{A}}}'.encode(), EIGHT, "appears twice"),
    "metadata list": (f'{{"__metadata__":["x"],{A}}}'.encode(), EIGHT, "expected an object of strings"),
    "metadata number": (f'{{"__metadata__":{{"x":1}},{A}}}'.encode(), EIGHT, "expected an object of strings"),
    "surrogate in a name": (
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
        "half of a character",
    ),
    "surrogate in a field that is skipped": (f'{{{A[:-1]},"x":"\\ud800"}}}}'.encode(), EIGHT, "half of a character"),
    "not UTF-8": (f"{{{A}}}".replace('"a"', '"\xff"').encode("latin-1"), EIGHT, "not valid JSON"),
    "NaN": (b'{"a":NaN}', b"", "NaN is not a JSON value"),
    "array": (b"[1, 2]  ", b"", "starts with b'[1, '"),
    "cut JSON": (f"{{{A}"[:-1].encode(), EIGHT, "not valid JSON"),
    "text after JSON": (f"{{{A}}}x".encode(), EIGHT, "not valid JSON"),
    "nested too deeply": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "too deeply"),
    "nested too deeply in a field that is skipped": (
        f'{{{A[:-1]},"x":{"[" * 126}{"]" * 126}}}}}'.encode(),
        EIGHT,
        "too deeply",
    ),
    "number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "out of range"),
    "long name": ({"n" * 100_000: entry("F7", [2], 0, 8)}, EIGHT, "dtype 'F7'"),
    "newline in a name": ({"n\n\x1b[31m": entry("F7", [2], 0, 8)}, EIGHT, r"'n\n\x1b[31m'"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, b"", "holds no tensors"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_header_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    header, data, said = BROKEN_HEADERS[case]
    raw_file(tmp_path / "model.safetensors", header, data)
    assert said in refusal(tmp_path)


ODD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "metadata null": ({"__metadata__": None, "a": entry("F32", [2], 0, 8)}, EIGHT),
    "metadata empty": ({"__metadata__": {}, "a": entry("F32", [2], 0, 8)}, EIGHT),
    "metadata key twice": (f'{{"__metadata__":{{"x":"1","x":"2"}},{A}}}'.encode(), EIGHT),
    "metadata spelled with an escape": (f'{{"\\u005f_metadata__":{{"x":"1"}},{A}}}'.encode(), EIGHT),
    "a field that nobody knows": ({"a": {**entry("F32", [2], 0, 8), "strides": [4, -1, 0.5, None, "x", {}]}}, EIGHT),
    "such a field twice": (f'{{{A[:-1]},"x":1,"x":2}}}}'.encode(), EIGHT),
    "such a field, as deep as it may be": (f'{{{A[:-1]},"x":{"[" * 125}{"]" * 125}}}}}'.encode(), EIGHT),
    "such a field, a long number": (f'{{{A[:-1]},"x":{"9" * 300}}}}}'.encode(), EIGHT),
    "a tensor as a list": ({"a": ["F32", [2], [0, 8]]}, EIGHT),
    "a tensor twice": (f"{{{A},{A}}}".encode(), EIGHT),
    "a tensor twice, the first of a wrong size": (f"{{{A.replace('[2]', '[9]')},{A}}}".encode(), EIGHT),
    "spaces after": (f"{{{A}}} \t\r\n ".encode(), EIGHT),
    "spaces before": (f" \t\r\n{{{A}}}".encode(), EIGHT),
    "not in the order of the data": ({"b": entry("F32", [1], 4, 8), "a": entry("F32", [1], 0, 4)}, EIGHT),
    "empty tensors everywhere": (
        {"z": entry("F32", [0], 8, 8), "a": entry("F32", [2], 0, 8), "e": entry("F16", [3, 0, 2], 0, 0)},
        EIGHT,
    ),
    "not aligned": ({"x": entry("U8", [1], 0, 1), "a": entry("F32", [1], 1, 5)}, EIGHT[:5]),
    "names of nothing and of escapes": ({"": entry("U8", [4], 0, 4), "\n\0\U0001f600": entry("U8", [4], 4, 8)}, EIGHT),
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_odd_header_is_read_as_the_library_reads_it(tmp_path: Path, case: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", *ODD_HEADERS[case])
    assert read_or_refused(path)
    with safe_open(path, "np") as file, Checkpoint.open(path) as checkpoint:
        assert checkpoint.metadata == (file.metadata() or {})


@pytest.mark.parametrize(
    "case", [name for name, (*_, said) in BROKEN_HEADERS.items() if said not in ("fit into memory", "holds no tensors")]
)
def test_what_is_refused_is_refused_by_the_library_too(tmp_path: Path, case: str) -> None:
    header, data, _ = BROKEN_HEADERS[case]
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SafetensorError):
        safe_open(path, "np")


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path)


@pytest.mark.parametrize("new_zip_format", [True, False])
def test_pickle_renamed_to_safetensors_is_named(tmp_path: Path, new_zip_format: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=new_zip_format)
    assert "PyTorch pickle" in refusal(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit('the pickle was opened')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert f"{name}: pickle files are not read" in refusal(tmp_path)
    assert f"{name}: pickle files are not read" in refusal(tmp_path / name)
    save_checkpoint(tmp_path, {"a": np.ones(3)}, "float32")
    assert Checkpoint.open(tmp_path).names == ("a",)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "there are no weights, expected model.safetensors or model.safetensors.index.json" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "no such folder" in refusal(tmp_path / "config.json")
    assert "cannot be read: No such file" in refusal(tmp_path / "absent.safetensors")


def test_things_that_are_no_files_are_refused_without_waiting(tmp_path: Path) -> None:
    for kind in ("folder", "pipe", "dangling link", "loop"):
        folder = tmp_path / kind
        folder.mkdir()
        path = folder / "model.safetensors"
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("absent" if kind == "dangling link" else path.name)
        refusal(folder)
        path.rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
        refusal(folder)
        (folder / INDEX).unlink()
        (folder / "a.safetensors").rename(folder / INDEX)
        refusal(folder)


@pytest.mark.parametrize("code", ["I64", "F8_E4M3", "F8_E5M2", "BOOL", "U8", "F4", "F6_E2M3"])
def test_dtype_that_is_no_weight_opens_but_does_not_read(tmp_path: Path, code: str) -> None:
    name, width = DTYPES[code]
    raw_file(tmp_path / "model.safetensors", {"a": entry(code, [8], 0, width)}, b"\0" * width)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype("a") == name
    with pytest.raises(CheckpointError, match=f"'a' is stored as {name}, expected one of float64, float32"):
        checkpoint.read("a")
    if width >= 8:
        assert checkpoint.view("a").shape == (8,)
    else:
        with pytest.raises(CheckpointError, match="packed"):
            checkpoint.view("a")


def test_every_dtype_of_the_table_has_the_size_that_the_library_knows(tmp_path: Path) -> None:
    for code, (_, width) in DTYPES.items():
        path = raw_file(tmp_path / "model.safetensors", {"a": entry(code, [8], 0, width)}, b"\0" * width)
        with safe_open(path, "numpy") as file:
            assert file.get_slice("a").get_dtype() == code


def test_unknown_tensor_is_a_checkpoint_error(small: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no tensor 'c' among the 2"):
        Checkpoint.open(small.parent).shape("c")


# --- broken indices --------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    save_checkpoint(folder, {name: np.ones(5) for name in "abc"}, "float32", max_shard_bytes=20)
    return folder


FIRST = "model-00001-of-00003.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    changed = change(index)
    (folder / INDEX).write_text(json.dumps(index if changed is None else changed))


def first_shard(name: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update(a=name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../outside.safetensors", "not the name of a .safetensors file in the same folder"),
        ("./model-00001-of-00003.safetensors", "not the name of"),
        ("sub/model.safetensors", "not the name of"),
        ("/etc/passwd", "not the name of"),
        ("{tmp}/outside.safetensors", "not the name of"),
        ("..\\outside.safetensors", "not the name of"),
        ("a\0.safetensors", "not the name of"),
        ("..", "not the name of"),
        ("", "not the name of"),
        ("config.json", "not the name of"),
        ("n" * 5000 + ".safetensors", "is missing from"),
        ("pytorch_model-00001-of-00002.bin", "pickle files are not read"),
        ("model-00009-of-00009.safetensors", "'model-00009-of-00009.safetensors' is missing from"),
        ("model-00002-of-00003.safetensors", "tensor 'a' should be in model-00002-of-00003.safetensors, but"),
        (None, "expected an object of tensor to file name"),
        (3, "expected an object of tensor to file name"),
        ("\ud800.safetensors", "expected an object of tensor to file name"),
    ],
)
def test_shard_outside_the_folder_or_missing_is_refused(sharded: Path, name: Any, said: str) -> None:
    save_checkpoint(sharded.parent, {"a": np.ones(5)}, "float32")
    (sharded.parent / "model.safetensors").rename(sharded.parent / "outside.safetensors")
    rewrite(sharded, first_shard(name.replace("{tmp}", str(sharded.parent)) if isinstance(name, str) else name))
    assert said in refusal(sharded)


@pytest.mark.parametrize("target", ["file", "folder"])
def test_shard_linked_from_outside_is_refused(sharded: Path, target: str) -> None:
    outside = sharded.parent / "outside"
    outside.mkdir()
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.rename(outside / shard.name)
    if target == "file":
        shard.symlink_to(outside / shard.name)
    else:
        (sharded / "inner").symlink_to(outside)
        shard.symlink_to(Path("inner") / shard.name)
    assert "lies outside the folder" in refusal(sharded)


def test_links_inside_the_folder_and_into_the_hub_cache_are_followed(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.rename(sharded / "target")
    shard.symlink_to("target")
    assert len(Checkpoint.open(sharded)) == 3
    snapshot = sharded.parent / "models--someone--model" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sharded.iterdir():
        (blobs / f"hash-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    assert len(Checkpoint.open(snapshot)) == 3


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "shard 'model-00002-of-00003.safetensors' is missing" in refusal(sharded)


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    message = refusal(sharded)
    assert "model-00002-of-00003.safetensors: the file is truncated" in message


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"b": torch.ones(5), "a": torch.ones(5)}, sharded / "model-00002-of-00003.safetensors")
    message = refusal(sharded)
    assert "tensor 'a' is in both" in message
    assert "model-00002-of-00003.safetensors" in message


def test_tensor_that_the_index_leaves_out_is_refused(sharded: Path) -> None:
    rewrite(sharded, lambda index: dict(index, weight_map={"a": FIRST, "b": FIRST.replace("1", "2", 1)}))
    save_file({"b": torch.ones(5), "c": torch.ones(5)}, sharded / "model-00002-of-00003.safetensors")
    assert "tensor 'c' of model-00002-of-00003.safetensors is not in the index" in refusal(sharded)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[]", "is a JSON list, expected an object"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": ["a"]}', "weight_map is ['a']"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "key 'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"weight_map": {"a": NaN}}', "NaN is not a JSON value"),
    ],
)
def test_broken_index_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert said in refusal(tmp_path)


def test_index_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b'{"weight_map": {"\xff": "a"}}')
    assert "not valid JSON" in refusal(tmp_path)


# --- fuzzing ---------------------------------------------------------------------------------------------------------

# One file for all examples of a fuzz test: a function-scoped fixture would be shared by the examples in any case.
GOOD = {
    "__metadata__": {"format": "pt"},
    "a": entry("F32", [2, 3], 0, 24),
    "b": entry("BF16", [4], 24, 32),
    "c": entry("I64", [], 32, 40),
}
DATA = bytes(range(40))
edits = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from("rid"), st.binary(max_size=4)), min_size=1, max_size=6
)
interesting = st.one_of(
    st.sampled_from([0, 1, 2, 3, 8, 24, 32, 40, -1, 2**31, 2**32, 2**63, 2**64, 2**64 - 1, 1e999, 0.5, True, None, ""]),
    st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F4", "a", "b", "__metadata__", "dtype", "shape", "\ud800"]),
)
json_values = st.recursive(
    interesting | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def fuzz_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def edited(data: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    for position, kind, new in changes:
        at = position % (len(data) + 1)
        end = at if kind == "i" else at + max(1, len(new))
        data = data[:at] + (b"" if kind == "d" else new) + data[end:]
    return data


def test_fuzz_starts_from_a_file_that_reads(fuzz_file: Path) -> None:
    assert read_or_refused(raw_file(fuzz_file, GOOD, DATA))


@given(changes=edits, fix_length=st.booleans())
@settings(max_examples=examples(300, 1500))
def test_fuzzed_header_bytes_read_or_are_refused(
    fuzz_file: Path, changes: list[tuple[int, str, bytes]], fix_length: bool
) -> None:
    text = json.dumps(GOOD).encode()
    if fix_length:
        raw_file(fuzz_file, edited(text, changes), DATA)
    else:
        fuzz_file.write_bytes(edited(len(text).to_bytes(8, "little") + text + DATA, changes))
    read_or_refused(fuzz_file)


@given(path=st.lists(st.integers(0, 3), max_size=4), value=json_values, extra=st.integers(-3, 3))
@settings(max_examples=examples(300, 1500))
@example(path=[0], value=None, extra=0)
def test_fuzzed_header_json_reads_or_is_refused(fuzz_file: Path, path: list[int], value: Any, extra: int) -> None:
    data = DATA + b"\0" * extra if extra > 0 else DATA[: len(DATA) + extra]
    raw_file(fuzz_file, substituted(GOOD, path, value), data)
    read_or_refused(fuzz_file)


def substituted(tree: Any, path: list[int], value: Any) -> Any:
    """`tree` with `value` in place of the node that `path` leads to."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = substituted(tree[key], path[1:], value)
    return copy


@given(st.binary(max_size=200))
@settings(max_examples=examples(150, 300))
def test_arbitrary_bytes_read_or_are_refused(fuzz_file: Path, content: bytes) -> None:
    fuzz_file.write_bytes(content)
    read_or_refused(fuzz_file)


@given(
    sizes=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=5),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=examples(150, 300))
def test_every_legal_file_opens(fuzz_file: Path, sizes: list[tuple[str, list[int]]], shuffle: Any) -> None:
    header, offset = {}, 0
    for number, (code, shape) in enumerate([*sizes, ("F32", [2])]):
        width = DTYPES[code][1] * int(np.prod(shape, dtype=int))
        if width % 8 == 0:
            header[f"t{number}"] = entry(code, shape, offset, offset + width // 8)
            offset += width // 8
    items = list(header.items())
    shuffle.shuffle(items)
    raw_file(fuzz_file, dict(items), bytes(i % 251 for i in range(offset)))
    assert read_or_refused(fuzz_file)


@given(path=st.lists(st.integers(0, 3), max_size=3), value=json_values | st.sampled_from(["../x", "x", "model", "."]))
@settings(max_examples=examples(150, 500))
def test_fuzzed_index_reads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, path: list[int], value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-index"
    if not folder.exists():
        save_checkpoint(folder, {name: np.ones(5) for name in "abc"}, "float32", max_shard_bytes=20)
        (folder / INDEX).rename(folder / "good.json")
    index = json.loads((folder / "good.json").read_text())
    (folder / INDEX).write_text(json.dumps(substituted(index, path, value)))
    with contextlib.suppress(CheckpointError):
        assert Checkpoint.open(folder).names == ("a", "b", "c")


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, numpy as np
from refllm.storage.checkpoint import Checkpoint, save_checkpoint

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def made(count, rows):
    for number in range(count):
        yield f"t{number}", np.full((rows, 1024), number, np.float32)

folder, action = sys.argv[1:]
base = resident("RssAnon")
if action == "write":
    shapes = {f"t{number}": (2048, 1024) for number in range(24)}
    save_checkpoint(folder, made(24, 2048), "bfloat16", shapes=shapes, max_shard_bytes=40_000_000)
    peak = resident("VmHWM") - resident("RssFile")
elif action == "view":
    checkpoint = Checkpoint.open(folder)
    total = sum(int(checkpoint.view(name).view(np.uint16).max()) for name in checkpoint.names)
    peak = resident("RssAnon")
elif action == "read":
    checkpoint = Checkpoint.open(folder)
    total = sum(float(checkpoint.read(name).max()) for name in checkpoint.names)
    assert total == sum(range(24))
    peak = resident("RssAnon")
    assert resident("RssFile") < 60e6, "pages of the map were not let go"
print(peak - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc/self/status")
def test_reading_and_writing_100_mb_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """24 tensors of 4 MiB in bfloat16, 8 MiB in float32: 100 MB on disk."""
    for action, limit in (("write", 40e6), ("view", 4e6), ("read", 20e6)):
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), action], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) < limit, f"{action}: {int(result.stdout) / 1e6:.0f} MB of anonymous memory"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 100e6
