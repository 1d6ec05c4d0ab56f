"""Makes of the tensors of a checkpoint the arrays that a model page reads.

    weights = load_weights(checkpoint, expected, round=...)
    weights["embed_tokens.weight"]                    float32, or float64 in exact mode
    weights.layer(3)["self_attn.q_proj.weight"]       [out, in], C-contiguous: y = x @ W.T
    weights.report                                    what was missing, unexpected, not finite

Names are those of the pages, without the prefix of the file; `refllm.storage.load_report` compares the two.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from refllm.errors import InputError
from refllm.parallel import blocks
from refllm.storage.checkpoint import Checkpoint
from refllm.storage.fresh_tensors import default_threads, fresh_tensor
from refllm.storage.load_report import LoadReport, Shape, compare, file_name, require_usable, warn_about
from refllm.storage.safetensors_format import quote
from refllm.storage.stacks import rooms
from refllm.storage.upcast import BLOCK, upcast

Round = Callable[[NDArray[Any]], NDArray[Any]]
Progress = Callable[[int, int], None]

# Elements that one thread converts at a time: 4 MiB of float32.
TASK = 1 << 20
UNREAD = 1 << 19
"""Numbers of a matrix from which on it is worth not to have it in memory as a whole."""


def identity(values: NDArray[Any]) -> NDArray[Any]:
    """The rounding to float32 of float32 values."""
    return values


class Source(Protocol):
    """Where arrays come from on demand."""

    def fetch(self, name: str, index: Any = None) -> NDArray[Any]:
        """The tensor `name`, or `tensor[index]` for an index along its first axis."""
        ...

    def reads_parts(self, name: str) -> bool:
        """Whether `tensor[index]` costs no more than its share of the tensor."""
        ...


class Weights(Mapping[str, NDArray[Any]]):
    """Page name -> array, all of one dtype (float32, or float64 in exact mode).

    Kept in memory, or made anew at each access and kept nowhere (low_memory). A tied name is found by [] and is the
    very array that it is tied to, but it is not listed: iteration, len and `shapes` know each tensor once.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        kept: Mapping[str, NDArray[Any]],
        *,
        source: Source | None = None,
        tied: Mapping[str, str] = MappingProxyType({}),
        report: LoadReport | None = None,
    ) -> None:
        """kept: arrays in memory; `source` makes those that `shapes` names and `kept` does not have."""
        self.shapes: Mapping[str, Shape] = MappingProxyType(dict(shapes))
        self.tied: Mapping[str, str] = MappingProxyType(dict(tied))
        self.report = report or LoadReport()
        self._kept = dict(kept)
        self._source = source
        self._layers: dict[int, Mapping[str, Any]] = {}

    @property
    def low_memory(self) -> bool:
        return self._source is not None

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes or name in self.tied

    def layer(self, index: int) -> Mapping[str, NDArray[Any]]:
        """The tensors of layer `index` by what follows "layers.{index}."."""
        if index not in self._layers:
            self._layers[index] = self._make_layer(f"layers.{index}.")
        # What is kept does not lead back to these weights, or they would not go, with the open file, when dropped.
        return _Renamed(self, self._layers[index]) if self.low_memory else self._layers[index]

    def _make_layer(self, prefix: str) -> Mapping[str, Any]:
        """The tensors by their short names; with low_memory their names."""
        names = {name[len(prefix) :]: name for name in self.shapes if name.startswith(prefix)}
        if self.low_memory:
            return names
        return MappingProxyType({short: self._kept[name] for short, name in names.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles cannot take views of dicts. What is kept per layer is made again."""
        parts = (dict(self.shapes), self._kept, self._source, dict(self.tied), self.report)
        return _weights_of_parts, parts

    def rows(self, name: str, ids: NDArray[Any]) -> NDArray[Any]:
        """tensor[ids] for an integer array `ids` of any shape (embedding lookup): only these rows are converted."""
        return self._fetch(name, np.asarray(ids))

    def chunks(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """The tensor in consecutive blocks of at most `rows` rows, each converted when its turn comes."""
        for part in blocks(self.shapes[self.tied.get(name, name)][0], rows):
            yield self._fetch(name, part)

    def unread(self) -> "Weights":
        """The same weights for a reader that takes a matrix in blocks of rows: with low_memory a large one is not read
        when it is asked for, but row by row as its numbers are (`Unread`), and it is never in memory as a whole."""
        return self if self._source is None else _UnreadWeights(self)

    def renamed(self, prefix: str) -> Mapping[str, NDArray[Any]]:
        """The same tensors under the names of a file that puts `prefix` ("model.", "transformer.", "") before the
        backbone names: what `save_checkpoint` takes. Tied tensors occur once."""
        return _Renamed(self, {file_name(name, prefix): name for name in self.shapes})

    def resized(self, arrays: Mapping[str, NDArray[Any]]) -> "Weights":
        """These weights with other arrays, of other shapes, in the place of some; a tied tensor stays tied."""
        shapes = {**self.shapes, **{name: array.shape for name, array in arrays.items()}}
        return Weights(shapes, {**self._kept, **arrays}, source=self._source, tied=self.tied, report=self.report)

    def replaced(self, others: Mapping[str, NDArray[Any]]) -> "Weights":
        """These weights with other arrays in the place of some, by their names here; each is asked for at every access.
        A tied tensor that has an array of its own is tied no more."""
        tied = {target: source for target, source in self.tied.items() if target not in others}
        shapes = dict(self.shapes) | {target: self.shapes[self.tied[target]] for target in self.tied.keys() - tied}
        return Weights(shapes, {}, source=_Replaced(self, others), tied=tied, report=self.report)

    def _fetch(self, name: str, index: Any = None) -> NDArray[Any]:
        name = self.tied.get(name, name)
        if name in self._kept:
            return self._kept[name] if index is None else self._kept[name][index]
        if self._source is None or name not in self.shapes:
            raise KeyError(name)
        return self._source.fetch(name, index)


class _UnreadWeights(Weights):
    """See `Weights.unread`."""

    def __init__(self, of: Weights) -> None:
        super().__init__(of.shapes, of._kept, source=of._source, tied=of.tied, report=of.report)

    def _fetch(self, name: str, index: Any = None) -> Any:
        own, source = self.tied.get(name, name), self._source
        shape = self.shapes.get(own, ())
        large = len(shape) == 2 and math.prod(shape) >= UNREAD
        if index is not None or own in self._kept or source is None or not large or not source.reads_parts(own):
            return super()._fetch(name, index)
        return Unread(source, own, shape)


class Unread(NDArrayOperatorsMixin):
    """A matrix that is not read yet. Its rows are, when they are asked for (a slice or an array of numbers of rows),
    and nothing is kept; whatever else is done with it is done with the whole matrix, which is read for that."""

    ndim = 2

    def __init__(self, source: Source, name: str, shape: Shape) -> None:
        self._source, self._name, self.shape = source, name, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        rows, *others = index if isinstance(index, tuple) else (index,)
        if isinstance(rows, slice) and rows.step in (None, 1):
            found = self._source.fetch(self._name, slice(*rows.indices(len(self))))
        elif isinstance(rows, np.ndarray) and rows.dtype.kind == "i":
            found = self._source.fetch(self._name, rows)
        else:
            return np.asarray(self)[index]
        return found[:, *others] if others else found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._source.fetch(self._name), dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **how: Any) -> Any:
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, Unread) else x for x in inputs), **how)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


def _weights_of_parts(
    shapes: dict[str, Shape],
    kept: dict[str, NDArray[Any]],
    source: Source | None,
    tied: dict[str, str],
    report: LoadReport,
) -> Weights:
    return Weights(shapes, kept, source=source, tied=tied, report=report)


class _Replaced:
    """A `Source` of some weights with others in the place of some."""

    def __init__(self, weights: Weights, others: Mapping[str, NDArray[Any]]) -> None:
        self._weights, self._others = weights, others

    def fetch(self, name: str, index: Any = None) -> NDArray[Any]:
        if name not in self._others:
            return self._weights._fetch(name, index)
        return self._others[name] if index is None else self._others[name][index]

    def reads_parts(self, name: str) -> bool:
        source = self._weights._source
        return name not in self._others and source is not None and source.reads_parts(name)


class _Renamed(Mapping[str, NDArray[Any]]):
    """Other names for tensors of `weights`, which are still made at each access."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, names

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: self._weights.shapes[original] for name, original in self._names.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# ---------------------------------------------------------------------------------------------------------------------
# Reading them from a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def load_weights(
    checkpoint: Checkpoint,
    expected: Mapping[str, Shape],
    *,
    optional_zero: Collection[str] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
    round: Round | None = identity,
    low_memory: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    seed: int = 0,
    initializer_range: float = 0.02,
) -> Weights:
    """The tensors `expected` (page name -> shape) from `checkpoint`, as float32 on the grid of the model dtype.

    optional_zero: LayerNorm biases that a file may leave out, all together; they are zeros then.
    tied: target -> source, as {"lm_head.weight": "embed_tokens.weight"}. The file may hold either or both; both with
        different values are kept apart, with a warning, as in Transformers.
    round: elementwise and pure, float32 -> float32 (it is called on blocks, from several threads, and may work in
        place); None, or a rounding to float64, is exact mode and gives float64.
    low_memory: convert from the memory map at each access and keep nothing. Keep `checkpoint` open.
    progress: called with (bytes done, bytes in all) of the file from the calling thread.
    threads: how many convert; None takes one per available core, up to four.
    seed, initializer_range: for head tensors that the checkpoint lacks, which are initialised at random (a warning).

    Raises CheckpointError, with names, for missing backbone tensors, wrong shapes and dtypes that are no weights.
    """
    if round is not None and round(np.zeros(1, np.float32)).dtype == np.float64:
        round = None
    stored_shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    report, found = compare(stored_shapes, expected, optional_zero, tied, checkpoint.path)
    require_usable(report, checkpoint.path)
    for stored in found.values():
        checkpoint.must_be_weight(stored)  # before the long work begins
    tied = _tie(checkpoint, found, tied)
    shapes = {name: tuple(shape) for name, shape in expected.items() if name not in tied}
    shapes |= {name: checkpoint.shape(stored) for name, stored in found.items()}
    kept: dict[str, NDArray[Any]] = {}
    for name in shapes.keys() - found.keys():
        if name in optional_zero:
            values = np.zeros(shapes[name], np.float32)
        else:
            values = fresh_tensor(name, shapes[name], initializer_range, seed)
        kept[name] = _rounded_copy(values, round)
    source = _CheckpointSource(checkpoint, found, round, report, threads or default_threads())
    if not low_memory:
        kept |= source.fetch_all(progress)
    warn_about(report, checkpoint.path, stacklevel=3)
    return Weights(shapes, kept, source=source if low_memory else None, tied=tied, report=report)


def _tie(checkpoint: Checkpoint, found: dict[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    """The ties that the file does not contradict. In `found` (page name -> file name) only their sources remain."""
    kept_tied = {}
    for target, source in tied.items():
        if target in found and source in found and not _equal(checkpoint, found[target], found[source]):
            message = (
                f"{checkpoint.path}: the config ties {target} to {source}, but the checkpoint holds both with "
                "different values; they are kept apart (tie_word_embeddings should be false)"
            )
            warnings.warn(message, UserWarning, stacklevel=4)
            continue
        kept_tied[target] = source
        if target in found:
            found.setdefault(source, found.pop(target))
    return kept_tied


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors of the file are the same, bit for bit."""
    if checkpoint.dtype(first) != checkpoint.dtype(second):
        return False
    a, b = (checkpoint.view(name).reshape(-1).view(np.uint8) for name in (first, second))
    equal = all(np.array_equal(a[part], b[part]) for part in blocks(a.size, TASK))
    checkpoint.release(first)
    checkpoint.release(second)
    return equal


def _rounded_copy(values: NDArray[Any], round: Round | None) -> NDArray[Any]:
    return values.astype(np.float64) if round is None else round(values)


class _Block(NamedTuple):
    """A piece of one tensor: stored numbers, where they go, and where they lie in the tensor (None: gathered rows)."""

    name: str
    stored: NDArray[Any]
    out: NDArray[Any]
    offset: int | None


class _CheckpointSource:
    """Converts tensors of a checkpoint, in blocks: upcast, rounding, and a count of what is not finite.

    The pages of the map are let go block by block, so that the resident memory hardly exceeds that of the arrays made.
    """

    def __init__(
        self, checkpoint: Checkpoint, found: Mapping[str, str], round: Round | None, report: LoadReport, threads: int
    ) -> None:
        self._checkpoint, self._found, self._report = checkpoint, found, report
        self._dtype = np.dtype(np.float64 if round is None else np.float32)
        self._round = {
            dtype: None if round is None or keeps_grid(round, dtype) else round
            for dtype in {checkpoint.dtype(stored) for stored in found.values()}
        }
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def fetch(self, name: str, index: slice | NDArray[Any] | None = None) -> NDArray[Any]:
        out, todo = self._prepare(name, index)
        count = sum(self._map(todo))
        self._checkpoint.must_be_as_opened(self._found[name])
        # The same numbers come by at every access: one warning per tensor is enough.
        if count and self._found[name] not in self._report.nonfinite:
            self._report.nonfinite[self._found[name]] = count
            message = f"{self._checkpoint.path}: {count} NaN or infinite numbers in tensor {quote(self._found[name])}"
            warnings.warn(message, UserWarning, stacklevel=4)
        return out

    def reads_parts(self, name: str) -> bool:
        return not self._checkpoint.makes(self._found[name])

    def fetch_all(self, progress: Progress | None) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        todo: list[_Block] = []
        shapes = {name: self._checkpoint.shape(stored) for name, stored in self._found.items()}
        together = rooms(shapes, self._dtype)
        for name in self._found:
            arrays[name], pieces = self._prepare(name, None, together.get(name))
            if self._checkpoint.makes(self._found[name]):  # one after another: what is made is as large as the result
                self._finish(pieces, None)
            else:
                todo += pieces
        self._finish(todo, progress)
        for stored in self._found.values():
            self._checkpoint.must_be_as_opened(stored)
        return arrays

    def _finish(self, todo: Sequence[_Block], progress: Progress | None) -> None:
        """Converts blocks, and counts what is not finite."""
        done, total = 0, sum(block.stored.nbytes for block in todo)
        for block, count in zip(todo, self._map(todo), strict=True):
            done += block.stored.nbytes
            if count:
                stored = self._found[block.name]
                self._report.nonfinite[stored] = self._report.nonfinite.get(stored, 0) + count
            if progress is not None:
                progress(done, total)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CheckpointSource":
        return self  # it only reads

    def __reduce__(self) -> Any:
        raise InputError(
            f"a low_memory model of {self._checkpoint.path} cannot be pickled, because it reads an open file; load the "
            "model again where it is needed"
        )

    def _prepare(
        self, name: str, index: slice | NDArray[Any] | None, room: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], list[_Block]]:
        """An array for the tensor (`room`, or a new one), or for the rows `index` of it, and the work that fills it."""
        view = self._checkpoint.weight(self._found[name])
        stored = view if index is None else view[index]
        out = np.empty(stored.shape, self._dtype) if room is None else room
        flat, target = stored.reshape(-1), out.reshape(-1)
        first_row = index.start or 0 if isinstance(index, slice) else 0
        begin = first_row * view[:1].nbytes if view.ndim else 0
        gathered = isinstance(index, np.ndarray)
        return out, [
            _Block(name, flat[part], target[part], None if gathered else begin + part.start * flat.itemsize)
            for part in blocks(flat.size, TASK)
        ]

    def _map(self, todo: Sequence[_Block]) -> Iterator[int]:
        return map(self._convert, todo) if self._pool is None or len(todo) < 2 else self._pool.map(self._convert, todo)

    def _convert(self, block: _Block) -> int:
        """Fill block.out with numbers on the grid; returns how many of them are not finite."""
        stored_name = self._found[block.name]
        round = self._round[self._checkpoint.dtype(stored_name)]
        count = 0
        for part in blocks(block.stored.size, BLOCK):
            values = block.out[part]
            upcast(block.stored[part], values)
            if round is not None:
                values[...] = round(values)
            count += values.size - int(np.count_nonzero(np.isfinite(values)))
        if block.offset is not None:
            self._checkpoint.release(stored_name, block.offset, block.offset + block.stored.nbytes)
        return count


def keeps_grid(round: Round, dtype: str) -> bool:
    """Whether `round` leaves every number that `dtype` can store as it is, so that it need not be called.

    Asked of all 65536 numbers of a 16-bit dtype. For float32 and float64 it is asked of 65536 float32 with random
    bits, which any coarser grid would change.
    """
    bits = np.arange(65536, dtype=np.uint32)
    if dtype == "bfloat16":
        probe = (bits << 16).view(np.float32)
    elif dtype == "float16":
        probe = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        probe = np.random.default_rng(0).integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32)
    probe = probe[~np.isnan(probe)]
    return np.array_equal(round(probe.copy()).view(np.uint32), probe.view(np.uint32))


# ---------------------------------------------------------------------------------------------------------------------
# Fresh weights
# ---------------------------------------------------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes that this process can take without others being swapped out; a large number where no one says."""
    try:
        with open("/proc/meminfo") as file:
            found = {line.partition(":")[0]: line.split()[1] for line in file}
        return int(found["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return 1 << 62


class _FreshSource:
    def __init__(self, expected: Mapping[str, Shape], config: Any, seed: int, round: Round | None) -> None:
        self._expected, self._config, self._seed, self._round = expected, config, seed, round

    def fetch(self, name: str, index: Any = None) -> NDArray[Any]:
        config = self._config
        values = fresh_tensor(name, self._expected[name], config.initializer_range, self._seed, config.pad_token_id)
        return _rounded_copy(values if index is None else values[index], self._round)

    def reads_parts(self, name: str) -> bool:
        return False


def fresh_weights(
    expected: Mapping[str, Shape],
    config: Any,
    seed: int = 0,
    *,
    tied: Mapping[str, str] = MappingProxyType({}),
    round: Round | None = identity,
    low_memory: bool = False,
) -> Weights:
    """Random weights of a model that was never trained; `config` gives initializer_range and pad_token_id.

    With low_memory each tensor is made anew, and the same, at every access: enough to write a checkpoint of any size.
    """
    source = _FreshSource(expected, config, seed, round)
    shapes = {name: tuple(shape) for name, shape in expected.items() if name not in tied}
    kept = {} if low_memory else {name: source.fetch(name) for name in shapes}
    return Weights(shapes, kept, source=source if low_memory else None, tied=tied)


def init_weights(expected: Mapping[str, Shape], config: Any, seed: int = 0) -> dict[str, NDArray[Any]]:
    """`fresh_weights` as a plain dict of float32 arrays."""
    return dict(fresh_weights(expected, config, seed))
