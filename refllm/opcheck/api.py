"""`check_op` and `assert_operator`: the search as a Python call and as a test."""

import builtins
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from refllm.accuracy.expected import find_dtype, find_policy
from refllm.accuracy.judge import Judgement
from refllm.accuracy.verdicts import Verdict, verdict
from refllm.errors import InputError
from refllm.extras import require
from refllm.opcheck import candidate as candidates
from refllm.opcheck import laws, search
from refllm.opcheck.autograd import find_differentiable
from refllm.opcheck.examine import Examiner, Finding
from refllm.opcheck.looks_like import Guess, Likeness, looks_like
from refllm.opcheck.observe import Task
from refllm.opcheck.offers import Offers, find_offers, suggestion
from refllm.opcheck.repro import reproduction
from refllm.opcheck.shrink import shrink as make_small
from refllm.opcheck.worker import InProcess, TimeIsUpError, Worker
from refllm.ops.contracts import contract_of
from refllm.storage import output_file
from refllm.strategies.call import Call
from refllm.strategies.levels import LEVELS, families_of, find_level, level_of

MOST_FINDINGS = 12
"""Findings that are made small and told, of a search that keeps going."""
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
_EVERY_TIME = ("hangs", "crashes", "result", "purity", "reuse", "missing gradient")
"""Properties that are taken for broken when they were seen once."""
_SHOWN_LATE = (
    *("unwritten", "determinism", "invariance", "purity", "reuse", "raises", "crashes"),
    *("frozen tensor", "needless gradient", "shared tensor", "second backward", "recomputation"),
)
"""Properties that show in a run after the first."""


@dataclass(frozen=True)
class OpFinding:
    """One thing that is wrong. level: at which it is asked for. finding: on the smallest call found; first: as it was
    found. guesses: the mistakes that give its numbers; wrong_in: where, if none does. repro: a program that shows it.
    suggestion: the option for a candidate that does not offer that, "" if there is none. laws: what a wrong gradient
    breaks that needs no reference (`refllm.opcheck.laws`), a clause each."""

    level: str
    finding: Finding
    first: Finding
    guesses: tuple[Guess, ...] = ()
    repro: str = ""
    suggestion: str = ""
    wrong_in: str = ""
    laws: tuple[str, ...] = ()


@dataclass(frozen=True)
class LevelReport:
    """One level of inputs. counts: whether the verdict rests on it. examples: its calls that were examined. findings:
    how many. verdict: of this level alone; "incomplete" where not all of its fixed calls were examined."""

    level: str
    counts: bool
    examples: int
    findings: int
    verdict: Verdict


@dataclass(frozen=True)
class OpReport:
    """What `check_op` found.

    verdict: "holds", "fails", or "incomplete": nothing was found, but there was no time for all the fixed calls; of the
    levels up to `level`.
    property: the broken one (`examine.PROPERTIES`), "" if none. finding: on the smallest call found; first: as it was
    found. worst: of all examples. examples: calls examined; shrinking: those after the finding. ended: why the search
    stopped early, "" if it did not. untested: trivial wrong answers that would have held on every example.
    guesses: the mistakes that give its numbers. repro: a program that shows the failure, "" if nothing failed.
    without: the optional arguments and families that no call had. findings: all that were found, by level.
    rounds: in words, where the candidate rounds, "" where that was not asked. not_asked: what its options left out.
    policy: the named one, "" if it may round wherever honest code does.
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
    level: str = "contract"
    levels: tuple[LevelReport, ...] = ()
    findings: tuple[OpFinding, ...] = ()
    rounds: str = ""
    not_asked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: schema, op, verdict, dtype, policy, examples, worst, counterexample, repro, ..."""
        from refllm.opcheck.report import report_dict

        return report_dict(self)

    @builtins.property
    def summary(self) -> str:
        """One line: the operator, the candidate, the verdict, and what is wrong."""
        said = f"{self.op} {self.candidate}, {self.dtype}: {self.verdict}"
        if self.finding is not None:
            return f"{said}, {self.property}: {self.finding.text}"
        return said + (f": {self.ended}" if self.ended else "")

    def __repr__(self) -> str:
        return f"<OpReport {self.summary}>"

    def __str__(self) -> str:
        from refllm.opcheck.report import report_text

        return report_text(self)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


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
    policy: str | None = None,
    device: str = "cpu",
    arrays: str = "torch",
    calls: Any = None,
    level: str = "contract",
    max_examples: int = 100,
    seed: int = 0,
    time_limit: float = 10.0,
    seconds: float | None = None,
    isolate: bool = True,
    shrink: bool = True,
    deep: bool = True,
    keep_going: bool = False,
    bitwise: bool = False,
    without: str | Sequence[str] = (),
    sizes: str | Sequence[str] = (),
    convention: str = "",
    configs: str = "first",
    repro: str | os.PathLike[str] | None = None,
    backward: bool = False,
    progress: search.Progress = lambda text, done, total: None,
) -> OpReport:
    """Search for a call on which `candidate` breaks the contract of `operator`, make it small and say what is wrong.

    candidate: a function with the signature of refllm.kernels.<operator>, or "module:function", "file.py:function";
        with arrays="numpy" it takes and returns NumPy arrays (bfloat16 of ml_dtypes). Triton kernels on a CPU run on
        the interpreter.
    dtype: of the activations. policy: where it has to round, "fused" (the contract) or "hf-eager"; None is wherever
        honest code does, and the report says where. device: "cpu", "cuda".
    calls: a list of `refllm.strategies.Call`, or a Hypothesis strategy of them, in place of ours.
    level: up to which level of inputs (`refllm.strategies.levels`) the verdict counts: "basic", "contract",
        "hostile". What is found in the others stands beside it.
    max_examples: drawn after the fixed ones. seed: of what is drawn. time_limit: seconds for each run of the candidate.
    seconds: for all of it; None is 25, or 100 for Triton kernels. What was not looked at when they are over makes the
        verdict "incomplete". In this process (isolate=False) a run that has begun is not cut off.
    isolate: run the candidate in a process of its own. shrink: make a counterexample small, if it fails every time.
    deep: also compute a row of the batch by itself, and all of it again with everything changed that nobody may read.
    keep_going: look for all that is wrong, and not for one thing.
    bitwise: a row computed alone must have the bits that it has in its batch.
    without: optional arguments that the candidate does not have (key_mask, return_lse, bias), or families of inputs
        (strides, mixed_dtypes); no call has them. sizes: rules about lengths that it offers, as "E%256==0".
    convention: "torch" for Torch's choices where the contract chose otherwise.
    configs: which configurations of an autotuned Triton kernel run, "first" or "all", which must agree.
    repro: a file to write the reproduction to. progress: told what is being done.
    backward: the candidate has the signature of the forward operator, and its gradients are judged, which autograd
        makes of it. A function of a backward operator's own signature is a candidate of that: "rms_norm_backward".

    Raises InputError for an operator, a candidate, a dtype, ... that there is none of, and SearchInterrupted, which has
    the report so far, for Ctrl-C.
    """
    start = time.monotonic()
    dtype = find_dtype(dtype)
    forward, operator = operator, find_differentiable(operator, dtype).operator if backward else operator
    contract_of(operator)
    named = "fused" if policy is None else policy
    find_policy(named)
    find_level(level)
    _must_be_possible(time_limit, seconds, max_examples, calls)
    offers = find_offers(operator, without, sizes, convention)
    if max_examples and not isinstance(calls, Sequence):
        require("drawing examples (--max-examples 0 draws none)", "hypothesis")
    if repro is not None:
        output_file.must_be_writable("--repro", repro)
    found = candidates.load(candidate, arrays=arrays, device=device)
    found = candidates.by_autograd(found, forward) if backward else found
    if configs not in ("first", "all") or (configs == "all" and not found.interpreted):
        raise InputError(
            f"--configs {configs}: expected first or all; all is for Triton kernels that are interpreted, on a CPU"
        )
    seconds = (SECONDS_TRITON if found.triton else SECONDS) if seconds is None else seconds
    runner = Worker(found) if isolate else InProcess(found)
    blank = Call(operator, dtype, ())
    task = Task(blank, device, arrays, found.interpreted, named, True, bitwise, configs=configs)
    begin = time.monotonic()
    of_torch = convention == "torch" and operator == "swiglu"  # whose silu is a call of its own, with a result
    examine = Examiner(runner, task, time_limit, begin + seconds, convention, any_profile=policy is None or of_torch)
    hunt = Hunt(examine, level, keep_going, deep)
    searched, examples, interrupted = search.Searched(None, "interrupted", complete=False), 0, False
    told: list[OpFinding] = []

    def tell(one: Finding, shrink: bool, left: int) -> None:
        told.append(_told(examine, offers, one, found, named, time_limit, shrink, left, progress))

    try:
        until = begin + seconds * (1 - _FOR_SHRINKING if shrink else 1)
        searched = _search(hunt, operator, dtype, named, calls, offers, max_examples, seed, until, progress)
        examples = examine.examples
        for i, one in enumerate(hunt.in_order):
            tell(one, shrink, len(hunt.found) - i)
    except KeyboardInterrupt:
        examples, interrupted = examples or examine.examples, True
        for one in hunt.in_order[len(told) :]:
            tell(one, False, 1)
    finally:
        runner.close()
    findings = _distinct(told)
    main = next((one for one in findings if hunt.counts(one.level)), None)
    smallest = None if main is None else main.finding
    judged = smallest.judgement if smallest is not None and smallest.judgement is not None else examine.worst
    complete = searched.complete and bool(examples)
    report = OpReport(
        operator,
        found.name,
        dtype,
        policy or "",
        device,
        verdict(main, missing=not complete),
        "" if smallest is None else smallest.property,
        smallest,
        None if main is None else main.first,
        judged,
        () if main is None else main.guesses,
        examples,
        examine.examples - examples,
        time.monotonic() - start,
        seed,
        "interrupted" if interrupted else searched.ended,
        tuple(examine.power.untested) if smallest is None else (),
        "" if main is None else main.repro,
        without=offers.without,
        level=level,
        levels=hunt.levels(findings, complete),
        findings=findings,
        rounds=examine.roundings.words if examine.roundings is not None and main is None else "",
        not_asked=offers.words,
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
        raise AssertionError(f"{report.summary}\n{report}")


def _must_be_possible(time_limit: float, seconds: float | None, max_examples: int, calls: Any) -> None:
    if not time_limit > 0 or max_examples < 0:
        raise InputError(
            f"time_limit={time_limit} and max_examples={max_examples}: expected more than 0, and at least 0"
        )
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds={seconds}: expected more than 0")
    if calls is not None and (not calls if isinstance(calls, Sequence) else not max_examples):
        raise InputError("calls: there is no call to examine, so that nothing could be said")


class Hunt:
    """Examines calls, keeps what is wrong, and says whether to go on: see `Examiner`, which it stands in for.

    found: (level, finding), the first of its level, or with keep_going the first of its kind.
    """

    def __init__(self, examine: Examiner, level: str, keep_going: bool, deep: bool) -> None:
        self.examine, self.level, self.keep_going, self.deep = examine, level, keep_going, deep
        self.found: list[Finding] = []
        self._kinds: set[Any] = set()
        self._examples: Counter[str] = Counter()

    @property
    def score(self) -> float:
        """The score of the last call."""
        return self.examine.score

    def counts(self, level: str) -> bool:
        """Whether the verdict rests on a level."""
        return LEVELS.index(level) <= LEVELS.index(self.level)

    def __call__(self, call: Call) -> Finding | None:
        """The finding if the search is to end with it."""
        level = level_of(call)
        if not self.keep_going and any(one.level == level for one in self.found):
            return None  # what does not count, and is known to be wrong
        finding = self.examine(call, deep=self.deep)
        self._examples[level] += 1
        if finding is None:
            return None
        kind = (finding.level, finding.property, finding.output, families_of(call))
        if kind not in self._kinds and len(self.found) < MOST_FINDINGS:
            self.found.append(finding)
        self._kinds.add(kind)
        return None if self.keep_going or not self.counts(finding.level) else finding

    @property
    def in_order(self) -> list[Finding]:
        """What was found, by level."""
        return sorted(self.found, key=lambda one: LEVELS.index(one.level))

    def levels(self, findings: Sequence[OpFinding], complete: bool) -> tuple[LevelReport, ...]:
        """One line for each."""

        def of(level: str) -> LevelReport:
            wrong = sum(one.level == level for one in findings)
            n = self._examples[level]
            lower = any(one.level == level for one in self.found)  # which made small was one of a lower level
            told = verdict(wrong, missing=lower or not (complete and n))
            return LevelReport(level, self.counts(level), n, wrong, told)

        return tuple(map(of, LEVELS))


def _search(
    examine: Hunt,
    operator: str,
    dtype: str,
    policy: str,
    calls: Any,
    offers: Offers,
    max_examples: int,
    seed: int,
    deadline: float,
    progress: search.Progress,
) -> search.Searched:
    if calls is not None and isinstance(calls, Sequence):
        wrong = next((c for c in calls if not isinstance(c, Call) or c.operator != operator), None)
        if wrong is not None:
            raise InputError(f"calls: expected calls of {operator}, found {wrong}")
        return search.fixed(examine, offers.of(calls), deadline, progress)
    if calls is None:
        from refllm.strategies import corners

        listed = sorted(offers.of(corners(operator, dtype, policy)), key=lambda call: LEVELS.index(level_of(call)))
        searched = search.fixed(examine, listed, deadline, progress)
        if searched.finding is not None or searched.ended or not max_examples:
            return searched
        from refllm.strategies import calls as drawn_calls

        calls = drawn_calls(operator, dtype=dtype, policy=policy)
    return search.drawn(examine, offers.of(calls), max_examples, seed, deadline, progress)


def _told(
    examine: Examiner,
    offers: Offers,
    first: Finding,
    candidate: candidates.Candidate,
    policy: str,
    time_limit: float,
    shrink: bool,
    left: int,
    progress: search.Progress,
) -> OpFinding:
    """A finding made small, with all that is to be said of it. left: how many share the time that is left."""
    smallest, likeness = first, Likeness()
    now = time.monotonic()
    until = now + (examine.until - now) / left
    if shrink:
        odd = _now_and_then(examine, first, progress)
        if odd is not None:
            first = smallest = odd
        else:
            progress("asking what it looks like", 0, 0)
            likeness = looks_like(examine, offers, first)
            smallest = _smallest(examine, offers, first, until, progress)
    law = laws.named(examine, offers, smallest) if shrink else laws.Named(smallest.property, smallest.text)
    smallest = replace(smallest, property=law.property, text=law.text)
    fits = suggestion(smallest.call, smallest.text)
    repro = reproduction(smallest, candidate, policy, time_limit)
    return OpFinding(smallest.level, smallest, first, likeness.guesses, repro, fits, likeness.wrong_in, law.broken)


def _distinct(told: Sequence[OpFinding]) -> tuple[OpFinding, ...]:
    """The findings without those whose smallest call is of the same kind as that of an earlier one."""
    kinds: dict[Any, OpFinding] = {}
    for one in told:
        f = one.finding
        kinds.setdefault((one.level, f.property, f.output, families_of(f.call)), one)
    return tuple(kinds.values())


def _now_and_then(examine: Examiner, first: Finding, progress: search.Progress) -> Finding | None:
    """What there is to say of a call that does not fail every time; None of one that does."""
    if first.property in _EVERY_TIME:
        return None
    progress("asking whether it fails every time", 0, 0)
    try:
        return examine.again(first, _REPEATS)
    except TimeIsUpError:
        return None


def _smallest(examine: Examiner, offers: Offers, first: Finding, until: float, progress: search.Progress) -> Finding:
    """The finding on the smallest call, every call being given no more time than it needs."""
    if first.property == "hangs":
        return _smallest_that_hangs(examine, offers, first, until, progress)
    # What shows in the first run is looked for in the first run alone.
    deep = first.property in _SHOWN_LATE
    return _made_small(examine, offers, first, until, progress, deep, examine.limit)


def _smallest_that_hangs(
    examine: Examiner, offers: Offers, first: Finding, until: float, progress: search.Progress
) -> Finding:
    """Made small in a hurry; then the smallest call is given the time that all calls have, or what is left of it."""
    hurry = min(examine.limit, max(_HANG_SECONDS, _HANG_RUNS * examine.slowest))
    kept = min(examine.limit, 2 / 3 * (until - time.monotonic()))
    smallest = _made_small(examine, offers, first, until - kept - hurry, progress, True, hurry)
    if smallest is first:
        return first
    progress("waiting for the smallest call", 0, 0)
    given = min(examine.limit, until - time.monotonic() - _MARGIN)
    try:
        hanging = examine(smallest.call, limit=given) if given > hurry or given == examine.limit else None
    except TimeIsUpError:  # it was slow, and no more than that
        return first
    if hanging is None or hanging.property != "hangs":  # it was slow, and no more than that
        return first
    return hanging if given == examine.limit else replace(hanging, text=f"{hanging.text}; the first call: {first.text}")


def _made_small(
    examine: Examiner,
    offers: Offers,
    first: Finding,
    deadline: float,
    progress: search.Progress,
    deep: bool,
    limit: float,
) -> Finding:
    count = 0

    def retry(call: Call) -> Finding | None:
        nonlocal count
        if not offers.asks(call):
            return None
        count += 1
        progress(f"making the counterexample small: {count} calls tried", 0, 0)
        return examine(call, deep=deep, limit=limit)

    return make_small(first, retry, deadline)[0]
