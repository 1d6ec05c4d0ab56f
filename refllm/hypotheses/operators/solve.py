"""The number of a hypothesis, solved for on each designed input, and what it is of that input's lengths."""

from collections.abc import Iterator, Sequence

import numpy as np

from refllm.hypotheses.operators.hypothesis import Outputs, Variant
from refllm.hypotheses.operators.outcomes import Given, Outcomes

_BEST = 3
_STEPS = 12
_STEP = 1e-5
_WORTH, _NEARER = 2.0, 0.25
"""What the best of a grid may leave, of what is right, squared, and what the number that is found may, not squared."""
_CLOSE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.06}
"""How far, of itself, a number that is solved for on a call may be from the one that it is."""


def solved(known: Outcomes, variant: Variant, n: int, answer: Outputs) -> float | None:
    """The number with which a variant is nearest to an answer on call n; None where none is much nearer than what is
    right."""
    right = _left(known, known.right, n, answer, 1.0)
    grid = sorted(variant.hypothesis.solved, key=lambda value: _left(known, variant, n, answer, value))[:_BEST]
    if not any(_left(known, variant, n, answer, value) < _WORTH * right for value in grid):
        return None
    found = [_refined(known, variant, n, answer, value) for value in grid]
    best = min(found, key=lambda value: _left(known, variant, n, answer, value))
    share = _left(known, variant, n, answer, best) / max(_size(known, n, answer), 1e-300)
    nearer = _left(known, variant, n, answer, best) < _NEARER**2 * right
    return best if nearer and share < _CLOSE[known.dtype] ** 2 else None


def readings(
    values: dict[int, float], calls: Sequence[Given], numbers: Sequence[int], dtype: str
) -> Iterator[tuple[str, dict[int, float]]]:
    """What the numbers of some calls may be: (in words, the exact number of each of `numbers`). One number for all
    calls, else one of the lengths of each: "1/sqrt(D)"."""
    near = _CLOSE[dtype]
    middle = float(np.median(list(values.values())))
    if all(abs(value - middle) <= near * abs(middle) for value in values.values()):
        number = roundest(middle, near * abs(middle) / 10)
        yield f"{number:.6g}", dict.fromkeys(numbers, number)
        return
    lengths = {n: calls[n].lengths for n in numbers}
    for axis in sorted(set.intersection(*(set(of) for of in lengths.values()))):
        forms = {axis: 1.0, f"1/{axis}": -1.0, f"sqrt({axis})": 0.5, f"1/sqrt({axis})": -0.5}
        for words, power in forms.items():
            exact = {n: float(max(1, of[axis])) ** power for n, of in lengths.items()}
            if all(abs(value - exact[n]) <= near * exact[n] for n, value in values.items()):
                yield words, exact


def roundest(value: float, error: float) -> float:
    """The number of the fewest digits within `error` of a value."""
    for digits in range(1, 12):
        rounded = float(f"{value:.{digits - 1}e}")
        if abs(rounded - value) <= error:
            return rounded
    return value


def _refined(known: Outcomes, variant: Variant, n: int, answer: Outputs, value: float) -> float:
    """Gauss-Newton from a value of the grid, in steps that may not more than double it."""
    left = _left(known, variant, n, answer, value)
    for _ in range(_STEPS):
        at, near = (_flat(known, variant, n, answer, value * (1 + by)) for by in (0.0, _STEP))
        if at is None or near is None:
            return value
        slope, error = (near[0] - at[0]) / _STEP, at[1] - at[0]
        square = float(slope @ slope)
        step = float(np.clip(slope @ error / square, -0.5, 1.0)) if square else 0.0
        after = _left(known, variant, n, answer, value * (1 + step))
        if not after < left:
            return value
        value, left = value * (1 + step), after
    return value


def _left(known: Outcomes, variant: Variant, n: int, answer: Outputs, value: float) -> float:
    """The squared distance that a number leaves."""
    flat = _flat(known, variant, n, answer, value)
    return float(np.square(flat[1] - flat[0]).sum()) if flat is not None else np.inf


def _size(known: Outcomes, n: int, answer: Outputs) -> float:
    return float(sum(np.square(np.where(np.isfinite(y), y, 0)).sum() for y in answer))


def _flat(
    known: Outcomes, variant: Variant, n: int, answer: Outputs, value: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """The variant's finite numbers and the answer's, in one row each."""
    results = variant.at(value)(*known.arrays(n))
    if results is None or [x.shape for x in results] != [y.shape for y in answer]:
        return None
    both = [(x.ravel(), y.ravel()) for x, y in zip(results, answer, strict=True)]
    x, y = (np.concatenate(parts) for parts in zip(*both, strict=True))
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite]
