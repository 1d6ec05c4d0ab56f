"""Looks for a call on which a candidate is wrong: fixed ones first, then drawn ones that climb on the worst error."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from refllm.errors import InputError
from refllm.extras import require
from refllm.opcheck.examine import Finding
from refllm.opcheck.worker import TimeIsUpError
from refllm.strategies.call import Call

Progress = Callable[[str, float, float], None]
"""Told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Searched:
    """finding: the first, or None. ended: why it stopped before the last example, "" if it did not.

    complete: whether no finding means that it holds: every fixed call was examined, and no run was cut off.
    """

    finding: Finding | None
    ended: str = ""
    complete: bool = True


class _Stop(Exception):
    """A finding, or the end of the time."""


class Examines(Protocol):
    """What says of a call whether the search ends with it."""

    @property
    def score(self) -> float:
        """The worst error of the last call over its limit."""

    def __call__(self, call: Call, /) -> Finding | None: ...


def fixed(examine: Examines, calls: Iterable[Call], deadline: float, progress: Progress) -> Searched:
    """Every call of a list."""
    calls = list(calls)
    for i, call in enumerate(calls):
        if time.monotonic() > deadline:
            return Searched(None, f"the time was up after {i} of {len(calls)} fixed calls", complete=False)
        progress(f"{call.operator}, {call.dtype}: {call.kind}", i, len(calls))
        try:
            finding = examine(call)
        except TimeIsUpError:
            return _cut_off(call, f"fixed call {i + 1} of {len(calls)}")
        if finding is not None:
            return Searched(finding)
    return Searched(None)


def _cut_off(call: Call, which: str) -> Searched:
    return Searched(None, f"the time was up while {which} was running: {call}", complete=False)


def drawn(
    examine: Examines, strategy: Any, max_examples: int, seed: int, deadline: float, progress: Progress
) -> Searched:
    """Calls that Hypothesis draws, the same ones for the same seed. Raises MissingExtraError without Hypothesis, and
    InputError for a strategy that has no calls, or none that are left."""
    if max_examples < 1:
        return Searched(None)
    require("drawing examples (--max-examples 0 draws none)", "hypothesis")
    import hypothesis

    done, found = 0, Searched(None)

    def body(call: Call) -> None:
        nonlocal done, found
        if found.finding is not None or found.ended:
            raise _Stop
        if time.monotonic() > deadline:
            found = Searched(None, f"the time was up after {done} of {max_examples} drawn calls")
            raise _Stop
        progress(f"{call.operator}, {call.dtype}: drawn, {call.kind}", done, max_examples)
        done += 1
        try:
            finding = examine(call)
        except TimeIsUpError:
            found = _cut_off(call, f"drawn call {done} of {max_examples}")
            raise _Stop from None
        if finding is not None:
            found = Searched(finding)
            raise _Stop
        hypothesis.target(min(examine.score, 1e6), label="worst error over its limit")

    phases = (hypothesis.Phase.generate, hypothesis.Phase.target)
    settings = hypothesis.settings(
        max_examples=max_examples,
        phases=phases,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    test = hypothesis.seed(seed)(settings(hypothesis.given(strategy)(body)))
    try:
        test()
    except _Stop:
        pass
    except hypothesis.errors.Unsatisfiable:
        raise InputError("calls: the strategy draws no call that can be checked; leave less out") from None
    except BaseException as error:
        # Hypothesis adds to what it raises, or wraps it, where it replays the last example.
        if found.finding is None and not found.ended:
            raise error
    return found
