"""Mutants of the losses: of logits, and of logits that are never stored."""

from typing import Any

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    kept_first,
    planter,
    unsteady,
)

NARROW = ("bfloat16", "float16")
WIDE = ("float16", "float32")
_WIDE_LOGITS = "logits_NV.float()"
_LOSSES = 'F.cross_entropy(logits_NV.float(), labels, ignore_index=-100, reduction="none")'
_COUNT = "(labels_N != ignore_index).sum()"
_PICKED = "logits_NV.float().gather(1, labels.clamp(min=0)[:, None])[:, 0]"
_PRODUCT = "F.linear(x, weight_VE)"


def _lse(log_sum_exp: str) -> Any:
    """The losses written by hand, with another log-sum-exp of the logits [N, V] in float32, z."""
    return changed("_losses", _LOSSES,
                   f"((lambda z: {log_sum_exp})(logits_NV.float()) - {_PICKED}).where(labels >= 0, 0.0)")  # fmt: skip


_MEAN_OVER_ALL = changed("_reduce", _COUNT, "len(labels_N)")
_IGNORED_COUNT = changed("_losses", "torch.where(counted & ~bad, labels_N, -100)", "labels_N.clamp(min=0)")
_IGNORE_FIXED = changed("_losses", "labels_N != ignore_index", "labels_N != -100")
_NO_SUM = changed("_reduce", 'loss_N.sum() if reduction == "sum" else ', "")
_SHIFTED = changed("_losses", "labels_N, -100).long()", "labels_N, -100).long().roll(-1)")
_ZERO_FOR_NONE = changed("_reduce", _COUNT, f"{_COUNT}.clamp(min=1)")
_PROBABILITY = changed("_losses", _LOSSES, 'F.nll_loss(logits_NV.float().softmax(-1).log(), labels, reduction="none")')
_NOT_SHIFTED = _lse("z.exp().sum(-1).log()")
_PADS_COUNT = _lse("F.pad(z, (0, -z.shape[-1] % 64)).logsumexp(-1)")
_FINITE_PADS = _lse("F.pad(z, (0, -z.shape[-1] % 64), value=-1e4).logsumexp(-1)")
_LOSS_ROUNDED = changed("_reduce", "    if reduction", "    loss_N = loss_N.bfloat16().float()\n    if reduction")


# fmt: off
_ce = planter("cross_entropy")
CROSS_ENTROPY = (
    _ce("mean over all rows", "the mean is over all rows, not over the counted ones", "one-line: loss", _MEAN_OVER_ALL),
    _ce("ignored rows count", "an ignored row counts as if its label were 0", "one-line: loss", _IGNORED_COUNT),
    _ce("ignore_index fixed", "only -100 is ignored, whatever the argument says", "one-line: loss", _IGNORE_FIXED),
    _ce("mean for sum", "reduction=\"sum\" gives the mean", "one-line: loss", _NO_SUM),
    _ce("labels shifted", "the label of the next row is taken", "one-line: loss", _SHIFTED),
    _ce("ignored rows left out", "reduction=\"none\" returns the counted rows alone", "one-line: shapes",
        changed("_reduce", "return loss_N\n", "return loss_N[labels_N != ignore_index]\n")),
    _ce("zero for no rows", "the mean over no rows is 0, not NaN", "one-line: NaN", _ZERO_FOR_NONE),
    _ce("log-softmax in the dtype", "the log-softmax is rounded to the dtype of the logits", "one-line: loss",
        changed("_losses", _LOSSES, 'F.cross_entropy(logits_NV, labels, ignore_index=-100, reduction="none").float()'),
        dtypes=NARROW),
    _ce("logits in bfloat16", "logits are rounded to bfloat16 before the loss", "one-line: loss",
        changed("_losses", _WIDE_LOGITS, "logits_NV.bfloat16().float()"), dtypes=WIDE),
    _ce("loss in bfloat16", "the loss of a row is kept in bfloat16", "linkedin/Liger-Kernel#950", _LOSS_ROUNDED),
    _ce("maximum not subtracted", "e^logit overflows", "vllm-project/vllm#56578", _NOT_SHIFTED),
    _ce("logarithm of the probability", "log(softmax): an unlikely label has probability 0 and loss inf",
        "one-line: loss", _PROBABILITY),
    _ce("probability kept from 0", "1e-8 is added to the probability before its logarithm", "one-line: loss",
        changed("_losses", _LOSSES,
                'F.nll_loss((logits_NV.float().softmax(-1) + 1e-8).log(), labels, reduction="none")')),
    _ce("columns past 128 left out", "the last, partial tile of 128 columns is missing from the sum", "one-line: tiles",
        _lse("z[:, : z.shape[1] if z.shape[1] < 128 else z.shape[1] // 128 * 128].logsumexp(-1)")),
    _ce("padding in the sum", "the padding lanes of the last tile count as logits of 0",
        "flashinfer-ai/flashinfer#3717",
        _PADS_COUNT),
    _ce("finite padding", "the padding lanes are -1e4, and valid logits may be smaller",
        "flashinfer-ai/flashinfer#4401",
        _FINITE_PADS),
    _ce("no rescaling", "the online sum is not rescaled when its maximum grows", "one-line: attention",
        _lse("(z - z.cummax(-1).values[:, [min(z.shape[1], t // 16 * 16 + 16) - 1 for t in range(z.shape[1])]])"
             ".exp().sum(-1).log() + z.amax(-1)")),
    _ce("label smoothing", "a tenth of the label's weight is spread over all labels", "one-line: loss",
        changed("_losses", 'reduction="none")', 'reduction="none", label_smoothing=0.1)')),
    _ce("losses copied from the first row", "every row gets the loss of the first", "vllm-project/flash-attention#176",
        after(lambda y, *_: kept_first(0)(y) if y.ndim else y)),
    _ce("logits read as dense", "the row stride of the logits is ignored", "flashinfer-ai/flashinfer#3392",
        before(as_if_dense(0))),
    _ce("gradient over the logits", "the gradient is written into the logits", "linkedin/Liger-Kernel#1305",
        after(lambda y, logits, *_: (y, logits.copy_(logits.softmax(-1)))[0])),
    _ce("varies", "the last bit of the loss varies from call to call", "one-line: atomics", after(unsteady),
          dtypes=("float32",)),
)

_lce = planter("linear_cross_entropy")
LINEAR_CROSS_ENTROPY = (
    _lce("mean over all rows", "the mean is over all rows, not over the counted ones", "one-line: loss",
         _MEAN_OVER_ALL),
    _lce("mean of the means", "the means of chunks of rows are averaged, whatever they count", "one-line: loss",
         changed("_in_parts", "max(1, LOGITS // max(1, weight_VE.shape[0]))", "4",
                 "return _reduce(torch.cat(losses), labels_N, ignore_index, reduction)",
                 "chunks = [_reduce(*pair, ignore_index, reduction) for pair in zip(losses, labels_N.split(rows))]\n"
                 "    if reduction == 'mean':\n"
                 "        return torch.stack(chunks).nanmean()\n"
                 "    return torch.cat(chunks) if reduction == 'none' else sum(chunks)")),
    _lce("last chunk of rows left out", "the last, partial chunk of 8 rows is not counted", "ROCm/aiter#4244",
         changed("_in_parts", "torch.cat(losses)",
                 "torch.cat(losses) * (torch.arange(len(x_NE)) < max(8, len(x_NE) // 8 * 8))")),
    _lce("ignored rows count", "an ignored row counts as if its label were 0", "one-line: loss", _IGNORED_COUNT),
    _lce("ignore_index fixed", "only -100 is ignored, whatever the argument says", "one-line: loss", _IGNORE_FIXED),
    _lce("mean for sum", "reduction=\"sum\" gives the mean", "one-line: loss", _NO_SUM),
    _lce("labels shifted", "the label of the next row is taken", "one-line: loss", _SHIFTED),
    _lce("logits in bfloat16", "the product is formed in bfloat16 whatever x is", "one-line: loss",
         changed("_in_parts", _PRODUCT, "F.linear(x.bfloat16(), weight_VE.bfloat16()).to(x.dtype)"),
         dtypes=WIDE),
    _lce("narrow accumulator", "partial sums over 32 columns are kept in the dtype of x", "linkedin/Liger-Kernel#950",
         changed("_in_parts", _PRODUCT,
                 "sum(a @ w.T for a, w in zip(x.split(32, -1), weight_VE.split(32, -1)))"), dtypes=NARROW),
    _lce("columns past 64 left out", "the last, partial tile of 64 columns of x is missing from the product",
         "one-line: tiles", changed("_in_parts", _PRODUCT,
                                    "F.linear(whole_tiles(x, 64), whole_tiles(weight_VE, 64))")),
    _lce("labels past 128 left out", "the last, partial tile of 128 rows of the weight is missing from the sum",
         "one-line: tiles", _lse("z[:, : z.shape[1] if z.shape[1] < 128 else z.shape[1] // 128 * 128].logsumexp(-1)")),
    _lce("padding in the sum", "the padding rows of the last tile count as logits of 0",
         "flashinfer-ai/flashinfer#3717",
         _PADS_COUNT),
    _lce("maximum not subtracted", "e^logit overflows", "vllm-project/vllm#56578", _NOT_SHIFTED),
    _lce("logarithm of the probability", "log(softmax): an unlikely label has probability 0 and loss inf",
         "one-line: loss", _PROBABILITY),
    _lce("logits capped", "logits are capped at 30 by a tanh", "vllm-project/vllm#56578",
         changed("_in_parts", _PRODUCT, f"30 * torch.tanh({_PRODUCT}.float() / 30)")),
    _lce("zero for no rows", "the mean over no rows is 0, not NaN", "one-line: NaN", _ZERO_FOR_NONE),
    _lce("loss in bfloat16", "the loss of a row is kept in bfloat16", "linkedin/Liger-Kernel#950", _LOSS_ROUNDED),
    _lce("weight read as dense", "the row stride of the weight is ignored", "flashinfer-ai/flashinfer#3392",
         before(as_if_dense(1))),
    _lce("x read as dense", "the row stride of x is ignored", "flashinfer-ai/flashinfer#3392", before(as_if_dense(0))),
    _lce("gradient over x", "the gradient is written into x", "linkedin/Liger-Kernel#1305",
         after(lambda y, x, *_: (y, x.zero_())[0])),
    _lce("chunks of 4 rows", "the rows in chunks of 4", "one-line: loss",
         changed("_in_parts", "max(1, LOGITS // max(1, weight_VE.shape[0]))", "4"),
         equivalent="rows do not depend on each other"),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = CROSS_ENTROPY + LINEAR_CROSS_ENTROPY
