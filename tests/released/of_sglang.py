"""SGLang: `pip install --no-deps --target CHECKOUTS/sglang sglang`, and what its modules import, such as msgspec."""

import torch
from wrapping import checkout, installed, released

_PACKAGES = ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention")
checkout("sglang", *_PACKAGES)

from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd  # noqa: E402
from sglang.kernels.ops.attention.prefill_attention import context_attention_fwd  # noqa: E402

NAME, VERSION = "SGLang", installed("sglang")


_ONE = ("several_tokens", "empty", "no_keys")


@released(NAME, "decode_attention", "decode_attention_fwd", without=_ONE, sizes="D>=16")
def decode_attention(q, k_cache, v_cache, lengths, *, scale=None):
    B, H, _, D = q.shape
    N = k_cache.shape[2]
    k, v = (x.transpose(1, 2).reshape(B * N, -1, D) for x in (k_cache, v_cache))
    slots = torch.cat([b * N + torch.arange(int(n)) for b, n in enumerate(lengths)]).int()
    begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    o, logits, lse = torch.empty(B, H, D, dtype=q.dtype), torch.empty(B, H, 2, D), torch.empty(B, H, 2)
    splits, scale = torch.full((B,), 2, dtype=torch.int32), D**-0.5 if scale is None else scale
    decode_attention_fwd(q[:, :, 0], k, v, o, begins, slots, logits, lse, splits, 2, scale, 1.0, 1.0)
    return o[:, :, None]


@released(
    NAME,
    "attention",
    "context_attention_fwd",
    without=("key_mask", "return_lse", "empty", "strides"),
    sizes=("S==T", "D>=16"),
)
def attention(q, k, v, *, scale=None, causal=True):
    B, S = q.shape[0], q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    o, begins, lengths = torch.empty_like(q), torch.arange(B) * S, torch.full((B,), S)
    context_attention_fwd(q, k, v, o, begins, lengths, S, causal, scale)
    return o.unflatten(0, (B, S)).transpose(1, 2)
