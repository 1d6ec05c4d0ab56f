"""What is kept of a run that was checked: without a defect, and with one."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from refllm.accuracy import limits
from refllm.accuracy.measure import Measure
from refllm.check.oracle import Report


@dataclass
class Outcome:
    """What the check said of one mutant. reported: the first failure, "" if everything held. right: it is one of those
    expected (for a place, if no policy is named: nothing failed, and the report says where it rounds). inputs: the
    input that showed it (stressed inputs are tried only where the plain one does not). cause: of the failure. said: the
    lines on where it rounds that speak of a place."""

    reported: str
    layer_right: bool
    right: bool
    rules: list[str]
    inputs: str
    cause: str = ""
    said: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One run without a defect. attention: of Transformers, or the profile of another right port. ratios: value -> (end
    to end, isolated), where an error is predicted. closest: rule -> the largest share of its limit that any value
    reached. elsewhere: whether any value differs to the bit from that of the port that rounds as Transformers. tokens:
    how many were compared. scatters: value -> the standard error of its isolated ratio (`Measure.scatter`)."""

    model: str
    dtype: str
    attention: str
    inputs: str
    threads: int
    seed: int
    verdict: str
    reported: str
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    closest: dict[str, float] = field(default_factory=dict)
    elsewhere: bool = False
    tokens: int = 0
    scatters: dict[str, float] = field(default_factory=dict)


def run_of(report: Report, model: str, attention: str, *, threads: int, seed: int, elsewhere: bool = False) -> Run:
    """What is kept of the report on a run without a defect."""
    first = report.first_failure
    said = "; ".join(report.unsaid) if first is None else f"{first.name}: {', '.join(first.broken)}"
    run = Run(model, report.dtype, attention, report.inputs, threads, seed, report.verdict, said)
    run.elsewhere, run.tokens = elsewhere, report.tokens
    for tap in report.taps:
        if tap.isolated is not None and tap.end_to_end.rms_sigma > 0 and tap.isolated.rms_sigma > 0:
            run.ratios[tap.name] = (tap.end_to_end.ratio, tap.isolated.ratio)
            run.scatters[tap.name] = tap.isolated.scatter
        if tap.isolated is not None:
            for rule, share in _shares_of_limits(tap.end_to_end, tap.isolated, tap.dtype):
                run.closest[rule] = max(run.closest.get(rule, 0.0), share)
    flips = report.next_tokens.flips if report.next_tokens else []
    run.closest["next token"] = max((flip.sigmas / limits.FLIP for flip in flips), default=0.0)
    return run


def _shares_of_limits(end_to_end: Measure, isolated: Measure, dtype: str) -> Iterator[tuple[str, float]]:
    yield "error end to end", end_to_end.ratio / limits.end_to_end_limit(end_to_end)
    yield "error", isolated.ratio / limits.isolated_limit(isolated, dtype)
    yield "one row", isolated.row_ratio / limits.row_limit(isolated, dtype)
    yield "rounding points", isolated.misrounded / limits.misrounded_limit(isolated.elements)
