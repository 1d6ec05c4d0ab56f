"""What check-op makes of every known bug, measured one by one, so that a run that was ended goes on where it was.

A bug counts as found if it is found in every dtype in which it makes a difference. Besides, it is given once to the
check as a command runs it, in a process of its own and with the finding made small: that says at which level of inputs
it shows first, what has to be asked for it, and how long it takes.
"""

import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refllm.storage import output_file

if TYPE_CHECKING:
    from refllm.kernels.mutants import Mutant

DRAWN = {"torch": 100, "triton": 0}
"""Calls that check-op draws after its fixed ones, which are enough for the Triton kernels."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """One mutant. found: in every dtype of `dtypes`; of a change that nobody can see: in one of them. by: the property.

    level: of the call that shows it first. examples: how many calls were examined until then. asked: the options that
    it takes, "" where the defaults do. seconds: until a counterexample was told that is small, in the first dtype; cpu:
    those of them in which a processor was at work for it.
    rounds: of a place, what the report says by default, "" if it does not hold.
    """

    mutant: str
    found: bool
    by: str
    level: str
    examples: int
    asked: str
    seconds: float
    cpu: float
    dtypes: tuple[str, ...]
    rounds: str = ""


@dataclass(frozen=True)
class Results:
    """versions: of what it was measured with. mutants: by their slugs. typical: operator -> name of a typical test ->
    how many bugs it finds, of how many."""

    versions: dict[str, str] = field(default_factory=dict)
    mutants: dict[str, Measured] = field(default_factory=dict)
    typical: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def of(self, mutant: "Mutant") -> Measured | None:
        """What is known of a mutant, None if it was not measured."""
        return self.mutants.get(mutant.slug)


def read(path: Path) -> Results:
    """What a file holds; nothing where there is none."""
    if not path.is_file():
        return Results()
    found = json.loads(path.read_text(encoding="utf-8"))
    mutants = (Measured(**{**one, "dtypes": tuple(one["dtypes"])}) for one in found["mutants"])
    typical = {op: {name: (n, of) for name, (n, of) in by.items()} for op, by in found["typical"].items()}
    return Results(found["versions"], {one.mutant: one for one in mutants}, typical)


def write(path: Path, results: Results) -> None:
    """The file, in the order of the catalogue."""
    from refllm import kernels
    from refllm.kernels.mutants import catalogue

    listed = [one for one in map(results.of, catalogue()) if one is not None]
    typical = {operator: results.typical[operator] for operator in kernels.OPERATORS if operator in results.typical}
    content = {"versions": results.versions, "mutants": [*map(asdict, listed)], "typical": typical}
    output_file.replace(path, json.dumps(content, indent=1) + "\n")


def measure(path: Path, resume: bool, workers: int, progress: Progress) -> Results:
    """Our check on the whole catalogue and typical tests on its torch part. Written after every mutant; resume: what
    the file has is kept. workers: processes."""
    from refllm import kernels
    from refllm.kernels.mutants import catalogue

    results = replace(read(path) if resume else Results(), versions=_versions())
    mutants = [m for m in catalogue() if results.of(m) is None]
    operators = [operator for operator in kernels.OPERATORS if operator not in results.typical]
    for done, (name, one) in enumerate(_each([m.slug for m in mutants], operators, workers)):
        if isinstance(one, Measured):
            results.mutants[name] = one
        else:
            results.typical[name] = one
        write(path, results)
        progress(name, done + 1, len(mutants) + len(operators))
    return results


def holds(results: Results) -> bool:
    """Whether every bug is found, and nothing else, and every place is told."""
    from refllm.kernels.mutants import catalogue

    def right(mutant: "Mutant") -> bool:
        one = results.of(mutant)
        return one is not None and one.found != bool(mutant.equivalent) and bool(one.rounds) == bool(mutant.place)

    return all(map(right, catalogue()))


def _each(slugs: Iterable[str], operators: Iterable[str], workers: int) -> Iterator[tuple[str, Any]]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        running: dict[Future[Any], str] = {pool.submit(measured, slug): slug for slug in slugs}
        running |= {pool.submit(_typical, operator): operator for operator in operators}
        for future in as_completed(running):
            yield running[future], future.result()


def _one_thread() -> None:
    """The processes are as many as the cores."""
    import torch

    torch.set_num_threads(1)


def _versions() -> dict[str, str]:
    import numpy
    import torch
    import triton

    found = {"torch": torch, "triton": triton, "numpy": numpy}
    cores = f"{os.cpu_count()} cores"
    return {name: one.__version__ for name, one in found.items()} | {"python": platform.python_version(), "on": cores}


def measured(slug: str) -> Measured:
    """One mutant, by its slug."""
    from refllm.kernels.mutants import catalogue
    from refllm.opcheck.audit import outcome_of

    mutant = next(m for m in catalogue() if m.slug == slug)
    outcome = outcome_of(mutant, DRAWN[mutant.form])
    if mutant.equivalent:
        return Measured(
            slug, outcome.killed, outcome.by, "", outcome.examples, "", outcome.seconds, 0.0, outcome.dtypes
        )
    policy = "fused" if mutant.place else None
    report, cpu = _as_a_command(mutant, policy)
    bitwise = report.verdict == "holds" and mutant.form == "triton"
    if bitwise:
        report, cpu = _as_a_command(mutant, policy, bitwise=True)
    level = report.findings[0].first.level if report.findings else ""
    asked = ["--policy fused"] * bool(mutant.place) + [BITWISE] * bitwise + ["--level hostile"] * (level == LAST)
    return Measured(
        slug,
        outcome.killed and report.verdict == "fails",
        report.property,
        level,
        report.examples,
        " ".join(asked),
        round(report.seconds, 2),
        round(cpu, 2),
        outcome.dtypes,
        _rounds(mutant) if mutant.place else "",
    )


LAST, BITWISE = "hostile", "--bitwise"
"""The level that counts only if it is asked for, and the option that asks for bits."""


def _as_a_command(mutant: "Mutant", policy: str | None, **more: Any) -> tuple[Any, float]:
    """(report, seconds of processors)."""
    from refllm.opcheck.api import check_op

    reference = f"refllm.kernels.mutants.built:{mutant.slug}"
    before = sum(os.times()[:4])
    report = check_op(mutant.operator, reference, dtype=mutant.dtypes[0], policy=policy, level=LAST, **more)
    return report, sum(os.times()[:4]) - before


def _rounds(mutant: "Mutant") -> str:
    from refllm.opcheck.api import check_op

    reference = f"refllm.kernels.mutants.built:{mutant.slug}"
    report = check_op(mutant.operator, reference, dtype=mutant.dtypes[0], max_examples=DRAWN[mutant.form])
    return report.rounds if report.verdict == "holds" else ""


def _typical(operator: str) -> dict[str, tuple[int, int]]:
    from refllm.opcheck.audit import audit
    from refllm.opcheck.typical_tests import typical_tests

    def counted(name: str, test: Any) -> tuple[int, int]:
        bugs = audit(operator, test, dtype=name.rpartition(", ")[2]).bugs
        return sum(o.killed for o in bugs), len(bugs)

    return {name: counted(name, test) for name, test in typical_tests(operator).items()}
