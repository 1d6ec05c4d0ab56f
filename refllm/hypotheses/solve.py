"""The number of a hypothesis, solved for: a grid, then Gauss-Newton, and the roundest number within the error."""

from dataclasses import dataclass

import numpy as np

from refllm.hypotheses.hypothesis import Hypothesis
from refllm.hypotheses.search import Hypotheses, Search, Trial

_STEPS, _HALVINGS = 10, 4
_STEP = 1e-4  # of the logarithm, for the slope
_WORTH = 0.9  # the share of the error that the best of a grid may leave
_ERRORS = 5.0  # standard errors within which a rounder number is taken


@dataclass(frozen=True)
class Solved:
    """A hypothesis at the number that fits best. error: five standard errors of it."""

    hypothesis: Hypothesis
    error: float


def solve(search: Search, hypothesis: Hypothesis, before: Hypotheses = ()) -> Solved | None:
    """The number with which a hypothesis leaves the least of the error; None if it leaves nearly all of it."""
    best = _of_the_grid(search, hypothesis, before)
    if best is None or best.share > _WORTH:
        return None
    assert hypothesis.parameter is not None
    if hypothesis.parameter.whole:
        value = best.changes[-1].value
        assert value is not None
        near = [t for by in (-2, -1, 1, 2) if (t := search.tried((*before, hypothesis.at(value + by))))]
        return Solved(min([best, *near], key=lambda t: t.left).changes[-1], 0.0)
    return _refined(search, hypothesis, before, best)


def _of_the_grid(search: Search, hypothesis: Hypothesis, before: Hypotheses) -> Trial | None:
    assert hypothesis.parameter is not None
    found = search.all_of((hypothesis.at(value) for value in hypothesis.parameter.grid), before=before)
    return found[0] if found else None


def _refined(search: Search, hypothesis: Hypothesis, before: Hypotheses, best: Trial) -> Solved | None:
    value = best.changes[-1].value
    assert value is not None
    error = 0.0
    for _ in range(_STEPS):
        if search.out_of_time:
            return None
        near = search.tried((*before, hypothesis.at(value * (1 + _STEP))))
        if near is None:
            return None
        J, r = (near.d - best.d) / _STEP, search.error() - best.d
        square = float(np.vdot(J, J))
        if not square:
            return None
        rows = np.einsum("ij,ij->i", *(x.reshape(len(x), -1) for x in (J, r)))
        error = float(np.sqrt(np.square(rows).sum())) / square
        step = float(np.clip(np.vdot(J, r) / square, -0.9, 3.0))
        trial = _along(search, hypothesis, before, value, step, best.left)
        if trial is None:
            break
        gained = best.left - trial.left
        best, value = trial, trial.changes[-1].value
        assert value is not None
        if gained < 1e-3 * best.left and abs(step) < max(error / 10, 1e-9):
            break
    error = _ERRORS * abs(value) * error
    return Solved(hypothesis.at(roundest(value, error)), error)


def _along(
    search: Search, hypothesis: Hypothesis, before: Hypotheses, value: float, step: float, left: float
) -> Trial | None:
    """The first trial, with smaller and smaller steps, that leaves less; None where none does."""
    for _ in range(_HALVINGS):
        trial = search.tried((*before, hypothesis.at(value * (1 + step))))
        if trial is not None and trial.left < left:
            return trial
        step /= 4
    return None


def roundest(value: float, error: float) -> float:
    """The number of the fewest digits within `error` of a value."""
    for digits in range(1, 12):
        rounded = float(f"{value:.{digits - 1}e}")
        if abs(rounded - value) <= error:
            return rounded
    return value
