"""Runs split over ranks: each rank's values in a file of its own, put together to those of the whole model.

A file of a rank is a trace as any program writes it (docs/recording.md) whose metadata say besides, as JSON, in the
words of Torch's DTensor:

    mesh          {"dp": 1, "tp": 2}         names and sizes of the dimensions of the mesh, the outermost first
    coordinates   {"tp": 1}                  where this rank is in it; 0 where nothing is said
    placements    {"model.layers.0.mlp.up_proj": {"tp": "Shard(2)"}, ...}     of each value, by dimension of the mesh

A placement is `Shard(axis)`, `Shard(axis) zigzag` (of 2 n pieces rank r has pieces r and 2 n - 1 - r), `Partial(sum)`
or `Replicate()`, which is meant where nothing is said. As in DTensor an axis that several dimensions of the mesh shard
is cut by the outer one first. Ranks that hold a copy of the same thing must hold the same bits.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.trace import Trace
from refllm.errors import InputError

REPLICATE, PARTIAL = "Replicate()", "Partial(sum)"
_PARTIAL = ("Partial()", "Partial(sum)", 'Partial("sum")', "Partial('sum')")
_SHARD = re.compile(r"Shard\((?:dim=)?(-?\d+)\)( zigzag)?")
_INPUTS = ("input_ids", "attention_mask", "position_ids")
Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A cut along an axis. zigzag: each rank has a piece of the beginning and the matching one of the end."""

    axis: int
    zigzag: bool = False


@dataclass(frozen=True)
class Differs:
    """Copies of one value that are not the same bits. ranks: whose they are; count: of how many numbers."""

    name: str
    ranks: tuple[int, int]
    count: int
    of: int

    @property
    def text(self) -> str:
        """The sentence of a report."""
        a, b = self.ranks
        where = f"{self.count} of {self.of} numbers"
        return f"{self.name} is replicated, and rank {b} has other bits than rank {a} in {where}"


@dataclass(frozen=True)
class Ranks:
    """All files of a folder.

    mesh: (name, size) of its dimensions. files: coordinates -> (number of the rank, its trace). placements: name of a
    value -> a `Shard`, REPLICATE or PARTIAL for each dimension of the mesh.
    """

    mesh: tuple[tuple[str, int], ...]
    files: Mapping[Coordinates, tuple[int, Trace]]
    placements: Mapping[str, tuple[Shard | str, ...]]

    @staticmethod
    def load(folder: str | Path, input_ids: np.ndarray | None = None) -> "Ranks":
        """Reads every .safetensors file of a folder. input_ids: as for `Trace.load`.

        Raises InputError, naming the file, for what is no trace of a rank, and where ranks are missing, there twice,
        or say different things of the mesh or of a value.
        """
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise InputError(f"{folder}: no .safetensors file in it; expected one per rank (docs/recording.md)")
        found: dict[Coordinates, tuple[int, Trace]] = {}
        mesh: tuple[tuple[str, int], ...] = ()
        placements: dict[str, tuple[Shard | str, ...]] = {}
        for number, path in enumerate(paths):
            trace = Trace.load(path, input_ids)
            said = _said(path, trace.details, "mesh")
            of_file = tuple((str(name), _size(path, name, size)) for name, size in said.items())
            if mesh and of_file != mesh:
                raise InputError(f"{path}: its mesh is {dict(of_file)}, that of {paths[0].name} {dict(mesh)}")
            mesh = of_file
            at = _coordinates(path, mesh, _said(path, trace.details, "coordinates", needed=False))
            if at in found:
                raise InputError(f"{path}: another file has its coordinates too, {_where(mesh, at)}")
            for name, by in _said(path, trace.details, "placements", needed=False).items():
                one = _placements(path, mesh, name, by)
                if placements.setdefault(name, one) != one:
                    raise InputError(f"{path}: {name} is placed otherwise than in the files before it")
            found[at] = (_number(trace.details, number), trace)
        _all_there(folder, mesh, found)
        return Ranks(mesh, found, placements)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the ranks, in the order of the mesh."""
        return [number for _, (number, _) in sorted(self.files.items())]

    def parts(self, name: str) -> list[tuple[int, int, int, int]]:
        """(rank, axis, first, stop) of each piece of a sharded value; nothing for one that no rank has a piece of."""
        by = self.placements.get(name, ())
        cut = [i for i, one in enumerate(by) if isinstance(one, Shard)]
        if len(cut) != 1 or not isinstance(shard := by[cut[0]], Shard) or shard.zigzag:
            return []
        found, begin = [], 0
        for c in range(self.mesh[cut[0]][1]):
            at = tuple(c if i == cut[0] else 0 for i in range(len(self.mesh)))
            number, trace = self.files[at]
            value = trace.taps[name]
            length = value.shape[shard.axis]
            found.append((number, shard.axis % value.ndim, begin, begin + length))
            begin += length
        return found

    def whole(self, last_copies: bool = False) -> tuple[Trace, list[Differs]]:
        """The trace of the whole model, and which copies differ. last_copies: of what is replicated take the copy of
        the last rank that has one, not of the first.

        Raises InputError for pieces that do not fit together.
        """
        first_of = self.files[min(self.files)][1]
        differ: list[Differs] = []
        names = list(dict.fromkeys(name for _, (_, trace) in sorted(self.files.items()) for name in trace.taps))

        def joined(name: str, pieces: dict[Coordinates, Any]) -> Any:
            return self._joined(name, pieces, differ, last_copies)

        taps = {name: joined(name, {at: t.taps.get(name) for at, (_, t) in self.files.items()}) for name in names}
        given: dict[str, Any] = {}
        for name in _INPUTS:
            pieces = {at: getattr(trace.inputs, name) for at, (_, trace) in self.files.items()}
            if any(piece is not None for piece in pieces.values()):
                given[name] = joined(name, pieces)
        size = math.prod(size for _, size in self.mesh)
        source = f"{first_of.source}, {size} ranks ({', '.join(f'{name} {n}' for name, n in self.mesh)})"
        whole = replace(first_of, taps=taps, inputs=replace(first_of.inputs, **given), source=source, file=None)
        return whole, differ

    def _joined(self, name: str, pieces: dict[Coordinates, Any], differ: list[Differs], last: bool) -> np.ndarray:
        by = self.placements.get(name, (REPLICATE,) * len(self.mesh))
        lacking = [self.files[at][0] for at, piece in pieces.items() if piece is None]
        if lacking:
            raise InputError(f"{name}: rank {lacking[0]} does not have it, and others do")

        def join(front: Coordinates) -> np.ndarray:
            if len(front) == len(self.mesh):
                return np.asarray(pieces[front])
            each = [join((*front, c)) for c in range(self.mesh[len(front)][1])]
            where = by[len(front)]
            if isinstance(where, Shard):
                return _concatenated(name, each, where)
            if where == PARTIAL:
                return np.asarray(np.sum([np.asarray(x, np.float64) for x in each], axis=0))
            self._compare(name, front, each, differ)
            return each[-1 if last else 0]

        return join(())

    def _compare(self, name: str, front: Coordinates, each: Sequence[np.ndarray], differ: list[Differs]) -> None:
        for c, other in enumerate(each[1:], 1):
            if other.shape != each[0].shape:
                raise InputError(f"{name} is replicated, and has shapes {each[0].shape} and {other.shape}")
            wrong = int((np.ascontiguousarray(each[0]) != np.ascontiguousarray(other)).sum())
            if other.dtype.kind == "f":
                wrong -= int((np.isnan(each[0]) & np.isnan(other)).sum())
            if wrong:
                ranks = tuple(self._first(front, i) for i in (0, c))
                differ.append(Differs(name, (ranks[0], ranks[1]), wrong, other.size))

    def _first(self, front: Coordinates, c: int) -> int:
        """The number of the first rank with these coordinates."""
        at = (*front, c)
        return self.files[(*at, *(0,) * (len(self.mesh) - len(at)))][0]


def _concatenated(name: str, each: Sequence[np.ndarray], where: Shard) -> np.ndarray:
    try:
        if not where.zigzag:
            return np.concatenate(each, axis=where.axis)
        halves = [np.array_split(x, 2, axis=where.axis) for x in each]
        return np.concatenate([h[0] for h in halves] + [h[1] for h in reversed(halves)], axis=where.axis)
    except ValueError:
        shapes = ", ".join(str(x.shape) for x in each)
        raise InputError(f"{name}: pieces of shapes {shapes} do not fit together along axis {where.axis}") from None


def _said(path: Path, details: Mapping[str, str], key: str, needed: bool = True) -> dict[str, Any]:
    if key not in details and not needed:
        return {}
    try:
        value = json.loads(details[key])
    except (KeyError, ValueError):
        value = None
    if not isinstance(value, dict) or (needed and not value):
        raise InputError(f"{path}: its metadata do not say `{key}` as JSON, as the trace of a rank does")
    return value


def _size(path: Path, name: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1 << 20:
        raise InputError(f"{path}: the mesh has {size!r} ranks along {name}; expected a number from 1")
    return size


def _coordinates(path: Path, mesh: Sequence[tuple[str, int]], said: Mapping[str, Any]) -> Coordinates:
    unknown = said.keys() - dict(mesh).keys()
    if unknown:
        raise InputError(f"{path}: a coordinate along {min(unknown)}, which the mesh {dict(mesh)} does not have")
    at = tuple(said.get(name, 0) for name, _ in mesh)
    for (name, size), one in zip(mesh, at, strict=True):
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < size:
            raise InputError(f"{path}: coordinate {one!r} along {name}, of which there are {size}")
    return at


def _placements(path: Path, mesh: Sequence[tuple[str, int]], name: str, by: Any) -> tuple[Shard | str, ...]:
    if not isinstance(by, dict) or by.keys() - dict(mesh).keys():
        raise InputError(f"{path}: {name} is placed by {by!r}; expected a placement by dimension of {dict(mesh)}")
    return tuple(_placement(path, name, by.get(dimension, REPLICATE)) for dimension, _ in mesh)


def _placement(path: Path, name: str, text: Any) -> Shard | str:
    if isinstance(text, str) and (found := _SHARD.fullmatch(text)):
        return Shard(int(found[1]), zigzag=bool(found[2]))
    if text in _PARTIAL:
        return PARTIAL
    if text in (REPLICATE, "Replicate"):
        return REPLICATE
    known = "Shard(axis), Shard(axis) zigzag, Partial(sum) and Replicate()"
    raise InputError(f"{path}: {name} is placed as {text!r}; what can be put together is {known}")


def _number(details: Mapping[str, str], otherwise: int) -> int:
    return int(details["rank"]) if details.get("rank", "").isdecimal() else otherwise


def _all_there(folder: str | Path, mesh: Sequence[tuple[str, int]], found: Mapping[Coordinates, Any]) -> None:
    size = math.prod(size for _, size in mesh)
    if len(found) == size:
        return
    missing = next(at for at in _every(mesh) if at not in found)
    where = _where(mesh, missing)
    raise InputError(f"{folder}: files of {len(found)} ranks for a mesh of {size}; that of {where} is not there")


def _where(mesh: Sequence[tuple[str, int]], at: Coordinates) -> str:
    return ", ".join(f"{name} {c}" for (name, _), c in zip(mesh, at, strict=True))


def _every(mesh: Sequence[tuple[str, int]]) -> Iterator[Coordinates]:
    yield from np.ndindex(*(size for _, size in mesh))
