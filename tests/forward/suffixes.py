"""Checks the shape suffixes of variable names (`q_BHSD`) while the code runs.

The convention: the letters after the last underscore name the axes. `Suffixes` looks at the local variables of every
function of the watched files when it returns: an array must have as many axes as its suffix has letters, and a letter
must mean one size, in the function (where `B, S, E = x.shape` counts too) and, in files for which sizes are given, the
size of that name.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np

_SUFFIXED = re.compile(r"[a-z]\w*_([A-Zg1]*[A-Z][A-Zg1]*)")
_AXES = set("BSTEFHKDRVLCNg1")


class Suffixes:
    """As a context manager: watches the functions that return meanwhile in this thread.

    sizes: folder -> letter -> size, or an empty mapping where letters only have to agree within a function. A frame
    counts for the first folder that it lies in. problems: what is wrong, each once. seen: names of functions with a
    suffixed array.
    """

    def __init__(self, sizes: Mapping[Path, Mapping[str, int]]) -> None:
        self.sizes = sizes
        self.problems: list[str] = []
        self.seen: set[str] = set()

    def __enter__(self) -> Self:
        self._before = sys.getprofile()
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.setprofile(self._before)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "return":
            return
        path = Path(frame.f_code.co_filename)
        for folder, sizes in self.sizes.items():
            if folder in path.parents:
                return self._check(f"{path.name}: {frame.f_code.co_name}", frame.f_locals, dict(sizes))

    def _check(self, where: str, variables: Mapping[str, Any], sizes: dict[str, int]) -> None:
        meaning = dict.fromkeys(sizes, "the model")
        for name, value in variables.items():
            if len(name) == 1 and name.isupper() and isinstance(value, int):
                self._agree(where, name, name, value, sizes, meaning)
        for name, value in variables.items():
            match = _SUFFIXED.fullmatch(name)
            if match is None or not isinstance(value, np.ndarray):
                continue
            self.seen.add(where)
            letters = match[1]
            if not set(letters) <= _AXES:
                self._report(f"{where}: {name} has a letter that names no axis")
            elif len(letters) != value.ndim:
                self._report(f"{where}: {name} has shape {value.shape}")
            else:
                for letter, size in zip(letters, value.shape, strict=True):
                    self._agree(where, name, letter, size, sizes, meaning)

    def _agree(
        self, where: str, name: str, letter: str, size: int, sizes: dict[str, int], meaning: dict[str, str]
    ) -> None:
        expected = 1 if letter == "1" else sizes.setdefault(letter, size)
        if size != expected:
            self._report(f"{where}: {letter} is {size} in {name}, but {expected} in {meaning.get(letter, 'general')}")
        meaning.setdefault(letter, name)

    def _report(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
