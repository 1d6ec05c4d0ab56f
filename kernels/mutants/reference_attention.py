"""Mutants of attention: over all keys, and of the last tokens over a cache."""

from collections.abc import Callable
from typing import Any

import torch

from refllm.kernels import plain
from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.planting import (
    after,
    as_if_dense,
    before,
    changed,
    in_float32,
    instead,
    kept_first,
    over_input,
    planter,
    refuse_empty,
    unsteady,
    unwritten_tail,
    zero_tail,
)
from refllm.kernels.plain.attention import attention

NARROW = ("bfloat16", "float16")
WIDE = ("float16", "float32")
_SCALE = "(D**-0.5 if scale is None else scale)"
_VISIBLE = "(slot[:stop] <= last)[None]"
_HIDDEN = '.masked_fill_(~visible[:, None, None], float("-inf"))'
_SHIFT = 'top.masked_fill(top == float("-inf"), 0.0)'
_DENOMINATOR = "total.masked_fill(total == 0, 1.0)"
_SCORES = "q.float().reshape(B, K, H // K * S, D) @ k.mT"
_Split = tuple[torch.Tensor, torch.Tensor]


def _seen(condition: str) -> Any:
    """The way in which `attention` sees other keys: condition in terms of slot[:stop], last, T and causal."""
    return changed("attention", _VISIBLE, f"({condition})[None]")


_FINITE = changed("_attend", _HIDDEN, ".masked_fill_(~visible[:, None, None], -1e4)")
_MEAN_OF_ALL = changed("_attend", _HIDDEN, ".masked_fill_(~visible[:, None, None], -1e30)", _DENOMINATOR, "total")
_ADDED = changed("_attend", _HIDDEN, ' + torch.where(visible[:, None, None], 0.0, float("-inf"))')
_PLAIN_PRODUCT = changed("_attend", "_product(weights, v)", "(weights @ v)")
_EMPTY_NAN = changed("_attend", _DENOMINATOR, "total")
_PADS_COUNT = changed("_attend", "total = p.sum(-1, keepdim=True)",
                      "total = p.sum(-1, keepdim=True) + -T % 64 * torch.exp(-top)")  # fmt: skip
_WEIGHTS_ROUNDED = changed("_attend", "p.to(q.dtype)", "p.bfloat16()")
_NO_RESCALE = changed(
    "_attend", _SHIFT,
    's.cummax(-1).values[..., [min(T, t // 16 * 16 + 16) - 1 for t in range(T)]].clamp(min=-3e38)',
)  # fmt: skip


def _grouped_by_modulo(operator: str) -> Callable[..., Any]:
    """Query head h reads key/value head h % K, as with K/V heads that are tiled instead of repeated."""
    right = getattr(plain, operator)

    def wrong(q: torch.Tensor, k: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        K, group = k.shape[1], q.shape[1] // k.shape[1]
        out = right(q.unflatten(1, (group, K)).transpose(1, 2).flatten(1, 2), k, *rest, **keywords)
        back = [
            y.unflatten(1, (K, group)).transpose(1, 2).flatten(1, 2) for y in (out if type(out) is tuple else (out,))
        ]
        return tuple(back) if type(out) is tuple else back[0]

    return wrong


@instead
def _always_causal(*arguments: Any, causal: bool = True, **keywords: Any) -> Any:
    return attention(*arguments, **keywords)


@instead
def _one_key_given_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> Any:
    if v.shape == q.shape and v.shape[2] == 1 and keywords.get("key_mask") is None and not keywords.get("return_lse"):
        return v
    return attention(q, k, v, **keywords)


@instead
def _v_with_strides_of_k(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> Any:
    held = v.untyped_storage().nbytes() // v.element_size() - v.storage_offset()
    reach = 1 + sum((n - 1) * stride for n, stride in zip(v.shape, k.stride(), strict=True))
    if v.numel() and reach > held:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return attention(q, k, v.as_strided(v.shape, k.stride()) if v.numel() else v, **keywords)


@instead
def _scaled_in_place(q: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
    out = attention(q, *rest, **keywords)
    q *= q.shape[-1] ** -0.5
    return out


def _split(combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], slots: int = 32, dropped: int = 0) -> Any:
    """decode_attention in splits of the cache, combined from their results and LSEs [splits, B, H, S].

    combine(lse, o) makes the result. dropped: how many splits at the end nobody starts.
    """

    def wrong(q: Any, k: Any, v: Any, lengths: torch.Tensor, *, scale: float | None = None) -> Any:
        (B, H, S, _), N = q.shape, k.shape[2]
        parts = []
        for first in range(0, N, slots)[: -dropped or None]:
            at = torch.arange(N)[first : first + slots]
            seen = at < (lengths[:, None] - S + 1 + torch.arange(S))[..., None]
            o, lse = torch.zeros(q.shape), torch.full((B, H, S), float("-inf"))
            for s in range(S):
                o[:, :, s : s + 1], lse[:, :, s : s + 1] = attention(
                    q[:, :, s : s + 1].float(), k[:, :, at].float(), v[:, :, at].float(), scale=scale, causal=False,
                    key_mask=seen[:, s], return_lse=True,
                )  # fmt: skip
            parts.append((lse, o))
        if not parts:
            return plain.decode_attention(q, k, v, lengths, scale=scale)
        lse, o = (torch.stack(part) for part in zip(*parts, strict=True))
        return combine(lse, o).to(q.dtype)

    return instead(wrong)


def _combined(lse: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(lse - lse.amax(0).nan_to_num(neginf=0.0))
    total = weights.sum(0)
    return (weights[..., None] * o).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]


def _combined_without_guard(lse: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(lse - lse.amax(0))
    return (weights[..., None] * o).sum(0) / weights.sum(0)[..., None]


def _averaged(lse: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    started = (lse > float("-inf")).float()
    return (started[..., None] * o).sum(0) / started.sum(0).clamp(min=1)[..., None]


def _empty_counts(lse: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    return _combined(torch.where(lse == float("-inf"), 0.0, lse), o)


@instead
def _tail_of_cache_cleared(q: Any, k: Any, v: Any, lengths: torch.Tensor, **keywords: Any) -> Any:
    out = plain.decode_attention(q, k, v, lengths, **keywords)
    for b, length in enumerate(lengths.tolist()):
        v[b, :, length:] = 0
    return out


@instead
def _lengths_moved_on(q: Any, k: Any, v: Any, lengths: torch.Tensor, **keywords: Any) -> Any:
    out = plain.decode_attention(q, k, v, lengths, **keywords)
    lengths += q.shape[2]
    return out


# fmt: off
_att = planter("attention")
ATTENTION = (
    _att("scale from E", "the scale is (H D)^-1/2", "one-line: attention",
         changed("_attend", "D**-0.5", "(H * D) ** -0.5")),
    _att("no scale", "scores are not scaled", "one-line: attention", changed("_attend", f" * {_SCALE}", "")),
    _att("scale argument ignored", "the scale is D^-1/2, whatever the argument says", "one-line: attention",
         changed("_attend", _SCALE, "D**-0.5")),
    _att("scores rounded", "scores are rounded to the dtype of q", "one-line: attention",
         changed("_attend", "s = s.view", "s = s.to(q.dtype).float().view"), dtypes=NARROW, place="scaled scores"),
    _att("weights in bfloat16", "softmax weights are rounded to bfloat16 whatever q is", "one-line: extra rounding",
         _WEIGHTS_ROUNDED, dtypes=WIDE),
    _att("denominator rounded", "the softmax's denominator is kept in the dtype of q", "one-line: extra rounding",
         changed("_attend", "total = p.sum(-1, keepdim=True)", "total = p.sum(-1, keepdim=True).to(q.dtype).float()"),
         dtypes=NARROW),
    _att("mask one too wide", "a query sees one key after itself", "one-line: attention",
         _seen("slot[:stop] <= last + 1")),
    _att("diagonal masked", "a query does not see its own key", "one-line: attention", _seen("slot[:stop] < last")),
    _att("aligned at the start", "with S < T the mask starts at key 0: query s sees keys 0 .. s", "one-line: attention",
         changed("attention", "(T - S if causal else T)\n        visible", "(0 if causal else T)\n        visible")),
    _att("always causal", "causal=False is ignored", "triton-lang/triton#4541", _always_causal),
    _att("last key left out", "the last key is never read", "one-line: attention",
         _seen("(slot[:stop] <= last) & (slot[:stop] < T - 1)")),
    _att("keys past 64 dropped", "the last, partial tile of 64 keys is never read", "one-line: attention",
         _seen("(slot[:stop] <= last) & (slot[:stop] < (T if T < 64 else T // 64 * 64))")),
    _att("window of 64", "a query sees no more than 64 keys back", "huggingface/transformers#39408",
         _seen("(slot[:stop] <= last) & (~torch.tensor(causal) | (slot[:stop] > last - 64))")),
    _att("heads by modulo", "query head h reads key/value head h % K", "one-line: attention", _grouped_by_modulo),
    _att("first key head for all", "all query heads read the first key/value head", "one-line: attention",
         before(lambda q, k, v: (q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)))),
    _att("finite sentinel", "masked scores are -1e4, and valid ones may be smaller", "flashinfer-ai/flashinfer#4401",
         _FINITE),
    _att("mean for no keys", "a row without a key becomes the mean of all values", "flashinfer-ai/flashinfer#4401",
         _MEAN_OF_ALL),
    _att("NaN for no keys", "a row without a key is 0 / 0", "Dao-AILab/flash-attention 26d7d92f", _EMPTY_NAN),
    _att("NaN of a masked value", "0 times a masked NaN reaches the result", "Dao-AILab/flash-attention#2374",
         _PLAIN_PRODUCT),
    _att("NaN of a masked key", "the mask is added: NaN - inf is NaN", "vllm-project/vllm#53856", _ADDED),
    _att("key mask ignored", "key_mask is ignored", "one-line: attention",
         changed("attention", "if key_mask is not None", "if False")),
    _att("key mask of the first sequence", "all sequences share the first one's key_mask", "one-line: strides",
         changed("attention", "key_mask[:, None, :stop]", "key_mask[:1, None, :stop]")),
    _att("padding in the denominator", "the padding lanes of the last tile count as keys with score 0",
         "flashinfer-ai/flashinfer#3717", _PADS_COUNT),
    _att("no rescaling", "the online softmax does not rescale what it has when its maximum grows",
         "one-line: attention",
         _NO_RESCALE),
    _att("maximum not subtracted", "e^score overflows", "vllm-project/vllm#56578",
         changed("_attend", f"s - {_SHIFT}", "s", "total.log() + top", "total.log()")),
    _att("LSE in base 2", "the log-sum-exp is a logarithm in base 2", "one-line: attention",
         changed("_attend", "total.log() + top", "(total.log() + top) * 1.4426950408889634")),
    _att("LSE without the maximum", "the log-sum-exp lacks the maximum that was subtracted", "one-line: attention",
         changed("_attend", "total.log() + top", "total.log()")),
    _att("LSE of no keys", "the log-sum-exp of a row without a key is 0, not -inf", "Dao-AILab/flash-attention#2842",
         changed("_attend", "total.log() + top", "(total.log() + top).nan_to_num(neginf=0.0)")),
    _att("LSE in the dtype of q", "the log-sum-exp is not float32", "one-line: dtypes",
         after(lambda lse, q, *_: lse.to(q.dtype) if lse.ndim == 3 else lse, output=1), dtypes=NARROW),
    _att("dims past 64 not in the scores", "scores are products of whole tiles of 64 dims alone",
         "triton-lang/triton#621",
         changed("_attend", _SCORES,
                 "whole_tiles(q.float().reshape(B, K, H // K * S, D), 64) @ whole_tiles(k, 64).mT")),
    _att("dims past 64 unwritten", "the last, partial tile of 64 dims is never stored", "ROCm/aiter#4244",
         after(unwritten_tail(64))),
    _att("rows past 64 zero", "the last, partial tile of 64 queries stays zero", "one-line: tiles",
         after(zero_tail(64, axis=2))),
    _att("batch stride 0", "every sequence gets the result of the first", "vllm-project/flash-attention#176",
         after(kept_first(0))),
    _att("v read with the strides of k", "the strides of k are used for v", "Dao-AILab/flash-attention#355",
         _v_with_strides_of_k),
    _att("q read as dense", "the strides of q are ignored", "flashinfer-ai/flashinfer#3392", before(as_if_dense(0))),
    _att("tokens before heads", "the result is [B, S, H, D]", "flagos-ai/FlagGems#5235",
         after(lambda o, *_: o.transpose(1, 2) if o.ndim == 4 else o)),
    _att("one key given back", "with one key and one query v itself is returned", "one-line: views",
         _one_key_given_back),
    _att("q scaled in place", "q is scaled in its own memory", "one-line: in place", _scaled_in_place),
    _att("fails on no rows", "raises where there are no queries", "one-line: launch", before(refuse_empty)),
    _att("scale on q first", "q is scaled in float32 before the product", "one-line: attention",
         changed("_attend", f"{_SCORES} * {_SCALE}", f"(q.float() * {_SCALE}).reshape(B, K, H // K * S, D) @ k.mT"),
         equivalent="the same products, scaled before they are added: the error stays within float32's"),
)

_dec = planter("decode_attention")
DECODE_ATTENTION = (
    _dec("lengths ignored", "all slots of the cache are read", "vllm-project/vllm#936",
         changed("decode_attention", "lengths_B[:, None] - S", "torch.full_like(lengths_B, N)[:, None] - S")),
    _dec("one slot too many", "the slot after the last one is read", "one-line: attention",
         changed("decode_attention", "< end[..., None]", "<= end[..., None]")),
    _dec("last slot stale", "the token's own slot is not read", "one-line: attention",
         changed("decode_attention", "< end[..., None]", "< end[..., None] - 1")),
    _dec("length of the first sequence", "all sequences have the length of the first",
         "vllm-project/flash-attention#176",
         changed("decode_attention", "end = lengths_B[:, None]", "end = lengths_B[:1].expand_as(lengths_B)[:, None]")),
    _dec("tokens see each other", "of several tokens, the earlier see the later ones", "one-line: attention",
         changed("decode_attention", " - S + 1 + torch.arange(S, device=q_BHSD.device)",
                 " + torch.zeros(S, dtype=torch.int64)")),
    _dec("tokens aligned at the start", "of several tokens, token s sees length + s slots", "one-line: attention",
         changed("decode_attention", " - S + 1 +", " +")),
    _dec("NaN of an unused value", "0 times a NaN past the length reaches the result", "Dao-AILab/flash-attention#2374",
         _PLAIN_PRODUCT),
    _dec("NaN of an unused key", "the mask is added: NaN - inf is NaN", "vllm-project/vllm#53856", _ADDED),
    _dec("finite sentinel", "masked scores are -1e4, and valid ones may be smaller", "flashinfer-ai/flashinfer#4401",
         _FINITE),
    _dec("NaN for length 0", "a sequence of length 0 is 0 / 0", "Dao-AILab/flash-attention 26d7d92f", _EMPTY_NAN),
    _dec("padding in the denominator", "the padding lanes of the last tile count as slots with score 0",
         "flashinfer-ai/flashinfer#3717", _PADS_COUNT),
    _dec("slots past 128 dropped", "the last, partial tile of 128 slots is never read", "ROCm/aiter#4673",
         changed("decode_attention", "< end[..., None]",
                 "< end.clamp(max=N if N < 128 else N // 128 * 128)[..., None]")),
    _dec("empty split", "a split without a slot is combined as -inf - -inf", "tile-ai/tilelang#328",
         _split(_combined_without_guard)),
    _dec("empty split counts", "the log-sum-exp of a split without a slot is 0", "Dao-AILab/flash-attention#2842",
         _split(_empty_counts)),
    _dec("splits averaged", "splits are averaged and not weighted by their sums", "one-line: attention",
         _split(_averaged)),
    _dec("last split not started", "the last split of the cache is not started", "ROCm/aiter#4673",
         _split(_combined, dropped=1)),
    _dec("heads by modulo", "query head h reads key/value head h % K", "one-line: attention", _grouped_by_modulo),
    _dec("scale argument ignored", "the scale is D^-1/2, whatever the argument says", "one-line: attention",
         changed("_attend", _SCALE, "D**-0.5")),
    _dec("weights in bfloat16", "softmax weights are rounded to bfloat16 whatever q is", "one-line: extra rounding",
         _WEIGHTS_ROUNDED, dtypes=WIDE),
    _dec("no rescaling", "the online softmax does not rescale what it has when its maximum grows",
         "one-line: attention",
         _NO_RESCALE),
    _dec("cache read as dense", "the strides of the key cache are ignored", "flagos-ai/FlagGems#5235",
         before(as_if_dense(1))),
    _dec("batch stride 0", "every sequence gets the result of the first", "vllm-project/flash-attention#176",
         after(kept_first(0))),
    _dec("dims past 64 not in the scores", "scores are products of whole tiles of 64 dims alone",
         "triton-lang/triton#621",
         changed("_attend", _SCORES,
                 "whole_tiles(q.float().reshape(B, K, H // K * S, D), 64) @ whole_tiles(k, 64).mT")),
    _dec("dims past 64 unwritten", "the last, partial tile of 64 dims is never stored", "ROCm/aiter#4244",
         after(unwritten_tail(64))),
    _dec("cache cleared", "the slots past the length are set to 0", "one-line: in place", _tail_of_cache_cleared),
    _dec("lengths moved on", "the lengths are moved on in place", "one-line: in place", _lengths_moved_on),
    _dec("result over q", "the result is written into q", "one-line: in place", after(over_input(0))),
    _dec("float32 result", "the result is float32 whatever q is", "one-line: dtypes", after(in_float32), dtypes=NARROW),
    _dec("varies", "the last bit of the result varies from call to call", "one-line: atomics", after(unsteady),
          dtypes=("float32",)),
    _dec("splits of 32 slots", "the cache in splits that are combined by their log-sum-exp", "one-line: attention",
         _split(_combined), equivalent="the combination is exact: only the order of additions differs"),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = ATTENTION + DECODE_ATTENTION
