"""Small models of every family with weights of a realistic size, for tests that hold for all of them."""

from typing import Any

import numpy as np

from refllm.config import CONFIG_CLASSES, ModelConfig
from refllm.config.traits import TRAITS
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.models import families
from refllm.precision import arithmetic, rounding
from refllm.storage.weights import Weights

FAMILIES = tuple(TRAITS)
HEADS = ("base", "causal_lm", "sequence_classification", "token_classification", "question_answering")


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
    """The class of a family with a head; InputError for one that there is not."""
    cls = families.find(family, head)
    if cls is None:
        raise InputError(f"family {family!r} has no head {head!r}; use one of {', '.join(HEADS)}")
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
    config_class = CONFIG_CLASSES[family]
    head_dim = {"Size": 12, "DerivedSize": 20}.get(config_class.__annotations__.get("head_dim", ""))
    plain |= {} if head_dim is None else {"head_dim": head_dim}
    plain |= {"rope_parameters": {"partial_rotary_factor": 0.5}} if config_class.partial_rotation else {}
    return config_class(**(plain | values))


EVERY_FLAG: dict[str, tuple[dict[str, Any], ...]] = {
    "helium": ({"attention_bias": True, "mlp_bias": True},),
    "llama": ({"attention_bias": True, "mlp_bias": True},),
    "arcee": ({"attention_bias": True, "mlp_bias": True},),
    "stablelm": (
        {"use_qkv_bias": True},
        {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    ),
}
"""The flags of each family that add tensors or change the layer, all on; StableLM's two kinds of layer."""
