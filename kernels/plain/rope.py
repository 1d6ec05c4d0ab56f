"""Rotary position embedding in plain Torch, alone and with the norms and the projection before it."""

import torch
import torch.nn.functional as F

from refllm.kernels import arguments
from refllm.kernels.plain.norm import eager_rms_norm, layer_normed, rms_norm, rms_normed


def rope(
    q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate dims 0..R-1 of every head of q and k; dims R..D-1 are bit-equal. As `refllm.ops.rope`.

    cos, sin: [S, R/2] or [B, S, R/2], in float32 or the dtype of q. Float32 inside, one rounding. Both results are
    contiguous. Raises InputError for arguments that do not fit together.
    """
    arguments.check("rope", q_BHSD, k_BKSD, cos, sin)
    return _rotate(q_BHSD, cos, sin, interleaved, q_BHSD.dtype), _rotate(k_BKSD, cos, sin, interleaved, k_BKSD.dtype)


def norm_rope(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    norm: str,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm over the D dims of each head with that head's own weight (q_weight [H, D], k_weight [K, D]), then `rope`.

    As `refllm.ops.norm_rope`, rounded once and not after the norm. norm: "rms" or "layer" (without bias). Raises
    InputError for arguments that do not fit together.
    """
    arguments.check("norm_rope", q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, norm=norm)
    normed = rms_normed if norm == "rms" else layer_normed
    heads = ((q_BHSD, q_weight), (k_BKSD, k_weight))
    q, k = (weight.float()[:, None, :] * normed(x, eps) for x, weight in heads)
    return _rotate(q, cos, sin, interleaved, q_BHSD.dtype), _rotate(k, cos, sin, interleaved, k_BKSD.dtype)


def rms_norm_qkv_rope(
    x_BSE: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_BHSD, k_BKSD, v_BKSD = the rotated heads of rms_norm(x) W^T + b; w_qkv [(H + 2K) D, E], rows q, then k, then v.

    As `refllm.ops.rms_norm_qkv_rope`: rounded after the norm, the projection and the rotation. All three results are
    contiguous.
    cache: (k_cache [B, K, N, D], v_cache [B, K, N, D], lengths [B]). Then k and v of token s of sequence b are written
    to slot lengths[b] + s of the caches, and (q, k_cache, v_cache) returns.
    Raises InputError for arguments that do not fit together, and for a slot outside 0..N-1 if lengths are on the CPU;
    on a GPU nothing is written for such a token.
    """
    arguments.rms_norm_qkv_rope(
        "rms_norm_qkv_rope", x_BSE, norm_weight, w_qkv, b_qkv, cos, sin, num_heads, num_kv_heads, cache
    )
    B, S, _ = x_BSE.shape
    qkv = F.linear(rms_norm(x_BSE, norm_weight, eps), w_qkv, b_qkv)
    parts = num_heads + 2 * num_kv_heads
    heads = qkv.view(B, S, parts, w_qkv.shape[0] // parts).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = rope(q, k, cos, sin, interleaved=interleaved)
    if cache is None:
        return q, k, v.contiguous()
    k_cache, v_cache, lengths = cache
    if lengths.device.type == "cpu":
        arguments.slots_exist("rms_norm_qkv_rope", lengths, S, k_cache.shape[2])
    _write(k_cache, k, lengths)
    _write(v_cache, v, lengths)
    return q, k_cache, v_cache


def _write(cache_BKND: torch.Tensor, new_BKSD: torch.Tensor, lengths_B: torch.Tensor) -> None:
    """Token s of sequence b goes to slot lengths[b] + s, if there is one."""
    slots_BS = lengths_B[:, None] + torch.arange(new_BKSD.shape[2], device=new_BKSD.device)
    b, s = ((slots_BS >= 0) & (slots_BS < cache_BKND.shape[2])).nonzero(as_tuple=True)
    cache_BKND[b, :, slots_BS[b, s]] = new_BKSD[b, :, s]


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, dtype: torch.dtype
) -> torch.Tensor:
    """x [B, heads, S, D] with dims 0..R-1 rotated in float32, in `dtype`."""
    half = cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    cos, sin = (table.float().unsqueeze(-3) for table in (cos, sin))  # one table for all heads
    a, b = x[..., first].float(), x[..., second].float()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    out[..., 2 * half :] = x[..., 2 * half :]
    out[..., first] = (a * cos - b * sin).to(dtype)
    out[..., second] = (b * cos + a * sin).to(dtype)
    return out


def eager_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x cos + rotated(x) sin on the first R dims, with tables as wide as they are: the form of Transformers."""
    R = 2 * cos.shape[-1]
    wide = [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :R], x[..., R:]
        if interleaved:
            other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            other = torch.cat([-turned[..., R // 2 :], turned[..., : R // 2]], -1)
        return torch.cat([turned * wide[0] + other * wide[1], rest], -1)

    return rotate(q), rotate(k)


def eager_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    norm: str,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm without weight, times the weight of each head, then the rotation."""
    function = F.rms_norm if norm == "rms" else F.layer_norm
    q, k = (
        function(x, (x.shape[-1],), eps=eps) * weight[:, None, :].to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return eager_rope(q, k, cos, sin, interleaved=interleaved)


def eager_rms_norm_qkv_rope(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm, one product for all three projections, then the rotation."""
    qkv = F.linear(eager_rms_norm(x, norm_weight, eps), w_qkv, b_qkv).unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = qkv.transpose(1, 2).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return *eager_rope(q, k, cos, sin, interleaved=interleaved), v
