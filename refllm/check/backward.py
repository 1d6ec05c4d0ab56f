"""The judgement of a backward pass: every gradient against what is predicted, operator by operator and end to end.

*Isolated*, each backward operator is evaluated by its definition on the candidate's own saved values and incoming
gradient, so that a defect shows at its operator and nowhere after. *End to end* the gradient is that of the exact pass,
and the predicted error that of the whole forward and backward pass (`refllm.accuracy.gradients`).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refllm.accuracy import gradients as predicted
from refllm.accuracy.backward import Backward
from refllm.accuracy.judge import broken_isolated
from refllm.accuracy.limits import END_TO_END, FLOAT64_SIGMA, ISOLATED, MISROUNDED, misrounded_limit
from refllm.accuracy.measure import Measure, measure, ulp_histogram
from refllm.accuracy.propagation import BLOCKS, ONE_CHAIN, Uncertain, ulp
from refllm.accuracy.wrong_answers import NOT_FINITE, undetected, wrong_answers
from refllm.check.asked import Asked
from refllm.check.error_map import error_map
from refllm.check.gradient_formulas import GRADIENT, in_reverse, of_tensor
from refllm.check.record import Habit
from refllm.check.tap_report import NOTHING, TapReport
from refllm.check.trace import FLOAT32_INSIDE, Trace
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.parallel import one_blas_thread
from refllm.precision import FUSED, HF_EAGER, HF_SDPA, Policy, largest, rounding

Tables = tuple[np.ndarray, np.ndarray]
_NO_GRADIENT_OF = (".self_attn.probs", ".self_attn.scores")  # they are inside of an operator
_NAMED_AT_MOST = 4
_NOTHING = 1e-4  # sigma
_MOVED = 4  # float32 roundings of a term
_BEYOND_ROUNDING = 4  # times the limit, where no other place to round explains an error
_SMALL = 1 << 22  # numbers of a model whose products are faster on one thread


@dataclass(frozen=True)
class _Way:
    """How a candidate may round: a policy, in narrow formats; an order of sums in float32."""

    policy: Policy
    order: str = BLOCKS

    @property
    def words(self) -> str:
        return f"as policy {self.policy.name}" if self.order == BLOCKS else f"float32 sums {self.order}, in any order"


@dataclass(frozen=True)
class _Prediction:
    """All gradients under one way, what the definitions in the candidate's format give, and measures of those shown."""

    values: dict[str, Uncertain]
    bits: dict[str, np.ndarray]
    measures: dict[str, Measure] = field(default_factory=dict)


@dataclass(frozen=True)
class BackwardReport:
    """taps: of every shown gradient, in the order of a backward pass. unseen: sentences on what was not shown."""

    taps: list[TapReport]
    unseen: list[str]
    habits: list[Habit]
    notes: list[str]


def judge_backward(
    model: Model,
    trace: Trace,
    asked: Asked,
    tables: Tables,
    nearest: Policy,
    step: Callable[..., None] = lambda *_: None,
) -> BackwardReport:
    """The judgement of the gradients of a trace. tables: cos and sin, as the candidate has them. nearest: the policy by
    which its forward pass is predicted. Raises InputError for gradients of other shapes than the model's."""
    with _threads(model):
        return _Judge(model, trace, asked, tables, nearest).report(step)


def judge_alone(model: Model, trace: Trace, asked: Asked, tables: Tables, nearest: Policy) -> list[TapReport]:
    """The gradients of a trace, each operator on its own inputs and nothing end to end: a tenth of the time."""
    with _threads(model):
        return _Judge(model, trace, asked, tables, nearest).alone()[0]


def _threads(model: Model) -> AbstractContextManager[None]:
    small = sum(math.prod(shape) for shape in model.weights.shapes.values()) < _SMALL
    return one_blas_thread() if small else nullcontext()


class _Judge:
    def __init__(self, model: Model, trace: Trace, asked: Asked, tables: Tables, nearest: Policy) -> None:
        learning = trace.inputs.learning
        assert learning is not None
        self.model, self.trace, self.asked, self.learning = model, trace, asked, learning
        self.dtype = "float32" if trace.dtype == "float64" else trace.dtype
        self.narrow = self.dtype != "float32"
        # Some code computes in float32 inside whatever the format (Transformers' norms and softmax).
        self.factor = FLOAT64_SIGMA if trace.dtype == "float64" and FLOAT32_INSIDE not in trace.details else 1.0
        self.nearest = nearest.without(model.page.NOT_ROUNDED)
        self.overflow = largest(self.dtype) if self.narrow else math.inf
        inputs = trace.inputs
        self.call = predicted.Pass(
            inputs.input_ids,
            learning.targets(model.head),
            tables,
            inputs.given_mask,
            inputs.positions,
            learning.micro_batches,
            learning.scale,
            frozenset(learning.frozen),
        )
        self.shown = {name: g for name, g in trace.gradients.items() if not name.endswith(_NO_GRADIENT_OF)}
        self._of_values = {name: g for name, g in self.shown.items() if not of_tensor(name)}
        self.notes: list[str] = []
        self._others: dict[_Way, _Prediction] = {}
        self._in_float32: dict[_Way, dict[str, Uncertain]] = {}

    # ---------------------------------------------------------------------------------------------------------- the run

    def report(self, step: Callable[..., None]) -> BackwardReport:
        """See `judge_backward`."""
        step("predicting gradients, each operator alone")
        taps, chosen, usual = self.alone()
        ways, reports = self._ways(), {tap.name: tap for tap in taps}
        step("predicting gradients, end to end")
        rules = {way: Backward(self.dtype, way.policy, way.order) for way in ways}
        of_operator = lambda operator: rules[chosen.get(operator, ways[0])]  # noqa: E731
        after_all = predicted.end_to_end(
            self.model, self.call, self.dtype, self.nearest, of_operator, factor=self.factor
        )
        for name, report in reports.items():
            if name in after_all:
                self._after_all(report, name, after_all[name])
        return BackwardReport(taps, self._unseen(usual), self._habits(chosen), self.notes)

    def alone(self) -> tuple[list[TapReport], dict[str, _Way], dict[str, Uncertain]]:
        """Each operator on its own inputs; the way in which each rounds; and all gradients that there are."""
        ways = self._ways()
        found = {way: self._predicted(way) for way in ways}
        chosen, usual = self._chosen(found), found[ways[0]].values
        names = [name for name in in_reverse(usual) if name in self.shown]
        reports = [self._alone(name, found, chosen, ways) for name in names]
        frozen = [self._of_frozen(name) for name in self.shown if name[len(GRADIENT) :] in self.learning.frozen]
        return [*reports, *frozen], chosen, usual

    def _ways(self) -> list[_Way]:
        """The ways to round that are asked for, the first of which is the usual one."""
        if not self.narrow:
            return [_Way(self.nearest), _Way(self.nearest, ONE_CHAIN)]
        if self.asked.policy is not None:
            return [_Way(self.nearest)]
        return [_Way(policy.without(self.model.page.NOT_ROUNDED)) for policy in (FUSED, HF_EAGER, HF_SDPA)]

    def _predicted(self, way: _Way) -> _Prediction:
        rules = Backward(self.dtype, way.policy, way.order)
        given = self.model, self.call, self.trace.taps, self._of_values
        values = predicted.isolated(*given, lambda _: rules, way.policy)
        if self.factor != 1:
            values = {name: replace(x, variance=x.variance * self.factor**2) for name, x in values.items()}
        exactly = self.trace.dtype == "float64"
        bits = {} if exactly else predicted.to_the_bit(*given, self.dtype, way.policy)
        found = _Prediction(values, bits)
        for name, shown in self.shown.items():
            if name in values:
                self._of_shape(name, shown, values[name].shape)
                found.measures[name] = self._measured(name, values[name], bits.get(name))
        return found

    def _measured(self, name: str, x: Uncertain, bits: np.ndarray | None) -> Measure:
        """`NOTHING` where the variance is not known."""
        shown = self.shown[name]
        rows, exact, variance = (_rows(name, _cut(a, shown)) for a in (shown, x.value, x.variance))
        if np.isnan(variance).any():
            return NOTHING
        found = measure(rows, exact, variance, self.overflow)
        off, honest = 0.0, 0.0
        if bits is not None:
            expected = _cut(bits, shown)
            # Equal numbers are rounded alike: of a loss over many tokens, most rows have 1 / n at their label.
            honest = measure(_rows(name, expected), exact, variance, self.overflow).ratio
            off = float(np.mean((shown != expected) & ~(np.isnan(shown) & np.isnan(expected)))) * self.narrow
        places = {key: self._place(name, getattr(found, key)) for key in ("row", "at", "nonfinite_at")}
        return replace(found, misrounded=off, honest=honest, **places)  # type: ignore[arg-type]

    def _chosen(self, found: dict[_Way, _Prediction]) -> dict[str, _Way]:
        """Operator -> the way in which it rounds: under which the fewest of its gradients are wrong, and of those the
        one that has most of them to the bit."""
        ways = list(found)
        operators = {op for x in found[ways[0]].values.values() for op in x.shares}
        return {op: min(ways, key=lambda way: self._misfit(found[way], op)) for op in sorted(operators)}

    def _misfit(self, prediction: _Prediction, operator: str) -> tuple[int, float]:
        measures = [m for n, m in prediction.measures.items() if operator in prediction.values[n].shares]
        broken = [m for m in measures if broken_isolated(replace(m, misrounded=0.0), self.dtype)]
        return len(broken), float(np.mean([m.misrounded for m in measures])) if measures else 0.0

    # ----------------------------------------------------------------------------------------------------- one gradient

    def _alone(self, name: str, found: dict[_Way, _Prediction], chosen: dict[str, _Way], ways: list[_Way]) -> TapReport:
        operators = list(found[ways[0]].values[name].shares)
        main = next((op for op in operators if op != "add"), operators[0] if operators else "")
        way = chosen.get(main, ways[0])
        x, measured = found[way].values[name], found[way].measures[name]
        report = TapReport(name, NOTHING, dtype=self.dtype)
        if measured is NOTHING:
            return report
        # What attention in one kernel computes is known to the bit only without tiles and approximate exponentials; and
        # dp less its mean is so small a difference that float32 sums move the scores' gradient in float16.
        of_kernel = "attention" in operators and (not way.policy.normalize_first or self.dtype == "float16")
        if measured.misrounded > misrounded_limit(measured.elements):
            near = self._undecided(name, operators, way)
            measured = replace(measured, misrounded=max(0.0, measured.misrounded - near))
        unknown = of_kernel or (self.asked.policy is None and not self._recognised(found[way], main))
        if unknown:
            measured = replace(measured, misrounded=0.0)
        report.isolated = measured
        shown = self.shown[name]
        rows, exact, variance = (_rows(name, _cut(a, shown)) for a in (shown, x.value, x.variance))
        report.zmap = error_map(rows, exact, variance, self.overflow)
        report.untested = undetected(exact, variance, self.dtype, signed=True)
        if self.narrow and not unknown:
            report.untested = self._not_by_bits(report.untested, _rows(name, _cut(found[way].bits[name], shown)))
        report.fed = not np.isfinite(exact).all()
        near = measured.ratio < _BEYOND_ROUNDING * ISOLATED[self.dtype]
        if self.asked.policy is not None and self.narrow and near and broken_isolated(measured, self.dtype):
            report.place = self._elsewhere(name, way)
        return report

    def _undecided(self, name: str, operators: list[str], way: _Way) -> float:
        """The share of elements that float32 arithmetic inside may move across a boundary between two numbers of the
        format: long sums, differences, and sums that are rounded after every addition."""
        if way not in self._in_float32:
            rules = Backward("float32", way.policy)
            given = self.model, self.call, self.trace.taps, self._of_values
            self._in_float32[way] = predicted.isolated(*given, lambda _: rules, way.policy)
        x = self._in_float32[way][name]
        spacing = np.maximum(ulp(x.value, self.dtype, np.float64), np.finfo(np.float32).tiny)
        near = float(np.mean(np.minimum(1, 2 * np.sqrt(x.variance) / spacing)))
        if of_tensor(name) and {"layer_norm", "embedding"} & {*operators}:
            near += self.trace.inputs.input_ids.size * _MOVED * (2.0**-13 if self.dtype == "float16" else 2.0**-16)
        return near

    def _not_by_bits(self, untested: list[str], bits: np.ndarray) -> list[str]:
        """Those of the wrong answers that have the right bits as well: small numbers are seen so, whose error is
        nothing beside the others."""
        answers = {**dict(wrong_answers(bits)), "another sign": -bits}
        onto = rounding(self.dtype)

        def holds(name: str) -> bool:
            off = float(np.mean(onto(answers[name].astype(np.float32)) != bits))
            return off <= misrounded_limit(bits.size)

        return [name for name in untested if name == NOT_FINITE or holds(name)]

    def _recognised(self, prediction: _Prediction, operator: str) -> bool:
        """Whether most gradients of an operator are to the bit what the way says: then those that are not are wrong."""
        shares = [m.misrounded for n, m in prediction.measures.items() if operator in prediction.values[n].shares]
        return bool(shares) and float(np.median(shares)) <= MISROUNDED

    def _elsewhere(self, name: str, asked: _Way) -> str:
        """The policy under which a gradient holds that does not under the one that was asked for."""
        for policy in (FUSED, HF_SDPA, HF_EAGER):
            way = _Way(policy.without(self.model.page.NOT_ROUNDED))
            if way.policy.points == asked.policy.points:
                continue
            if way not in self._others:
                self._others[way] = self._predicted(way)
            if not broken_isolated(self._others[way].measures[name], self.dtype):
                return way.words
        return ""

    def _after_all(self, report: TapReport, name: str, x: Uncertain) -> None:
        shown = self.shown[name]
        rows, exact, variance = (_rows(name, _cut(a, shown)) for a in (shown, x.value, x.variance))
        found = measure(rows, exact, variance, self.overflow)
        places = {key: self._place(name, getattr(found, key)) for key in ("row", "at", "nonfinite_at")}
        report.end_to_end = replace(found, **places)  # type: ignore[arg-type]
        report.ulps = ulp_histogram(rows, exact, self.dtype)
        if report.isolated is None:
            looser = variance * (END_TO_END / ISOLATED[self.dtype]) ** 2
            report.untested = undetected(exact, looser, self.dtype, signed=True)
        answers = {**dict(wrong_answers(exact)), "another sign": -exact}

        def wrong(answer: str) -> bool:
            """Whether it is one: what is 0 for mathematical reasons, as biases of keys are that do not turn, may be."""
            off = np.sqrt(np.mean(np.square(answers[answer] - exact))) if answer in answers else np.inf
            return bool(off >= _NOTHING * found.rms_sigma)

        report.untested = [answer for answer in report.untested if wrong(answer)]

    def _of_frozen(self, name: str) -> TapReport:
        """A tensor that was said to learn nothing: its gradient has to be 0."""
        rows = _rows(name, self.shown[name])
        found = measure(rows, np.zeros_like(rows), np.zeros_like(rows))
        found = replace(found, row=self._place(name, found.row), at=self._place(name, found.at))
        named = "it has a gradient, and was said to be frozen" if rows.any() else ""
        return TapReport(name, found, found, dtype=self.dtype, named=named)

    # ------------------------------------------------------------------------------------------------------------ words

    def _unseen(self, usual: dict[str, Uncertain]) -> list[str]:
        """A sentence for each kind of gradient that there is and nobody showed."""
        missing = [name for name in in_reverse(usual) if name not in self.shown]
        tensors, values = ([n for n in missing if of_tensor(n) == flag] for flag in (True, False))
        said = []
        if tensors:
            said.append(f"{_some(tensors)}: never shown, though the loss depends on what it is the gradient of")
        if values and not self._of_values:
            said.append("no gradient of a named value was shown, so that no operator was judged alone")
        foreign = [n for n in self.shown if n not in usual and n[len(GRADIENT) :] not in self.learning.frozen]
        if foreign:
            self.notes.append(f"{_some(foreign)}: no value or tensor of this model, not judged")
        return said

    def _habits(self, chosen: dict[str, _Way]) -> list[Habit]:
        """Where the backward operators round, of those that round at all."""
        if self.asked.policy is not None and self.narrow:
            return []
        of_way: dict[str, list[str]] = {}
        for operator, way in chosen.items():
            if self.narrow or way.order != BLOCKS:
                of_way.setdefault(way.words, []).append(operator)
        return [Habit("backward", ", ".join(operators), words) for words, operators in of_way.items()]

    def _of_shape(self, name: str, shown: np.ndarray, shape: tuple[int, ...]) -> None:
        partial = name.endswith("_rope") and shown.shape[:-1] == shape[:-1] and shown.shape[-1] <= shape[-1]
        if shown.shape != shape and not partial:
            raise InputError(f"{self.trace.source}: {name} has shape {list(shown.shape)}, expected {list(shape)}")

    def _place(self, name: str, index: tuple[int, ...]) -> tuple[int, ...]:
        """The sequence and the position for a row of all positions. A tensor of one axis has one row, which is not
        counted."""
        if not index:
            return ()
        if of_tensor(name):
            return index if self.shown[name].ndim > 1 else index[1:]
        length = self.trace.inputs.input_ids.shape[1]
        return (index[0] // length, index[0] % length, *index[1:])


def _rows(name: str, values: Any) -> np.ndarray:
    """The gradient as rows [N, n] or [N, H, n]: positions, or rows of a tensor."""
    values = np.asarray(values)
    if of_tensor(name):
        return np.atleast_2d(values)
    by_position = values if values.ndim == 3 else values.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(by_position).reshape(-1, *by_position.shape[2:])


def _cut(values: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The channels that were shown."""
    return values[..., : shown.shape[-1]]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def tables_on_grid(cos: np.ndarray, sin: np.ndarray, dtype: str, rounded: bool) -> Tables:
    """The tables that a candidate multiplies with."""
    if not rounded or dtype not in ("bfloat16", "float16"):
        return cos, sin
    onto = rounding(dtype)
    return onto(cos.astype(np.float32)), onto(sin.astype(np.float32))
