"""Reads and writes tiles.json. Light: kernels import it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refllm.errors import InputError
from refllm.kernels.targets import Target

FILE = Path(__file__).with_name("tiles.json")

ANY = "any"
"""The shape class, and the target, of the line that serves where no other does."""

AHEAD_OF_TIME, MEASURED = "ahead of time", "measured"


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    kernel: its file. shape: the class, as the `shape_class` of that file names it. target: a name, or ANY.
    tile: the fields of the kernel's `Tile`. chosen: AHEAD_OF_TIME or MEASURED.
    by: the machine if it was measured, the date and the command; or the reason for a choice by hand.
    """

    kernel: str
    shape: str
    target: str
    tile: dict[str, int]
    chosen: str
    by: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.shape, self.target


def read(file: Path = FILE) -> list[Entry]:
    """Every line in order. Raises InputError, with what is wrong, for a file that is no such table."""
    try:
        lines: Any = json.loads(file.read_text(encoding="utf-8"))["tiles"]
        found = [Entry(**line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no table of tiles: {error}") from None
    for entry in found:
        sizes = entry.tile.values() if isinstance(entry.tile, dict) else [0]
        if not all(isinstance(size, int) and size > 0 for size in sizes) or entry.chosen not in (
            AHEAD_OF_TIME,
            MEASURED,
        ):
            raise InputError(
                f"{file}: the line of {' / '.join(entry.key)} needs a tile of whole numbers above 0, and chosen "
                f"{AHEAD_OF_TIME!r} or {MEASURED!r}"
            )
    if len({entry.key for entry in found}) != len(found):
        raise InputError(f"{file} has two lines for the same kernel, shape and target; each may have one")
    return found


def write(changed: Iterable[Entry], file: Path = FILE) -> None:
    """Replaces the lines with the keys of `changed`, in their places; new ones go to the end. Others keep their text.

    Raises InputError as `read`, and if the file cannot be written.
    """
    new = {entry.key: entry for entry in changed}
    lines = [new.pop(entry.key, entry) for entry in read(file)]
    text = ",\n  ".join(json.dumps(asdict(entry)) for entry in (*lines, *new.values()))
    try:
        file.write_text(f'{{"tiles": [\n  {text}\n]}}\n', encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
    entries.cache_clear()
    tile.cache_clear()


@cache
def entries() -> dict[tuple[str, str, str], Entry]:
    """The committed table by (kernel, shape, target)."""
    return {entry.key: entry for entry in read()}


@cache
def tile(kernel: str, shape: str, target: Target) -> dict[str, int]:
    """The tile of a kernel for a class of shapes on a target.

    Without a line for that target the line of the class for ANY target serves, without that the one for ANY shape.
    Raises InputError for a kernel of which the table knows nothing.
    """
    table = entries()
    for key in ((kernel, shape, target.name), (kernel, shape, ANY), (kernel, ANY, target.name), (kernel, ANY, ANY)):
        if key in table:
            return table[key].tile
    known = sorted({entry.kernel for entry in table.values()})
    raise InputError(f"there is no tile for {kernel}; the table knows {', '.join(known)}")
