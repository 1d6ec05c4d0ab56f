"""The judgement of a trace: every named value against what the page predicts, end to end and operator by operator.

The page is run twice on values that carry their predicted error (`refllm.accuracy.propagation`). *End to end* it starts
from the token ids, so its error grows as the candidate's may. *Isolated* it takes over the candidate's own value at
every name, so that each operator is judged on the candidate's own inputs, and a defect shows where it is and nowhere
after.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from refllm.accuracy.judge import broken, broken_isolated
from refllm.accuracy.measure import Measure, measure, ulp_histogram
from refllm.accuracy.page import predict_page
from refllm.accuracy.propagation import Uncertain
from refllm.accuracy.verdicts import ValueVerdict, Verdict, verdict
from refllm.accuracy.wrong_answers import undetected
from refllm.check.error_map import error_map
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import Misbehaviour
from refllm.check.next_tokens import TokenReport, compare_tokens
from refllm.check.second_opinion import honest_ratios
from refllm.check.trace import Trace
from refllm.check.unseen import never_shown
from refllm.config import ModelConfig
from refllm.config.digest import config_hash
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.forward.taps import HEAD_TAPS
from refllm.precision import FUSED, Policy, largest


@dataclass
class TapReport:
    """One named value. isolated is None where the candidate does not record an earlier value that it needs.

    Indices in the measures are [batch row, position, channel] or [batch row, position, head, channel]. zmap: where the
    error lies that the value's own operator made (`refllm.check.error_map`).
    """

    name: str
    end_to_end: Measure
    isolated: Measure | None = None
    untested: list[str] = field(default_factory=list)
    ulps: list[int] = field(default_factory=list)
    dtype: str = "float32"
    zmap: np.ndarray | None = None

    @property
    def broken(self) -> list[str]:
        """The rules that this value breaks; empty if it holds."""
        return broken(self.end_to_end, self.isolated, self.dtype)

    @property
    def verdict(self) -> ValueVerdict:
        if self.broken:
            return "fails"
        return "untested" if self.untested else "holds"

    @property
    def defect_here(self) -> bool:
        """Whether the operator that makes this value is wrong, whatever it was given."""
        return self.isolated is not None and bool(broken_isolated(self.isolated, self.dtype))


def predict(
    model: Model, inputs: Inputs, dtype: str, policy: Policy, at_tap: Callable[[str, Uncertain], Uncertain]
) -> Uncertain:
    """Run the page of `model` on `inputs`; at_tap sees every named value. Returns the head's output or the last norm's.

    model: its weights must lie on the grid of `dtype`; its own arithmetic is not used.
    """
    return predict_page(
        model,
        inputs.input_ids,
        inputs.positions,
        inputs.mask,
        dtype,
        policy,
        at_tap,
        embeds_scale=inputs.embeds_scale,
    )


class Judge:
    """Collects the two runs over one trace."""

    def __init__(self, model: Model, trace: Trace, policy: Policy) -> None:
        _require_same(model, trace)
        self.model, self.trace, self.policy = model, trace, policy
        self.valid = trace.inputs.valid
        self.places = np.argwhere(self.valid)
        self.overflow = largest(trace.dtype)
        self.reports: dict[str, TapReport] = {}
        self.next_tokens: TokenReport | None = None
        self.shares: dict[str, float] = {}

    def run(self, step: Callable[[str], None] = lambda text: None) -> list[TapReport]:
        """Both runs; the reports are in order of computation, for the values that the candidate recorded."""
        known: set[str] = set()
        step("predicting, end to end")
        output = predict(self.model, self.trace.inputs, self.trace.dtype, self.policy, self._end_to_end(known))
        foreign = [name for name in self.trace.taps if name not in known]
        if foreign:
            raise InputError(f"trace: {foreign[0]!r} is no name of a value of this model ({len(foreign)} such names)")
        self.shares = output.shares
        name = HEAD_TAPS.get(self.model.head)
        if name == "lm_head" and name in self.trace.taps:
            exact, variance, candidate = map(self._rows, (output.value, output.variance, self.trace.taps[name]))
            self.next_tokens = compare_tokens(exact, variance, candidate, self.places)
            del exact, variance, candidate
        del output  # the logits of a whole prompt, not held during the second run
        step("predicting, each operator alone")
        predict(self.model, self.trace.inputs, self.trace.dtype, self.policy, self._isolated)
        return list(self.reports.values())

    def _end_to_end(self, known: set[str]) -> Callable[[str, Uncertain], Uncertain]:
        def at(name: str, x: Uncertain) -> Uncertain:
            known.add(name)
            candidate = self._candidate(name, x)
            if candidate is not None:
                exact, variance = self._rows(x.value, candidate), self._rows(x.variance, candidate)
                rows = self._rows(candidate)
                found = self._measure(rows, exact, variance)
                ulps = ulp_histogram(rows, exact, self.trace.dtype)
                self.reports[name] = TapReport(name, found, ulps=ulps, dtype=self.trace.dtype)
            return x

        return at

    def _isolated(self, name: str, x: Uncertain) -> Uncertain:
        candidate = self._candidate(name, x)
        if candidate is None:
            # A value that is not shown may exist only inside a kernel: whether it was rounded there is not known.
            return replace(x, rounded=None) if self.policy.name == FUSED.name else x
        exact, variance = self._rows(x.value, candidate), self._rows(x.variance, candidate)
        report, rows = self.reports[name], self._rows(candidate)
        report.isolated = replace(
            self._measure(rows, exact, variance), misrounded=self._misrounded(candidate, x.rounded)
        )
        report.zmap = error_map(rows, exact, variance, self.overflow)
        report.untested = undetected(exact, variance, self.trace.dtype)
        taken = x.value.copy()
        np.copyto(taken[..., : candidate.shape[-1]], candidate, where=np.isfinite(candidate))
        return Uncertain(taken, np.zeros(x.shape, np.float32))

    def _measure(self, rows: np.ndarray, exact: np.ndarray, variance: np.ndarray) -> Measure:
        """The measure, with indices that name the batch row and the position, padding counted."""
        found = measure(rows, exact, variance, self.overflow)
        places = {name: self._place(getattr(found, name)) for name in ("row", "at", "nonfinite_at")}
        return replace(found, **places)  # type: ignore[arg-type]

    def _misrounded(self, candidate: np.ndarray, rounded: np.ndarray | None) -> float:
        if rounded is None:
            return 0.0
        found, policy = self._rows(candidate), self._rows(rounded, candidate)
        return float(np.mean((found != policy) & ~(np.isnan(found) & np.isnan(policy))))

    def _place(self, index: tuple[int, ...]) -> tuple[int, ...]:
        return (*(int(i) for i in self.places[index[0]]), *index[1:]) if index else ()

    def _candidate(self, name: str, x: Uncertain) -> np.ndarray | None:
        candidate = self.trace.taps.get(name)
        if candidate is None:
            return None
        partial = name.endswith("_rope") and candidate.shape[:-1] == x.shape[:-1] and candidate.shape[-1] <= x.shape[-1]
        if candidate.shape != x.shape and not partial:
            raise InputError(f"trace: {name} has shape {list(candidate.shape)}, expected {list(x.shape)}")
        if name.endswith(".scores") and not self.valid.all():  # against keys of padding, which nobody attends to
            candidate = np.where(self.valid[:, None, None, :], candidate, x.value)
        return candidate

    def _rows(self, values: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """[B, S, n] or [B, H, S, n] -> [N, n] or [N, H, n]: the positions that are not padding."""
        if like is not None:
            values = values[..., : like.shape[-1]]
        by_position = values if values.ndim == 3 else values.transpose(0, 2, 1, 3)
        if self.valid.all():  # no copy of what lies so already
            return np.ascontiguousarray(by_position).reshape(-1, *by_position.shape[2:])
        return by_position[self.valid]


def _require_same(model: Model, trace: Trace) -> None:
    if trace.config_hash != config_hash(model.config):
        raise InputError(
            f"trace of {trace.source}: its config ({trace.config_hash}) is not that of the checkpoint "
            f"({config_hash(model.config)}); trace the same checkpoint"
        )
    if not trace.taps:
        raise InputError(f"trace of {trace.source}: it holds no values")
    if int(trace.inputs.input_ids.max()) >= model.config.vocab_size:
        raise InputError(f"trace of {trace.source}: token id {trace.inputs.input_ids.max()} is outside the vocabulary")


@dataclass
class Report:
    """One candidate on one checkpoint and one input.

    attribution: named value -> part of the predicted variance of the last value that comes from making it; the parts
    sum to 1. notes: sentences a reader should know. config: of the model, for the formulas in a report. misbehaviour:
    what the candidate did in place of a forward pass; then nothing was measured. unseen: sentences on what the run does
    not show.
    """

    checkpoint: str
    candidate: str
    dtype: str
    policy: str
    inputs: str
    tokens: int
    taps: list[TapReport]
    next_tokens: TokenReport | None
    attribution: dict[str, float]
    notes: list[str] = field(default_factory=list)
    config: ModelConfig | None = None
    misbehaviour: Misbehaviour | None = None
    unseen: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The run fails if the candidate misbehaves, or any value or a next token fails; one with an untested value, or
        that something was not seen of, is incomplete."""
        values = {tap.verdict for tap in self.taps}
        wrong = self.misbehaviour or "fails" in values or (self.next_tokens and self.next_tokens.defects)
        return verdict(wrong, missing=self.unseen or "untested" in values)

    @property
    def first_failure(self) -> TapReport | None:
        """Where to look: the first operator that is wrong on its own inputs, else the first value over its budget."""
        defects = (tap for tap in self.taps if tap.defect_here)
        return next(defects, None) or next((tap for tap in self.taps if tap.verdict == "fails"), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, verdicts included. Infinities and NaN are strings: float() reads every figure back."""
        first = self.first_failure
        values = {
            "checkpoint": self.checkpoint,
            "candidate": self.candidate,
            "dtype": self.dtype,
            "policy": self.policy,
            "inputs": self.inputs,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "first_failure": None if first is None else first.name,
            "misbehaviour": None if self.misbehaviour is None else asdict(self.misbehaviour),
            "unseen": self.unseen,
            "taps": [
                {
                    "name": tap.name,
                    "verdict": tap.verdict,
                    "broken": tap.broken,
                    "untested": tap.untested,
                    "end_to_end": tap.end_to_end.to_dict(),
                    "isolated": None if tap.isolated is None else tap.isolated.to_dict(),
                    "ulps": tap.ulps,
                }
                for tap in self.taps
            ],
            "next_tokens": None
            if self.next_tokens is None
            else {**asdict(self.next_tokens), "unexplained": len(self.next_tokens.defects)},
            "attribution": self.attribution,
            "notes": self.notes,
        }
        return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """The value with "inf", "-inf" and "nan" for the numbers that JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _ask_again(model: Model, trace: Trace, policy: Policy, taps: list[TapReport], step: Callable[[str], None]) -> None:
    """Measure an honest run where a value is over its end-to-end budget and no operator is wrong by itself."""
    if any(tap.defect_here for tap in taps):
        return
    over = {tap.name: tap.end_to_end for tap in taps if tap.verdict == "fails" and not tap.end_to_end.nonfinite}
    if not over:
        return
    step("an honest run, for comparison")
    ratios = honest_ratios(model, trace.inputs, trace.dtype, policy, over)
    for tap in taps:
        if tap.name in ratios:
            tap.end_to_end = replace(tap.end_to_end, honest=ratios[tap.name])


def judge(
    model: Model,
    trace: Trace,
    policy: Policy,
    *,
    checkpoint: str = "",
    step: Callable[[str], None] = lambda text: None,
) -> Report:
    """The report on a trace. model: the checkpoint's, with weights on the grid of the trace's dtype.

    Raises InputError where trace and model do not fit: another config, unknown names, other shapes.
    """
    collected = Judge(model, trace, policy)
    taps = collected.run(step)
    _ask_again(model, trace, policy, taps, step)
    return Report(
        checkpoint=checkpoint,
        candidate=trace.source,
        dtype=trace.dtype,
        policy=policy.name,
        inputs=trace.inputs.label,
        tokens=int(trace.inputs.valid.sum()),
        taps=taps,
        next_tokens=collected.next_tokens,
        attribution=dict(sorted(collected.shares.items(), key=lambda item: -item[1])),
        config=model.config,
        unseen=never_shown(model.head, trace),
    )
