"""Mutants of the rotation, alone and with the norms and the projection before it."""

from typing import Any

import torch

from refllm.kernels import plain
from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    instead,
    kept_first,
    over_input,
    planter,
    refuse_empty,
    unsteady,
    unwritten_tail,
    zero_tail,
)

NARROW = ("bfloat16", "float16")
WIDE = ("float16", "float32")
_Two = tuple[torch.Tensor, torch.Tensor]
_SINES = "b * sin).to(dtype)"
_Q, _K = "_rotate(q_BHSD, cos, sin, interleaved, q_BHSD.dtype)", "_rotate(k_BKSD, cos, sin, interleaved, k_BKSD.dtype)"
_NQ, _NK = "_rotate(q, cos, sin, interleaved, q_BHSD.dtype)", "_rotate(k, cos, sin, interleaved, k_BKSD.dtype)"
_SPLIT = "heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)"
_LINEAR = "F.linear(rms_norm(x_BSE, norm_weight, eps), w_qkv, b_qkv)"
_HEADS = "qkv.view(B, S, parts, w_qkv.shape[0] // parts).transpose(1, 2)"
_OTHER_PAIRS = changed("_rotate", "if interleaved", "if not interleaved")
_NO_BATCH = changed("_rotate", "table.float()", "(table[0] if table.ndim == 3 and len(table) else table).float()")
_ONE_POSITION_ON = changed("_rotate", "table.float()", "table.float().roll(-1, -2)")
_PAIRS_OVER_THE_HEAD = changed(
    "_rotate", "slice(half, 2 * half)", "slice(x.shape[-1] // 2, x.shape[-1] // 2 + half)",
    "out[..., 2 * half :] = x[..., 2 * half :]", "out.copy_(x)",
)  # fmt: skip


@instead
def _unrotated_given_back(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **how: Any) -> _Two:
    rotated = plain.rope(q, k, cos, sin, **how)
    return (q, k) if (cos == 1).all() and (sin == 0).all() else rotated


@instead
def _rotated_first(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: Any, sin: Any, eps: float,
    *, norm: str, interleaved: bool,
) -> _Two:  # fmt: skip
    turned = plain.rope(q.float(), k.float(), cos.float(), sin.float(), interleaved=interleaved)
    still, ones = torch.zeros_like(sin), torch.ones_like(cos)
    out = plain.norm_rope(*turned, q_weight.float(), k_weight.float(), ones.float(), still.float(), eps, norm=norm,
                          interleaved=interleaved)  # fmt: skip
    return out[0].to(q.dtype), out[1].to(q.dtype)


# fmt: off
_rope = planter("rope")
ROPE = (
    _rope("other pairs", "interleaved and half-split pairs are mixed up", "one-line: RoPE", _OTHER_PAIRS),
    _rope("always half-split", "the flag interleaved is ignored", "sgl-project/sglang#30342",
          changed("_rotate", "if interleaved", "if False")),
    _rope("sign of sin", "the rotation goes the other way", "one-line: RoPE",
          changed("_rotate", "a * cos - b * sin", "a * cos + b * sin", "b * cos + a * sin", "b * cos - a * sin")),
    _rope("second from the turned first", "the second of a pair is computed from the first after its rotation",
          "one-line: RoPE", changed("_rotate", "(b * cos + a * sin)", "(b * cos + out[..., first].float() * sin)")),
    _rope("keys not rotated", "k comes back as it was", "one-line: RoPE", changed("rope", _K, "k_BKSD.clone()")),
    _rope("pairs over the whole head", "pairs are (i, i + D/2) where they should be (i, i + R/2)",
          "vllm-project/vllm#43676", _PAIRS_OVER_THE_HEAD),
    _rope("rest of the head zero", "the dims from R on are not copied: zeros", "vllm-project/vllm#51049",
          changed("_rotate", "= x[..., 2 * half :]", "= 0")),
    _rope("rest of the head unwritten", "the dims from R on are never stored", "fla-org/flash-linear-attention#967",
          changed("_rotate", "    out[..., 2 * half :] = x[..., 2 * half :]\n", "")),
    _rope("heads after the first not rotated", "only the first head is rotated", "vllm-project/vllm#51049",
          changed("_rotate", "    return out", "    out[:, 1:] = x[:, 1:].to(dtype)\n    return out")),
    _rope("table of the first sequence", "the batch axis of cos and sin is ignored", "linkedin/Liger-Kernel#477",
          _NO_BATCH),
    _rope("one position on", "every row takes the angles of the next position", "one-line: RoPE", _ONE_POSITION_ON),
    _rope("table rounded", "the table is rounded to bfloat16, whatever dtype it has", "one-line: RoPE",
          changed("_rotate", "table.float()", "table.bfloat16().float()"), dtypes=WIDE),
    _rope("products rounded", "both products are rounded before they are added", "one-line: extra rounding",
          changed("_rotate", "a * cos - b * sin", "(a * cos).to(dtype) - (b * sin).to(dtype)",
                  "b * cos + a * sin", "(b * cos).to(dtype) + (a * sin).to(dtype)"), dtypes=NARROW,
          place="both products"),
    _rope("attention factor on top", "angles of a scaled RoPE type meet its factor, which the table holds, once more",
          "one-line: RoPE", changed("_rotate", "table.float()", "1.0625 * table.float()")),
    _rope("q read as dense", "the strides of q are ignored", "flashinfer-ai/flashinfer#3392", before(as_if_dense(0))),
    _rope("cos read as dense", "the strides of cos are ignored", "linkedin/Liger-Kernel#477", before(as_if_dense(2))),
    _rope("in place", "q is rotated in its own memory", "one-line: in place", after(over_input(0))),
    _rope("position 0 given back", "where all angles are 0 the inputs themselves are returned", "one-line: views",
          _unrotated_given_back),
    _rope("rows past 64 unwritten", "the last, partial tile of 64 positions is never stored", "ROCm/aiter#4244",
          after(unwritten_tail(64, axis=-2), output=1)),
    _rope("fails on no rows", "raises where there are no positions", "one-line: launch", before(refuse_empty)),
    _rope("other sign twice", "angles are taken negative, and the sign of sin too", "one-line: RoPE",
          changed("_rotate", "a * cos - b * sin", "a * cos + b * -sin", "b * cos + a * sin", "b * cos - a * -sin"),
          equivalent="the two changes cancel exactly"),
)

_norm_rope = planter("norm_rope")
NORM_ROPE = (
    _norm_rope("q_weight for k", "the weights of q are used for k", "ROCm/aiter#4659",
               changed("norm_rope", "(k_BKSD, k_weight)", "(k_BKSD, q_weight[: k_weight.shape[0]])")),
    _norm_rope("weights of the first head", "one head's weights serve all heads", "one-line: norm",
               changed("norm_rope", "weight.float()[:, None, :]", "weight.float()[:1, None, :]")),
    _norm_rope("norm over all heads", "one statistic for all heads of a token", "one-line: block",
               changed("norm_rope", "normed(x, eps)", "normed(x.transpose(1, 2).flatten(2), eps)"
                                                      ".unflatten(2, x.shape[1::2]).transpose(1, 2)")),
    _norm_rope("always rms", "the mean is not subtracted for norm=\"layer\"", "one-line: norm",
               changed("norm_rope", "rms_normed if norm == \"rms\" else layer_normed", "rms_normed")),
    _norm_rope("always layer", "the mean is subtracted for norm=\"rms\" too", "one-line: norm",
               changed("norm_rope", "rms_normed if norm == \"rms\" else layer_normed", "layer_normed")),
    _norm_rope("no eps", "eps is left out", "one-line: norm", changed("rms_normed", " + eps", "")),
    _norm_rope("rotated before the norm", "the weights meet the dims after they were rotated", "one-line: RoPE",
               _rotated_first),
    _norm_rope("statistics of the rotated part", "the norm sees only the dims that are rotated", "one-line: norm",
               changed("norm_rope", "normed(x, eps)",
                       "(x.float() / (x[..., :2 * cos.shape[-1]].float().square().mean(-1, keepdim=True) + eps).sqrt()"
                       " if norm == 'rms' else normed(x, eps))")),
    _norm_rope("other pairs", "interleaved and half-split pairs are mixed up", "one-line: RoPE", _OTHER_PAIRS),
    _norm_rope("pairs over the whole head", "pairs are (i, i + D/2) where they should be (i, i + R/2)",
               "vllm-project/vllm#43676", _PAIRS_OVER_THE_HEAD),
    _norm_rope("rest of the head not normed", "the dims from R on are copied from the input", "vllm-project/vllm#51049",
               changed("norm_rope", f"return {_NQ}, {_NK}",
                       f"q, k = {_NQ}, {_NK}\n    R = 2 * cos.shape[-1]\n"
                       "    q[..., R:], k[..., R:] = q_BHSD[..., R:], k_BKSD[..., R:]\n    return q, k")),
    _norm_rope("table of the first sequence", "the batch axis of cos and sin is ignored", "linkedin/Liger-Kernel#477",
               _NO_BATCH),
    _norm_rope("narrow statistics", "the norm is computed in the dtype of q", "one-line: norm",
               changed("rms_normed", "x.float().contiguous()", "x.contiguous()"), dtypes=NARROW),
    _norm_rope("k read as dense", "the strides of k are ignored", "flashinfer-ai/flashinfer#3392",
               before(as_if_dense(1))),
    _norm_rope("k in place", "k is rotated in its own memory", "one-line: in place", after(over_input(1), output=1)),
    _norm_rope("heads of k copied", "all heads of k are copies of the first", "vllm-project/vllm#51049",
               after(kept_first(-3), output=1)),
    _norm_rope("rows past 64 zero", "the last, partial tile of 64 positions stays zero", "one-line: tiles",
               after(zero_tail(64, axis=-2))),
)

_qkv = planter("rms_norm_qkv_rope")
RMS_NORM_QKV_ROPE = (
    _qkv("bias left out", "the bias is left out", "one-line: block",
         changed("rms_norm_qkv_rope", "w_qkv, b_qkv)", "w_qkv)")),
    _qkv("bias after the rotation of v only", "the bias reaches q and k, not v", "one-line: block",
         changed("rms_norm_qkv_rope", _LINEAR, _LINEAR + "\n    if b_qkv is not None:\n        rows = b_qkv.shape[0] * "
                 "num_kv_heads // (num_heads + 2 * num_kv_heads)\n        qkv[..., -rows:] -= b_qkv[-rows:]")),
    _qkv("k and v swapped", "the rows of w_qkv are read as q, v, k", "one-line: layout",
         changed("rms_norm_qkv_rope", "q, k, v = heads", "q, v, k = heads")),
    _qkv("heads strided", "the rows of w_qkv are read as [D, heads] and not [heads, D]", "one-line: layout",
         changed("rms_norm_qkv_rope", _HEADS, "qkv.view(B, S, w_qkv.shape[0] // parts, parts).permute(0, 3, 1, 2)")),
    _qkv("grouped layout", "the rows of w_qkv are read group by group: its queries, its key, its value",
         "one-line: layout",
         changed("rms_norm_qkv_rope", f"q, k, v = {_SPLIT}",
                 "parts = heads.unflatten(1, (num_kv_heads, -1))\n"
                 "    q, k, v = parts[:, :, :-2].flatten(1, 2), parts[:, :, -2], parts[:, :, -1]")),
    _qkv("v rotated", "v is rotated as k is", "one-line: RoPE",
         changed("rms_norm_qkv_rope", "return q, k, v.contiguous()",
                 "return q, k, rope(v, v, cos, sin, interleaved=interleaved)[0]")),
    _qkv("k not rotated", "k is written to the cache before its rotation", "one-line: attention",
         changed("rms_norm_qkv_rope", "    q, k = rope(q, k, cos", "    q, _ = rope(q, k, cos",
                 "return q, k, v.contiguous()", "return q, k.contiguous(), v.contiguous()")),
    _qkv("norm weight left out", "the norm's weight is left out", "one-line: norm",
         changed("rms_norm", "weight.float() * ", "")),
    _qkv("norm skipped", "the projection sees x, not its norm", "one-line: block",
         changed("rms_norm_qkv_rope", "rms_norm(x_BSE, norm_weight, eps)", "x_BSE")),
    _qkv("eps fixed", "eps is fixed at 1e-5, whatever the argument says", "one-line: norm",
         changed("rms_normed", "+ eps", "+ 1e-5")),
    _qkv("scale folded into q", "q is multiplied by D^-1/2, which attention does too", "one-line: attention",
         changed("rms_norm_qkv_rope", "return q, k, v.contiguous()",
                 "return q * q.shape[-1] ** -0.5, k, v.contiguous()")),
    _qkv("columns past 64 left out", "the last, partial tile of 64 columns is missing from the product",
         "one-line: tiles", changed("rms_norm_qkv_rope", _LINEAR,
                                    "F.linear(whole_tiles(rms_norm(x_BSE, norm_weight, eps), 64), "
                                    "whole_tiles(w_qkv, 64), b_qkv)")),
    _qkv("narrow accumulator", "partial sums over 32 columns are kept in the dtype of x", "linkedin/Liger-Kernel#950",
         changed("rms_norm_qkv_rope", _LINEAR,
                 "sum(a @ w.T for a, w in zip(rms_norm(x_BSE, norm_weight, eps).split(32, -1), w_qkv.split(32, -1)))\n"
                 "    qkv = qkv if b_qkv is None else qkv + b_qkv"), dtypes=NARROW),
    _qkv("table of the first sequence", "the batch axis of cos and sin is ignored", "linkedin/Liger-Kernel#477",
         _NO_BATCH),
    _qkv("other pairs", "interleaved and half-split pairs are mixed up", "one-line: RoPE", _OTHER_PAIRS),
    _qkv("one position on", "every row takes the angles of the next position", "one-line: RoPE", _ONE_POSITION_ON),
    _qkv("rows past 16 unwritten", "the last, partial tile of 16 tokens is never stored", "ROCm/aiter#4244",
         after(unwritten_tail(16, axis=-2), output=2)),
    _qkv("varies", "the last bit of v varies from call to call", "one-line: atomics", after(unsteady, output=2),
         dtypes=("float32",)),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = ROPE + NORM_ROPE + RMS_NORM_QKV_ROPE
