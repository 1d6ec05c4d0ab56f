"""How far a candidate's values are from the predicted ones, in sigma."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.accuracy.limits import ROW_FLOOR, chance
from refllm.accuracy.propagation import ulp
from refllm.parallel import blocks, for_each

_AT_ONCE = 1 << 20
"""Elements: 8 MiB of float64."""


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
    honest: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def measure(candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float = np.inf) -> Measure:
    """candidate [N, n] or [N, H, n] against the exact values and the variance of the predicted error.

    overflow: the largest finite number of the candidate's format; exact values beyond it are infinite there.
    """
    error, V, wrong, finite = errors(candidate, exact, variance, overflow)
    squares = np.square(error)
    mean_square, mean_V = float(np.mean(squares)), float(np.mean(V, dtype=np.float64))
    row_V = np.maximum(V.mean(axis=-1, dtype=np.float64), ROW_FLOOR * mean_V)
    rows = ratio(np.sqrt(np.mean(squares, axis=-1)), np.sqrt(row_V))
    del squares
    count = np.concatenate([_independent(V[block]) for block in row_blocks(V)])
    row = np.unravel_index(int(np.argmax(rows - chance(count))), rows.shape)
    largest, at = _largest(error, V, ROW_FLOOR * mean_V)
    values = np.where(finite, exact, 0.0)
    along = float(np.sum(error * values))
    square = float(np.sum(np.square(values, out=values)))
    del values
    return Measure(
        elements=candidate.size,
        shape=(candidate.shape[0], math.prod(candidate.shape[1:-1]), candidate.shape[-1]),
        errors=float(_independent(V.ravel())),
        scale=float(np.sqrt(square / candidate.size)),
        rms_error=float(np.sqrt(mean_square)),
        rms_sigma=float(np.sqrt(mean_V)),
        ratio=float(ratio(np.sqrt(mean_square), np.sqrt(mean_V))),
        row_ratio=float(rows[row]),
        row_errors=float(count[row]),
        row=tuple(int(i) for i in row),
        largest=largest,
        at=at,
        bias=float(ratio(np.sum(error), np.sqrt(np.sum(V, dtype=np.float64)))),
        gain=along / square if square else 0.0,
        nonfinite=int(np.count_nonzero(wrong)),
        nonfinite_at=tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else (),
    )


def _independent(variance: np.ndarray) -> np.ndarray:
    """[..., n] -> [...]: (sum V)^2 / sum V^2, n where all are 0."""
    variance = variance.astype(np.float64)
    total, squares = variance.sum(axis=-1), np.square(variance, out=variance).sum(axis=-1)
    return np.where(squares > 0, np.square(total) / np.where(squares > 0, squares, 1), variance.shape[-1])


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

    for_each(fill, row_blocks(exact))
    return error, V, wrong, finite


def _errors(
    candidate: np.ndarray, exact: np.ndarray, variance: np.ndarray, overflow: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    exact = np.where(np.abs(exact) > overflow, np.copysign(np.inf, exact), exact)
    same_nonfinite = (candidate == exact) | (np.isnan(candidate) & np.isnan(exact))
    finite = np.isfinite(candidate) & np.isfinite(exact)
    error = np.where(finite, candidate - np.where(finite, exact, 0), 0.0)
    V = np.where(finite & np.isfinite(variance), variance, 0.0)
    return error, V, ~finite & ~same_nonfinite, finite


def row_blocks(values: np.ndarray) -> Iterator[slice]:
    """Consecutive slices along the first axis of [N, ..., n], of about `_AT_ONCE` elements: what is computed element by
    element, or row by row, needs no more memory at a time than that. The logits of a prompt are many."""
    rows = max(1, len(values))
    return blocks(rows, max(1, _AT_ONCE // max(1, values.size // rows)))


def _largest(error: np.ndarray, V: np.ndarray, floor: float) -> tuple[float, tuple[int, ...]]:
    """The largest |error| / sigma and its index, the first of equals; V counts as `floor` where it is less."""
    found: tuple[float, tuple[int, ...]] | None = None
    for block in row_blocks(error):
        z = ratio(np.abs(error[block]), np.sqrt(np.maximum(V[block], floor)))
        row, *rest = (int(i) for i in np.unravel_index(int(np.argmax(z)), z.shape))
        if found is None or z[row, *rest] > found[0]:
            found = float(z[row, *rest]), (block.start + row, *rest)
    assert found is not None
    return found


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
        distance = distance[np.isfinite(distance)]
        counts[0] += np.count_nonzero(distance == 0)
        bins = np.searchsorted(ULP_BINS[1:-1], distance[distance > 0], side="left")
        counts[1:] += np.bincount(bins, minlength=len(counts) - 1)
    return counts.tolist()
