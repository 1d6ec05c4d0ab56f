"""The operators of `backend="torch"`: Torch's own fused functions where it has one, else the plain form.

    rms_norm, layer_norm (and after a sum)   torch.nn.functional.rms_norm, layer_norm
    attention, decode_attention              torch.nn.functional.scaled_dot_product_attention
    everything else                          refllm.kernels.plain

On values that are finite they meet the same contracts. Unlike the plain form of attention, Torch's lets a NaN in a
masked value through; a model's cache holds none that its own weights or inputs did not bring.
"""

from typing import Any

import torch
import torch.nn.functional as F

from refllm.kernels import plain


def __getattr__(name: str) -> Any:
    return getattr(plain, name)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `refllm.ops.rms_norm`."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `refllm.ops.add_rms_norm`."""
    r = residual + x
    return rms_norm(r, weight, eps), r


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As `refllm.ops.layer_norm`."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `refllm.ops.add_layer_norm`."""
    r = residual + x
    return layer_norm(r, weight, bias, eps), r


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `refllm.ops.swiglu`: float32 inside, one rounding."""
    return F.silu(gate.float()).mul_(up).to(up.dtype)


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
    cache: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `refllm.ops.rms_norm_qkv_rope`. cache: where a kernel would write keys and values; here the caller does."""
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    qkv_BSE = F.linear(rms_norm(x_BSE, norm_weight, eps), w_qkv, b_qkv)
    q, k, v = qkv_BSE.unflatten(-1, (sum(sizes), -1)).transpose(1, 2).split(sizes, dim=1)
    q, k = plain.rope(q, k, cos, sin, interleaved=interleaved)
    return q, k, v


def attention(
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `refllm.ops.attention`, for finite values."""
    (S, T), grouped = (q_BHSD.shape[2], k_BKTD.shape[2]), q_BHSD.shape[1] != k_BKTD.shape[1]
    causal = causal and S > 1  # one query, the last, sees every key
    options: dict[str, Any] = {"is_causal": True} if causal and S == T and key_mask is None else {}
    if not options and (causal or key_mask is not None):
        mask = torch.ones(S, T, dtype=torch.bool, device=q_BHSD.device)
        mask = mask.tril(T - S) if causal else mask
        options["attn_mask"] = mask if key_mask is None else mask & key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTD, scale=scale, enable_gqa=grouped, **options)


def decode_attention(
    q_BHSD: torch.Tensor,
    k_cache_BKND: torch.Tensor,
    v_cache_BKND: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """As `refllm.ops.decode_attention`, for finite values in every slot."""
    S, N = q_BHSD.shape[2], k_cache_BKND.shape[2]
    steps_S, slots_N = (torch.arange(n, device=q_BHSD.device) for n in (S, N))
    seen_BSN = slots_N < (lengths_B[:, None] - (S - 1) + steps_S)[..., None]
    grouped = q_BHSD.shape[1] != k_cache_BKND.shape[1]
    options: dict[str, Any] = {"attn_mask": seen_BSN[:, None], "scale": scale, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(q_BHSD, k_cache_BKND, v_cache_BKND, **options)
