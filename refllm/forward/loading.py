"""What programs written for Transformers give `from_pretrained`, `from_config`, `save_pretrained`, and what it means.

An argument has its meaning here, or it changes nothing here, or it is refused with what to do instead.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from refllm import devices
from refllm.config import AutoConfig, ModelConfig, as_config
from refllm.config.config import read_config_json
from refllm.errors import InputError
from refllm.inputs import refuse_unknown
from refllm.precision import Policy, check_dtype
from refllm.storage import hub_cache

ATTENTION = {"eager": "hf-eager", "sdpa": "hf-sdpa", "flash_attention_2": "hf-sdpa"}
"""attn_implementation -> the policy that rounds where it does: the last two are one kernel with float32 inside."""

_NOTHING_TO_DO = hub_cache.KEYWORDS | {
    *("low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers", "weights_only"),
    *("use_safetensors", "disable_mmap", "ignore_mismatched_sizes", "return_dict", "use_kernels", "_fast_init"),
}
"""They choose between ways to the same weights, of which there is one here: safetensors, mapped, read once."""

_ONE_DEVICE = "a model is computed on one device; leave it out"
_NOT_QUANTISED_HERE = (
    "weights are not quantised while they are loaded; leave it out, or load a checkpoint that was saved quantised"
)
_SAFETENSORS = "weights are read from safetensors files with Transformers' names; convert the checkpoint"
_NO_ADAPTERS = "adapters are not applied; merge the adapter into the model and save that"
_REFUSED: dict[str, str] = {
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), _NOT_QUANTISED_HERE),
    **dict.fromkeys(("from_tf", "from_flax", "gguf_file", "variant", "key_mapping", "state_dict"), _SAFETENSORS),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _ONE_DEVICE),
    **dict.fromkeys(("adapter_kwargs", "adapter_name"), _NO_ADAPTERS),
    "output_attentions": "give it to the call: model(..., output_attentions=True)",
    "output_hidden_states": "give it to the call: model(..., output_hidden_states=True)",
    "output_loading_info": "what was missing or not used is in model.weights.report",
    "kernel_config": "kernels are chosen with backend='torch' or backend='triton'",
    "experts_implementation": "none of these models has experts; leave it out",
    "use_flash_attention_2": "it is called attn_implementation='flash_attention_2'",
}
"""What would change something -> what to do. Not refused where it asks for nothing (None, False, {})."""

_ONE_GPU_OR_THE_CPU = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Loading:
    """How a model is to be made, in the terms of this package.

    dtype: "auto" is the checkpoint's own. attention: the attn_implementation that was asked for. config: the one to use
    instead of the folder's. changes: keys of it that get another value. generation_config: the one to use.
    """

    dtype: Any
    policy: str | Policy | None
    backend: str
    device: Any
    attention: str | None
    config: ModelConfig | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Any = None

    def read_config(self, config_class: type[ModelConfig], folder: Path) -> ModelConfig:
        """The config of the model in `folder`. Raises ConfigError."""
        if self.config is None:
            return config_class.from_pretrained(folder, **self.changes)
        return config_class.from_dict({**self.config.to_dict(), **self.changes})

    def dtype_for(self, config: ModelConfig, stored: str = "float32") -> str:
        """The dtype; of "auto" that of the config, or else the one that is stored."""
        return check_dtype((config.dtype or stored) if self.dtype == "auto" else self.dtype)

    def policy_for(self, dtype: str) -> str | Policy | None:
        """The policy on NumPy, where attn_implementation chooses one. float64 is exact whatever is asked for."""
        return self.policy if self.attention is None or dtype == "float64" else ATTENTION[self.attention]


def understood(
    what: str,
    config_class: type[ModelConfig],
    keywords: Mapping[str, Any],
    *,
    dtype: Any,
    policy: Any,
    backend: str = "numpy",
    device: Any = None,
    folder: Path | None = None,
) -> Loading:
    """What the arguments of `what` ask for: those of this package, and `keywords`, which are of Transformers.

    folder: of the checkpoint, if there is one. Raises InputError for an argument that is not known or not possible.
    """
    given = {name: value for name, value in keywords.items() if name not in _NOTHING_TO_DO}
    if keywords.get("use_safetensors") is False:
        raise InputError(f"{what}: use_safetensors=False asks for pickles, which are not read; leave it out")
    for name in _REFUSED.keys() & given.keys():
        value = given.pop(name)
        if value not in (None, False, {}) and not (name == "quantization_config" and _is_quantised(folder)):
            raise InputError(f"{what}: {name} is not possible here: {_REFUSED[name]}")
    older = given.pop("torch_dtype", None)
    dtype = older if older is not None else "float32" if dtype is None else dtype
    attention = given.pop("attn_implementation", None)
    if attention is not None and attention not in ATTENTION:
        raise InputError(f"{what}: attn_implementation={attention!r} is not known; use one of {', '.join(ATTENTION)}")
    if attention is not None and policy is not None:
        raise InputError(f"{what}: attn_implementation and policy both say where attention rounds; give one of them")
    place = given.pop("device_map", None)
    if place is not None and device is None:
        backend, device = _place(what, place, backend)
    config, generation_config = given.pop("config", None), given.pop("generation_config", None)
    if isinstance(config, str | os.PathLike):
        config = AutoConfig.from_pretrained(config)
    keys = {f.name for f in fields(config_class) if f.init} | {"num_labels", "rope_theta", "rope_scaling"}
    refuse_unknown(given, keys | (_REFUSED.keys() | _NOTHING_TO_DO | _UNDERSTOOD) - given.keys(), what)
    config = None if config is None else as_config(f"{what}: config", config, config_class)
    return Loading(dtype, policy, backend, device, attention, config, given, generation_config)


_UNDERSTOOD = {
    *("dtype", "torch_dtype", "attn_implementation", "device_map", "config", "generation_config"),
    *("policy", "low_memory", "progress", "seed", "backend", "device"),
}


def _is_quantised(folder: Path | None) -> bool:
    return folder is not None and bool(read_config_json(folder)[1].get("quantization_config"))


def _place(what: str, device_map: Any, backend: str) -> tuple[str, Any]:
    """Backend and device for a device_map: of Accelerate's names, of a device, or of modules and one device."""
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        if len(places) != 1:
            raise InputError(f"{what}: device_map names {len(places)} devices: {_ONE_DEVICE}")
        device_map = next(iter(device_map.values()))
    if device_map in _ONE_GPU_OR_THE_CPU:
        device_map = "cuda" if devices.gpus() else "cpu"
    where = devices.found(device_map)
    if where.type == "cpu":
        return backend, None if backend == "numpy" else where
    return devices.backend() if backend == "numpy" else backend, where


_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(I?)B", re.IGNORECASE)


def shard_bytes(max_shard_size: int | str) -> int:
    """Bytes of "5GB" (10^9 each), "5GiB" (2^30 each) or a number. Raises InputError for what is no size."""
    if isinstance(max_shard_size, int) and max_shard_size > 0:
        return max_shard_size
    size = _SIZE.fullmatch(str(max_shard_size).strip())
    if size is None or not int(size[1]):
        raise InputError(f"save_pretrained: max_shard_size={max_shard_size!r} is no size; expected one like '5GB'")
    return int(size[1]) * (1024 if size[3] else 1000) ** " KMGT".index(size[2].upper() or " ")
