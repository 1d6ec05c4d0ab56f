"""The number of a hypothesis, solved for: a grid, then Gauss-Newton; and the interval of numbers that fit as well.

A number that is known for something (a theta of 1e6, a cap of 30) is one of a family like any other. It is only said
alone if the data tell it from its neighbours.
"""

import math
from dataclasses import dataclass

import numpy as np

from refllm.accuracy import limits
from refllm.hypotheses.hypothesis import Hypothesis
from refllm.hypotheses.search import Hypotheses, Search, Trial

_STEPS, _HALVINGS = 10, 4
_STEP = 1e-4  # of the number, for the slope
_WORTH = 0.9  # the share of the error that the best of a grid may leave
_ERRORS = 5.0  # standard errors on either side that an interval takes in
_CHANCE = 0.05  # of the distance of equally round numbers, that an interval may be wide for one of them to be meant
_NAMED = 0.01  # of a number, that an interval may be wide on either side for it to be said alone
_NEIGHBOURS = 16  # of a whole number, on either side


@dataclass(frozen=True)
class Solved:
    """A hypothesis at the number that fits best. low, high: between them lie those that fit as well."""

    hypothesis: Hypothesis
    low: float
    high: float


def solve(search: Search, hypothesis: Hypothesis, before: Hypotheses = (), least: float = _WORTH) -> Solved | None:
    """The number with which a hypothesis leaves the least of the error; None if it leaves more than `least` of it.
    before: changes that it is put on top of."""
    best = _of_the_grid(search, hypothesis, before)
    if best is None or best.share > least:
        return None
    return solved_from(search, best)


def solved_from(search: Search, trial: Trial) -> Solved | None:
    """The same, from where a trial has its last number. None where the number cannot be moved."""
    hypothesis, value = trial.changes[-1], trial.changes[-1].value
    assert hypothesis.parameter is not None
    assert value is not None
    return _whole(search, trial) if hypothesis.parameter.whole else _refined(search, trial)


def _of_the_grid(search: Search, hypothesis: Hypothesis, before: Hypotheses) -> Trial | None:
    assert hypothesis.parameter is not None
    found = search.all_of((hypothesis.at(value) for value in hypothesis.parameter.grid), before=before)
    return found[0] if found else None


def _moved(search: Search, trial: Trial, value: float) -> Trial | None:
    return search.tried((*trial.changes[:-1], trial.changes[-1].at(value)))


def _whole(search: Search, best: Trial) -> Solved | None:
    """Step by step downhill, then as far to either side as it fits as well."""
    while not search.out_of_time:
        value = best.changes[-1].value
        assert value is not None
        near = [t for by in (-2, -1, 1, 2) if (t := _moved(search, best, value + by))]
        lowest = min([best, *near], key=lambda t: t.left)
        if lowest is best:
            break
        best = lowest
    value, ends = best.changes[-1].value, []
    assert value is not None
    for by in (-1, 1):
        n = 0
        while n < _NEIGHBOURS and _fits_as_well(_moved(search, best, value + by * (n + 1)), best):
            n += 1
        ends.append(value + by * n)
    return Solved(best.changes[-1].at(value), ends[0], ends[1])


def _fits_as_well(trial: Trial | None, best: Trial) -> bool:
    return trial is not None and trial.left <= best.left * limits.AS_GOOD_AS_THE_BEST


def _refined(search: Search, best: Trial) -> Solved | None:
    """Gauss-Newton in units of the number itself."""
    hypothesis, error = best.changes[-1], math.inf
    for _ in range(_STEPS):
        if search.out_of_time:
            return None
        value = best.changes[-1].value
        assert value is not None
        unit = _unit(hypothesis, value)
        near = _moved(search, best, value + _STEP * unit)
        if near is None:
            return None
        J, r = (near.d - best.d) / _STEP, search.error() - best.d
        square = float(np.vdot(J, J))
        if not square:
            return None
        rows = np.einsum("ij,ij->i", *(x.reshape(len(x), -1) for x in (J, r)))
        error = float(np.sqrt(np.square(rows).sum())) / square
        step = float(np.clip(np.vdot(J, r) / square, -0.9, 3.0))
        trial = _along(search, best, value, step * unit)
        if trial is None:
            break
        gained, best = best.left - trial.left, trial
        if gained < 1e-3 * best.left and abs(step) < max(error / 10, 1e-9):
            break
    value = best.changes[-1].value
    assert value is not None
    error *= _ERRORS * _unit(hypothesis, value)
    return Solved(hypothesis.at(supported(value, error)), value - error, value + error)


def _unit(hypothesis: Hypothesis, value: float) -> float:
    """What a step is relative to: the number, or the least of the grid where it is 0."""
    assert hypothesis.parameter is not None
    return max(abs(value), min(abs(v) for v in hypothesis.parameter.grid if v) / 10)


def _along(search: Search, best: Trial, value: float, step: float) -> Trial | None:
    """The first trial, with smaller and smaller steps, that leaves less; None where none does."""
    for _ in range(_HALVINGS):
        trial = _moved(search, best, value + step)
        if trial is not None and trial.left < best.left:
            return trial
        step /= 4
    return None


def supported(value: float, error: float) -> float:
    """A value with the digits that its error leaves: a round number if no other value was likely to lie so near to one,
    else down to the digit of the error."""
    if not value or not math.isfinite(error):
        return value
    exponent = math.floor(math.log10(abs(value)))
    for digits in range(1, 12):
        rounded, distance = float(f"{value:.{digits - 1}e}"), 10.0 ** (exponent + 1 - digits)
        if abs(rounded - value) <= error and 2 * error <= _CHANCE * distance:
            return rounded
        if distance <= error:
            return rounded
    return value


def is_identified(value: float, low: float, high: float) -> bool:
    """Whether a number is told from others as round: the interval around it is narrow beside their distance."""
    if not value:
        return False
    digits = next(n for n in range(1, 18) if float(f"{value:.{n - 1}e}") == value or n == 17)
    distance = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits)
    return max(high - value, value - low) <= max(_CHANCE * distance / 2, _NAMED * abs(value))
