"""The gradients of matrix products, sums, the embedding and the reshapes of heads."""

from typing import Any

import numpy as np

from refllm.ops.linear import as_rows, merge_heads, split_heads
from refllm.precision import EXACT, Arithmetic

__all__ = ["add_backward", "embedding_backward", "linear_backward", "merge_heads_backward", "split_heads_backward"]


def linear_backward(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    needed: tuple[bool, ...] = (True, True, True),
    ar: Arithmetic = EXACT,
) -> tuple[Any, Any, np.ndarray | None]:
    """dx = dy W, dW = dy^T x, db = sum dy over rows: dy [..., O], x [..., I], weight [O, I]; db is None without bias.

    y_o = sum_i x_i W_oi + b_o, so dy_o reaches x_i through W_oi, W_oi through x_i, and b_o as it is; what several rows
    share is the sum over them.
    needed: which of x, weight and bias are to have a gradient; what is not costs nothing and is None.
    Rounding: `linear.grad`, each once. Source: the chain rule; torch.autograd of torch.nn.functional.linear.
    """
    dy, x, weight = ar.array(dy), ar.array(x), ar.array(weight)
    of_x, of_weight, of_bias = (*needed, *[bias is not None] * (3 - len(needed)))
    rows_NO, rows_NI = as_rows(dy), as_rows(x)
    dx = ar.round(np.matmul(rows_NO, weight).reshape(x.shape), "linear.grad") if of_x else None
    dweight = ar.round(np.matmul(rows_NO.T, rows_NI), "linear.grad") if of_weight else None
    return dx, dweight, ar.round(rows_NO.sum(axis=0), "linear.grad") if of_bias and bias is not None else None


def add_backward(dsum: np.ndarray, *, ar: Arithmetic = EXACT) -> tuple[np.ndarray, np.ndarray]:
    """dx = dy = dsum: a sum hands its gradient to both terms."""
    dsum = ar.array(dsum)
    return dsum, dsum


def embedding_backward(dy: np.ndarray, ids: np.ndarray, weight: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """dW[v] = sum of dy over the places where ids is v: dy [..., E], ids [...], weight [V, E]; 0 for rows never read.

    Rounding: `embedding.grad.sum` after every addition (torch's CPU kernel adds row by row in the format of the
    weights, so that a sum in bfloat16 stops growing at 256 equal terms), `embedding.grad` once at the end.
    """
    dy, ids = as_rows(ar.array(dy)), np.asarray(ids).ravel()
    dweight = np.zeros(weight.shape, ar.work)
    for turn in _turns(ids):  # each row of the table at most once per turn, in the order of the places
        dweight[ids[turn]] = ar.round(dweight[ids[turn]] + dy[turn], "embedding.grad.sum")
    return ar.round(dweight, "embedding.grad")


def _turns(ids: np.ndarray) -> list[np.ndarray]:
    """Places grouped by how many places before have the same id."""
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(ids[order]) != 0])[: len(ids)]
    counts = np.diff(np.r_[starts, len(ids)])
    nth = np.empty(len(ids), int)
    nth[order] = np.arange(len(ids)) - np.repeat(starts, counts)
    return [np.flatnonzero(nth == n) for n in range(int(nth.max(initial=-1)) + 1)]


def split_heads_backward(dx_BHSD: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """[B, H, S, D] -> [B, S, H * D]: the gradient is moved back."""
    return merge_heads(ar.array(dx_BHSD))


def merge_heads_backward(dx_BSE: np.ndarray, heads: int, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """[B, S, heads * D] -> [B, heads, S, D]: the gradient is moved back."""
    return split_heads(ar.array(dx_BSE), heads)
