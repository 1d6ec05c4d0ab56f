"""`check_op` and `assert_operator`: the search as a Python call and as a test."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from refllm.accuracy.expected import find_dtype, find_policy
from refllm.accuracy.judge import Judgement
from refllm.accuracy.verdicts import Verdict, verdict
from refllm.errors import InputError, RefllmError
from refllm.extras import require
from refllm.opcheck import candidate as candidates
from refllm.opcheck import search
from refllm.opcheck.examine import Examiner, Finding
from refllm.opcheck.guess import Guess, guess, ragged
from refllm.opcheck.observe import Task
from refllm.opcheck.repro import reproduction
from refllm.opcheck.shrink import shrink as make_small
from refllm.opcheck.without import calls_without, find_left_out
from refllm.opcheck.worker import InProcess, TimeIsUpError, Worker
from refllm.ops.contracts import contract_of
from refllm.storage import output_file
from refllm.strategies.call import Call

SECONDS, SECONDS_TRITON = 25.0, 100.0
"""The time for a whole search: of plain functions; of Triton kernels, which are interpreted or have to be compiled."""
_FOR_SHRINKING = 0.4
"""The share of the time that is kept for making a finding small."""
_HANG_SECONDS, _HANG_RUNS = 0.5, 5.0
"""A smaller call counts as hanging too, while one that hangs is made small, after so many seconds, or after so many
times the longest run that returned, if that is more. The smallest is given more time in the end."""
_MARGIN = 0.1
"""Seconds that ending a process takes."""
_REPEATS = 200
"""Calls in which what is wrong now and then has to show itself again."""
_EVERY_TIME = ("hangs", "crashes", "result", "purity", "reuse")
"""Properties that are taken for broken when they were seen once."""


@dataclass(frozen=True)
class OpReport:
    """What `check_op` found.

    verdict: "holds", "fails", or "incomplete": nothing was found, but there was no time for all the fixed calls.
    property: the broken one (`examine.PROPERTIES`), "" if none. finding: on the smallest call found; first: as it was
    found. worst: of all examples. examples: calls examined; shrinking: those after the finding. ended: why the search
    stopped early, "" if it did not. untested: trivial wrong answers that would have held on every example.
    guesses: the known bugs that it looks like. repro: a program that shows the failure, "" if nothing failed.
    without: the optional arguments that no call had.
    """

    op: str
    candidate: str
    dtype: str
    policy: str
    device: str
    verdict: Verdict
    property: str
    finding: Finding | None
    first: Finding | None
    worst: Judgement | None
    guesses: tuple[Guess, ...]
    examples: int
    shrinking: int
    seconds: float
    seed: int
    ended: str
    untested: tuple[str, ...]
    repro: str
    repro_file: str = ""
    without: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: schema, op, verdict, dtype, policy, examples, worst, counterexample, repro, ..."""
        from refllm.opcheck.report import report_dict

        return report_dict(self)

    def __str__(self) -> str:
        from refllm.opcheck.report import report_text

        return report_text(self)


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during `check_op`. report: on what was seen until then; it is incomplete, or has a finding that may not be
    as small as it can be."""

    def __init__(self, report: OpReport) -> None:
        super().__init__("the search was interrupted")
        self.report = report


def check_op(
    operator: str,
    candidate: Any,
    *,
    dtype: str = "bfloat16",
    policy: str = "fused",
    device: str = "cpu",
    arrays: str = "torch",
    calls: Any = None,
    max_examples: int = 100,
    seed: int = 0,
    time_limit: float = 10.0,
    seconds: float | None = None,
    isolate: bool = True,
    shrink: bool = True,
    bitwise: bool = False,
    without: str | Sequence[str] = (),
    repro: str | os.PathLike[str] | None = None,
    progress: search.Progress = lambda text, done, total: None,
) -> OpReport:
    """Search for a call on which `candidate` breaks the contract of `operator`, make it small and say what is wrong.

    candidate: a function with the signature of refllm.kernels.<operator>, or "module:function", "file.py:function";
        with arrays="numpy" it takes and returns NumPy arrays (bfloat16 of ml_dtypes). Triton kernels on a CPU run on
        the interpreter.
    dtype: of the activations. policy: where it may round, "fused" (the contract) or "hf-eager". device: "cpu", "cuda".
    calls: a list of `refllm.strategies.Call`, or a Hypothesis strategy of them, in place of ours.
    max_examples: drawn after the fixed ones. seed: of what is drawn. time_limit: seconds for each run of the candidate.
    seconds: for all of it; None is 25, or 100 for Triton kernels. What was not looked at when they are over makes the
        verdict "incomplete". In this process (isolate=False) a run that has begun is not cut off.
    isolate: run the candidate in a process of its own. shrink: make a counterexample small, if it fails every time.
    bitwise: a row computed alone must have the bits that it has in its batch.
    without: optional arguments that the candidate does not have (key_mask, return_lse, bias), or "mixed_dtypes"
        (float32 weights and tables beside narrower activations); no call has them.
    repro: a file to write the reproduction to. progress: told what is being done.

    Raises InputError for an operator, a candidate, a dtype, ... that there is none of, and SearchInterrupted, which has
    the report so far, for Ctrl-C.
    """
    start = time.monotonic()
    contract_of(operator)
    find_policy(policy)
    dtype = find_dtype(dtype)
    _must_be_possible(time_limit, seconds, max_examples, calls)
    without = find_left_out(operator, without)
    if max_examples and not isinstance(calls, Sequence):
        require("drawing examples (--max-examples 0 draws none)", "hypothesis")
    if repro is not None:
        output_file.must_be_writable("--repro", repro)
    found = candidates.load(candidate, arrays=arrays, device=device)
    seconds = (SECONDS_TRITON if found.triton else SECONDS) if seconds is None else seconds
    runner = Worker(found) if isolate else InProcess(found)
    blank = Call(operator, dtype, ())
    task = Task(blank, device, arrays, found.interpreted, policy, True, bitwise)
    begin = time.monotonic()
    examine = Examiner(runner, task, time_limit, begin + seconds)
    searched, examples, interrupted = search.Searched(None, "interrupted", complete=False), 0, False
    first = smallest = None
    guesses: list[Guess] = []
    try:
        until = begin + seconds * (1 - _FOR_SHRINKING if shrink else 1)
        searched = _search(examine, operator, dtype, policy, calls, without, max_examples, seed, until, progress)
        examples = examine.examples
        first = smallest = searched.finding
        if first is not None and shrink:
            odd = _now_and_then(examine, first, progress)
            if odd is not None:
                first = smallest = odd
            else:
                smallest = _smallest(examine, first, progress)
                guesses = _guesses(examine, smallest, first, policy)
    except KeyboardInterrupt:
        examples, interrupted = examples or examine.examples, True
    finally:
        runner.close()
    judged = smallest.judgement if smallest is not None and smallest.judgement is not None else examine.worst
    report = OpReport(
        operator,
        found.name,
        dtype,
        policy,
        device,
        verdict(searched.finding, missing=not (searched.complete and examples)),
        "" if smallest is None else smallest.property,
        smallest,
        first,
        judged,
        tuple(guesses),
        examples,
        examine.examples - examples,
        time.monotonic() - start,
        seed,
        "interrupted" if interrupted else searched.ended,
        tuple(examine.power.untested) if smallest is None else (),
        "" if smallest is None else reproduction(smallest, found, policy, time_limit),
        without=without,
    )
    if repro is not None and report.repro:
        output_file.write("--repro", repro, report.repro)
        report = replace(report, repro_file=str(repro))
    if interrupted:
        raise SearchInterrupted(report)
    return report


def assert_operator(operator: str, candidate: Any, **options: Any) -> None:
    """`check_op`, for a test: raises AssertionError with the report if anything is wrong, or was not looked at.

    options: of `check_op`.

    from refllm.check import assert_operator


    def test_my_rms_norm():
        assert_operator("rms_norm", my_rms_norm, dtype="bfloat16")
    """
    __tracebackhide__ = True
    report = check_op(operator, candidate, **options)
    if report.verdict != "holds":
        raise AssertionError("\n" + str(report))


def _must_be_possible(time_limit: float, seconds: float | None, max_examples: int, calls: Any) -> None:
    if not time_limit > 0 or max_examples < 0:
        raise InputError(
            f"time_limit={time_limit} and max_examples={max_examples}: expected more than 0, and at least 0"
        )
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds={seconds}: expected more than 0")
    if calls is not None and (not calls if isinstance(calls, Sequence) else not max_examples):
        raise InputError("calls: there is no call to examine, so that nothing could be said")


def _search(
    examine: Examiner,
    operator: str,
    dtype: str,
    policy: str,
    calls: Any,
    without: Sequence[str],
    max_examples: int,
    seed: int,
    deadline: float,
    progress: search.Progress,
) -> search.Searched:
    if calls is not None and isinstance(calls, Sequence):
        wrong = next((c for c in calls if not isinstance(c, Call) or c.operator != operator), None)
        if wrong is not None:
            raise InputError(f"calls: expected calls of {operator}, found {wrong}")
        return search.fixed(examine, calls_without(calls, without), deadline, progress)
    if calls is None:
        from refllm.strategies import corners

        listed = calls_without(corners(operator, dtype, policy), without)
        searched = search.fixed(examine, listed, deadline, progress)
        if searched.finding is not None or searched.ended or not max_examples:
            return searched
        from refllm.strategies import calls as drawn_calls

        calls = drawn_calls(operator, dtype=dtype, policy=policy)
    return search.drawn(examine, calls_without(calls, without), max_examples, seed, deadline, progress)


def _now_and_then(examine: Examiner, first: Finding, progress: search.Progress) -> Finding | None:
    """What there is to say of a call that does not fail every time; None of one that does."""
    if first.property in _EVERY_TIME:
        return None
    progress("asking whether it fails every time", 0, 0)
    try:
        return examine.again(first, _REPEATS)
    except TimeIsUpError:
        return None


def _smallest(examine: Examiner, first: Finding, progress: search.Progress) -> Finding:
    """The finding on the smallest call, every call being given no more time than it needs."""
    if first.property == "hangs":
        return _smallest_that_hangs(examine, first, progress)
    # What shows in the first run is looked for in the first run alone.
    deep = first.property in ("unwritten", "determinism", "invariance", "purity", "reuse", "raises", "crashes")
    return _made_small(examine, first, examine.until, progress, deep, examine.limit)


def _smallest_that_hangs(examine: Examiner, first: Finding, progress: search.Progress) -> Finding:
    """Made small in a hurry; then the smallest call is given the time that all calls have, or what is left of it."""
    hurry = min(examine.limit, max(_HANG_SECONDS, _HANG_RUNS * examine.slowest))
    kept = min(examine.limit, 2 / 3 * (examine.until - time.monotonic()))
    smallest = _made_small(examine, first, examine.until - kept - hurry, progress, True, hurry)
    if smallest is first:
        return first
    progress("waiting for the smallest call", 0, 0)
    given = min(examine.limit, examine.until - time.monotonic() - _MARGIN)
    try:
        hanging = examine(smallest.call, limit=given) if given > hurry or given == examine.limit else None
    except TimeIsUpError:  # it was slow, and no more than that
        return first
    if hanging is None or hanging.property != "hangs":  # it was slow, and no more than that
        return first
    return hanging if given == examine.limit else replace(hanging, text=f"{hanging.text}; the first call: {first.text}")


def _made_small(
    examine: Examiner, first: Finding, deadline: float, progress: search.Progress, deep: bool, limit: float
) -> Finding:
    count = 0

    def retry(call: Call) -> Finding | None:
        nonlocal count
        count += 1
        progress(f"making the counterexample small: {count} calls tried", 0, 0)
        return examine(call, deep=deep, limit=limit)

    return make_small(first, retry, deadline)[0]


def _guesses(examine: Examiner, smallest: Finding, first: Finding, policy: str) -> list[Guess]:
    if smallest.property not in ("value", "NaN pattern"):
        return []
    found = guess([smallest, first], policy)
    if found:
        return found
    try:
        call = ragged(first.call)
        return guess([smallest, first], policy, None if call is None else examine(call, deep=False))
    except RefllmError:  # the kind does not exist in that size
        return []
