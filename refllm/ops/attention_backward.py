"""The gradients of softmax and of attention with grouped key/value heads."""

from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.ops.attention import attention, silenced_product, visible_keys
from refllm.precision import EXACT, Arithmetic

__all__ = ["attention_backward", "decode_attention_backward", "softmax_backward"]


def softmax_backward(dp: np.ndarray, p: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """ds = p (dp - sum(p dp)) over the last axis: [..., T]; p is the softmax, of rows of -inf all 0.

    dp_i/ds_j = p_i (delta_ij - p_j). A common shift of the scores changes nothing, so sum ds = 0.
    Rounding: `attention.grad.scores`.
    """
    dp, p = ar.array(dp), ar.array(p)
    return ar.round(p * (dp - np.sum(p * dp, axis=-1, keepdims=True)), "attention.grad.scores")


def attention_backward(
    do_BHSD: np.ndarray,
    q_BHSD: np.ndarray,
    k_BKTD: np.ndarray,
    v_BKTD: np.ndarray,
    o_BHSD: np.ndarray | None = None,
    lse_BHS: np.ndarray | None = None,
    *,
    dlse_BHS: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    window: int | None = None,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq_BHSD, dk_BKTD, dv_BKTD of o = p v with p = softmax(scale q k^T + mask):

        dv = p^T do,   dp = do v^T,   ds = p (dp - delta + dlse),   dq = scale ds k,   dk = scale ds^T q

    with delta = sum(p dp) over the keys, which is sum(do o) over the dims. A key/value head that several query heads
    read has the sum of their gradients.
    o_BHSD, lse_BHS: of the forward pass; None: computed again. dlse_BHS: of the logarithm of the softmax's denominator,
    where that was returned (dlse/ds = p). scale, causal, key_mask, mask, window: as `refllm.ops.attention`. What no
    query sees has the gradient 0, and what it holds, NaN included, reaches nothing. Under a policy that pushes masked
    scores down a row without a key is the mean of all values, and the gradient goes through it: adding a constant to
    the scores, however large, has the slope 1.
    Rounding: `attention.grad.weights` for dp, `attention.grad.scores` for ds, `attention.grad.scaled` for scale ds,
    `attention.grad.heads` for each query head's part of dk and dv, or `attention.grad.blocks` for their sum after every
    block of queries, `attention.grad` for dq, dk, dv. Code that divides
    the weights first (`Policy.normalize_first`) takes delta from them, and not from o.
    Source: Dao et al. 2022, "FlashAttention", algorithm 4.
    """
    do_BHSD, q_BHSD, k_BKTD, v_BKTD = (ar.array(x) for x in (do_BHSD, q_BHSD, k_BKTD, v_BKTD))
    (B, H, S, D), (K, T) = q_BHSD.shape, k_BKTD.shape[1:3]
    if H % K:
        raise InputError(f"attention: {H} query heads are not a multiple of {K} key/value heads")
    factor, g = D**-0.5 if scale is None else scale, H // K
    visible = visible_keys(causal, key_mask, mask, window, (B, H, S, T))
    if lse_BHS is None:
        how: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "mask": mask, "window": window}
        again = attention(q_BHSD, k_BKTD, v_BKTD, scale=factor, **how, return_lse=True, ar=ar)
        o_BHSD, lse_BHS = again[0] if o_BHSD is None else o_BHSD, again[1]
    dq_BHSD, dk_BKTD, dv_BKTD = np.zeros_like(q_BHSD), np.zeros_like(k_BKTD), np.zeros_like(v_BKTD)
    for b in range(B):
        for kv in range(K):
            heads = slice(kv * g, (kv + 1) * g)
            q_GSD, do_GSD, k_TD, v_TD = q_BHSD[b, heads], do_BHSD[b, heads], k_BKTD[b, kv], v_BKTD[b, kv]
            allowed = visible(b, heads, slice(0, S), T)
            p_GST, _ = weights_of_head(q_GSD, k_TD, factor, allowed, lse_BHS[b, heads], ar)
            dp_GST = _seen(ar.round(do_GSD @ v_TD.T, "attention.grad.weights"), p_GST)
            if o_BHSD is None or ar.policy.normalize_first:  # eager code has the weights themselves
                delta_GS1 = np.sum(p_GST * dp_GST, axis=-1, keepdims=True)
            else:
                delta_GS1 = np.sum(do_GSD * ar.array(o_BHSD[b, heads]), axis=-1, keepdims=True)
            extra = 0 if dlse_BHS is None else ar.array(dlse_BHS[b, heads])[..., None]
            ds_GST = ar.round(_seen(p_GST * (dp_GST - delta_GS1 + extra), p_GST), "attention.grad.scores")
            ds_GST = ar.round(ds_GST * ar.work(factor), "attention.grad.scaled")
            dq_BHSD[b, heads] = silenced_product(ds_GST, np.broadcast_to(k_TD, (g, T, D)), 1, ar)
            weights_GST = ar.round(p_GST, "attention.weights")
            dk_BKTD[b, kv] = _over_queries(ds_GST, q_GSD, ar)
            dv_BKTD[b, kv] = _over_queries(weights_GST, do_GSD, ar)
    dq, dk, dv = (ar.round(x, "attention.grad") for x in (dq_BHSD, dk_BKTD, dv_BKTD))
    return dq, dk, dv


def weights_of_head(
    q_GSD: np.ndarray,
    k_TD: np.ndarray,
    scale: float,
    allowed: np.ndarray | None,
    lse_GS: np.ndarray,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """p = e^(s - lse) and the scaled scores s, [G, S, T]: exactly 0 where a key is not seen, and in rows that see none.

    Where the policy pushes masked scores down by the largest number (`Policy.masked_rows_are_zero` is False), a row
    that sees no key has equal weights for all, as in the forward pass.
    """
    with np.errstate(invalid="ignore"):
        s_GST = ar.round(ar.round(q_GSD @ k_TD.T, "attention.scores") * ar.work(scale), "attention.scaled")
    masked_GST = s_GST
    if allowed is not None and allowed.dtype == bool:
        masked_GST = np.where(allowed, s_GST, -np.inf)
    elif allowed is not None:
        masked_GST = np.where(np.isneginf(allowed), -np.inf, s_GST + allowed)
    none = np.isneginf(lse_GS)[..., None]
    p_GST = np.where(none, 0, np.exp(masked_GST - np.where(none, 0, lse_GS[..., None])))
    if allowed is not None and allowed.dtype == bool and not ar.policy.masked_rows_are_zero:
        p_GST = np.where(allowed.any(axis=-1, keepdims=True), p_GST, 1 / max(1, len(k_TD)))
    return np.asarray(p_GST, q_GSD.dtype), s_GST


def queries_per_block(queries: int) -> int:
    """How many queries torch's CPU kernel takes at a time, out of so many."""
    return 256 if queries >= 768 else 64 if queries >= 192 else 32


def _over_queries(w_GST: np.ndarray, x_GSD: np.ndarray, ar: Arithmetic) -> np.ndarray:
    """The sum of w^T x over the heads of a group, [T, D]. Each head's part is rounded at `attention.grad.heads`; or the
    sum itself at `attention.grad.blocks`, after every block of queries of every head."""
    if ar.exact or "attention.grad.blocks" not in ar.policy.points:
        parts = ar.round(w_GST.transpose(0, 2, 1) @ x_GSD, "attention.grad.heads")
        return np.asarray(parts.sum(axis=0))
    total, step = np.zeros((w_GST.shape[2], x_GSD.shape[2]), ar.work), queries_per_block(w_GST.shape[1])
    for w_ST, x_SD in zip(w_GST, x_GSD, strict=True):
        for start in range(0, len(w_ST), step):
            block = slice(start, start + step)
            total = ar.round(total + w_ST[block].T @ x_SD[block], "attention.grad.blocks")
    return total


def _seen(x_GST: np.ndarray, p_GST: np.ndarray) -> np.ndarray:
    """x where a weight is not 0: what stands behind a weight of 0 may be NaN."""
    return np.where(p_GST == 0, 0, x_GST)


def decode_attention_backward(
    do_BHSD: np.ndarray,
    q_BHSD: np.ndarray,
    k_cache_BKND: np.ndarray,
    v_cache_BKND: np.ndarray,
    lengths_B: np.ndarray,
    o_BHSD: np.ndarray | None = None,
    lse_BHS: np.ndarray | None = None,
    *,
    scale: float | None = None,
    ar: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk_cache, dv_cache of `refllm.ops.decode_attention`: 0 in the slots from lengths_B[b] on.

    Lengths outside 0..N raise InputError. Rounding: as `attention_backward`.
    """
    N = k_cache_BKND.shape[2]
    found = [np.zeros(x.shape, ar.work) for x in (q_BHSD, k_cache_BKND, v_cache_BKND)]
    for b, length in enumerate(np.asarray(lengths_B).tolist()):
        if not 0 <= length <= N:
            raise InputError(f"decode_attention: lengths_B[{b}]={length} is outside 0..{N}, the slots of the cache")
        row, used = slice(b, b + 1), slice(0, length)
        kept = [None if x is None else x[row] for x in (o_BHSD, lse_BHS)]
        parts = attention_backward(
            do_BHSD[row], q_BHSD[row], k_cache_BKND[row, :, used], v_cache_BKND[row, :, used], *kept, scale=scale, ar=ar
        )
        found[0][row], found[1][row, :, used], found[2][row, :, used] = parts
    return found[0], found[1], found[2]
