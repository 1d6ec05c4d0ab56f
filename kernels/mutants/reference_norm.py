"""Mutants of the norms, alone and after the residual sum."""

from typing import Any

import torch

from refllm.kernels import plain
from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    flattened,
    in_float32,
    instead,
    kept_first,
    over_input,
    planter,
    refuse_empty,
    unsteady,
    unwritten_tail,
    without_nan,
    zero_tail,
)

NARROW = ("bfloat16", "float16")
_MEAN_SQUARE = "(x * x).mean(-1, keepdim=True)"
_DENSE_BEFORE = "flashinfer-ai/flashinfer#3392"


@instead
def _residual_in_place(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    residual += x
    return plain.rms_norm(residual, *rest), residual.clone()


@instead
def _residual_given_back(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y, total = plain.add_rms_norm(x, residual, *rest)
    return y, total if x.count_nonzero() else residual


@instead
def _results_swapped(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y, r = plain.add_layer_norm(*arguments)
    return r, y


@instead
def _sum_lost(*arguments: Any) -> torch.Tensor:
    return plain.add_rms_norm(*arguments)[0]


# fmt: off
_rms = planter("rms_norm")
RMS_NORM = (
    _rms("no eps", "eps is left out, so that a row of zeros is 0 / 0", "one-line: norm",
         changed("rms_normed", " + eps", "")),
    _rms("eps outside the root", "eps is added to the root and not to the mean square", "one-line: norm",
         changed("rms_normed", "keepdim=True) + eps)", "keepdim=True)) + eps")),
    _rms("eps fixed", "eps is fixed at 1e-5, whatever the argument says", "one-line: norm",
         changed("rms_normed", "+ eps", "+ 1e-5")),
    _rms("mean subtracted", "a LayerNorm: the mean is subtracted first", "one-line: norm",
         changed("rms_normed", "x.float().contiguous()", "x.float() - x.float().mean(-1, keepdim=True)")),
    _rms("weight plus one", "the weight is taken as an offset from 1", "one-line: norm",
         changed("rms_norm", "weight.float()", "(1 + weight.float())")),
    _rms("rounded before the weight", "x / rms(x) is rounded before it meets the weight", "vllm-project/vllm#42379",
         changed("rms_norm", "rms_normed(x, eps)", "rms_normed(x, eps).to(x.dtype)"), dtypes=NARROW,
         place="before the weight"),
    _rms("weight as an offset", "the weight is formed as 1 + (w - 1) in its own dtype", "linkedin/Liger-Kernel#1462",
         changed("rms_norm", "weight.float()", "(1 + (weight - 1)).float()"), dtypes=NARROW),
    _rms("narrow statistics", "the mean square is computed in the dtype of x", "one-line: norm",
         changed("rms_normed", "x.float().contiguous()", "x.contiguous()"), dtypes=NARROW),
    _rms("rounded root", "the root is kept in bfloat16 between two passes", "pytorch/helion#2273",
         changed("rms_normed", f"torch.sqrt({_MEAN_SQUARE} + eps)", f"({_MEAN_SQUARE} + eps).sqrt().bfloat16()")),
    _rms("mean over the padded row", "the sum is divided by the length of the padded row", "Dao-AILab/quack 9310d47",
         changed("rms_normed", ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True) / (-x.shape[-1] // 64 * -64)")),
    _rms("last tile of 1024 not in the mean", "the last, partial tile of 1024 columns is missing from the mean square",
         "one-line: tiles", changed("rms_normed", "(x * x).mean(", "whole_tiles(x * x, 1024).mean(")),
    _rms("columns past 128 unwritten", "the last, partial tile of 128 columns is never stored", "ROCm/aiter#4244",
         after(unwritten_tail(128))),
    _rms("statistics of the first row", "every row is divided by the root of the first one",
         "vllm-project/flash-attention#176",
         changed("rms_normed", _MEAN_SQUARE, f"{_MEAN_SQUARE}.reshape(-1, 1)[:1]")),
    _rms("x read as dense", "the strides of x are ignored", _DENSE_BEFORE, before(as_if_dense(0))),
    _rms("result over x", "the result is written into x", "linkedin/Liger-Kernel#1305", after(over_input(0))),
    _rms("axes merged", "leading axes are merged and not parted again", "one-line: shapes", after(flattened)),
    _rms("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
)

_layer = planter("layer_norm")
LAYER_NORM = (
    _layer("no eps", "eps is left out, so that a row of equal values is 0 / 0", "one-line: norm",
           changed("layer_normed", " + eps", "")),
    _layer("eps outside the root", "eps is added to the deviation and not to the variance", "one-line: norm",
           changed("layer_normed", "keepdim=True) + eps)", "keepdim=True)) + eps")),
    _layer("mean not subtracted", "an RMSNorm: the mean is not subtracted", "one-line: norm",
           changed("layer_normed", "range(2)", "range(0)")),
    _layer("bias left out", "the bias is left out", "one-line: norm",
           changed("layer_norm", "y if bias is None else y + bias.float()", "y")),
    _layer("bias before the weight", "the bias is added before the weight is multiplied", "one-line: norm",
           changed("layer_norm", "weight.float() * layer_normed(x, eps)",
                   "weight.float() * (layer_normed(x, eps) + (0 if bias is None else bias.float()))",
                   "y if bias is None else y + bias.float()", "y")),
    _layer("bias twice rounded", "the product is rounded before the bias is added", "one-line: extra rounding",
           changed("layer_norm", "layer_normed(x, eps)\n", "layer_normed(x, eps)\n    y = y.to(x.dtype).float()\n"),
           dtypes=NARROW, place="before the bias"),
    _layer("unbiased variance", "the variance is divided by E - 1, as torch.std does", "one-line: norm",
           changed("layer_normed", _MEAN_SQUARE, "((x * x).sum(-1, keepdim=True) / (x.shape[-1] - 1))")),
    _layer("one pass", "the variance is E[x^2] - E[x]^2, which cancels where the mean is large", "one-line: norm",
           changed("layer_normed", "    for _ in", "    raw = x\n    for _ in", _MEAN_SQUARE,
                   "((raw * raw).mean(-1, keepdim=True) - raw.mean(-1, keepdim=True) ** 2)")),
    _layer("padding in the variance", "the padding lanes of a ragged row count in the variance, as (0 - mean)^2",
           "Dao-AILab/quack 9310d47",
           changed("layer_normed", "    for _ in", "    raw = x\n    for _ in", _MEAN_SQUARE,
                   f"({_MEAN_SQUARE} + (-x.shape[-1] % 256) / x.shape[-1] * raw.mean(-1, keepdim=True) ** 2)")),
    _layer("narrow statistics", "mean and variance are computed in the dtype of x", "one-line: norm",
           changed("layer_normed", "x.float().contiguous()", "x.contiguous()"), dtypes=NARROW),
    _layer("weight as an offset", "the weight is formed as 1 + (w - 1) in its own dtype", "linkedin/Liger-Kernel#1462",
           changed("layer_norm", "weight.float()", "(1 + (weight - 1)).float()"), dtypes=NARROW),
    _layer("mean of the first row", "every row is centred with the mean of the first one",
           "vllm-project/flash-attention#176",
           changed("layer_normed", "x.mean(-1, keepdim=True)", "x.mean(-1, keepdim=True).reshape(-1, 1)[:1]")),
    _layer("columns past 64 zero", "the last, partial tile of 64 columns stays zero", "one-line: tiles",
           after(zero_tail(64))),
    _layer("x read as dense", "the strides of x are ignored", _DENSE_BEFORE, before(as_if_dense(0))),
    _layer("float32 result", "the result is float32 whatever x is", "one-line: dtypes", after(in_float32),
           dtypes=NARROW),
    _layer("varies", "the last bit of the result varies from call to call", "one-line: atomics", after(unsteady),
          dtypes=("float32",)),
)

_add_rms = planter("add_rms_norm")
ADD_RMS_NORM = (
    _add_rms("residual left out of the norm", "the norm is that of x alone", "one-line: residual",
             changed("add_rms_norm", "rms_norm(r, weight", "rms_norm(x, weight")),
    _add_rms("sum not returned", "the second result is the residual as it came", "one-line: residual",
             changed("add_rms_norm", ", eps), r", ", eps), residual.clone()")),
    _add_rms("x subtracted", "x is subtracted from the residual", "one-line: residual",
             changed("add_rms_norm", "residual + x", "residual - x")),
    _add_rms("normed value returned as the sum", "the residual stream goes on from the normed value",
             "one-line: residual",
             changed("add_rms_norm", "return rms_norm(r, weight, eps), r",
                     "r = rms_norm(r, weight, eps)\n    return r, r.clone()")),
    _add_rms("residual in place", "the sum is formed in the memory of the residual", "linkedin/Liger-Kernel#1305",
             _residual_in_place),
    _add_rms("residual given back", "where x is zero the residual itself is returned, not a copy", "one-line: views",
             _residual_given_back),
    _add_rms("one result", "only the norm is returned", "one-line: results", _sum_lost),
    _add_rms("rounded before the weight", "the normed value is rounded before it meets the weight",
             "vllm-project/vllm#42379", changed("rms_norm", "rms_normed(x, eps)", "rms_normed(x, eps).to(x.dtype)"),
             dtypes=NARROW, place="before the weight"),
    _add_rms("no eps", "eps is left out, so that a row of zeros is 0 / 0", "one-line: norm",
             changed("rms_normed", " + eps", "")),
    _add_rms("rounded root", "the root is kept in bfloat16 between two passes", "pytorch/helion#2273",
             changed("rms_normed", f"torch.sqrt({_MEAN_SQUARE} + eps)", f"({_MEAN_SQUARE} + eps).sqrt().bfloat16()")),
    _add_rms("residual of the first row", "every row is added to the residual of the first one",
             "vllm-project/flash-attention#176",
             changed("add_rms_norm", "residual + x", "residual.reshape(-1, x.shape[-1])[:1] + x")),
    _add_rms("residual read as dense", "the strides of the residual are ignored", _DENSE_BEFORE,
             before(as_if_dense(1))),
    _add_rms("columns of the sum past 1024 unwritten",
             "the last, partial tile of 1024 columns of the sum is not stored",
             "ROCm/aiter#4244", after(unwritten_tail(1024), output=1)),
    _add_rms("NaN hidden", "a NaN in a row becomes 0", "one-line: NaN", after(without_nan)),
    _add_rms("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
)

_add_layer = planter("add_layer_norm")
ADD_LAYER_NORM = (
    _add_layer("residual left out of the norm", "the norm is that of x alone", "one-line: residual",
               changed("add_layer_norm", "layer_norm(r, weight", "layer_norm(x, weight")),
    _add_layer("sum not returned", "the second result is x as it came", "one-line: residual",
               changed("add_layer_norm", ", eps), r", ", eps), x.clone()")),
    _add_layer("results swapped", "sum and norm are returned in the other order", "one-line: results",
               _results_swapped),
    _add_layer("bias left out", "the bias is left out", "one-line: norm",
               changed("layer_norm", "y if bias is None else y + bias.float()", "y")),
    _add_layer("mean not subtracted", "an RMSNorm: the mean is not subtracted", "one-line: norm",
               changed("layer_normed", "range(2)", "range(0)")),
    _add_layer("one pass", "the variance is E[x^2] - E[x]^2, which cancels where the mean is large", "one-line: norm",
               changed("layer_normed", "    for _ in", "    raw = x\n    for _ in", _MEAN_SQUARE,
                       "((raw * raw).mean(-1, keepdim=True) - raw.mean(-1, keepdim=True) ** 2)"),
               dtypes=("float32",)),
    _add_layer("unbiased variance", "the variance is divided by E - 1, as torch.std does", "one-line: norm",
               changed("layer_normed", _MEAN_SQUARE, "((x * x).sum(-1, keepdim=True) / (x.shape[-1] - 1))")),
    _add_layer("eps fixed", "eps is fixed at 1e-5, whatever the argument says", "one-line: norm",
               changed("layer_normed", "+ eps", "+ 1e-5")),
    _add_layer("weight and bias of the first column", "one weight and one bias serve every column",
               "one-line: strides", changed("layer_norm", "weight.float()", "weight.float()[:1]")),
    _add_layer("norm copied from the first row", "every row of the norm is a copy of the first",
               "vllm-project/flash-attention#176", after(kept_first(-2))),
    _add_layer("columns past 1024 zero", "the last, partial tile of 1024 columns stays zero", "one-line: tiles",
               after(zero_tail(1024))),
    _add_layer("sum over x", "the sum is written into x", "linkedin/Liger-Kernel#1305",
               after(over_input(0), output=1)),
    _add_layer("x read as dense", "the strides of x are ignored", _DENSE_BEFORE, before(as_if_dense(0))),
    _add_layer("float32 sum", "the sum is float32 whatever x is", "one-line: dtypes", after(in_float32, output=1),
               dtypes=NARROW),
)

# fmt: on

MUTANTS: tuple[Mutant, ...] = RMS_NORM + LAYER_NORM + ADD_RMS_NORM + ADD_LAYER_NORM
