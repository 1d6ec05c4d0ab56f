"""`GenerationConfig`: the settings of text generation, where they come from, and which of them wins.

The fields are those of `transformers.GenerationConfig` (5.23.0); `None` means "not set". A call looks for a value in
this order: arguments of `generate`, the `GenerationConfig` handed to it, the model's own (generation_config.json, or
config.json where that file is missing), `DEFAULTS`.

Wrong values in a call or a constructor raise `InputError`; in a file they raise `ConfigError`, which names the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from refllm.errors import ConfigError, InputError
from refllm.generation.values import read_setting, refuse_out_of_range
from refllm.generation.watermark import WatermarkingConfig
from refllm.inputs import refuse_unknown
from refllm.storage import input_file, output_file
from refllm.storage.hub_cache import local_folder

FILE_NAME = "generation_config.json"

DEFAULTS: dict[str, Any] = {
    "max_length": 20,  # new tokens, where nobody set a length: see `GenerationConfig.resolve`
    "min_length": 0,
    "do_sample": False,
    "use_cache": True,
    "early_stopping": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
}
"""What is used where nobody set a value (`GenerationConfig._get_default_generation_params` of Transformers 5.23.0)."""

_NONE_IS_UNSET = (
    *("max_length", "min_length", "do_sample", "num_beams", "num_return_sequences", "early_stopping"),
    *("length_penalty", "use_cache", "return_dict_in_generate"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
)
"""Settings that cannot be switched off: `None` in a call means "not given". For all others `None` switches off."""

SAMPLING_ONLY = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
BEAMS_ONLY = ("early_stopping", "length_penalty")

_OTHER_DECODING = (
    *("constraints", "force_words_ids", "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit"),
    *("is_assistant", "dola_layers", "speculation_type", "token_healing"),
)
"""Settings that would each call for a way of decoding that this package does not have."""

_METADATA = ("_from_model_config", "transformers_version")


@dataclass(kw_only=True)
class GenerationConfig:
    """The settings of one way to generate text; every field may be `None`, "not set".

    `GenerationConfig(top_k=10)` refuses names it does not know and values of a wrong type. Settings of Transformers
    that belong to other ways of decoding (assisted, contrastive, constrained, ...) can be stored, so that a published
    generation_config.json loads; `generate` refuses those that would change what it does.
    """

    # How long.
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: list[str] | None = None
    # How tokens are chosen.
    do_sample: bool | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    early_stopping: bool | str | None = None
    length_penalty: float | None = None
    # How scores are changed.
    guidance_scale: float | None = None
    sequence_bias: dict[tuple[int, ...], float] | None = None
    encoder_repetition_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    temperature: float | None = None
    top_h: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    watermarking_config: WatermarkingConfig | None = None
    renormalize_logits: bool | None = None
    # The cache.
    use_cache: bool | None = None
    cache_implementation: str | None = None
    max_cache_len: int | None = None
    prefill_chunk_size: int | None = None
    # Special tokens.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # What is returned.
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    # Other ways of decoding: stored, refused by `generate` where they would act.
    assistant_early_exit: Any = None
    constraints: Any = None
    diversity_penalty: Any = None
    dola_layers: Any = None
    force_words_ids: Any = None
    is_assistant: Any = None
    num_beam_groups: Any = None
    penalty_alpha: Any = None
    prompt_lookup_num_tokens: Any = None
    speculation_type: Any = None
    token_healing: Any = None
    use_mtp: Any = None
    # No effect on this package's ways of decoding.
    assistant_confidence_threshold: Any = None
    assistant_ensemble_weight: Any = None
    assistant_lookbehind: Any = None
    cache_config: Any = None
    compile_config: Any = None
    continuous_batching_config: Any = None
    decoder_start_token_id: Any = None
    disable_compile: Any = None
    low_memory: Any = None
    max_matching_ngram_size: Any = None
    num_assistant_tokens: Any = None
    num_assistant_tokens_schedule: Any = None
    target_lookbehind: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of a file that this class does not know; written back by `save_pretrained`."""
    source: InitVar[str] = "GenerationConfig"
    """Where the values come from, for error messages."""
    published: InitVar[bool] = False
    """Values of a file: numbers out of range are left to the call that would use them, as in Transformers."""

    def __init_subclass__(cls) -> None:
        raise TypeError("GenerationConfig is not meant to be subclassed")

    def __post_init__(self, source: str, published: bool) -> None:
        for name in FIELDS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, read_setting(name, value, source))
        if not published:
            refuse_out_of_range(vars(self), source)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = FILE_NAME) -> GenerationConfig:
        """Reads the content of a generation_config.json. Unknown keys are kept in `extra`, with a warning.

        Raises ConfigError for a value that no setting can have.
        """
        known = {name: value for name, value in values.items() if name in FIELDS}
        extra = {name: value for name, value in values.items() if name not in FIELDS}
        unknown = sorted(name for name in extra if name not in _METADATA and not name.startswith("_"))
        if unknown:
            warnings.warn(f"{source}: unknown keys have no effect: {', '.join(unknown)}", UserWarning, stacklevel=2)
        try:
            return cls(**known, extra=extra, source=source, published=True)
        except InputError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def from_pretrained(cls, folder: str | Path, file_name: str = FILE_NAME) -> GenerationConfig:
        """Reads generation_config.json of a checkpoint folder. Raises ConfigError."""
        path = local_folder(folder) / file_name
        return cls.from_dict(input_file.read_object(path, ConfigError), source=file_name)

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> GenerationConfig:
        """The settings that Transformers uses for a checkpoint folder: generation_config.json, else config.json.

        From config.json only what is written there counts: a special token id that the file leaves to the default of
        its config class is not set here. Raises ConfigError.
        """
        if os.path.lexists(Path(folder) / FILE_NAME):
            return cls.from_pretrained(folder)
        return cls.from_model_config(input_file.read_object(Path(folder) / "config.json", ConfigError))

    @classmethod
    def of(cls, value: Any) -> GenerationConfig:
        """The settings of this class, or those that a GenerationConfig of Transformers has set. Raises InputError."""
        if isinstance(value, cls):
            return value
        if not hasattr(value, "to_diff_dict"):
            raise InputError(f"generate: generation_config is a {type(value).__name__}, not a GenerationConfig")
        return cls.from_dict(value.to_diff_dict(), source="generation_config")

    @classmethod
    def from_model_config(cls, config: Any) -> GenerationConfig:
        """Settings found in a model config: special token ids and legacy keys such as `temperature`.

        `config` is a model config object (for a fresh model) or the content of a config.json. Raises ConfigError.
        """
        if isinstance(config, Mapping):
            values = dict(config)
        else:
            names = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
            values = {name: getattr(config, name, None) for name in names}
            values |= getattr(config, "generation_defaults", {})
        known = {name: value for name, value in values.items() if name in FIELDS and value is not None}
        # output_... flags of a model config speak of forward calls. Generation returns a plain array.
        known = {name: value for name, value in known.items() if not name.startswith("output_")}
        return cls.from_dict(known, source="config.json")

    def to_dict(self) -> dict[str, Any]:
        """Every field that is set, as JSON holds it."""
        values = {name: getattr(self, name) for name in FIELDS}
        if self.sequence_bias is not None:
            values["sequence_bias"] = [[list(ids), bias] for ids, bias in self.sequence_bias.items()]
        if self.exponential_decay_length_penalty is not None:
            values["exponential_decay_length_penalty"] = list(self.exponential_decay_length_penalty)
        if self.watermarking_config is not None:
            values["watermarking_config"] = dataclasses.asdict(self.watermarking_config)
        return {name: value for name, value in values.items() if value is not None} | self.extra

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes generation_config.json into `folder`, which is made where it is missing. Raises ConfigError."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            output_file.replace(Path(folder) / FILE_NAME, self.to_json_string())
        except OSError as error:
            raise ConfigError(f"{folder}: {FILE_NAME} cannot be written ({error.strerror or error})") from None

    def to_json_string(self) -> str:
        """The text of generation_config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def updated(self, values: Mapping[str, Any], source: str = "generate") -> GenerationConfig:
        """A copy with some settings replaced. Raises InputError for unknown names and wrong values."""
        refuse_unknown(values, FIELDS, source)
        refuse_out_of_range(values, source)
        return dataclasses.replace(self, **values, source=source, published=True)

    @classmethod
    def resolve(
        cls, arguments: Mapping[str, Any], passed: Any, model_defaults: GenerationConfig | None
    ) -> tuple[GenerationConfig, bool]:
        """Merges the three places a setting can come from with `DEFAULTS`: call, passed config, model's config.

        Returns the merged settings and whether the length was left to the default (then `max_length` counts new
        tokens). Raises InputError.
        """
        refuse_unknown(arguments, FIELDS, "generate")
        passed = None if passed is None else cls.of(passed)
        given = {name: v for name, v in arguments.items() if v is not None or name not in _NONE_IS_UNSET}
        by_caller = (passed.set_fields() if passed is not None else {}) | given
        by_anyone = (model_defaults.set_fields() if model_defaults is not None else {}) | by_caller
        merged = cls(**(DEFAULTS | by_anyone), source="generate", published=True)
        refuse_out_of_range(given, "generate")
        _check_combinations(merged)
        _warn_of_ignored_settings(merged, by_caller)
        return merged, by_anyone.get("max_length") is None

    def set_fields(self) -> dict[str, Any]:
        """The fields that are set, as Python values."""
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}

    @property
    def eos_ids(self) -> list[int]:
        """The end-of-sequence ids as a list, empty where none is set."""
        return as_ids(self.eos_token_id)


FIELDS = frozenset(f.name for f in dataclasses.fields(GenerationConfig)) - {"extra"}


def as_ids(value: int | Iterable[int] | None) -> list[int]:
    """A token id, several, or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


# Settings that contradict each other, that this package cannot do, or that have no effect.


def _check_combinations(config: GenerationConfig) -> None:
    num_beams, num_return = config.num_beams or 1, config.num_return_sequences or 1
    if num_return > 1 and num_beams == 1 and not config.do_sample:
        raise InputError(f"generate: num_return_sequences={num_return} needs do_sample=True or num_beams > 1")
    if num_return > num_beams > 1:
        raise InputError(f"generate: num_return_sequences={num_return} is greater than num_beams={num_beams}")
    suppressed = set(config.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = as_ids(getattr(config, name))
        if forced and suppressed.issuperset(forced):
            raise InputError(f"generate: suppress_tokens holds every id of {name}={forced}, so no token would be left")
    refused = _refused(config, num_beams)
    if refused:
        raise InputError(f"generate: {refused} is not supported; refllm does greedy, sampling and beam search")


def _refused(config: GenerationConfig, num_beams: int) -> str | None:
    """The name of a setting that would ask for another way of decoding, or None."""
    for name in _OTHER_DECODING:
        if getattr(config, name) not in (None, False):
            return name
    contrastive = (
        not config.do_sample and num_beams == 1 and (config.top_k or 0) > 1 and (config.penalty_alpha or 0) > 0
    )
    if contrastive:
        return "penalty_alpha (contrastive search)"
    if num_beams > 1 and (config.num_beam_groups or 1) > 1:
        return "num_beam_groups (group beam search)"
    if config.cache_implementation not in (None, "dynamic", "static", "hybrid"):
        return f"cache_implementation={config.cache_implementation}"
    return None


def _warn_of_ignored_settings(config: GenerationConfig, by_caller: Mapping[str, Any]) -> None:
    """Warns of settings that the caller made and that have no effect, such as a temperature without sampling."""

    def ignored(names: tuple[str, ...]) -> str:
        return ", ".join(
            f"{n}={by_caller[n]}" for n in names if by_caller.get(n) is not None and by_caller[n] != DEFAULTS.get(n)
        )

    if not config.do_sample and (listed := ignored(SAMPLING_ONLY)):
        warnings.warn(f"generate: without do_sample=True there is no effect of {listed}", UserWarning, stacklevel=4)
    if config.num_beams == 1 and (listed := ignored(BEAMS_ONLY)):
        warnings.warn(f"generate: without num_beams > 1 there is no effect of {listed}", UserWarning, stacklevel=4)
    outputs = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if not config.return_dict_in_generate and (listed := ignored(outputs)):
        text = f"generate: without return_dict_in_generate=True there is no effect of {listed}"
        warnings.warn(text, UserWarning, stacklevel=4)
