"""Reads and writes tiles.json. Light: kernels import it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from refllm.errors import InputError
from refllm.kernels.targets import Target
from refllm.storage import input_file, output_file

FILE = Path(__file__).with_name("tiles.json")

ANY = "any"
"""The only class of a kernel whose tile serves all shapes."""

AHEAD_OF_TIME, MEASURED, BY_HAND = "ahead of time", "measured", "by hand"


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    kernel: its file. shape: the class, as the `shape_class` of that file names it. target: a name.
    tile: the fields of the kernel's `Tile`. chosen: AHEAD_OF_TIME, MEASURED or BY_HAND.
    by: the date and the command that wrote the line, before them the GPU if it was measured; by hand: why the tile is
        not the one that the command would take, with the figure that shows it.
    triton: the version that compiled it. figures: what this tile was chosen by. Both empty by hand.
    """

    kernel: str
    shape: str
    target: str
    tile: dict[str, int]
    chosen: str
    by: str
    triton: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.shape, self.target


def read(file: Path = FILE) -> list[Entry]:
    """Every line in order. Raises InputError, with what is wrong, for a file that is no such table."""
    try:
        lines: Any = input_file.read_json(file)["tiles"]
        found = [Entry(**line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no table of tiles: {error}") from None
    for entry in found:
        sizes = entry.tile.values() if isinstance(entry.tile, dict) else [0]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise InputError(f"{file}: the line of {' / '.join(entry.key)} needs a tile of whole numbers above 0")
        if entry.chosen not in (AHEAD_OF_TIME, MEASURED, BY_HAND) or not entry.by:
            raise InputError(
                f"{file}: the line of {' / '.join(entry.key)} must say how it was chosen ({AHEAD_OF_TIME!r}, "
                f"{MEASURED!r} or {BY_HAND!r}) and by what"
            )
    if len({entry.key for entry in found}) != len(found):
        raise InputError(f"{file} has two lines for the same kernel, shape and target; each may have one")
    return found


def write(changed: Iterable[Entry], file: Path = FILE) -> None:
    """Replaces the lines with the keys of `changed`, adds new ones, and keeps all in the order of their keys.

    Raises InputError as `read`, and if the file cannot be written.
    """
    lines = {entry.key: entry for entry in (*read(file), *changed)}
    text = ",\n  ".join(json.dumps(_shown(lines[key])) for key in sorted(lines))
    try:
        output_file.replace(file, f'{{"tiles": [\n  {text}\n]}}\n')
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
    entries.cache_clear()
    tile.cache_clear()


def _shown(entry: Entry) -> dict[str, Any]:
    """The fields of a line; empty ones are left out."""
    return {name: value for name, value in asdict(entry).items() if value}


@cache
def entries() -> dict[tuple[str, str, str], Entry]:
    """The committed table by (kernel, shape, target)."""
    return {entry.key: entry for entry in read()}


@cache
def tile(kernel: str, shape: str, target: Target) -> dict[str, int]:
    """The tile of a kernel for a class of shapes on a target. Raises InputError if the table has no line for them."""
    entry = entries().get((kernel, shape, target.name))
    if entry is None:
        raise InputError(
            f"the table has no tile of {kernel} for {shape} on {target.name}; "
            f"refllm bench tune --kernel {kernel} --target {target.name} --write makes one"
        )
    return entry.tile


@contextmanager
def instead(kernel: str, target: Target, tiles: Mapping[str, dict[str, int]]) -> Iterator[None]:
    """Within it, kernels are planned with these tiles for these classes. Nothing is written."""
    table = entries()
    before = dict(table)
    for shape, fields in tiles.items():
        table[kernel, shape, target.name] = Entry(kernel, shape, target.name, fields, BY_HAND, "to be judged")
    tile.cache_clear()
    try:
        yield
    finally:
        table.clear()
        table.update(before)
        tile.cache_clear()
