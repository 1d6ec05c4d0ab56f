"""Makes of the `attention_mask` and `position_ids` of a call what `ops.attention` is told about who sees whom.

B batch, S query positions of this call, P tokens cached before it, T = P + S key positions. The rules are those of
Transformers (masking_utils), except that a boolean 4-D mask means True = attend in every precision (its eager attention
adds it as a number).
"""

from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.inputs import as_array


def masking(
    attention_mask: np.ndarray | None,
    position_ids: np.ndarray | None,
    *,
    batch: int,
    queries: int,
    cached: int,
    has_cache: bool,
    heads: int,
) -> dict[str, Any]:
    """Keyword arguments for `ops.attention`.

    attention_mask: None; [B, n], nonzero = attend, over cached and new tokens (short masks are continued with 0, long
        ones cut); or [B or 1, 1 or H, S, T], used as it is, without causality: bool (True = attend) or float (added).
    position_ids: what the caller gave, or None. Given alone, without mask and cache, they pack sequences: wherever they
        do not continue by one, a new sequence begins, and none sees another.

    Raises InputError for any other shape.
    """
    keys = cached + queries
    if attention_mask is None:
        if position_ids is not None and not has_cache:
            return _packed(position_ids)
        return {"causal": True}
    mask = as_array("attention_mask", attention_mask)
    if mask.ndim == 2:
        return {"causal": True, "key_mask": _key_mask(mask, batch, keys)}
    if mask.ndim != 4:
        raise InputError(
            f"attention_mask: expected [{batch}, {keys}] or [{batch} or 1, {heads} or 1, {queries}, {keys}], "
            f"found shape {mask.shape}"
        )
    for axis, (size, allowed) in enumerate(zip(mask.shape, ((1, batch), (1, heads), (queries,), (keys,)), strict=True)):
        if size not in allowed:
            raise InputError(
                f"attention_mask: shape {mask.shape} does not fit [{batch} or 1, {heads} or 1, {queries}, {keys}] "
                f"(axis {axis})"
            )
    if mask.dtype != bool and not np.issubdtype(mask.dtype, np.floating):
        raise InputError(f"attention_mask: a 4-D mask is bool (True = attend) or float (added), found {mask.dtype}")
    return {"causal": False, "mask": mask}


def _key_mask(mask: np.ndarray, batch: int, keys: int) -> np.ndarray | None:
    if mask.shape[0] != batch:
        raise InputError(f"attention_mask: expected [{batch}, {keys}], found shape {mask.shape}")
    attend = mask[:, :keys] != 0
    if attend.shape[1] < keys:
        attend = np.pad(attend, ((0, 0), (0, keys - attend.shape[1])))
    return None if attend.all() else attend


def _packed(position_ids: np.ndarray) -> dict[str, Any]:
    starts = np.diff(position_ids, axis=-1) != 1
    if not starts.any():
        return {"causal": True}
    segment = np.pad(np.cumsum(starts, axis=-1), ((0, 0), (1, 0)))
    same = segment[:, :, None] == segment[:, None, :]
    return {"causal": True, "mask": same[:, None]}
