"""What a wrong candidate looks like: it runs on designed inputs, and the hypotheses that give its numbers are named.

That comes before anything is made small: on one or two columns many mistakes have the same numbers. All that fit are
named, and none where none does; then it is said where the designed inputs come out wrong, if that is not everywhere.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refllm.accuracy.expected import remembered
from refllm.hypotheses.operators.designed import designed
from refllm.hypotheses.operators.fit import Answers, fitting, wrong_elements
from refllm.hypotheses.operators.outcomes import outcomes
from refllm.opcheck import gradients
from refllm.opcheck.examine import Examiner, Finding
from refllm.opcheck.offers import Offers
from refllm.opcheck.tile import tile
from refllm.opcheck.worker import TimeIsUpError
from refllm.ops.contracts import contract_of
from refllm.strategies.call import Call

_OF_VALUES = ("value", "NaN pattern")


_ENDS = ("hangs", "crashes")
"""What costs the time of many calls: then nothing is named."""


class _MisbehavesError(Exception):
    pass


@dataclass(frozen=True)
class Guess:
    """One mistake that gives the candidate's numbers. what: in one clause. source: where it was seen, "" for one that
    is in no tracker. definition, changed: the lines of the definition that are others with the mistake."""

    name: str
    what: str
    source: str = ""
    definition: str = ""
    changed: str = ""

    @property
    def text(self) -> str:
        return f"{self.what} ({self.source})" if self.source else self.what


@dataclass(frozen=True)
class Likeness:
    """guesses: all that fit. wrong_in: where the designed inputs come out wrong, "" if everywhere or where something
    fits."""

    guesses: tuple[Guess, ...] = ()
    wrong_in: str = ""


def looks_like(examine: Examiner, offers: Offers, finding: Finding) -> Likeness:
    """What the candidate of a finding looks like; nothing where its values are not what is wrong."""
    if finding.property not in _OF_VALUES and finding.row_alone is None:
        return Likeness()
    operator, dtype = finding.call.operator, finding.call.dtype
    answers = _answers(examine, offers, operator, dtype)
    fits = fitting(operator, dtype, answers)
    guesses = tuple(Guess(f.hypothesis.name, f.says, f.hypothesis.source, f.definition, f.changed) for f in fits)
    return Likeness(guesses) if guesses else Likeness((), _wrong_in(operator, dtype, answers))


def _answers(examine: Examiner, offers: Offers, operator: str, dtype: str) -> Answers:
    """What the candidate returns on the designed calls that it is asked and that it can do."""
    answers: Answers = {}
    for n, call in enumerate(designed(operator, dtype)):
        if offers.asks(call) and _is_usual(call, offers):
            try:
                values = _values(examine, call)
            except (TimeIsUpError, _MisbehavesError):
                return {}
            if values is not None:
                answers[n] = values
    return answers


def _values(examine: Examiner, call: Call) -> tuple[np.ndarray, ...] | None:
    """The results of one call; None where there are none, or others than the contract has."""
    seen = examine.runner.observe(replace(examine.task, call=call, deep=False), examine.limit, examine.until)
    if seen.property in _ENDS:
        raise _MisbehavesError
    expected = remembered(call, examine.task.policy, examine.convention)
    seen = gradients.without_none(call, seen, expected)
    if seen.property or [r.value.shape for r in seen.results] != [e.exact.shape for e in expected]:
        return None
    return tuple(np.asarray(result.value, np.float64) for result in seen.results)


def _is_usual(call: Call, offers: Offers) -> bool:
    """Whether the convention of the candidate is the contract's on a call."""
    if not offers.convention:
        return True
    by_convention, by_contract = (remembered(call, "fused", c) for c in (offers.convention, ""))
    return all(_same(a.exact, b.exact) for a, b in zip(by_convention, by_contract, strict=True))


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b, equal_nan=True)


def _wrong_in(operator: str, dtype: str, answers: Answers) -> str:
    """The wrong elements of the first designed call of which some are right."""
    known = outcomes(operator, dtype, dtype)
    names = contract_of(operator).outputs
    for n in answers:
        wrong = wrong_elements(known, n, answers[n])
        if any(where.any() for where in wrong) and not all(where.all() for where in wrong):
            said = [f"{name}: {tile(w, axes) or 'all'}" for (name, axes), w in zip(names.items(), wrong, strict=False)
                    if w.any()]  # fmt: skip
            return f"{'; '.join(said)} ({known.calls[n].kind})"
    return ""
