"""Operators on NumPy arrays, right and wrong, that `check-op --arrays numpy` is given."""

import numpy as np

from refllm import ops


def relu2(x: np.ndarray) -> np.ndarray:
    y = np.maximum(x.astype(np.float32), 0)
    return (y * y).astype(x.dtype)


def wrong(x: np.ndarray) -> np.ndarray:
    return relu2(x) * x.dtype.type(1.1)


def in_place(x: np.ndarray) -> np.ndarray:
    y = relu2(x)
    x[...] = 0
    return y


def raises(x: np.ndarray) -> np.ndarray:
    if x.ndim > 2 or x.shape[-1] > 3:
        raise ValueError("too wide")
    return relu2(x)


def half_written(x: np.ndarray) -> np.ndarray:
    y = np.empty(x.shape, x.dtype)
    y[..., : x.shape[-1] // 2] = relu2(x)[..., : x.shape[-1] // 2]
    return y


def reads_beside(x: np.ndarray) -> np.ndarray:
    """Right, unless there is memory between the elements, whose sum it adds a thousandth of."""
    y = relu2(x)
    if isinstance(x.base, np.ndarray) and x.base.nbytes > x.nbytes:
        whole = x
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        y = np.where((whole.view(x.dtype) == 3).any(), 2 * y, y).astype(x.dtype)
    return y


def other_dtype(x: np.ndarray) -> np.ndarray:
    return relu2(x).astype(np.float64)


def sees_masked_keys(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):  # type: ignore[no-untyped-def]
    o, lse = ops.attention(
        *(x.astype(np.float64) for x in (q, k, v)), scale=scale, causal=causal, key_mask=None, return_lse=True
    )
    return (o.astype(q.dtype), lse.astype(np.float32)) if return_lse else o.astype(q.dtype)


def reads_past_the_lengths(q, k, v, lengths, *, scale=None):  # type: ignore[no-untyped-def]
    every = np.full_like(lengths, k.shape[2])
    return ops.decode_attention(*(x.astype(np.float64) for x in (q, k, v)), every, scale=scale).astype(q.dtype)
