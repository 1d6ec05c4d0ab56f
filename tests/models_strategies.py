"""Small random models of every family and random inputs for them, for tests that hold for all of them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refllm import families
from refllm.config import CONFIG_CLASSES, ModelConfig
from refllm.model import Model
from refllm.ops import ACTIVATIONS
from refllm.precision import arithmetic, rounding
from refllm.weights import Weights

FAMILIES = ("helium", "llama", "stablelm", "arcee")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
HEADS = ("base", "causal_lm", "sequence_classification", "token_classification", "question_answering")
seeds = st.integers(0, 2**31)


# ---------------------------------------------------------------------------------------------------------- weights


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights as in a trained model: products keep their scale, norms are near 1, biases are small and not 0."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if "norm" in name and name.endswith(".weight"):
            x = 1 + 0.3 * x
        elif name.endswith(".bias"):
            x = 0.3 * x
        elif name != "embed_tokens.weight":
            x = 1.2 * x / np.sqrt(shape[-1])
        tensors[name] = x
    return tensors


def build(
    cls: type[Model],
    config: ModelConfig,
    tensors: dict[str, np.ndarray] | int,
    dtype: str = "float64",
    policy: str | None = None,
) -> Any:
    """A model with the given tensors, or with random ones from a seed, rounded to `dtype`."""
    if isinstance(tensors, int):
        tensors = random_tensors(cls.tensors(config), tensors)
    ar, put_on_grid = arithmetic(dtype, policy), rounding(dtype)
    kept = {name: put_on_grid(x.astype(np.float64 if ar.exact else np.float32)) for name, x in tensors.items()}
    return cls(config, Weights(cls.tensors(config), kept, tied=cls.tied(config)), ar)


def model_class(family: str, head: str = "causal_lm") -> type[Model]:
    cls = families.find(family, head)
    assert cls is not None, (family, head)
    return cls


def small_config(family: str, **values: Any) -> ModelConfig:
    """A config of sizes that can be told apart; fields as given, else plain."""
    plain: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    plain |= {"helium": {"head_dim": 12}, "llama": {"head_dim": 20}, "arcee": {"head_dim": 20}}.get(family, {})
    plain |= {"rope_parameters": {"partial_rotary_factor": 0.5}} if family == "stablelm" else {}
    return CONFIG_CLASSES[family](**(plain | values))


EVERY_FLAG: dict[str, tuple[dict[str, Any], ...]] = {
    "helium": ({"attention_bias": True, "mlp_bias": True},),
    "llama": ({"attention_bias": True, "mlp_bias": True},),
    "arcee": ({"attention_bias": True, "mlp_bias": True},),
    "stablelm": (
        {"use_qkv_bias": True},
        {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    ),
}
"""Per family the flags that add tensors or change the layer, all on; StableLM's two kinds of layer."""


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
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    head_dim = 2 * draw(st.integers(smallest_head // 2, 5))
    hidden = heads * head_dim
    if family in ("llama", "arcee"):  # head_dim is free, hidden_size is any multiple of the heads
        hidden = heads * draw(st.integers(2, 8))
    rope_type = draw(st.sampled_from([kind for kind in rope_types if head_dim > 2 or kind != "dynamic"] or ["default"]))
    max_positions = draw(st.integers(5, 20))
    rotary_dim, partial = head_dim, None
    if family == "stablelm":
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
        "layer_norm_eps" if family == "stablelm" else "rms_norm_eps": draw(st.sampled_from([1e-8, 1e-5, 0.01])),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": draw(st.sampled_from([None, 0, 3])),
    }
    if family != "stablelm":
        values["head_dim"] = head_dim
    flags = ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")
    values |= {
        flag: draw(st.booleans()) for flag in (flags if family == "stablelm" else ("attention_bias", "mlp_bias"))
    }
    return CONFIG_CLASSES[family](**(values | fixed))


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
        return self.ids.shape  # type: ignore[return-value]


@st.composite
def inputs(draw: st.DrawFn, config: ModelConfig, shortest: int = 1, longest: int = 24) -> Ids:
    rng = np.random.default_rng(draw(seeds))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(shortest, longest))
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
def cuts(draw: st.DrawFn, length: int) -> list[slice]:
    """A sequence of `length` in consecutive pieces: whole, token by token, or anything between."""
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=min(5, length)))
    if draw(st.booleans()):  # the end of the sequence token by token: decode
        inner |= set(range(max(1, length - 3), length))
    edges = [0, *sorted(x for x in inner if x < length), length]
    return [slice(a, b) for a, b in pairwise(edges)]
