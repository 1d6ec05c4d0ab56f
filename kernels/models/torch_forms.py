"""The operators of `backend="torch"`: Torch's own fused functions where it has one, else the plain form.

    rms_norm, layer_norm (and after a sum)   torch.nn.functional.rms_norm, layer_norm
    attention                                torch.nn.functional.scaled_dot_product_attention, or on a CPU what is
                                             faster there: the same in float32, or products of blocks of queries
    decode_attention                         torch.nn.functional.scaled_dot_product_attention
    rope, swiglu                             the steps of the plain form in fewer passes
    everything else                          refllm.kernels.plain

On values that are finite they meet the same contracts. Unlike the plain form of attention, Torch's lets a NaN in a
masked value through; a model's cache holds none that its own weights or inputs did not bring.
"""

from typing import Any

import torch
import torch.nn.functional as F

from refllm.kernels import arguments, plain
from refllm.kernels.models import products
from refllm.kernels.models.fastest import Fastest, step
from refllm.kernels.plain.norm import eager_add_layer_norm as add_layer_norm  # noqa: F401 (an operator of this backend)
from refllm.kernels.plain.norm import eager_add_rms_norm as add_rms_norm  # noqa: F401
from refllm.kernels.plain.norm import eager_layer_norm as layer_norm  # noqa: F401
from refllm.kernels.plain.norm import eager_rms_norm as rms_norm

_TOO_SMALL = 1 << 18
"""Products of a query's and a key's numbers, per query head of a group, below which measuring takes too long."""
_QUERIES_PER_BLOCK = 128


def __getattr__(name: str) -> Any:
    return getattr(plain, name)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The operator `refllm.ops.swiglu`: float32 inside, one rounding."""
    if gate.dtype == torch.float32:
        return F.silu(gate).mul_(up)
    return F.silu(gate.float(), inplace=True).mul_(up).to(up.dtype)


def rope(
    q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `refllm.ops.rope`: float32 inside, one rounding. Pairs beside each other are complex numbers, turned
    by one product."""
    arguments.check("rope", q_BHSD, k_BKSD, cos, sin)
    turn = _turned_pairs if interleaved else _turned_halves
    cos, sin = (table.float().unsqueeze(-3) for table in (cos, sin))  # one table for all heads
    return turn(q_BHSD, cos, sin), turn(k_BKSD, cos, sin)


def _turned_pairs(x_BNSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    R = 2 * cos.shape[-1]
    pairs = torch.view_as_complex(x_BNSD[..., :R].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x_BNSD.dtype)
    return turned if x_BNSD.shape[-1] == R else torch.cat((turned, x_BNSD[..., R:]), dim=-1)


def _turned_halves(x_BNSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    R, out = 2 * cos.shape[-1], torch.empty_like(x_BNSD, dtype=torch.float32)
    a, b, rest = x_BNSD.float().split((R // 2, R // 2, x_BNSD.shape[-1] - R), dim=-1)
    first, second, kept = out.split((R // 2, R // 2, x_BNSD.shape[-1] - R), dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    kept.copy_(rest)
    return out.to(x_BNSD.dtype)


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
    """The operator `refllm.ops.rms_norm_qkv_rope`. cache: where a kernel would write k and v; here the caller does."""
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    n_NE = rms_norm(x_BSE, norm_weight, eps).view(-1, x_BSE.shape[-1])
    qkv_BSE = products.linear(n_NE, w_qkv, b_qkv).view(*x_BSE.shape[:-1], -1)
    q, k, v = qkv_BSE.unflatten(-1, (sum(sizes), -1)).transpose(1, 2).split(sizes, dim=1)
    q, k = rope(q, k, cos, sin, interleaved=interleaved)
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
    """The operator `refllm.ops.attention`, for finite values; without a key mask on a CPU in the fastest of several
    ways."""
    scale = q_BHSD.shape[-1] ** -0.5 if scale is None else scale
    (S, T), causal = (q_BHSD.shape[2], k_BKTD.shape[2]), causal and q_BHSD.shape[2] > 1  # the last query sees all keys
    if key_mask is not None or q_BHSD.device.type != "cpu" or S * k_BKTD.numel() < _TOO_SMALL:
        return _sdpa(q_BHSD, k_BKTD, v_BKTD, scale, causal, key_mask)
    kind = (q_BHSD.shape[:2], k_BKTD.shape[1], q_BHSD.shape[-1], step(S), step(T), causal, q_BHSD.dtype)
    return forms_of_attention(kind, q_BHSD, k_BKTD, v_BKTD, scale, causal)


def _sdpa(
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    scale: float,
    causal: bool,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    (S, T), grouped = (q_BHSD.shape[2], k_BKTD.shape[2]), q_BHSD.shape[1] != k_BKTD.shape[1]
    options: dict[str, Any] = {"is_causal": True} if causal and S == T and key_mask is None else {}
    if not options and (causal or key_mask is not None):
        mask = torch.ones(S, T, dtype=torch.bool, device=q_BHSD.device)
        mask = mask.tril(T - S) if causal else mask
        options["attn_mask"] = mask if key_mask is None else mask & key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTD, scale=scale, enable_gqa=grouped, **options)


def _sdpa_float32(
    q_BHSD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """The same, on upcast values: Torch's kernels for narrow types convert far more often."""
    return _sdpa(q_BHSD.float(), k_BKTD.float(), v_BKTD.float(), scale, causal).to(q_BHSD.dtype)


def _blocks(
    q_BHSD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """Queries in blocks, each with the keys that it may see: two products and a softmax in float32."""
    (B, _, S, D), (K, T) = q_BHSD.shape, k_BKTD.shape[1:3]
    k_NTD, v_NTD = (x.float().reshape(B * K, T, D) for x in (k_BKTD, v_BKTD))
    o_BHSD = torch.empty_like(q_BHSD)
    for start in range(0, S, _QUERIES_PER_BLOCK):
        rows = slice(start, min(start + _QUERIES_PER_BLOCK, S))
        seen = T - S + rows.stop if causal else T
        q_BKgsD = (q_BHSD[:, :, rows].float() * scale).unflatten(1, (K, -1))
        s_NMT = torch.bmm(q_BKgsD.reshape(B * K, -1, D), k_NTD[:, :seen].transpose(1, 2))
        if causal:  # of the keys that the last query of the block sees
            count = rows.stop - rows.start
            later = torch.ones(count, count, dtype=torch.bool).triu_(1)
            s_NMT.unflatten(1, (-1, count))[..., seen - count :].masked_fill_(later, -torch.inf)
        o_NMD = torch.bmm(torch.softmax(s_NMT, dim=-1), v_NTD[:, :seen])
        o_BHSD[:, :, rows] = o_NMD.view(*q_BKgsD.shape).flatten(1, 2)
    return o_BHSD


forms_of_attention = Fastest(sdpa=_sdpa, float32=_sdpa_float32, blocks=_blocks)


def decode_attention(
    q_BHSD: torch.Tensor,
    k_cache_BKND: torch.Tensor,
    v_cache_BKND: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The operator `refllm.ops.decode_attention`, for finite values in every slot."""
    S, N = q_BHSD.shape[2], k_cache_BKND.shape[2]
    steps_S, slots_N = (torch.arange(n, device=q_BHSD.device) for n in (S, N))
    seen_BSN = slots_N < (lengths_B[:, None] - (S - 1) + steps_S)[..., None]
    grouped = q_BHSD.shape[1] != k_cache_BKND.shape[1]
    options: dict[str, Any] = {"attn_mask": seen_BSN[:, None], "scale": scale, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(q_BHSD, k_cache_BKND, v_cache_BKND, **options)
