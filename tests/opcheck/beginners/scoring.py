"""Asks "looks like" of wrong operators, and scores its answers: rightly named, wrongly named, or silent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.hypotheses.operators.designed import designed
from refllm.hypotheses.operators.fit import Answers, Fit, fitting, is_right
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
    """named: all that fit. without: those with the right hypotheses left out."""

    asked: Asked
    named: tuple[Fit, ...]
    without: tuple[Fit, ...] = ()

    @property
    def verdict(self) -> str:
        """ "rightly" where the right name is among those that fit, "wrongly" where others alone are, or "silent"."""
        if not self.named:
            return "silent"
        return "rightly" if any(fit.hypothesis.name in self.asked.right for fit in self.named) else "wrongly"

    @property
    def alone(self) -> bool:
        """Whether nothing but the right name fits."""
        return self.verdict == "rightly" and all(fit.hypothesis.name in self.asked.right for fit in self.named)


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
    without = fitting(asked.operator, dtype, asked.answers, sorted(asked.right)) if removed else ()
    return Score(asked, tuple(fitting(asked.operator, dtype, asked.answers)), tuple(without))


def falsely(scored: Score) -> list[str]:
    """The names that it has once its own is left out and had not before.

    A number that was solved for, and a mistake that is restricted to one result or one value of an argument, say the
    same in other words: always half-split is other pairs where pairs are interleaved.
    """
    before = {fit.hypothesis.name for fit in scored.named}
    fits = [fit for fit in scored.without if not fit.restricted and not fit.hypothesis.solved]
    return [fit.hypothesis.name for fit in fits if fit.hypothesis.name not in before]
