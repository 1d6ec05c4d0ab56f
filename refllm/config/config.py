"""Configurations of the four families: reading config.json in every spelling, checking it, writing it back.

Field names, defaults and legacy spellings are those of Transformers 5 (models/*/configuration_*.py and
configuration_utils.py). A config that was constructed is valid: every value has its type and range, head counts divide,
and `rope_parameters` is one flat dict. What no model of the family can have raises `ConfigError`.

    config = AutoConfig.from_pretrained("path/to/checkpoint")     # the family follows from model_type
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=5e5)

Keys that have no effect are kept, readable as attributes, written back, and listed in `config.unused_keys`. Keys that
would change the mathematics in a way that these families do not have are refused.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from refllm.config.rope_parameters import LEGACY_KEYS, check_rope, normalise_rope, rotary_dim_of, unused_rope_keys
from refllm.config.traits import Traits
from refllm.config.values import (
    MAX_SIZE,
    check_depth,
    read_bool,
    read_choice,
    read_float,
    read_int,
    read_size,
    read_str,
    warn,
)
from refllm.errors import CheckpointError, ConfigError, InputError, RefllmError
from refllm.precision.dtype_names import IN_TORCH
from refllm.storage import hub_cache, input_file, output_file
from refllm.storage.json_text import show
from refllm.storage.not_a_checkpoint import no_config

# The annotation of a field says how its value is read: see _READERS.
Size = int
DerivedSize = int  # null or absent: computed from other fields
TokenId = int | None
TokenIds = int | list[int] | None
Dropout = float  # null is 0
OptionalDropout = float | None
NonNegative = float
Labels = dict[int, str]

NOT_GIVEN: Any = None

ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)
"""The activation names of transformers/activations.py (ACT2FN) that have no weights of their own."""
_LEARNED_ACTIVATIONS = ("prelu", "xielu")

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# fmt: off
GENERATION_KEYS = frozenset(
    {
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p",
        "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
        "num_beam_groups", "diversity_penalty",
    }
)
# fmt: on
"""Keys of config.json that are defaults of text generation (GenerationConfig._get_default_generation_params)."""

# fmt: off
BOOKKEEPING_KEYS = frozenset(
    {
        "transformers_version", "auto_map", "_name_or_path", "name_or_path", "_commit_hash", "pretraining_tp",
        "rotary_scaling_factor", "rope_pct", "norm_eps", "num_heads", "use_norm_bias", "output_attentions",
        "output_hidden_states", "return_dict", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation",
        "torchscript", "is_decoder", "add_cross_attention", "use_bfloat16",
    }
)
# fmt: on
"""Keys without effect that published files carry as a matter of course; `unknown_keys` leaves them out."""

# key -> (the values under which it asks for nothing, what it asks for otherwise)
DANGEROUS_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "sliding_window": ((None,), "a cache that drops old keys"),
    "attention_chunk_size": ((None,), "attention inside chunks"),
    "kv_sharing_modes": ((None,), "key/value caches shared between layers"),
    "is_causal": ((None, True), "bidirectional attention"),
    "per_layer_config": ((None, {}), "layers of different shapes"),
    "quantization_config": ((None, {}), "quantised weights"),
    "compression_config": ((None, {}), "compressed weights"),
    "is_encoder_decoder": ((None, False), "an encoder-decoder"),
    "tie_last_hidden_states": ((None, True), "hidden states from before the final norm"),
    "token_classification_bias": ((None, True), "a token classification head without bias"),
    "transformers_weights": ((None,), "weights from another file"),
    "text_config": ((None, {}), "another model's configuration inside this one"),
    "text_encoder": ((None, {}), "another model's configuration inside this one"),
    "decoder": ((None, {}), "another model's configuration inside this one"),
    "generator": ((None, {}), "another model's configuration inside this one"),
}


def _must_be_readable(source: str, quantization: Mapping[str, Any]) -> None:
    """Raises ConfigError for weights that are quantised as refllm does not read them."""
    from refllm.storage.quantized import page_of

    try:
        page_of(quantization)
    except CheckpointError as error:
        raise ConfigError(f"{source}: {error}") from None


def _read_sizes_or_none(source: str, name: str, value: Any) -> int | None:
    return None if value is None else read_size(source, name, value)


def _read_token_id(source: str, name: str, value: Any) -> int | None:
    return None if value is None else read_int(source, name, value)


def _read_token_ids(source: str, name: str, value: Any) -> int | list[int] | None:
    if isinstance(value, list | tuple):
        return [read_int(source, f"{name}[{i}]", item) for i, item in enumerate(value)]
    return _read_token_id(source, name, value)


def _read_layers(source: str, name: str, value: Any) -> int:
    return read_int(source, name, value, 1, MAX_LAYERS)


def _read_dropout(source: str, name: str, value: Any) -> float:
    return 0.0 if value is None else read_float(source, name, value, minimum=0.0, maximum=1.0)


def _read_optional_dropout(source: str, name: str, value: Any) -> float | None:
    return None if value is None else _read_dropout(source, name, value)


def _read_non_negative(source: str, name: str, value: Any) -> float:
    return read_float(source, name, value, minimum=0.0)


def _read_names(source: str, name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{source}: {name}={show(value)} must be a list of strings or null")
    return [read_str(source, f"{name}[{i}]", item) for i, item in enumerate(value)]


def _read_dtype(source: str, name: str, value: Any) -> str | None:
    if value is None:
        return None
    spelled = str(value) if isinstance(value, str) or type(value).__module__ == "torch" else show(value)
    if spelled.removeprefix("torch.") not in IN_TORCH:
        raise ConfigError(f"{source}: {name}={show(value)} is not one of float64, float32, bfloat16, float16")
    return IN_TORCH[spelled.removeprefix("torch.")]


def _read_optional_problem(source: str, name: str, value: Any) -> str | None:
    return None if value is None else read_choice(source, name, value, PROBLEM_TYPES)


def _read_activation(source: str, name: str, value: Any) -> str:
    if isinstance(value, str) and value in _LEARNED_ACTIVATIONS:
        raise ConfigError(f"{source}: {name}={show(value)} has learned weights, which refllm does not compute")
    return read_choice(source, name, value, ACTIVATIONS)


def _read_text(source: str, name: str, value: Any) -> str | None:
    return None if value is None else read_str(source, name, value)


_PLAIN_READERS = {
    "int": read_size,
    "int | None": _read_sizes_or_none,
    "float": _read_non_negative,
    "bool": read_bool,
    "str | None": _read_text,
    "list[str] | None": _read_names,
}
"""Annotation -> reader: what the config of a page from outside may be written with."""
_READERS = _PLAIN_READERS | {
    "Size": read_size,
    "DerivedSize": _read_sizes_or_none,
    "TokenId": _read_token_id,
    "TokenIds": _read_token_ids,
    "Dropout": _read_dropout,
    "OptionalDropout": _read_optional_dropout,
    "NonNegative": _read_non_negative,
}
_READERS_BY_NAME = {
    "architectures": _read_names,
    "dtype": _read_dtype,
    "problem_type": _read_optional_problem,
    "hidden_act": _read_activation,
    "num_hidden_layers": _read_layers,
}


def reader_of(field: dataclasses.Field[Any]) -> Callable[[str, str, Any], Any]:
    """What reads a key of config.json, by its name or annotation. Raises ConfigError where there is nothing."""
    annotation = getattr(field.type, "__name__", str(field.type))
    reader = _READERS_BY_NAME.get(field.name) or _READERS.get(annotation)
    if reader is None:
        raise ConfigError(f"the key {field.name} is annotated {annotation}; use one of {', '.join(_PLAIN_READERS)}")
    return reader


# Fields that other steps of the constructor fill.
_COMPOSED = ("rope_parameters", "id2label", "label2id", "generation_defaults", "extra")


@dataclasses.dataclass(init=False, kw_only=True)
class ModelConfig:
    """What the four families share: fields, reading, checking, writing. Construct one of the subclasses.

    Keyword arguments are the keys of config.json, legacy spellings included. Raises ConfigError.

    generation_defaults: the keys of config.json that are defaults of text generation (temperature, top_k, ...).
    extra: every other key that is no field; they have no effect.
    """

    model_type: ClassVar[str] = ""
    default_theta: ClassVar[float] = 10000.0
    default_partial_rotary_factor: ClassVar[float | None] = None
    partial_rotation: ClassVar[bool] = False
    traits: ClassVar[Traits | None] = None
    max_initializer_range: ClassVar[float] = float("inf")

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: DerivedSize
    hidden_act: str = "silu"
    max_position_embeddings: Size = 4096
    initializer_range: NonNegative = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    attention_dropout: Dropout = 0.0
    classifier_dropout: OptionalDropout = None
    bos_token_id: TokenId = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenId = None
    architectures: list[str] | None = None
    dtype: str | None = None
    problem_type: str | None = None
    id2label: Labels = NOT_GIVEN
    label2id: dict[str, int] | None = None
    rope_parameters: dict[str, Any] = NOT_GIVEN
    generation_defaults: dict[str, Any] = dataclasses.field(init=False)
    extra: dict[str, Any] = dataclasses.field(init=False)

    def __init__(self, **values: Any) -> None:
        self._read(values, source=type(self).__name__)

    # ------------------------------------------------------------------ reading

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        """The config that a parsed config.json describes; `source` names it in errors. `values` is not modified."""
        config = cls.__new__(cls)
        config._read(values, source)
        return config

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read config.json of a checkpoint folder (or the JSON file itself); keyword arguments replace its keys."""
        path, values = read_config_json(folder, overrides)
        return cls.from_dict({**values, **_without_hub(overrides)}, source=str(path))

    def _read(self, values: Mapping[str, Any], source: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: the content is {show(values)}, but a configuration is a JSON object")
        for key, value in values.items():
            read_str(source, "a key", key)
            check_depth(source, key, value)
        stated_type = values.get("model_type", self.model_type)
        if stated_type != self.model_type:
            raise ConfigError(
                f"{source}: model_type={show(stated_type)}, but {type(self).__name__} reads {self.model_type!r}"
            )
        self._refuse_dangerous_keys(source, values)
        for field in dataclasses.fields(self):
            if field.name not in _COMPOSED:
                setattr(self, field.name, self._read_field(source, field, values))
        self._derive(source, values)
        self._read_labels(source, values)
        self._read_rope(source, values)
        used = {f.name for f in dataclasses.fields(self) if f.init}
        # The weights of a quantised checkpoint are read dequantised, and what is saved of them is not quantised.
        used |= {"model_type", "torch_dtype", "num_labels", "quantization_config", *self._used_legacy_rope_keys()}
        rest = {key: copy.deepcopy(value) for key, value in values.items() if key not in used}
        self.generation_defaults = {key: rest.pop(key) for key in list(rest) if key in GENERATION_KEYS}
        self.extra = rest
        self._check(source)

    def _read_field(self, source: str, field: dataclasses.Field[Any], values: Mapping[str, Any]) -> Any:
        name, value = field.name, values.get(field.name, field.default)
        if name == "dtype" and value is None:
            name, value = "torch_dtype", values.get("torch_dtype")
        return reader_of(field)(source, name, value)

    def _refuse_dangerous_keys(self, source: str, values: Mapping[str, Any]) -> None:
        fields = {field.name for field in dataclasses.fields(self)}
        for key, (harmless, effect) in DANGEROUS_KEYS.items():
            value = values.get(key)
            if key == "quantization_config" and isinstance(value, Mapping) and value:
                _must_be_readable(source, value)
            elif key not in fields and not any(
                value is item or (type(value) is type(item) and value == item) for item in harmless
            ):
                raise ConfigError(
                    f"{source}: {key}={show(value)} asks for {effect}, which refllm does not compute for "
                    f"{self.model_type}; the key must be absent or null"
                )
        layer_types = values.get("layer_types")
        plain = isinstance(layer_types, list) and all(name in ("full_attention", "attention") for name in layer_types)
        if layer_types is not None and not plain and "layer_types" not in fields:
            raise ConfigError(
                f"{source}: layer_types={show(layer_types)} may only list full_attention, which every layer of "
                f"{self.model_type} has"
            )

    def _derive(self, source: str, values: Mapping[str, Any]) -> None:
        """Fill the fields that follow from others. Families override it."""

    def _read_labels(self, source: str, values: Mapping[str, Any]) -> None:
        """id2label from the key of that name or from num_labels (2 without both); num_labels wins in a conflict."""
        given = _read_id2label(source, values.get("id2label"))
        label2id = _read_label2id(source, values.get("label2id"))
        count = values.get("num_labels")
        count = None if count is None else read_int(source, "num_labels", count, 1, MAX_LABELS)
        if given is not None and (count is None or count == len(given)):
            self.id2label, self.label2id = given, label2id
            return
        if given is not None:
            warn(f"{source}: num_labels={count} replaces id2label, which has {len(given)} entries")
        self.num_labels = 2 if count is None else count

    def _read_rope(self, source: str, values: Mapping[str, Any]) -> None:
        self.rope_parameters = normalise_rope(
            source,
            values,
            default_theta=self.default_theta,
            default_partial=self.default_partial_rotary_factor,
            max_positions=self.max_position_embeddings,
        )
        check_rope(
            source,
            self.rope_parameters,
            head_dim=self.head_dim,
            max_positions=self.max_position_embeddings,
            partial_rotation=self.partial_rotation,
        )

    def _used_legacy_rope_keys(self) -> set[str]:
        used = set(LEGACY_KEYS)
        if "original_max_position_embeddings" not in self.rope_parameters:
            used.discard("original_max_position_embeddings")
        return used

    # ------------------------------------------------------------------ checking

    def _check(self, source: str) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}"
            )
        if self.initializer_range > self.max_initializer_range:
            raise ConfigError(
                f"{source}: initializer_range={self.initializer_range:g} must be at most {self.max_initializer_range:g}"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigError(
                f"{source}: problem_type=single_label_classification needs num_labels of at least 2; one output is "
                "problem_type=regression"
            )
        pad = self.pad_token_id
        if pad is not None and not -self.vocab_size <= pad < self.vocab_size:
            raise ConfigError(f"{source}: pad_token_id={pad} must be null or below vocab_size={self.vocab_size}")
        self._warn_of_foreign_token_ids(source)

    def _warn_of_foreign_token_ids(self, source: str) -> None:
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, token in [("bos_token_id", self.bos_token_id), *(("eos_token_id", token) for token in eos)]:
            if token is not None and not 0 <= token < self.vocab_size:
                warn(f"{source}: {name}={token} is outside the vocabulary (vocab_size={self.vocab_size})")

    def _check_hidden_size_divides(self, source: str) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{source}: hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}"
            )

    # ------------------------------------------------------------------ what follows from the fields

    @property
    def rotary_dim(self) -> int:
        """R, the number of dims of each head that are rotated (even, at most head_dim)."""
        return rotary_dim_of(self.head_dim, self.rope_parameters) if self.partial_rotation else self.head_dim

    def window(self, layer: int) -> int | None:
        """How many keys a query of a layer sees, its own and those before it; None: all. The families here see all."""
        return None

    @property
    def num_labels(self) -> int:
        """C, the number of classes of the classification heads: the length of id2label."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {
            i: f"LABEL_{i}" for i in range(read_int(type(self).__name__, "num_labels", count, 1, MAX_LABELS))
        }
        self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def unused_keys(self) -> tuple[str, ...]:
        """The keys that were read and have no effect, sorted; keys inside rope_parameters as "rope_parameters.NAME"."""
        in_rope = unused_rope_keys(self.rope_parameters, partial_rotation=self.partial_rotation)
        return (*sorted(self.extra), *in_rope)

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """The unused keys without those that published files carry as a matter of course."""
        return tuple(key for key in self.unused_keys if key not in BOOKKEEPING_KEYS)

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra")
        if extra is not None and name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # ------------------------------------------------------------------ writing

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json in the spelling of Transformers 5; `from_dict` of it gives an equal config."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        values: dict[str, Any] = {**self.extra, **self.generation_defaults, **fields}
        for name in ("classifier_dropout", "problem_type", "dtype", "architectures"):
            if values[name] is None:
                del values[name]
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"} and self.label2id == {"LABEL_0": 0, "LABEL_1": 1}:
            del values["id2label"], values["label2id"]  # the default of both libraries
        values["model_type"] = self.model_type
        return copy.deepcopy(values)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json into the folder, which is created where it does not exist. Raises ConfigError."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            output_file.replace(Path(folder) / "config.json", self.to_json_string())
        except OSError as error:
            raise ConfigError(f"{folder}: config.json cannot be written ({error.strerror or error})") from None

    def to_json_string(self, **changes: Any) -> str:
        """The text of config.json; `changes` replace entries of it."""
        return json.dumps({**self.to_dict(), **changes}, indent=2, sort_keys=True) + "\n"


MAX_LAYERS = 10_000
"""More layers than this are a mistake in the file: the names of their tensors alone would fill the memory."""

MAX_LABELS = 2**20
"""More classes than this are a mistake in the file: their names alone would fill the memory."""


def _read_id2label(source: str, value: Any) -> dict[int, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{source}: id2label={show(value)} must be an object with at least one label, or null")
    labels = {}
    for key, label in value.items():
        labels[_read_index(source, "id2label", key)] = read_str(source, f"id2label[{show(key)}]", label)
    return labels


def _read_label2id(source: str, value: Any) -> dict[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: label2id={show(value)} must be an object or null")
    for label in value:
        read_str(source, "a key of label2id", label)
    return {label: _read_index(source, f"label2id[{show(label)}]", index) for label, index in value.items()}


def _read_index(source: str, name: str, value: Any) -> int:
    """A class index, which JSON spells as a string where it is a key."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
        raise ConfigError(f"{source}: {name} has the class index {show(value)}, which must be an integer of at least 0")
    return value


# ---------------------------------------------------------------------- the four families


@dataclasses.dataclass(init=False, kw_only=True)
class HeliumConfig(ModelConfig):
    """Helium (model_type "helium"); defaults of Helium-1-preview-2b. num_attention_heads * head_dim is hidden_size."""

    model_type: ClassVar[str] = "helium"
    default_theta: ClassVar[float] = 100000.0

    vocab_size: Size = 48000
    hidden_size: Size = 2560
    intermediate_size: Size = 7040
    num_hidden_layers: Size = 24
    num_attention_heads: Size = 20
    num_key_value_heads: Size = 20
    head_dim: Size = 128
    rms_norm_eps: NonNegative = 1e-8
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: TokenId = 1
    eos_token_id: TokenIds = 2
    pad_token_id: TokenId = 3

    def _check(self, source: str) -> None:
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ConfigError(
                f"{source}: hidden_size={self.hidden_size} must equal num_attention_heads={self.num_attention_heads} "
                f"times head_dim={self.head_dim}, because o_proj of Helium is square"
            )
        super()._check(source)


@dataclasses.dataclass(init=False, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama (model_type "llama"); null num_key_value_heads and head_dim follow from the other fields."""

    model_type: ClassVar[str] = "llama"
    max_initializer_range: ClassVar[float] = 1.0

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: DerivedSize = NOT_GIVEN
    head_dim: DerivedSize = NOT_GIVEN
    max_position_embeddings: Size = 2048
    rms_norm_eps: NonNegative = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: TokenId = 1
    eos_token_id: TokenIds = 2

    def _derive(self, source: str, values: Mapping[str, Any]) -> None:
        self._check_hidden_size_divides(source)
        if values.get("num_key_value_heads") is None:
            self.num_key_value_heads = self.num_attention_heads
        if values.get("head_dim") is None:
            self.head_dim = self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(init=False, kw_only=True)
class StableLmConfig(ModelConfig):
    """StableLM (model_type "stablelm"); rotates int(head_dim * partial_rotary_factor) dims of each head."""

    model_type: ClassVar[str] = "stablelm"
    default_partial_rotary_factor: ClassVar[float | None] = 0.25
    partial_rotation: ClassVar[bool] = True

    vocab_size: Size = 50304
    hidden_size: Size = 2560
    intermediate_size: Size = 6912
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 32
    layer_norm_eps: NonNegative = 1e-5
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    hidden_dropout: Dropout = 0.0
    bos_token_id: TokenId = 0
    eos_token_id: TokenIds = 0

    @property
    def head_dim(self) -> int:
        """D = hidden_size / num_attention_heads; this family has no config key for it."""
        return self.hidden_size // self.num_attention_heads

    def _derive(self, source: str, values: Mapping[str, Any]) -> None:
        self._check_hidden_size_divides(source)
        stated = values.get("head_dim")
        if stated is not None and stated != self.head_dim:
            raise ConfigError(
                f"{source}: head_dim={show(stated)} is not a key of stablelm, whose head size is hidden_size / "
                f"num_attention_heads = {self.head_dim}; remove the key"
            )


@dataclasses.dataclass(init=False, kw_only=True)
class ArceeConfig(ModelConfig):
    """Arcee (model_type "arcee"); null num_key_value_heads and head_dim follow from the other fields."""

    model_type: ClassVar[str] = "arcee"

    vocab_size: Size = 32000
    hidden_size: Size = 2560
    intermediate_size: Size = 18432
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: DerivedSize = NOT_GIVEN
    head_dim: DerivedSize = NOT_GIVEN
    hidden_act: str = "relu2"
    rms_norm_eps: NonNegative = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: TokenId = 128000
    eos_token_id: TokenIds = 128001

    def _derive(self, source: str, values: Mapping[str, Any]) -> None:
        self._check_hidden_size_divides(source)
        if values.get("num_key_value_heads") is None:
            self.num_key_value_heads = self.num_attention_heads
        if values.get("head_dim") is None:
            self.head_dim = self.hidden_size // self.num_attention_heads


CONFIG_CLASSES: dict[str, type[ModelConfig]] = {
    cls.model_type: cls for cls in (HeliumConfig, LlamaConfig, StableLmConfig, ArceeConfig)
}


class AutoConfig:
    """The config class that belongs to a model_type."""

    @staticmethod
    def from_pretrained(folder: str | os.PathLike[str], **overrides: Any) -> ModelConfig:
        """Read config.json of a checkpoint folder; its model_type selects the class. Raises ConfigError."""
        path, values = read_config_json(folder, overrides)
        return _found({**values, **_without_hub(overrides)}, str(path), path)

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """The config that a parsed config.json describes; its model_type selects the class. Raises ConfigError."""
        return _found(values, source)

    @staticmethod
    def for_model(model_type: str, **values: Any) -> ModelConfig:
        """A config of the family with the given keys and defaults for the rest. Raises ConfigError."""
        return _config_class({**values, "model_type": model_type}, "AutoConfig")(**values)


def _without_hub(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if name not in hub_cache.KEYWORDS}


def _families() -> str:
    return "one of " + ", ".join(CONFIG_CLASSES)


def _found(values: Mapping[str, Any], source: str, file: Path | None = None) -> ModelConfig:
    if "model_type" not in values:
        raise ConfigError(f"{source}: the key model_type is missing; it must be {_families()}")
    return _config_class(values, source, file).from_dict(values, source)


def _config_class(values: Mapping[str, Any], source: str, file: Path | None = None) -> type[ModelConfig]:
    """The class of the model_type of a config. file: of the config, beside which tensors may be."""
    model_type = values["model_type"]
    if isinstance(model_type, str) and model_type in CONFIG_CLASSES:
        return CONFIG_CLASSES[model_type]
    hint = ""
    if model_type == "stablelm_epoch":
        hint = " (stablelm_epoch files name their keys differently; newer revisions of the checkpoint are stablelm)"
    elif isinstance(model_type, str):
        from refllm.config.nearest import nearest

        hint = f": {nearest(values, () if file is None else _tensor_names(file)).sentence}"
    raise ConfigError(f"{source}: model_type={show(model_type)} must be {_families()}{hint}")


def _tensor_names(path: Path) -> tuple[str, ...]:
    """The names of the tensors in the folder of a config.json; none where there are no files, or broken ones."""
    from refllm.storage.checkpoint import Checkpoint

    if path.name != "config.json" or not any(path.parent.glob("*.safetensors")):
        return ()
    with contextlib.suppress(RefllmError, OSError), Checkpoint.open(path.parent) as checkpoint:
        return checkpoint.names
    return ()


def _missing_config(folder: Path) -> str:
    """What may be the cause, and what to do."""
    if any(folder.glob("model*.safetensors")):
        return "weights without it are what a save that was cut short leaves: save the model again"
    return "a checkpoint folder holds a config.json"


def as_config(what: str, config: Any, wanted: type[ModelConfig] = ModelConfig) -> ModelConfig:
    """A config of the class `wanted`: the very one that `what` was given, or what a config of Transformers says.

    Raises ConfigError for a config of no family, and InputError for anything else than a `wanted`.
    """
    read = config
    if not isinstance(config, ModelConfig) and hasattr(config, "model_type") and hasattr(config, "to_dict"):
        read = AutoConfig.from_dict(config.to_dict(), source=type(config).__name__)
    if not isinstance(read, wanted):
        names = [cls.__name__ for cls in CONFIG_CLASSES.values()] if wanted is ModelConfig else [wanted.__name__]
        raise InputError(f"{what}: expected a {' or '.join(names)}, found {type(config).__name__}")
    return read


def read_config_json(
    folder: str | os.PathLike[str], keywords: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Path, dict[str, Any]]:
    """The path and the parsed content of FOLDER/config.json, or of the JSON file itself. Raises ConfigError.

    folder may be a name of the hub; keywords: see `refllm.storage.hub_cache.local_folder`.
    """
    path = hub_cache.local_folder(folder, keywords)
    if (found := no_config(path)) is not None:
        raise ConfigError(f"{path}: {found}")
    if path.is_dir():
        path = path / "config.json"
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: there is no such file; {_missing_config(path.parent)}")
    values = input_file.read_object(path, ConfigError)
    return path, values if _READ_AS is None else _as_chosen(_READ_AS, path, values)


_READ_AS: str | None = None  # see `read_as`


@contextlib.contextmanager
def read_as(family: str) -> Iterator[None]:
    """Checkpoints of an unknown model_type are read as those of a known family while it is open, in the whole process:
    where nothing is known to differ (`refllm.config.nearest`), else reading raises ConfigError."""
    global _READ_AS
    before, _READ_AS = _READ_AS, family
    try:
        yield
    finally:
        _READ_AS = before


def _as_chosen(family: str, path: Path, values: dict[str, Any]) -> dict[str, Any]:
    model_type = values.get("model_type")
    if model_type == family or not isinstance(model_type, str):
        return values
    if model_type in CONFIG_CLASSES:
        raise ConfigError(f"{path}: model_type={show(model_type)} has a page of its own, and is not read as {family}")
    from refllm.config.nearest import as_family

    return as_family(family, values, _tensor_names(path), str(path))
