"""The verdict on a trace: candidate and yardstick, each against the exact run, tap by tap."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from refllm.check import tolerance
from refllm.check.taps import Trace
from refllm.check.tolerance import Error

Verdict = Literal["holds", "fails", "untested"]


@dataclass(frozen=True)
class TapReport:
    """One tap.

    max_error, at: largest absolute error of the candidate and its index. differing: elements, of `elements`, whose
    value is not the yardstick's, bit for bit. reasons: the rules that broke, or the trivial wrong answers that the
    rules would have let pass.
    """

    name: str
    candidate: Error
    yardstick: Error
    max_error: float
    at: tuple[int, ...]
    differing: int
    elements: int
    verdict: Verdict
    reasons: list[str]

    @property
    def ratio(self) -> float:
        """Candidate's rms error / the yardstick's: 0 where neither errs, inf where only the candidate does."""
        if np.isnan(self.candidate.rms):
            return float("inf")
        if self.yardstick.rms == 0.0:
            return 0.0 if self.candidate.rms == 0.0 else float("inf")
        return self.candidate.rms / self.yardstick.rms


@dataclass(frozen=True)
class TokenReport:
    """Most likely next tokens at every position: how many agree with the exact run, and the margins of those that flip.

    worst_margin: largest difference, between the exact logits of the exact and of the candidate's token, over the
    flips. limit: what rounding may turn round.
    """

    positions: int
    flips: int
    worst_margin: float
    worst_position: int
    limit: float

    @property
    def verdict(self) -> Verdict:
        """A flip within the limit is explained by rounding, a larger one is a defect."""
        return "holds" if self.worst_margin <= self.limit else "fails"


@dataclass(frozen=True)
class Report:
    """One candidate on one checkpoint in one precision."""

    checkpoint: str
    candidate: str
    dtype: str
    policy: str
    tokens: int
    taps: list[TapReport]
    next_tokens: TokenReport | None
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """fails if anything fails; else untested if a trivial wrong answer would have passed somewhere; else holds."""
        verdicts: list[Verdict] = [tap.verdict for tap in self.taps]
        if self.next_tokens is not None:
            verdicts.append(self.next_tokens.verdict)
        return "fails" if "fails" in verdicts else "untested" if "untested" in verdicts else "holds"

    @property
    def first_failure(self) -> TapReport | None:
        """The first tap in order of computation that fails: the defect is at or just before it."""
        return next((tap for tap in self.taps if tap.verdict == "fails"), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, verdicts included."""
        values = asdict(self)
        values["verdict"] = self.verdict
        for tap, out in zip(self.taps, values["taps"], strict=True):
            out["ratio"] = tap.ratio
        if self.next_tokens is not None:
            values["next_tokens"]["verdict"] = self.next_tokens.verdict
        return values


def compare_traces(exact: Trace, yardstick: Trace, candidate: Trace) -> list[TapReport]:
    """Reports on every tap of the exact run, in its order."""
    return [compare_tap(name, exact[name], yardstick[name], candidate[name]) for name in exact]


def compare_tap(name: str, exact: np.ndarray, yardstick: np.ndarray, candidate: np.ndarray) -> TapReport:
    """Measures one tap and applies the rules of `tolerance`, after showing that they would reject wrong answers."""
    if candidate.shape != exact.shape:
        return _failed(name, exact, [f"shape {list(candidate.shape)}, expected {list(exact.shape)}"])
    exact, yardstick, candidate = (np.asarray(value, dtype=np.float64) for value in (exact, yardstick, candidate))
    differing = int(np.count_nonzero(~((candidate == yardstick) | (np.isnan(candidate) & np.isnan(yardstick)))))

    # Overflow belongs to the precision: where the yardstick is not finite the candidate must not be either, and there
    # is nothing to measure. Anywhere else NaN or infinity is a defect.
    overflow = ~np.isfinite(yardstick)
    if not np.array_equal(overflow, ~np.isfinite(candidate)):
        at = np.argwhere(overflow != ~np.isfinite(candidate))[0]
        return _failed(name, exact, ["NaN or infinity" if np.isfinite(yardstick[tuple(at)]) else "finite"], tuple(at))
    exact, yardstick, candidate = (np.where(overflow, 0.0, value) for value in (exact, yardstick, candidate))

    error, stick = tolerance.measure(exact, candidate), tolerance.measure(exact, yardstick)
    difference = np.abs(candidate - exact)
    at = np.unravel_index(int(np.argmax(difference)), difference.shape)
    reasons = tolerance.broken_rules(error, stick)
    verdict: Verdict = "fails" if reasons else "holds"
    if not reasons:
        reasons = [f"{wrong} would pass" for wrong in undetected(exact, yardstick)]
        verdict = "untested" if reasons else "holds"
    return TapReport(
        name=name,
        candidate=error,
        yardstick=stick,
        max_error=float(difference[at]),
        at=tuple(int(index) for index in at),
        differing=differing,
        elements=exact.size,
        verdict=verdict,
        reasons=reasons,
    )


def undetected(exact: np.ndarray, yardstick: np.ndarray) -> list[str]:
    """Trivial wrong answers, made from the yardstick's own values, that the rules accept. Should be none.

    exact, yardstick: [..., n]. Positions are exchanged along the last axis but one, where there is more than one.
    """
    wrong = {"zeros": np.zeros_like(yardstick), "times 1.01": yardstick * 1.01}
    if yardstick.ndim > 1 and yardstick.shape[-2] > 1:
        wrong["positions shifted by one"] = np.roll(yardstick, 1, axis=-2)
    stick = tolerance.measure(exact, yardstick)
    return [name for name, run in wrong.items() if not tolerance.broken_rules(tolerance.measure(exact, run), stick)]


def compare_next_tokens(exact_BSV: np.ndarray, yardstick_BSV: np.ndarray, candidate_BSV: np.ndarray) -> TokenReport:
    """Compares the most likely next token at every position; NaN logits count as the lowest."""
    exact, candidate = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (exact_BSV, candidate_BSV))
    limit = tolerance.flip_limit(
        tolerance.measure(exact, np.nan_to_num(yardstick_BSV.astype(np.float64)).reshape(exact.shape))
    )
    rows = np.arange(len(exact))
    theirs = np.argmax(np.nan_to_num(candidate, nan=-np.inf), axis=-1)
    margins = exact.max(axis=-1) - exact[rows, theirs]
    worst = int(np.argmax(margins))
    return TokenReport(len(exact), int(np.count_nonzero(margins > 0)), float(margins[worst]), worst, limit)


def _failed(name: str, exact: np.ndarray, reasons: list[str], at: tuple[int, ...] = ()) -> TapReport:
    nothing = tolerance.measure(exact, np.asarray(exact, dtype=np.float64))
    lost = Error(nothing.scale, float("nan"), float("nan"), float("nan"), float("nan"), nothing.rows)
    return TapReport(name, lost, nothing, float("nan"), at, exact.size, exact.size, "fails", reasons)
