"""The values of a run: in memory while they are few, else in a file, from which one at a time is read.

A candidate's values are written as it names them, behind the room for a header, and the header last: then the file is a
trace like any other (`refllm.check.trace`). Read back it is mapped into memory; what is narrow becomes float32 when it
is asked for, and nothing is kept of it.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refllm.errors import InputError
from refllm.storage.checkpoint import MappedFile
from refllm.storage.checkpoint_writer import header
from refllm.storage.output_file import NewFile

IN_MEMORY = 1 << 26
"""Bytes of a run's values that stay in memory: 64 MiB."""
_ROOM = 1 << 22
"""Bytes for the header of a file that is written value by value."""


class Values(MutableMapping[str, np.ndarray]):
    """Name -> array, float32 or float64. raw: the arrays as they lie, of which narrow ones are widened at every
    access."""

    def __init__(self, raw: Mapping[str, np.ndarray]) -> None:
        self.raw = dict(raw)

    def __getitem__(self, name: str) -> np.ndarray:
        return widened(self.raw[name])

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self.raw[name] = value

    def __delitem__(self, name: str) -> None:
        del self.raw[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __contains__(self, name: object) -> bool:
        return name in self.raw  # without reading it

    def copy(self) -> "Values":
        return Values(self.raw)

    def __or__(self, others: Mapping[str, np.ndarray]) -> "Values":
        return Values(self.raw | dict(others))


Taps = dict[str, np.ndarray] | Values


def widened(value: np.ndarray) -> np.ndarray:
    """The value in float32, if its format is narrower."""
    return value if value.dtype in (np.float64, np.float32) else value.astype(np.float32)


def raw_of(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as they lie, none of them read."""
    return values.raw if isinstance(values, Values) else dict(values)


def like(values: Mapping[str, np.ndarray], raw: Mapping[str, np.ndarray]) -> Taps:
    """Arrays that were made of those of `values`, to be read as these are."""
    return Values(raw) if isinstance(values, Values) else dict(raw)


def only(values: Mapping[str, np.ndarray], names: Iterable[str]) -> Taps:
    """The values of these names."""
    raw = raw_of(values)
    return like(values, {name: raw[name] for name in names})


def narrowed(value: np.ndarray, dtype: str) -> np.ndarray:
    """The value in the format of the run, if that is narrow and holds it exactly (norms of a mixed-precision stack may
    be wider)."""
    import ml_dtypes

    kind: Any = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(dtype)
    if kind is None or value.dtype.kind != "f":
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = value.astype(kind)
        return narrow if np.array_equal(narrow.astype(value.dtype), value, equal_nan=True) else value


class Stored(NamedTuple):
    """An array in a file. begin: of its first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _place(entry: tuple[str, Stored]) -> tuple[int, int]:
    return entry[1].begin, entry[1].nbytes


class Spool:
    """A file that takes values one after another. path: where it goes when it is complete; None: it has no name, and
    is gone with the process. dtype: of the run, in which values are kept where that changes nothing."""

    def __init__(self, path: Path | None, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self._end = _ROOM
        try:
            self._new = None if path is None else NewFile(path)
            self._file: Any = tempfile.TemporaryFile() if self._new is None else self._new.file  # noqa: SIM115
            self._file.seek(_ROOM)
        except OSError as error:
            raise self._full(error) from None

    def add(self, value: np.ndarray) -> "Stored":
        """Writes a value. Raises InputError where the disk is full."""
        value = np.ascontiguousarray(narrowed(value, self.dtype))
        self._end += value.nbytes
        try:
            self._file.write(value.reshape(-1).view(np.uint8).data)
        except OSError as error:
            self.close()
            raise self._full(error) from None
        return Stored(value.shape, value.dtype, self._end - value.nbytes)

    def read(self, stored: "Stored") -> np.ndarray:
        """A value that was written, in float32 or float64."""
        self._file.flush()
        with contextlib.nullcontext(self._file) if self._new is None else open(self._new.name, "rb") as file:
            data = os.pread(file.fileno(), stored.nbytes, stored.begin)
        return widened(np.frombuffer(data, stored.dtype).reshape(stored.shape))

    def read_back(self, names: Mapping[str, "Stored"], metadata: Mapping[str, str]) -> MappedFile:
        """Writes the header, and maps the file. names: of all that was written. Nothing is added any more."""
        kinds = {name: (stored.shape, stored.dtype.name) for name, stored in sorted(names.items(), key=_place)}
        text = header(kinds, metadata)
        if len(text) > _ROOM:
            self.close()
            raise InputError(f"{len(kinds)} values are too many for one trace; name fewer of them")
        try:
            self._file.seek(0)
            self._file.write((_ROOM - 8).to_bytes(8, "little") + text[8:].ljust(_ROOM - 8))
            self._file.flush()
            if self._new is None:
                self._file.seek(0)
                return MappedFile(Path("the values of the run"), self._file)
            self._new.publish()
            return MappedFile(Path(self._new.path))
        except OSError as error:
            self.close()
            raise self._full(error) from None

    def close(self) -> None:
        """Leaves nothing behind of what was not completed."""
        if self._new is None:
            self._file.close()
        else:
            self._new.__exit__(None, None, None)

    def _full(self, error: OSError) -> InputError:
        where = self.path or f"{tempfile.gettempdir()} (TMPDIR names another folder)"
        return InputError(f"the values of the run cannot be kept in {where}: {error.strerror or error}")
