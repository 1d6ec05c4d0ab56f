"""Our attention as an attention function of Transformers: `attn_implementation="refllm"`.

    refllm           Triton on a GPU and inside `refllm.kernels.interpreted()`; the plain Torch form elsewhere
    refllm-triton    Triton, or an error that says why not
    refllm-plain     the plain Torch form

What the operators cannot express is computed by Torch's scaled dot-product attention, and a UserWarning says so once
(but not while `torch.compile` traces):
masks in pairs (sliding windows, packed sequences, 4-D masks of a user), a position bias, float64, heads over 256 wide,
keys and values of different widths. What changes the result in a way that this fallback does not know either is
refused: soft caps, attention sinks, paged caches, dropout.
"""

import functools
import warnings
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils import output_capturing

from refllm.errors import InputError
from refllm.kernels.arguments import FLOATS
from refllm.kernels.transformers.masks import STEP, is_lengths, pairs, visible_keys
from refllm.kernels.transformers.operators import call

NAMES: dict[str | None, str] = {None: "refllm", "triton": "refllm-triton", "torch": "refllm-plain"}
"""The name of the implementation for each backend; None: by the device."""

WIDEST_HEAD = 256

_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "cache": "a paged cache",
    "head_mask": "a mask of heads",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# What models and callers pass along without any meaning for attention.
_WITHOUT_MEANING = {
    "position_ids", "cache_position", "position_embeddings", "token_type_ids", "use_cache", "past_key_values", "labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "deterministic",
    "shift_labels", "ignore_index", "num_items_in_batch", "max_length_q", "max_length_k", "sliding_window",
    "position_bias", *_PACKED, *_REFUSED,
}  # fmt: skip


def register() -> None:
    """Makes the three names known to Transformers. Importing `refllm.kernels.transformers` has done it already."""
    for backend, name in NAMES.items():
        AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
        AttentionMaskInterface.register(name, visible_keys)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    backend: str | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """([B, S, H, D], weights [B, H, S, T] or None) for query [B, H, S, D], key and value [B, K, T, D].

    attention_mask: any form of `refllm.kernels.transformers.masks`. The weights are computed beside the kernel if the
    caller records them. Raises InputError for what would change the result unseen.
    """
    (S, D), T = query.shape[2:], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(module, attention_mask, dropout, bool(causal), T, options)
    if scaling is None:
        scaling = D**-0.5
    reason = _beyond_our_operators(query, key, value, attention_mask, options)
    if reason:
        _warn_once(f"Torch's scaled dot-product attention runs instead, because of {reason}")
        seen = pairs(attention_mask, S, T, bool(causal), query.device)
        bias = options.get("position_bias")
        out, _ = sdpa_attention_forward(module, query, key, value, seen, scaling=scaling, position_bias=bias)
    else:
        o_BHSD = _attend(backend, query, key, value, attention_mask, bool(causal), scaling)
        out = o_BHSD.transpose(1, 2).contiguous()
    if not _weights_wanted(options):
        return out, None
    _warn_once("attention weights were asked for; they are computed beside the kernel, in plain Torch")
    return out, _weights(query, key, pairs(attention_mask, S, T, bool(causal), query.device), scaling)


def _attend(
    backend: str | None,
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    B, S = q_BHSD.shape[0], q_BHSD.shape[2]
    if mask is None:
        return call("attention", backend, q_BHSD, k_BKTD, v_BKTD, causal=causal, scale=scale)
    if is_lengths(mask) and S <= STEP:
        lengths_B = mask.view(-1).expand(B)
        return call("decode_attention", backend, q_BHSD, k_BKTD, v_BKTD, lengths_B, scale=scale)
    if is_lengths(mask):
        used = slice(int(mask.view(-1)[0]))
        return call("attention", backend, q_BHSD, k_BKTD[:, :, used], v_BKTD[:, :, used], scale=scale)
    keys = mask[:, 0, 0] if mask.ndim == 4 else mask
    used = slice(keys.shape[1])
    k_BKTD, v_BKTD = k_BKTD[:, :, used], v_BKTD[:, :, used]
    return call("attention", backend, q_BHSD, k_BKTD, v_BKTD, key_mask=keys.expand(B, -1), scale=scale)


def _refuse(
    module: torch.nn.Module, mask: torch.Tensor | None, dropout: float, causal: bool, T: int, options: dict[str, Any]
) -> None:
    """Raises InputError for what neither our operators nor the fallback compute as the model means it."""
    where = f'attn_implementation="refllm" in {type(module).__name__}'
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise InputError(f"{where}: {name} was given, and {what} cannot be computed; use another implementation")
    if dropout:
        raise InputError(
            f"{where}: attention dropout of {dropout} in training mode, which cannot be computed; set "
            "config.attention_dropout = 0 to train, or call model.eval()"
        )
    known = (
        mask is None or is_lengths(mask) or mask.dtype == torch.bool or (mask.ndim == 4 and mask.is_floating_point())
    )
    if mask is not None and not (known and mask.ndim in (2, 4)):
        found = f"{list(mask.shape)} {mask.dtype}"
        raise InputError(
            f"{where}: attention_mask is {found}; expected bool, [B, T] or [B, 1, S, T], or float in pairs"
        )
    in_pairs = mask is not None and mask.ndim == 4 and not is_lengths(mask)
    if in_pairs:
        return
    packed = [name for name in _PACKED if options.get(name) is not None]
    if packed:
        raise InputError(f"{where}: {packed[0]} was given; pass position_ids that start again for packed sequences")
    window = options.get("sliding_window")
    if window is not None and window < T:
        raise InputError(f"{where}: a sliding window of {window} over {T} keys, without the mask that says so")
    if mask is not None and not causal:
        raise InputError(f"{where}: attention that is not causal was given a causal mask, {list(mask.shape)}")
    for name in options.keys() - _WITHOUT_MEANING:
        if options[name] is not None:
            _warn_once(f"the argument {name!r} is not known and is left out")


def _beyond_our_operators(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> str:
    """Why a call needs the fallback; "" if it does not."""
    if q.dtype not in FLOATS:
        return f"{str(q.dtype).removeprefix('torch.')} numbers"
    if k.shape[-1] != v.shape[-1] or not 0 < q.shape[-1] <= WIDEST_HEAD:
        return f"keys {k.shape[-1]} and values {v.shape[-1]} wide"
    if options.get("position_bias") is not None:
        return "a position bias"
    if mask is None or mask.ndim == 2 or is_lengths(mask):
        return ""
    one_query = mask.ndim == 4 and mask.dtype == torch.bool and q.shape[2] == 1 == mask.shape[1]
    return "" if one_query else "a mask in pairs of positions (sliding window, packed sequences, or a 4-D mask)"


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    if torch.compiler.is_compiling():  # which cannot trace a warning
        return
    warnings.warn(f'attn_implementation="refllm": {text}', UserWarning, stacklevel=2)


def _weights_wanted(options: dict[str, Any]) -> bool:
    """Whether someone records the weights. Models that do not pass `output_attentions` down still record them: through
    the collector of Transformers' hooks."""
    collector = getattr(output_capturing, "_active_collector", None)
    collected = collector.get() if collector is not None else None
    return bool(options.get("output_attentions")) or "attentions" in (collected or {})


def _weights(q_BHSD: torch.Tensor, k_BKTD: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k^T) over the keys seen, [B, H, S, T]; a query that sees none has weights 0."""
    k_BHTD = k_BKTD.repeat_interleave(q_BHSD.shape[1] // k_BKTD.shape[1], dim=1)
    hidden = ~seen if seen.dtype == torch.bool else seen == -torch.inf
    s_BHST = scale * (q_BHSD.float() @ k_BHTD.float().transpose(2, 3))
    s_BHST = s_BHST.masked_fill(hidden, -torch.inf) if seen.dtype == torch.bool else s_BHST + seen
    return torch.softmax(s_BHST, dim=-1).masked_fill(hidden.all(-1, keepdim=True), 0.0).to(q_BHSD.dtype)
