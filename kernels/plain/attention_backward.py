"""The gradients of softmax and attention in plain Torch, with all scores at once: float32 inside, rounded at the end.
Formulas: `refllm.ops.attention_backward`."""

import torch

from refllm.kernels import arguments
from refllm.kernels.plain.wide import wide


def softmax_backward(dp: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """ds = p (dp - sum(p dp)) over the last axis; p is the softmax. As `refllm.ops.softmax_backward`."""
    dp, weights = wide(dp), wide(p)
    ds = weights * (dp - (weights * dp).sum(-1, keepdim=True))
    return ds.to(p.dtype)


def attention_backward(
    do_BHSD: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    o_BHSD: torch.Tensor | None = None,
    lse_BHS: torch.Tensor | None = None,
    *,
    dlse: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_BHSD, dk_BKTD, dv_BKTD of o = softmax(scale q k^T + mask) v. As `refllm.ops.attention_backward`.

    o_BHSD, lse_BHS (float32): of the forward pass; None: computed again. dlse: [B, H, S], the gradient of lse, where
    that was returned. scale, causal, key_mask: as `attention`. What no query sees has the gradient 0, and what it
    holds, NaN included, reaches nothing. Raises InputError for arguments that do not fit together.
    """
    arguments.attention("attention", q_BHSD, k_BKTD, v_BKTD, key_mask)
    arguments.like("attention_backward", "do", do_BHSD, tuple(q_BHSD.shape), q_BHSD)
    (B, H, S, D), (K, T) = q_BHSD.shape, k_BKTD.shape[1:3]
    factor, groups = D**-0.5 if scale is None else scale, H // K
    q, do = (wide(t).reshape(B, K, groups, S, D) for t in (q_BHSD, do_BHSD))
    k, v = wide(k_BKTD)[:, :, None], wide(v_BKTD)[:, :, None]
    seen = _seen_keys(S, T, causal, key_mask, q.device)
    s = (q @ k.mT * factor).masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1) if lse_BHS is None else lse_BHS.reshape(B, K, groups, S)
    p = torch.exp(s - lse[..., None]).masked_fill(~seen, 0.0)
    dp = (do @ v.mT).masked_fill(p == 0, 0.0)
    o = None if o_BHSD is None else wide(o_BHSD).reshape(B, K, groups, S, D)
    delta = (p * dp).sum(-1) if o is None else (do * o).sum(-1)
    if dlse is not None:
        delta = delta - wide(dlse).reshape(B, K, groups, S)
    ds = (p * (dp - delta[..., None])).masked_fill(p == 0, 0.0)
    dq = factor * (ds @ k.masked_fill(_unseen(p), 0.0))
    dk = factor * (ds.mT @ q).sum(2)
    dv = (p.mT @ do).sum(2)
    return dq.reshape(B, H, S, D).to(q_BHSD.dtype), dk.to(k_BKTD.dtype), dv.to(v_BKTD.dtype)


def decode_attention_backward(
    do_BHSD: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_cache_BKND: torch.Tensor,
    v_cache_BKND: torch.Tensor,
    lengths_B: torch.Tensor,
    o_BHSD: torch.Tensor | None = None,
    lse_BHS: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk_cache, dv_cache of `decode_attention`: 0 in the slots from lengths_B[b] on.

    As `refllm.ops.decode_attention_backward`. Raises InputError for arguments that do not fit together, and for lengths
    outside 0..N.
    """
    arguments.decode_attention("decode_attention", q_BHSD, k_cache_BKND, v_cache_BKND, lengths_B)
    arguments.lengths_exist("decode_attention", lengths_B, k_cache_BKND.shape[2])
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q_BHSD, k_cache_BKND, v_cache_BKND))
    for b, length in enumerate(lengths_B.tolist()):
        row, used = slice(b, b + 1), slice(0, length)
        kept = (None if x is None else x[row] for x in (o_BHSD, lse_BHS))
        k, v = k_cache_BKND[row, :, used], v_cache_BKND[row, :, used]
        dq[row], dk[row, :, used], dv[row, :, used] = attention_backward(
            do_BHSD[row], q_BHSD[row], k, v, *kept, scale=scale
        )
    return dq, dk, dv


def _seen_keys(S: int, T: int, causal: bool, key_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Bool [B or 1, 1, 1, S, T]: query s sees keys 0 .. T-S+s if causal, and of those what key_mask says."""
    last = torch.arange(S, device=device)[:, None] + (T - S if causal else T)
    seen = (torch.arange(T, device=device) <= last)[None, None, None]
    return seen if key_mask is None else seen & key_mask[:, None, None, None, :]


def _unseen(p: torch.Tensor) -> torch.Tensor:
    """Bool [B, K, 1, T, 1]: the keys of which no query of the group has a weight."""
    return (p == 0).all(-2).all(2, keepdim=True)[..., None]
