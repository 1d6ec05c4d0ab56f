"""LightLLM: its repository on the path."""

import torch
from wrapping import checkout, released

_PACKAGES = ("lightllm", "lightllm.models", "lightllm.models.llama")
NAME, VERSION = "LightLLM", checkout("lightllm", *_PACKAGES)

from lightllm.models.llama.triton_kernel.gqa_decode_flashattention_nopad import gqa_decode_attention_fwd  # noqa: E402
from lightllm.models.llama.triton_kernel.rmsnorm import rmsnorm_forward  # noqa: E402
from lightllm.models.llama.triton_kernel.rotary_emb import rotary_emb_fwd  # noqa: E402
from lightllm.models.llama.triton_kernel.silu_and_mul import silu_and_mul_fwd  # noqa: E402


@released(NAME, "rms_norm", "rmsnorm_forward")
def rms_norm(x, weight, eps):
    return rmsnorm_forward(x, weight, eps)


@released(NAME, "swiglu", "silu_and_mul_fwd", without="row_axes")
def swiglu(gate, up):
    y = torch.empty_like(gate)
    silu_and_mul_fwd(torch.cat((gate, up), -1), y)
    return y


_HALVES = ("interleaved", "partial_rotation", "tables_per_row")


@released(NAME, "rope", "rotary_emb_fwd", without=_HALVES, sizes=("D==64", "R==64"))
def rope(q, k, cos, sin, *, interleaved):
    rows = [x.transpose(1, 2).flatten(0, 1).clone() for x in (q, k)]  # written in place
    tables = [t.repeat(len(q), 1) for t in (cos, sin)]
    rotary_emb_fwd(*rows, *tables)
    return tuple(y.view(x.transpose(1, 2).shape).transpose(1, 2) for y, x in zip(rows, (q, k), strict=True))


_ONE = ("several_tokens", "scale", "empty", "no_keys", "strides")


@released(NAME, "decode_attention", "gqa_decode_attention_fwd", without=_ONE, sizes="D==64")
def decode_attention(q, k_cache, v_cache, lengths, *, scale=None):
    B, N, D = len(q), k_cache.shape[2], q.shape[-1]
    k, v = (x.transpose(1, 2).reshape(B * N, -1, D) for x in (k_cache, v_cache))
    slots, rows, o = torch.arange(B * N).view(B, N), torch.arange(B), torch.empty_like(q[:, :, 0])
    gqa_decode_attention_fwd(q[:, :, 0], k, v, o, slots, rows, lengths)
    return o[:, :, None]
