"""Mutants of attention over a cache, which is split into chunks and combined: kernels/triton/decode_attention.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, Change, planted

_LIMIT = "limit = length - S + rows % S + 1"
_STOP = "stop = tl.minimum(start + CHUNK, length)"
_FULL = "full = start + tl.maximum(0, tl.minimum(stop, length - S + 1) - start) // BLOCK_N * BLOCK_N"
_CHUNKS = "chunks = tl.cdiv(length, CHUNK)"
_B = "b = (tl.program_id(0) // splits // tiles // K).to(tl.int64)"
_COMBINE_ROW = "row_0 = (b * K + kv) * splits * group * S + row"
_HEAD = "head = kv * group + row // S"
_SIZES = "(B, H, S, D), (K, N) = q.shape, k_cache.shape[1:3]\n    o ="

_decode = partial(planted, "decode_attention", "decode_attention")
MUTANTS: tuple[Mutant, ...] = (
    # Lengths
    _decode("last slot left out", "the newest key of each sequence is not seen", "one-line: attention",
            (_LIMIT, "limit = length - S + rows % S"), (_FULL, _FULL.replace("length - S + 1", "length - S"))),
    _decode("tokens not causal", "each of the S new tokens sees all of them", "one-line: attention",
            (_LIMIT, "limit = length + rows * 0"), (_FULL, _FULL.replace("length - S + 1", "length")),
            corner="more queries than slots"),
    _decode("aligned at the beginning", "token s sees the slots 0 .. s and not 0 .. length - S + s",
            "one-line: attention", (_LIMIT, "limit = rows % S + 1"), (_FULL, "full = start")),
    _decode("slots past the length read", "a chunk is read to its end, past the slots in use and past the cache",
            "fla-org/flash-linear-attention#795", (_STOP, "stop = start + CHUNK")),
    _decode("slots past the length counted", "the lanes of the last step that hold no slot count with a score of 0",
            "flashinfer-ai/flashinfer#3717",
            (_LIMIT, f"{_LIMIT} + tl.where(rows % S == S - 1, BLOCK_N, 0)")),
    _decode("NaN of a hidden slot", "a value that a token may not see yet is multiplied with 0, and NaN survives that",
            "Dao-AILab/flash-attention#2374", ("odd = any_not_finite(low)", "odd = False"),
            corner="NaN in the newest slot"),
    _decode("length of the first sequence", "the stride of the lengths is 0: right while all are as long",
            "vllm-project/flash-attention#176",
            ("tl.load(lengths_ptr + b * stride)", "tl.load(lengths_ptr + b * 0)")),
    # Splits
    _decode("empty chunks combined", "the second kernel adds up the chunks of the whole cache, also those nobody wrote",
            "Dao-AILab/flash-attention 26d7d92f", (_CHUNKS, "chunks = tl.cdiv(N, CHUNK)"),
            corner="empty sequences"),
    _decode("last chunk dropped", "the second kernel adds up whole chunks only", "one-line: attention",
            (_CHUNKS, "chunks = tl.maximum(tl.minimum(length, 1), length // CHUNK)"),
            corner="growing scores"),
    _decode("chunks not weighted", "the chunks are added up as if their maxima were the same", "one-line: attention",
            ("weight = tl.exp2(m - shift)", 'weight = tl.where(m == float("-inf"), 0.0, 1.0)'),
            corner="growing scores"),
    _decode("denominators not weighted", "the chunks' sums of weights are added up as if relative to one maximum",
            "one-line: attention",
            ("totals += weight * tl.load", "totals += tl.where(i < chunks, 1.0, 0.0) * tl.load"),
            corner="growing scores"),
    _decode("kernels disagree on the workspace", "the second kernel takes every cache for as long as its sequence",
            "Dao-AILab/flash-attention VARLEN_PREPROCESS_TILE_BUG",
            (_COMBINE_ROW, "row_0 = (b * K + kv) * chunks * group * S + row"),
            corner="1025 slots"),
    _decode("unused chunk over the first", "a program without slots stores its empty maximum where chunk 0 has its own",
            "Dao-AILab/flash-attention#2842",
            ("    if start >= length:\n        return\n",
             "    if start >= length:\n"
             "        row = tl.arange(0, BLOCK_M)\n"
             "        first = (b * K + kv) * splits * group * S + row\n"
             '        tl.store(m_ptr + first, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row < group * S)\n'
             "        return\n"),
            corner="1025 slots"),
    _decode("chunks by batch", "a lone sequence is split more finely: a row's bits depend on its batch",
            "Dao-AILab/flash-attention#1897",
            (_SIZES, _SIZES.replace("\n    o =", "\n    CHUNK = 64 if B == 1 else 256\n    o =")),
            corner="129 slots, head dim 80"),
    _decode("empty sequence not written", "the second kernel stops where a sequence has no slots, and stores no 0",
            "fla-org/flash-linear-attention#967", (_CHUNKS, f"{_CHUNKS}\n    if chunks == 0:\n        return"),
            corner="empty sequences"),
    _decode("empty sequence divided by 0", "a sequence of length 0 is divided by its sum of 0",
            "flashinfer-ai/flashinfer#3943",
            ("tl.div_rn(1.0, tl.where(total == 0, 1.0, total))", "tl.div_rn(1.0, total)"),
            corner="empty sequences"),
    # The walk over one chunk, which is that of attention.py
    _decode("output not rescaled", "what was summed before is not faded when a larger score arrives",
            "one-line: attention",
            Change("low = _add_product(p, v, low * fade[:, None], head)", "low = _add_product(p, v, low, head)",
                   "attention"),
            corner="logits shifted by -100000"),
    _decode("second part of the dims left out", "of a head of 80 dims only the first 64 take part in the scores",
            "triton-lang/triton#2059",
            Change("s = tl.dot(q.high, tl.trans(k), s) if head.CHAINED else add_apart(s, q.high, tl.trans(k))",
                   "s = s + 0.0", "attention"), dtypes=NARROW,
            corner="grouped heads"),
    _decode("second part of the values left out", "of a head of 80 dims the last 16 of the result are not stored",
            "triton-lang/triton#4541",
            ("            store_rows(acc_ptr, offsets, inside, LOW, D, high, HIGH)\n\n\n@triton.jit(do_not_specialize",
             "            high = high\n\n\n@triton.jit(do_not_specialize"),
            corner="grouped heads"),
    # Heads and strides
    _decode("heads tiled", "query head h reads key/value head h % K and not h // (H / K)", "one-line: attention",
            ("q_offsets = (rows // S).to(tl.int64) * q_head", "q_offsets = (rows // S).to(tl.int64) * K * q_head"),
            ("q_ptr + b * q_batch + kv * group * q_head", "q_ptr + b * q_batch + kv * q_head"),
            (_HEAD, "head = row // S * K + kv")),
    _decode("result by head", "the result is stored as [B, H, S, D] where it lies as [B, S, H, D]",
            "flagos-ai/FlagGems#5235",
            ("o_ptr += ((b * S + row % S) * K * group + head) * D",
             "o_ptr += ((b * K * group + head) * S + row % S) * D"),
            corner="more queries than slots"),
    _decode("v read with the strides of k", "one set of strides for both caches", "Dao-AILab/flash-attention#355",
            ('"v_head": v_cache.stride(1)', '"v_head": k_cache.stride(1)'),
            corner="strides, each its own"),
    _decode("batch offset in 32 bits", "the offset of a sequence in the cache is formed in int32",
            "Dao-AILab/flash-attention#2260", (_B, "b = tl.program_id(0) // splits // tiles // K"),
            corner="sequences past 2^31"),
)  # fmt: skip
