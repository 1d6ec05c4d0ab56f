"""One call, computed by every form of it: checked first, then timed; a row each.

Nothing is timed before its output was compared with the definition (a few rows, `refllm.bench.probes`) and with a
witness (every element, `refllm.bench.witness`); what the timed calls themselves returned is compared once more, for
every set of inputs.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refllm.bench.faults import clause, guarded
from refllm.bench.forms import Form
from refllm.bench.probes import Checker, Judgement
from refllm.bench.results import Row
from refllm.bench.timer import Clock, sets_needed
from refllm.bench.witness import Witness
from refllm.bench.workloads import Arguments, Job, traffic_of

LARGE = 1 << 30
"""A job that moves more gives its memory back at the end, so that the next one finds it in one piece."""


@dataclass(frozen=True)
class Bench:
    """What all rows of a run share. seconds: of timing per row."""

    watch: Clock
    ceilings: dict[str, Any]
    seconds: float


class Truth:
    """What the outputs of all sets of inputs of a job are held against: the definition, and a witness."""

    def __init__(self, operator: str, calls: Sequence[Arguments]) -> None:
        self._checker = Checker(operator, *calls[0])
        self._witness = Witness(operator, calls, self._checker)

    def judge(self, results: Any, index: int, ours: bool) -> Judgement:
        """Judgement of set `index`'s results. The rows that the definition gets through are all in the first set."""
        found = self._checker.judge(results, ours) if index == 0 else Judgement(None, "", self._checker.what)
        problem = found.problem or self._witness.differs(results, index)
        return Judgement(found.error, problem, f"{found.checked}; {self._witness.said}")


def measure(job: Job, forms: Iterable[Form], bench: Bench) -> Iterator[Row]:
    """A row per form. A call that cannot be drawn (too little memory, a GPU that an earlier kernel broke) has rows that
    say so."""
    import torch

    forms = list(forms)
    with torch.no_grad():
        try:
            calls = _draw(job, forms, bench)
            cost, truth = traffic_of(job, calls[0]), Truth(job.operator, calls)
        except Exception as error:  # the calls after this one still count
            for form in forms:
                row = _row(job, form, 0, 0)
                row.note = f"not timed: the call cannot be prepared: {clause(error)}"
                row.finding = "" if isinstance(error, torch.OutOfMemoryError) or not form.ours else row.note
                yield row
            return
        for form in forms:
            row = _row(job, form, cost.bytes, cost.flops)
            _fill(row, form, calls, truth, bench)
            row.rate(bench.ceilings)
            yield row
    if cost.bytes > LARGE and bench.watch.device == "cuda":
        del calls, truth
        torch.cuda.empty_cache()


def _draw(job: Job, forms: Sequence[Form], bench: Bench) -> list[Arguments]:
    """The sets of inputs, as many as the clock needs; one if nothing will be timed."""
    first = job.draw(0)
    timed = any(not form.note for form in forms)
    count = sets_needed(traffic_of(job, first).bytes, bench.watch.cache_bytes) if timed else 1
    return [first, *(job.draw(seed) for seed in range(1, count))]


def _row(job: Job, form: Form, size: int, flops: int) -> Row:
    return Row(job.operator, job.panel, job.group, form.name, form.ours, job.dtype, job.sizes, size, flops)


def _fill(row: Row, form: Form, calls: Sequence[Arguments], truth: Truth, bench: Bench) -> None:
    """Checks and times one form; whatever it raises becomes the row's finding (ours) or note (a peer)."""
    with guarded(row):
        thunk = form.bind(*calls[0])
        if _accept(row, truth.judge(_poisoned(thunk, form), 0, form.ours)):
            row.note = form.note or getattr(thunk, "note", "")
            if not form.note:
                _time(row, form, calls, truth, bench)


def _time(row: Row, form: Form, calls: Sequence[Arguments], truth: Truth, bench: Bench) -> None:
    timed = bench.watch.time([form.bind(*call) for call in calls], bench.seconds, graph=form.graph)
    if form.reusable:
        for index, output in enumerate(timed.outputs):
            if not _accept(row, truth.judge(output, index, form.ours), "while timed: "):
                return
    row.time = timed.spread


def _accept(row: Row, judgement: Judgement, when: str = "") -> bool:
    """Writes the judgement down; False if the output is wrong."""
    row.checked = judgement.checked
    row.error = row.error if judgement.error is None else judgement.error
    if not judgement.problem:
        return True
    row.note = f"not timed: wrong output ({when}{judgement.problem})"
    if row.ours:
        row.finding = f"{when}{judgement.problem}"
    return False


def _poisoned(thunk: Any, form: Form) -> Any:
    """The result of the call with NaN in all memory that Torch hands out meanwhile, if the form is ours."""
    import torch

    if not form.ours:
        return thunk()
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)  # with it comes the filling of new memory
        try:
            return thunk()
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
