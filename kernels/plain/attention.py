"""Plain Torch attention: float32 inside, in blocks of queries so that scores stay small. Formulas: `refllm.ops`."""

import torch

from refllm.kernels import arguments

SCORES = 1 << 18
"""Scores of one query head that are held at once: 1 MiB."""


def attention(
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o_BHSD = softmax(scale q k^T + mask) v; query head h reads key/value head h // (H / K).

    As `refllm.ops.attention`. scale: D^-1/2 if None. causal: query s sees keys 0 .. T-S+s (aligned at the end).
    key_mask: bool [B, T], True = attend. A query with no key to attend to yields 0 and lse = -inf. What a masked key
    or value holds, NaN included, never reaches a valid row. With return_lse also lse_BHS, float32. o lies as
    [B, S, H, D] in memory.
    Raises InputError for arguments that do not fit together.
    """
    arguments.attention("attention", q_BHSD, k_BKTD, v_BKTD, key_mask)
    (B, H, S, D), T = q_BHSD.shape, k_BKTD.shape[2]
    o_BHSD = q_BHSD.new_zeros((B, S, H, D)).transpose(1, 2)
    lse_BHS = q_BHSD.new_full((B, H, S), float("-inf"), dtype=torch.float32)
    k32, v32, slot = k_BKTD.float(), v_BKTD.float(), torch.arange(T, device=q_BHSD.device)
    block = max(1, SCORES // max(1, T))
    for first in range(0, S, block):
        rows = slice(first, min(first + block, S))
        stop = max(0, min(T, T - S + rows.stop)) if causal else T
        if not stop:
            continue  # no keys: 0 and -inf, as it stands
        last = torch.arange(rows.start, rows.stop, device=q_BHSD.device)[:, None] + (T - S if causal else T)
        visible = (slot[:stop] <= last)[None]
        if key_mask is not None:
            visible = visible & key_mask[:, None, :stop]
        o_BHSD[:, :, rows], lse_BHS[:, :, rows] = _attend(
            q_BHSD[:, :, rows], k32[:, :, :stop], v32[:, :, :stop], visible, scale
        )
    return (o_BHSD, lse_BHS) if return_lse else o_BHSD


def decode_attention(
    q_BHSD: torch.Tensor,
    k_cache_BKND: torch.Tensor,
    v_cache_BKND: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """o_BHSD: causal `attention` of the last S = 1..8 tokens over the first lengths_B[b] slots of a cache of N slots.

    As `refllm.ops.decode_attention`. What slots from lengths_B[b] on hold never reaches the result; where a query has
    no slot to see it is 0. Raises InputError for arguments that do not fit together, and for lengths outside 0..N if
    they are on the CPU; on a GPU, where looking would mean to wait, such a sequence becomes NaN.
    """
    arguments.decode_attention("decode_attention", q_BHSD, k_cache_BKND, v_cache_BKND, lengths_B)
    (B, H, S, D), N = q_BHSD.shape, k_cache_BKND.shape[2]
    if lengths_B.device.type == "cpu":
        arguments.lengths_exist("decode_attention", lengths_B, N)
    o_BHSD = q_BHSD.new_zeros((B, S, H, D)).transpose(1, 2)
    if N and B:
        # Query s sees the slots below length - S + s + 1.
        end = lengths_B[:, None] - S + 1 + torch.arange(S, device=q_BHSD.device)
        visible = torch.arange(N, device=q_BHSD.device) < end[..., None]
        o_BHSD[:], _ = _attend(q_BHSD, k_cache_BKND.float(), v_cache_BKND.float(), visible, scale)
    impossible = (lengths_B < 0) | (lengths_B > N)
    return o_BHSD.masked_fill_(impossible[:, None, None, None], float("nan"))


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, H, S, D] in the dtype of q and lse [B, H, S], for float32 k and v [B, K, T, D] with T > 0 and visible, bool
    [B or 1, S, T]. The H / K query heads of a group are rows of one product, so that k and v are not repeated."""
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    s = q.float().reshape(B, K, H // K * S, D) @ k.mT * (D**-0.5 if scale is None else scale)
    s = s.view(B, K, H // K, S, T).masked_fill_(~visible[:, None, None], float("-inf"))
    top = s.amax(-1, keepdim=True)
    p = torch.exp(s - top.masked_fill(top == float("-inf"), 0.0))
    total = p.sum(-1, keepdim=True)
    lse = total.log() + top
    weights = p.to(q.dtype).float().view(B, K, H // K * S, T)
    o = _product(weights, v).view(B, K, H // K, S, D) / total.masked_fill(total == 0, 1.0)
    return o.to(q.dtype).view(B, H, S, D), lse.view(B, H, S)


def _product(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """p v, where a weight of exactly 0 silences whatever v holds: 0 * NaN counts as 0. Waits for the GPU."""
    out = p @ v
    if bool(out.isfinite().all()):
        return out
    # NaN and infinities are taken out of v and added to the rows that see them: NaN as both infinities, inf - inf.
    finite, infinity = v.isfinite(), float("inf")
    seen = (p != 0).float()
    up = seen @ (~finite & ~(v < 0)).float() > 0
    down = seen @ (~finite & ~(v > 0)).float() > 0
    out = p @ v.masked_fill(~finite, 0.0)
    return out + torch.where(up, infinity, 0.0) - torch.where(down, infinity, 0.0)
