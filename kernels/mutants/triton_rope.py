"""Mutants of the rotary kernels: kernels/triton/rope.py and norm_rope.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, Change, planted

_TOKEN = "token = (tl.program_id(0) // SHARES).to(tl.int64)  # int64: token * stride passes 2^31 in large tensors"
_TOKEN_32 = "token = tl.program_id(0) // SHARES"
_ROTATED = "a * cos - b * sin, b * cos + a * sin"
_K_ROWS = "x_rows = head_rows(heads, b, s, k_stride_b, k_stride_h, k_stride_s, CHUNK)"
_Q_AS_K = _K_ROWS.replace("k_stride", "q_stride")
_ANGLE_ROW = "row = (b * stride_b + s * stride_s) * CHUNK"
_ANGLES = "return tl.load(table_ptr + row + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)[None, :]"

_rope = partial(planted, "rope", "rope")
ROPE = (
    _rope("wrong pairs", "interleaved pairs are taken for halves and the reverse; at position 0 nothing shows",
          "sgl-project/sglang#30342", ("{\"INTERLEAVED\": interleaved}", "{\"INTERLEAVED\": not interleaved}")),
    _rope("sign of sin", "heads are turned the other way round", "one-line: RoPE",
          (_ROTATED, "a * cos + b * sin, b * cos - a * sin")),
    _rope("rest not written", "dims from R on are left as the memory of the result was",
          "fla-org/flash-linear-attention#967",
          ("    store_rest(y_ptr, y_rows, valid, rest, 2 * HALF, D, BLOCK_REST)\n\n\nSIZES", "\n\nSIZES")),
    _rope("rest rotated too", "a partial rotation takes all dims, and reads the tables past their end",
          "vllm-project/vllm#43676", ("q.shape, k.shape[1], cos.shape[-1]", "q.shape, k.shape[1], q.shape[-1] // 2")),
    _rope("tables read past R", "a table row is read to the next power of two: past the end in the last row",
          "vllm-project/vllm#43676", (_ANGLES, _ANGLES.replace(", mask=pairs < HALF, other=0.0", "")),
          corner="head dim 80, R 20"),
    _rope("one table for all sequences", "the batch stride of cos and sin is ignored: right for one sequence",
          "linkedin/Liger-Kernel#477", (_ANGLE_ROW, "row = (s * stride_s) * CHUNK"),
          corner="positions in any order"),
    _rope("angle of the token before", "positions are off by one, except the first", "one-line: RoPE",
          (_ANGLE_ROW, "row = (b * stride_b + tl.maximum(s - 1, 0) * stride_s) * CHUNK")),
    _rope("bfloat16 tables", "float32 tables are rounded to bfloat16 before they are used", "one-line: RoPE",
          (_ANGLES, _ANGLES.replace(".to(tl.float32)", ".to(tl.bfloat16).to(tl.float32)")),
          corner="float32 tables and weights off the grid", place="tables"),
    _rope("products rounded", "each of the four products is rounded before the sums", "one-line: extra rounding",
          (_ROTATED,
           "(a * cos).to(y_ptr.dtype.element_ty).to(tl.float32) - (b * sin).to(y_ptr.dtype.element_ty).to(tl.float32), "
           "(b * cos).to(y_ptr.dtype.element_ty).to(tl.float32) + (a * sin).to(y_ptr.dtype.element_ty).to(tl.float32)"),
          dtypes=NARROW,
          place="both products"),
    _rope("token offset in 32 bits", "the offset of a token is token * stride in int32, which ends at 2^31 elements",
          "flashinfer-ai/flashinfer#3007", (_TOKEN, _TOKEN_32),
          corner="q past 2^31"),
    _rope("k read with the strides of q", "one set of strides for both: right while q and k are laid out alike",
          "pytorch/pytorch#194719", (_K_ROWS, _Q_AS_K)),
    _rope("k has as many heads as q", "the mask of k's heads counts those of q: k's result is overrun",
          "fla-org/flash-linear-attention#795", ("heads < K, cos", "heads < H, cos")),
    _rope("heads beyond the first tile", "every program of a token takes the first heads, and nobody the others",
          "vllm-project/vllm#51049",
          ("heads = share * BLOCK_H + tl.arange(0, BLOCK_H)", "heads = tl.arange(0, BLOCK_H).to(tl.int64)"),
          corner="40 heads of 128 dims"),
    _rope("result laid out as q", "the rows of the result are stored where q has its own, whatever q's strides",
          "flagos-ai/FlagGems#5235", ("y_rows = ((b * H + heads) * S + s) * D", "y_rows = x_rows"),
          corner="strides, each its own"),
)  # fmt: skip

_RMS_PART = "a, b, rest = weight_a * (a * scale), weight_b * (b * scale), weight_rest * (rest * scale)"
_MEAN = "tl.div_rn(tl.sum(a + b, 1) + tl.sum(rest, 1), D * 1.0)[:, None]"
_norm_rope = partial(planted, "norm_rope", "norm_rope")
NORM_ROPE = (
    _norm_rope("q weight for k", "the heads of k are multiplied with the weights of q", "ROCm/aiter#4659",
               ("k_ptr, k_weight_ptr, k_out_ptr, x_rows", "k_ptr, q_weight_ptr, k_out_ptr, x_rows")),
    _norm_rope("one weight for all heads", "every head of q takes the weight of head 0", "one-line: block",
               ("q_ptr, q_weight_ptr, q_out_ptr, x_rows, heads * D",
                "q_ptr, q_weight_ptr, q_out_ptr, x_rows, heads * 0")),
    _norm_rope("norm over all heads", "the mean is taken over the heads that a program holds, not over each",
               "one-line: block",
               (_MEAN, "tl.zeros([a.shape[0], 1], tl.float32) "
                       "+ tl.div_rn(tl.sum(tl.sum(a + b, 1) + tl.sum(rest, 1), 0), D * a.shape[0] * 1.0)")),
    _norm_rope("mean of the rotated dims", "dims from R on do not count in the mean", "one-line: norm",
               (_MEAN, "tl.div_rn(tl.sum(a + b, 1), D * 1.0)[:, None]")),
    _norm_rope("padding in the variance", "padding lanes of a head count in the variance, as (0 - mean)^2",
               "Dao-AILab/quack 9310d47",
               ("tl.where(in_pair, a - mean, 0.0), tl.where(in_pair, b - mean, 0.0)", "a - mean, b - mean")),
    _norm_rope("rms for layer", "the mean of a head is never subtracted", "one-line: norm",
               ('"LAYER": norm == "layer"', '"LAYER": False')),
    _norm_rope("layer for rms", "the mean of a head is subtracted, whatever norm was asked for", "one-line: norm",
               ('"LAYER": norm == "layer"', '"LAYER": True')),
    _norm_rope("weight after the rotation", "heads are rotated first, and then meet their weights",
               "one-line: norm",
               (_RMS_PART, "a, b, rest = a * scale, b * scale, weight_rest * (rest * scale)"),
               (_ROTATED, "weight_a * (a * cos - b * sin), weight_b * (b * cos + a * sin)")),
    _norm_rope("rest without its weight", "dims from R on are normed and not multiplied with their weight",
               "one-line: norm", (_RMS_PART, _RMS_PART.replace("weight_rest * (rest * scale)", "rest * scale"))),
    _norm_rope("weight in halves", "the weights are read in halves where the pairs are interleaved", "one-line: RoPE",
               ("load_pairs(weight_ptr, weight_rows, valid, HALF, INTERLEAVED, BLOCK)",
                "load_pairs(weight_ptr, weight_rows, valid, HALF, False, BLOCK)")),
    _norm_rope("float32 weight rounded", "float32 weights are rounded to the dtype of q before they are used",
               "vllm-project/vllm#29810",
               (_RMS_PART,
                "narrow = y_ptr.dtype.element_ty\n"
                "    weight_a, weight_b = weight_a.to(narrow), weight_b.to(narrow)\n"
                "    weight_rest = weight_rest.to(narrow)\n"
                f"    {_RMS_PART}"), dtypes=NARROW,
               corner="float32 tables and weights off the grid"),
    _norm_rope("eps outside the root", "eps is added to the root and not to the mean square", "one-line: norm",
               ("scale = inverse_root(_mean(a * a, b * b, rest * rest, D) + eps)",
                "scale = 1.0 / (tl.sqrt(_mean(a * a, b * b, rest * rest, D)) + eps)"),
               corner="tiny heads: eps decides"),
    _norm_rope("token offset in 32 bits", "the offset of a token is token * stride in int32",
               "linkedin/Liger-Kernel#804",
               (_TOKEN, _TOKEN_32),
               corner="q past 2^31"),
    _norm_rope("one table for all sequences", "the batch stride of cos and sin is ignored: right for one sequence",
               "fla-org/flash-linear-attention#902", Change(_ANGLE_ROW, "row = (s * stride_s) * CHUNK", "rope"),
               corner="positions in any order"),
    _norm_rope("k read with the strides of q", "one set of strides for both: right while q and k are laid out alike",
               "Dao-AILab/flash-attention#818", (_K_ROWS, _Q_AS_K)),
    _norm_rope("sign of sin", "heads are turned the other way round",
               "one-line: RoPE", (_ROTATED, "a * cos + b * sin, b * cos - a * sin")),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = ROPE + NORM_ROPE
