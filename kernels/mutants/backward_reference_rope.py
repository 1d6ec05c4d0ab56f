"""Mutants of the gradients of the rotary embedding, alone, after the norms of heads, and after norm and projection."""

from functools import partial
from typing import Any

import torch

from refllm.kernels import plain
from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    in_memory_of,
    instead,
    missing,
    over_input,
    planter,
    refuse_empty,
    strides_of,
    unwritten_tail,
    zero_tail,
)

NARROW = ("bfloat16", "float16")
WIDE = ("float16", "float32")
_TERM, _SIGN, _SCALE, _SUM = "one-line: missing term", "one-line: sign", "one-line: scale", "one-line: wrong reduction"
_ROPE, _SWAPPED, _EXTRA = "one-line: RoPE", "one-line: swapped", "one-line: extra rounding"

_turn = partial(changed, "_turned_back")
_FIRST, _SECOND = "a * cos + b * sin", "b * cos - a * sin"
_FORWARD_AGAIN = _turn(_FIRST, "a * cos - b * sin", _SECOND, "b * cos + a * sin")
_OTHER_PAIRS = _turn("if interleaved:", "if not interleaved:")
_ONE_TABLE = _turn("table.to(d.dtype).unsqueeze(-3)",
                   "(table[:1] if table.ndim == 3 else table).to(d.dtype).unsqueeze(-3)")  # fmt: skip
_REST_LOST = _turn("out[..., 2 * half :] = d[..., 2 * half :]", "out[..., 2 * half :] = 0")
_REST_UNWRITTEN = _turn("    out[..., 2 * half :] = d[..., 2 * half :]\n", "")


def _permuted_in_place(dq: torch.Tensor, dk: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    """Pairs that lie apart are brought together in the memory of dq, and stay there."""
    if 0 not in dq.stride():
        dq.copy_(dq.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if dq.shape[-1] % 2 == 0 else dq.flip(-1))
    return dq, dk, *rest


@instead
def _permuted(dq: torch.Tensor, dk: torch.Tensor, *rest: Any, **how: Any) -> Any:
    got = plain.rope_backward(dq, dk, *rest, **how)
    _permuted_in_place(dq, dk)
    return got


def _later_tables(dq: Any, dk: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    return dq, dk, cos.roll(1, -2), sin.roll(1, -2)


# fmt: off
_rope = planter("rope_backward")
ROPE = (
    _rope("turned forwards", "the gradient is turned by the angle itself, not back", "NVIDIA/apex#1750",
          _FORWARD_AGAIN),
    _rope("sign in one half", "the second of a pair keeps the sign of the forward pass", _SIGN,
          _turn(_SECOND, "b * cos + a * sin")),
    _rope("sign in the other half", "the first of a pair keeps the sign of the forward pass", _SIGN,
          _turn(_FIRST, "a * cos - b * sin")),
    _rope("cosine alone", "the terms with the sine are missing", _TERM, _turn(_FIRST, "a * cos", _SECOND, "b * cos")),
    _rope("sine missing in one half", "the second of a pair lacks its sine term", _TERM, _turn(_SECOND, "b * cos")),
    _rope("not turned", "dq and dk are handed on as they come", _TERM, _turn(_FIRST, "a", _SECOND, "b")),
    _rope("other pairs", "pairs lie side by side where they lie apart, and the reverse", "sgl-project/sglang#30342",
          _OTHER_PAIRS),
    _rope("cos for sin", "the tables are taken for each other", _SWAPPED,
          _turn("for table in (cos, sin))", "for table in (sin, cos))")),
    _rope("one table", "every sequence is turned by the table of the first", "linkedin/Liger-Kernel#477", _ONE_TABLE),
    _rope("positions off by one", "each token is turned by the angle of the one before", _ROPE, before(_later_tables)),
    _rope("rest lost", "dims past R get the gradient 0", _ROPE, _REST_LOST),
    _rope("rest unwritten", "dims past R are never stored", "fla-org/flash-linear-attention#967", _REST_UNWRITTEN),
    _rope("whole head turned", "the pairs are those of a rotation of the whole head", "vllm-project/vllm#43676",
          _turn("slice(half, 2 * half)", "slice(d.shape[-1] - half, d.shape[-1])")),
    _rope("dk as it comes", "the gradient of the keys is not turned", _TERM,
          changed("rope_backward", "return dq.to(dq_BHSD.dtype), dk.to(dk_BKSD.dtype)",
                  "return dq.to(dq_BHSD.dtype), dk_BKSD.clone()")),
    _rope("heads past the keys'", "of the query heads only as many are turned as there are key heads",
          "vllm-project/vllm#51049",
          changed("rope_backward", "return dq.to(",
                  "dq[:, dk.shape[1] :] = wide(dq_BHSD)[:, dk.shape[1] :]\n    return dq.to(")),
    _rope("layout permuted in place", "dq is rearranged in its own memory, which the caller holds",
          "NVIDIA/Megatron-LM#5981", _permuted),
    _rope("dq turned in place", "the result is written over dq", "unslothai/unsloth#5001", after(over_input(0))),
    _rope("dk in its own memory", "the result is dk itself, turned in place", "unslothai/unsloth#5001",
          after(in_memory_of(1), 1)),
    _rope("dq read as dense", "the strides of dq are ignored", "Dao-AILab/flash-attention#818", before(as_if_dense(0))),
    _rope("dk read as dense", "the strides of dk are ignored", "Dao-AILab/flash-attention#818", before(as_if_dense(1))),
    _rope("dk read with strides of dq", "dk is read with the strides of dq", "Dao-AILab/flash-attention#355",
          before(strides_of(1, 0))),
    _rope("tables read as dense", "the strides of cos are ignored", "one-line: strides", before(as_if_dense(2))),
    _rope("tables in bfloat16", "cos and sin are rounded to bfloat16", "one-line: narrow",
          _turn("table.to(d.dtype)", "table.bfloat16().to(d.dtype)"), dtypes=WIDE),
    _rope("products rounded", "each product is rounded before the sum", _EXTRA,
          _turn(_FIRST, "wide((a * cos).bfloat16()) + wide((b * sin).bfloat16())",
                _SECOND, "wide((b * cos).bfloat16()) - wide((a * sin).bfloat16())"), dtypes=("bfloat16",),
          place="both products"),
    _rope("length scaled", "the sum is divided by the square root of 2", _SCALE,
          _turn(_FIRST, f"({_FIRST}) / 2 ** 0.5")),
    _rope("odd dims unwritten", "the last, partial tile of 16 dims is never stored", "ROCm/aiter#4244",
          after(unwritten_tail(16))),
    _rope("tokens past 4 left at 0", "the last, partial tile of 4 tokens of dk stays at 0", "ROCm/aiter#4244",
          after(zero_tail(4, -2), 1)),
    _rope("dk missing", "the keys get no gradient", "one-line: missing gradient", after(missing, 1)),
    _rope("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
)

_norm = planter("norm_rope_backward")
_norm_rope = partial(changed, "norm_rope_backward")
_rms = partial(changed, "through_rms_norm")
NORM_ROPE = (
    _norm("turned forwards", "the gradient is turned by the angle itself, not back", "NVIDIA/apex#1750",
          _FORWARD_AGAIN),
    _norm("not turned", "the rotation is left out", _TERM,
          _norm_rope("_turned_back(wide(dq_BHSD), cos, sin, interleaved)", "wide(dq_BHSD)")),
    _norm("other pairs", "pairs lie side by side where they lie apart, and the reverse", "sgl-project/sglang#30342",
          _OTHER_PAIRS),
    _norm("one table", "every sequence is turned by the table of the first", "linkedin/Liger-Kernel#477", _ONE_TABLE),
    _norm("rest lost", "dims past R get the gradient 0", _ROPE, _REST_LOST),
    _norm("weight of q for k", "the weight of the first query head is that of all key heads", "ROCm/aiter#4659",
          _norm_rope("_per_head(k_weight)", "_per_head(q_weight[:1])")),
    _norm("weight of one head", "every head has the weight of the first", "one-line: heads",
          changed("_per_head", "wide(weight_HD)[:, None, :]", "wide(weight_HD)[:1, None, :]")),
    _norm("weight forgotten", "dq and dk are those of a norm without weight", "karpathy/llm.c#763",
          changed("_per_head", "wide(weight_HD)[:, None, :]", "torch.ones_like(wide(weight_HD))[:, None, :]")),
    _norm("no correction", "dq and dk of an RMSNorm lack their correction", _TERM,
          _rms(" - n * (g * n).mean(-1, keepdim=True)", "")),
    _norm("correction over tokens", "the mean of the correction is over the tokens of a head too", _SUM,
          _rms("(g * n).mean(-1", "(g * n).mean((-2, -1)")),
    _norm("mean kept", "the LayerNorm's gradient does not lose its mean", _TERM,
          changed("through_layer_norm", " - g.mean(-1, keepdim=True)", "")),
    _norm("always rms", "a LayerNorm is taken for an RMSNorm", "one-line: norm",
          _norm_rope('through_rms_norm if norm == "rms" else through_layer_norm', "through_rms_norm")),
    _norm("dw over heads", "the gradients of the weights are summed over the heads as well", _SUM,
          _norm_rope("q_terms.sum((0, 2))", "q_terms.sum((0, 1, 2)).expand_as(q_weight)")),
    _norm("dw of the first sequence", "the gradient of a weight is that of the first sequence",
          "one-line: missing accumulation",
          _norm_rope("q_terms.sum((0, 2))", "q_terms[:1].sum((0, 2))")),
    _norm("dw of the last token", "the gradient of a weight is that of the last token",
          "one-line: missing accumulation",
          _norm_rope("k_terms.sum((0, 2))", "k_terms[:, :, -1:].sum((0, 2))")),
    _norm("dw before the rotation", "the gradient of the weight is that of what comes in, not turned back", _TERM,
          _norm_rope("dq_weight, dk_weight = q_terms",
                     "_, q_terms = through(wide(dq_BHSD), wide(q_BHSD), _per_head(q_weight), eps)\n"
                     "    dq_weight, dk_weight = q_terms")),
    _norm("dw of k for q", "the gradients of the two weights are taken for each other where they are as large",
          _SWAPPED,
          _norm_rope("return dq.to",
                     "dq_weight, dk_weight = (dk_weight, dq_weight) if dq_weight.shape == dk_weight.shape "
                     "else (dq_weight, dk_weight)\n    return dq.to")),
    _norm("no eps", "1 / rms is computed without eps", "one-line: eps",
          changed("norm_rope_backward", "through = through_rms_norm", "eps = 0.0\n    through = through_rms_norm")),
    _norm("dq over q", "dq is written over q, which was kept", "linkedin/Liger-Kernel#272", after(over_input(2))),
    _norm("q read with strides of dq", "q is read with the strides of dq", "Dao-AILab/flash-attention#355",
          before(strides_of(2, 0))),
    _norm("dk read as dense", "the strides of dk are ignored", "Dao-AILab/flash-attention#818", before(as_if_dense(1))),
    _norm("rounded between", "what is turned back is rounded before it goes through the norm", _EXTRA,
          _norm_rope("_turned_back(wide(dq_BHSD), cos, sin, interleaved)",
                     "wide(_turned_back(wide(dq_BHSD), cos, sin, interleaved).to(dq_BHSD.dtype))"), dtypes=NARROW,
          equivalent="the definition rounds there too"),
    _norm("dw kept in bfloat16", "the gradient of the weight is added up in bfloat16", "linkedin/Liger-Kernel#950",
          _norm_rope("q_terms.sum((0, 2))", "narrow_sum(q_terms.transpose(1, 2).flatten(0, 1), 1)")),
)

_qkv = planter("rms_norm_qkv_rope_backward")
_projected = partial(changed, "rms_norm_qkv_rope_backward")
_DQKV = "torch.cat([dq, dk, dv_BKSD], 1)"
_HEADS = ".transpose(1, 2).reshape(B, S, len(w_qkv))"
QKV = (
    _qkv("values left out", "dx lacks the part that comes through the values", _TERM,
         _projected(_DQKV, "torch.cat([dq, dk, torch.zeros_like(dv_BKSD)], 1)")),
    _qkv("keys left out", "dx lacks the part that comes through the keys", _TERM,
         _projected(_DQKV, "torch.cat([dq, torch.zeros_like(dk), dv_BKSD], 1)")),
    _qkv("keys for values", "the gradients of keys and values are taken for each other", _SWAPPED,
         _projected(_DQKV, "torch.cat([dq, dv_BKSD, dk], 1)")),
    _qkv("split by the wrong count", "the heads of q are counted as those of k",
         "XunhaoLai/native-sparse-attention-triton#27",
         _projected(_DQKV, "torch.cat([dk, dq, dv_BKSD], 1)")),
    _qkv("not turned back", "the gradients of q and k go into the product as they come", _TERM,
         _projected("torch.cat([dq, dk,", "torch.cat([dq_BHSD, dk_BKSD,")),
    _qkv("values turned too", "the gradient of the values is turned back as well", _ROPE,
         _projected(_DQKV,
                    "torch.cat([dq, dk, rope_backward(dv_BKSD, dv_BKSD, cos, sin, interleaved=interleaved)[0]], 1)")),
    _qkv("turned forwards", "the gradient is turned by the angle itself, not back", "NVIDIA/apex#1750", _FORWARD_AGAIN),
    _qkv("other pairs", "pairs lie side by side where they lie apart, and the reverse", "sgl-project/sglang#30342",
         _OTHER_PAIRS),
    _qkv("one table", "every sequence is turned by the table of the first", "linkedin/Liger-Kernel#477", _ONE_TABLE),
    _qkv("heads not moved", "the axes of heads and tokens are merged without being moved", "one-line: transposed",
         _projected(_HEADS, ".reshape(B, S, len(w_qkv))")),
    _qkv("dW of x", "dW is that of x, not of the normed x", _TERM,
         _projected("linear_backward(dqkv_BSC, normed, ", "linear_backward(dqkv_BSC, x_BSE, ")),
    _qkv("norm left out", "dx is that of the projection, without the norm", _TERM,
         _projected("return dx, ", "return dnormed, ")),
    _qkv("norm weight forgotten", "dx is that of a norm without weight", "karpathy/llm.c#763",
         _rms("dy * weight\n", "dy * torch.ones_like(weight)\n")),
    _qkv("no correction", "dx lacks the correction of the norm", _TERM,
         _rms(" - n * (g * n).mean(-1, keepdim=True)", "")),
    _qkv("db of the first sequence", "the bias's gradient is that of the first sequence",
         "one-line: missing accumulation",
         changed("linear_backward", "rows_NO.sum(0)", "wide(dy)[0].reshape(-1, dy.shape[-1]).sum(0)")),
    _qkv("db missing", "the bias gets no gradient", "one-line: missing gradient", after(missing, 3)),
    _qkv("dW of the last sequence", "each sequence overwrites dW", "one-line: missing accumulation",
         changed("linear_backward", "rows_NO.mT @ rows_NI", "wide(dy)[-1].mT @ wide(x)[-1]")),
    _qkv("dW in bfloat16", "dW is added up in bfloat16, 8 rows at a time", "linkedin/Liger-Kernel#950",
         changed("linear_backward", "rows_NO.mT @ rows_NI", "narrow_sum(rows_NO[:, :, None] * rows_NI[:, None, :])")),
    _qkv("dnorm_weight averaged", "the gradient of the norm's weight is the mean over the rows", _SUM,
         changed("over_rows", "sum(0)", "mean(0)")),
    _qkv("dv read as dense", "the strides of dv are ignored", "Dao-AILab/flash-attention#818", before(as_if_dense(2))),
    _qkv("dk read with strides of dv", "dk is read with the strides of dv", "Dao-AILab/flash-attention#355",
         before(strides_of(1, 2))),
    _qkv("dx over x", "dx is written over x, which was kept", "linkedin/Liger-Kernel#272", after(over_input(3))),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = ROPE + NORM_ROPE + QKV
