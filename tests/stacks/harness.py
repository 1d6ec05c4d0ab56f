"""What the tests of all stacks do: right models hold, planted bugs are named first at the right operator, and what was
seen is recorded. A test file of a stack, tests/stacks/test_NAME.py:

    CHECKS = Checks("mlx", ("llama-tiny", "helium-tiny"), ("float32", "bfloat16"))
    BUGS = (Bug("gate and up swapped", swap_gate_and_up, "layers.1.mlp.act"), ...)       # at least 10

    @pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
    def test_right_models_hold(checkpoint: str, dtype: str) -> None:
        must_hold(CHECKS, checkpoint, dtype, "mlx")

    @pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
    def test_planted_bugs_are_named(bug: Bug, dtype: str) -> None:
        must_be_named(CHECKS, bug, dtype, model_with(bug.plant, bug.checkpoint, dtype))

Files of stacks that are not in the extra `test` run by `make test-stacks` alone (conftest.py beside this file).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from refllm import golden
from refllm.check import compare
from refllm.check.oracle import Report, TapReport
from refllm.config import AutoConfig

LLAMA = "llama-tiny"


@dataclass(frozen=True)
class Bug:
    """A planted bug. plant: what makes it, as the test file pleases. at: how the names end of which one has to be named
    first, "layers.1.mlp.act". checkpoint: of the embedded ones. dtype: in which alone it can be seen; "" any.
    """

    name: str
    plant: Any
    at: str | tuple[str, ...]
    checkpoint: str = LLAMA
    dtype: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass
class Checks:
    """The checks of one stack. checkpoints: all embedded ones that it can load. dtypes: all that it computes in."""

    stack: str
    checkpoints: tuple[str, ...]
    dtypes: tuple[str, ...]
    held: list[dict[str, Any]] = field(default_factory=list)
    named: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ALL[self.stack] = self

    def right(self) -> list[tuple[str, str]]:
        """Every checkpoint in every dtype."""
        return [(checkpoint, dtype) for checkpoint in self.checkpoints for dtype in self.dtypes]

    def planted(self, bugs: Sequence[Bug]) -> list[Any]:
        """Every bug in one of the dtypes, which take turns: the same code plants it in each."""
        import pytest

        turns = [(bug, bug.dtype or self.dtypes[i % len(self.dtypes)]) for i, bug in enumerate(bugs)]
        return [pytest.param(bug, dtype, id=f"{bug.name}-{dtype}") for bug, dtype in turns]


ALL: dict[str, Checks] = {}
"""Stack -> its checks, of the test files that are imported."""


def must_hold(
    checks: Checks, checkpoint: str, dtype: str, candidate: Any, *, port: str = "", **options: Any
) -> list[Report]:
    """Asserts that a right model holds on every input. candidate and options: of `refllm.check.compare`.

    port: what it is, where a stack has several of one checkpoint. folder, an option: the checkpoint, where it is not
    the embedded one itself.
    """
    reports = compare(options.pop("folder", None) or golden.path(checkpoint), candidate, dtype=dtype, **options)
    wrong = [f"{report.inputs}: {_said(report)}" for report in reports if report.verdict != "holds"]
    assert not wrong, f"{checkpoint} {dtype}: {wrong}"
    assert {report.dtype for report in reports} == {dtype}
    last = reports[0].taps[-1]
    checks.held.append(
        {
            "checkpoint": _of(checkpoint, port),
            "family": AutoConfig.from_pretrained(golden.path(checkpoint)).model_type,
            "dtype": dtype,
            "values": len(reports[0].taps),
            "inputs": [report.inputs for report in reports],
            "sigma": round(last.end_to_end.ratio, 2),
        }
    )
    return reports


def must_be_named(checks: Checks, bug: Bug, dtype: str, candidate: Any, *, port: str = "", **options: Any) -> Report:
    """Asserts that a planted bug fails, and that the first failure is at one of the places where it was planted: that
    value itself, or the first shown one after it, which says that it stands for a span in which the place lies."""
    reports = compare(options.pop("folder", None) or golden.path(bug.checkpoint), candidate, dtype=dtype, **options)
    report = next((report for report in reports if report.verdict == "fails"), reports[0])
    places = (bug.at,) if isinstance(bug.at, str) else bug.at
    first = report.first_failure
    assert report.verdict == "fails", f"{bug.name}: {report.verdict}"
    assert first is not None, f"{bug.name}: {_said(report)}"
    there = [name for name in (first.name, *first.hidden) if f".{name}".endswith(tuple(f".{at}" for at in places))]
    assert there, f"{bug.name}: expected {' or '.join(places)}, named {_said(report)}"
    checks.named.append(
        {
            "bug": bug.name,
            "checkpoint": _of(bug.checkpoint, port),
            "dtype": dtype,
            "named": first.name,
            "of": 1 + len(first.hidden),
            "said": first.named or ", ".join(first.broken),
        }
    )
    return report


def _of(checkpoint: str, port: str) -> str:
    return f"{checkpoint}, {port}" if port else checkpoint


def _said(report: Report) -> str:
    """What a report says first, for the message of a failed test."""
    if report.misbehaviour is not None:
        return report.misbehaviour.text
    found: TapReport | None = report.first_failure
    where = "" if found is None else f"{found.name} ({', '.join([*found.broken, found.named])})"
    return "; ".join(filter(None, [report.verdict, where, *report.unseen, *report.unsaid]))


def results(checks: Checks, versions: dict[str, str]) -> dict[str, Any]:
    """What is kept of a run: docs/stacks/NAME.json."""
    return {
        "stack": checks.stack,
        "versions": versions,
        "checkpoints": list(checks.checkpoints),
        "dtypes": list(checks.dtypes),
        "right": sorted(checks.held, key=lambda run: (run["checkpoint"], run["dtype"])),
        "bugs": sorted(checks.named, key=lambda run: str(run["bug"])),
    }


def installed_versions(pins: Sequence[str]) -> dict[str, str]:
    """Package -> the version that is installed here, of those pinned and of what all stacks have."""
    import platform
    from importlib.metadata import version

    names = [pin.partition("==")[0].partition("[")[0] for pin in pins]
    return {"python": platform.python_version()} | {name: version(name) for name in (*names, "numpy", "torch")}
