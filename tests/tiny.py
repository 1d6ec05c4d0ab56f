"""Small models whose every tensor is random: a bias of zero or a norm weight of one could hide a missing step."""

from typing import Any

import numpy as np

from refllm.forward.model import Model
from refllm.models.families import CLASSES
from refllm.precision import Policy, arithmetic, rounding
from refllm.storage.weights import Weights

VOCAB = 23
FAMILIES = ("Helium", "Llama", "StableLm", "Arcee")
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_ODD_FEATURES: dict[str, dict[str, Any]] = {
    "Helium": {"head_dim": 4, "attention_bias": True, "mlp_bias": True},
    "Llama": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "StableLm": {
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "partial_rotary_factor": 0.5,
    },
    "Arcee": {
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a small model of the family, with its odd features on."""
    return CLASSES[f"{family}Model"].config_class(**{**_SIZES, **_ODD_FEATURES[family], **changes})


def tiny_model(
    name: str, *, seed: int = 0, dtype: str = "float64", policy: str | Policy | None = None, **changes: Any
) -> Model:
    """A model of the class `name`, "HeliumForCausalLM" say, with logits and attention scores of the order of one."""
    cls = CLASSES[name]
    config = tiny_config(name.removesuffix("Model").split("For")[0], **changes)
    rng = np.random.default_rng(seed)
    onto_grid = rounding(dtype)
    tensors = {key: onto_grid(_random(rng, key, shape)) for key, shape in cls.tensors(config).items()}
    return cls(config, Weights(cls.tensors(config), tensors, tied=cls.tied(config)), arithmetic(dtype, policy))


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape)
    if len(shape) == 2:
        return (values if name == "embed_tokens.weight" else values / np.sqrt(shape[1])).astype(np.float32)
    return ((0.2 * values + 1) if name.endswith("weight") else 0.3 * values).astype(np.float32)
