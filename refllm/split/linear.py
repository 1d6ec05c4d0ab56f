"""Products with a weight that is cut by its outputs or by its inputs, and the embedding cut by the vocabulary."""

from itertools import accumulate

import numpy as np

from refllm.ops.linear import embedding, linear
from refllm.ops.linear_backward import embedding_backward, linear_backward
from refllm.precision import EXACT, Arithmetic
from refllm.split.reduction import SUM, Parts, Reduce

__all__ = [
    "column_parallel_linear",
    "column_parallel_linear_backward",
    "row_parallel_linear",
    "row_parallel_linear_backward",
    "vocabulary_parallel_embedding",
    "vocabulary_parallel_embedding_backward",
]


def column_parallel_linear(
    x: np.ndarray, weights_P: Parts, biases_P: Parts | None = None, *, ar: Arithmetic = EXACT
) -> list[np.ndarray]:
    """Each rank's outputs y_p = x W_p^T + b_p: it holds rows of W and of b, [O_p, I] and [O_p], and all of x.

    The parts, joined along the last axis, are the whole y: an output is computed by one rank alone, so nothing is
    summed over ranks. Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    biases = [None] * len(weights_P) if biases_P is None else biases_P
    return [linear(x, weight, bias, ar=ar) for weight, bias in zip(weights_P, biases, strict=True)]


def column_parallel_linear_backward(
    dy_P: Parts,
    x: np.ndarray,
    weights_P: Parts,
    biases_P: Parts | None = None,
    *,
    reduce: Reduce = SUM,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray] | None]:
    """dx, summed over the ranks, and each rank's own dW_p and db_p (None without biases).

    All ranks read the same x, so its gradient is the sum of what reaches it through each of them.
    """
    biases = [None] * len(weights_P) if biases_P is None else biases_P
    found = [linear_backward(dy, x, w, b, ar=ar) for dy, w, b in zip(dy_P, weights_P, biases, strict=True)]
    dx = reduce([part for part, _, _ in found])
    return dx, [dw for _, dw, _ in found], None if biases_P is None else [db for _, _, db in found if db is not None]


def row_parallel_linear(
    x_P: Parts, weights_P: Parts, bias: np.ndarray | None = None, *, reduce: Reduce = SUM, ar: Arithmetic = EXACT
) -> np.ndarray:
    """y = sum over ranks of x_p W_p^T, then + b once: a rank holds columns of W, [O, I_p], and its part of x.

    A bias that every rank adds would count as many times as there are ranks. Rounding: `linear` for each rank's
    product, the partial sums as `reduce` stores them, `linear` again after the bias. Source: as
    `column_parallel_linear`.
    """
    y = reduce([linear(x, weight, ar=ar) for x, weight in zip(x_P, weights_P, strict=True)])
    return y if bias is None else ar.round(ar.array(y) + ar.array(bias), "linear")


def row_parallel_linear_backward(
    dy: np.ndarray, x_P: Parts, weights_P: Parts, bias: np.ndarray | None = None, *, ar: Arithmetic = EXACT
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None]:
    """Each rank's dx_p and dW_p, and db: a sum hands its gradient to every term, so nothing is summed over ranks.

    db is the same on every rank, and is that of one of them: added up over the ranks it would be too large.
    """
    found = [linear_backward(dy, x, w, bias, ar=ar) for x, w in zip(x_P, weights_P, strict=True)]
    return [dx for dx, _, _ in found], [dw for _, dw, _ in found], found[0][2]


def vocabulary_parallel_embedding(ids: np.ndarray, weights_P: Parts, *, reduce: Reduce = SUM) -> np.ndarray:
    """Rows of a table whose rows are cut over the ranks: a rank gives 0 for ids of other ranks, and the sum is the row.

    ids: [...], weights_P: [V_p, E] each. One term of every sum is not 0, so nothing is rounded.
    """
    parts = []
    for start, weight in zip(starts(weights_P), weights_P, strict=True):
        own = (ids >= start) & (ids < start + len(weight))
        rows = embedding(np.where(own, ids - start, 0), weight) if len(weight) else np.zeros((1, weight.shape[1]))
        parts.append(np.where(own[..., None], rows, 0))
    return reduce(parts)


def vocabulary_parallel_embedding_backward(
    dy: np.ndarray, ids: np.ndarray, weights_P: Parts, *, ar: Arithmetic = EXACT
) -> list[np.ndarray]:
    """Each rank's dW_p, [V_p, E]: from the places whose id it holds, and from no others."""
    found = []
    for start, weight in zip(starts(weights_P), weights_P, strict=True):
        own = (ids >= start) & (ids < start + len(weight))
        found.append(embedding_backward(dy[own], ids[own] - start, weight, ar=ar))
    return found


def starts(parts_P: Parts, axis: int = 0) -> list[int]:
    """Where each rank's part begins in the whole."""
    return [0, *accumulate(part.shape[axis] for part in parts_P[:-1])]
