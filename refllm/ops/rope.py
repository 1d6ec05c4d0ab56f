"""Rotary position embedding, and the operators that fuse it with a norm. The tables are in `rope_tables.py`."""

import numpy as np

from refllm.errors import InputError
from refllm.ops.linear import linear, split_heads
from refllm.ops.norm import layer_norm, rms_norm
from refllm.precision import EXACT, Arithmetic

__all__ = ["norm_rope", "rms_norm_qkv_rope", "rope"]


def rope(
    q_BHSD: np.ndarray,
    k_BKSD: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    interleaved: bool,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate dims 0..R-1 of every head of q and k; dims R..D-1 pass through bit-equal.

    cos, sin: [S, R/2] or [B, S, R/2].

    Pair i is turned by its angle: (a, b) -> (a cos_i - b sin_i, b cos_i + a sin_i), where (a, b) are dims (2i, 2i+1) if
    interleaved, else (i, i + R/2).
    Rounding: `rope.product` for each product, `rope` for the sum.
    Source: Su et al. 2021, "RoFormer", equation 34 (interleaved); the half-split pairing is GPT-NeoX's.
    """
    cos, sin = (ar.array(t)[..., None, :, :] for t in (cos, sin))  # one table for all heads
    return rotate(ar.array(q_BHSD), cos, sin, interleaved, ar), rotate(ar.array(k_BKSD), cos, sin, interleaved, ar)


def rotate(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, ar: Arithmetic, point: str = "rope"
) -> np.ndarray:
    """The rotation of `rope`, of one array. cos, sin: tables that broadcast to its pairs. point: where the sum is
    rounded; `point.product` is where each product is."""
    product = f"{point}.product"
    half = cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b, out = x[..., first], x[..., second], np.empty(x.shape, x.dtype)
    out[..., first] = ar.round(ar.round(a * cos, product) - ar.round(b * sin, product), point)
    out[..., second] = ar.round(ar.round(b * cos, product) + ar.round(a * sin, product), point)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def norm_rope(
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
) -> tuple[np.ndarray, np.ndarray]:
    """Norm over the D dims of each head with that head's own weight (q_weight [H, D], k_weight [K, D]), then `rope`.

    norm: "rms" or "layer" (without bias); anything else raises InputError. Rounding: as the norm, then as `rope`.
    Source: the per-head norms of StableLM-2-12B (Transformers, StableLmLayerNormPerHead).
    """
    if norm not in ("rms", "layer"):
        raise InputError(f'norm_rope: norm={norm!r} is not known; use "rms" or "layer"')

    def per_head(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        weight = np.asarray(weight)[:, None, :]  # [heads, 1, D]
        return rms_norm(x, weight, eps, ar=ar) if norm == "rms" else layer_norm(x, weight, None, eps, ar=ar)

    return rope(per_head(q_BHSD, q_weight), per_head(k_BKSD, k_weight), cos, sin, interleaved=interleaved, ar=ar)


def rms_norm_qkv_rope(
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q_BHSD, k_BKSD, v_BKSD = the rotated heads of rms_norm(x) W^T + b; w_qkv [(H + 2K) D, E], rows q, then k, then v.

    Rounding: as `rms_norm`, `linear` and `rope`, one after the other.
    """
    qkv = linear(rms_norm(x_BSE, norm_weight, eps, ar=ar), w_qkv, b_qkv, ar=ar)
    heads = split_heads(qkv, num_heads + 2 * num_kv_heads)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    q, k = rope(q, k, cos, sin, interleaved=interleaved, ar=ar)
    return q, k, v
