"""Matrix products, sums and the reshapes between the residual stream and heads."""

import math

import numpy as np

from refllm.precision import EXACT, Arithmetic

__all__ = ["add", "embedding", "linear", "merge_heads", "split_heads"]


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """y = x W^T + b: [..., I] -> [..., O] with weight [O, I] and bias [O].

    Rounding: `linear`, once, after the bias. Source: torch.nn.functional.linear.
    """
    x = ar.array(x)
    y = ar.matmul_t(as_rows(x), ar.array(weight), None if bias is None else ar.array(bias))
    return ar.round(y.reshape(*x.shape[:-1], weight.shape[0]), "linear")


def as_rows(x: np.ndarray) -> np.ndarray:
    """[..., I] -> [N, I]; not by -1, which NumPy cannot work out where I is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def add(x: np.ndarray, y: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """x + y, a step of the residual stream. Rounding: `add`."""
    return ar.round(ar.array(x) + ar.array(y), "add")


def embedding(ids: np.ndarray, weight: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """Rows of the table: ids [...] -> [..., E] with weight [V, E]. No scaling and no rounding."""
    return ar.array(weight[ids])


def split_heads(x_BSE: np.ndarray, heads: int, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """[B, S, heads * D] -> [B, heads, S, D]: head h is columns h*D .. h*D + D-1. A view, nothing is computed."""
    B, S, E = x_BSE.shape
    return x_BSE.reshape(B, S, heads, E // heads).transpose(0, 2, 1, 3)


def merge_heads(x_BHSD: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """[B, H, S, D] -> [B, S, H * D], the inverse of `split_heads`."""
    B, H, S, D = x_BHSD.shape
    return x_BHSD.transpose(0, 2, 1, 3).reshape(B, S, H * D)
