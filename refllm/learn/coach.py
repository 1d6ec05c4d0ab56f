"""The coach: what is right about an answer, and what a wrong one looks like.

What raises, races or reads outside comes first, and then nothing is named by values. Else the answer's numbers on the
designed calls are compared with those of every known mistake: all that fit are named, and none where none does.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from refllm.accuracy.verdicts import Verdict
from refllm.hypotheses.operators.edits import NoSuchTextError
from refllm.hypotheses.operators.fit import Fit, all_right, fitting_among, wrong_elements
from refllm.hypotheses.operators.hypothesis import OpHypothesis
from refllm.learn.attempt import CHANGES, NOT_BEGUN, SECONDS, Attempt, Trouble, attempt
from refllm.learn.exercise import STAGES, Exercise, Given
from refllm.opcheck.tile import tile

_SECONDS_FOR_PAIRS = 0.7
_ASKS = "Which cell of the table can you follow by hand, and which of your numbers or steps makes the difference?"
"""The question before a mistake that has none of its own."""
_MOST_CELLS = 120
"""Cells of a call that is drawn, if there is one that small."""


@dataclass(frozen=True)
class Named:
    """A mistake that gives the answer's numbers. says: in a sentence. asks: the question before it. definition,
    changed: the lines of the definition, as they are and as the answer computes. as_if: it takes two mistakes at once,
    so that it is no more than a guess."""

    name: str
    says: str
    asks: str
    definition: str = ""
    changed: str = ""
    as_if: bool = False


@dataclass(frozen=True)
class Drawn:
    """A call to draw. got, wanted, wrong: one array per result."""

    call: Given
    got: tuple[np.ndarray, ...]
    wanted: tuple[np.ndarray, ...]
    wrong: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Review:
    """What is said of an answer.

    verdict: "incomplete" of what is not begun. stages: of `STAGES`, whether each holds. named: all mistakes that fit.
    where: the wrong cells in words. trouble: what came before any values, or beside them. drawn: the call to draw, None
    where there are no numbers. printed: the first lines of what the answer printed.
    """

    exercise: str
    verdict: Verdict
    stages: dict[str, bool]
    named: tuple[Named, ...] = ()
    where: str = ""
    trouble: Trouble | None = None
    drawn: Drawn | None = None
    printed: str = ""
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether everything is right."""
        return self.verdict == "holds"

    @property
    def by_values(self) -> bool:
        """Whether it fails by its numbers, and not by what comes before them."""
        return self.verdict == "fails" and not (self.trouble and self.trouble.kind != CHANGES)


def review(
    exercise: Exercise, path: Path, *, without: Collection[str] = (), seconds: float = SECONDS, forked: bool = True
) -> Review:
    """What the coach says of a file. without: names of mistakes that are left out. forked: see `attempt`."""
    start = time.perf_counter()
    tried = attempt(exercise, path, seconds, forked)
    found = judged(exercise, tried, without)
    return replace(found, printed=tried.printed, seconds=time.perf_counter() - start)


def judged(exercise: Exercise, tried: Attempt, without: Collection[str] = ()) -> Review:
    """What the coach says of what an answer gave."""
    right = {n: _holds(exercise, n, tried) for n in range(len(exercise.given))}
    stages = {
        stage: all(right[n] for n, call in enumerate(exercise.given) if call.stage == stage)
        for stage in STAGES
        if any(call.stage == stage for call in exercise.given)
    }
    first = next((t for t in tried.troubles if t.kind != CHANGES), None)
    changes = next((t for t in tried.troubles if t.kind == CHANGES), None)
    if first is not None:
        verdict: Verdict = "incomplete" if first.kind == NOT_BEGUN else "fails"
        return Review(exercise.name, verdict, stages, trouble=first, drawn=_drawn(exercise, tried, None))
    if all(right.values()):
        if changes is not None:
            return Review(exercise.name, "fails", stages, trouble=changes)
        if exercise.planted and tried.bug.strip().lower() != exercise.letter:
            said = f"BUG says {tried.bug!r}: the code is right, and the letter of what was wrong is another"
            return Review(exercise.name, "fails", stages, trouble=Trouble("misnamed", said))
        return Review(exercise.name, "holds", stages)
    fits = fitting_among([h for h in exercise.hypotheses if h.name not in without], [exercise.known], tried.results)
    fits = fits or fitting_among(exercise.of_operator, [exercise.known], tried.results)
    named = tuple(_named(exercise, fit) for fit in fits) or _pairs(exercise, tried, without)
    drawn = _drawn(exercise, tried, fits[0] if fits else None)
    return Review(exercise.name, "fails", stages, named, _where(exercise, drawn), changes, drawn)


def _holds(exercise: Exercise, n: int, tried: Attempt) -> bool:
    return n in tried.results and all_right(exercise.known, {n: tried.results[n]})


def _named(exercise: Exercise, fit: Fit) -> Named:
    known = exercise.mistake(fit.hypothesis.name)
    asks = known.asks if known else _ASKS
    return Named(fit.hypothesis.name, fit.says, asks, fit.definition, fit.changed)


def _pairs(exercise: Exercise, tried: Attempt, without: Collection[str]) -> tuple[Named, ...]:
    """Two mistakes at once that give the numbers of every call, each of which is needed. They are said "as if"."""
    until = time.perf_counter() + _SECONDS_FOR_PAIRS
    for one, other in combinations([m for m in exercise.mistakes if m.name not in without], 2):
        if time.perf_counter() > until:
            break
        if len(one.numbers) > 1 or len(other.numbers) > 1:
            continue
        both = OpHypothesis(
            f"{one.name} + {other.name}",
            f"{one.says}; and {other.says}",
            exercise.name,
            tuple(a + b for a in one.codes for b in other.codes),
            definition=exercise.text,
        )
        try:
            fits = fitting_among([both], [exercise.known], tried.results)
        except (NoSuchTextError, SyntaxError, NameError, AttributeError, KeyError):  # such a text is no program
            continue
        if fits and not fits[0].restricted:
            return (Named(both.name, both.says, one.asks, fits[0].definition, fits[0].changed, as_if=True),)
    return ()


# ------------------------------------------------------------------------------------------------- what is drawn


def _drawn(exercise: Exercise, tried: Attempt, fit: Fit | None) -> Drawn | None:
    """The call that shows most: one of simple structure, else the one with the most right cells, small before large."""
    found = []
    for key, calls, results in ((0, exercise.drawn, tried.drawn), (1, exercise.given, tried.results)):
        for n, got in results.items():
            wanted = exercise.expected(calls[n])
            wrong = _wrong(exercise, key, n, got, wanted)
            if any(w.any() for w in wrong):
                cells = sum(w.size for w in wrong)
                share = sum(w.sum() for w in wrong) / cells
                found.append(((cells > _MOST_CELLS, key, share, cells), Drawn(calls[n], got, wanted, wrong)))
    return min(found, key=lambda one: one[0])[1] if found else None


def _wrong(
    exercise: Exercise, key: int, n: int, got: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, ...]:
    if key:
        return tuple(wrong_elements(exercise.known, n, got))
    return tuple(~np.isclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True) for x, y in zip(got, wanted, strict=True))


def _where(exercise: Exercise, drawn: Drawn | None) -> str:
    """The wrong cells in words."""
    if drawn is None:
        return ""
    said = []
    for (name, axes), wrong in zip(exercise.outputs.items(), drawn.wrong, strict=True):
        if wrong.any():
            words = tile(wrong, axes[-wrong.ndim :] if wrong.ndim else ()) or "the number"
            said.append(f"{name}: {words}")
    return "; ".join(said)
