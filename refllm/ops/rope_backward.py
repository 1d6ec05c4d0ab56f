"""The gradients of the rotary embedding, and of the operators that fuse it with a norm."""

import numpy as np

from refllm.ops.linear_backward import linear_backward, split_heads_backward
from refllm.ops.norm import rms_norm
from refllm.ops.norm_backward import layer_norm_backward, rms_norm_backward
from refllm.ops.rope import rotate
from refllm.precision import EXACT, Arithmetic

__all__ = ["norm_rope_backward", "rms_norm_qkv_rope_backward", "rope_backward"]


def rope_backward(
    dq_BHSD: np.ndarray,
    dk_BKSD: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    interleaved: bool,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """dq and dk turned back: pair i of dims by the angle -a_i; dims R..D-1 pass through bit-equal.

    A rotation's transpose is the rotation back: (da, db) -> (da cos + db sin, db cos - da sin). So |dq| is that of the
    incoming gradient.
    Rounding: `rope.grad.product` for each product, `rope.grad` for the sum.
    """
    cos, sin = (ar.array(t)[..., None, :, :] for t in (cos, sin))
    dq, dk = (rotate(ar.array(d), cos, -sin, interleaved, ar, "rope.grad") for d in (dq_BHSD, dk_BKSD))
    return dq, dk


def norm_rope_backward(
    dq_BHSD: np.ndarray,
    dk_BKSD: np.ndarray,
    q_BHSD: np.ndarray,
    k_BKSD: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float,
    *,
    norm: str,
    interleaved: bool,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk, dq_weight [H, D], dk_weight [K, D]: `rope_backward`, then the norm's backward pass head by head.

    norm: "rms" or "layer" (without bias). Rounding: as those, one after the other.
    """
    turned = rope_backward(dq_BHSD, dk_BKSD, cos, sin, interleaved=interleaved, ar=ar)
    found = []
    for d, x, weight in zip(turned, (q_BHSD, k_BKSD), (q_weight, k_weight), strict=True):
        per_head = np.asarray(weight)[:, None, :]
        back = rms_norm_backward(d, x, per_head, eps, ar=ar) if norm == "rms" else (
            layer_norm_backward(d, x, per_head, None, eps, ar=ar)[:2]
        )  # fmt: skip
        found.append((back[0], back[1][:, 0]))
    (dq, dq_weight), (dk, dk_weight) = found
    return dq, dk, dq_weight, dk_weight


def rms_norm_qkv_rope_backward(
    dq_BHSD: np.ndarray,
    dk_BKSD: np.ndarray,
    dv_BKSD: np.ndarray,
    x_BSE: np.ndarray,
    norm_weight: np.ndarray,
    w_qkv: np.ndarray,
    b_qkv: np.ndarray | None,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """dx, dnorm_weight, dw_qkv, db_qkv: the backward passes of rope, the projection and the norm, in this order.

    Rounding: as `rope_backward`, `linear_backward` and `rms_norm_backward`.
    """
    turned = rope_backward(dq_BHSD, dk_BKSD, cos, sin, interleaved=interleaved, ar=ar)
    dqkv = split_heads_backward(np.concatenate([*turned, ar.array(dv_BKSD)], axis=1))
    normed = rms_norm(x_BSE, norm_weight, eps, ar=ar)
    dnormed, dw_qkv, db_qkv = linear_backward(dqkv, normed, w_qkv, b_qkv, ar=ar)
    dx, dnorm_weight = rms_norm_backward(dnormed, x_BSE, norm_weight, eps, ar=ar)
    return dx, dnorm_weight, dw_qkv, db_qkv
