"""Who sees whom: what Transformers asks a mask function, answered in the terms of our attention.

Transformers hands what the mask function returns to the attention function of every layer. Ours returns

    None                      causal, over all T keys; the last query sees the last key
    integers [B, 1, 1, 1]     causal, over the first n[b] of T keys; up to `STEP` queries, or B = 1 and on the CPU
    bool [B, W]               causal, over the first W of T keys, and of those the ones that are True (padding)
    bool [B, 1, 1, T]         one query per row, and the keys that it sees
    bool [B, 1, S, T]         anything else, in pairs: no kernel of ours takes this, so it is SDPA's case

Each of these is understood again when a model passes it back as `attention_mask`, as `generate` does with static
caches. Nothing here is quadratic in memory but the last. Shapes: B batch, S queries, T keys.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from refllm.errors import InputError

STEP = 8
"""Queries up to which `decode_attention` is used: its own limit."""


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | None:
    """The mask function of `attn_implementation="refllm"`, in the signature of `transformers.masking_utils`.

    attention_mask: [B, n], nonzero = attend, or None. Sliding windows, packed sequences, blocks and bidirectional masks
    arrive as another `mask_function` or an offset of the keys; they are answered in pairs. Raises InputError for a mask
    of other shapes, and for a model that computes attention by itself: it would add our masks to its scores.
    """
    _check(type(options.get("config")), attention_mask, batch_size)
    attention_mask = None if attention_mask is None else attention_mask.bool()
    asked = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, "device": device,
    }  # fmt: skip
    if mask_function is not causal_mask_function or not _is_zero(kv_offset):
        return _in_pairs(asked, options)
    end = q_offset + q_length
    if isinstance(end, torch.Tensor):  # a static cache counts its tokens in a tensor
        if not is_tracing(end):
            end = int(end)
        elif q_length == 1:
            used = torch.arange(kv_length, device=device) < end
            keys = used.expand(batch_size, -1) if attention_mask is None else used & _sized(attention_mask, kv_length)
            return keys[:, None, None]
        else:  # to cut the keys would need the number, and a traced graph has none
            return _in_pairs(asked, options)
    keys = None if attention_mask is None else _sized(attention_mask, end)
    if keys is None or (not is_tracing(keys) and bool(keys.all())):
        return _unpadded(batch_size, q_length, kv_length, end, device)
    return _sized(keys, kv_length)[:, None, None] if q_length == 1 else keys


def _check(config: type, mask: torch.Tensor | None, batch_size: int) -> None:
    if not is_tracing() and not _looks_up_attention(config):
        raise InputError(
            f'attn_implementation="refllm": the model of {config.__name__} computes attention by itself and takes no '
            'other; load it with attn_implementation="eager"'
        )
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch_size):
        raise InputError(f"attention_mask: shape {list(mask.shape)}; expected [{batch_size}, tokens] or [B, H, S, T]")


@functools.lru_cache(maxsize=256)
def _looks_up_attention(config: type) -> bool:
    """Whether the models of a config class look up their attention function by name; True where that is unknown.

    By their source, as Transformers itself finds out (PreTrainedModel._can_set_attn_implementation).
    """
    modeling = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    if modeling is None or modeling.__name__ == config.__module__:
        return True
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(modeling)
    except (OSError, TypeError):
        return True


def _unpadded(B: int, S: int, T: int, end: int, device: torch.device | str) -> torch.Tensor | None:
    """Causal over the first `end` of T keys. On the CPU where it is read there, to cut the keys."""
    if S <= STEP:
        return torch.full((B, 1, 1, 1), end, device=device)
    return None if end == T else torch.full((1, 1, 1, 1), end)


def _in_pairs(asked: dict[str, Any], options: dict[str, Any]) -> torch.Tensor | None:
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**asked, **(options | skips))


def _is_zero(offset: Any) -> bool:
    return isinstance(offset, int) and offset == 0


def _sized(keys_BT: torch.Tensor, length: int) -> torch.Tensor:
    """[B, length]: cut, or continued with False, as Transformers continues masks that are too short."""
    return torch.nn.functional.pad(keys_BT[:, :length], (0, max(0, length - keys_BT.shape[1])))


def pairs(mask: torch.Tensor | None, q_length: int, kv_length: int, causal: bool, device: Any) -> torch.Tensor:
    """Any of the forms above as bool, broadcastable to [B, 1, S, T]; a mask in pairs as it is."""
    S, T = q_length, kv_length
    if mask is not None and mask.ndim == 4 and not is_lengths(mask):
        return mask
    t, s = torch.arange(T, device=device), torch.arange(S, device=device)[:, None]
    if mask is None:
        return (t <= T - S + s if causal else torch.ones(S, T, dtype=torch.bool, device=device))[None, None]
    if is_lengths(mask):
        return t <= mask.to(device) - S + s
    W = mask.shape[1]
    return (t <= W - S + s) & _sized(mask, T)[:, None, None]


def is_lengths(mask: torch.Tensor | None) -> bool:
    """Whether a mask is the form of integers, [B, 1, 1, 1]."""
    return mask is not None and mask.shape[1:] == (1, 1, 1) and mask.dtype in (torch.int32, torch.int64)
