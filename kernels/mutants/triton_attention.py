"""Mutants of the attention kernel: kernels/triton/attention.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import NARROW, planted

_B = "b = (tl.program_id(0) % heads // H).to(tl.int64)  # int64: index * stride passes 2^31 in large tensors"
_FULL = "full = full // BLOCK_N * BLOCK_N if mask_ptr is None else 0"
_LIMIT = "limit = tl.minimum(T, T - S + rows + 1)"
_LIMIT_ALL = "full = tl.maximum(0, tl.minimum(T, T - S + first + 1))"
_STOP = "stop = tl.maximum(0, tl.minimum(T, T - S + first + BLOCK_M))"
_LSE = "lse = tl.fma(shift, unit, tl.fma(shift, unit_rest, natural_log(total)))"
_LOW = "low = _add_product(p, v, low * fade[:, None], head)"
_FIRST_WALK = "walk(m, total, low, high, q, keys, 0, full, limit, scale, head, BLOCK_N, True)"
_LAST_WALK = "walk(m, total, low, high, q, keys, full, stop, limit, scale, head, BLOCK_N, False)"
_HIGH_SCORES = "s = tl.dot(q.high, tl.trans(k), s) if head.CHAINED else add_apart(s, q.high, tl.trans(k))"
_SCALE = "scale = q_BHSD.shape[-1] ** -0.5 if scale is None else float(scale)"

_attention = partial(planted, "attention", "attention")
MUTANTS: tuple[Mutant, ...] = (
    # Which keys a query sees
    _attention("one key too many", "a query sees the key after its own", "one-line: attention",
               (_LIMIT, "limit = tl.minimum(T, T - S + rows + 2)"),
               (_STOP, _STOP.replace("+ BLOCK_M", "+ BLOCK_M + 1"))),
    _attention("diagonal masked", "a query does not see its own key", "one-line: attention",
               (_LIMIT, "limit = tl.minimum(T, T - S + rows)"), (_LIMIT_ALL, _LIMIT_ALL.replace(" + 1", ""))),
    _attention("aligned at the beginning", "query s sees keys 0 .. s, also where cached keys come first",
               "one-line: attention",
               (_LIMIT, _LIMIT.replace("T - S + ", "")), (_LIMIT_ALL, _LIMIT_ALL.replace("T - S + ", "")),
               (_STOP, _STOP.replace("T - S + ", ""))),
    _attention("key mask ignored in full tiles", "tiles below the diagonal are taken as fully visible, key mask or not",
               "one-line: attention", (_FULL, "full = full // BLOCK_N * BLOCK_N"),
               corner="key mask, 130 keys"),
    _attention("key mask of the first sequence", "the batch stride of the key mask is ignored",
               "vllm-project/flash-attention#176", ("mask_ptr + b * mask_batch", "mask_ptr"),
               corner="key mask"),
    _attention("window that nobody asked for", "of the keys before the diagonal only the last two tiles are seen",
               "huggingface/transformers#39408",
               (_FIRST_WALK, _FIRST_WALK.replace("keys, 0, full", "keys, tl.maximum(0, full - 2 * BLOCK_N), full")),
               corner="257 keys, head dim 160"),
    _attention("tail keys dropped", "without a causal mask, keys after the last whole tile are not read",
               "one-line: attention",
               (_LAST_WALK,
                _LAST_WALK.replace("full, stop", "full, stop if CAUSAL or T < BLOCK_N else T // BLOCK_N * BLOCK_N")),
               corner="129 keys, all seen"),
    _attention("padding in the denominator", "lanes past the last key count as keys of score 0",
               "flashinfer-ai/flashinfer#3717",
               ("limit = tl.full([BLOCK_M], T, tl.int32)", "limit = tl.full([BLOCK_M], T + BLOCK_N, tl.int32)")),
    _attention("last tile read whole", "the last tile of keys is read without a mask, past the end of k",
               "fla-org/flash-linear-attention#795",
               (_FULL, "full = tl.cdiv(full, BLOCK_N) * BLOCK_N if mask_ptr is None else 0"),
               (_LAST_WALK, _LAST_WALK.replace("full, stop", "full, tl.maximum(full, stop)"))),
    # The running softmax
    _attention("output not rescaled", "what was summed before is not faded when a larger score arrives",
               "one-line: attention", (_LOW, "low = _add_product(p, v, low, head)"),
               corner="growing scores"),
    _attention("denominator not rescaled", "the sum of the weights is not faded when a larger score arrives",
               "one-line: attention", ("total * fade + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
               corner="growing scores"),
    _attention("denominator of rounded weights", "the sum of the weights is that of the rounded ones: the lse shows it",
               "one-line: extra rounding",
               ("total * fade + tl.sum(p, 1)",
                "total * fade + tl.sum(p.to(q.ptr.dtype.element_ty).to(tl.float32), 1)"), dtypes=NARROW,
               place="which is then summed"),
    _attention("finite sentinel", "masked scores are -50000, which valid scores can lie below",
               "flashinfer-ai/flashinfer#4401",
               ('return tl.where(visible, s, float("-inf"))', "return tl.where(visible, s, -5e4)"),
               corner="rows without a key"),
    _attention("row without keys", "a row that sees no key is divided by its sum of 0",
               "Dao-AILab/flash-attention c65b5106",
               ("tl.div_rn(1.0, tl.where(total == 0, 1.0, total))", "tl.div_rn(1.0, total)"),
               corner="rows without a key"),
    _attention("infinity less infinity", "while a row has seen no key, its maximum of -inf is subtracted from -inf",
               "flashinfer-ai/flashinfer#4267",
               ('return tl.where(m == float("-inf"), 0.0, m)', "return m"),
               corner="rows without a key"),
    _attention("NaN of a masked value", "a value that no query may see is multiplied with 0, and NaN survives that",
               "Dao-AILab/flash-attention#1745", ("odd = any_not_finite(low)", "odd = False"),
               corner="masked values hold NaN"),
    _attention("lse without the maximum", "the log of the sum is returned without the maximum it is relative to",
               "one-line: attention", (_LSE, "lse = natural_log(total)")),
    _attention("lse in base 2", "the log-sum-exp stays in the units of the exponent, log2", "one-line: attention",
               (_LSE, "lse = shift + tl.log2(total)")),
    _attention("scores rounded", "scores pass through the dtype of q before the softmax", "one-line: attention",
               ("return -s if head.NEGATE else s", "s = s.to(q.ptr.dtype.element_ty).to(tl.float32)\n"
                                                   "    return -s if head.NEGATE else s"), dtypes=NARROW,
               place="scaled scores"),
    _attention("sums kept in bfloat16", "the running output is rounded to the dtype of v after every tile of keys",
               "linkedin/Liger-Kernel#950",
               (_LOW, f"{_LOW}\n        low = low.to(v.dtype).to(tl.float32)"), dtypes=NARROW,
               corner="ten tiles of keys"),
    _attention("weights of 2 and not of e", "the factor log2 e is missing: weights are 2^s", "one-line: attention",
               ("torch.tensor(abs(scale) * LOG2_E, dtype", "torch.tensor(abs(scale), dtype")),
    _attention("scale of all heads", "the scale is that of H D numbers, not of D", "one-line: attention",
               (_SCALE, _SCALE.replace("q_BHSD.shape[-1]", "(q_BHSD.shape[-1] * q_BHSD.shape[1])"))),
    _attention("sign of the scale lost", "a negative scale is used as its absolute value", "one-line: attention",
               ("return -s if head.NEGATE else s", "return s"),
               corner="negative scale"),
    # Heads, dims, strides
    _attention("heads tiled", "query head h reads key/value head h % K and not h // (H / K)", "one-line: attention",
               ("k_ptr += b * k_batch + h // group * k_head", "k_ptr += b * k_batch + h % (H // group) * k_head"),
               ("v_ptr += b * v_batch + h // group * v_head", "v_ptr += b * v_batch + h % (H // group) * v_head")),
    _attention("values of the first head", "the head stride of v is ignored: right for a single key/value head",
               "one-line: attention",
               ("v_ptr += b * v_batch + h // group * v_head", "v_ptr += b * v_batch")),
    _attention("v read with the strides of k", "one set of strides for both: right while k and v are laid out alike",
               "Dao-AILab/flash-attention#355", ('"v_row": v.stride(2)', '"v_row": k.stride(2)'),
               corner="strides, each its own"),
    _attention("second part of the dims left out", "of a head of 80 dims only the first 64 take part in the scores",
               "triton-lang/triton#4541", (_HIGH_SCORES, "s = s + 0.0"), dtypes=NARROW,
               corner="strides, each its own"),
    _attention("batch offset in 32 bits", "a sequence begins at b * stride in int32, which ends at 2^31 elements",
               "Dao-AILab/flash-attention#2662", (_B, "b = tl.program_id(0) % heads // H"),
               corner="sequences past 2^31"),
    _attention("key offset in 32 bits", "the offset of a key is n * stride in int32", "Dao-AILab/flash-attention#1500",
               ("    offsets = n.to(tl.int64) * keys.k_stride", "    offsets = n * keys.k_stride"),
               corner="keys past 2^31"),
    _attention("all sequences onto the first", "the batch stride of the result is 0: right for a batch of one",
               "vllm-project/flash-attention#176", ("o_ptr += b * S * H * D + h * D", "o_ptr += h * D")),
    _attention("result by head", "the result is stored as [B, H, S, D] where it lies as [B, S, H, D]",
               "flagos-ai/FlagGems#5235",
               ("o_ptr += b * S * H * D + h * D\n    offsets = rows.to(tl.int64) * (H * D)",
                "o_ptr += (b * H + h) * S * D\n    offsets = rows.to(tl.int64) * D")),
    _attention("products in tf32", "float32 is multiplied on tensor cores, which read 10 bits of it",
               "one-line: precision",
               ('return acc - tl.dot(-a, b, input_precision="ieee")', "return acc - tl.dot(-a, b)"),
               dtypes=("float32",)),
)  # fmt: skip
