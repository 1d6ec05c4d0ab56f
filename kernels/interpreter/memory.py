"""The memory that one launch may touch: bounds, races between programs, and reads of what nobody wrote.

Every pointer carries the argument that it came from, so that an offset that misses its own tensor is found even if it
hits another one. An access is turned into indices of one storage, and all its checks are a few NumPy operations.

Not judged: an atomic of one program beside a plain access of another. An atomic on a single address orders the programs
that meet there, whatever it is used for, so that locks and counters of arrivals do not look like races.
"""

import bisect
import gc
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl

from refllm.kernels.interpreter import poison
from refllm.kernels.interpreter.errors import (
    KernelError,
    MaskedOffWarning,
    OutOfBoundsError,
    RaceError,
    UninitializedError,
    WaitsError,
)
from refllm.kernels.interpreter.settings import Settings

Index = np.ndarray | slice
"""Elements of a storage that one access touched: a slice if it touched each of a range once, in order."""

REMEMBERED = 1 << 22
"""Scattered reads of one storage that are remembered one by one; beyond that they are folded into a shadow array."""

POLLS = 10_000
"""Atomics in a row on one element that change nothing: so often nobody asks who does not wait."""

_LANGUAGE = tl.__path__[0]

MANY = -1
"""The mark in a shadow array of what more than one program read. 0 is nobody, and program p is p + 1."""


MASKED_OFF: dict[str, str] = {}
"""Argument -> "file.py:line" of a load through it that masked lanes off without `other`, so that they hold anything.
Whoever wants to know empties it before a launch."""


def _kernel_line() -> str:
    """The line of the kernel that is running, "file.py:3"."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "_refllm_operations_" in code.co_freevars and not code.co_filename.startswith(_LANGUAGE):
            return f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


@dataclass
class Storage:
    """One block of memory with the arguments that point into it.

    grain: bytes of the smallest element that an argument sees in it; races are judged per grain.
    writer: per grain, who stored there. reads: what was loaded, per access. reader: the same, folded.
    """

    name: str
    bytes: np.ndarray
    base: int
    grain: int
    poisoned: bool
    typed: dict[np.dtype, np.ndarray] = field(default_factory=dict)
    writer: np.ndarray | None = None
    reads: list[tuple[int, Index]] = field(default_factory=list)
    scattered: int = 0
    reader: np.ndarray | None = None

    def as_type(self, dtype: np.dtype) -> np.ndarray:
        """The storage as a flat array; a rest shorter than one element is cut off."""
        array = self.typed.get(dtype)
        if array is None:
            whole = len(self.bytes) // dtype.itemsize * dtype.itemsize
            array = self.typed[dtype] = self.bytes[:whole].view(dtype)
        return array


@dataclass(frozen=True)
class Argument:
    """A tensor argument: the storage it lies in, and the part of it, in bytes, that it may be used to reach."""

    name: str
    storage: Storage
    start: int
    stop: int

    def reaches(self, low: int, high: int) -> bool:
        """Whether the bytes from address `low` up to `high` are all part of it."""
        return self.storage.base + self.start <= low and high <= self.storage.base + self.stop


@dataclass(slots=True)
class Access:
    """One load, store or atomic: which elements of which storage, one per active lane."""

    argument: Argument
    array: np.ndarray
    index: np.ndarray
    where: Index
    ascending: bool


class Memory:
    """What the pointers of one launch may reach, with everything that was done there so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.grid = (1, 1, 1)
        self.storages: dict[int, Storage] = {}
        self.arguments: list[Argument] = []
        self.program = 0
        self.ordered: dict[int, set[int]] = {}
        self._locks: dict[int, set[int]] = {}
        self._polls, self._polled_at = 0, (-1, 0, 0)
        self._masked: set[str] = set()

    # -- what there is ---------------------------------------------------------------------------------------------

    def add(self, name: str, tensor: torch.Tensor) -> Argument:
        """Makes the storage of `tensor` reachable under the name of the kernel's argument."""
        raw = tensor.untyped_storage()
        storage = self.storages.get(raw.data_ptr())
        if storage is None:
            content = torch.empty(0, dtype=torch.uint8).set_(raw).numpy()
            known = self.settings.poison and poison.is_poisoned(raw)
            storage = Storage(name, content, raw.data_ptr(), tensor.element_size(), known)
            self.storages[storage.base] = storage
        else:
            storage.name += f", {name}"
            storage.grain = min(storage.grain, tensor.element_size())
        start, stop = 0, len(storage.bytes)
        if self.settings.bounds == "view":
            start = tensor.storage_offset() * tensor.element_size()
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            stop = start + (last + 1) * tensor.element_size() if tensor.numel() else start
        argument = Argument(name, storage, start, stop)
        self.arguments.append(argument)
        return argument

    def _find(self, address: int) -> Argument | None:
        """The argument whose storage holds an address, for pointers of unknown origin."""
        bases = sorted(self.storages)
        at = bisect.bisect_right(bases, address) - 1
        if at < 0 or address >= bases[at] + len(self.storages[bases[at]].bytes):
            return None
        return next(a for a in self.arguments if a.storage.base == bases[at])

    def _of_a_tensor(self, address: int) -> Argument | None:
        """A tensor of this process that nobody handed over and whose memory holds an address: pointers can be read from
        a table. Slow, and once per tensor."""
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):  # not isinstance, which asks dead weak references
                if found.device.type != "cpu" or found.layout != torch.strided:
                    continue
                storage = found.untyped_storage()
                if 0 <= address - storage.data_ptr() < storage.nbytes():
                    return self.add(f"a {found.dtype} tensor of shape {list(found.shape)}".replace("torch.", ""), found)
        return None

    # -- accesses --------------------------------------------------------------------------------------------------

    def access(
        self, what: str, pointers: np.ndarray, mask: np.ndarray | None, dtype: np.dtype, origin: Argument | None
    ) -> Access | None:
        """The elements behind the active pointers; None if no lane is active.

        Raises OutOfBoundsError if any of them lies outside the memory of its argument.
        """
        active = pointers.ravel() if mask is None else pointers[mask]
        if not active.size:
            return None
        if active.size == 1:
            low = high = active.item()
        else:
            low, high = int(np.minimum.reduce(active)), int(np.maximum.reduce(active))
        if origin is None:
            origin = self._find(low) or self._of_a_tensor(low)
            if origin is None:
                raise OutOfBoundsError(f"{what}: the address {low:#x} lies in none of the kernel's arguments")
        size = dtype.itemsize
        if not origin.reaches(low, high + size):
            other = None if self.settings.bounds else self._find(low)
            if other is None or not other.reaches(low, high + size):
                self._out_of_bounds(what, active, origin, size)
            else:
                origin = other
        storage = origin.storage
        if (low - storage.base) % size:
            raise KernelError(f"{what}: the address of `{origin.name}` is not a multiple of the {size} bytes it reads")
        shift = size.bit_length() - 1
        index = (active - np.uint64(storage.base)).view(np.int64) >> shift
        spread = (high - low) // size + 1
        ascending = index.size == 1 or bool(np.logical_and.reduce(index[1:] > index[:-1]))
        start = (low - storage.base) // size
        where = slice(start, start + spread) if ascending and spread == index.size else index
        return Access(origin, storage.as_type(dtype), index, where, ascending)

    def load(self, access: Access) -> np.ndarray:
        """The values, one per active lane."""
        storage = access.argument.storage
        values = access.array[access.where]
        if isinstance(access.where, slice):
            values = values.copy()  # a later store must not change what was loaded
        if storage.poisoned and self.settings.poison:
            self._check_written(access, values, "tl.load")
        if self.settings.races:
            self._remember(storage, access)
        return values

    def store(self, access: Access, values: np.ndarray) -> None:
        """Stores one value per active lane."""
        if self.settings.races:
            self._claim(access)
        access.array[access.where] = values
        if self.settings.races and not access.ascending:
            self._check_lanes(access, values)

    def must_be_written(self, access: Access, what: str) -> None:
        """Raises UninitializedError if what is there was never written."""
        if access is not None and access.argument.storage.poisoned and self.settings.poison:
            self._check_written(access, access.array[access.where], what)

    def masked_off(self, access: Access) -> None:
        """Notes a load that masks lanes off without `other`, once per argument; says it where they are to be 0."""
        if access.argument.name not in MASKED_OFF:
            MASKED_OFF[access.argument.name] = _kernel_line()
        if self.settings.masked == "zero" and access.argument.name not in self._masked:
            self._masked.add(access.argument.name)
            warnings.warn(
                f"{_kernel_line()}: tl.load of `{access.argument.name}` masks lanes off without `other`; they are 0 "
                "here, as NVIDIA's code has them, and may be anything elsewhere",
                MaskedOffWarning,
                stacklevel=2,
            )

    def polled(self, access: Access) -> None:
        """An atomic on one element changed nothing. Raises WaitsError once it is plain that this program waits there:
        for one that runs later, since programs run one after another."""
        place = self.program, access.argument.storage.base, int(access.index[0])
        self._polls = self._polls + 1 if place == self._polled_at else 1
        self._polled_at = place
        if self._polls >= POLLS:
            self.waits(access, int(access.index[0]))

    def waits(self, access: Access, element: int) -> None:
        """Raises WaitsError: what this program waits for at an element comes from a program that runs later."""
        raise WaitsError(
            f"program {self._names(self.program)} waits at element {element} of `{access.argument.name}` for a "
            "program that has not run: the interpreter runs them one after another"
        )

    # -- checks ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _out_of_bounds(what: str, active: np.ndarray, argument: Argument, size: int) -> None:
        storage = argument.storage
        offset = (active - np.uint64(storage.base)).view(np.int64)
        missed = (offset < argument.start) | (offset + size > argument.stop)
        first = int(offset[missed][0])
        side = f"{argument.start - first} bytes before" if first < argument.start else f"at byte {first} of"
        extent = f"the {argument.stop - argument.start} bytes that it has"
        raise OutOfBoundsError(
            f"{what} through `{argument.name}`: {int(missed.sum())} of {active.size} active lanes are out of bounds; "
            f"the first is {side} {extent}"
        )

    @staticmethod
    def _check_written(access: Access, values: np.ndarray, what: str) -> None:
        unwritten = poison.unwritten_array(values)
        if unwritten is not None and unwritten.any():
            lane = int(np.argmax(unwritten))
            raise UninitializedError(
                f"{what} through `{access.argument.name}`: {int(unwritten.sum())} of {values.size} active lanes read "
                f"memory of torch.empty that nobody wrote; the first is element {int(access.index[lane])}"
            )

    @staticmethod
    def _check_lanes(access: Access, values: np.ndarray) -> None:
        size = access.array.dtype.itemsize
        bits = np.dtype(f"u{size}")
        stored = np.ascontiguousarray(access.array[access.index]).view(bits)
        wanted = np.ascontiguousarray(np.broadcast_to(values, stored.shape)).view(bits)
        lost = stored != wanted
        if lost.any():
            raise RaceError(
                f"tl.store through `{access.argument.name}`: lanes of one program store different values to element "
                f"{int(access.index[np.argmax(lost)])}"
            )

    # -- races between programs ------------------------------------------------------------------------------------

    @staticmethod
    def _grains(storage: Storage, access: Access) -> Index:
        """The indices of an access, counted in grains of its storage."""
        size, where = access.array.dtype.itemsize, access.where
        if size == storage.grain:
            return where
        if size < storage.grain:
            step = storage.grain // size
            return slice(where.start // step, -(-where.stop // step)) if isinstance(where, slice) else where // step
        step = size // storage.grain
        if isinstance(where, slice):
            return slice(where.start * step, where.stop * step)
        return (where[:, None] * step + np.arange(step)).ravel()

    def _remember(self, storage: Storage, access: Access) -> None:
        where = self._grains(storage, access)
        storage.reads.append((self.program, where))
        if not isinstance(where, slice):
            storage.scattered += where.size
            if storage.scattered > REMEMBERED:
                self._fold(storage)

    @staticmethod
    def _fold(storage: Storage) -> None:
        """Replaces the list of reads by one number per grain."""
        if storage.reader is None:
            storage.reader = np.zeros(len(storage.bytes) // storage.grain + 1, np.int32)
        for program, where in storage.reads:
            seen = storage.reader[where]
            storage.reader[where] = np.where((seen == 0) | (seen == program + 1), program + 1, MANY)
        storage.reads.clear()
        storage.scattered = 0

    def _claim(self, access: Access) -> None:
        storage = access.argument.storage
        if storage.writer is None:
            storage.writer = np.zeros(len(storage.bytes) // storage.grain + 1, np.int32)
        where = self._grains(storage, access)
        before = storage.writer[where]
        if before.any() and (found := self._conflict(before, where, self.program)):
            other, element = found
            both = self._names(self.program, other)
            raise RaceError(f"programs {both} both store to element {element} of `{storage.name}`")
        storage.writer[where] = self.program + 1

    def _conflict(self, writers: np.ndarray, where: Index, program: int) -> tuple[int, int] | None:
        """A writer that is another program, not ordered with this one, and the grain that it wrote."""
        conflict = (writers != 0) & (writers != program + 1)
        if conflict.any() and self.ordered:
            before = self.ordered.get(program, set())
            after = {other for other, earlier in self.ordered.items() if program in earlier}
            conflict &= ~np.isin(writers, [p + 1 for p in before | after])
        if not conflict.any():
            return None
        at = int(np.argmax(conflict))
        return int(writers[at]) - 1, where.start + at if isinstance(where, slice) else int(where[at])

    def _names(self, *programs: int) -> str:
        """Programs by their place in the grid."""
        axes = 3 if self.grid[2] > 1 else 2 if self.grid[1] > 1 else 1
        places = [tuple(int(i) for i in np.unravel_index(p, self.grid))[:axes] for p in sorted(programs)]
        return " and ".join(str(place[0]) if axes == 1 else str(place) for place in places)

    def synchronize(self, address: int) -> None:
        """An atomic on one address: whatever earlier programs did there now happens before this program."""
        earlier = self._locks.setdefault(address, set())
        self.ordered.setdefault(self.program, set()).update(earlier)
        earlier.add(self.program)

    def finish(self) -> None:
        """Raises RaceError, after the last program, if one program read what another stored."""
        for storage in self.storages.values():
            if storage.writer is None:
                continue
            for program, where in storage.reads:
                if found := self._conflict(storage.writer[where], where, program):
                    self._read_write(storage, program, *found)
            if storage.reader is not None:
                both = (storage.writer != 0) & (storage.reader != 0) & (storage.reader != storage.writer)
                for at in np.flatnonzero(both):
                    program = int(storage.reader[at]) - 1
                    if program < 0:  # many read it: at least one of them is not the writer
                        program = 0 if storage.writer[at] != 1 else 1
                    if found := self._conflict(storage.writer[at : at + 1], slice(int(at), int(at) + 1), program):
                        self._read_write(storage, program, *found)

    def _read_write(self, storage: Storage, reader: int, writer: int, element: int) -> None:
        raise RaceError(
            f"program {self._names(reader)} loads element {element} of `{storage.name}`, to which program "
            f"{self._names(writer)} stores, and nothing orders the two"
        )
