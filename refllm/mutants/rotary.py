"""Defects and places of rotary embedding. Each entry: name -> the fields of `refllm.mutants.models.Mutant`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refllm.config.traits import traits_of
from refllm.mutants.planting import Plant, layer_of, replaced, rotary_tables, rotate, rotation_is, tables_are


def partly_rotated(config: Any) -> bool:
    """Whether some dims of a head pass through."""
    return bool(config.rotary_dim < config.head_dim)


def _frequencies_times(power: float) -> Plant:
    """theta times 10^power: frequency i is multiplied by 10^(-power 2i / R)."""

    def tables(rotary: Any, positions: Any, dtype: Any) -> Any:
        import torch

        n = len(rotary.inv_freq)
        change = 10.0 ** (-power * torch.arange(n) / n)
        return rotary_tables(rotary.inv_freq * change, rotary.attention_scaling, positions, dtype)

    return tables_are(tables)


def _exponent_over_all_dims(rotary: Any, positions: Any, dtype: Any) -> Any:
    """theta^(-2i / D) for theta^(-2i / R)."""
    config = rotary.config
    share = 2 * len(rotary.inv_freq) / (config.hidden_size // config.num_attention_heads)
    return rotary_tables(rotary.inv_freq**share, rotary.attention_scaling, positions, dtype)


def _frequencies_in_bfloat16(rotary: Any, positions: Any, dtype: Any) -> Any:
    return rotary_tables(rotary.inv_freq.bfloat16(), rotary.attention_scaling, positions, dtype)


def _angles_in_bfloat16(rotary: Any, positions: Any, dtype: Any) -> Any:
    import torch

    angles = (positions[..., None].float() * rotary.inv_freq).bfloat16().float()
    angles = torch.cat((angles, angles), dim=-1)
    return tuple((t * rotary.attention_scaling).to(dtype) for t in (angles.cos(), angles.sin()))


def _unrounded(rotary: Any, original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """Products and sums in float32, one rounding at the end: not where eager code rounds."""
    return tuple(t.to(q.dtype) for t in original(q.float(), k.float(), cos.float(), sin.float()))


def _second_half_late(rotary: Any, positions: Any, dtype: Any) -> Any:
    positions = positions.clone()
    positions[:, positions.shape[1] // 2 :] += 1
    return rotary_tables(rotary.inv_freq, rotary.attention_scaling, positions, dtype)


def _all_late(rotary: Any, positions: Any, dtype: Any) -> Any:
    return rotary_tables(rotary.inv_freq, rotary.attention_scaling, positions + 1, dtype)


def _without_factor(rotary: Any, positions: Any, dtype: Any) -> Any:
    return rotary_tables(rotary.inv_freq, 1.0, positions, dtype)


def _factor_once(rotary: Any, original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    factor = rotary.attention_scaling
    return original(q, k, cos, sin)[0], original(q, k, cos / factor, sin / factor)[1]


def _other_pairing(rotary: Any, original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    interleaved = not traits_of(rotary.config).interleaved
    return tuple(rotate(x, cos, sin, interleaved=interleaved) for x in (q, k))


def _other_direction(rotary: Any, original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return original(q, k, cos, -sin)


def _first_half_only(rotary: Any, original: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """R = D / 2: the frequencies theta^(-2i / R) are every second one."""
    import torch

    R, n = q.shape[-1] // 2, len(rotary.inv_freq)
    cos, sin = (torch.cat((t[..., :n:2], t[..., :n:2]), dim=-1) for t in (cos, sin))
    interleaved = traits_of(rotary.config).interleaved
    return tuple(torch.cat((rotate(x[..., :R], cos, sin, interleaved=interleaved), x[..., R:]), dim=-1) for x in (q, k))


@contextmanager
def all_dims(model: Any, layer: int) -> Iterator[None]:
    """R = D where it is less."""
    import torch

    attention = layer_of(model, layer).self_attn
    D = attention.head_dim

    def tables(rotary: Any, positions: Any, dtype: Any) -> Any:
        theta = rotary.config.rope_parameters["rope_theta"]
        inv_freq = theta ** (-torch.arange(0, D, 2).float() / D)
        return rotary_tables(inv_freq, rotary.attention_scaling, positions, dtype)

    with replaced(attention, "rotary_ndims", D), tables_are(tables)(model, layer):
        yield


_ROPE = ("self_attn.q_rope", "self_attn.k_rope")

ROPE: dict[str, dict[str, Any]] = {
    "the other pairing of dims": {
        "taps": _ROPE,
        "plant": rotation_is(_other_pairing),
        "source": "sgl-project/sglang#30342",
    },
    "theta times 10": {"taps": _ROPE, "plant": _frequencies_times(1.0)},
    "all dims rotated": {
        "taps": _ROPE,
        "plant": all_dims,
        "applies": partly_rotated,
        "source": "vllm-project/vllm#43676",
    },
    "half of the dims rotated": {
        "taps": _ROPE,
        "plant": rotation_is(_first_half_only),
        "applies": lambda config: not partly_rotated(config),
        "source": "vllm-project/vllm#16904",
    },
    "exponent over D instead of R": {
        "taps": _ROPE,
        "plant": tables_are(_exponent_over_all_dims),
        "applies": partly_rotated,
    },
    "frequencies in bfloat16": {"taps": _ROPE, "plant": tables_are(_frequencies_in_bfloat16)},
    "angles in bfloat16": {"taps": _ROPE, "plant": tables_are(_angles_in_bfloat16)},
    "sign of sin": {"taps": _ROPE, "plant": rotation_is(_other_direction)},
    "positions off by one in the second half of a chunk": {"taps": _ROPE, "plant": tables_are(_second_half_late)},
    "attention factor missing": {
        "taps": _ROPE,
        "plant": tables_are(_without_factor),
        "applies": lambda config: config.rope_parameters["rope_type"] == "yarn",
    },
    "attention factor on queries only": {
        "taps": _ROPE,
        "plant": rotation_is(_factor_once),
        "applies": lambda config: config.rope_parameters["rope_type"] == "yarn",
    },
    "products not rounded": {
        "taps": _ROPE,
        "plant": rotation_is(_unrounded),
        "place": ("rounds tables and the result",),
    },
    "all positions one later": {
        "taps": _ROPE,
        "plant": tables_are(_all_late),
        "equivalent": "scores depend on differences of positions; rotated queries and keys differ, nothing after does",
    },
}
