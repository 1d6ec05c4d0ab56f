"""Norms whose rows, or whose heads, lie on different ranks."""

import numpy as np

from refllm.ops.norm import layer_norm, rms_norm
from refllm.ops.norm_backward import layer_norm_backward, rms_norm_backward
from refllm.precision import EXACT, Arithmetic
from refllm.split.reduction import SUM, Parts, Reduce

__all__ = [
    "head_parallel_norm",
    "head_parallel_norm_backward",
    "sequence_parallel_layer_norm",
    "sequence_parallel_layer_norm_backward",
    "sequence_parallel_rms_norm",
    "sequence_parallel_rms_norm_backward",
]


def sequence_parallel_rms_norm(
    x_P: Parts, weight: np.ndarray, eps: float, *, ar: Arithmetic = EXACT
) -> list[np.ndarray]:
    """Each rank's rows, normed: a norm sees one row at a time, so ranks need nothing of each other.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
    """
    return [rms_norm(x, weight, eps, ar=ar) for x in x_P]


def sequence_parallel_rms_norm_backward(
    dy_P: Parts, x_P: Parts, weight: np.ndarray, eps: float, *, reduce: Reduce = SUM, ar: Arithmetic = EXACT
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each rank's dx_p, and dw: the sum, and not the mean, over the ranks, since all rows share the weight."""
    found = [rms_norm_backward(dy, x, weight, eps, ar=ar) for dy, x in zip(dy_P, x_P, strict=True)]
    return [dx for dx, _ in found], reduce([dw for _, dw in found])


def sequence_parallel_layer_norm(
    x_P: Parts, weight: np.ndarray, bias: np.ndarray | None, eps: float, *, ar: Arithmetic = EXACT
) -> list[np.ndarray]:
    """Each rank's rows, normed by LayerNorm: see `sequence_parallel_rms_norm`."""
    return [layer_norm(x, weight, bias, eps, ar=ar) for x in x_P]


def sequence_parallel_layer_norm_backward(
    dy_P: Parts,
    x_P: Parts,
    weight: np.ndarray,
    bias: np.ndarray | None,
    eps: float,
    *,
    reduce: Reduce = SUM,
    ar: Arithmetic = EXACT,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Each rank's dx_p, and dw and db, summed over the ranks; db is None without bias."""
    found = [layer_norm_backward(dy, x, weight, bias, eps, ar=ar) for dy, x in zip(dy_P, x_P, strict=True)]
    dbias = None if bias is None else reduce([db for _, _, db in found if db is not None])
    return [dx for dx, _, _ in found], reduce([dw for _, dw, _ in found]), dbias


def head_parallel_norm(
    x_P: Parts, weights_P: Parts, eps: float, *, norm: str = "rms", ar: Arithmetic = EXACT
) -> list[np.ndarray]:
    """Each rank's heads [B, h_p, S, D], normed over D with its own part [h_p, D] of the weights of the heads.

    norm: "rms" or "layer" (without bias). A norm over all heads at once would need a sum over the ranks instead.
    """
    pairs = zip(x_P, weights_P, strict=True)
    if norm == "rms":
        return [rms_norm(x, weight[:, None], eps, ar=ar) for x, weight in pairs]
    return [layer_norm(x, weight[:, None], None, eps, ar=ar) for x, weight in pairs]


def head_parallel_norm_backward(
    dy_P: Parts, x_P: Parts, weights_P: Parts, eps: float, *, norm: str = "rms", ar: Arithmetic = EXACT
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each rank's dx_p and dw_p. Where the ranks share one weight [D] for all heads, its gradient is the sum of the
    rows of all dw_p."""
    found = []
    for dy, x, weight in zip(dy_P, x_P, weights_P, strict=True):
        if norm == "rms":
            dx, dw = rms_norm_backward(dy, x, weight[:, None], eps, ar=ar)
        else:
            dx, dw, _ = layer_norm_backward(dy, x, weight[:, None], None, eps, ar=ar)
        found.append((dx, dw[:, 0]))
    return [dx for dx, _ in found], [dw for _, dw in found]
