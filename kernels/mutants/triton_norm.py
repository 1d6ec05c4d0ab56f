"""Mutants of the norm kernels, alone and after the residual sum: kernels/triton/rms_norm.py and layer_norm.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, Change, planted

_ROW = "row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors"
_STORE = "tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < E)"
_LOAD = "x = tl.load(x_ptr + columns, mask=columns < E, other=0.0)"
_RMS_SCALE = "scale = inverse_root(tl.div_rn(tl.sum(r32 * r32, 0), E * 1.0) + eps)"
_LAYER_SCALE = "scale = inverse_root(tl.div_rn(tl.sum(centred * centred, 0), E * 1.0) + eps)"
_LAST_WALK = (
    "centred = _centre(load_sum(x_ptr, residual_ptr, start + columns, E, ADD), centre, rest, start + columns, E)\n"
    "            _store_normed"
)

_rms = partial(planted, "rms_norm", "rms_norm")
RMS_NORM = (
    _rms("row offset in 32 bits", "the offset of a row is row * stride in int32, which ends at 2^31 elements",
         "linkedin/Liger-Kernel#804", (_ROW, "row = tl.program_id(0)"),
         corner="offsets past 2^31"),
    _rms("mean over the tile", "the sum of squares is divided by the tile size, so that padding lanes count as zeros",
         "flashinfer-ai/flashinfer#3717", (_RMS_SCALE, _RMS_SCALE.replace("E * 1.0", "BLOCK_E * 1.0"))),
    _rms("eps outside the root", "eps is added to the root mean square and not to the mean square",
         "one-line: norm", (_RMS_SCALE, "scale = 1.0 / (tl.sqrt(tl.sum(r32 * r32, 0) / E) + eps)")),
    _rms("rounded before the weight", "the normed value is rounded before it is multiplied with the weight",
         "vllm-project/vllm#42379",
         ("y = weight * (r.to(tl.float32) * scale)",
          "y = weight * (r.to(tl.float32) * scale).to(y_ptr.dtype.element_ty).to(tl.float32)"), dtypes=NARROW,
         place="before the weight"),
    _rms("float32 weight rounded", "a float32 weight is rounded to the dtype of x before it is used",
         "linkedin/Liger-Kernel#1462",
         ("weight = tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)",
          "weight = tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(r.dtype).to(tl.float32)"),
         dtypes=NARROW,
         corner="float32 weights off the grid"),
    _rms("weight plus one", "the weight is taken as the distance from 1", "one-line: norm",
         ("y = weight * (r.to(tl.float32) * scale)", "y = (1.0 + weight) * (r.to(tl.float32) * scale)")),
    _rms("scale kept in bfloat16", "1 / rms passes through bfloat16: one relative error for a whole row",
         "pytorch/helion#2273", (_RMS_SCALE, f"{_RMS_SCALE}.to(tl.bfloat16).to(tl.float32)")),
    _rms("squares in the dtype of x", "x^2 is formed in float16, where it is infinite from 256 on", "one-line: norm",
         (_RMS_SCALE, _RMS_SCALE.replace("r32 * r32", "(r * r).to(tl.float32)")), dtypes=("float16",)),
    _rms("tail of a long row not written", "of a row longer than a tile the last, ragged piece is never stored",
         "ROCm/aiter#4244",
         ("for start in range(0, E, BLOCK_E):  # the residual sum again",
          "for start in range(0, E - BLOCK_E + 1, BLOCK_E):  # the residual sum again"),
         corner="a row longer than 16384"),
    _rms("only the last tile of a long row in the mean", "of a long row each tile replaces the sum of those before it",
         "one-line: norm", ("squares += r32 * r32", "squares = r32 * r32"),
         corner="a row longer than 16384"),
    _rms("store without a mask", "the padding lanes of a ragged row are stored, over the start of the next row",
         "fla-org/flash-linear-attention#795", (_STORE, _STORE.replace(", mask=columns < E", ""))),
    _rms("result with the stride of x", "rows of the result are stored as far apart as those of x",
         "flagos-ai/FlagGems#5235", ("y_ptr += row * E", "y_ptr += row * x_stride"),
         corner="strides"),
)  # fmt: skip

_add_rms = partial(planted, "add_rms_norm", "rms_norm")
ADD_RMS_NORM = (
    _add_rms("residual read with the stride of x", "the rows of the residual are looked for where those of x are",
             "Dao-AILab/flash-attention#355",
             ("residual_ptr += tl.multiple_of(row * residual_stride, CHUNK)",
              "residual_ptr += tl.multiple_of(row * x_stride, CHUNK)"),
             corner="strides"),
    _add_rms("residual offset in 32 bits", "the offset of the residual's row is formed in int32",
             "linkedin/Liger-Kernel#804",
             ("residual_ptr += tl.multiple_of(row * residual_stride, CHUNK)",
              "residual_ptr += tl.multiple_of(tl.program_id(0) * residual_stride, CHUNK)"),
             corner="residual past 2^31"),
    _add_rms("sum over the residual", "the sum is written into the residual, which the caller still holds",
             "linkedin/Liger-Kernel#1305",
             ("total, residual = torch.empty_like(y), rows(residual)", "total, residual = residual, rows(residual)")),
    _add_rms("sum without x", "what returns as the sum is the residual as it came", "one-line: block",
             ("            tl.store(sum_ptr + columns, r, mask=columns < E)",
              "            tl.store(sum_ptr + columns, tl.load(residual_ptr + columns, mask=columns < E, other=0.0), "
              "mask=columns < E)")),
    _add_rms("mean square of x alone", "the scale is that of x before the residual was added", "one-line: block",
             (_RMS_SCALE,
              "x32 = tl.load(x_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)\n"
              "        scale = inverse_root(tl.div_rn(tl.sum(x32 * x32, 0), E * 1.0) + eps)")),
    _add_rms("residual rounded to bfloat16", "x and the residual meet in bfloat16 whatever their dtype",
             "one-line: extra rounding",
             ("x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)",
              "x = (residual.to(tl.bfloat16) + x.to(tl.bfloat16)).to(x.dtype)"), dtypes=("float16", "float32")),
    _add_rms("sum of a long row stored once", "of a row longer than a tile only the first tile of the sum is stored",
             "ROCm/aiter#4244",
             ("tl.store(sum_ptr + start + columns, r, mask=start + columns < E)",
              "tl.store(sum_ptr + start + columns, r, mask=(start + columns < E) & (start == 0))"),
             corner="a row longer than 16384"),
    _add_rms("added in the dtype of x", "x and the residual are added as bfloat16 numbers",
             "one-line: extra rounding",
             ("x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)", "x = residual + x"), dtypes=NARROW,
             equivalent="a processor adds narrow numbers exactly and rounds once, as float32 and one rounding do"),
)  # fmt: skip

_layer = partial(planted, "layer_norm", "layer_norm")
LAYER_NORM = (
    _layer("row offset in 32 bits", "the offset of a row is row * stride in int32, which ends at 2^31 elements",
           "linkedin/Liger-Kernel#804", (_ROW, "row = tl.program_id(0)"),
           corner="offsets past 2^31"),
    _layer("padding in the variance", "the padding lanes of a ragged row count in the variance, as (0 - mean)^2",
           "Dao-AILab/quack 9310d47",
           ("return tl.where(columns < E, (x.to(tl.float32) - centre) - rest, 0.0)",
            "return (x.to(tl.float32) - centre) - rest")),
    _layer("variance as a difference", "the variance is mean(x^2) - mean(x)^2, which cancels where the mean is large",
           "one-line: norm",
           (_LAYER_SCALE,
            "mean, r32 = centre + rest, r.to(tl.float32)\n"
            "        scale = inverse_root(tl.maximum(tl.sum(r32 * r32, 0) / E - mean * mean, 0.0) + eps)"),
           corner="mean 1000, little spread"),
    _layer("variance over E - 1", "the variance is the unbiased one, divided by E - 1", "one-line: norm",
           (_LAYER_SCALE, _LAYER_SCALE.replace("E * 1.0", "(E - 1) * 1.0"))),
    _layer("not centred", "an RMSNorm: the mean is never subtracted", "one-line: norm",
           ("        centred = _centre(r, centre, rest, columns, E)\n        scale",
            "        centred = r.to(tl.float32)\n        scale")),
    _layer("bias dropped", "the bias is read and not added", "one-line: norm",
           ("y += tl.load(bias_ptr + columns", "y += 0.0 * tl.load(bias_ptr + columns")),
    _layer("bias times the weight", "the bias is added before the weight is multiplied", "one-line: norm",
           ("y = centred * scale * tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)",
            "weight = tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)\n"
            "    y = centred * scale * weight"),
           ("other=0.0).to(tl.float32)\n    tl.store(y_ptr", "other=0.0).to(tl.float32) * weight\n    tl.store(y_ptr")),
    _layer("rounded before the bias", "the scaled value is rounded before the bias is added", "one-line: norm",
           ("    if BIAS:", "    y = y.to(y_ptr.dtype.element_ty).to(tl.float32)\n    if BIAS:"), dtypes=NARROW,
           place="before the bias"),
    _layer("all rows read row 0", "the stride between rows is 0: right for a batch of one",
           "vllm-project/flash-attention#176", ('"x_stride": x.stride(0)', '"x_stride": 0')),
    _layer("long rows centred on their first tile", "of a row longer than a tile the first tile's mean is subtracted",
           "one-line: norm", (_LAST_WALK, _LAST_WALK.replace("centre, rest, start", "centre, 0.0, start")),
           corner="a row longer than 16384"),
    _layer("first guess over the whole row", "the first guess of a long row's mean is divided by E, not by the tile",
           "one-line: norm", ("(E if ONE_TILE else BLOCK_E) * 1.0", "E * 1.0"),
           equivalent="it is only a guess: the second centring takes off whatever mean is left, to the precision that "
           "the definition has in float32"),
)  # fmt: skip

_add_layer = partial(planted, "add_layer_norm", "layer_norm")
ADD_LAYER_NORM = (
    _add_layer("residual stream centred", "the sum that returns has lost the mean of its row", "one-line: block",
               ("            tl.store(sum_ptr + columns, r, mask=columns < E)",
                "            tl.store(sum_ptr + columns, _centre(r, centre, 0.0, columns, E).to(r.dtype), "
                "mask=columns < E)")),
    _add_layer("residual read with the stride of x", "the rows of the residual are looked for where those of x are",
               "Dao-AILab/flash-attention#355",
               ('"residual_stride": 0 if residual is None else residual.stride(0)',
                '"residual_stride": x.stride(0)'),
               corner="strides"),
    _add_layer("residual read without a mask", "padding lanes hold the start of the residual's next row",
               "fla-org/flash-linear-attention#795",
               Change("residual = tl.load(residual_ptr + columns, mask=columns < E, other=0.0)",
                      "residual = tl.load(residual_ptr + columns)", "rms_norm")),
    _add_layer("x without a mask", "padding lanes hold the start of the next row of x, and count in the mean",
               "Dao-AILab/quack 9310d47", Change(_LOAD, "x = tl.load(x_ptr + columns)", "rms_norm")),
    _add_layer("eps outside the root", "eps is added to the deviation and not to the variance", "one-line: norm",
               (_LAYER_SCALE, "scale = 1.0 / (tl.sqrt(tl.sum(centred * centred, 0) / E) + eps)")),
    _add_layer("sum of a long row stored once", "of a row longer than a tile only the first tile of the sum is stored",
               "ROCm/aiter#4244",
               ("tl.store(sum_ptr + start + columns, r, mask=start + columns < E)",
                "tl.store(sum_ptr + start + columns, r, mask=(start + columns < E) & (start == 0))"),
               corner="a row longer than 16384"),
    _add_layer("sum over x", "the sum is written into x, which the caller still holds", "linkedin/Liger-Kernel#1305",
               ("total, residual = torch.empty_like(y), rows(residual)",
                "total, residual = x.reshape(y.shape), rows(residual)")),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = RMS_NORM + ADD_RMS_NORM + LAYER_NORM + ADD_LAYER_NORM
