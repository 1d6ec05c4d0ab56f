"""Mutants of the gradients of softmax, attention and attention over a cache."""

from functools import partial
from typing import Any

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    added_to_before,
    after,
    as_if_dense,
    before,
    changed,
    missing,
    over_input,
    planter,
    refuse_empty,
    strides_of,
    unsteady,
    unwritten_tail,
    zero_tail,
    zeros,
)

NARROW = ("bfloat16", "float16")
WIDE = ("float16", "float32")
_TERM, _SIGN, _SCALE, _SUM = "one-line: missing term", "one-line: sign", "one-line: scale", "one-line: wrong reduction"
_STRIDES, _NARROW, _TILES = "one-line: strides", "one-line: narrow", "one-line: tiles"
_EXTRA = "one-line: extra rounding"
_ACCUMULATION, _MASK, _SWAPPED = "one-line: missing accumulation", "one-line: mask", "one-line: swapped"

_of = partial(changed, "attention_backward")
_keys = partial(changed, "_seen_keys")
_DS = "(p * (dp - delta[..., None])).masked_fill(p == 0, 0.0)"
_DQ = "factor * (ds @ k.masked_fill(_unseen(p), 0.0))"
_DK = "factor * (ds.mT @ q).sum(2)"
_DV = "(p.mT @ do).sum(2)"
_P = "torch.exp(s - lse[..., None]).masked_fill(~seen, 0.0)"
_SEEN = "_seen_keys(S, T, causal, key_mask, q.device)"
_TOP = _keys("(T - S if causal else T)", "(0 if causal else T)")
_NOT_CAUSAL = _of(_SEEN, "_seen_keys(S, T, False, key_mask, q.device)")
_ALWAYS_CAUSAL = _of(_SEEN, "_seen_keys(S, T, True, key_mask, q.device)")
_LATEST_MASKED = _keys("torch.arange(T, device=device) <= last", "torch.arange(T, device=device) < last")
_LAST_ROWS = "{0}[..., : {0}.shape[-2] if {0}.shape[-2] < 4 else {0}.shape[-2] // 4 * 4, :]"


def _whole(name: str) -> str:
    """The queries of whole blocks of 4."""
    return f"whole_tiles({name}, 4, -2)"


def _batch_of_0(do: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
    return do, q, k[:1].expand_as(k), v, *rest


# fmt: off
_attention = planter("attention_backward")
ATTENTION = (
    # -- what the query, key and value gradients are made of
    _attention("delta left out", "ds lacks the term with delta", _TERM,
               _of(_DS, _DS.replace(" - delta[..., None]", ""))),
    _attention("delta added", "delta has the wrong sign", _SIGN, _of(_DS, _DS.replace("- delta", "+ delta"))),
    _attention("delta twice", "delta counts twice", _SCALE, _of(_DS, _DS.replace("- delta", "- 2 * delta"))),
    _attention("delta averaged", "delta is the mean over the dims", _SUM,
               _of("(p * dp).sum(-1)", "(p * dp).sum(-1) / D", "(do * o).sum(-1)", "(do * o).mean(-1)")),
    _attention("delta of one head", "every head of a group has the delta of the first", "one-line: heads",
               _of(_DS, _DS.replace("delta[..., None]", "delta[:, :, :1, :, None]"))),
    _attention("delta past whole blocks left at 0", "the preprocess has blocks of 16 rows, the rest another size",
               "triton-lang/triton#2020",
               _of(_DS, _DS.replace("delta[..., None]",
                                    "(delta * (torch.arange(S) < (S if S < 16 else S // 16 * 16)))[..., None]"))),
    _attention("delta of 16 dims", "delta is the sum over whole blocks of 16 dims", "triton-lang/triton#621",
               _of("(p * dp).sum(-1)",
                   "(p * (whole_tiles(do, 16) @ whole_tiles(v, 16).mT).masked_fill(p == 0, 0.0)).sum(-1)",
                   "(do * o).sum(-1)", "whole_tiles(do * o, 16).sum(-1)")),
    _attention("dlse ignored", "the gradient of the log-sum-exp is left out", _TERM,
               _of("if dlse is not None:", "if False:")),
    _attention("dlse sign", "the gradient of the log-sum-exp has the wrong sign", _SIGN,
               _of("delta - wide(dlse)", "delta + wide(dlse)")),
    _attention("dlse without the weights", "the gradient of the log-sum-exp is added to every score", _TERM,
               _of("delta = delta - wide(dlse).reshape(B, K, groups, S)", "delta = delta", "dq = factor",
                   "ds = ds if dlse is None else ds + wide(dlse).reshape(B, K, groups, S, 1) * seen\n    dq = factor")),
    _attention("weights left out of ds", "ds is dp - delta", _TERM,
               _of(_DS, "(dp - delta[..., None]).masked_fill(p == 0, 0.0)")),
    _attention("dp for ds", "dq and dk are made of dp", _TERM, _of(_DS, "dp")),
    _attention("scale left out of dq", "dq lacks its factor", "one-line: scale",
               _of(f"dq = {_DQ}", f"dq = {_DQ}".replace("factor * ", ""))),
    _attention("scale left out of dk", "dk lacks its factor", "one-line: scale",
               _of(f"dk = {_DK}", f"dk = {_DK}".replace("factor * ", ""))),
    _attention("scale twice in dq", "dq has its factor twice", "one-line: scale",
               _of(f"dq = {_DQ}", f"dq = factor * {_DQ}")),
    _attention("scale twice in dk", "dk is made of queries that are scaled already", "one-line: scale",
               _of(f"dk = {_DK}", f"dk = factor * {_DK}")),
    _attention("scale of the dims", "the factor is D^-1/2, whatever the argument says", "one-line: scale",
               _of("D**-0.5 if scale is None else scale", "D**-0.5")),
    _attention("weights without the scale", "the weights are found again from scores without the factor",
               "one-line: scale",
               _of("q @ k.mT * factor", "q @ k.mT * D**-0.5")),
    _attention("weights not divided", "the weights are found again without the log-sum-exp", _TERM,
               _of(_P, "torch.exp(s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).masked_fill(~seen, 0.0)")),
    _attention("weights by powers of two", "the log-sum-exp is taken for one to the base 2", "one-line: attention",
               _of(_P, "torch.exp2(s / 0.6931471805599453 - lse[..., None]).masked_fill(~seen, 0.0)")),
    _attention("ds not transposed", "dk is ds q where there are as many queries as keys", "one-line: transposed",
               _of("ds.mT @ q", "(ds.mT if S != T else ds) @ q")),
    _attention("weights not transposed", "dv is p do where there are as many queries as keys", "one-line: transposed",
               _of("p.mT @ do", "(p.mT if S != T else p) @ do")),
    _attention("dv of ds", "dv is made of ds", _SWAPPED, _of("p.mT @ do", "ds.mT @ do")),
    _attention("dk of the weights", "dk is made of the weights", _SWAPPED, _of("ds.mT @ q", "p.mT @ q")),
    _attention("dv of o", "dv is made of o in place of its gradient", _SWAPPED,
               _of("p.mT @ do", "p.mT @ (p @ v.masked_fill(_unseen(p), 0.0))")),
    _attention("values for keys in dq", "dq is made of the values", _SWAPPED,
               _of("ds @ k.masked_fill", "ds @ v.masked_fill")),
    _attention("keys for values in dp", "dp is do k^T", _SWAPPED, _of("do @ v.mT", "do @ k.mT")),
    _attention("dk and dv swapped", "dk and dv are returned for each other", _SWAPPED,
               _of("dk.to(k_BKTD.dtype), dv.to(v_BKTD.dtype)", "dv.to(k_BKTD.dtype), dk.to(v_BKTD.dtype)")),
    # -- grouped heads
    _attention("dk of one head of a group", "dk is that of the first query head that reads it",
               "stanford-crfm/levanter#449",
               _of(_DK, "factor * (ds.mT @ q)[:, :, 0]")),
    _attention("dv of the last head of a group", "each query head overwrites dv", "stanford-crfm/levanter#449",
               _of(_DV, "(p.mT @ do)[:, :, -1]")),
    _attention("dk averaged over a group", "dk is the mean over the query heads that read it",
               "stanford-crfm/levanter#449",
               _of("(ds.mT @ q).sum(2)", "(ds.mT @ q).mean(2)")),
    _attention("dv averaged over a group", "dv is the mean over the query heads that read it",
               "stanford-crfm/levanter#449",
               _of("(p.mT @ do).sum(2)", "(p.mT @ do).mean(2)")),
    _attention("heads split by the wrong count", "the sum over a group is over every K-th head",
               "XunhaoLai/native-sparse-attention-triton#27",
               _of("(ds.mT @ q).sum(2)", "(ds.mT @ q).flatten(1, 2).unflatten(1, (groups, K)).sum(1)")),
    _attention("heads of dv split by the wrong count", "the sum over a group is over every K-th head",
               "XunhaoLai/native-sparse-attention-triton#27",
               _of("(p.mT @ do).sum(2)", "(p.mT @ do).flatten(1, 2).unflatten(1, (groups, K)).sum(1)")),
    # -- which keys count
    _attention("aligned at the top", "the causal mask is aligned at the first query and key in the backward pass alone",
               "xlite-dev/ffpa-attn#300", _TOP),
    _attention("causal ignored", "every query sees every key in the backward pass", _MASK, _NOT_CAUSAL),
    _attention("always causal", "causal=False is ignored by the backward pass", "triton-lang/triton#4541",
               _ALWAYS_CAUSAL),
    _attention("own key masked", "a query does not see the key at its own place", _MASK, _LATEST_MASKED),
    _attention("mask one too wide", "a query sees the key after its own", _MASK,
               _keys("torch.arange(T, device=device) <= last", "torch.arange(T, device=device) <= last + 1")),
    _attention("key mask ignored", "keys that are masked count in the backward pass", _MASK,
               _keys("seen if key_mask is None else seen & key_mask[:, None, None, None, :]", "seen")),
    _attention("key mask of the first sequence", "every sequence has the key mask of the first", _MASK,
               _keys("key_mask[:, None, None, None, :]", "key_mask[:1, None, None, None, :]")),
    _attention("key mask without causal", "where there is a key mask the causal one is left out", _MASK,
               _keys("seen & key_mask[:, None, None, None, :]",
                     "key_mask[:, None, None, None, :].expand(-1, 1, 1, S, T)")),
    _attention("row without a key", "a row that sees no key gives NaN", "pytorch/pytorch#41508",
               _of(_P, "torch.exp(s - lse[..., None])", "dp = (do @ v.mT).masked_fill(p == 0, 0.0)", "dp = do @ v.mT",
                   "(p * (dp - delta[..., None])).masked_fill(p == 0, 0.0)", "p * (dp - delta[..., None])")),
    _attention("row without a key averages", "a row that sees no key has equal weights", _MASK,
               _of(_P, f"{_P}\n    p = torch.where(seen.any(-1, keepdim=True), p, 1.0 / max(1, T))")),
    _attention("NaN behind the mask", "what a masked key holds reaches dq: 0 times NaN",
               "Dao-AILab/flash-attention#2374",
               _of(".masked_fill(_unseen(p), 0.0)", "")),
    _attention("NaN in masked values", "what a masked value holds reaches ds: 0 times NaN",
               "Dao-AILab/flash-attention#1745",
               _of("(do @ v.mT).masked_fill(p == 0, 0.0)", "do @ v.mT",
                   "(p * (dp - delta[..., None])).masked_fill(p == 0, 0.0)",
                   "p * (dp - delta[..., None])")),
    # -- tiles
    _attention("last queries left out of dk", "the last, partial block of 4 queries is missing from dk",
               "flagos-ai/FlagGems#3607",
               _of("ds.mT @ q", f"{_whole('ds')}.mT @ {_whole('q')}")),
    _attention("last queries left out of dv", "the last, partial block of 4 queries is missing from dv",
               "flagos-ai/FlagGems#898",
               _of("p.mT @ do", f"{_whole('p')}.mT @ {_whole('do')}")),
    _attention("more queries than keys left out", "queries past as many as there are keys are missing from dv",
               "flagos-ai/FlagGems#3607", _of("p.mT @ do", "p[..., :T, :].mT @ do[..., :T, :]")),
    _attention("last keys left out of dq", "the last, partial block of 16 keys is missing from dq", _TILES,
               _of(_DQ, "factor * (whole_tiles(ds, 16) @ whole_tiles(k.masked_fill(_unseen(p), 0.0), 16, -2))")),
    _attention("last block of keys overwrites dq", "each block of 16 keys overwrites dq", _ACCUMULATION,
               _of("(ds @ k.masked_fill(_unseen(p), 0.0))",
                   "(ds[..., (max(T, 1) - 1) // 16 * 16 :] @ "
                   "k.masked_fill(_unseen(p), 0.0)[..., (max(T, 1) - 1) // 16 * 16 :, :])")),
    _attention("last block of queries overwrites dk", "each block of 16 queries overwrites dk", _ACCUMULATION,
               _of("ds.mT @ q",
                   "ds[..., (max(S, 1) - 1) // 16 * 16 :, :].mT @ q[..., (max(S, 1) - 1) // 16 * 16 :, :]")),
    _attention("first 64 dims", "products are over the first 64 dims", "triton-lang/triton#621",
               _of("(do @ v.mT)", "(do[..., :64] @ v[..., :64].mT)")),
    _attention("dims past whole tiles unwritten", "the last, partial tile of 16 dims of dq is never stored",
               "ROCm/aiter#4244",
               after(unwritten_tail(16))),
    _attention("keys past whole tiles left at 0", "the last, partial tile of 16 keys of dv stays 0", "ROCm/aiter#4244",
               after(zero_tail(16, -2), 2)),
    _attention("dk past whole tiles unwritten", "the last, partial tile of 16 keys of dk is never stored",
               "ROCm/aiter#4244",
               after(unwritten_tail(16, -2), 1)),
    # -- layouts
    _attention("do read as dense", "the strides of do are ignored, those of an expanded one too",
               "Dao-AILab/flash-attention#355", before(as_if_dense(0))),
    _attention("do read with strides of q", "do is read with the strides of q", "Dao-AILab/flash-attention#818",
               before(strides_of(0, 1))),
    _attention("q read with strides of do", "q is read with the strides of do", "pytorch/pytorch#146377",
               before(strides_of(1, 0))),
    _attention("v read with strides of k", "v is read with the strides of k", "Dao-AILab/flash-attention#2552",
               before(strides_of(3, 2))),
    _attention("k read as dense", "the strides of k are ignored", "flagos-ai/FlagAttention#1", before(as_if_dense(2))),
    _attention("v read as dense", "the strides of v are ignored", "flagos-ai/FlagAttention#1", before(as_if_dense(3))),
    _attention("keys of the first sequence", "the batch stride of the keys is 0", "vllm-project/flash-attention#176",
               before(_batch_of_0)),
    _attention("dq copied from the first sequence", "the batch stride of dq is 0", "vllm-project/flash-attention#176",
               after(lambda y, *_: y[:1].expand_as(y).clone() if len(y) else y)),
    # -- precision
    _attention("weights rounded", "the weights are rounded to the dtype of the values before dv", _EXTRA,
               _of("p.mT @ do", "wide(p.to(v_BKTD.dtype)).mT @ do"), dtypes=NARROW,
               equivalent="the definition rounds there too"),
    _attention("ds rounded", "ds is rounded to the dtype of the keys before dq and dk", _EXTRA,
               _of(f"ds = {_DS}", f"ds = wide({_DS}.to(k_BKTD.dtype))"), dtypes=NARROW,
               equivalent="the definition rounds there too"),
    _attention("heads of a group rounded", "each query head's dk is rounded before the sum", _EXTRA,
               _of("(ds.mT @ q).sum(2)", "wide((ds.mT @ q).to(k_BKTD.dtype)).sum(2)"), dtypes=NARROW,
               equivalent="the definition rounds there too"),
    _attention("dk summed in bfloat16", "blocks of queries are added to dk in bfloat16", "linkedin/Liger-Kernel#950",
               _of("(ds.mT @ q).sum(2)",
                   "narrow_sum((ds[..., None] * q[..., None, :]).movedim(3, 0), 4).sum(2)")),
    _attention("scores in bfloat16", "the scores are rounded to bfloat16 before the exponential", _NARROW,
               _of(f"p = {_P}", f"s = wide(s.bfloat16())\n    p = {_P}"), dtypes=WIDE),
    _attention("delta in bfloat16", "delta is kept in bfloat16", _NARROW,
               _of(_DS, _DS.replace("delta[..., None]", "delta[..., None].bfloat16().to(dp.dtype)"))),
    _attention("log-sum-exp in bfloat16", "the log-sum-exp is kept in bfloat16", "pytorch/helion#2273",
               _of(_P, _P.replace("lse[..., None]", "lse[..., None].bfloat16().to(s.dtype)"))),
    _attention("maximum not subtracted", "e^score is formed as it is, and overflows", "vllm-project/vllm#56578",
               _of("s.logsumexp(-1) if lse_BHS is None else lse_BHS.reshape(B, K, groups, S)",
                   "s.exp().sum(-1).log()", _P, "(torch.exp(s) / torch.exp(lse[..., None])).masked_fill(~seen, 0.0)")),
    # -- memory
    _attention("q scaled in place", "q is multiplied with the factor where it lies", "one-line: memory",
               after(lambda y, do, q, *_: (y, over_input(1)(q.float() * q.shape[-1] ** -0.5, do, q))[0])),
    _attention("dk over k", "dk is written over k, which was kept", "linkedin/Liger-Kernel#272",
               after(over_input(2), 1)),
    _attention("dq in do", "dq is written over do", "linkedin/Liger-Kernel#1305", after(over_input(0))),
    _attention("dq added to the last call's", "dq is added up by atomics in a buffer that is not cleared",
               "one-line: buffer not cleared", after(added_to_before())),
    _attention("dq varies", "dq is added up by atomics: its last bit varies from call to call", "one-line: atomics",
               after(unsteady), dtypes=("float32",)),
    _attention("dv missing", "the values get no gradient", "one-line: missing gradient", after(missing, 2)),
    _attention("dq all zero", "dq is 0 everywhere", _ACCUMULATION, after(zeros)),
    _attention("fails on no rows", "raises where there are no queries", "one-line: launch", before(refuse_empty)),
    _attention("delta from the weights", "delta is the sum of p dp though o is given", "one-line: attention",
               _of("(p * dp).sum(-1) if o is None else (do * o).sum(-1)", "(p * dp).sum(-1)"),
               equivalent="both are sum(p dp); o is rounded, so this is the more exact one"),
)

_decode = planter("decode_attention_backward")
_of_decode = partial(changed, "decode_attention_backward")
DECODE = (
    _decode("all slots", "the slots past the length count", _MASK, _of_decode("slice(0, length)", "slice(0, None)")),
    _decode("a slot too few", "the newest slot is left out", _MASK,
            _of_decode("slice(0, length)", "slice(0, max(0, length - 1))")),
    _decode("a slot too many", "the slot after the last counts", _MASK,
            _of_decode("slice(0, length)", "slice(0, length + 1)")),
    _decode("length of the first sequence", "every sequence has the length of the first", _MASK,
            _of_decode("slice(0, length)", "slice(0, int(lengths_B[0]))")),
    _decode("unused slots unwritten", "the gradients of slots past the length are never stored",
            "fla-org/flash-linear-attention#967",
            _of_decode("torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x", "scratch(x) for x")),
    _decode("not causal", "the tokens of a step see each other's keys", _MASK,
            _of_decode("scale=scale", "scale=scale, causal=False")),
    _decode("aligned at the top", "the causal mask is aligned at the first slot", "xlite-dev/ffpa-attn#300", _TOP),
    _decode("scale of the dims", "the factor is D^-1/2, whatever the argument says", "one-line: scale",
            _of_decode(", scale=scale", "")),
    _decode("delta left out", "ds lacks the term with delta", _TERM, _of(_DS, _DS.replace(" - delta[..., None]", ""))),
    _decode("scale left out of dq", "dq lacks its factor", "one-line: scale",
            _of(f"dq = {_DQ}", f"dq = {_DQ}".replace("factor * ", ""))),
    _decode("dk of one head of a group", "dk is that of the first query head that reads it",
            "stanford-crfm/levanter#449",
            _of(_DK, "factor * (ds.mT @ q)[:, :, 0]")),
    _decode("dv averaged over a group", "dv is the mean over the query heads that read it",
            "stanford-crfm/levanter#449",
            _of("(p.mT @ do).sum(2)", "(p.mT @ do).mean(2)")),
    _decode("heads split by the wrong count", "the sum over a group is over every K-th head",
            "XunhaoLai/native-sparse-attention-triton#27",
            _of("(ds.mT @ q).sum(2)", "(ds.mT @ q).flatten(1, 2).unflatten(1, (groups, K)).sum(1)")),
    _decode("dk of the last token", "each token overwrites dk", _ACCUMULATION,
            _of("ds.mT @ q", "ds[..., -1:, :].mT @ q[..., -1:, :]")),
    _decode("do read as dense", "the strides of do are ignored", "Dao-AILab/flash-attention#355",
            before(as_if_dense(0))),
    _decode("cache read as dense", "the strides of the cache of keys are ignored", _STRIDES, before(as_if_dense(2))),
    _decode("v_cache read with strides of k_cache", "the values are read with the strides of the keys",
            "Dao-AILab/flash-attention#2552", before(strides_of(3, 2))),
    _decode("dk over the cache", "dk is written over the cache of keys", "linkedin/Liger-Kernel#272",
            after(over_input(2), 1)),
    _decode("NaN past the length", "what a slot past the length holds reaches dq: 0 times NaN",
            "Dao-AILab/flash-attention#2374",
            after(lambda y, do, q, k, *_: y + 0 * k.sum((1, 2, 3))[:, None, None, None].to(y.dtype))),
    _decode("keys past whole tiles left at 0", "the last, partial tile of 16 slots of dv stays 0", "ROCm/aiter#4244",
            after(zero_tail(16, -2), 2)),
)

_softmax = planter("softmax_backward")
_of_softmax = partial(changed, "softmax_backward")
_SUM_TERM = "(weights * dp).sum(-1, keepdim=True)"
SOFTMAX = (
    _softmax("sum left out", "ds is p dp", _TERM, _of_softmax(f"(dp - {_SUM_TERM})", "dp")),
    _softmax("sum added", "the sum has the wrong sign", _SIGN, _of_softmax(f"dp - {_SUM_TERM}", f"dp + {_SUM_TERM}")),
    _softmax("sum without the weights", "the sum is that of dp", _TERM,
             _of_softmax(_SUM_TERM, "dp.sum(-1, keepdim=True)")),
    _softmax("averaged", "the sum is a mean", _SUM, _of_softmax(_SUM_TERM, _SUM_TERM.replace("sum", "mean"))),
    _softmax("diagonal alone", "ds is p (1 - p) dp", _TERM, _of_softmax(f"(dp - {_SUM_TERM})", "dp * (1 - weights)")),
    _softmax("weights left out", "ds lacks its factor p", _TERM, _of_softmax("weights * (dp -", "1 * (dp -")),
    _softmax("sum of whole tiles", "the last, partial tile of 16 columns is missing from the sum", _TILES,
             _of_softmax(_SUM_TERM, "whole_tiles(weights * dp, 16).sum(-1, keepdim=True)")),
    _softmax("dp read as dense", "the strides of dp are ignored, those of an expanded one too",
             "ROCm/TransformerEngine#623",
             before(as_if_dense(0))),
    _softmax("ds over p", "ds is written over p, which was kept", "linkedin/Liger-Kernel#272", after(over_input(1))),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = ATTENTION + DECODE + SOFTMAX
