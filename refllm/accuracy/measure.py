"""How far a candidate's values are from the predicted ones, in sigma."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.accuracy.limits import ROW_FLOOR, chance
from refllm.accuracy.propagation import ulp
from refllm.parallel import blocks, for_each

_AT_ONCE = 1 << 17
"""Elements: 1 MiB of float64, which stay in cache from one step to the next."""

Errors = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Error, its predicted variance, which elements are NaN or infinite on one side, which are finite on both."""


@dataclass(frozen=True)
class Measure:
    """One tap against one prediction.

    shape: positions, heads (1 where the value is not split into them), channels. errors: of how many independent errors
    of one size the predicted error is made, (sum V)^2 / sum V^2 with V the variances.
    ratio: rms error / rms of the predicted sigma; 0 where both are 0, infinite where only the prediction is.
    row_ratio, row: the worst row (last axis) by the same ratio, and its index; worst beyond what chance allows
    (`limits.chance`) for row_errors, its number of independent errors. A row of softmax weights may have hundreds of
    elements and one error.
    largest, at: the largest |error| / sigma of a single element, and its index. bias: mean error in standard errors;
    gain: the common factor that fits best, minus 1. nonfinite: elements that are NaN or infinite in one and not in the
    other, nonfinite_at: the first.
    misrounded: the share of elements that are not, to the bit, what the policy's rounding points make of the same
    inputs; 0 where that is not known.
    scatter: the standard error of `ratio`, from how much positions differ: what chance makes of few; 0 of one.
    honest: the ratio that the reference's own emulated run reaches (`refllm.check.second_opinion`; of a golden, what
    its manifest says); 0 where it was not asked.
    """

    elements: int
    shape: tuple[int, int, int]
    errors: float
    scale: float
    rms_error: float
    rms_sigma: float
    ratio: float
    row_ratio: float
    row: tuple[int, ...]
    row_errors: float
    largest: float
    at: tuple[int, ...]
    bias: float
    gain: float
    nonfinite: int
    nonfinite_at: tuple[int, ...] = ()
    misrounded: float = 0.0
    scatter: float = 0.0
    honest: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def measure(candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float = np.inf) -> Measure:
    """candidate [N, n] or [N, H, n] against the exact values and the variance of the predicted error.

    overflow: the largest finite number of the candidate's format; exact values beyond it are infinite there.
    """
    width = exact.shape[-1]
    whole = _errors(candidate, exact, variance, overflow) if exact.size <= _AT_ONCE else None
    by_row = _sums(candidate, exact, variance, overflow, whole)
    square_rows, V_rows, V2_rows, wrong_rows = by_row[:4]
    square, V, V2, wrong, error, along, values = by_row.reshape(len(by_row), -1).sum(axis=1).tolist()
    n = candidate.size
    floor = ROW_FLOOR * V / n
    rows = ratio(np.sqrt(square_rows / width), np.sqrt(np.maximum(V_rows / width, floor)))
    count = _independent(V_rows, V2_rows, width)
    row = np.unravel_index(int(np.argmax(rows - chance(count))), rows.shape)
    largest, at = _largest(candidate, exact, variance, overflow, floor, whole)
    return Measure(
        elements=n,
        shape=(candidate.shape[0], math.prod(candidate.shape[1:-1]), width),
        errors=float(_independent(np.array(V), np.array(V2), n)),
        scale=math.sqrt(values / n),
        rms_error=math.sqrt(square / n),
        rms_sigma=math.sqrt(V / n),
        ratio=float(ratio(math.sqrt(square / n), math.sqrt(V / n))),
        row_ratio=float(rows[row]),
        row_errors=float(count[row]),
        row=tuple(int(i) for i in row),
        largest=largest,
        at=at,
        bias=float(ratio(error, math.sqrt(V))),
        gain=along / values if values else 0.0,
        scatter=_scatter(square_rows, V_rows),
        nonfinite=int(wrong),
        nonfinite_at=_first_wrong(candidate, exact, variance, overflow, wrong_rows) if wrong else (),
    )


def _scatter(square: np.ndarray, V: np.ndarray) -> float:
    """The standard error of sqrt(sum square / sum V) over the first axis."""
    error, V = (a.reshape(len(a), -1).sum(axis=1) for a in (square, V))
    n, total = len(V), float(V.sum())
    if n < 2 or not total > 0 or not error.any():
        return 0.0
    off = np.square(error - V * error.sum() / total).sum() * n / (n - 1)
    return float(np.sqrt(off / total / error.sum()) / 2)


def _sums(
    candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float, whole: Errors | None
) -> np.ndarray:
    """Sums over the last axis [7, N, ...]: of squares of the error, of its predicted variance V, V^2, of elements that
    are NaN or infinite on one side, of the error, error times exact value, squares of the values.

    In blocks of rows, of which no more is kept: the logits of a prompt are many. whole: the errors, where they are few.
    """
    sums = np.empty((7, *exact.shape[:-1]))

    def dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("...i,...i->...", x, y))

    def fill(block: slice) -> None:
        error, V, wrong, finite = whole or _errors(candidate[block], exact[block], variance[block], overflow)
        values = exact[block] if finite.all() else np.where(finite, exact[block], 0.0)
        V = V.astype(np.float64)
        parts = dot(error, error), V.sum(-1), dot(V, V), wrong.sum(-1), error.sum(-1), dot(error, values)
        for out, part in zip(sums, (*parts, dot(values, values)), strict=True):
            out[block] = part

    _for_each_block(fill, exact)
    return sums


def _first_wrong(
    candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float, wrong: np.ndarray
) -> tuple[int, ...]:
    """The index of the first element that is NaN or infinite on one side. wrong: how many are in each row."""
    row = tuple(int(i) for i in np.argwhere(wrong)[0])
    found = _errors(candidate[row], exact[row], variance[row], overflow)[2]
    return (*row, int(np.argmax(found)))


def _independent(total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
    """(sum V)^2 / sum V^2 of n variances V; n where all are 0."""
    return np.where(squares > 0, np.square(total) / np.where(squares > 0, squares, 1), n)


def errors(
    candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float = np.inf
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Error and its predicted variance, both 0 where they are undefined; which elements are NaN or infinite in one and
    not in the other; and which are finite in both."""
    if not exact.ndim:  # a loss
        return _errors(candidate, exact, variance, overflow)
    error = np.empty(exact.shape, np.result_type(candidate, exact))
    V = np.empty(exact.shape, variance.dtype)
    wrong, finite = (np.empty(exact.shape, bool) for _ in range(2))

    def fill(block: slice) -> None:
        error[block], V[block], wrong[block], finite[block] = _errors(
            candidate[block], exact[block], variance[block], overflow
        )

    _for_each_block(fill, exact)
    return error, V, wrong, finite


def _errors(candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float) -> Errors:
    beyond = np.abs(exact) > overflow
    if beyond.any():
        exact = np.where(beyond, np.copysign(np.inf, exact), exact)
    finite = np.isfinite(candidate) & np.isfinite(exact)
    if finite.all():
        known = np.isfinite(variance)
        V = variance if known.all() else np.where(known, variance, 0.0)
        return candidate - exact, V, np.zeros(exact.shape, bool), finite
    V = np.where(finite & np.isfinite(variance), variance, 0.0)
    same_nonfinite = (candidate == exact) | (np.isnan(candidate) & np.isnan(exact))
    error = np.where(finite, candidate - np.where(finite, exact, 0), 0.0)
    return error, V, ~finite & ~same_nonfinite, finite


def _for_each_block(work: Callable[[slice], None], values: np.ndarray) -> None:
    """work(block) for all `row_blocks`; where there is one, without looking for threads, which takes milliseconds."""
    parts = list(row_blocks(values))
    if len(parts) == 1:
        work(parts[0])
    else:
        for_each(work, parts)


def row_blocks(values: np.ndarray) -> Iterator[slice]:
    """Consecutive slices along the first axis of [N, ..., n], of about `_AT_ONCE` elements: what is computed element by
    element, or row by row, needs no more memory at a time than that. The logits of a prompt are many."""
    rows = max(1, len(values))
    return blocks(rows, max(1, _AT_ONCE // max(1, values.size // rows)))


def _largest(
    candidate: np.ndarray,
    exact: np.ndarray,
    variance: np.ndarray,
    overflow: float,
    floor: float,
    whole: Errors | None,
) -> tuple[float, tuple[int, ...]]:
    """The largest |error| / sigma and its index, the first of equals; V counts as `floor` where it is less."""
    found: dict[int, tuple[float, tuple[int, ...]]] = {}

    def search(block: slice) -> None:
        error, V, _, _ = whole or _errors(candidate[block], exact[block], variance[block], overflow)
        V = np.maximum(V, floor, dtype=np.float64)
        z = np.square(error) / V if floor > 0 else np.square(ratio(error, np.sqrt(V)))
        row, *rest = (int(i) for i in np.unravel_index(int(np.argmax(z)), z.shape))
        found[block.start] = math.sqrt(z[row, *rest]), (block.start + row, *rest)

    _for_each_block(search, exact)
    return max((found[start] for start in sorted(found)), key=lambda each: each[0])


def ratio(error: Any, sigma: Any) -> Any:
    """error / sigma; 0 / 0 is 0, anything else / 0 infinite."""
    error, sigma = np.asarray(error, np.float64), np.asarray(sigma, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / sigma)


ULP_BINS = (0.0, 0.5, 1.0, 1.5, 2.5, 4.5, 8.5, 16.5, np.inf)
"""Edges of `ulp_histogram`: exact, up to half an ulp, up to 1, ..., more than 16.5. An edge counts to the bin below it:
what is 1 ulp off is not over 1 ulp."""


def ulp_histogram(candidate: np.ndarray, exact: np.ndarray, dtype: str) -> list[int]:
    """How many elements are how many ulp of `dtype` from the exact value, by `ULP_BINS`; the first bin is exact 0."""
    counts = np.zeros(len(ULP_BINS), np.int64)
    for block in row_blocks(exact):
        spacing = np.maximum(ulp(exact[block], dtype), np.finfo(np.float32).tiny)
        with np.errstate(invalid="ignore"):
            distance = np.abs(candidate[block] - exact[block]) / spacing
        infinite = np.count_nonzero(distance == np.inf)
        beyond = [np.count_nonzero(distance > edge) - infinite for edge in ULP_BINS[:-1]]
        counts[0] += np.count_nonzero(distance == 0)
        counts[1:] += -np.diff(beyond, append=0)
    return counts.tolist()
