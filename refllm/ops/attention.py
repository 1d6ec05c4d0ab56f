"""Scaled dot-product attention with grouped key/value heads, in blocks of queries so that scores stay small."""

from collections.abc import Callable, Iterator

import numpy as np

from refllm.errors import InputError
from refllm.parallel import for_each, threads
from refllm.precision import EXACT, Arithmetic, largest

__all__ = ["attention", "decode_attention", "softmax"]

_SCORES_PER_BLOCK = 1 << 18
"""Scores held at once, 1 MiB of float32: what a core's L2 cache keeps between the passes of a softmax."""
_QUERIES_PER_BLOCK = 128
_NUMBERS_WORTH_A_THREAD = 1 << 22
"""Numbers in the keys, 16 MiB of float32, from which reading them on several threads pays for starting those."""

Tap = Callable[[str, np.ndarray], np.ndarray]


def attention(
    q_BHSD: np.ndarray,
    k_BKTD: np.ndarray,
    v_BKTD: np.ndarray,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    window: int | None = None,
    return_lse: bool = False,
    tap: Tap | None = None,
    ar: Arithmetic = EXACT,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """o_BHSD = softmax(scale q k^T + mask) v; query head h reads key/value head h // (H / K). With return_lse also
    lse_BHS, the logarithm of the softmax's denominator.

    scale: D^-1/2 if None. causal: query s sees keys 0 .. T-S+s (aligned at the end, so that cached keys come first).
    window: of the keys that causal lets it see, only the last so many: query s sees keys T-S+s-window+1 .. T-S+s.
    key_mask: [B, T], nonzero = attend. mask: broadcastable to [B, H, S, T]; bool (True = attend) or float (added).
    A query with no key to attend to yields 0 and lse = -inf. What a masked key or value holds, NaN included, never
    reaches a valid row.
    tap: called with ("scores", scaled and not yet masked) and ("probs", normalised), each [B, H, S, T].
    Rounding: `attention.scores`, `.scaled`, `.masked`, `.weights`, `attention`; `refllm.precision.Policy` says what a
    policy changes.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1; grouped heads: Ainslie et al. 2023, "GQA".
    """
    q_BHSD, k_BKTD, v_BKTD = ar.array(q_BHSD), ar.array(k_BKTD), ar.array(v_BKTD)
    (B, H, S, D), (K, T) = q_BHSD.shape, k_BKTD.shape[1:3]
    if H % K:
        raise InputError(f"attention: {H} query heads are not a multiple of {K} key/value heads")
    scale = D**-0.5 if scale is None else scale
    g = H // K
    visible = visible_keys(causal, key_mask, mask, window, (B, H, S, T))
    # [B, S, H, D] in memory, so that merging the heads afterwards moves nothing
    o_BHSD = np.zeros((B, S, H, v_BKTD.shape[-1]), ar.work).transpose(0, 2, 1, 3)
    lse_BHS = np.full((B, H, S), -np.inf, ar.work)
    scores_BHST, probs_BHST = (np.zeros((B, H, S, T), ar.work) if tap else None for _ in range(2))

    def attend(block: tuple[int, slice, slice]) -> None:
        b, groups, rows = block
        heads = slice(groups.start * g, groups.stop * g)
        # Keys after the last visible one contribute nothing; torch's eager code computes them all the same, and their
        # zeros take part in its order of additions.
        stop = max(0, min(T, T - S + rows.stop)) if causal and not (ar.emulates_torch or tap) else T
        if not stop:
            return  # no keys: the result is 0 and -inf, as it stands
        k_KTD, v_KTD = k_BKTD[b, groups, :stop], v_BKTD[b, groups, :stop]
        # The g query heads of a group read the same keys: as rows of one matrix they share one product.
        k_heads, queries = len(k_KTD), rows.stop - rows.start
        q_KND = q_BHSD[b, heads, rows].reshape(k_heads, g * queries, D)
        s_HST = _scores(q_KND, k_KTD, scale, g, ar).reshape(k_heads * g, queries, stop)
        if scores_BHST is not None:
            scores_BHST[b, heads, rows] = s_HST
        s_HST = _masked(s_HST, visible(b, heads, rows, stop), ar)
        p_HST, total_HS1, lse_BHS[b, heads, rows] = _softmax(s_HST, ar)
        o_KND = silenced_product(p_HST.reshape(k_heads, g * queries, stop), v_KTD, g, ar)
        o_HSD = o_KND.reshape(k_heads * g, queries, o_KND.shape[-1])
        o_BHSD[b, heads, rows] = ar.round(o_HSD if total_HS1 is None else o_HSD * total_HS1, "attention")
        if probs_BHST is not None:
            probs_BHST[b, heads, rows] = p_HST if total_HS1 is None else p_HST * total_HS1

    for_each(attend, _blocks(B, K, S, g, T, D))
    if scores_BHST is not None and probs_BHST is not None and tap is not None:
        tap("scores", scores_BHST)
        tap("probs", probs_BHST)
    return (o_BHSD, lse_BHS) if return_lse else o_BHSD


def decode_attention(
    q_BHSD: np.ndarray,
    k_cache_BKND: np.ndarray,
    v_cache_BKND: np.ndarray,
    lengths_B: np.ndarray,
    *,
    scale: float | None = None,
    ar: Arithmetic = EXACT,
) -> np.ndarray:
    """o_BHSD: causal `attention` of the last S = 1..8 tokens over the first lengths_B[b] slots of a cache of N slots.

    Slots from lengths_B[b] on are never read; a length of 0 yields 0. Lengths outside 0..N raise InputError.
    """
    N = k_cache_BKND.shape[2]
    out = np.zeros((*q_BHSD.shape[:3], v_cache_BKND.shape[-1]), ar.work)
    for b, length in enumerate(np.asarray(lengths_B).tolist()):
        if not 0 <= length <= N:
            raise InputError(f"decode_attention: lengths_B[{b}]={length} is outside 0..{N}, the slots of the cache")
        row = slice(b, b + 1)
        out[row] = attention(
            q_BHSD[row], k_cache_BKND[row, :, :length], v_cache_BKND[row, :, :length], scale=scale, ar=ar
        )
    return out


def softmax(x: np.ndarray, *, ar: Arithmetic = EXACT) -> np.ndarray:
    """e^x / sum e^x over the last axis, shifted by the maximum. Rounding: `attention.weights`."""
    e, _ = _exponentials(np.array(x, ar.work), ar)
    return ar.round(e * (1 / ar.softmax_sum(e)), "attention.weights")


def causal_keys(positions_N: np.ndarray, keys: int, window: int | None) -> np.ndarray:
    """[N, T] bool: which of so many keys T the queries at these positions among them see. window: as `attention`."""
    last_N1, keys_T = positions_N[:, None], np.arange(keys)
    seen = keys_T <= last_N1
    return seen if window is None else seen & (keys_T > last_N1 - window)


def _blocks(B: int, K: int, S: int, g: int, T: int, D: int) -> Iterator[tuple[int, slice, slice]]:
    """(batch row, key/value heads, queries): few enough scores each to stay in cache, one per thread at least if the
    keys are many."""
    queries = max(1, min(_QUERIES_PER_BLOCK, S, _SCORES_PER_BLOCK // max(1, g * T)))
    groups = max(1, _SCORES_PER_BLOCK // max(1, g * T * queries))
    if B * K * T * D >= _NUMBERS_WORTH_A_THREAD:
        groups = min(groups, -(-B * K // threads()))
    for b in range(B):
        for group in range(0, K, groups):
            for start in range(0, S, queries):
                yield b, slice(group, min(group + groups, K)), slice(start, min(start + queries, S))


def visible_keys(
    causal: bool,
    key_mask: np.ndarray | None,
    mask: np.ndarray | None,
    window: int | None,
    shape: tuple[int, int, int, int],
) -> Callable[[int, slice, slice, int], np.ndarray | None]:
    """A function (b, heads, rows, stop) -> what to apply to that block:
    bool or float broadcastable to [H, S, T], or None."""
    _, _, S, T = shape
    mask_BHST = None if mask is None else np.broadcast_to(mask, shape)
    keys_BT = None if key_mask is None else np.asarray(key_mask) != 0
    window = T if window is None else window

    def visible(b: int, heads: slice, rows: slice, stop: int) -> np.ndarray | None:
        allowed = None
        if causal and (T - S + rows.start < stop - 1 or T - S + rows.stop > window):
            allowed = causal_keys(np.arange(rows.start, rows.stop) + (T - S), stop, window)
        if keys_BT is not None:
            row = keys_BT[b, :stop]
            allowed = row[None] if allowed is None else allowed & row
        if mask_BHST is None:
            return allowed
        block = mask_BHST[b, heads, rows, :stop]
        if allowed is None:
            return block
        return block & allowed if block.dtype == bool else np.where(allowed, block, -np.inf)

    return visible


def _scores(q_KND: np.ndarray, k_KTD: np.ndarray, scale: float, g: int, ar: Arithmetic) -> np.ndarray:
    if not ar.policy.points:  # nothing is rounded between the product and the scale: scale the smaller factor
        return ar.matmul_t(q_KND * ar.work(scale), k_KTD)
    s_KNT = ar.round(ar.matmul_t(q_KND, k_KTD, heads=g), "attention.scores")
    return ar.round(s_KNT * ar.work(scale), "attention.scaled")


def _masked(s: np.ndarray, allowed: np.ndarray | None, ar: Arithmetic) -> np.ndarray:
    """Scores [H, S, T] with the mask applied, in place where nothing is rounded."""
    if allowed is None:
        return s
    if allowed.dtype != bool:  # additive; -inf excludes a key whatever its score, NaN included
        biased = ar.round(s + ar.round(ar.array(allowed), "attention.masked"), "attention.masked")
        return np.where(np.isneginf(allowed), -np.inf, biased).astype(ar.work)
    if ar.policy.masked_rows_are_zero:
        np.copyto(s, -np.inf, where=~allowed)
        return s
    with np.errstate(over="ignore"):
        return np.where(allowed, s, ar.round(s - ar.work(largest(ar.dtype)), "attention.masked"))


def _exponentials(s: np.ndarray, ar: Arithmetic) -> tuple[np.ndarray, np.ndarray]:
    """e^(s - max) and max over the last axis (kept), where a row without a finite score gives zeros. Overwrites s."""
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    return ar.softmax_exp(np.subtract(s, np.where(np.isneginf(top), 0, top), out=s)), top


def _softmax(s_HST: np.ndarray, ar: Arithmetic) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Masked scores -> weights p_HST, what their product with v has yet to be multiplied with, and lse_HS."""
    e_HST, top_HS1 = _exponentials(s_HST, ar)
    total_HS1 = ar.softmax_sum(e_HST)
    with np.errstate(divide="ignore"):
        lse_HS = (np.log(total_HS1) + top_HS1)[..., 0]
    inverse_HS1 = 1 / np.where(total_HS1 == 0, 1, total_HS1)
    if ar.policy.normalize_first:
        return ar.round(e_HST * inverse_HS1, "attention.weights"), None, lse_HS
    return ar.round(e_HST, "attention.weights"), inverse_HS1, lse_HS


def silenced_product(p_KNT: np.ndarray, v_KTD: np.ndarray, g: int, ar: Arithmetic) -> np.ndarray:
    """p v where a weight of exactly 0 silences whatever v holds: 0 * NaN counts as 0."""
    with np.errstate(invalid="ignore"):
        out = ar.matmul(p_KNT, v_KTD, heads=g)
        if np.isfinite(out).all():
            return out
        finite_KT = np.isfinite(v_KTD).all(axis=-1)
        out = ar.matmul(p_KNT, np.where(finite_KT[..., None], v_KTD, 0), heads=g)
        for group, t in zip(*np.nonzero(~finite_KT), strict=True):
            weight_N1 = p_KNT[group, :, t, None]
            out[group] += np.where(weight_N1 == 0, 0, weight_N1 * v_KTD[group, t])
    return out
