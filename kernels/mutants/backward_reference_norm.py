"""Mutants of the gradients of the norms, alone and after the residual sum."""

from functools import partial
from typing import Any

import torch

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    added_to_before,
    after,
    as_if_dense,
    before,
    changed,
    flattened,
    in_float32,
    in_memory_of,
    kept_first,
    missing,
    over_input,
    planter,
    refuse_empty,
    strides_of,
    unsteady,
    unwritten_tail,
    without_nan,
    zero_tail,
)

NARROW = ("bfloat16", "float16")
_TERM, _STRIDES, _TILES = "one-line: missing term", "one-line: strides", "one-line: tiles"
_SUM, _SIGN, _SCALE = "one-line: wrong reduction", "one-line: sign", "one-line: scale"
_MEMORY, _NARROW = "one-line: memory", "one-line: narrow"

_rms_norm = partial(changed, "through_rms_norm")
_layer_norm = partial(changed, "through_layer_norm")
_ROOT = "(x * x).mean(-1, keepdim=True)"
_CORRECTION = " - n * (g * n).mean(-1, keepdim=True)"
_MEAN_G = " - g.mean(-1, keepdim=True)"
_SUMMED = "terms.reshape(-1, terms.shape[-1]).sum(0)"


def _sum(new: str) -> Any:
    """The sum over rows, written otherwise."""
    return changed("over_rows", _SUMMED, new)


def _first_axis_only(y: torch.Tensor, *_: Any) -> torch.Tensor:
    """The rows written are as many as the first axis is long, whatever stands between it and the last."""
    out = torch.zeros_like(y, memory_format=torch.contiguous_format)
    out.view(-1, y.shape[-1])[: y.shape[0]] = y.reshape(-1, y.shape[-1])[: y.shape[0]]
    return out


def _as_x(y: torch.Tensor, _dy: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return y.to(x.dtype)


# fmt: off
_rms = planter("rms_norm_backward")
RMS_NORM = (
    _rms("no correction", "dx lacks the term that r depends on x too", _TERM, _rms_norm(_CORRECTION, "")),
    _rms("correction added", "the correction of dx has the wrong sign", _SIGN,
         _rms_norm("g - n * (g", "g + n * (g")),
    _rms("weight forgotten", "dx is that of a norm without a weight", "karpathy/llm.c#763",
         _rms_norm("dy * weight\n", "dy * torch.ones_like(weight)\n")),
    _rms("correction without the weight", "the mean of the correction is that of dy n", _TERM,
         _rms_norm("(g * n).mean", "(dy * n).mean")),
    _rms("correction summed", "the correction is the sum over a row, not the mean", _SUM,
         _rms_norm("(g * n).mean(-1", "(g * n).sum(-1")),
    _rms("correction over the padded row", "the sum of the correction is divided by the length of the padded row",
         _SUM,
         _rms_norm("(g * n).mean(-1, keepdim=True)", "(g * n).sum(-1, keepdim=True) / (-x.shape[-1] // 64 * -64)")),
    _rms("correction over columns", "the per-row term is reduced over a block of narrow rows as well",
         "BobMcDear/attorch#17",
         _rms_norm("(g * n).mean(-1, keepdim=True)",
                   "(g * n).mean((-2, -1) if x.ndim > 1 and x.shape[-1] <= 64 else -1, keepdim=True)")),
    _rms("correction of x", "the correction is taken along x, not along x / rms(x)", _TERM,
         _rms_norm("g - n * (g", "g - x * (g")),
    _rms("correction of the first row", "every row has the correction of the first one",
         "vllm-project/flash-attention#176",
         _rms_norm("(g * n).mean(-1, keepdim=True)", "(g * n).mean(-1, keepdim=True).reshape(-1, 1)[:1]")),
    _rms("no eps", "1 / rms is computed without eps", "one-line: eps", _rms_norm(" + eps", "")),
    _rms("eps fixed", "eps is fixed at 1e-5, whatever the argument says", "one-line: eps",
         _rms_norm("+ eps", "+ 1e-5")),
    _rms("eps outside the root", "eps is added to the root", "one-line: eps",
         _rms_norm("keepdim=True) + eps)", "keepdim=True)) + eps", "1 / torch.sqrt(", "1 / (torch.sqrt(", "+ eps",
                   "+ eps)")),
    _rms("not divided by rms", "dx lacks its factor 1 / rms(x)", _SCALE, _rms_norm("dx = r * (", "dx = (")),
    _rms("divided by rms twice", "dx has its factor 1 / rms(x) twice", _SCALE,
         _rms_norm("dx = r * (", "dx = r * r * (")),
    _rms("weight twice", "dy meets the weight twice", _SCALE, _rms_norm("dy * weight\n", "dy * weight * weight\n")),
    _rms("1 / rms in bfloat16", "1 / rms(x) is kept in bfloat16 by the forward pass", "pytorch/helion#2273",
         _rms_norm(f"1 / torch.sqrt({_ROOT} + eps)", f"(1 / torch.sqrt({_ROOT} + eps)).bfloat16().to(x.dtype)")),
    _rms("narrow statistics", "the mean square is computed in bfloat16", _NARROW,
         _rms_norm(_ROOT, "(x * x).bfloat16().mean(-1, keepdim=True)")),
    _rms("narrow correction", "the mean of the correction is kept in bfloat16", _NARROW,
         _rms_norm("(g * n).mean(-1, keepdim=True)", "(g * n).bfloat16().mean(-1, keepdim=True).to(x.dtype)")),
    _rms("dw of x", "dw is the sum of dy x, not of dy x / rms(x)", _TERM, _rms_norm("dx, dy * n", "dx, dy * x")),
    _rms("dw with the weight", "dw is the sum of w dy x / rms(x)", _TERM, _rms_norm("dx, dy * n", "dx, g * n")),
    _rms("dw averaged", "dw is the mean over the rows", _SUM, _sum(_SUMMED.replace("sum(0)", "mean(0)"))),
    _rms("dw of one row", "each row overwrites dw, and the last one stays", "one-line: missing accumulation",
         _sum("torch.cat([terms.new_zeros(1, terms.shape[-1]), terms.reshape(-1, terms.shape[-1])])[-1]")),
    _rms("dw of whole blocks", "the partial sums have room for the whole blocks of 16 rows", "BobMcDear/attorch#18",
         _sum("whole_tiles(terms.reshape(-1, terms.shape[-1]), 16, 0).sum(0)")),
    _rms("dw of the first axis", "rows are counted by the first axis alone", "flagos-ai/FlagGems#5392",
         _sum("terms.reshape(-1, terms.shape[-1])[: terms.shape[0]].sum(0)")),
    _rms("dw kept in bfloat16", "dw is added up in bfloat16, block after block", "linkedin/Liger-Kernel#950",
         _sum("narrow_sum(terms.reshape(-1, terms.shape[-1]))")),
    _rms("dw row by row in bfloat16", "every row is added to a sum in bfloat16", "tenstorrent/tt-metal#53386",
         _sum("narrow_sum(terms.reshape(-1, terms.shape[-1]), 1)")),
    _rms("dw terms rounded", "each dy x / rms(x) is rounded before the sum", "one-line: extra rounding",
         changed("rms_norm_backward", "over_rows(terms)", "over_rows(wide(terms.to(x.dtype)))"), dtypes=NARROW,
         place="the terms of dw"),
    _rms("dw terms in bfloat16", "each dy x / rms(x) is rounded to bfloat16 before the sum", _NARROW,
         _rms_norm("dx, dy * n", "dx, (dy * n).bfloat16().to(x.dtype)"), dtypes=("float16", "float32")),
    _rms("dy rounded with the weight", "w dy is rounded before anything else", "one-line: extra rounding",
         changed("rms_norm_backward", "through_rms_norm(wide(dy), wide(x), wide(weight), eps)",
                 "through_rms_norm(wide(dy), wide(x), wide(weight), eps)\n"
                 "    dx, _ = through_rms_norm(wide((wide(dy) * wide(weight)).to(x.dtype)), wide(x), "
                 "torch.ones_like(wide(weight)), eps)"), dtypes=NARROW, place="w dy"),
    _rms("dw left at 0", "dw is never written", "one-line: missing accumulation",
         _sum("terms.new_zeros(terms.shape[-1])")),
    _rms("dw missing", "the weight gets no gradient", "unslothai/unsloth#4533", after(missing, 1)),
    _rms("dx in the memory of dy", "dx is written into dy, and is the same memory", "unslothai/unsloth#4533",
         after(in_memory_of(0))),
    _rms("dx over x", "dx is written over x, which the caller holds", "linkedin/Liger-Kernel#272",
         after(over_input(1))),
    _rms("dy read with strides of x", "dy is read with the strides of x", "flagos-ai/FlagGems#1084",
         before(strides_of(0, 1))),
    _rms("dy read as dense", "the strides of dy are ignored, those of an expanded one too",
         "ROCm/TransformerEngine#623", before(as_if_dense(0))),
    _rms("x read as dense", "the strides of x are ignored", _STRIDES, before(as_if_dense(1))),
    _rms("weight read as dense", "the stride of the weight is ignored", _STRIDES, before(as_if_dense(2))),
    _rms("rank 3 by its first axis", "of an array with three axes as many rows are written as the first is long",
         "flagos-ai/FlagGems#5392", after(_first_axis_only)),
    _rms("columns past 128 unwritten", "the last, partial tile of 128 columns of dx is never stored", "ROCm/aiter#4244",
         after(unwritten_tail(128))),
    _rms("columns of dw past 128 left out", "dw stays 0 in the last, partial tile of 128 columns", _TILES,
         after(zero_tail(128), 1)),
    _rms("dx copied from the first row", "every row gets the dx of the first", "vllm-project/flash-attention#176",
         after(kept_first(-2))),
    _rms("dw added to the last call's", "the buffer of dw is not cleared between two calls",
         "one-line: buffer not cleared", after(added_to_before(), 1)),
    _rms("dw varies", "dw is added up by atomics: its last bit varies from call to call", "one-line: atomics",
         after(unsteady, 1), dtypes=("float32",)),
    _rms("dx in float32", "dx is not in the dtype of x", "one-line: dtype", after(in_float32), dtypes=NARROW),
    _rms("dw in the dtype of x", "the gradient of a float32 weight is in the dtype of x", "one-line: dtype",
         after(_as_x, 1), dtypes=NARROW),
    _rms("axes merged", "leading axes of dx are merged and not parted again", "one-line: shapes", after(flattened)),
    _rms("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
    _rms("NaN swallowed", "a NaN in dx becomes 0", "one-line: NaN", after(without_nan)),
    _rms("factors in another order", "n (g n) for (g n) n", "one-line: missing term",
         _rms_norm("(g * n).mean", "(n * g).mean"), equivalent="a product has no order"),
)

_layer = planter("layer_norm_backward")
LAYER_NORM = (
    _layer("no correction", "dx lacks the term that r depends on x too", _TERM, _layer_norm(_CORRECTION, "")),
    _layer("no mean", "dx lacks the term that the mean depends on x too", _TERM, _layer_norm(_MEAN_G, "")),
    _layer("an RMSNorm's", "neither the mean of x nor that of the gradient is taken away", _TERM,
           _layer_norm("range(2)", "range(0)", _MEAN_G, "")),
    _layer("correction added", "the correction of dx has the wrong sign", _SIGN,
           _layer_norm("- n * (g * n)", "+ n * (g * n)")),
    _layer("mean added", "the mean of the gradient is added", _SIGN, _layer_norm("- g.mean", "+ g.mean")),
    _layer("weight forgotten", "dx is that of a norm without a weight", "karpathy/llm.c#763",
           _layer_norm("dy * weight\n", "dy * torch.ones_like(weight)\n")),
    _layer("mean of dy", "the mean that is taken away is that of dy, not of w dy", _TERM,
           _layer_norm("- g.mean(", "- dy.mean(")),
    _layer("correction without the weight", "the mean of the correction is that of dy n", _TERM,
           _layer_norm("(g * n).mean", "(dy * n).mean")),
    _layer("correction summed", "the correction is the sum over a row, not the mean", _SUM,
           _layer_norm("(g * n).mean(-1", "(g * n).sum(-1")),
    _layer("mean over the padded row", "the sum of g is divided by the length of the padded row", _SUM,
           _layer_norm("g.mean(-1, keepdim=True)", "g.sum(-1, keepdim=True) / (-x.shape[-1] // 64 * -64)")),
    _layer("terms over columns", "both per-row terms are reduced over a block of narrow rows as well",
           "BobMcDear/attorch#17",
           _layer_norm("g.mean(-1, keepdim=True)",
                       "g.mean((-2, -1) if x.ndim > 1 and x.shape[-1] <= 64 else -1, keepdim=True)")),
    _layer("unbiased variance", "the variance is divided by E - 1", _SUM,
           _layer_norm(_ROOT, "((x * x).sum(-1, keepdim=True) / (x.shape[-1] - 1))")),
    _layer("one pass", "the variance is E[x^2] - E[x]^2, which cancels where the mean is large", "one-line: norm",
           _layer_norm("    for _ in", "    raw = x\n    for _ in", _ROOT,
                       "((raw * raw).mean(-1, keepdim=True) - raw.mean(-1, keepdim=True) ** 2)")),
    _layer("no eps", "1 / sigma is computed without eps", "one-line: eps", _layer_norm(" + eps", "")),
    _layer("eps fixed", "eps is fixed at 1e-5, whatever the argument says", "one-line: eps",
           _layer_norm("+ eps", "+ 1e-5")),
    _layer("not divided", "dx lacks its factor 1 / sigma", _SCALE, _layer_norm("dx = r * (", "dx = (")),
    _layer("statistics in bfloat16", "1 / sigma is kept in bfloat16 by the forward pass", "pytorch/helion#2273",
           _layer_norm(f"1 / torch.sqrt({_ROOT} + eps)", f"(1 / torch.sqrt({_ROOT} + eps)).bfloat16().to(x.dtype)"),
           dtypes=("float16", "float32")),
    _layer("dw of x", "dw is the sum of dy (x - mean), not divided by sigma", _TERM,
           _layer_norm("dx, dy * n", "dx, dy * x")),
    _layer("dw with the weight", "dw is the sum of w dy n", _TERM, _layer_norm("dx, dy * n", "dx, g * n")),
    _layer("dw not centred", "dw is the sum of dy x / sigma, without the mean", _TERM,
           _layer_norm("    for _ in", "    raw = x\n    for _ in", "dx, dy * n", "dx, dy * raw * r")),
    _layer("dw of a row of one element", "where rows have one element dw is the sum of dy, not 0",
           "pytorch/pytorch#188372",
           _layer_norm("dx, dy * n", "dx, dy * n if x.shape[-1] > 1 else dy")),
    _layer("dw averaged", "dw is the mean over the rows", _SUM,
           changed("layer_norm_backward", "over_rows(terms)", "terms.reshape(-1, terms.shape[-1]).mean(0)")),
    _layer("db with the weight", "db is the sum of w dy", _TERM,
           changed("layer_norm_backward", "over_rows(wide(dy))", "over_rows(wide(dy) * wide(weight))")),
    _layer("db of the last axis of rows", "db is summed over one axis of rows", _SUM,
           changed("layer_norm_backward", "over_rows(wide(dy))",
           "over_rows(wide(dy)[:1] if dy.ndim > 2 else wide(dy))")),
    _layer("db as dw", "db gets the values of dw", "one-line: swapped",
           changed("layer_norm_backward", "over_rows(wide(dy))", "over_rows(terms)")),
    _layer("sums of whole blocks", "the partial sums of dw and db have room for the whole blocks of 16 rows",
           "BobMcDear/attorch#18", _sum("whole_tiles(terms.reshape(-1, terms.shape[-1]), 16, 0).sum(0)")),
    _layer("sums of the first axis", "rows are counted by the first axis alone", "flagos-ai/FlagGems#5392",
           _sum("terms.reshape(-1, terms.shape[-1])[: terms.shape[0]].sum(0)")),
    _layer("sums kept in bfloat16", "dw and db are added up in bfloat16, block after block",
           "linkedin/Liger-Kernel#950",
           _sum("narrow_sum(terms.reshape(-1, terms.shape[-1]))"), dtypes=("float16", "float32")),
    _layer("db missing", "the bias gets no gradient", "one-line: missing gradient", after(missing, 2)),
    _layer("db left at 0", "db is never written", "one-line: missing accumulation",
           changed("layer_norm_backward", "over_rows(wide(dy))", "over_rows(0 * wide(dy))")),
    _layer("dx over dy", "dx is written over dy", "linkedin/Liger-Kernel#1305", after(over_input(0))),
    _layer("dy read with strides of x", "dy is read with the strides of x", "flagos-ai/FlagGems#1084",
           before(strides_of(0, 1))),
    _layer("dy read as dense", "the strides of dy are ignored, those of an expanded one too",
           "ROCm/TransformerEngine#623", before(as_if_dense(0))),
    _layer("x read as dense", "the strides of x are ignored", _STRIDES, before(as_if_dense(1))),
    _layer("columns past 128 unwritten", "the last, partial tile of 128 columns of dx is never stored",
           "ROCm/aiter#4244",
           after(unwritten_tail(128))),
    _layer("columns of dw past 128 left out", "dw stays 0 in the last, partial tile of 128 columns", _TILES,
           after(zero_tail(128), 1)),
    _layer("rank 3 by its first axis", "of an array with three axes as many rows are written as the first is long",
           "flagos-ai/FlagGems#5392", after(_first_axis_only)),
    _layer("db added to the last call's", "the buffer of db is not cleared between two calls",
           "one-line: buffer not cleared", after(added_to_before(), 2)),
    _layer("fails on no rows", "raises where there are no rows", "one-line: launch", before(refuse_empty)),
)

_add_rms = planter("add_rms_norm_backward")
_DX = "(wide(dsum) + through)"
_rms_sum = partial(changed, "add_rms_norm_backward")
ADD_RMS_NORM = (
    _add_rms("gradients added before the norm", "dsum + dy goes through the norm, and nothing past it",
             "Dao-AILab/quack#53",
             _rms_sum("through_rms_norm(wide(dy), ", "through_rms_norm(wide(dy) + wide(dsum), ", _DX, "through")),
    _add_rms("dsum left out", "the gradient of the sum that is handed on is left out", _TERM, _rms_sum(_DX, "through")),
    _add_rms("dsum twice", "the gradient of the sum counts twice", _SCALE, _rms_sum(_DX, "(2 * wide(dsum) + through)")),
    _add_rms("dsum taken away", "the gradient of the sum has the wrong sign", _SIGN,
             _rms_sum(_DX, "(through - wide(dsum))")),
    _add_rms("norm left out", "dx is dsum alone", _TERM, _rms_sum(_DX, "(wide(dsum) + 0 * through)")),
    _add_rms("dx without dsum", "only the residual gets the gradient of the sum", _TERM,
             _rms_sum("return dx, dx", "return through.to(x.dtype), dx")),
    _add_rms("dresidual without the norm", "the residual gets the gradient of the sum alone", _TERM,
             _rms_sum("return dx, dx", "return dx, dsum.clone()")),
    _add_rms("dresidual missing", "the residual gets no gradient", "one-line: missing gradient", after(missing, 1)),
    _add_rms("dsum for dy", "the two incoming gradients are taken for each other", "one-line: swapped",
             before(lambda dy, dsum, *rest: (dsum, dy, *rest))),
    _add_rms("norm of x", "the statistics are those of x, without the residual", _TERM,
             _rms_sum("wide(residual + x)", "wide(x)")),
    _add_rms("norm of the residual", "the statistics are those of the residual, without x", _TERM,
             _rms_sum("wide(residual + x)", "wide(residual)")),
    _add_rms("dw of both gradients", "dw is the sum of (dy + dsum) n", _TERM,
             _rms_sum("over_rows(terms)", "over_rows(through_rms_norm(wide(dy) + wide(dsum), wide(residual + x), "
                      "wide(weight), eps)[1])")),
    _add_rms("no correction", "dx lacks the term that r depends on x too", _TERM, _rms_norm(_CORRECTION, "")),
    _add_rms("weight forgotten", "dx is that of a norm without a weight", "karpathy/llm.c#763",
             _rms_norm("dy * weight\n", "dy * torch.ones_like(weight)\n")),
    _add_rms("no eps", "1 / rms is computed without eps", "one-line: eps", _rms_norm(" + eps", "")),
    _add_rms("rounded before dsum", "what comes through the norm is rounded before dsum is added",
             "one-line: extra rounding", _rms_sum(_DX, "(wide(dsum) + wide(through.to(x.dtype)))"), dtypes=NARROW,
             equivalent="the definition rounds there too"),
    _add_rms("dw of whole blocks", "the partial sums have room for the whole blocks of 16 rows", "BobMcDear/attorch#18",
             _sum("whole_tiles(terms.reshape(-1, terms.shape[-1]), 16, 0).sum(0)")),
    _add_rms("dw kept in bfloat16", "dw is added up in bfloat16, block after block", "linkedin/Liger-Kernel#950",
             _sum("narrow_sum(terms.reshape(-1, terms.shape[-1]))")),
    _add_rms("dx over dsum", "dx is added to dsum in place", "linkedin/Liger-Kernel#1305", after(over_input(1))),
    _add_rms("dsum read with strides of dy", "dsum is read with the strides of dy", "Dao-AILab/flash-attention#355",
             before(strides_of(1, 0))),
    _add_rms("dsum read as dense", "the strides of dsum are ignored, those of an expanded one too",
             "ROCm/TransformerEngine#623", before(as_if_dense(1))),
    _add_rms("residual read with strides of x", "the residual is read with the strides of x",
             "Dao-AILab/flash-attention#355", before(strides_of(3, 2))),
)

_add_layer = planter("add_layer_norm_backward")
_layer_sum = partial(changed, "add_layer_norm_backward")
ADD_LAYER_NORM = (
    _add_layer("gradients added before the norm", "dsum + dy goes through the norm, and nothing past it",
               "Dao-AILab/quack#53",
               _layer_sum("through_layer_norm(wide(dy), ", "through_layer_norm(wide(dy) + wide(dsum), ", _DX,
                          "through")),
    _add_layer("dsum left out", "the gradient of the sum that is handed on is left out", _TERM,
               _layer_sum(_DX, "through")),
    _add_layer("dsum twice", "the gradient of the sum counts twice", _SCALE,
               _layer_sum(_DX, "(2 * wide(dsum) + through)")),
    _add_layer("dx without dsum", "only the residual gets the gradient of the sum", _TERM,
               _layer_sum("return dx, dx", "return through.to(x.dtype), dx")),
    _add_layer("dresidual without the norm", "the residual gets the gradient of the sum alone", _TERM,
               _layer_sum("return dx, dx", "return dx, dsum.clone()")),
    _add_layer("norm of x", "the statistics are those of x, without the residual", _TERM,
               _layer_sum("wide(residual + x)", "wide(x)")),
    _add_layer("db of both gradients", "db is the sum of dy + dsum", _TERM,
               _layer_sum("over_rows(wide(dy))", "over_rows(wide(dy) + wide(dsum))")),
    _add_layer("db of dsum", "db is the sum of dsum", "one-line: swapped",
               _layer_sum("over_rows(wide(dy))", "over_rows(wide(dsum))")),
    _add_layer("db with the weight", "db is the sum of w dy", _TERM,
               _layer_sum("over_rows(wide(dy))", "over_rows(wide(dy) * wide(weight))")),
    _add_layer("no mean", "dx lacks the term that the mean depends on x too", _TERM, _layer_norm(_MEAN_G, "")),
    _add_layer("no correction", "dx lacks the term that r depends on x too", _TERM, _layer_norm(_CORRECTION, "")),
    _add_layer("weight forgotten", "dx is that of a norm without a weight", "karpathy/llm.c#763",
               _layer_norm("dy * weight\n", "dy * torch.ones_like(weight)\n")),
    _add_layer("sums of whole blocks", "the partial sums of dw and db have room for the whole blocks of 16 rows",
               "BobMcDear/attorch#18", _sum("whole_tiles(terms.reshape(-1, terms.shape[-1]), 16, 0).sum(0)")),
    _add_layer("dx over dsum", "dx is added to dsum in place", "linkedin/Liger-Kernel#1305", after(over_input(1))),
    _add_layer("dy read with strides of dsum", "dy is read with the strides of dsum", "Dao-AILab/flash-attention#355",
               before(strides_of(0, 1))),
    _add_layer("dsum read as dense", "the strides of dsum are ignored, those of an expanded one too",
               "ROCm/TransformerEngine#623", before(as_if_dense(1))),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = RMS_NORM + LAYER_NORM + ADD_RMS_NORM + ADD_LAYER_NORM
