"""Defects and places of attention. Each entry: name -> the fields of `refllm.mutants.models.Mutant`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refllm.mutants.planting import (
    attend,
    attention_is,
    fused_attention_is,
    hidden,
    layer_of,
    repeated,
    rotation_is,
    visible,
)

_TILE = 16
_WINDOW = 32


def grouped(config: Any) -> bool:
    """Whether heads share keys and values, and there is more than one group."""
    return bool(1 < config.num_key_value_heads < config.num_attention_heads)


def windowed(config: Any) -> bool:
    """Whether queries of some layer see a window of the keys."""
    return any(config.window(layer) is not None for layer in range(config.num_hidden_layers))


def _scaled_by(change: Any) -> Any:
    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        return attend(q, repeated(module, k), repeated(module, v), mask, change(module))

    return attention_is(attention)


def _seeing(change: Any) -> Any:
    """change(visible keys [B, 1, S, T], query positions [S, 1], key positions [T]) -> visible keys."""

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        import torch

        S, T = q.shape[2], k.shape[2]
        seen = change(visible(mask, q, k), torch.arange(T - S, T)[:, None], torch.arange(T))
        return attend(q, repeated(module, k), repeated(module, v), hidden(seen, q.dtype), scale)

    return attention_is(attention)


def _one_more(seen: Any, s: Any, t: Any) -> Any:
    more = seen.clone()
    more[..., 1:] |= seen[..., :-1]
    return more


def _one_older(seen: Any, s: Any, t: Any) -> Any:
    more = seen.clone()
    more[..., :-1] |= seen[..., 1:]
    return more & (t <= s)


def _oldest_hidden(seen: Any, s: Any, t: Any) -> Any:
    """The first key that a query sees is hidden, unless it is the first of all."""
    less = seen.clone()
    less[..., 1:] &= seen[..., :-1]
    return less


def _stale(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    k, v = k.clone(), v.clone()
    k[:, :, -1], v[:, :, -1] = k[:, :, -2], v[:, :, -2]
    return attend(q, repeated(module, k), repeated(module, v), mask, scale)


def _tiled(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    k, v = (x.repeat(1, module.num_key_value_groups, 1, 1) for x in (k, v))
    return attend(q, k, v, mask, scale)


def _online(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """Blocks of keys, each relative to the maximum so far; what came before is not rescaled to a new maximum."""
    import torch

    k, v = repeated(module, k).float(), repeated(module, v).float()
    scores = (q.float() @ k.transpose(2, 3) * scale).masked_fill(~visible(mask, q, k), -torch.inf)
    total, out, top = torch.zeros(1), torch.zeros(1), torch.full((*scores.shape[:3], 1), -torch.inf)
    for start in range(0, k.shape[2], _TILE):
        block = scores[..., start : start + _TILE]
        top = torch.maximum(top, block.amax(-1, keepdim=True))
        weights = (block - top.clamp(min=-1e30)).exp()
        total = total + weights.sum(-1, keepdim=True)
        out = out + weights @ v[:, :, start : start + _TILE]
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    return (out / total.clamp(min=1e-30)).to(q.dtype).transpose(1, 2).contiguous(), weights


def _rounded_scores(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """A kernel whose scores are rounded to bfloat16 on their way to softmax, which is otherwise in float32."""
    k, v = repeated(module, k), repeated(module, v)
    scores = (q.float() @ k.float().transpose(2, 3) * scale).bfloat16().float() + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = weights.to(q.dtype).float() @ v.float() / weights.sum(-1, keepdim=True)
    return out.to(q.dtype).transpose(1, 2).contiguous(), None


def _finite_sentinel(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    return attend(q, repeated(module, k), repeated(module, v), mask.clamp(min=-1e4), scale)


@contextmanager
def cached_before_rotation(model: Any, layer: int) -> Iterator[None]:
    """The cache receives the keys as they were before rotation."""
    attention = layer_of(model, layer).self_attn
    kept: dict[str, Any] = {}

    def rotation(rotary: Any, original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        kept["rotated dims"] = k
        return original(q, k, cos, sin)

    class Cache:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self.cache, name)

        def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            key, plain = key.clone(), kept["rotated dims"]
            rotated = key[..., : plain.shape[-1]].clone()
            key[..., : plain.shape[-1]] = plain
            keys, values = self.cache.update(key, value, *args, **kwargs)
            keys = keys.clone()  # the new keys are used as they should be; only what is stored is wrong
            keys[:, :, -key.shape[2] :, : plain.shape[-1]] = rotated
            return keys, values

    def exchange(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        return args, {**kwargs, "past_key_values": cache if cache is None else Cache(cache)}

    handle = attention.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        with rotation_is(rotation)(model, layer):
            yield
    finally:
        handle.remove()


_ATTENTION = ("self_attn.probs", "self_attn.context")

ATTENTION: dict[str, dict[str, Any]] = {
    "scale from the hidden size": {
        "taps": _ATTENTION,
        "plant": _scaled_by(lambda module: module.config.hidden_size**-0.5),
    },
    "scale missing": {"taps": _ATTENTION, "plant": _scaled_by(lambda module: 1.0)},
    "scores rounded": {
        "taps": ("self_attn.context",),
        "plant": fused_attention_is(_rounded_scores),
        "attention": "sdpa",
        "place": ("scaled scores", "q k"),
    },
    "mask one too wide": {
        "taps": _ATTENTION,
        "plant": _seeing(_one_more),
        "source": "huggingface/transformers#39408",
    },
    "diagonal masked": {"taps": _ATTENTION, "plant": _seeing(lambda seen, s, t: seen & (s != t))},
    "last key stale": {"taps": _ATTENTION, "plant": attention_is(_stale)},
    "tail keys dropped": {
        "taps": _ATTENTION,
        "plant": _seeing(lambda seen, s, t: seen & (t < len(t) // _TILE * _TILE)),
        "source": "ROCm/aiter#4673",
    },
    "unwanted window": {
        "taps": _ATTENTION,
        "plant": _seeing(lambda seen, s, t: seen & (t > s - _WINDOW)),
        "applies": lambda config: not windowed(config),
    },
    "key and value heads tiled instead of repeated": {
        "taps": _ATTENTION,
        "plant": attention_is(_tiled),
        "applies": grouped,
    },
    "online softmax without rescaling": {"taps": _ATTENTION, "plant": attention_is(_online)},
    "cache written before rotation": {"taps": _ATTENTION, "plant": cached_before_rotation},
    "finite mask sentinel": {
        "taps": _ATTENTION,
        "plant": attention_is(_finite_sentinel),
        "source": "flashinfer-ai/flashinfer#4401",
        "equivalent": "scores stay within a few hundred, so exp(-10000 - score) is 0 as with an infinite sentinel",
    },
}

WINDOW: dict[str, dict[str, Any]] = {
    "window one too wide": {"taps": _ATTENTION, "plant": _seeing(_one_older), "applies": windowed},
    "window one too narrow": {"taps": _ATTENTION, "plant": _seeing(_oldest_hidden), "applies": windowed},
    "window ignored": {"taps": _ATTENTION, "plant": _seeing(lambda seen, s, t: t <= s), "applies": windowed},
}
"""What only families with a window can have."""
