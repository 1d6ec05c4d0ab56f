"""Which part of a tensor each rank holds."""

from collections.abc import Sequence

import numpy as np

from refllm.errors import InputError

__all__ = ["contiguous", "cut", "cut_gate_up", "cut_heads", "cut_qkv", "cut_qkv_backward", "heads_of_rank", "zigzag"]


def cut(x: np.ndarray, ranks: int, axis: int = 0) -> list[np.ndarray]:
    """The parts of x along an axis, in the order of the ranks; where the axis does not divide, the first are longer by
    one, and where it is shorter than there are ranks, the last are empty."""
    return np.array_split(np.asarray(x), ranks, axis)


def contiguous(length: int, ranks: int) -> list[np.ndarray]:
    """The positions that each rank holds if a sequence is cut into as many runs as there are ranks."""
    return np.array_split(np.arange(length), ranks)


def zigzag(length: int, ranks: int) -> list[np.ndarray]:
    """The positions that each rank holds if a sequence is cut into 2 P chunks: rank r takes chunks r and
    2 P - 1 - r.

    Under a causal mask early positions have few keys and late ones many, so each rank has the same work.
    """
    chunks = np.array_split(np.arange(length), 2 * ranks)
    return [np.concatenate([chunks[rank], chunks[2 * ranks - 1 - rank]]) for rank in range(ranks)]


def heads_of_rank(rank: int, ranks: int, num_heads: int, num_kv_heads: int) -> tuple[slice, slice]:
    """The query heads and the key/value heads of a rank: whole groups, or, where ranks are more than key/value heads,
    a part of the queries of one group with its key/value head, which the ranks of the group each hold.

    Raises InputError where heads and ranks do not divide so.
    """
    if num_heads % num_kv_heads or num_heads % ranks or max(ranks, num_kv_heads) % min(ranks, num_kv_heads):
        raise InputError(
            f"{num_heads} query heads over {num_kv_heads} key/value heads cannot be split over {ranks} ranks: each rank"
            " needs the same number of query heads, and the same number of whole key/value heads or one of them"
        )
    queries, keys = num_heads // ranks, max(1, num_kv_heads // ranks)
    first = rank * num_kv_heads // ranks
    return slice(rank * queries, (rank + 1) * queries), slice(first, first + keys)


def cut_heads(x_BHSD: np.ndarray, ranks: int, num_heads: int, num_kv_heads: int, *, keys: bool) -> list[np.ndarray]:
    """The heads of each rank, from all query heads or, with keys, from all key/value heads, [B, heads, S, D]."""
    taken = [heads_of_rank(rank, ranks, num_heads, num_kv_heads)[keys] for rank in range(ranks)]
    return [x_BHSD[:, heads] for heads in taken]


def cut_qkv(weight: np.ndarray, ranks: int, num_heads: int, num_kv_heads: int) -> list[np.ndarray]:
    """The rows of a fused projection [q | k | v] that each rank holds, as its own [q | k | v]; a bias is cut alike.

    weight: [(H + 2 K) D, ...]. Cut in the middle instead, the first ranks would hold queries alone and the last values.
    """
    rows = [_qkv_rows(len(weight), rank, ranks, num_heads, num_kv_heads) for rank in range(ranks)]
    return [weight[own] for own in rows]


def cut_qkv_backward(dweights_P: Sequence[np.ndarray], num_heads: int, num_kv_heads: int) -> np.ndarray:
    """The gradient of the whole weight: a key/value head that several ranks hold has the sum of their gradients."""
    ranks, head = len(dweights_P), len(dweights_P[0]) // _local_heads(len(dweights_P), num_heads, num_kv_heads)
    whole = np.zeros(((num_heads + 2 * num_kv_heads) * head, *dweights_P[0].shape[1:]), dweights_P[0].dtype)
    for rank, dweight in enumerate(dweights_P):
        whole[_qkv_rows(len(whole), rank, ranks, num_heads, num_kv_heads)] += dweight
    return whole


def cut_gate_up(weight: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The rows of a fused [gate | up] that each rank holds, as its own [gate | up]: pairs of the same channels."""
    gate, up = np.split(weight, 2)
    return [np.concatenate(pair) for pair in zip(cut(gate, ranks), cut(up, ranks), strict=True)]


def _local_heads(ranks: int, num_heads: int, num_kv_heads: int) -> int:
    queries, keys = heads_of_rank(0, ranks, num_heads, num_kv_heads)
    return queries.stop - queries.start + 2 * (keys.stop - keys.start)


def _qkv_rows(rows: int, rank: int, ranks: int, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """The places, in a fused projection of so many rows, of what a rank holds of it."""
    queries, keys = heads_of_rank(rank, ranks, num_heads, num_kv_heads)
    q, k, v = np.split(np.arange(num_heads + 2 * num_kv_heads), [num_heads, num_heads + num_kv_heads])
    heads = np.concatenate([q[queries], k[keys], v[keys]])
    return np.arange(rows).reshape(num_heads + 2 * num_kv_heads, -1)[heads].ravel()
