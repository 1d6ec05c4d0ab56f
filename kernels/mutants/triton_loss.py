"""Mutants of the loss kernels: kernels/triton/cross_entropy.py and linear_cross_entropy.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, Change, planted

_ROW = "row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors"
_LOGITS = 'x = tl.load(logits_ptr + places, mask=j < V, other=-float("inf")).to(tl.float32)'
_COUNTED = "counted += ((rows < N) & (labels != ignore_index)).to(tl.int32)"
_MEAN = "total = tl.div_rn(total, tl.sum(counted, 0).to(tl.float32))"
_MERGE = "return total, tl.sum(s * tl.exp2((m - finite_shift(total)) * LOG2E), 0)"

_loss = partial(planted, "cross_entropy", "cross_entropy")
CROSS_ENTROPY = (
    _loss("row offset in 32 bits", "the offset of a row is row * stride in int32, which ends at 2^31 logits",
          "linkedin/Liger-Kernel#804", (_ROW, "row = tl.program_id(0)"),
          corner="offsets past 2^31"),
    _loss("mean over all rows", "the sum is divided by the number of rows, the ignored ones among them",
          "one-line: head and loss", (_COUNTED, "counted += (rows < N).to(tl.int32)")),
    _loss("mean of no rows", "where every row is ignored the mean is 0 and not 0 / 0", "one-line: head and loss",
          (_MEAN, _MEAN.replace("tl.sum(counted, 0)", "tl.maximum(tl.sum(counted, 0), 1)")), corner="all ignored"),
    _loss("ignored rows counted", "the loss of an ignored row is that of its last column", "one-line: head and loss",
          ("label = tl.load(labels_ptr + row * label_stride).to(tl.int64)\n    if label == ignore_index:",
           "label = tl.load(labels_ptr + row * label_stride).to(tl.int64)\n"
           "    label = tl.where(label == ignore_index, V - 1, label)\n    if label < 0:")),
    _loss("ignore_index fixed", "rows labelled -100 are ignored, whatever ignore_index says", "one-line: head and loss",
          ("    if label == ignore_index:\n        tl.store(loss_ptr + row, 0.0)", "    if label == -100:\n"
           "        tl.store(loss_ptr + row, 0.0)"),
          corner="a class is ignored"),
    _loss("no shift", "exponentials are taken of the logits themselves, which overflow from 89 on",
          "one-line: head and loss",
          ("m_new = tl.maximum(m, tl.max(x, AXIS))", "m_new = tl.zeros([LANES], tl.float32)"),
          corner="logits shifted by -100000"),
    _loss("lanes not rescaled", "the sums of the lanes are added up as if their maxima were the same",
          "one-line: head and loss", (_MERGE, "return total, tl.sum(s, 0)")),
    _loss("tiles not rescaled", "in a long row a sum is not faded when a larger logit arrives",
          "one-line: head and loss", ("s = s * tl.exp2((m - shift) * LOG2E) +", "s = s +"),
          corner="a row longer than 8192, growing"),
    _loss("tail of a long row dropped", "of a row longer than a tile the last, ragged piece is not read",
          "ROCm/aiter#4673",
          ("for start in range(0, V, LANES * PER_LANE)",
           "for start in range(0, tl.maximum(V // (LANES * PER_LANE), 1) * (LANES * PER_LANE), LANES * PER_LANE)"),
          corner="a row longer than 8192, growing"),
    _loss("padding in the denominator", "lanes past the last logit count as logits of 0",
          "flashinfer-ai/flashinfer#3717", (_LOGITS, _LOGITS.replace('-float("inf")', "0.0"))),
    _loss("finite sentinel", "lanes past the last logit hold -50000, which logits can lie below",
          "flashinfer-ai/flashinfer#4401", (_LOGITS, _LOGITS.replace('-float("inf")', "-5e4")),
          corner="logits shifted by -100000"),
    _loss("infinity less infinity", "the maximum of a lane that saw nothing but -inf is subtracted from -inf",
          "flashinfer-ai/flashinfer#4450",
          ('return tl.where(m == -float("inf"), 0.0, m)', "return m")),
    _loss("label's logit twice", "the label's own logit stays in the sum, to which it is added at the end",
          "one-line: head and loss", ('x = tl.where(j == own_column, -float("inf"), x)', "x = x")),
    _loss("columns taken as dense", "the stride between the logits of a row is ignored: right for dense rows",
          "flagos-ai/FlagGems#5235", ("dense = logits_NV.stride(1) == 1", "dense = True"),
          corner="logits not dense"),
    _loss("labels taken as dense", "the stride between labels is ignored", "flagos-ai/FlagGems#5235",
          ("label = tl.load(labels_ptr + row * label_stride)", "label = tl.load(labels_ptr + row)"),
          corner="strides"),
    _loss("sums kept in bfloat16", "the sum of exponentials passes through bfloat16 at its end",
          "linkedin/Liger-Kernel#950",
          ("m_all, s_all = merge(m, s)\n        tl.store(",
           "m_all, s_all = merge(m, s.to(tl.bfloat16).to(tl.float32))\n        tl.store(")),
    _loss("log of 1 + tiny", "the loss of a confident row is log(1 + t), which ends at t = 6e-8",
          "linkedin/Liger-Kernel#1329",
          ("return tl.where(t < 1, 2.0 * z * series, tl.log(1.0 + t))", "return tl.log(1.0 + t + 0.0 * (z * series))"),
          equivalent="the definition, evaluated in float32, loses the same: the contract asks for no more"),
)  # fmt: skip

_X_ROWS = "n = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)"
_TILE_OF_LOGITS = "logits = _logits(x_ptrs, w_ptrs, counted, v < V, E, BLOCK_N, BLOCK_V, BLOCK_E)"
_OTHERS = 'others = tl.where(is_own | (v >= V)[None, :], -float("inf"), logits)'
_OWN_STORE = "tl.store(own_ptr + n, own, mask=counted & (label >= first) & (label < last))"
_STEPS = "for start in range(0, E, BLOCK_E):"
_linear = partial(planted, "linear_cross_entropy", "linear_cross_entropy")
LINEAR_CROSS_ENTROPY = (
    _linear("logits in bfloat16", "the logits pass through bfloat16 before the loss", "one-line: head and loss",
            (_TILE_OF_LOGITS, f"{_TILE_OF_LOGITS}.to(tl.bfloat16).to(tl.float32)"), dtypes=("float16", "float32")),
    _linear("logits rounded", "the logits pass through the dtype of x before the loss", "one-line: head and loss",
            (_TILE_OF_LOGITS, f"{_TILE_OF_LOGITS}.to(x_ptr.dtype.element_ty).to(tl.float32)"), dtypes=NARROW,
            equivalent="the contract has a rounding point there, as a linear layer with a loss after it does: not to "
            "round is better than it asks"),
    _linear("padding words counted", "words past the end of the vocabulary count with a logit of 0",
            "flashinfer-ai/flashinfer#3717", (_OTHERS, 'others = tl.where(is_own, -float("inf"), logits)')),
    _linear("last chunk of words dropped", "whole chunks of the vocabulary are counted, and what is left is not",
            "ROCm/aiter#4244",
            ("chunks = triton.cdiv(V, CHUNK)", "chunks = max(1, V // CHUNK)"),
            ("slot = n * tl.cdiv(V, CHUNK) + chunk", "slot = n * tl.maximum(1, V // CHUNK) + chunk"),
            corner="1025 classes"),
    _linear("kernels disagree on the workspace", "one kernel counts the chunks of a row by words, the other by tiles",
            "Dao-AILab/flash-attention VARLEN_PREPROCESS_TILE_BUG",
            ("slot = n * tl.cdiv(V, CHUNK) + chunk", "slot = n * tl.cdiv(V, BLOCK_V) + chunk"),
            corner="17 rows, 129 features, 257 classes"),
    _linear("words not rescaled", "the sum of a row is not faded when a larger logit arrives",
            "one-line: head and loss", ("s = s * tl.exp2((m - shift) * LOG2E) +", "s = s +"),
            corner="17 rows, 129 features, 257 classes"),
    _linear("chunks not rescaled", "the chunks' sums are added up as if their maxima were the same",
            "one-line: head and loss", Change(_MERGE, "return total, tl.sum(s, 0)", "cross_entropy"),
            corner="1025 classes, each row"),
    _linear("label's word twice", "the label's own logit stays in the sum, to which it is added at the end",
            "one-line: head and loss", (_OTHERS, 'others = tl.where((v >= V)[None, :], -float("inf"), logits)')),
    _linear("every chunk stores the label's logit", "programs that do not hold the label's word store 0 for it",
            "fla-org/flash-linear-attention#1033", (_OWN_STORE, "tl.store(own_ptr + n, own, mask=counted)"),
            corner="1025 classes"),
    _linear("ignore_index fixed", "rows labelled -100 are ignored, whatever ignore_index says",
            "one-line: head and loss",
            ("    if label == ignore_index:\n        tl.store(loss_ptr + row, 0.0)",
             "    if label == -100:\n        tl.store(loss_ptr + row, 0.0)"),
            corner="a class is ignored"),
    _linear("mean over all rows", "the sum is divided by the number of rows, the ignored ones among them",
            "one-line: head and loss", Change(_COUNTED, "counted += (rows < N).to(tl.int32)", "cross_entropy")),
    _linear("label of the row before", "labels are shifted by one row, except the first", "one-line: head and loss",
            ("label = tl.load(labels_ptr + n * label_stride, mask=n < N, other=ignore_index).to(tl.int64)",
             "label = tl.load(labels_ptr + tl.maximum(n - 1, 0) * label_stride, mask=n < N, other=ignore_index)"
             ".to(tl.int64)")),
    _linear("tail of E dropped", "what is left of E after whole steps takes no part in the logits",
            "triton-lang/triton#621",
            (_STEPS, "for start in range(0, tl.maximum(E // BLOCK_E, 1) * BLOCK_E, BLOCK_E):"),
            corner="strides"),
    _linear("row offset in 32 bits", "the offset of a row of x is formed in int32, which ends at 2^31 elements",
            "linkedin/Liger-Kernel#804", (_X_ROWS, _X_ROWS.replace(".to(tl.int64)", "")),
            corner="rows past 2^31"),
    _linear("word offset in 32 bits", "the offset of a word of the projection is formed in int32",
            "flashinfer-ai/flashinfer#3392", ("first = chunk.to(tl.int64) * CHUNK", "first = chunk * CHUNK"),
            corner="weights past 2^31"),
    _linear("words with the stride of x", "the rows of the projection are looked for where those of x are",
            "Dao-AILab/flash-attention#355", ("v[None, :] * w_stride", "v[None, :] * x_stride"),
            corner="strides"),
    _linear("products in tf32", "float32 is multiplied on tensor cores, which read 10 bits of it",
            "one-line: precision",
            ('logits = tl.dot(x, w, logits, input_precision="ieee")', "logits = tl.dot(x, w, logits)"),
            dtypes=("float32",)),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = CROSS_ENTROPY + LINEAR_CROSS_ENTROPY
