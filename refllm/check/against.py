"""A run judged against a known-good one of the same program: for `git bisect`, and where the page is not the measure.

Two honest runs differ by the roundings of both, which are independent where the code between them changed: the variance
of the difference is the sum of their variances, twice that of one run if both round alike. *End to end* the two values
are subtracted. *Own inputs* takes off first what the page makes of each run's own inputs, so that what came before does
not count; it is asked only where the known-good value is right by the page, since elsewhere the page does not know what
the code does with other inputs.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refllm.accuracy.tables import Tables
from refllm.check.asked import Asked
from refllm.check.difference import require_same_run
from refllm.check.oracle import Judge, Report, TapReport, ask_again, explained_best
from refllm.check.trace import Trace
from refllm.check.values import only
from refllm.errors import InputError
from refllm.forward.model import Model


class _KnownGood(Judge):
    """The known-good run, judged by the page. beyond: value -> what it has beyond the page on its own inputs, with the
    variance of that; whole: value -> the variance end to end. Rows as `Judge._rows` has them."""

    def __init__(self, model: Model, trace: Trace, asked: Asked, guess: Tables | None) -> None:
        super().__init__(model, trace, asked, guess, reorder=False)
        self.beyond: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.whole: dict[str, np.ndarray] = {}

    def _expected(
        self, name: str, exact: np.ndarray, variance: np.ndarray, alone: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if alone:
            with np.errstate(invalid="ignore"):  # infinities, which both may have
                beyond = self._rows(self.trace.taps[name]) - exact
            self.beyond[name] = np.asarray(beyond, np.float32), np.asarray(variance, np.float32)
        else:
            self.whole[name] = np.asarray(variance, np.float32)
        return exact, variance


class _Beside(Judge):
    """A run beside the known-good one: what is expected is that run's value, with the roundings of both."""

    def __init__(self, model: Model, trace: Trace, asked: Asked, good: _KnownGood) -> None:
        super().__init__(model, trace, asked, reorder=False)
        self.good = good
        if self.guesses() != [None]:  # nothing shows the tables: they are taken for those of the other run
            self.tables = good.tables

    def _expected(
        self, name: str, exact: np.ndarray, variance: np.ndarray, alone: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if alone:
            self._measured = "", self._measured[1]  # that was against the page
            beyond, of_good = self.good.beyond[name]
            return exact + beyond, variance + of_good
        return self._rows(self.good.trace.taps[name]), variance + self.good.whole[name]

    def _misrounded(self, candidate: np.ndarray, rounded: np.ndarray | None) -> float:
        return 0.0  # neither run is asked for the bits of the other


def judge_against(
    model: Model,
    trace: Trace,
    good: Trace,
    asked: Asked,
    *,
    checkpoint: str = "",
    step: Callable[..., None] = lambda *_: None,
) -> Report:
    """The report on a run against a known-good one, in sigma of the difference of two honest runs. model, trace: see
    `judge`; good: of the same model, inputs and format, and in the shapes of the vocabulary.

    Raises InputError where the two are not runs of the same.
    """
    require_same_run(good, trace)
    if good.dtype != trace.dtype:
        raise InputError(
            f"{good.source} is a run in {good.dtype}, {trace.source} one in {trace.dtype}: record it again"
        )
    if trace.last_alone or good.last_alone:
        trace, good = trace.with_last_logits(), good.with_last_logits()
    common = only(trace.taps, [name for name in trace.taps if name in good.taps])
    if not common:
        raise InputError(f"{good.source} and {trace.source} show no value of the same name")
    step("the known-good run")
    good_common = replace(good, taps=only(good.taps, common))
    known, of_good = explained_best(lambda guess: _KnownGood(model, good_common, asked, guess))
    right = {tap.name for tap in of_good if not tap.wrong_here}
    beside = _Beside(model, replace(trace, taps=common), asked, known)
    beside.alone(step)
    reports = beside.in_line(step)
    taps = [_difference(tap, tap.name in right) for tap in reports]
    ask_again(model, trace, beside.nearest_policy(), taps, step, runs=2)
    report = Report(
        checkpoint=checkpoint,
        candidate=f"{trace.source} against {good.source}",
        dtype=trace.dtype,
        policy=asked.name,
        inputs=trace.inputs.label,
        tokens=int(trace.inputs.valid.sum()),
        taps=taps,
        next_tokens=beside.next_tokens,
        attribution={},
        notes=list(trace.notes),
        config=model.config,
        unseen=_not_shown(trace, good),
    )
    report.notes += [_first(report, good), *(trace.doubts if report.verdict == "fails" else [])]
    return report


def _difference(tap: TapReport, right: bool) -> TapReport:
    """The tap without what is said of the candidate beside the page. right: whether the known-good value is so."""
    return replace(
        tap,
        isolated=tap.isolated if right else None,
        named="",
        another="",
        unrecognised=False,
        place="",
        overflow=0.0,
        untested=[],
    )


def _not_shown(trace: Trace, good: Trace) -> list[str]:
    missing = [name for name in good.taps if name not in trace.taps]
    many = "value" if len(missing) == 1 else "values"
    return [f"{len(missing)} {many} of {good.source} were not shown, first {missing[0]}"] if missing else []


def _first(report: Report, good: Trace) -> str:
    """Where the two runs part, in a sentence."""
    first = report.first_failure
    if first is None and report.verdict == "fails":
        return f"no value differs from {good.source} by more than two honest runs do, but a next token"
    if first is None:
        return f"no value differs from {good.source} by more than two honest runs do"
    return f"{first.name} is the first value that differs from {good.source} by more than two honest runs do"
