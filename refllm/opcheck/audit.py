"""How good is a test? It is given every known bug of an operator, and the right operator first.

    report = audit("rms_norm")                       # our own check
    report = audit("rms_norm", test=my_test)         # my_test(fn) raises if it dislikes fn
    print(report.kill_rate, report.survivors)

A test that dislikes the right operator is void: what it says of the others means nothing.

`check_op` has to find a bug in every dtype in which it makes a difference. A Triton kernel of which it finds nothing
wrong is asked `bitwise` besides, which our own kernels promise: some of their mutants break nothing else.
"""

import contextlib
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refllm import apart
from refllm.accuracy.verdicts import SCHEMA, verdict
from refllm.errors import InputError, RefllmError

if TYPE_CHECKING:
    from refllm.kernels.mutants import Mutant
    from refllm.strategies import Call

Test = Callable[[Callable[..., Any]], Any]
"""A user's test: it is called with the function under test and raises, whatever, if it dislikes it."""
Progress = Callable[[str, int, int], None]
"""Told what is done, how many mutants are behind it, and of how many."""
MAX_EXAMPLES = 100
_FEWER = 10
"""How many times fewer calls are drawn for an equivalent mutant: all of them would be run, and none is wrong."""
_SKIPPED = "Skipped"
"""What pytest.skip raises."""
_GRACE = 5.0
"""Seconds after which a test that no signal interrupts is ended with its process."""
TIME_LIMIT = 10.0
"""Seconds that a user's test has for one mutant."""


class TestIsVoidError(RefllmError):
    """A user's test dislikes the right operator, or skips it."""

    __test__ = False


class _TimeIsUpError(BaseException):
    """Not an Exception, so that no test catches it by accident."""


@dataclass(frozen=True)
class Outcome:
    """One mutant under one checker. by: the property that was found broken, or what the test raised; "" if it survived.

    dtype: what the rest is about: where it survived (an equivalent one: where it was killed), else the first in which
    it was looked for. dtypes: all in which it was; empty for a user's test, which chooses by itself.
    level: of the call that shows it first (`refllm.strategies.levels`), in the dtype that is told; "" if none did.
    place: where honest code may round too, as in `Mutant`.
    examples: how many calls were examined, the last one included; 0 for a user's test. repro: a program that shows the
    failure; "" of a user's test. equivalent: why it is no bug, as in `Mutant`; then it must survive.
    """

    operator: str
    name: str
    form: str
    what: str
    source: str
    dtype: str
    killed: bool
    by: str
    examples: int
    seconds: float
    repro: str = ""
    equivalent: str = ""
    dtypes: tuple[str, ...] = ()
    level: str = ""
    place: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: all but the program."""
        return {name: value for name, value in vars(self).items() if name != "repro"}


@dataclass(frozen=True)
class AuditReport:
    """checker: its name. outcomes: one per mutant, equivalent ones included, which count neither way."""

    checker: str
    outcomes: tuple[Outcome, ...]

    @property
    def bugs(self) -> tuple[Outcome, ...]:
        """The outcomes of real bugs."""
        return tuple(o for o in self.outcomes if not o.equivalent)

    @property
    def survivors(self) -> tuple[Outcome, ...]:
        """The real bugs that the checker did not find."""
        return tuple(o for o in self.bugs if not o.killed)

    @property
    def rejected(self) -> tuple[Outcome, ...]:
        """Equivalent mutants that the checker took for bugs: false alarms."""
        return tuple(o for o in self.outcomes if o.equivalent and o.killed)

    @property
    def kill_rate(self) -> float:
        """The share of real bugs that were found; 1 where there are none."""
        return 1 - len(self.survivors) / len(self.bugs) if self.bugs else 1.0

    @property
    def holds(self) -> bool:
        """Every bug found, and nothing else."""
        return not self.survivors and not self.rejected

    def of(self, operator: str) -> "AuditReport":
        """The part about one operator."""
        return AuditReport(self.checker, tuple(o for o in self.outcomes if o.operator == operator))

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators, in the order of the outcomes."""
        return tuple(dict.fromkeys(o.operator for o in self.outcomes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: schema, checker, verdict, figures, and one entry per mutant."""
        return {
            "schema": SCHEMA,
            "checker": self.checker,
            "verdict": verdict(not self.holds),
            "mutants": len(self.bugs),
            "killed": len(self.bugs) - len(self.survivors),
            "kill_rate": self.kill_rate,
            "survivors": [o.to_dict() for o in self.survivors],
            "rejected": [o.to_dict() for o in self.rejected],
            "outcomes": [o.to_dict() for o in self.outcomes],
        }


def audit(
    operator: str | None = None,
    test: str | Test | None = None,
    form: str | None = None,
    *,
    dtype: str | None = None,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
    known_first: bool = False,
    progress: Progress = lambda text, done, total: None,
) -> AuditReport:
    """Give a checker every mutant of an operator (None: of all operators).

    test: a user's test function test(fn), or "file.py:function", "module:function"; it needs an operator. None is
        `check_op`. form: "torch" or "triton" mutants; None is both, for a user's test "torch".
    dtype: in which `check_op` looks, and only mutants that differ in it; None is all in which each differs.
    max_examples, seed: of `check_op`. time_limit: seconds for a user's test and one mutant.
    known_first: `check_op` looks for a bug with the call first that is known to show it (`Mutant.corner`), or has just
        shown it in another dtype, in which case one run is enough: the same answers in less time, but not the same
        number of examples, nor the same name for what is broken in several ways.

    Raises InputError for an operator, form or dtype that is not known, a test that cannot be had, or one without an
    operator; TestIsVoidError for a test that dislikes the right operator.
    """
    from refllm.kernels.mutants import FORMS, catalogue

    if operator is not None:
        from refllm.ops.contracts import contract_of

        contract_of(operator)
    if form is not None and form not in FORMS:
        raise InputError(f"--form {form} is not known; use {' or '.join(FORMS)}")
    if dtype is not None:
        from refllm.accuracy.expected import find_dtype

        dtype = find_dtype(dtype)
    if test is not None and operator is None:
        raise InputError("--test needs an operator: refllm audit OPERATOR --test file.py:function")
    mutants = catalogue(operator, "torch" if test is not None and form is None else form)
    mutants = [m for m in mutants if dtype is None or dtype in m.dtypes]
    checker = _OurCheck(max_examples, seed, known_first) if test is None else _UsersTest(test, time_limit)
    if isinstance(checker, _UsersTest) and operator is not None:
        for form in dict.fromkeys(m.form for m in mutants):
            checker.must_like(operator, form)
    outcomes = []
    for done, mutant in enumerate(mutants):
        progress(f"{mutant.operator}: {mutant.name}", done, len(mutants))
        outcomes.append(_outcome(mutant, checker, dtype))
    return AuditReport(checker.name, tuple(outcomes))


def outcome_of(mutant: "Mutant", max_examples: int = MAX_EXAMPLES, seed: int = 0, known_first: bool = False) -> Outcome:
    """What `check_op` makes of one mutant, in every dtype in which that makes a difference. known_first: as `audit`."""
    return _outcome(mutant, _OurCheck(max_examples, seed, known_first), None)


def _outcome(mutant: "Mutant", checker: "_OurCheck | _UsersTest", dtype: str | None) -> Outcome:
    start = time.monotonic()
    dtypes = (dtype,) if dtype else mutant.dtypes[: None if checker.looks_in_every_dtype else 1]
    answers = []
    for one in dtypes:
        answers.append((one, *checker(mutant, one), checker.level))
        if bool(answers[-1][1]) == bool(mutant.equivalent):  # a bug that survives, or what is none and does not
            answers = answers[-1:]
            break
    told, by, examples, repro, level = answers[0]
    return Outcome(
        mutant.operator,
        mutant.name,
        mutant.form,
        mutant.what,
        mutant.source,
        told,
        bool(by),
        by,
        examples,
        round(time.monotonic() - start, 3),
        repro,
        mutant.equivalent,
        dtypes if checker.looks_in_every_dtype else (),
        level if by else "",
        mutant.place,
    )


class _OurCheck:
    """check_op in this process, without shrinking: (the broken property or "", examples, reproduction)."""

    name, looks_in_every_dtype = "refllm check-op", True

    def __init__(self, max_examples: int, seed: int, known_first: bool) -> None:
        self._examples, self._seed, self._known_first = max_examples, seed, known_first
        self._showed: dict[str, str] = {}
        self.level = ""

    def __call__(self, mutant: "Mutant", dtype: str) -> tuple[str, int, str]:
        from refllm.strategies import corners, level_of

        if not self._known_first or mutant.equivalent:
            return self._searched(mutant, dtype, None)
        known = self._showed.get(mutant.slug, mutant.corner)
        calls = sorted(corners(mutant.operator, dtype), key=lambda call: call.kind != known)
        if mutant.slug in self._showed and (broken := _in_one_run(mutant, calls[0])):
            self.level = level_of(calls[0])
            return broken, 1, ""
        found = self._searched(mutant, dtype, calls)
        return found if found[0] or not self._examples else self._searched(mutant, dtype, None)

    @staticmethod
    def _policy_of(mutant: "Mutant") -> str | None:
        """Named where honest code may round as the mutant does: then it is wrong only for who asks for one rounding."""
        return "fused" if mutant.place else None

    def _searched(self, mutant: "Mutant", dtype: str, calls: "list[Call] | None") -> tuple[str, int, str]:
        from refllm.opcheck.api import check_op

        asked = (False, True) if mutant.form == "triton" else (False,)
        for bitwise in asked[-1:] if mutant.equivalent else asked:
            report = check_op(
                mutant.operator,
                mutant.function(),
                dtype=dtype,
                calls=calls,
                max_examples=self._examples // (_FEWER if mutant.equivalent else 1),
                seed=self._seed,
                shrink=False,
                isolate=False,
                bitwise=bitwise,
                level="hostile",
                policy=self._policy_of(mutant),
            )
            if report.findings:
                break
        self.level = report.findings[0].first.level if report.findings else ""
        if report.first is not None:
            self._showed[mutant.slug] = report.first.call.kind
        return report.property, report.examples, report.repro


def _in_one_run(mutant: "Mutant", call: "Call") -> str:
    """The property that a mutant breaks on a call where it is run only once; "" if none."""
    from refllm.opcheck.candidate import load
    from refllm.opcheck.examine import Examiner
    from refllm.opcheck.observe import Task
    from refllm.opcheck.worker import NEVER, InProcess

    candidate = load(mutant.function())
    task = Task(call, "cpu", "torch", candidate.interpreted, "fused", deep=False, bitwise=False)
    examine = Examiner(InProcess(candidate), task, TIME_LIMIT, NEVER, any_profile=not mutant.place)
    found = examine(call, deep=False)
    return "" if found is None else found.property


class _UsersTest:
    """A test of somebody's: (what it raised or "", 0, "")."""

    looks_in_every_dtype = False

    def __init__(self, test: str | Test, limit: float) -> None:
        if limit <= 0:
            raise InputError(f"time_limit={limit}: expected more than 0 seconds")
        self._limit, self.level = limit, ""
        self._test = _find(test) if isinstance(test, str) else test
        if not callable(self._test):
            raise InputError(f"a test is a function or its name as file.py:function, found {type(test).__name__}")
        self.name = test if isinstance(test, str) else getattr(test, "__qualname__", type(test).__name__)

    def must_like(self, operator: str, form: str) -> None:
        """Raises TestIsVoidError if the test dislikes the right operator in that form."""
        from refllm import kernels

        right = getattr(kernels.plain if form == "torch" else kernels, operator)
        said, text = self._answer(right, form)
        if said:
            raise TestIsVoidError(
                f"{self.name} is void: it rejects the right {operator} ({form} form) with {said}"
                + (f": {text}" if text else "")
            )

    def __call__(self, mutant: "Mutant", dtype: str) -> tuple[str, int, str]:
        said, _ = self._answer(mutant.function(), mutant.form)
        return ("" if said == _SKIPPED else said), 0, ""

    def _answer(self, function: Callable[..., Any], form: str) -> tuple[str, str]:
        """("", "") or what it raised, and its text; in a process of its own, as it may end that."""
        if _gpu_in_use():
            return self._run(function, form)
        answer = apart.run(lambda: self._run(function, form), self._limit + _GRACE)
        if isinstance(answer, apart.Ended):
            return (answer.text if answer.in_time else self._late), ""
        said, text = answer
        return said, text

    @property
    def _late(self) -> str:
        return f"no answer within {self._limit:g} s"

    def _run(self, function: Callable[..., Any], form: str) -> tuple[str, str]:
        """See `_answer`. What it prints is not shown."""
        from refllm import kernels

        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                if form == "triton" and not _gpu():
                    stack.enter_context(kernels.interpreted())
                stack.enter_context(_time_limit(self._limit))
                self._test(function)
        except KeyboardInterrupt:
            raise
        except _TimeIsUpError:
            return self._late, ""
        except BaseException as error:  # whatever it raises is its answer; pytest.fail raises no Exception
            return type(error).__name__, "; ".join(str(error).split("\n\n")[0].split("\n")).strip(" ;")[:200]
        return "", ""


def _find(reference: str) -> Test:
    from refllm.opcheck.candidate import survive_import
    from refllm.user_code import find_function

    if ":" not in reference:
        raise InputError(f"--test {reference}: name a function of it, as file.py:function or module:function")
    file = Path(reference.rpartition(":")[0])
    if file.suffix == ".py" and not file.is_file():
        raise InputError(f"--test {reference}: there is no file {file}")
    survive_import(reference, find_function)
    return find_function(reference)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu_in_use() -> bool:
    """Whether this process holds a GPU, which does not survive a fork."""
    import torch

    return torch.cuda.is_initialized()


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _TimeIsUpError in the block after `seconds`, where signals can do that: in the main thread, on POSIX."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _TimeIsUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
