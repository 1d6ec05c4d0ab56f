"""The gradients of the rotary embedding in plain Torch, alone and with the norms and the projection before it."""

import torch

from refllm.kernels import arguments
from refllm.kernels.plain.linear_backward import linear_backward
from refllm.kernels.plain.norm import rms_norm
from refllm.kernels.plain.norm_backward import rms_norm_backward, through_layer_norm, through_rms_norm
from refllm.kernels.plain.wide import wide


def rope_backward(
    dq_BHSD: torch.Tensor, dk_BKSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq and dk turned back by the same angles; dims R..D-1 are bit-equal. As `refllm.ops.rope_backward`.

    cos, sin: [S, R/2] or [B, S, R/2], in float32 or the dtype of dq. Float32 inside, one rounding. Both results are
    contiguous. Raises InputError for arguments that do not fit together.
    """
    arguments.check("rope", dq_BHSD, dk_BKSD, cos, sin)
    dq, dk = (_turned_back(wide(d), cos, sin, interleaved) for d in (dq_BHSD, dk_BKSD))
    return dq.to(dq_BHSD.dtype), dk.to(dk_BKSD.dtype)


def norm_rope_backward(
    dq_BHSD: torch.Tensor,
    dk_BKSD: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dq_weight [H, D], dk_weight [K, D]: turned back, then through the norm of each head.

    As `refllm.ops.norm_rope_backward`; not rounded between the two. Raises InputError for arguments that do not fit
    together.
    """
    arguments.check("norm_rope", q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, norm=norm)
    for name, d, x in (("dq", dq_BHSD, q_BHSD), ("dk", dk_BKSD, k_BKSD)):
        arguments.like("norm_rope_backward", name, d, tuple(x.shape), x)
    through = through_rms_norm if norm == "rms" else through_layer_norm
    dq, q_terms = through(_turned_back(wide(dq_BHSD), cos, sin, interleaved), wide(q_BHSD), _per_head(q_weight), eps)
    dk, k_terms = through(_turned_back(wide(dk_BKSD), cos, sin, interleaved), wide(k_BKSD), _per_head(k_weight), eps)
    dq_weight, dk_weight = q_terms.sum((0, 2)).to(q_weight.dtype), k_terms.sum((0, 2)).to(k_weight.dtype)
    return dq.to(q_BHSD.dtype), dk.to(k_BKSD.dtype), dq_weight, dk_weight


def rms_norm_qkv_rope_backward(
    dq_BHSD: torch.Tensor,
    dk_BKSD: torch.Tensor,
    dv_BKSD: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx, dnorm_weight, dw_qkv, db_qkv: the backward passes of rope, the projection and the norm, in this order.

    As `refllm.ops.rms_norm_qkv_rope_backward`, rounded after each. Raises InputError for arguments that do not fit
    together.
    """
    arguments.rms_norm_qkv_rope(
        "rms_norm_qkv_rope", x_BSE, norm_weight, w_qkv, b_qkv, cos, sin, num_heads, num_kv_heads, None
    )
    (B, S, _), D = x_BSE.shape, w_qkv.shape[0] // (num_heads + 2 * num_kv_heads)
    for name, d, heads in (("dq", dq_BHSD, num_heads), ("dk", dk_BKSD, num_kv_heads), ("dv", dv_BKSD, num_kv_heads)):
        arguments.like("rms_norm_qkv_rope_backward", name, d, (B, heads, S, D), x_BSE)
    dq, dk = rope_backward(dq_BHSD, dk_BKSD, cos, sin, interleaved=interleaved)
    dqkv_BSC = torch.cat([dq, dk, dv_BKSD], 1).transpose(1, 2).reshape(B, S, len(w_qkv))
    normed = rms_norm(x_BSE, norm_weight, eps)
    dnormed, dw_qkv, db_qkv = linear_backward(dqkv_BSC, normed, w_qkv, b_qkv)
    dx, dnorm_weight = rms_norm_backward(dnormed, x_BSE, norm_weight, eps)
    return dx, dnorm_weight, dw_qkv, db_qkv


def _per_head(weight_HD: torch.Tensor) -> torch.Tensor:
    return wide(weight_HD)[:, None, :]


def _turned_back(d: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """d [B, heads, S, D], each pair of dims turned by the negative of its angle. Nothing is rounded."""
    half = cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    cos, sin = (table.to(d.dtype).unsqueeze(-3) for table in (cos, sin))  # one table for all heads
    a, b = d[..., first], d[..., second]
    out = torch.empty(d.shape, dtype=d.dtype, device=d.device)
    out[..., 2 * half :] = d[..., 2 * half :]
    out[..., first] = a * cos + b * sin
    out[..., second] = b * cos - a * sin
    return out
