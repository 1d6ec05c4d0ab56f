"""The last positions of a run alone, for a first look: its operators there, with the keys and values that it shows of
the positions before."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refllm.accuracy.propagation import Uncertain, certain
from refllm.check.inputs import Inputs
from refllm.check.trace import Trace
from refllm.check.values import like, raw_of
from refllm.config import ModelConfig
from refllm.errors import InputError


def last_positions(trace: Trace, count: int) -> Trace:
    """The trace with the last `count` positions of every row alone; as it is, where there are no more. Raises
    InputError for a run with gradients, and where these positions are all padding."""
    inputs = trace.inputs
    if count >= inputs.input_ids.shape[1]:
        return trace
    if inputs.learning is not None:
        raise InputError("--last looks at values, and gradients are of the whole run: leave out --backward")
    if not inputs.valid[:, -count:].any():
        raise InputError(f"--last {count}: these positions are padding in every row")
    few = replace(
        inputs,
        input_ids=inputs.input_ids[:, -count:],
        attention_mask=None if inputs.attention_mask is None else inputs.attention_mask[:, -count:],
        position_ids=inputs.positions[:, -count:],
        embeds=None if inputs.embeds is None else inputs.embeds[:, -count:],
        chunks=(),
    )
    cut = {name: _cut(value, inputs, count) for name, value in raw_of(trace.taps).items()}
    return replace(trace, inputs=few, taps=like(trace.taps, cut))


def _cut(value: np.ndarray, inputs: Inputs, count: int) -> np.ndarray:
    """[B, S, n] or [B, heads, S, n]; logits of the last token alone are what they are."""
    if value.ndim == 4:
        return value[:, :, -count:]
    return value[:, -count:] if value.shape[1] == inputs.input_ids.shape[1] else value


class Before:
    """What a page takes for a cache: keys and values of the first `count` positions, as the candidate shows them."""

    def __init__(self, taps: Mapping[str, np.ndarray], config: ModelConfig, source: str, count: int) -> None:
        self._taps, self._config, self._source, self.count = taps, config, source, count

    def layer(self, index: int) -> "_BeforeInLayer":
        return _BeforeInLayer(self, index)

    def keys_and_values(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """[B, K, count, D] each. Raises InputError where they are not shown."""
        c: Any = self._config
        at = f"model.layers.{index}.self_attn"
        k, v = self._taps.get(f"{at}.k_rope"), self._taps.get(f"{at}.v_proj")
        if k is None or v is None or k.shape[-1] != c.head_dim:
            raise InputError(
                f"{self._source}: --last needs the keys and values of the positions before, {at}.k_rope with all "
                f"{c.head_dim} dims and {at}.v_proj; show them, or leave it out"
            )
        v = v.reshape(*v.shape[:2], -1, c.head_dim).transpose(0, 2, 1, 3)
        return k[:, :, : self.count], v[:, :, : self.count]


class _BeforeInLayer:
    def __init__(self, before: Before, index: int) -> None:
        self._before, self._index = before, index

    def append(self, k: Any, v: Any) -> tuple[Any, Any]:
        """All keys and values, those of this walk last. What is passed over stays so."""
        if not isinstance(k, Uncertain) or not isinstance(v, Uncertain):
            return k, v
        return tuple(  # type: ignore[return-value]
            _joined(certain(earlier), new)
            for earlier, new in zip(self._before.keys_and_values(self._index), (k, v), strict=True)
        )


def _joined(first: Uncertain, second: Uncertain) -> Uncertain:
    """Two stretches of positions in one. What the second was before it was rounded is not known of the first."""
    value, variance = (
        np.concatenate(pair, axis=2) for pair in ((first.value, second.value), (first.variance, second.variance))
    )
    rounded = None if second.rounded is None else np.concatenate([first.value, second.rounded], axis=2)
    return Uncertain(value, variance, second.shares, rounded, spoilt=second.spoilt)
