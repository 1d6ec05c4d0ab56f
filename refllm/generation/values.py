"""Readers of the single settings of text generation: each returns the value as this package uses it.

A reader takes (source, name, value) and raises ConfigError with one sentence for a value that the setting cannot have.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from refllm.config.values import read_bool, read_choice, read_float, read_int, read_size
from refllm.errors import ConfigError, InputError
from refllm.generation.watermark import WatermarkingConfig
from refllm.inputs import refuse_unknown
from refllm.storage.json_text import show
from refllm.text.arguments import check_unicode

Reader = Callable[[str, str, Any], Any]


def read_setting(name: str, value: Any, source: str) -> Any:
    """The value of the setting `name` as this package uses it; names without a rule pass. Raises InputError."""
    try:
        return READERS[name](source, name, value) if name in READERS else value
    except ConfigError as error:
        raise InputError(str(error)) from None


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, math.inf),
    "top_k": (0, math.inf),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), (0.0, 1.0)),
}
"""Outside of these no sampling is possible. The ends mean "off" at one setting and "greedy" at another, and are for the
rules themselves to judge."""


def refuse_out_of_range(values: Mapping[str, Any], source: str) -> None:
    """Raises InputError for a number that sampling could not work with, whether or not there is sampling."""
    for name, (low, high) in _RANGES.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            wanted = f"lie in [{low:g}, {high:g}]" if high < math.inf else f"be at least {low:g}"
            raise InputError(f"{source}: {name}={show(value)} must {wanted}")


def _count(source: str, name: str, value: Any) -> int:
    return read_int(source, name, value, minimum=0)


def _seconds(source: str, name: str, value: Any) -> float:
    return read_float(source, name, value, minimum=0.0)


def _early_stopping(source: str, name: str, value: Any) -> bool | str:
    if value == "never":
        return "never"
    try:
        return read_bool(source, name, value)
    except ConfigError:
        raise ConfigError(f'{source}: {name}={show(value)} must be true, false or "never"') from None


def _strings(source: str, name: str, value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not strings or not all(isinstance(s, str) and s for s in strings):
        raise ConfigError(f"{source}: {name}={show(value)} must be a non-empty string or a list of them")
    for string in strings:
        check_unicode(string, f"{source}: {name}")
    return list(strings)


def _token_id(source: str, name: str, value: Any) -> int:
    return read_int(source, name, value, minimum=0)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _token_ids(source: str, name: str, value: Any) -> list[int]:
    if not _is_sequence(value):
        raise ConfigError(f"{source}: {name}={show(value)} must be a list of token ids")
    return [read_int(source, name, item) for item in value]


def _one_or_more_ids(source: str, name: str, value: Any) -> int | list[int]:
    if not _is_sequence(value):
        return read_int(source, name, value)
    ids = _token_ids(source, name, value)
    if not ids:
        raise ConfigError(f"{source}: {name}={show(value)} must be a token id or a non-empty list of them")
    return ids


def _words(source: str, name: str, value: Any) -> list[list[int]]:
    if not _is_sequence(value) or not all(_is_sequence(word) for word in value):
        raise ConfigError(f"{source}: {name}={show(value)} must be a list of lists of token ids")
    words = [[_token_id(source, name, item) for item in word] for word in value]
    if not words or not all(words):
        raise ConfigError(f"{source}: {name}={show(value)} must hold at least one word and no empty one")
    return words


_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def _biases(source: str, name: str, value: Any) -> dict[tuple[int, ...], float]:
    """A dict {ids: bias} or, as JSON must write it, a list of pairs [ids, bias]. Infinite biases are legal."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not _is_sequence(pairs) or not pairs or not all(_is_sequence(pair) and len(pair) == 2 for pair in pairs):
        raise ConfigError(
            f"{source}: {name}={show(value)} must map sequences of token ids to biases, or list the pairs"
        )
    biases = {}
    for ids, bias in pairs:
        key = tuple(_token_id(source, name, item) for item in ids) if _is_sequence(ids) else ()
        if not key:
            raise ConfigError(f"{source}: {name} biases {show(ids)}, which is not a non-empty sequence of token ids")
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or bias != bias:
            raise ConfigError(f"{source}: {name} gives {list(key)} the bias {show(bias)}, which is not a number")
        size: Any = abs(bias)
        if _LARGEST_FLOAT32 < size < math.inf:
            raise ConfigError(f"{source}: {name} gives {list(key)} the bias {show(bias)}, which no float32 can be")
        biases[key] = float(bias)
    return biases


def _decay(source: str, name: str, value: Any) -> tuple[int, float]:
    if not _is_sequence(value) or len(value) != 2:
        raise ConfigError(f"{source}: {name}={show(value)} must be a pair: start and factor")
    return read_int(source, name, value[0]), read_float(source, name, value[1])


def _watermark(source: str, name: str, value: Any) -> WatermarkingConfig:
    if isinstance(value, WatermarkingConfig):
        return value
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise ConfigError(f"{source}: {name} is a {kind}, and must be a WatermarkingConfig or its fields as a dict")
    refuse_unknown(value, [f.name for f in dataclasses.fields(WatermarkingConfig)], f"{source}: {name}")
    return WatermarkingConfig(**value)


def _cache_implementation(source: str, name: str, value: Any) -> str:
    choices = ("dynamic", "static", "offloaded", "offloaded_static", "quantized", "paged", "hybrid", "sliding_window")
    return read_choice(source, name, value, choices)


READERS: dict[str, Reader] = {
    "max_length": read_size,
    "max_new_tokens": read_size,
    "min_length": _count,
    "min_new_tokens": _count,
    "max_time": _seconds,
    "stop_strings": _strings,
    "do_sample": read_bool,
    "num_beams": read_size,
    "num_return_sequences": read_size,
    "early_stopping": _early_stopping,
    "length_penalty": read_float,
    "guidance_scale": read_float,
    "sequence_bias": _biases,
    "encoder_repetition_penalty": read_float,
    "repetition_penalty": read_float,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "bad_words_ids": _words,
    "forced_bos_token_id": _token_id,
    "forced_eos_token_id": _one_or_more_ids,
    "remove_invalid_values": read_bool,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _token_ids,
    "begin_suppress_tokens": _token_ids,
    "temperature": read_float,
    "top_h": read_float,
    "top_k": read_int,
    "top_p": read_float,
    "min_p": read_float,
    "typical_p": read_float,
    "epsilon_cutoff": read_float,
    "eta_cutoff": read_float,
    "watermarking_config": _watermark,
    "renormalize_logits": read_bool,
    "use_cache": read_bool,
    "cache_implementation": _cache_implementation,
    "max_cache_len": read_size,
    "prefill_chunk_size": read_size,
    "bos_token_id": read_int,
    "eos_token_id": _one_or_more_ids,
    "pad_token_id": read_int,
    "return_dict_in_generate": read_bool,
    "output_scores": read_bool,
    "output_logits": read_bool,
    "output_attentions": read_bool,
    "output_hidden_states": read_bool,
}
