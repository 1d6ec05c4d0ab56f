"""Mutants of the gradients of the losses, of a matrix product, and of an embedding."""

from functools import partial
from typing import Any

import torch

from refllm.kernels import plain
from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    added_to_before,
    after,
    as_if_dense,
    before,
    changed,
    in_float32,
    instead,
    missing,
    over_input,
    planter,
    refuse_empty,
    unsteady,
    unwritten_tail,
    zero_tail,
    zeros,
)

NARROW = ("bfloat16", "float16")
WIDE = ("float16", "float32")
_TERM, _SIGN, _SCALE, _SUM = "one-line: missing term", "one-line: sign", "one-line: scale", "one-line: wrong reduction"
_STRIDES, _NARROW, _LOSS, _EXTRA = "one-line: strides", "one-line: narrow", "one-line: loss", "one-line: extra rounding"
_ACCUMULATION, _TRANSPOSED = "one-line: missing accumulation", "one-line: transposed"

_dlogits = partial(changed, "_dlogits")
_each = partial(changed, "_of_each_row")
_COUNT = "counted_N.sum().clamp(min=1)"
_ONE_HOT = "p_NV.scatter_add(1, label_N1, torch.full_like(p_NV[:, :1], -1.0))"
_TIMES = "(off_NV * each_N[:, None])"
_FIRST_ROW = _each("wide(dloss).expand(labels_N.shape)", "wide(dloss).reshape(-1)[:1].expand(labels_N.shape)")
_MEAN_OVER_ALL = _each(_COUNT, "max(1, len(labels_N))")
_NOT_AVERAGED = _each(f' / {_COUNT} if reduction == "mean" else each_N', "")
_ALWAYS_AVERAGED = _each(' if reduction == "mean" else each_N', "")
_DLOSS_FORGOTTEN = _each("wide(dloss).expand", "torch.ones_like(wide(dloss)).expand")
_SHIFTED = _dlogits("labels_N.long()[:, None]", "labels_N.long().roll(-1).clamp(0, logits_NV.shape[1] - 1)[:, None]")
_ROUNDED_BEFORE = _dlogits(_ONE_HOT, _ONE_HOT.replace("p_NV.scatter", "p_NV.bfloat16().to(p_NV.dtype).scatter"))
_NO_ONE_HOT = _dlogits(_ONE_HOT, "p_NV")
_TWICE_SCALED = _dlogits(_TIMES, "(off_NV * each_N[:, None] * each_N[:, None])")


@instead
def _in_the_logits(dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    """The forward pass wrote softmax - onehot over the logits; the backward pass only scales."""
    d = plain.cross_entropy_backward(torch.ones_like(dloss), logits, labels, **how)
    each = dloss if dloss.ndim == 0 else dloss[:, None]
    if 0 in logits.stride():
        return (d * each).to(logits.dtype)
    return logits.copy_((d * each).to(logits.dtype))


@instead
def _kept_in_the_dtype(dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    """What the forward pass keeps is rounded, then scaled and rounded again."""
    d = plain.cross_entropy_backward(torch.ones_like(dloss), logits, labels, **how)
    return (d.float() * (dloss if dloss.ndim == 0 else dloss[:, None])).to(logits.dtype)


# fmt: off
_ce = planter("cross_entropy_backward")
CROSS_ENTROPY = (
    _ce("gradient of the first row", "every row is scaled by the incoming gradient of the first one",
        "linkedin/Liger-Kernel#1298", _FIRST_ROW),
    _ce("dloss forgotten", "the incoming gradient is taken for 1", "linkedin/Liger-Kernel#968", _DLOSS_FORGOTTEN),
    _ce("mean over all rows", "the mean is over all rows, not over the counted ones", "linkedin/Liger-Kernel#968",
        _MEAN_OVER_ALL),
    _ce("not averaged", "the mean's gradient is that of the sum", _SUM, _NOT_AVERAGED),
    _ce("always averaged", "the gradient of a sum, or of each loss, is divided by their number", _SUM,
        _ALWAYS_AVERAGED),
    _ce("0 / 0 without counted rows", "where no row counts the gradient is 0 / 0", "linkedin/Liger-Kernel#177",
        changed("cross_entropy_backward", ".to(logits_NV.dtype)",
                ".div((labels_N != ignore_index).any()).to(logits_NV.dtype)")),
    _ce("ignored rows get a gradient", "a row whose label is ignored gets that of label 0", "linkedin/Liger-Kernel#678",
        _dlogits(f"{_TIMES}.masked_fill(ignored_N1, 0.0)",
                 "off_NV * each_N[:, None].masked_fill(ignored_N1, float(each_N.abs().max()))")),
    _ce("ignored rows as softmax", "a row whose label is ignored gets the softmax", "linkedin/Liger-Kernel#678",
        _dlogits(f"{_TIMES}.masked_fill(ignored_N1, 0.0)",
                 f"torch.where(ignored_N1, p_NV * each_N.sum() / max(1, len(each_N)), {_TIMES})")),
    _ce("ignore_index fixed", "only -100 is ignored, whatever the argument says", _LOSS,
        changed("cross_entropy_backward", "labels_N, ignore_index).to",
        "labels_N.where(labels_N != ignore_index, -100), -100).to",
                "_labels_exist", "if ignore_index != -100:\n        ignore_index = -100\n        "
                "labels_N = labels_N.clamp(min=0)\n    _labels_exist")),
    _ce("softmax alone", "1 is not subtracted at the label", _TERM, _NO_ONE_HOT),
    _ce("one-hot alone", "the softmax is missing", _TERM, _dlogits(_ONE_HOT, f"{_ONE_HOT} - p_NV")),
    _ce("sign", "the gradient has the wrong sign", _SIGN, _dlogits(_TIMES, "(-off_NV * each_N[:, None])")),
    _ce("labels shifted", "the label of the next row is taken", "one-line: label shift", _SHIFTED),
    _ce("rounded before 1 is subtracted", "the probability of the label is rounded, then 1 is subtracted",
        "linkedin/Liger-Kernel#1329", _ROUNDED_BEFORE),
    _ce("kept in the dtype",
        "the forward pass keeps the gradient in the logits' dtype, and it is scaled and rounded again",
        "NVIDIA/TransformerEngine#3193", _kept_in_the_dtype, dtypes=NARROW, place="the kept gradient"),
    _ce("written over the logits", "the gradient is written over the logits, which the caller holds",
        "linkedin/Liger-Kernel#272", after(over_input(1))),
    _ce("in the memory of the logits", "the gradient lies in the memory of the logits: a second call has others",
        "Dao-AILab/quack#209", _in_the_logits),
    _ce("scaled twice", "the incoming gradient is multiplied twice", "linkedin/Liger-Kernel#272", _TWICE_SCALED),
    _ce("maximum not subtracted", "e^logit is formed as it is, and overflows", "vllm-project/vllm#56578",
        _dlogits("logits_NV.softmax(-1)", "logits_NV.exp() / logits_NV.exp().sum(-1, keepdim=True)")),
    _ce("softmax in bfloat16", "the softmax is taken of rounded logits", _NARROW,
        _dlogits("logits_NV.softmax(-1)", "wide(logits_NV.bfloat16()).softmax(-1).to(logits_NV.dtype)"), dtypes=WIDE),
    _ce("columns past 128 not in the sum", "the last, partial tile of 128 columns is missing from the softmax's sum",
        "one-line: tiles", _dlogits("logits_NV.softmax(-1)",
                                    "torch.exp(logits_NV - whole_tiles(logits_NV, 128).logsumexp(-1, keepdim=True))")),
    _ce("columns past 128 unwritten", "the last, partial tile of 128 columns is never stored", "ROCm/aiter#4244",
        after(unwritten_tail(128))),
    _ce("columns past 128 left at 0", "the last, partial tile of 128 columns stays 0", "ROCm/aiter#4244",
        after(zero_tail(128))),
    _ce("padding in the sum", "the padding lanes of the last tile count as logits of 0",
        "flashinfer-ai/flashinfer#3717",
        _dlogits("logits_NV.softmax(-1)",
                 "F.pad(logits_NV, (0, -logits_NV.shape[1] % 64)).softmax(-1)[:, : logits_NV.shape[1]]")),
    _ce("label smoothing", "a tenth of the label's weight is spread over all", _LOSS,
        _dlogits(_ONE_HOT, _ONE_HOT.replace("-1.0", "-0.9") + " - 0.1 / p_NV.shape[1]")),
    _ce("logits read as dense", "the row stride of the logits is ignored", _STRIDES, before(as_if_dense(1))),
    _ce("labels read as dense", "the stride of the labels is ignored", _STRIDES,
        before(as_if_dense(2))),
    _ce("dloss read as dense", "the stride of an expanded dloss is ignored", "ROCm/TransformerEngine#623",
        before(as_if_dense(0))),
    _ce("rows copied from the first", "every row gets the gradient of the first", "vllm-project/flash-attention#176",
        after(lambda y, *_: y[:1].expand_as(y).clone() if len(y) else y)),
    _ce("all zero", "the gradient is 0 everywhere", "one-line: missing accumulation", after(zeros)),
    _ce("gradient in float32", "the gradient is not in the dtype of the logits", "one-line: dtype", after(in_float32),
        dtypes=NARROW),
    _ce("fails on no rows", "raises where there are no rows", "one-line: launch",
        before(lambda dloss, logits, labels: (refuse_empty(labels) and dloss, logits, labels))),
)

_lce = planter("linear_cross_entropy_backward")
_linear_ce = partial(changed, "linear_cross_entropy_backward")
_CHUNK = "max(1, LOGITS_BACKWARD // max(1, V))"
_X_PART = "wide(x_NE[part]).masked_fill(ignored_N1, 0.0)"
_DW = f"dweight_VE += dlogits_NV.mT @ {_X_PART}"
_DX_ROWS = "dx_NE[part] = (dlogits_NV @ wide(weight_VE))"
LINEAR_CROSS_ENTROPY = (
    _lce("dx all zero", "dx is 0 everywhere", "one-line: missing accumulation", after(zeros)),
    _lce("dW all zero", "dW is 0 everywhere", "one-line: missing accumulation", after(zeros, 1)),
    _lce("dW summed in bfloat16", "chunks of rows are added to dW in bfloat16", "axolotl-ai-cloud/axolotl#1601",
         _linear_ce(_CHUNK, "8", _DW, f"{_DW}\n        dweight_VE = wide(dweight_VE.bfloat16())")),
    _lce("dW of the last chunk", "each chunk of rows overwrites dW", "linkedin/Liger-Kernel#1391",
         _linear_ce(_CHUNK, "8", _DW, _DW.replace("+=", "="))),
    _lce("last chunk left out", "the last, partial chunk of 8 rows is not counted", "ROCm/aiter#4244",
         _linear_ce(_CHUNK, "min(8, max(1, N))", "range(0, N, rows)", "range(0, N - rows + 1, rows)")),
    _lce("mean of chunks", "each chunk of rows is averaged by itself", "huggingface/transformers#34191",
         _linear_ce(_CHUNK, "4", "_dlogits(each_N[part]",
                    "_dlogits(each_N[part] * (((labels_N != ignore_index).sum() / "
                    "(labels_N[part] != ignore_index).sum().clamp(min=1) / -(-N // rows)) "
                    "if reduction == 'mean' else 1)")),
    _lce("gradient of the first row", "every row is scaled by the incoming gradient of the first one",
         "linkedin/Liger-Kernel#1298", _FIRST_ROW),
    _lce("dloss forgotten", "the incoming gradient is taken for 1", "linkedin/Liger-Kernel#968", _DLOSS_FORGOTTEN),
    _lce("dloss forgotten in dW", "only dx is scaled by the incoming gradient", _TERM,
         _linear_ce(_DW, "dweight_VE += _dlogits(torch.sign(each_N[part]).abs() / (1 if reduction != 'mean' else "
                         "(labels_N != ignore_index).sum().clamp(min=1)), wide(logits_NV), labels_N[part], "
                         "ignore_index).mT @ wide(x_NE[part])")),
    _lce("mean over all rows", "the mean is over all rows, not over the counted ones", "linkedin/Liger-Kernel#968",
         _MEAN_OVER_ALL),
    _lce("not averaged", "the mean's gradient is that of the sum", _SUM, _NOT_AVERAGED),
    _lce("always averaged", "the gradient of a sum is divided by the number of rows", _SUM, _ALWAYS_AVERAGED),
    _lce("softmax alone", "1 is not subtracted at the label", _TERM, _NO_ONE_HOT),
    _lce("labels shifted", "the label of the next row is taken", "one-line: label shift", _SHIFTED),
    _lce("rounded before 1 is subtracted", "the probability of the label is rounded, then 1 is subtracted",
         "linkedin/Liger-Kernel#1329", _ROUNDED_BEFORE),
    _lce("gradient of the logits in bfloat16", "the gradient of the logits is rounded to bfloat16 before the products",
         "NVIDIA/TransformerEngine#3193",
         _linear_ce("labels_N[part], ignore_index)", "labels_N[part], ignore_index).bfloat16().to(dx_NE.dtype)"),
                    dtypes=WIDE),
    _lce("gradient of the logits rounded", "the gradient of the logits is rounded before the products", _EXTRA,
         _linear_ce("labels_N[part], ignore_index)", "labels_N[part], ignore_index)\n"
                    "        dlogits_NV = wide(dlogits_NV.to(x_NE.dtype))"), dtypes=("bfloat16",),
         equivalent="the definition rounds there too"),
    _lce("logits in bfloat16", "the logits are formed in bfloat16 whatever x is", _NARROW,
         _linear_ce("F.linear(x_NE[part], weight_VE)", "F.linear(x_NE[part].bfloat16(), weight_VE.bfloat16())"),
                    dtypes=WIDE),
    _lce("scaled twice", "the incoming gradient is multiplied twice", "linkedin/Liger-Kernel#272", _TWICE_SCALED),
    _lce("columns past 64 left out", "the last, partial tile of 64 columns is missing from the logits",
         "one-line: tiles",
         _linear_ce("F.linear(x_NE[part], weight_VE)",
                    "F.linear(whole_tiles(x_NE[part], 64), whole_tiles(weight_VE, 64))")),
    _lce("words past 128 left out of dx", "the last, partial tile of 128 rows of the weight is missing from dx",
         "one-line: tiles",
         _linear_ce(_DX_ROWS, "dx_NE[part] = (whole_tiles(dlogits_NV, 128) @ whole_tiles(wide(weight_VE), 128, 0))")),
    _lce("dx over x", "dx is written over x, which the caller holds", "linkedin/Liger-Kernel#1305",
         after(over_input(1))),
    _lce("NaN of ignored rows", "what ignored rows of x hold meets a 0 in dW, and 0 times NaN is NaN",
         "Dao-AILab/flash-attention#2374", _linear_ce(_X_PART, "wide(x_NE[part])")),
    _lce("dW missing", "the weight gets no gradient", "one-line: missing gradient", after(missing, 1)),
    _lce("dW added to the last call's", "the buffer of dW is not cleared between two calls",
         "NVIDIA/Megatron-LM#6660", after(added_to_before(), 1)),
    _lce("x read as dense", "the row stride of x is ignored", _STRIDES, before(as_if_dense(1))),
    _lce("weight read as dense", "the row stride of the weight is ignored", _STRIDES, before(as_if_dense(2))),
)

_linear = planter("linear_backward")
_of_linear = partial(changed, "linear_backward")
LINEAR = (
    _linear("W transposed", "dx is dy W^T where the weight is square", _TRANSPOSED,
            _of_linear("@ wide(weight)", "@ (wide(weight).mT if len(set(weight.shape)) == 1 else wide(weight))")),
    _linear("dW of one sequence", "dW is that of the first sequence", _ACCUMULATION,
            _of_linear("rows_NO.mT @ rows_NI", "rows_NO[: dy.shape[-2]].mT @ rows_NI[: dy.shape[-2]]")),
    _linear("dW averaged", "dW is the mean over the rows", _SUM,
            _of_linear("rows_NO.mT @ rows_NI", "rows_NO.mT @ rows_NI / max(1, len(rows_NO))")),
    _linear("dW in bfloat16", "dW is added up in bfloat16, 8 rows at a time", "linkedin/Liger-Kernel#950",
            _of_linear("rows_NO.mT @ rows_NI", "narrow_sum(rows_NO[:, :, None] * rows_NI[:, None, :])")),
    _linear("db averaged", "db is the mean over the rows", _SUM, _of_linear("rows_NO.sum(0)", "rows_NO.mean(0)")),
    _linear("db in bfloat16", "db is added up in bfloat16", "linkedin/Liger-Kernel#950",
            _of_linear("rows_NO.sum(0)", "narrow_sum(rows_NO, 1)")),
    _linear("db missing", "the bias gets no gradient", "one-line: missing gradient", after(missing, 2)),
    _linear("dx with the bias", "the bias is added to dy", _TERM,
            _of_linear("wide(dy) @", "(wide(dy) if bias is None else wide(dy) + wide(bias)) @")),
    _linear("last rows left out of dW", "the last, partial block of 16 rows is missing from dW", "BobMcDear/attorch#18",
            _of_linear("rows_NO.mT @ rows_NI", "whole_tiles(rows_NO, 16, 0).mT @ whole_tiles(rows_NI, 16, 0)")),
    _linear("dy read as dense", "the strides of dy are ignored, those of an expanded one too",
            "ROCm/TransformerEngine#623",
            before(as_if_dense(0))),
    _linear("dx over x", "dx is written over x", "linkedin/Liger-Kernel#1305", after(over_input(1))),
)

_embedding = planter("embedding_backward")
_of_embedding = partial(changed, "embedding_backward")
_ADDED = "dweight.index_add(0, ids.flatten(), wide(dy).flatten(0, -2))"


@instead
def _row_by_row_in_bfloat16(dy: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(weight.shape, dtype=torch.bfloat16)
    for place, row in zip(ids.flatten().tolist(), dy.flatten(0, -2), strict=True):
        total[place] += row.to(torch.bfloat16)
    return total.to(weight.dtype)


EMBEDDING = (
    _embedding("last use wins", "a row that is read twice gets the gradient of its last use", _ACCUMULATION,
               _of_embedding(_ADDED, "dweight.index_copy(0, ids.flatten(), wide(dy).flatten(0, -2))")),
    _embedding("summed in bfloat16", "uses are added up in bfloat16, which stops growing at 256 equal terms",
               "tenstorrent/tt-metal#53386", _row_by_row_in_bfloat16),
    _embedding("averaged over uses", "a row gets the mean over its uses", _SUM,
               _of_embedding(_ADDED,
                             f"{_ADDED} / torch.bincount(ids.flatten(), minlength=len(weight)).clamp(min=1)[:, None]")),
    _embedding("row 0 for padding", "row 0 is taken for padding and gets no gradient", _TERM,
               _of_embedding(f"return {_ADDED}",
                             f"return {_ADDED}.index_fill(0, torch.zeros(1, dtype=torch.int64), 0.0)")),
    _embedding("atomics in bfloat16", "uses are added by atomics in the dtype of the weights", "flagos-ai/FlagGems#305",
               after(unsteady), dtypes=("float32",)),
    _embedding("dy read as dense", "the strides of dy are ignored, those of an expanded one too",
               "ROCm/TransformerEngine#623", before(as_if_dense(0))),
    _embedding("ids read with strides of dy", "ids with a stride are read as dense", _STRIDES, before(as_if_dense(1))),
    _embedding("added to the last call's", "the buffer is not cleared between two calls", "NVIDIA/Megatron-LM#6660",
               after(added_to_before())),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = CROSS_ENTROPY + LINEAR_CROSS_ENTROPY + LINEAR + EMBEDDING
