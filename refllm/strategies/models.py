"""Hypothesis strategies for whole models: configs of every family, masks, packed positions, splits of the cache.

Models for these configs come from `refllm.strategies.small_models.build`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refllm.config import CONFIG_CLASSES, ModelConfig
from refllm.config.traits import traits_of
from refllm.ops import ACTIVATIONS
from refllm.strategies.small_models import FAMILIES

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
seeds = st.integers(0, 2**31)


# ---------------------------------------------------------------------------------------------------------- configs


@st.composite
def rope_parameters(draw: st.DrawFn, rope_type: str, rotary_dim: int, max_positions: int) -> dict[str, Any]:
    """Settings of one type. Original lengths are so small that short inputs cross them, or large enough that all pairs
    turn within them."""
    values: dict[str, Any] = {"rope_type": rope_type, "rope_theta": draw(st.sampled_from([100.0, 10000.0, 100000.0]))}
    factor = st.sampled_from([1.5, 2.0, 8.0])
    original = st.integers(4, max(4, max_positions)) | st.sampled_from([64, 1000])
    some_factors = st.lists(st.floats(1.0, 6.0), min_size=rotary_dim // 2, max_size=rotary_dim // 2)
    if rope_type in ("linear", "dynamic", "yarn", "llama3"):
        values["factor"] = draw(factor)
    if rope_type in ("yarn", "longrope", "llama3"):
        values["original_max_position_embeddings"] = draw(original)
    if rope_type == "proportional":
        values["factor"] = draw(factor)
    if rope_type == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
    if rope_type == "longrope":
        values |= {"short_factor": draw(some_factors), "long_factor": draw(some_factors)}
    if rope_type == "yarn":
        values |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "beta_fast": st.sampled_from([4.0, 32.0]),
                    "beta_slow": st.sampled_from([0.25, 1.0]),
                    "mscale": st.sampled_from([0.5, 1.0]),
                    "mscale_all_dim": st.sampled_from([0.5, 0.7]),
                    "truncate": st.booleans(),
                },
            )
        )
    if rope_type in ("yarn", "longrope") and draw(st.booleans()):
        values["attention_factor"] = draw(st.sampled_from([0.8, 1.25]))
    return values


@st.composite
def configs(
    draw: st.DrawFn,
    family: str | None = None,
    rope_types: tuple[str, ...] = ROPE_TYPES,
    smallest_head: int = 2,
    **fixed: Any,
) -> ModelConfig:
    """Any legal config of a family (of any family if None), with tiny sizes. fixed: keys that are not drawn."""
    family = family or draw(st.sampled_from(FAMILIES))
    config_class = CONFIG_CLASSES[family]
    own = config_class.__annotations__  # the keys that are not common to all families, and their types as text
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    head_dim = 2 * draw(st.integers(smallest_head // 2, 5))
    hidden = heads * head_dim
    if own.get("head_dim") == "DerivedSize":  # head_dim is free, hidden_size is any multiple of the heads
        hidden = heads * draw(st.integers(2, 8))
    rope_type = draw(st.sampled_from([kind for kind in rope_types if head_dim > 2 or kind != "dynamic"] or ["default"]))
    max_positions = draw(st.integers(5, 20))
    rotary_dim, partial = head_dim, None
    if config_class.partial_rotation:
        partial = 1.0 if rope_type == "proportional" else draw(st.sampled_from(_fractions(head_dim, rope_type)))
        rotary_dim = int(head_dim * partial)
    elif rope_type == "proportional":
        partial = draw(st.sampled_from([0.25, 0.5, 1.0]))
    rope = draw(rope_parameters(rope_type, rotary_dim, max_positions))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(8, 40)),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(3, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope if partial is None else rope | {"partial_rotary_factor": partial},
        "layer_norm_eps" if traits_of(family).layer_norm else "rms_norm_eps": draw(st.sampled_from([1e-8, 1e-5, 0.01])),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": draw(st.sampled_from([None, 0, 3])),
    }
    if "head_dim" in own:
        values["head_dim"] = head_dim
    values |= {flag: draw(st.booleans()) for flag, kind in own.items() if kind == "bool"}
    return config_class(**(values | fixed))


def _fractions(head_dim: int, rope_type: str) -> list[float]:
    """Partial rotary factors that give an even rotary dim: none at all only where no frequencies are computed."""
    smallest = {"default": 0, "dynamic": 4}.get(rope_type, 2)
    return [f for f in (1.0, 0.75, 0.5, 0.25, 0.0) if int(head_dim * f) % 2 == 0 and int(head_dim * f) >= smallest]


# ----------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Ids:
    """ids [B, S] and the generator that made them, for what else a test needs at random."""

    ids: np.ndarray
    rng: np.random.Generator

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.ids.shape


@st.composite
def inputs(draw: st.DrawFn, config: ModelConfig, shortest: int = 1, longest: int = 24) -> Ids:
    """Random tokens [B, S], with B = 1..3."""
    length, batch = draw(st.integers(shortest, longest)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(seeds))
    return Ids(rng.integers(0, config.vocab_size, (batch, length)), rng)


@st.composite
def key_masks(draw: st.DrawFn, batch: int, keys: int) -> np.ndarray:
    """[B, T], 1 = attend: left padding, right padding, holes, or all of these; rows may be all 0."""
    mask = np.ones((batch, keys), np.int64)
    for row in mask:
        left, right = draw(st.integers(0, keys)), draw(st.integers(0, keys))
        kind = draw(st.sampled_from(["none", "left", "right", "holes", "mixed"]))
        if kind in ("left", "mixed"):
            row[:left] = 0
        if kind in ("right", "mixed"):
            row[keys - right // 2 :] = 0
        if kind in ("holes", "mixed"):
            row[draw(st.lists(st.integers(0, keys - 1), max_size=4))] = 0
    return mask


@st.composite
def paddings(draw: st.DrawFn, batch: int, keys: int, sides: tuple[str, ...] = ("left", "right")) -> np.ndarray:
    """[B, T], 1 = attend: padding on one side, another length in every row, and at least one token in each."""
    mask = np.ones((batch, keys), np.int64)
    side = draw(st.sampled_from(sides))
    for row in mask:
        n = draw(st.integers(0, keys - 1))
        row[slice(n) if side == "left" else slice(keys - n, None)] = 0
    return mask


@st.composite
def packed_positions(draw: st.DrawFn, batch: int, length: int) -> np.ndarray:
    """[B, S]: in every row one or more sequences, one after the other, each counted from 0."""
    rows = []
    for _ in range(batch):
        edges = [0, *sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=3)) - {length}), length]
        rows.append(np.concatenate([np.arange(b - a) for a, b in pairwise(edges)]))
    return np.array(rows)


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[slice]:
    """A sequence of `length` in consecutive pieces: whole, token by token, or anything between."""
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=min(5, length)))
    if draw(st.booleans()):  # the end of the sequence token by token: decode
        inner |= set(range(max(1, length - 3), length))
    edges = [0, *sorted(x for x in inner if x < length), length]
    return [slice(a, b) for a, b in pairwise(edges)]


@dataclass
class WholeInput:
    """One input of a model: ids [B, S], attention_mask [B, S] or None, position_ids [B, S] or None, and the pieces in
    which a cache may get it. config: what it is for."""

    config: ModelConfig
    ids: np.ndarray
    attention_mask: np.ndarray | None
    position_ids: np.ndarray | None
    pieces: list[slice]

    def arguments(self) -> dict[str, Any]:
        """What a model is called with, without a cache."""
        given = {"input_ids": self.ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {name: value for name, value in given.items() if value is not None}


@st.composite
def whole_inputs(draw: st.DrawFn, config: ModelConfig | None = None, longest: int = 24) -> WholeInput:
    """A config (of any family if None) and an input for it: plain, padded, with holes in the mask, packed, or at
    positions in any order. It shrinks to one token without a mask."""
    config = draw(configs()) if config is None else config
    length, batch = draw(st.integers(1, longest)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["plain", "padded", "holes", "packed", "any positions"]))
    mask = positions = None
    if kind == "padded":
        mask = draw(paddings(batch, length))
    elif kind == "holes":
        mask = draw(key_masks(batch, length))
    elif kind == "packed":
        positions = draw(packed_positions(batch, length))
    pieces = draw(cuts(length))
    rng = np.random.default_rng(draw(seeds))
    if kind == "any positions":
        positions = rng.integers(0, 2000, (batch, length))
    return WholeInput(config, rng.integers(0, config.vocab_size, (batch, length)), mask, positions, pieces)
