"""The rotary tables of a model: which frequencies a call gets, and the cos and sin tables for its positions.

The formulas are in refllm/ops/rope_tables.py; here is what depends on the config and on the length of the call.
"""

from __future__ import annotations

import numpy as np

from refllm.config import ModelConfig
from refllm.ops import rope_tables


class RotaryEmbedding:
    """cos and sin for the positions of a call, as the RotaryEmbedding modules of Transformers give them.

    exact=True computes in float64 throughout. exact=False repeats Transformers' float32 arithmetic on a CPU step by
    step: the frequencies to the bit (`refllm.precision.torch_elementary` says how closely), cos and sin correctly
    rounded.

    The length of a call is its largest position + 1, over the whole batch, padding positions included. Two types
    depend on it, as in Transformers (`dynamic_rope_update`):

    * longrope: a call longer than the original length uses the long list for all its positions, any other the short
      one. No memory between calls.
    * dynamic: **stateful**. The frequencies stretch when a call is longer than every call before, and stay stretched
      for later calls until one is shorter than max_position_embeddings (one of exactly that length does not reset
      them). So the rows of a batch influence each other, and a result depends on the calls before; `reset()` forgets
      them. Keys that are already in a cache keep the rotation of the call that made them, in both types.

    attention_factor: what cos and sin are multiplied by (1 except for yarn and longrope).
    inv_freq: the frequencies that the last call used, [R/2].
    """

    def __init__(self, config: ModelConfig, exact: bool) -> None:
        self.config = config
        self.dtype = np.dtype(np.float64 if exact else np.float32)
        self.attention_factor = self._attention_factor()
        self._plain_inv_freq = self._inv_freq_for(config.max_position_embeddings, long=False)
        self._long_inv_freq: np.ndarray | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the lengths of earlier calls (type dynamic; the others have no memory)."""
        self.inv_freq = self._plain_inv_freq
        self._longest = self.config.max_position_embeddings

    def tables(self, position_ids_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of position * inv_freq, times attention_factor, each [B, S, R/2] in float64 or float32."""
        if position_ids_BS.size:
            self._follow(int(position_ids_BS.max()) + 1)
        return rope_tables.cos_sin_tables(self.inv_freq, position_ids_BS, self.attention_factor)

    def _follow(self, length: int) -> None:
        """Choose the frequencies for a call of this length."""
        parameters = self.config.rope_parameters
        if parameters["rope_type"] == "longrope":
            if self._long_inv_freq is None:
                self._long_inv_freq = self._inv_freq_for(length, long=True)
            is_long = length > parameters["original_max_position_embeddings"]
            self.inv_freq = self._long_inv_freq if is_long else self._plain_inv_freq
        if parameters["rope_type"] == "dynamic":
            before, trained = self._longest, self.config.max_position_embeddings
            if length > before:
                self.inv_freq, self._longest = self._inv_freq_for(length, long=False), length
            if length < trained < before:
                self.reset()

    def _inv_freq_for(self, length: int, long: bool) -> np.ndarray:
        config, p, dtype = self.config, self.config.rope_parameters, self.dtype
        rotary_dim, theta = config.rotary_dim, p["rope_theta"]
        match p["rope_type"]:
            case "default":
                return rope_tables.default_inv_freq(rotary_dim, theta, dtype)
            case "linear":
                return rope_tables.linear_inv_freq(rotary_dim, theta, p["factor"], dtype)
            case "dynamic":
                trained = config.max_position_embeddings
                theta = rope_tables.dynamic_theta(rotary_dim, theta, p["factor"], trained, length, dtype)
                return rope_tables.default_inv_freq(rotary_dim, theta, dtype)
            case "yarn":
                return rope_tables.yarn_inv_freq(
                    rotary_dim,
                    theta,
                    self._stretch(),
                    p["original_max_position_embeddings"],
                    p.get("beta_fast") or 32,
                    p.get("beta_slow") or 1,
                    p.get("truncate", True),
                    dtype,
                )
            case "longrope":
                divisors = p["long_factor"] if long else p["short_factor"]
                return rope_tables.longrope_inv_freq(rotary_dim, theta, divisors, dtype)
            case "llama3":
                return rope_tables.llama3_inv_freq(
                    rotary_dim,
                    theta,
                    p["factor"],
                    p["low_freq_factor"],
                    p["high_freq_factor"],
                    p["original_max_position_embeddings"],
                    dtype,
                )
            case "proportional":
                proportion, factor = p.get("partial_rotary_factor", 1.0), p.get("factor", 1.0)
                return rope_tables.proportional_inv_freq(rotary_dim, theta, proportion, factor, dtype)
        raise AssertionError(p["rope_type"])  # the config has checked it

    def _attention_factor(self) -> float:
        p = self.config.rope_parameters
        if p["rope_type"] not in ("yarn", "longrope"):
            return 1.0
        if p.get("attention_factor") is not None:
            return float(p["attention_factor"])
        if p["rope_type"] == "yarn":
            return rope_tables.yarn_attention_factor(self._stretch(), p.get("mscale"), p.get("mscale_all_dim"))
        return rope_tables.longrope_attention_factor(self._stretch(), p["original_max_position_embeddings"])

    def _stretch(self) -> float:
        """The factor of yarn and longrope; where it is null or absent, how much longer than the original length."""
        p = self.config.rope_parameters
        if p.get("factor") is not None:
            return float(p["factor"])
        return self.config.max_position_embeddings / p["original_max_position_embeddings"]
