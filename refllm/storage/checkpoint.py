"""Checkpoints on disk: one model.safetensors, or shards with a model.safetensors.index.json, memory-mapped.

    with Checkpoint.open(folder) as checkpoint:
        checkpoint.names                       ("model.embed_tokens.weight", ...)
        checkpoint.view(name)                  the stored numbers, in place in the file
        checkpoint.read(name)                  the same as a new float32 array

Opening reads the headers only and checks all of them. Whatever is wrong with a file or an index ends in a
CheckpointError of one sentence; pickles are refused by name and never opened.

While a file is mapped it may be replaced (by a rename, as refllm and most programs write), which leaves the map as it
is, but it must not be changed in place. A change is noticed at the next access, by size and time of change, and is a
CheckpointError; what was read in the very moment of the change is not, and a file that is cut short then ends the
process, by the operating system.
"""

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from refllm.errors import CheckpointError
from refllm.storage import input_file
from refllm.storage.checkpoint_writer import save_checkpoint
from refllm.storage.hub_cache import local_folder
from refllm.storage.safetensors_format import (
    MAX_HEADER_BYTES,
    WEIGHT_DTYPES,
    TensorInfo,
    is_text,
    parse_json_object,
    quote,
    read_header,
)
from refllm.storage.upcast import upcast

__all__ = ["Checkpoint", "one_model", "save_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@contextlib.contextmanager
def one_model(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Around the reading of config.json and the opening of the weights that go with it.

    Raises CheckpointError at the end if config.json is not the file that it was: then another model was saved in the
    folder meanwhile, and what was read may be some of each.
    """
    path = Path(folder, "config.json")
    before = _identity(path)
    yield
    if _identity(path) != before:
        raise CheckpointError(f"{folder}: another model was saved here while this one was read; load it again")


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Checkpoint:
    """The tensors of a checkpoint folder under the names that its files give them."""

    def __init__(self, files: Mapping[str, "MappedFile"], path: Path) -> None:
        """Use `Checkpoint.open`. `files` maps file names to mapped files; no tensor may be in two of them."""
        self.path = path
        self._files = files
        self._owner: dict[str, MappedFile] = {}
        for file in files.values():
            for name in file.tensors:
                if name in self._owner:
                    raise CheckpointError(
                        f"{path}: tensor {quote(name)} is in both {self._owner[name].label} and {file.label}"
                    )
                self._owner[name] = file
        if not self._owner:
            raise CheckpointError(f"{path}: the checkpoint holds no tensors")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The checkpoint in a folder, or in one .safetensors file. model.safetensors is preferred over an index.

        Raises CheckpointError where there is no checkpoint or where anything about it is inconsistent.
        """
        path = local_folder(path)
        try:
            return cls(_open_files(path), path)
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the files and of the data inside each."""
        return tuple(self._owner)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self._files.values())

    @property
    def metadata(self) -> dict[str, str]:
        """The string metadata of all files together, {"format": "pt"} as a rule."""
        return {key: value for file in self._files.values() for key, value in file.metadata.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(self._info(name).nbytes for name in self._owner)

    def __contains__(self, name: object) -> bool:
        return name in self._owner

    def __len__(self) -> int:
        return len(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """Stored dtype by name: "bfloat16", "float16", "float32", "float64", or one that is no weight, as "int64"."""
        return self._info(name).dtype

    def view(self, name: str) -> NDArray[Any]:
        """The stored numbers as a read-only array over the memory map: no copy, and no anonymous memory.

        Raises CheckpointError for an unknown name, a closed checkpoint, or a packed dtype that NumPy has no array for.
        """
        return self._mapped(name).view(name)

    def read(self, name: str, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """A new C-contiguous array of `dtype` (float32 or float64) with the stored numbers.

        Raises CheckpointError where the stored dtype is none of float64, float32, float16, bfloat16.
        """
        stored = self.weight(name)
        out = np.empty(stored.shape, dtype)
        upcast(stored.reshape(-1), out.reshape(-1))
        self.release(name)
        return out

    def weight(self, name: str) -> NDArray[Any]:
        """`view(name)`, refused with a CheckpointError unless it is stored in one of the four weight dtypes."""
        self.must_be_weight(name)
        return self.view(name)

    def must_be_weight(self, name: str) -> None:
        """Raises CheckpointError for a tensor that is stored in none of the four weight dtypes."""
        if self.dtype(name) not in WEIGHT_DTYPES:
            at = f"{self._owner[name].label}: tensor {quote(name)}"
            raise CheckpointError(f"{at} is stored as {self.dtype(name)}, expected one of {', '.join(WEIGHT_DTYPES)}")

    def makes(self, name: str) -> bool:
        """Whether `view` makes an array of what is stored, which stays in memory as long as it is held."""
        return False

    def must_be_as_opened(self, name: str) -> None:
        """Raises CheckpointError if the file of a tensor was changed in place since it was opened."""
        self._mapped(name).must_be_as_opened()

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let go of the resident pages under the bytes [start, stop) of a tensor; the next access reads them again."""
        info = self._info(name)
        self._mapped(name).release(info.begin + start, info.end if stop is None else info.begin + stop)

    def close(self) -> None:
        """Unmap the files. Arrays made by `view` stay valid: a file stays mapped until the last of them is gone."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._owner:
            raise CheckpointError(
                f"{self.path}: there is no tensor {quote(name)} among the {len(self)} of the checkpoint"
            )
        return self._owner[name].tensors[name]

    def _mapped(self, name: str) -> "MappedFile":
        self._info(name)
        return self._owner[name]


class MappedFile:
    """One safetensors file: checked header and read-only memory map. file: open already, of one without a name."""

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        self.path = path
        self.label = str(path)
        # The kind of file is asked before it is opened: opening a named pipe would wait for a writer.
        if file is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: this is not a regular file, expected a safetensors file")
        with open(path, "rb") if file is None else contextlib.nullcontext(file) as opened:
            self.tensors, self.metadata = read_header(opened, self.label)
            self._opened = os.fstat(opened.fileno())
            self._map: mmap.mmap | None = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, name: str) -> NDArray[Any]:
        info = self.tensors[name]
        dtype = _numpy_dtype(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.label}: tensor {quote(name)} is stored as packed {info.dtype}, which has no array"
            )
        if self._map is None:
            raise CheckpointError(f"{self.label}: the checkpoint was closed before tensor {quote(name)} was read")
        self.must_be_as_opened()
        if info.nbytes == 0:
            return np.empty(info.shape, dtype)
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, info.begin).reshape(info.shape)

    def must_be_as_opened(self) -> None:
        try:
            now = os.stat(self.path)
        except OSError:  # it was removed, or cannot be reached any more: the map stays
            return
        old = self._opened
        another = (now.st_dev, now.st_ino) != (old.st_dev, old.st_ino)  # in its place; the map is of the old one
        if not another and (now.st_size, now.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
            raise CheckpointError(f"{self.label}: the file was changed after it was opened; load the model again")

    def release(self, begin: int, end: int) -> None:
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if self._map is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def close(self) -> None:
        try:
            if self._map is not None:
                self._map.close()
        except BufferError:
            pass  # arrays over the map are still in use; it goes with the last of them
        self._map = None


def _numpy_dtype(name: str) -> np.dtype[Any] | None:
    """The little-endian dtype of a stored dtype; None for the packed 4-bit and 6-bit ones."""
    if name.startswith(("float4_", "float6_")):
        return None
    if hasattr(ml_dtypes, name):
        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name).newbyteorder("<")


def _open_files(path: Path) -> dict[str, MappedFile]:
    if path.suffix in PICKLE_SUFFIXES and not path.is_dir():
        raise CheckpointError(_refuse_pickle(path))
    if path.suffix == ".safetensors" and not path.is_dir():
        return {path.name: MappedFile(path)}
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder, expected a checkpoint folder with {SINGLE_FILE}")
    if os.path.lexists(path / SINGLE_FILE):
        return {SINGLE_FILE: MappedFile(path / SINGLE_FILE)}
    if os.path.lexists(path / INDEX_FILE):
        return _open_shards(path)
    for entry in sorted(path.iterdir()):
        if entry.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(_refuse_pickle(entry))
    raise CheckpointError(f"{path}: there are no weights, expected {SINGLE_FILE} or {INDEX_FILE}")


def _refuse_pickle(path: Path) -> str:
    return f"{path}: pickle files are not read, because opening one can run code; expected a safetensors file"


def _open_shards(folder: Path) -> dict[str, MappedFile]:
    index = folder / INDEX_FILE
    weight_map = _read_weight_map(index)
    files = {name: MappedFile(_shard_path(folder, name, index)) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(
                f"{index}: tensor {quote(tensor)} should be in {name}, but that file does not have it"
            )
    for name, file in files.items():
        for tensor in file.tensors:
            if tensor not in weight_map:
                raise CheckpointError(f"{index}: tensor {quote(tensor)} of {name} is not in the index")
    return files


def _read_weight_map(index: Path) -> dict[str, str]:
    raw = input_file.read_bytes(index, MAX_HEADER_BYTES)
    weight_map = parse_json_object(raw, f"{index}: the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(is_text(name) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is {quote(weight_map)}, expected an object of tensor to file name")
    return weight_map


def _shard_path(folder: Path, name: str, index: Path) -> Path:
    """The path of a shard that an index names: a plain file name, whose target lies inside the folder."""
    if Path(name).suffix in PICKLE_SUFFIXES:
        raise CheckpointError(_refuse_pickle(folder / name))
    if not name.endswith(".safetensors") or any(character in name for character in "/\\\0"):
        raise CheckpointError(f"{index}: shard {quote(name)} is not the name of a .safetensors file in the same folder")
    path = folder / name
    if not os.path.lexists(path):
        raise CheckpointError(f"{index}: shard {quote(name)} is missing from {folder}")
    target = Path(os.path.realpath(path))  # a loop of links is left as it is, and cannot be opened
    if not any(target.is_relative_to(root) for root in _allowed_roots(folder)):
        raise CheckpointError(f"{index}: shard {quote(name)} is a link to {target}, which lies outside the folder")
    return path


def _allowed_roots(folder: Path) -> list[Path]:
    """The folder itself, and in the cache of huggingface_hub (<repository>/snapshots/<revision>, whose files are links
    into <repository>/blobs) that blob folder as well."""
    real = folder.resolve()
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
