"""The goldens of whole models: every family, head and RoPE type, and every way to feed tokens.

The embedded checkpoints are run as they are. Beside them are small configs whose weights are made as those of the
checkpoints are, from the names of config and tensor, and lie on the grid of bfloat16 and float16 alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refllm import golden
from refllm.config import AutoConfig, ModelConfig
from refllm.config.traits import TRAITS
from refllm.golden import train_checkpoints
from refllm.golden.cases import Case, Draw
from refllm.golden.make_checkpoints import recipes, weight
from refllm.models import families
from refllm.text.tokenizer import Tokenizer

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelCase(Case):
    """One forward pass.

    model: an embedded checkpoint, or a name in `CONFIGS`. head: as in `refllm.load`. make: draws the inputs, by the
    names that a call takes. chunks: sizes of the pieces to feed with a cache; () for all at once. taps: named values
    that are kept beside the result.
    """

    model: str = ""
    head: str = "causal_lm"
    make: Callable[[Draw, ModelConfig], Inputs] = field(default=lambda draw, config: {}, repr=False)
    chunks: tuple[int, ...] = ()
    taps: tuple[str, ...] = ()

    def inputs(self) -> Inputs:
        """What the model is called with."""
        return self.make(Draw(self.seed), config_of(self.model))


def embedded(model: str) -> bool:
    """Whether the model is an embedded checkpoint, else one of `CONFIGS`."""
    return model in golden.checkpoints() | golden.trained()


def config_of(model: str) -> ModelConfig:
    """The config of an embedded checkpoint as its file has it, or of one of `CONFIGS`."""
    if embedded(model):
        return AutoConfig.from_pretrained(golden.path(model))
    family, values = CONFIGS[model]
    cls = families.find(family, "base")
    assert cls is not None
    return cls.config_class(**{**_SIZES, **values})


def tensors_of(model: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The weights of one of `CONFIGS`, by the names of `Model.tensors`."""
    draw, config = Draw(0), config_of(model)
    return {name: draw.on_grid(weight(model, _gain_like(name), shape, config)) for name, shape in shapes.items()}


def _gain_like(tensor: str) -> str:
    """The classification heads are drawn as lm_head is."""
    return tensor.replace("score.", "lm_head.").replace("qa_outputs.", "lm_head.")


_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "num_labels": 3,
}
_BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 8}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {**_BIASES, "rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **values}}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "helium-small": ("helium", _BIASES),
    "llama-small": ("llama", _BIASES),
    "stablelm-small": ("stablelm", {"use_qkv_bias": True, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "stablelm-small-parallel": (
        "stablelm",
        {"qk_layernorm": True, "use_parallel_residual": True, "rope_parameters": {"partial_rotary_factor": 0.25}},
    ),
    "arcee-small": ("arcee", _BIASES),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0)),
    "llama-longrope": (
        "llama",
        _rope(
            "longrope",
            factor=2.0,
            original_max_position_embeddings=8,
            short_factor=[1.0, 1.1, 1.3, 1.6],
            long_factor=[1.0, 2.0, 4.0, 5.0],
        ),
    ),
    "llama-llama3": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-proportional": ("llama", _rope("proportional", partial_rotary_factor=0.5)),
}
"""name -> (family, what differs from the common sizes). Two layers, 32 wide, four query heads on two key heads."""


def _plain(tokens: int) -> Callable[[Draw, ModelConfig], Inputs]:
    def make(draw: Draw, config: ModelConfig) -> Inputs:
        return {"input_ids": _ids(draw, config, 1, tokens), "position_ids": np.arange(tokens)[None]}

    return make


def _ids(draw: Draw, config: ModelConfig, B: int, S: int) -> np.ndarray:
    """Token ids above those with a meaning of their own."""
    return 4 + draw.below(config.vocab_size - 4, B, S)


def _left_padded(draw: Draw, config: ModelConfig) -> Inputs:
    ids, mask = _ids(draw, config, 2, 7), np.ones((2, 7), np.int64)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(-1) - 1, 0)}


def _packed(draw: Draw, config: ModelConfig) -> Inputs:
    """Sequences of 3 and 5 tokens in one row, kept apart by a mask [B, 1, S, S]; the positions start again."""
    positions = np.concatenate([np.arange(3), np.arange(5)])[None]
    sequence = np.array([0] * 3 + [1] * 5)
    mask = (sequence[:, None] == sequence) & np.tri(8, dtype=bool)
    return {"input_ids": _ids(draw, config, 1, 8), "attention_mask": mask[None, None], "position_ids": positions}


def _labelled(kind: str) -> Callable[[Draw, ModelConfig], Inputs]:
    """Two rows of six tokens with the labels of a head; of token labels every fourth is ignored."""

    def make(draw: Draw, config: ModelConfig) -> Inputs:
        B, S = 2, 6
        given = {"input_ids": _ids(draw, config, B, S), "position_ids": np.tile(np.arange(S), (B, 1))}
        match kind:
            case "causal_lm":
                given["labels"] = draw.labels(B * S, config.vocab_size).reshape(B, S)
            case "token_classification":
                given["labels"] = draw.labels(B * S, config.num_labels).reshape(B, S)
            case "sequence_classification":
                given["labels"] = draw.below(config.num_labels, B)
                given["input_ids"][0, 4:] = config.pad_token_id  # judged at its last token that is none
            case "question_answering":
                given["start_positions"], given["end_positions"] = np.array([1, S]), np.array([3, 2])  # S: ignored
        return given

    return make


def cases() -> list[Case]:
    """Every family: its checkpoints, its heads; Llama: every RoPE type."""
    checkpoints = [case for name in recipes() for case in _of_checkpoint(name)]
    checkpoints += [_of_trained(name) for name in train_checkpoints.recipes()]
    small = [case for name in CONFIGS for case in _of_config(name)]
    return sorted(checkpoints + small, key=lambda case: list(families_in_order()).index(case.group))


def families_in_order() -> tuple[str, ...]:
    """The groups of these cases."""
    return tuple(TRAITS)


def _of_checkpoint(name: str) -> list[ModelCase]:
    config = recipes()[name].config
    last, group, rest = config.num_hidden_layers - 1, config.model_type, name.split("-", 1)[1]
    taps = ("model.layers.0.self_attn.q_rope", "model.layers.0", f"model.layers.{last}.mlp.act", "model.norm")

    def case(short: str, what: str, make: Callable[[Draw, ModelConfig], Inputs], **more: Any) -> ModelCase:
        dtypes = {"llama-tiny": ("float32",), "stablelm-tiny-parallel": ("float16", "float32")}
        narrow = dtypes.get(name, ("bfloat16", "float32"))  # a narrower format would round the weights
        return ModelCase(f"{group}/{rest}-{short}", f"{name}: {what}", narrow, model=name, make=make, **more)

    return [
        case("prompt", "eight tokens, with taps", _plain(8), taps=taps),
        case("left-padding", "two rows, the first with three tokens of padding", _left_padded),
        case("packed", "two sequences in one row, by a 4-D mask", _packed),
        case("cache", "fed in pieces of 5, 1 and 2 tokens with a cache", _plain(8), chunks=(5, 1, 2)),
    ]


def _of_trained(name: str) -> ModelCase:
    """A checkpoint that has learnt the corpus, on words of it."""
    config = train_checkpoints.recipes()[name].config
    last, group = config.num_hidden_layers - 1, config.model_type
    taps = ("model.layers.0.self_attn.k_rope", f"model.layers.{last}.mlp.act", f"model.layers.{last}", "model.norm")
    what = f"{name}: twelve tokens of the text that it has learnt, with taps"
    dtypes, make = ("bfloat16", "float32"), _text(name, 12)
    return ModelCase(f"{group}/trained-text", what, dtypes, model=name, make=make, taps=taps)


def _text(name: str, tokens: int) -> Callable[[Draw, ModelConfig], Inputs]:
    def make(draw: Draw, config: ModelConfig) -> Inputs:
        ids = train_checkpoints.documents(Tokenizer.from_pretrained(golden.path(name)))
        start = int(draw.below(len(ids) - tokens))
        return {"input_ids": ids[None, start : start + tokens], "position_ids": np.arange(tokens)[None]}

    return make


def _of_config(name: str) -> list[ModelCase]:
    family, values = CONFIGS[name]
    rope = values.get("rope_parameters", {}).get("rope_type", "default")

    def case(short: str, what: str, make: Callable[[Draw, ModelConfig], Inputs], **more: Any) -> ModelCase:
        return ModelCase(f"{family}/{short}", what, model=name, make=make, **more)

    if rope != "default":
        tokens = 24  # past the original length and past max_position_embeddings
        return [case(f"rope-{rope}", f"RoPE type {rope}, 24 tokens where 16 were meant", _plain(tokens))]
    if name == "stablelm-small-parallel":
        return [
            case(
                "parallel-norm-per-head",
                "parallel residual, a norm per head, a quarter of the dims rotated",
                _plain(12),
            ),
            case("parallel-cache", "the same, token by token", _plain(4), chunks=(1,) * 4),
        ]
    names = {
        "causal_lm": ("loss", "logits and loss, labels ignored"),
        "sequence_classification": ("sequence-classification", "judged at the last token that is not padding"),
        "token_classification": ("token-classification", "a class for every token, labels ignored"),
        "question_answering": ("question-answering", "start and end; a position outside is ignored"),
    }
    return [
        case(short, what, _labelled(head), head=head)
        for head, (short, what) in names.items()
        if families.find(family, head)
    ] + [case("rope-default", "RoPE type default, 12 tokens", _plain(12), taps=("model.layers.0.self_attn.k_rope",))]
