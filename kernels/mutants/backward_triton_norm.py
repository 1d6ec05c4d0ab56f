"""Mutants of the Triton kernels of the gradients of norms, rotations and activations."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, planted

_BLOCK = "block = (tl.program_id(0) // tiles).to(tl.int64)"
_DX = "dx = scale * ((g - shift if LAYER else g) - n * mean)"
_MEAN = "tl.div_rn(tl.sum(g * (r * scale), 0), E * 1.0)"
_DY_LOAD = "dy = tl.load(dy_ptr + tl.multiple_of(row * dy_stride, CHUNK) + columns"
_LAST_ROWS = "for row in range(block * ROWS, tl.minimum((block + 1) * ROWS, N)):"
_PROGRAMS = "programs, tiles = triton.cdiv(N, tile.rows)"
_ROW_STORE = "tl.store(dx_ptr + row * E + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)"

# fmt: off
_rms = partial(planted, "rms_norm_backward", "norm_backward")
RMS_NORM = (
    _rms("no correction", "dx lacks the term that 1 / rms depends on x too", "one-line: missing term",
         (_DX, "dx = scale * (g - shift if LAYER else g)")),
    _rms("correction over the tile", "the mean of the correction counts the padding lanes of a ragged row",
         "one-line: wrong reduction", (_MEAN, _MEAN.replace("E * 1.0", "BLOCK_E * 1.0")),
         ("columns, E, eps, LAYER: tl.constexpr):", "columns, E, eps, LAYER: tl.constexpr, BLOCK_E: tl.constexpr):"),
         ("_statistics(r, g, columns, E, eps, LAYER)", "_statistics(r, g, columns, E, eps, LAYER, BLOCK_E)")),
    _rms("weight forgotten", "dx is that of a norm without a weight", "karpathy/llm.c#763",
         ("g = dy * weight", "g = dy")),
    _rms("dw with the weight", "dw is the sum of w dy n", "one-line: missing term",
         ("dweight += dy * n", "dweight += g * n")),
    _rms("dw of x", "dw is the sum of dy x, not of dy x / rms(x)", "one-line: missing term",
         ("dweight += dy * n", "dweight += dy * r")),
    _rms("row offset in 32 bits", "the offset of a row is formed in int32, which ends at 2^31 elements",
         "linkedin/Liger-Kernel#804", (_BLOCK, "block = tl.program_id(0) // tiles")),
    _rms("dy read with the stride of x", "rows of dy are looked for where those of x are", "flagos-ai/FlagGems#1084",
         (_DY_LOAD, _DY_LOAD.replace("dy_stride", "x_stride"))),
    _rms("last rows left out", "a program takes whole blocks of rows, and the last, partial one is not there",
         "BobMcDear/attorch#18", (_PROGRAMS, "programs, tiles = N // tile.rows")),
    _rms("rows past the last", "the last program takes rows that do not exist", "fla-org/flash-linear-attention#795",
         (_LAST_ROWS, "for row in range(block * ROWS, (block + 1) * ROWS):")),
    _rms("dw of the last row of a block", "each row overwrites the sums of its program",
         "one-line: missing accumulation", ("dweight += dy * n", "dweight = dy * n")),
    _rms("sums of the first 64 programs", "the kernel that adds up the programs' sums takes one step",
         "one-line: missing accumulation",
         ("for start in range(0, P, BLOCK_P):", "for start in range(0, BLOCK_P, BLOCK_P):")),
    _rms("sums past the last program", "the kernel that adds up the programs' sums reads past them", "one-line: tiles",
         ("mask = (p < P)[:, None] & (columns < E)[None, :]", "mask = (p >= 0)[:, None] & (columns < E)[None, :]")),
    _rms("sums in bfloat16", "the programs' sums are kept in bfloat16", "linkedin/Liger-Kernel#950",
         ("sums = [dy.new_empty((programs, E) if asked else (0, 0), dtype=torch.float32)",
          "sums = [dy.new_empty((programs, E) if asked else (0, 0), dtype=torch.bfloat16)"),
         dtypes=("float16", "float32")),
    _rms("store without a mask", "the padding lanes of a ragged row are stored, over the start of the next row",
         "fla-org/flash-linear-attention#795", (_ROW_STORE, _ROW_STORE.replace(", mask=inside", ""))),
    _rms("dx with the stride of x", "rows of dx are stored as far apart as those of x", "flagos-ai/FlagGems#5235",
         (_ROW_STORE, _ROW_STORE.replace("row * E", "row * x_stride"))),
    _rms("dx over dy", "dx is written over dy, which the caller holds", "linkedin/Liger-Kernel#1305",
         ("    dy, x = rows(dy), rows(x)\n", "    dy, x = rows(dy), rows(x)\n    dx = dy\n")),
    _rms("mean of the statistics rounded", "the kept mean of the correction of a long row is rounded to bfloat16",
         "pytorch/helion#2273",
         ("mean = tl.load(statistics_ptr + row * 5 + 4)",
          "mean = tl.load(statistics_ptr + row * 5 + 4).to(tl.bfloat16).to(tl.float32)"), dtypes=("float32",)),
    _rms("1 / rms of a long row squared", "the kept mean of the correction lacks 1 / rms(x)", "one-line: scale",
         ("tl.sum(products, 0) * scale", "tl.sum(products, 0)")),
)

_layer = partial(planted, "layer_norm_backward", "norm_backward")
LAYER_NORM = (
    _layer("no mean", "dx lacks the term that the mean depends on x too", "one-line: missing term",
           (_DX, "dx = scale * (g - n * mean)")),
    _layer("no correction", "dx lacks the term that sigma depends on x too", "one-line: missing term",
           (_DX, "dx = scale * (g - shift)")),
    _layer("mean over the tile", "the mean of g counts the padding lanes", "one-line: wrong reduction",
           ("shift = tl.div_rn(tl.sum(g, 0), E * 1.0)", "shift = tl.div_rn(tl.sum(g, 0), g.shape[0] * 1.0)")),
    _layer("padding in the variance", "the padding lanes of a ragged row count as (0 - mean)^2",
           "Dao-AILab/quack 9310d47",
           ("return tl.where(columns < E, (r.to(tl.float32) - centre) - rest, 0.0)",
            "return (r.to(tl.float32) - centre) - rest")),
    _layer("db with the weight", "db is the sum of w dy", "one-line: missing term", ("dbias += dy\n", "dbias += g\n")),
    _layer("db of the last row of a block", "each row overwrites the sum of its program",
           "one-line: missing accumulation", ("dbias += dy\n", "dbias = dy\n")),
    _layer("db in the place of dw", "both sums are stored in one place", "one-line: swapped",
           ('"dweight_ptr": sums[0], "dbias_ptr": sums[1]', '"dweight_ptr": sums[0], "dbias_ptr": sums[0]')),
    _layer("last rows left out", "the last, partial block of rows is not there", "BobMcDear/attorch#18",
           (_PROGRAMS, "programs, tiles = N // tile.rows")),
    _layer("dy read with the stride of x", "rows of dy are looked for where those of x are", "flagos-ai/FlagGems#1084",
           (_DY_LOAD, _DY_LOAD.replace("dy_stride", "x_stride"))),
    _layer("centred once", "a row is centred once, and the mean of what is left counts in sigma", "one-line: norm",
           ("rest = tl.div_rn(tl.sum(_centred(r, centre, 0.0, columns, E), 0), E * 1.0)", "rest = 0.0"),
           dtypes=("float32",)),
)

_add_rms = partial(planted, "add_rms_norm_backward", "norm_backward")
_DSUM_ROW = "dsum_row = dsum_ptr + tl.multiple_of(row * dsum_stride, CHUNK)"
ADD_RMS_NORM = (
    _add_rms("dsum left out", "the gradient of the sum that is handed on is left out", "one-line: missing term",
             ("dx += tl.load(dsum_row + columns", "dx += 0.0 * tl.load(dsum_row + columns")),
    _add_rms("gradients added before the norm", "dsum goes through the norm with dy", "Dao-AILab/quack#53",
             ("dx += tl.load(dsum_row + columns, mask=inside, other=0.0).to(tl.float32)",
              "dx += scale * tl.load(dsum_row + columns, mask=inside, other=0.0).to(tl.float32)")),
    _add_rms("dsum read with the stride of dy", "rows of dsum are looked for where those of dy are",
             "Dao-AILab/flash-attention#355", (_DSUM_ROW, _DSUM_ROW.replace("dsum_stride", "dy_stride"))),
    _add_rms("norm of x alone", "the statistics are those of x, without the residual", "one-line: missing term",
             ("r = load_sum(x_row, residual_row, columns, E, ADD).to(tl.float32)\n        g = dy",
              "r = load_sum(x_row, residual_row, columns, E, False).to(tl.float32)\n        g = dy")),
    _add_rms("rounded before dsum", "what comes through the norm is rounded before dsum is added",
             "one-line: extra rounding",
             (_DX, f"{_DX}\n            dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32)"), dtypes=NARROW,
             equivalent="the definition rounds there too"),
    _add_rms("residual read with the stride of x", "rows of the residual are looked for where those of x are",
             "Dao-AILab/flash-attention#355",
             ("residual_row = residual_ptr + tl.multiple_of(row * residual_stride, CHUNK) if ADD",
              "residual_row = residual_ptr + tl.multiple_of(row * x_stride, CHUNK) if ADD")),
)

_add_layer = partial(planted, "add_layer_norm_backward", "norm_backward")
ADD_LAYER_NORM = (
    _add_layer("dsum left out", "the gradient of the sum that is handed on is left out", "one-line: missing term",
               ("dx += tl.load(dsum_row + columns", "dx += 0.0 * tl.load(dsum_row + columns")),
    _add_layer("dsum in db", "db is the sum of dy and dsum", "one-line: missing term",
               ("dbias += dy\n",
               "dbias += dy\n            dbias += tl.load(dsum_ptr + tl.multiple_of(row * dsum_stride, "
                "CHUNK) + columns, mask=inside, other=0.0).to(tl.float32)\n")),
    _add_layer("no mean", "dx lacks the term that the mean depends on x too", "one-line: missing term",
               (_DX, "dx = scale * (g - n * mean)")),
    _add_layer("sums of the first 64 programs", "the kernel that adds up the programs' sums takes one step",
               "one-line: missing accumulation",
               ("for start in range(0, P, BLOCK_P):", "for start in range(0, BLOCK_P, BLOCK_P):")),
)

_rope = partial(planted, "rope_backward", "rope_backward")
ROPE = (
    _rope("turned forwards", "the gradient is turned by the angle itself", "NVIDIA/apex#1750",
          ("back=True", "back=False")),
    _rope("cos for sin", "the tables are taken for each other", "one-line: swapped",
          ("plan_rotation(dq, dk, cos, sin, interleaved", "plan_rotation(dq, dk, sin, cos, interleaved")),
    _rope("other pairs", "pairs lie side by side where they lie apart, and the reverse", "sgl-project/sglang#30342",
          ("plan_rotation(dq, dk, cos, sin, interleaved", "plan_rotation(dq, dk, cos, sin, not interleaved")),
    _rope("dk for dq", "the results are returned for each other where they are as large", "one-line: swapped",
          ("    return found[0], found[1]",
          "    return (found[1], found[0]) if dq.shape == dk.shape else tuple(found)")),
    _rope("one table", "every sequence is turned by the table of the first", "linkedin/Liger-Kernel#477",
          ("plan_rotation(dq, dk, cos, sin,",
          "plan_rotation(dq, dk, cos[:1].expand_as(cos) if cos.ndim == 3 else cos, sin,")),
)

_norm_rope = partial(planted, "norm_rope_backward", "norm_rope_backward")
_TURNED = "da, db = da * cos + db * sin, db * cos - da * sin"
NORM_ROPE = (
    _norm_rope("turned forwards", "the gradient is turned by the angle itself", "NVIDIA/apex#1750",
               (_TURNED, "da, db = da * cos - db * sin, db * cos + da * sin")),
    _norm_rope("not turned", "the rotation is left out", "one-line: missing term", (f"    {_TURNED}\n", "")),
    _norm_rope("weight forgotten", "dq and dk are those of a norm without weight", "karpathy/llm.c#763",
               ("ga, gb, grest = wa * da, wb * db, wrest * drest", "ga, gb, grest = da, db, drest")),
    _norm_rope("no correction", "dq and dk lack their correction", "one-line: missing term",
               ("scale * (ga - a * mean), scale * (gb - b * mean)", "scale * ga, scale * gb")),
    _norm_rope("correction of the pairs alone", "the mean of the correction leaves out the dims that are not rotated",
               "one-line: wrong reduction",
               ("mean = _mean(ga * a, gb * b, grest * rest, D)", "mean = _mean(ga * a, gb * b, 0.0 * rest, D)")),
    _norm_rope("rest without the correction", "dims that are not rotated lack the correction", "one-line: missing term",
               ("scale * (grest - rest * mean)", "scale * grest")),
    _norm_rope("dw before the rotation", "the gradient of the weight is that of a gradient that is not turned back",
               "one-line: missing term",
               (_TURNED, f"pa, pb = da, db\n    {_TURNED}"),
               ("return da * a, db * b, drest * rest", "return pa * a, pb * b, drest * rest")),
    _norm_rope("dw of the last token of a block", "each token overwrites the sums of its program",
               "one-line: missing accumulation",
               ("sum_a, sum_b, sum_rest = sum_a + terms_a, sum_b + terms_b, sum_rest + terms_rest",
                "sum_a, sum_b, sum_rest = terms_a, terms_b, terms_rest")),
    _norm_rope("last tokens left out", "the last, partial block of tokens is not there", "BobMcDear/attorch#18",
               ("triton.cdiv(B * S, tile.tokens)", "(B * S) // tile.tokens")),
    _norm_rope("q's weight for k", "the weight of the first query head is that of all key heads", "ROCm/aiter#4659",
               ("_plan_heads(dk, k, k_weight, *how", "_plan_heads(dk, k, q_weight[:1].expand_as(k_weight), *how")),
    _norm_rope("d read with the strides of x", "the heads of the gradient are looked for where those of x are",
               "Dao-AILab/flash-attention#355",
               ("d_rows = head_rows(heads, b, s, d_stride_b, d_stride_h, d_stride_s, CHUNK)",
                "d_rows = head_rows(heads, b, s, x_stride_b, x_stride_h, x_stride_s, CHUNK)")),
)

_swiglu = partial(planted, "swiglu_backward", "swiglu_backward")
_DGATE = "dgate = dh * up * (s * (1.0 + gate * rest))"
SWIGLU = (
    _swiglu("slope of the logistic", "silu'(x) is taken for s (1 - s)", "one-line: missing term",
            (_DGATE, "dgate = dh * up * (s * rest)")),
    _swiglu("up forgotten", "dgate lacks its factor up", "one-line: missing term",
            (_DGATE, _DGATE.replace(" * up", ""))),
    _swiglu("sign in the slope", "silu'(x) is s (1 - x (1 - s))", "one-line: sign",
            (_DGATE, _DGATE.replace("1.0 + gate", "1.0 - gate"))),
    _swiglu("1 - s where e overflows", "1 - s is e s, which is infinite times 0 below -88", "vllm-project/vllm#56578",
            ("rest = tl.where(gate < -80.0, 1.0, tl.where(gate > 100.0, 0.0, e * s))", "rest = e * s")),
    _swiglu("gate for silu(gate)", "dup is dh times gate", "one-line: missing term",
            ("(dh * silu).to(dup", "(dh * gate).to(dup")),
    _swiglu("dgate where dup belongs", "both results are written to one place", "unslothai/unsloth#3314",
            ("tl.store(dup_ptr + row * F + columns, (dh * silu)",
            "tl.store(dgate_ptr + row * F + columns, (dh * silu)")),
    _swiglu("row pointer not advanced", "dup of every row is written to the first",
            "ByteDance-Seed/Triton-distributed#180",
            ("tl.store(dup_ptr + row * F + columns", "tl.store(dup_ptr + columns")),
    _swiglu("row offset in 32 bits", "the offset of a row is formed in int32", "linkedin/Liger-Kernel#804",
            ("row = (tl.program_id(0) // tiles).to(tl.int64)", "row = tl.program_id(0) // tiles")),
    _swiglu("up read with the stride of gate", "rows of up are looked for where those of gate are",
            "pytorch/pytorch#146377",
            ("up_ptr + row * up_stride", "up_ptr + row * gate_stride")),
    _swiglu("dh read with the stride of gate", "rows of dh are looked for where those of gate are",
            "Dao-AILab/flash-attention#355",
            ("dh_ptr + row * dh_stride", "dh_ptr + row * gate_stride")),
    _swiglu("store without a mask", "the padding lanes of a ragged row are stored",
            "fla-org/flash-linear-attention#795",
            ("(dh * silu).to(dup_ptr.dtype.element_ty), mask=columns < F)",
            "(dh * silu).to(dup_ptr.dtype.element_ty))")),
    _swiglu("last tile left out", "the last, partial tile of a row is not there", "ROCm/aiter#4244",
            ("(N * triton.cdiv(F, block),)", "(N * max(1, F // block),)"),
            ("tiles = tl.cdiv(F, BLOCK_F)", "tiles = tl.maximum(1, F // BLOCK_F)")),
)

_relu2 = partial(planted, "relu2_backward", "relu2_backward")
_RELU = "dx = 2.0 * tl.where(x < 0.0, 0.0, x) * dy"
RELU2 = (
    _relu2("factor 2 forgotten", "dx is max(x, 0) dy", "one-line: scale", (_RELU, _RELU.replace("2.0 * ", ""))),
    _relu2("slope of a square", "dx is 2 x dy, for negative x too", "one-line: missing term",
           (_RELU, "dx = 2.0 * x * dy")),
    _relu2("NaN swallowed", "a NaN in x gives 0", "one-line: NaN", (_RELU, "dx = 2.0 * tl.maximum(x, 0.0) * dy")),
    _relu2("slope of relu", "dx is dy where x is positive", "one-line: missing term",
           (_RELU, "dx = tl.where(x > 0.0, dy, 0.0)")),
    _relu2("dy read with the stride of x", "rows of dy are looked for where those of x are", "pytorch/pytorch#146377",
           ("dy_ptr + row * dy_stride", "dy_ptr + row * x_stride")),
    _relu2("row offset in 32 bits", "the offset of a row is formed in int32", "linkedin/Liger-Kernel#804",
           ("row = (tl.program_id(0) // tiles).to(tl.int64)", "row = tl.program_id(0) // tiles")),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *RMS_NORM, *LAYER_NORM, *ADD_RMS_NORM, *ADD_LAYER_NORM, *ROPE, *NORM_ROPE, *SWIGLU, *RELU2
)  # fmt: skip
