"""The bugs of an operator that people really made, and what the small call of its page sees of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.accuracy.judge import judge
from refllm.kernels.mutants import Mutant, catalogue
from refllm.kernels.mutants.known_bugs import KNOWN_BUGS
from refllm.learn.book.calls import SmallCall

_MANY = 1e6  # sigma; beyond, the number alone says enough
_TRIGGERS = {reference: bug.trigger for bug in KNOWN_BUGS for reference in bug.references}


@dataclass(frozen=True)
class Bug:
    """One entry of the list. source: where it was first found; link: its address, "" where it has none. shows: what the
    small call sees. needs: what it takes to see it."""

    name: str
    what: str
    source: str
    link: str
    shows: str
    needs: str
    real: bool


def bugs_of(call: SmallCall) -> list[Bug]:
    """Those that stand in plain Torch, and of the Triton ones what has no such form; real ones first."""
    found: dict[str, Mutant] = {}
    for mutant in [*catalogue(call.operator, "torch"), *catalogue(call.operator, "triton")]:
        if not mutant.equivalent:
            found.setdefault(mutant.name, mutant)
    listed = [_bug(mutant, call) for mutant in found.values()]
    return sorted(listed, key=lambda bug: not bug.real)


def _bug(mutant: Mutant, call: SmallCall) -> Bug:
    project, _, number = mutant.source.partition("#")
    link = f"https://github.com/{project}/issues/{number}" if number.isdigit() else ""
    needs = mutant.corner or _TRIGGERS.get(mutant.source, "")
    if len(mutant.dtypes) < 3 and not mutant.place:
        needs = "; ".join([*([needs] if needs else []), " or ".join(mutant.dtypes)])
    real = not mutant.source.startswith("one-line")
    return Bug(mutant.name, mutant.what, mutant.source, link, _shows(mutant, call), needs, real)


def _shows(mutant: Mutant, call: SmallCall) -> str:
    if mutant.form != "torch":
        return ""
    if mutant.place:
        return f"no defect: it rounds {mutant.place}"
    function: Any = mutant.function()
    with _memory_is_nan():
        try:
            first = call.run(function)
            again = call.run(function)
        except Exception as error:
            return f"raises {type(error).__name__}"
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, again, strict=True)):
        return "other numbers at the next call"
    return _difference(first, call)


def _difference(values: tuple[np.ndarray, ...], call: SmallCall) -> str:
    if len(values) != len(call.expected):
        return f"{len(values)} results instead of {len(call.expected)}"
    for value, expected in zip(values, call.expected, strict=True):
        if value.shape != expected.exact.shape:
            return f"{expected.name} has the shape {list(value.shape)} instead of {list(expected.exact.shape)}"
        found = judge(value, expected)
        if not found.holds:
            place = ", ".join(map(str, found.worst))
            said = f"{expected.name}[{place}] is {found.value:.3g} and not {found.exact:.3g}"
            return f"{said}: {found.sigma:.2g} sigma" if found.sigma < _MANY else said
    return "nothing: all numbers hold"


@contextmanager
def _memory_is_nan() -> Iterator[None]:
    """New memory holds NaN, so that what nobody wrote is seen and is the same each time."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
