"""Attention as beginners write it."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from beginners import beginner

INF = float("inf")


def softmax(s, axis=-1):
    top = s.max(axis=axis, keepdims=True, initial=-1e30)
    e = np.exp(s - top)
    return e / np.maximum(e.sum(axis=axis, keepdims=True), 1e-30)


def log_sum_exp(s):
    top = s.max(-1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return (np.log(np.exp(s - safe[..., None]).sum(-1)) + safe).astype(s.dtype)


def visible(S, T, causal, key_mask, offset=0):
    seen = np.ones((1, 1, S, T), bool)
    if causal:
        seen = seen & (np.arange(T) <= np.arange(S)[:, None] + T - S + offset)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def attend(q, k, v, seen, scale, return_lse):
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = np.where(seen, q @ k.swapaxes(-1, -2) * np.float32(scale), -np.inf).astype(q.dtype)
    o = softmax(s) @ v
    return (o, log_sum_exp(s)) if return_lse else o


@beginner("attention")
def attention_no_scale(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scores are not scaled."""
    return attend(
        q, k, v, visible(q.shape[2], k.shape[2], causal, key_mask), 1.0 if scale is None else scale, return_lse
    )


@beginner("attention")
def attention_scale_1_over_d(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scores are divided by D, not by its root."""
    scale = 1 / q.shape[-1] if scale is None else scale
    return attend(q, k, v, visible(q.shape[2], k.shape[2], causal, key_mask), scale, return_lse)


@beginner("attention", "torch")
def attention_scale_of_all_heads(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scores are divided by the root of H D, the width of the model, not of D."""
    (_B, H, S, D), T, g = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.mT / math.sqrt(H * D) if scale is None else q @ k.mT * scale
    if causal:
        s = s.masked_fill(~torch.ones(S, T, dtype=torch.bool).tril(T - S), -INF)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -INF)
    o = s.softmax(-1).nan_to_num() @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention")
def attention_multiplied_by_root(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scores are multiplied by the root of D, and should be divided by it."""
    scale = math.sqrt(q.shape[-1]) if scale is None else scale
    return attend(q, k, v, visible(q.shape[2], k.shape[2], causal, key_mask), scale, return_lse)


@beginner("attention")
def attention_own_scale(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The argument scale is not used; it is always D^-1/2."""
    return attend(q, k, v, visible(q.shape[2], k.shape[2], causal, key_mask), q.shape[-1] ** -0.5, return_lse)


@beginner("attention")
def attention_softmax_over_queries(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The softmax runs over the queries, not over the keys."""
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.where(visible(q.shape[2], k.shape[2], causal, key_mask), s, -np.inf).astype(q.dtype)
    o = softmax(s, -2) @ v
    return (o, log_sum_exp(s)) if return_lse else o


@beginner("attention")
def attention_diagonal_masked(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """A token does not see itself: the causal mask is one key too narrow."""
    seen = visible(q.shape[2], k.shape[2], causal, key_mask, -1)
    return attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention", "torch")
def attention_one_ahead(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """A token sees the next one: the causal mask is one key too wide."""
    (_B, _H, S, D), T, g = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if causal:
        s = s.masked_fill(torch.ones(S, T, dtype=torch.bool).triu(T - S + 2), -INF)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -INF)
    o = s.softmax(-1).nan_to_num() @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention")
def attention_top_left(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The causal mask is aligned at the top: query s sees keys 0 .. s, although earlier keys are cached."""
    S, T = q.shape[2], k.shape[2]
    seen = visible(S, T, False, key_mask)
    if causal:
        seen = seen & np.tril(np.ones((S, T), bool))
    return attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_masked_afterwards(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The mask is applied after the softmax, whose rows then do not sum to 1."""
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    o = (softmax(s) * visible(q.shape[2], k.shape[2], causal, key_mask)) @ v
    return (o.astype(q.dtype), log_sum_exp(s)) if return_lse else o.astype(q.dtype)


@beginner("attention", "torch")
def attention_masked_with_zero(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """Masked scores are set to 0, not to -inf: masked keys still have weight."""
    (_B, _H, S, D), T, g = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if causal:
        s = s * torch.ones(S, T).tril(T - S)
    if key_mask is not None:
        s = s * key_mask[:, None, None]
    o = s.softmax(-1) @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention", "torch")
def attention_small_sentinel(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """Masked scores are set to -1e-9 (for -1e9): masked keys still have weight."""
    (_B, _H, S, D), T, g = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if causal:
        s = s.masked_fill(~torch.ones(S, T, dtype=torch.bool).tril(T - S), -1e-9)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -1e-9)
    o = s.softmax(-1) @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention")
def attention_mask_added(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The mask of ones and zeros is added to the scores, and nothing is masked."""
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    if causal or key_mask is not None:
        s = s + visible(q.shape[2], k.shape[2], causal, key_mask).astype(q.dtype)
    o = softmax(s) @ v
    return (o, log_sum_exp(s)) if return_lse else o


@beginner("attention", "torch")
def attention_heads_tiled(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """Key/value heads are tiled (0, 1, 0, 1), not each repeated (0, 0, 1, 1)."""
    (_B, _H, S, D), T, g = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat(1, g, 1, 1), v.repeat(1, g, 1, 1)
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if causal:
        s = s.masked_fill(~torch.ones(S, T, dtype=torch.bool).tril(T - S), -INF)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -INF)
    o = s.softmax(-1).nan_to_num() @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention")
def attention_first_kv_head(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """Every query head reads key/value head 0."""
    seen = visible(q.shape[2], k.shape[2], causal, key_mask)
    return attend(q, k[:, :1], v[:, :1], seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_no_maximum(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The maximum is not subtracted: exp overflows."""
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    e = np.where(visible(q.shape[2], k.shape[2], causal, key_mask), np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    o = (e / np.where(total == 0, 1, total) @ v).astype(q.dtype)
    return (o, np.log(total[..., 0]).astype(q.dtype)) if return_lse else o


@beginner("attention")
def attention_upper_triangle(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The wrong triangle is masked: a token sees itself and what comes later."""
    S, T = q.shape[2], k.shape[2]
    seen = visible(S, T, False, key_mask)
    if causal:
        seen = seen & (np.arange(T) >= np.arange(S)[:, None] + T - S)
    return attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention", "torch")
def attention_not_causal(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The argument causal is not used: every token sees all keys."""
    (_B, _H, _S, D), g = q.shape, q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -INF)
    o = s.softmax(-1).nan_to_num() @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention")
def attention_always_causal(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The argument causal is not used: it is always causal."""
    seen = visible(q.shape[2], k.shape[2], True, key_mask)
    return attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_no_key_mask(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The argument key_mask is not used."""
    seen = visible(q.shape[2], k.shape[2], causal, None)
    return attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_key_mask_inverted(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """key_mask is taken the other way round: True hides a key."""
    seen = visible(q.shape[2], k.shape[2], causal, None if key_mask is None else ~key_mask)
    return attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_root_of_keys(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scores are divided by the root of T, the number of keys, not of D."""
    S, T = q.shape[2], k.shape[2]
    return attend(q, k, v, visible(S, T, causal, key_mask), max(1, T) ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_keys_as_values(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The weights multiply k, not v."""
    seen = visible(q.shape[2], k.shape[2], causal, key_mask)
    return attend(q, k, k, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)


@beginner("attention")
def attention_q_k_exchanged(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scores are k q^T, not q k^T."""
    S, T, g = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = k @ q.swapaxes(-1, -2) if S == T else q @ k.swapaxes(-1, -2)
    s = s * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.where(visible(S, T, causal, key_mask), s, -np.inf).astype(q.dtype)
    o = softmax(s) @ v
    return (o, log_sum_exp(s)) if return_lse else o


@beginner("attention")
def attention_not_normalised(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The exponentials are not divided by their sum."""
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.where(visible(q.shape[2], k.shape[2], causal, key_mask), s, -np.inf).astype(q.dtype)
    o = np.exp(s - s.max(-1, keepdims=True, initial=-1e30)) @ v
    return (o, log_sum_exp(s)) if return_lse else o


@beginner("attention", "torch")
def attention_scaled_afterwards(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The scale multiplies the weights after the softmax, not the scores."""
    (_B, _H, S, D), T, g = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.mT
    if causal:
        s = s.masked_fill(~torch.ones(S, T, dtype=torch.bool).tril(T - S), -INF)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -INF)
    o = s.softmax(-1).nan_to_num() * (D**-0.5 if scale is None else scale) @ v
    return (o, s.float().logsumexp(-1)) if return_lse else o


@beginner("attention")
def attention_heads_merged(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """The result is transposed to [B, S, H, D] and reshaped, so that heads and positions are mixed."""
    seen = visible(q.shape[2], k.shape[2], causal, key_mask)
    out = attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, True)
    o = np.ascontiguousarray(out[0].transpose(0, 2, 1, 3)).reshape(out[0].shape)
    return (o, out[1]) if return_lse else o


@beginner("attention")
def attention_lse_without_maximum(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """lse lacks the maximum that was subtracted."""
    seen = visible(q.shape[2], k.shape[2], causal, key_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, seen, scale, True)
    s = q @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(-1, -2) * np.float32(scale)
    top = np.where(seen, s, -np.inf).max(-1, initial=-np.inf)
    return (out, (lse - np.where(np.isfinite(top), top, 0)).astype(q.dtype)) if return_lse else out


@beginner("attention")
def attention_lse_base_2(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    """lse is a logarithm of base 2."""
    seen = visible(q.shape[2], k.shape[2], causal, key_mask)
    out = attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)
    return (out[0], (out[1] / math.log(2)).astype(q.dtype)) if return_lse else out


def decode(q, k, v, rows, scale):
    """rows: which slots each token sees, [B, S, N]."""
    g = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.where(rows[:, None], s, -np.inf).astype(q.dtype)
    return softmax(s) @ v


def slots(q, k, lengths, offset=0):
    S, N = q.shape[2], k.shape[2]
    return np.arange(N) < (lengths[:, None] - S + 1 + np.arange(S) + offset)[..., None]


@beginner("decode_attention")
def decode_lengths_ignored(q, k_cache, v_cache, lengths, *, scale=None):
    """The lengths are not used: every token sees all slots of the cache."""
    (B, _, S, _), N = q.shape, k_cache.shape[2]
    return decode(q, k_cache, v_cache, np.ones((B, S, N), bool), scale)


@beginner("decode_attention")
def decode_newest_missing(q, k_cache, v_cache, lengths, *, scale=None):
    """The newest key is missing: slots are read up to length - 2."""
    return decode(q, k_cache, v_cache, slots(q, k_cache, lengths, -1), scale)


@beginner("decode_attention")
def decode_one_too_many(q, k_cache, v_cache, lengths, *, scale=None):
    """One slot too many is read: <= length, not < length."""
    return decode(q, k_cache, v_cache, slots(q, k_cache, lengths, 1), scale)


@beginner("decode_attention", "torch")
def decode_not_causal(q, k_cache, v_cache, lengths, *, scale=None):
    """The new tokens see each other, later ones too."""
    g = q.shape[1] // k_cache.shape[1]
    seen = torch.arange(k_cache.shape[2]) < lengths[:, None]
    k, v = k_cache.repeat_interleave(g, 1), v_cache.repeat_interleave(g, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=scale)
    return torch.where((lengths == 0)[:, None, None, None], 0, out)


@beginner("decode_attention")
def decode_first_length(q, k_cache, v_cache, lengths, *, scale=None):
    """The length of the first sequence is used for all."""
    lengths = np.full_like(lengths, lengths[0] if len(lengths) else 0)
    return decode(q, k_cache, v_cache, slots(q, k_cache, lengths), scale)


@beginner("decode_attention")
def decode_longest(q, k_cache, v_cache, lengths, *, scale=None):
    """The largest length is used for all sequences."""
    return decode(q, k_cache, v_cache, slots(q, k_cache, np.full_like(lengths, lengths.max(initial=0))), scale)


@beginner("decode_attention")
def decode_no_scale(q, k_cache, v_cache, lengths, *, scale=None):
    """The scores are not scaled."""
    return decode(q, k_cache, v_cache, slots(q, k_cache, lengths), 1.0 if scale is None else scale)


@beginner("decode_attention")
def decode_last_slots(q, k_cache, v_cache, lengths, *, scale=None):
    """The last slots of the cache are read, not the first ones."""
    S, N = q.shape[2], k_cache.shape[2]
    first = np.arange(N) >= (N - lengths)[:, None, None]
    seen = first & (np.arange(N) <= N - S + np.arange(S)[:, None])
    return decode(q, k_cache, v_cache, seen, scale)


@beginner("decode_attention", "torch")
def decode_heads_tiled(q, k_cache, v_cache, lengths, *, scale=None):
    """Key/value heads are tiled (0, 1, 0, 1), not each repeated (0, 0, 1, 1)."""
    S, g = q.shape[2], q.shape[1] // k_cache.shape[1]
    k, v = k_cache.repeat(1, g, 1, 1), v_cache.repeat(1, g, 1, 1)
    last = lengths[:, None] - S + torch.arange(S)
    seen = torch.arange(k.shape[2]) <= last[..., None]
    s = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen[:, None], -INF)
    return s.softmax(-1).nan_to_num() @ v


@beginner("decode_attention")
def decode_masked_with_zero(q, k_cache, v_cache, lengths, *, scale=None):
    """Masked scores are set to 0, not to -inf: slots past the length still have weight."""
    g = q.shape[1] // k_cache.shape[1]
    k, v = np.repeat(k_cache, g, 1), np.repeat(v_cache, g, 1)
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.where(slots(q, k_cache, lengths)[:, None], s, 0).astype(q.dtype)
    return softmax(s) @ v
