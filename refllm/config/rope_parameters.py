"""Makes every spelling of the rotary settings in a config.json one flat, checked dict.

Sources: `RotaryEmbeddingConfigMixin` in transformers/modeling_rope_utils.py (5.x) for the rule by which the spellings
are merged; the papers of the types are named in refllm/ops/rope_tables.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from refllm.config.values import read_bool, read_choice, read_float, read_size, warn
from refllm.errors import ConfigError
from refllm.storage.json_text import show

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
LEGACY_KEYS = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

_HAS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")
_NEEDS_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_OWN_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "original_max_position_embeddings",
    ),
}
_MAX_THETA = 3.4e38  # beyond it the base is infinite in float32, where Transformers computes
_SMALLEST, _LARGEST = 1e-6, 1e12  # of factors: far outside any use, and close enough that no table overflows


def rotary_dim_of(head_dim: int, parameters: Mapping[str, Any]) -> int:
    """R = int(head_dim * partial_rotary_factor), truncated; head_dim where the factor is absent."""
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def normalise_rope(
    source: str, values: Mapping[str, Any], *, default_theta: float, default_partial: float | None, max_positions: int
) -> dict[str, Any]:
    """Merge `rope_parameters` and the legacy keys of `values` into one new dict; nothing of `values` is modified.

    1. A non-empty rope_scaling replaces rope_parameters as a whole; otherwise rope_parameters; otherwise nothing.
    2. rope_theta and partial_rotary_factor: the dict's own, else the top-level key, else the family's default.
    3. rope_type: the dict's own, else its `type` key, else "default". `type` has no meaning beside rope_type.
    4. original_max_position_embeddings, for the types that have it: the top-level key (it wins over the dict), else
       the dict's own, else max_position_embeddings.
    """
    merged = _own_dict(source, values)
    _warn_of_contradictions(source, values, merged)
    nested = [key for key, value in merged.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"{source}: rope_parameters has one dict per layer type ({show(nested[0])}: ...), but these families have "
            "one rotary embedding for all layers, so rope_parameters must be a flat dict"
        )
    merged.setdefault("rope_theta", values.get("rope_theta", default_theta))
    if "partial_rotary_factor" not in merged:
        partial = values.get("partial_rotary_factor", default_partial)
        if partial is not None:
            merged["partial_rotary_factor"] = partial
    legacy_type = merged.pop("type", "default")
    merged.setdefault("rope_type", legacy_type)
    if merged["rope_type"] in _HAS_ORIGINAL_LENGTH:
        if "original_max_position_embeddings" in values:
            merged["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        merged.setdefault("original_max_position_embeddings", max_positions)
    return merged


def _warn_of_contradictions(source: str, values: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Names both values where two keys say different things of one setting, and the one that counts."""
    first, second = values.get("rope_parameters"), values.get("rope_scaling")
    if first and second and first != second:
        warn(f"{source}: rope_scaling={show(second)} replaces rope_parameters={show(first)}")
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if name in own and values.get(name) is not None and values[name] != own[name]:
            wins = name == "original_max_position_embeddings" and own.get("rope_type") in _HAS_ORIGINAL_LENGTH
            told = f"{name}={show(values[name])} and {name}={show(own[name])} inside rope_parameters or rope_scaling"
            warn(f"{source}: there are {told}; the {'former' if wins else 'latter'} is used")
    if "type" in own and "rope_type" in own and own["type"] != own["rope_type"]:
        warn(f"{source}: there are rope_type={show(own['rope_type'])} and type={show(own['type'])}; rope_type is used")


def _own_dict(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the dict that holds the settings: rope_scaling unless null or empty, else rope_parameters."""
    chosen: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {name}={show(value)} must be an object or null")
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{source}: {name} has the key {show(key)}, which must be a string")
        if value:
            chosen = copy.deepcopy(dict(value))
    return chosen


def check_rope(
    source: str, parameters: dict[str, Any], *, head_dim: int, max_positions: int, partial_rotation: bool
) -> None:
    """Check a normalised dict and convert its values in place (integral floats to ints, null options dropped).

    `partial_rotation`: whether the family may rotate fewer than head_dim dims (StableLM). Raises ConfigError for what
    Transformers fails on, at construction or in forward; warns for what it computes but what looks like a mistake.
    """
    rope_type = read_choice(source, "rope_type", parameters["rope_type"], ROPE_TYPES)
    _read_number(source, parameters, "rope_theta", minimum=_SMALLEST, maximum=_MAX_THETA)
    _check_partial(source, parameters, rope_type, head_dim, partial_rotation)
    rotary_dim = rotary_dim_of(head_dim, parameters) if partial_rotation else head_dim
    if rotary_dim % 2:
        raise ConfigError(
            f"{source}: the rotary dimension is {rotary_dim} (head_dim={head_dim}, partial_rotary_factor="
            f"{parameters.get('partial_rotary_factor', 1.0):g}), but it must be even"
        )
    _check_factor(source, parameters, rope_type)
    if rope_type == "dynamic" and rotary_dim == 2:
        raise ConfigError(f"{source}: rope_type dynamic divides by rotary dimension - 2, so that must not be 2")
    if rope_type in _HAS_ORIGINAL_LENGTH:
        name = "original_max_position_embeddings"
        parameters[name] = read_size(source, name, parameters[name])
    if rope_type == "llama3":
        _check_llama3(source, parameters)
    if rope_type == "yarn":
        _check_yarn(source, parameters, max_positions)
    if rope_type == "longrope":
        _check_longrope(source, parameters, rotary_dim, max_positions)


def unused_rope_keys(parameters: Mapping[str, Any], *, partial_rotation: bool) -> tuple[str, ...]:
    """The keys of a checked dict that have no effect in its type, as "rope_parameters.NAME"."""
    rope_type = parameters["rope_type"]
    used = {"rope_type", "rope_theta", *_OWN_KEYS[rope_type]}
    if partial_rotation or rope_type != "default":
        used.add("partial_rotary_factor")
    return tuple(f"rope_parameters.{key}" for key in sorted(set(parameters) - used))


def _read_number(source: str, parameters: dict[str, Any], name: str, **limits: float) -> None:
    number = read_float(source, name, parameters[name], **limits)
    if not isinstance(parameters[name], int):  # an int stays an int, as Transformers keeps it
        parameters[name] = number


def _check_partial(
    source: str, parameters: dict[str, Any], rope_type: str, head_dim: int, partial_rotation: bool
) -> None:
    if "partial_rotary_factor" not in parameters:
        if partial_rotation:
            raise ConfigError(f"{source}: partial_rotary_factor=null must be a number from 0 to 1")
        return
    if parameters["partial_rotary_factor"] is None and not partial_rotation and rope_type == "default":
        del parameters["partial_rotary_factor"]
        return
    _read_number(source, parameters, "partial_rotary_factor", minimum=0.0, maximum=1.0)
    factor = parameters["partial_rotary_factor"]
    if rotary_dim_of(head_dim, parameters) == head_dim:
        return
    if rope_type == "proportional" and partial_rotation:
        raise ConfigError(
            f"{source}: partial_rotary_factor={show(factor)} must be 1 with rope_type proportional in this family, "
            "whose attention would rotate fewer dims than the table has"
        )
    if partial_rotation or rope_type == "proportional":
        return
    if rope_type == "default":
        warn(
            f"{source}: partial_rotary_factor={show(factor)} has no effect in this family with rope_type default; "
            "all dims of a head are rotated"
        )
        return
    raise ConfigError(
        f"{source}: partial_rotary_factor={show(factor)} with rope_type {rope_type} gives a table of the wrong size, "
        "because this family rotates all dims of a head; it must be absent or 1"
    )


def _check_factor(source: str, parameters: dict[str, Any], rope_type: str) -> None:
    if rope_type in _NEEDS_FACTOR and "factor" not in parameters:
        raise ConfigError(f"{source}: rope_type {rope_type} needs the key factor in rope_parameters")
    if rope_type == "default" or "factor" not in parameters:
        return
    if parameters["factor"] is None and rope_type in ("yarn", "longrope"):
        return  # it then follows from max_position_embeddings and the original length
    _read_number(source, parameters, "factor", minimum=_SMALLEST, maximum=_LARGEST)
    if parameters["factor"] < 1:
        warn(f"{source}: factor={show(parameters['factor'])} of rope_type {rope_type} is below 1")


def _check_llama3(source: str, parameters: dict[str, Any]) -> None:
    for name in ("low_freq_factor", "high_freq_factor"):
        if name not in parameters:
            raise ConfigError(f"{source}: rope_type llama3 needs the key {name} in rope_parameters")
        _read_number(source, parameters, name, minimum=_SMALLEST, maximum=_LARGEST)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if high <= low:
        raise ConfigError(f"{source}: high_freq_factor={show(high)} must be greater than low_freq_factor={show(low)}")


def _check_yarn(source: str, parameters: dict[str, Any], max_positions: int) -> None:
    if parameters["rope_theta"] == 1:
        raise ConfigError(f"{source}: rope_theta=1 with rope_type yarn divides by ln(rope_theta)=0; it must not be 1")
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if parameters.get(name) is not None:
            may_be_zero = parameters[name] == 0 or name.startswith("mscale")  # a beta of 0 stands for the default
            _read_number(source, parameters, name, minimum=0.0 if may_be_zero else _SMALLEST, maximum=_LARGEST)
    _check_attention_factor(source, parameters)
    if "truncate" in parameters:
        parameters["truncate"] = read_bool(source, "truncate", parameters["truncate"])
    fast, slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
    if fast < slow:
        warn(f"{source}: beta_fast={show(fast)} is below beta_slow={show(slow)}")
    implied = max_positions / parameters["original_max_position_embeddings"]
    if parameters["factor"] is not None and implied not in (1, parameters["factor"]):
        warn(
            f"{source}: factor={show(parameters['factor'])} is used, although max_position_embeddings / "
            f"original_max_position_embeddings is {implied:g}"
        )


def _check_longrope(source: str, parameters: dict[str, Any], rotary_dim: int, max_positions: int) -> None:
    for name in ("short_factor", "long_factor"):
        if name not in parameters:
            raise ConfigError(f"{source}: rope_type longrope needs the key {name} in rope_parameters")
        factors = parameters[name]
        if not isinstance(factors, list | tuple) or len(factors) != rotary_dim // 2:
            raise ConfigError(
                f"{source}: {name}={show(factors)} must be a list of {rotary_dim // 2} numbers, half the rotary "
                "dimension"
            )
        for i, factor in enumerate(factors):
            read_float(source, f"{name}[{i}]", factor, minimum=_SMALLEST, maximum=_LARGEST)
        parameters[name] = list(factors)
    _check_attention_factor(source, parameters)
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_positions / original
    if original == 1 and factor > 1 and parameters.get("attention_factor") is None:
        raise ConfigError(
            f"{source}: original_max_position_embeddings=1 with rope_type longrope divides by its logarithm 0; it must "
            "be at least 2"
        )


def _check_attention_factor(source: str, parameters: dict[str, Any]) -> None:
    if parameters.get("attention_factor") is None:
        return
    _read_number(source, parameters, "attention_factor", minimum=-_LARGEST, maximum=_LARGEST)
    if parameters["attention_factor"] < 0:
        warn(f"{source}: attention_factor={show(parameters['attention_factor'])} is negative")
