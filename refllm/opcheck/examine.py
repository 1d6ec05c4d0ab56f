"""One example: run the candidate on a call, judge what was observed, and name the first thing that is wrong."""

import builtins
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refllm.accuracy.expected import Expected, by_convention, expect_values, narrow_loss, remembered
from refllm.accuracy.judge import Judgement, judge
from refllm.accuracy.wrong_answers import wrong_answers
from refllm.opcheck import gradients, inputs
from refllm.opcheck.gradient_roundings import GradientRoundings
from refllm.opcheck.observe import Observation, Result, Task
from refllm.opcheck.roundings import Roundings
from refllm.opcheck.without import missing_result, raised
from refllm.ops.backward_contracts import is_backward
from refllm.parallel import one_blas_thread
from refllm.precision import rounding
from refllm.strategies.call import Call
from refllm.strategies.levels import LEVELS, level_of

PROPERTIES = (
    "raises",
    "hangs",
    "crashes",
    "result",
    "purity",
    "reuse",
    "value",
    "NaN pattern",
    "unwritten",
    "determinism",
    "invariance",
    "bounds",
    "race",
    "overflow",
    "configurations",
    "missing gradient",
    "frozen tensor",
    "needless gradient",
    "shared tensor",
    "second backward",
    "recomputation",
    "masking",
    "layout",
    "growth",
)
"""What may be broken, by the name in reports."""


_OF_THE_CONTRACT = ("reuse", "needless gradient", "recomputation")
"""Properties that no beginner is asked for."""


@dataclass(frozen=True)
class Finding:
    """A call on which a candidate breaks a property. text: how, in one clause.

    output: the name of the result that shows it, "" where none does. judgement: of that result, if values are judged.
    where: its elements that show it. results: what the candidate returned.
    row_alone: which row of the batch was computed by itself, if that shows it. level: at which it is asked for.
    """

    property: str
    text: str
    call: Call
    output: str = ""
    axes: tuple[str, ...] = ()
    judgement: Judgement | None = None
    where: np.ndarray | None = None
    results: tuple[Result, ...] = ()
    row_alone: int | None = None

    @builtins.property
    def level(self) -> str:
        """The level of its call, or that of what is broken where that is higher."""
        of_call = level_of(self.call)
        between = self.property == "invariance" and "between the elements" in self.text
        of_property = "hostile" if between else "contract" if self.property in _OF_THE_CONTRACT else "basic"
        return max(of_call, of_property, key=LEVELS.index)


class Examiner:
    """Examines calls for one candidate. examples: how many; score: the worst of all rules so far as measured / allowed.

    worst: the judgement with the largest ratio, of calls that hold. slowest: seconds of the longest run that returned.
    roundings: in words, where the candidate rounds, if it may choose that -> the calls that say so.
    """

    def __init__(
        self, runner: Any, task: Task, limit: float, until: float, convention: str = "", any_profile: bool = False
    ) -> None:
        """limit: seconds for each run of the candidate. until: when all time is up, in time.monotonic(). convention: of
        `Offers`. any_profile: whether a candidate may round wherever honest code does."""
        self.runner, self.task, self.limit, self.until = runner, task, limit, until
        self.convention, self.any_profile = convention, any_profile
        backward = is_backward(task.call.operator)
        made = GradientRoundings(task.policy, convention) if backward else Roundings(task.policy)
        self.roundings: Roundings | GradientRoundings | None = made if any_profile else None
        self.examples, self.score, self.slowest = 0, 0.0, 0.0
        self.worst: Judgement | None = None
        self.power = Power()

    def __call__(self, call: Call, *, deep: bool = True, limit: float | None = None) -> Finding | None:
        """The first broken property, or None. limit: seconds for each run, if not those of all calls.

        Raises InputError for a call that the contract does not allow, TimeIsUpError where all time is up in a run.
        """
        expected = self._expected(call)
        task = replace(self.task, call=call, deep=deep)
        seen = self.runner.observe(task, self.limit if limit is None else limit, self.until)
        self.examples += 1
        if seen.property != "hangs":
            self.slowest = max(self.slowest, seen.seconds)
        self.score, judged = 0.0, []
        if seen.results:
            seen = gradients.without_none(call, seen, expected)
            expected = self._as_returned(call, seen.results, expected)
            broken = _structure(call, seen.results, expected, self.task)
            if broken is not None:
                return replace(broken, results=seen.results)
            # Values may be wrong because nobody wrote them, or every time others, and that is the better answer.
            if seen.property not in ("unwritten", "determinism"):
                judged = self._judged(
                    call, *by_convention(call, self.convention), seen.results, expected, whole=not self.convention
                )
                self.score = max((j.score for j in judged), default=0.0)
                bad = next((j for j in judged if not j.holds), None)
                if bad is not None:
                    return _wrong(call, bad, expected, seen)
                self._remember(judged)
        if seen.property:
            return _outright(call, seen, expected)
        if seen.alone is not None:
            finding = self._alone(call, expected, seen)
            if finding is not None:
                return finding
        self.power.see(expected)
        return None

    # Products this small are not worth the threads of BLAS, which wait for each other where other programs run.
    @one_blas_thread()
    def _expected(self, call: Call) -> tuple[Expected, ...]:
        return remembered(call, self.task.policy, self.convention)

    def _as_returned(
        self, call: Call, results: tuple[Result, ...], expected: tuple[Expected, ...]
    ) -> tuple[Expected, ...]:
        """What is expected, a loss in the dtype of the logits where that is asked of nobody, or is the convention."""
        asked = self.convention != "torch" and level_of(call) != "basic"
        if asked or call.dtype == "float32" or len(results) != len(expected) or expected[0].name != "loss":
            return expected
        narrow = results[0].dtype == call.dtype
        return (narrow_loss(expected[0], *call.arrays(), call.dtype),) if narrow else expected

    @one_blas_thread()
    def _judged(
        self,
        call: Call,
        arguments: Sequence[Any],
        keywords: dict[str, Any],
        results: tuple[Result, ...],
        expected: tuple[Expected, ...],
        whole: bool = True,
    ) -> list[Judgement]:
        """A judgement per output, of the profile in which it holds if there is one.

        whole: the arguments are those of the call, not a row of them or what a convention makes of it.
        """
        judged = [judge(r.value, e) for r, e in zip(results, expected, strict=True)]
        if self.roundings is None or call.dtype == "float32":
            return judged
        return self.roundings.judged(call, arguments, keywords, results, expected, judged, whole)

    def again(self, first: Finding, repeats: int) -> Finding | None:
        """What is to be said of a call that failed, if it does not fail every time: None if it does.

        Then a new process makes the plain call up to `repeats` times more. Raises TimeIsUpError where all time is up in
        a run.
        """
        if self(first.call) is not None:
            return None
        self.runner.close()
        seen = self.runner.observe(replace(self.task, call=first.call, repeats=repeats), self.limit, self.until)
        if seen.property:
            return _outright(first.call, seen, self._expected(first.call))
        text = f"wrong now and then: {first.text}; {repeats + 1} more calls with the same inputs were right"
        return replace(first, property="determinism", text=text, judgement=None, row_alone=None)

    def _remember(self, judged: list[Judgement]) -> None:
        for judgement in judged:
            if self.worst is None or judgement.ratio > self.worst.ratio:
                self.worst = judgement

    def _alone(self, call: Call, expected: tuple[Expected, ...], seen: Observation) -> Finding | None:
        """What one row returns by itself: right as well, and the same bits if that is asked."""
        assert seen.alone is not None
        row, results = seen.alone
        part = slice(row, row + 1)
        wanted = [_cut(e, part) for e in expected]
        arrays = inputs.row_alone(call, *by_convention(call, self.convention), row)
        if is_backward(call.operator):
            wanted = list(expect_values(call.operator, *arrays, call.dtype, self.task.policy, call.dtypes))
        elif inputs.is_reduced(call):
            wanted = list(expect_values(call.operator, *arrays, call.dtype, self.task.policy))
            if expected[0].dtype != wanted[0].dtype:  # as it was returned for all rows
                wanted = [narrow_loss(wanted[0], *arrays, call.dtype)]
        broken = _structure(call, results, tuple(wanted), self.task)
        if broken is not None:
            text = f"row {row} computed alone: {broken.text}"
            return replace(broken, property="invariance", text=text, row_alone=row)
        judged = self._judged(call, *arrays, results, tuple(wanted), whole=False)
        for whole, result, e, verdict in zip(seen.results, results, wanted, judged, strict=True):
            if not verdict.holds:
                text = f"row {row} computed alone is wrong: {verdict.faults[0].text}"
                return Finding("invariance", text, call, e.name, e.axes, verdict, verdict.wrong, results, row)
            if self.task.bitwise and _same_alone(call, result, whole):
                different = ~inputs.same_bits(result.value, whole.value[part])
                if different.any():
                    count = int(different.sum())
                    text = f"row {row} computed alone has other bits than in its batch ({count} elements)"
                    return Finding("invariance", text, call, e.name, e.axes, None, different, results, row)
        return None


def _same_alone(call: Call, alone: Result, whole: Result) -> bool:
    """Whether a row by itself has the bits that it has in its batch: not of what is made of all rows."""
    of_all = inputs.is_reduced(call) or "dloss" in call.names
    return not of_all and alone.value.shape != whole.value.shape


class Power:
    """The trivial wrong answers that would have held on every example so far. untested: their names, by output."""

    def __init__(self) -> None:
        self._pending: dict[str, set[str]] = {}
        self._all = ("zeros", "rows in another order", "the mean", "times 1.01", "a missing tile")

    def see(self, expected: tuple[Expected, ...]) -> None:
        """Takes into account an example that held."""
        for e in expected:
            pending = self._pending.setdefault(e.name, set(self._all))
            if not pending or not e.exact.size or not np.isfinite(e.exact).all() or not np.isfinite(e.contract).all():
                continue
            for name, wrong in wrong_answers(np.atleast_1d(e.exact)):
                if name in pending and not np.array_equal(wrong.reshape(e.exact.shape), e.exact):
                    given = rounding(e.dtype)(wrong.reshape(e.exact.shape).astype(np.float32))
                    if not judge(given, e).holds:
                        pending.discard(name)

    @property
    def untested(self) -> list[str]:
        return [f"{name} of {output}" for output, names in self._pending.items() for name in self._all if name in names]


def _cut(e: Expected, part: slice) -> Expected:
    if not e.exact.ndim:
        return e
    arrays = {name: x for name, x in vars(e).items() if isinstance(x, np.ndarray)}
    return replace(e, **{name: x[part] for name, x in arrays.items()})  # type: ignore[arg-type]


def _structure(call: Call, results: tuple[Result, ...], expected: tuple[Expected, ...], task: Task) -> Finding | None:
    if len(results) != len(expected):
        names = ", ".join(e.name for e in expected)
        returned = "1 result" if len(results) == 1 else f"{len(results)} results"
        text = f"it returns {returned}; the contract has {len(expected)}: {names}{missing_result(call, len(results))}"
        return Finding("result", text, call)
    absent = gradients.missing(call, results, expected)
    if absent is not None:
        name, argument = absent
        return Finding("missing gradient", f"{name} is None: {argument} gets no gradient", call, name)
    for result, e in zip(results, expected, strict=True):
        text = _unlike(result, e, task)
        if text:
            return Finding("result", text, call, e.name, e.axes)
    return None


def _unlike(result: Result, e: Expected, task: Task) -> str:
    if result.kind:
        return f"{e.name} is a {result.kind}; expected a {'NumPy array' if task.arrays == 'numpy' else 'dense tensor'}"
    if result.shape != e.exact.shape:
        return f"{e.name} has the shape {list(result.shape)}; expected {list(e.exact.shape)}"
    if result.dtype != e.dtype:
        return f"{e.name} is {result.dtype}; expected {e.dtype}"
    if result.device != task.device.partition(":")[0]:
        return f"{e.name} is on {result.device}; expected {task.device}"
    if result.view_of:
        return f"{e.name} shares its memory with the input {result.view_of}"
    return ""


def _wrong(call: Call, bad: Judgement, expected: tuple[Expected, ...], seen: Observation) -> Finding:
    e = next(e for e in expected if e.name == bad.name)
    # Of several broken rules the sharpest sentence: an element if there is one, else a row, else the whole.
    order = ("not finite", "element", "row", "one rounding", "rms")
    fault = min(bad.faults, key=lambda f: order.index(f.rule))
    text = f"{bad.name}: {fault.text}"
    return Finding(fault.property, text, call, bad.name, e.axes, bad, bad.wrong, seen.results)


def _outright(call: Call, seen: Observation, expected: tuple[Expected, ...]) -> Finding:
    e = expected[seen.output] if seen.where is not None else None
    return Finding(
        seen.property,
        seen.text + (raised(call) if seen.property == "raises" else ""),
        call,
        e.name if e else "",
        e.axes if e else (),
        None,
        seen.where,
        seen.results,
        seen.row_alone,
    )
