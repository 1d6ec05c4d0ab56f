"""Attention whose heads, or whose positions, lie on different ranks."""

from typing import Any

import numpy as np

from refllm.ops.attention import attention
from refllm.ops.attention_backward import attention_backward
from refllm.precision import EXACT, Arithmetic
from refllm.split.cuts import heads_of_rank
from refllm.split.reduction import Parts

__all__ = [
    "all_gather_attention",
    "head_parallel_attention",
    "head_parallel_attention_backward",
    "merged",
    "ring_attention",
    "ring_attention_backward",
]


def head_parallel_attention(q_P: Parts, k_P: Parts, v_P: Parts, **options: Any) -> list[np.ndarray]:
    """Each rank's heads, [B, h_p, S, D]: attention of one head knows nothing of the others.

    q_P, k_P, v_P: as `refllm.split.cut_heads` gives them; a rank counts its own heads, and not those of the model.
    options: of `refllm.ops.attention`.
    """
    return [np.asarray(attention(q, k, v, **options)) for q, k, v in zip(q_P, k_P, v_P, strict=True)]


def head_parallel_attention_backward(
    do_P: Parts, q_P: Parts, k_P: Parts, v_P: Parts, num_kv_heads: int, **options: Any
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Each rank's dq_p, and dk and dv of all key/value heads, [B, K, T, D].

    A key/value head that several ranks hold, because there are fewer of them than ranks, has the sum over these ranks.
    """
    ranks, heads = len(q_P), sum(q.shape[1] for q in q_P)
    found = [attention_backward(do, q, k, v, **options) for do, q, k, v in zip(do_P, q_P, k_P, v_P, strict=True)]
    B, _, T, _ = k_P[0].shape
    dk, dv = (np.zeros((B, num_kv_heads, T, x[0].shape[-1]), found[0][0].dtype) for x in (k_P, v_P))
    for rank, (_, dk_part, dv_part) in enumerate(found):
        own = heads_of_rank(rank, ranks, heads, num_kv_heads)[1]
        dk[:, own] += dk_part
        dv[:, own] += dv_part
    return [dq for dq, _, _ in found], dk, dv


def ring_attention(
    q_P: Parts,
    k_P: Parts,
    v_P: Parts,
    positions_P: Parts,
    *,
    documents: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
    ar: Arithmetic = EXACT,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each rank's rows o_p [B, H, S_p, D] and lse_p [B, H, S_p]: keys and values are handed on around a ring, and what
    a rank finds for each of them is merged by `merged`.

    positions_P: which positions of the whole each rank holds (`refllm.split.contiguous` or `zigzag`): masks are
    those of the whole, so a query sees the keys whose position is not after its own.
    documents: [B, T], the number of each position's document: a query sees keys of its own document alone.
    Source: Liu, Zaharia and Abbeel 2023, "Ring Attention with Blockwise Transformers".
    """
    out, lses = [], []
    for rank, q in enumerate(q_P):
        o, lse = np.zeros((*q.shape[:3], v_P[rank].shape[-1]), ar.work), np.full(q.shape[:3], -np.inf, ar.work)
        for turn in range(len(q_P)):
            owner = (rank - turn) % len(q_P)
            mask = _seen(positions_P[rank], positions_P[owner], documents, causal)
            part = attention(q, k_P[owner], v_P[owner], scale=scale, causal=False, mask=mask, return_lse=True, ar=ar)
            o, lse = merged(o, lse, *part)
        out.append(o)
        lses.append(lse)
    return out, lses


def merged(o: np.ndarray, lse: np.ndarray, other: np.ndarray, other_lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """o and lse (natural logarithm) over the keys of both: each o weighs as much as its part of the denominator.

    e^lse is the sum of e^score over a part's keys, so the merged row is (e^lse o + e^lse' o') / (e^lse + e^lse'),
    shifted by the larger lse so that nothing overflows. A part without a key (lse = -inf, o = 0) changes nothing.
    """
    top = np.maximum(lse, other_lse)
    top = np.where(np.isneginf(top), 0, top)
    weight, other_weight = np.exp(lse - top), np.exp(other_lse - top)
    total = weight + other_weight
    with np.errstate(divide="ignore"):
        whole = np.log(total) + top
    share = np.where(total == 0, 1, total)
    return (o * weight[..., None] + other * other_weight[..., None]) / share[..., None], whole


def all_gather_attention(
    q_P: Parts,
    k_P: Parts,
    v_P: Parts,
    positions_P: Parts,
    *,
    documents: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
    ar: Arithmetic = EXACT,
) -> list[np.ndarray]:
    """Each rank's rows o_p, where every rank gathers all keys and values first, in the order of the ranks.

    That order is not the order of the positions if these are cut in zigzag, so masks go by `positions_P` here as well.
    Arguments: as `ring_attention`.
    """
    k, v, keys = np.concatenate(k_P, axis=2), np.concatenate(v_P, axis=2), np.concatenate(positions_P)
    masks = [_seen(own, keys, documents, causal) for own in positions_P]
    options: dict[str, Any] = {"scale": scale, "causal": False, "ar": ar}
    return [np.asarray(attention(q, k, v, mask=mask, **options)) for q, mask in zip(q_P, masks, strict=True)]


def ring_attention_backward(
    do_P: Parts,
    q_P: Parts,
    k_P: Parts,
    v_P: Parts,
    o_P: Parts,
    lse_P: Parts,
    positions_P: Parts,
    *,
    documents: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
    ar: Arithmetic = EXACT,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Each rank's dq_p, dk_p and dv_p: a second way around the ring, on which each key/value part collects a sum.

    o_P and lse_P are those of all keys: e^(score - lse) is then the weight in the whole softmax, and sum(do o) the term
    that the whole row shares. Arguments else: as `ring_attention`.
    """
    dq_P, dk_P, dv_P = ([np.zeros(x.shape, ar.work) for x in parts] for parts in (q_P, k_P, v_P))
    for rank, q in enumerate(q_P):
        for owner, (k, v) in enumerate(zip(k_P, v_P, strict=True)):
            mask = _seen(positions_P[rank], positions_P[owner], documents, causal)
            options: dict[str, Any] = {"scale": scale, "causal": False, "mask": mask, "ar": ar}
            dq, dk, dv = attention_backward(do_P[rank], q, k, v, o_P[rank], lse_P[rank], **options)
            dq_P[rank] += dq
            dk_P[owner] += dk
            dv_P[owner] += dv
    return dq_P, dk_P, dv_P


def _seen(queries_S: np.ndarray, keys_T: np.ndarray, documents: np.ndarray | None, causal: bool) -> np.ndarray:
    """[B or 1, 1, S, T] bool: which keys each query sees, by their positions in the whole."""
    seen = np.ones((1, 1, len(queries_S), len(keys_T)), bool)
    if causal:
        seen = seen & (keys_T <= queries_S[:, None])
    if documents is not None:
        documents = np.asarray(documents)
        seen = seen & (documents[:, None, queries_S, None] == documents[:, None, None, keys_T])
    return seen
