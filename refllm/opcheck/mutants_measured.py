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
    """versions: of what it was measured with. mutants: by their slugs. typical: operator -> name of another test -> how
    many bugs it finds, of how many. alarms: the same of right implementations that it rejects; of gradients alone.
    right: what check-op says of right gradients, "" where they hold."""

    versions: dict[str, str] = field(default_factory=dict)
    mutants: dict[str, Measured] = field(default_factory=dict)
    typical: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    alarms: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    right: dict[str, str] = field(default_factory=dict)

    def of(self, mutant: "Mutant") -> Measured | None:
        """What is known of a mutant, None if it was not measured."""
        return self.mutants.get(mutant.slug)


def read(path: Path) -> Results:
    """What a file holds; nothing where there is none."""
    if not path.is_file():
        return Results()
    found = json.loads(path.read_text(encoding="utf-8"))
    mutants = (Measured(**{**one, "dtypes": tuple(one["dtypes"])}) for one in found["mutants"])
    typical, alarms = (
        {op: {name: (n, of) for name, (n, of) in by.items()} for op, by in found.get(part, {}).items()}
        for part in ("typical", "alarms")
    )
    return Results(
        found["versions"], {one.mutant: one for one in mutants}, typical, alarms, dict(found.get("right", {}))
    )


def write(path: Path, results: Results, backward: bool = False) -> None:
    """The file, in the order of the catalogue."""
    from refllm.kernels.mutants import catalogue

    listed = [one for one in map(results.of, catalogue(backward=backward)) if one is not None]
    content = {"versions": results.versions, "mutants": [*map(asdict, listed)]}
    parts: dict[str, dict[str, Any]] = {"typical": results.typical} | ({"alarms": results.alarms} if backward else {})
    for part, by in parts.items():
        content[part] = {operator: by[operator] for operator in operators(backward) if operator in by}
    if backward:
        content["right"] = dict(sorted(results.right.items()))
    output_file.replace(path, json.dumps(content, indent=1) + "\n")


def operators(backward: bool) -> tuple[str, ...]:
    """Those that have mutants."""
    from refllm import kernels

    return kernels.plain.BACKWARD if backward else kernels.OPERATORS


def measure(
    path: Path, resume: bool, workers: int, progress: Progress, backward: bool = False, most: int | None = None
) -> Results:
    """Our check on the whole catalogue and other tests on its torch part. Written after every mutant; resume: what the
    file has is kept. workers: processes. backward: of gradients, and right implementations besides. most: so many
    mutants, operators and right implementations at a time."""
    from refllm.kernels.mutants import catalogue

    results = replace(read(path) if resume else Results(), versions=_versions())
    asked: list[tuple[str, str]] = [
        ("typical", operator) for operator in operators(backward) if operator not in results.typical
    ]
    if backward:
        asked += [("alarms", operator) for operator in operators(backward) if operator not in results.alarms]
        asked += [("right", name) for name in right_ones() if name not in results.right]
    asked += [("mutants", m.slug) for m in catalogue(backward=backward) if results.of(m) is None]
    asked = asked[:most]
    for done, (part, name, one) in enumerate(_each(asked, workers)):
        getattr(results, part)[name] = one
        write(path, results, backward)
        progress(name, done + 1, len(asked))
    return results


def holds(results: Results, backward: bool = False) -> bool:
    """Whether every bug is found, and nothing else, and every place is told."""
    from refllm.kernels.mutants import catalogue

    def right(mutant: "Mutant") -> bool:
        one = results.of(mutant)
        return one is not None and one.found != bool(mutant.equivalent) and bool(one.rounds) == bool(mutant.place)

    known = not backward or (set(results.right) == set(right_ones()) and not any(results.right.values()))
    return known and all(map(right, catalogue(backward=backward)))


def _each(asked: Iterable[tuple[str, str]], workers: int) -> Iterator[tuple[str, str, Any]]:
    """(part, name, what was measured), as they are ready."""
    ways: dict[str, Callable[[str], Any]] = {
        "mutants": measured, "typical": _typical, "alarms": _alarms, "right": _said_of
    }  # fmt: skip
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        running: dict[Future[Any], tuple[str, str]] = {
            pool.submit(ways[part], name): (part, name) for part, name in asked
        }
        for future in as_completed(running):
            yield *running[future], future.result()


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

    if "_backward_" in slug:
        return _measured_gradients(next(m for m in catalogue(backward=True) if m.slug == slug))
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


def _measured_gradients(mutant: "Mutant") -> Measured:
    """One mutant of gradients: as `measured`, without a process of its own and without making the call small."""
    from refllm.opcheck.audit import outcome_of

    before = sum(os.times()[:4])
    outcome = outcome_of(mutant, DRAWN[mutant.form], known_first=True)
    level = outcome.level if outcome.killed else ""
    if level == LAST:  # the first call that showed it: perhaps one by default would have, later
        level = _level_by_default(mutant) or level
    asked = ["--policy fused"] * bool(mutant.place) + ["--level hostile"] * (level == LAST)
    return Measured(
        mutant.slug,
        outcome.killed,
        outcome.by,
        level,
        outcome.examples,
        " ".join(asked),
        round(outcome.seconds, 2),
        round(sum(os.times()[:4]) - before, 2),
        outcome.dtypes,
        _rounds(mutant) if mutant.place else "",
    )


def _level_by_default(mutant: "Mutant") -> str:
    """The level at which one is found that is looked for without `--level hostile`; "" if it is not."""
    from refllm.opcheck.api import check_op

    how: dict[str, Any] = {"max_examples": 0, "shrink": False, "isolate": False, "policy": mutant.place and "fused"}
    report = check_op(
        mutant.operator, mutant.function(), dtype=mutant.dtypes[0], **{k: v for k, v in how.items() if v != ""}
    )
    counted = [one for one in report.findings if report.verdict == "fails" and one.level != LAST]
    return counted[0].level if counted else ""


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
    """How many bugs each test of others finds, of how many."""
    from refllm.opcheck.audit import audit

    def counted(name: str, test: Any) -> tuple[int, int]:
        bugs = audit(operator, test, dtype=_dtype_of(name, operator)).bugs
        return sum(o.killed for o in bugs), len(bugs)

    return {name: counted(name, test) for name, test in _other_tests(operator).items()}


def _other_tests(operator: str) -> dict[str, Any]:
    from refllm.opcheck.gradient_tests import gradient_tests
    from refllm.opcheck.typical_tests import typical_tests

    return gradient_tests(operator) if operator.endswith("_backward") else typical_tests(operator)


def _dtype_of(name: str, operator: str) -> str:
    from refllm.opcheck.gradient_tests import dtype_of

    return dtype_of(name, operator)


def _alarms(operator: str) -> dict[str, tuple[int, int]]:
    """How many right implementations each test of others rejects, of how many."""
    from refllm.kernels.mutants.right_gradients import right_gradients

    def rejects(test: Any, one: Any) -> bool:
        try:
            test(one.gradients)
        except Exception:
            return True
        return False

    found = {}
    for name, test in _other_tests(operator).items():
        own = [one for one in right_gradients(operator) if _dtype_of(name, operator) in one.dtypes]
        found[name] = sum(rejects(test, one) for one in own), len(own)
    return found


def right_ones() -> list[str]:
    """Right gradients, each in each of its dtypes: "rms_norm_backward: quotient rule, float32"."""
    from refllm.kernels.mutants.right_gradients import right_gradients

    return [f"{one.operator}: {one.name}, {dtype}" for one in right_gradients() for dtype in one.dtypes]


def _said_of(name: str) -> str:
    """What check-op says of right gradients; "" if they hold."""
    from refllm.kernels.mutants.right_gradients import right_gradients
    from refllm.opcheck.api import check_op
    from refllm.ops.backward_contracts import forward_name

    words, _, dtype = name.rpartition(", ")
    (one,) = (one for one in right_gradients() if f"{one.operator}: {one.name}" == words)
    operator = forward_name(one.operator) if one.autograd else one.operator
    how: dict[str, Any] = {"dtype": dtype, "max_examples": 0, "shrink": False, "isolate": False, "seconds": 300.0}
    how |= {"without": one.without, "policy": one.policy or None, "backward": one.autograd}
    report = check_op(operator, one.function, **how)
    return (
        ""
        if report.verdict == "holds"
        else f"{report.verdict}: {report.property}: {report.finding and report.finding.text}"
    )
