"""Asks "looks like" of wrong operators, and scores its answers: rightly named, wrongly named, or silent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.hypotheses.operators.designed import designed
from refllm.hypotheses.operators.fit import Answers, fitting, is_right
from refllm.opcheck.observe import Task, observe
from refllm.ops.contracts import contract_of

Names = frozenset[str]


@dataclass(frozen=True)
class Asked:
    """One wrong operator. mistake: its name as a sentence. right: the hypotheses that are that mistake. answers: its
    results on the designed calls."""

    operator: str
    name: str
    mistake: str
    right: Names
    answers: Answers


@dataclass(frozen=True)
class Score:
    """named: (hypothesis, sentence) of all that fit. without: the same, with the right hypotheses left out."""

    asked: Asked
    named: tuple[tuple[str, str], ...]
    without: tuple[tuple[str, str], ...] = ()

    @property
    def verdict(self) -> str:
        """ "rightly" where the right name is among those that fit, "wrongly" where others alone are, or "silent"."""
        if not self.named:
            return "silent"
        return "rightly" if any(name in self.asked.right for name, _ in self.named) else "wrongly"

    @property
    def alone(self) -> bool:
        """Whether nothing but the right name fits."""
        return self.verdict == "rightly" and all(name in self.asked.right for name, _ in self.named)


def answers_of(
    operator: str, function: Callable[..., Any], dtype: str, arrays: str, interpreted: bool = False, deep: bool = False
) -> Answers:
    """What a function returns on the designed calls that it can do. deep: without those on which it breaks another
    rule than that of values, as memory that nobody wrote."""
    found: Answers = {}
    for n, call in enumerate(designed(operator, dtype)):
        seen = observe(function, Task(call, "cpu", arrays, interpreted, "fused", deep, False))
        shapes = contract_of(operator).result_shapes(*call.arrays())
        reduced = [r.value.shape for r in seen.results] == [()] and "reduction" in contract_of(operator).choices
        if not seen.property and (reduced or [r.value.shape for r in seen.results] == shapes):
            found[n] = tuple(np.asarray(r.value, np.float64) for r in seen.results)
    return found


def is_visible(asked: Asked, dtype: str) -> bool:
    """Whether a value is wrong on a designed input."""
    return not is_right(asked.operator, dtype, asked.answers)


def score(asked: Asked, dtype: str, removed: bool = False) -> Score:
    """removed: also with the right hypotheses left out."""
    without = _names(asked, dtype, sorted(asked.right)) if removed and asked.right else ()
    return Score(asked, _names(asked, dtype), without)


def falsely(scored: Score) -> list[str]:
    """The names that it has once its own is left out, without numbers that were solved for: those are so."""
    from refllm.hypotheses.operators.catalogue import catalogue

    solved = {h.name for h in catalogue(scored.asked.operator) if h.solved}
    first = {name for name, _ in scored.named}  # those that cannot be told from it were named at first
    return [name for name, _ in scored.without if name not in solved and name not in first]


def _names(asked: Asked, dtype: str, without: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    fits = fitting(asked.operator, dtype, asked.answers, without)
    return tuple((fit.hypothesis.name, fit.says) for fit in fits)
