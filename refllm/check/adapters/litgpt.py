"""litgpt as a candidate: a checkpoint of Transformers' layout in litgpt's GPT. Needs the packages `torch`, `litgpt` and
`lightning`, in an environment of their own (tests/stacks/environments.py).

Its config is made here from the checkpoint's, since litgpt knows published models by name only; its weights are made by
litgpt's own converter. The module is then recorded as any other (`torch_module`).
"""

import json
from pathlib import Path
from typing import Any

from refllm.check.adapters.torch_module import TorchModuleCandidate
from refllm.check.stacks import Opening
from refllm.errors import InputError

FAMILIES = ("llama", "stablelm")


def open_candidate(opening: Opening) -> TorchModuleCandidate:
    """The checkpoint as litgpt loads it. Raises InputError for what litgpt has not."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(**config_of(json.loads((opening.folder / "config.json").read_text(encoding="utf-8")), opening.head))
    with torch.device("meta"):
        model = GPT(config)
    state = weights_of(opening.folder, config, getattr(torch, opening.dtype))
    model.load_state_dict(state, strict=True, assign=True)
    model.max_seq_length = config.block_size
    model.cos, model.sin = model.rope_cache(device="cpu")
    return wrap(model, opening)


def wrap(model: Any, opening: Opening) -> TorchModuleCandidate:
    """A GPT of litgpt as a candidate. Without its own cache it takes neither positions nor padding."""
    import litgpt

    candidate = TorchModuleCandidate(model, opening)
    version = getattr(litgpt, "__version__", "") or _version()
    candidate.name = f"litgpt {version}"
    candidate.call.positions = ""
    candidate.takes = ("batch", *(["dtype"] if opening.name == "litgpt" else []))
    candidate.details["litgpt"] = version
    return candidate


def _version() -> str:
    from importlib.metadata import version

    return version("litgpt")


def config_of(c: dict[str, Any], head: str) -> dict[str, Any]:
    """The fields of litgpt's config for a config.json. Raises InputError for what litgpt has not."""
    kind = c["model_type"]
    layer_norm = kind == "stablelm"
    scaling = c.get("rope_parameters") or {"rope_type": "default", "rope_theta": c.get("rope_theta", 10000.0)}
    rotary = scaling.get("partial_rotary_factor", c.get("partial_rotary_factor", 0.25 if layer_norm else 1.0))
    refused = {
        f"model_type {kind}: it has {' and '.join(FAMILIES)}": kind not in FAMILIES,
        f"the head {head}: it has the one of a causal language model": head != "causal_lm",
        "qk_layernorm: its norm has one weight for all heads": c.get("qk_layernorm", False),
        f"hidden_act {c.get('hidden_act')}: it has silu": c.get("hidden_act", "silu") != "silu",
        f"rope_type {scaling['rope_type']}": scaling["rope_type"] not in ("default", "linear", "llama3", "yarn"),
    }
    for what, there in refused.items():
        if there:
            raise InputError(f"--candidate litgpt has no {what}")
    parallel = bool(layer_norm and c.get("use_parallel_residual", False))
    heads = c["num_attention_heads"]
    return {
        "name": kind,
        "block_size": c["max_position_embeddings"],
        "n_layer": c["num_hidden_layers"],
        "n_embd": c["hidden_size"],
        "vocab_size": c["vocab_size"],
        "padded_vocab_size": c["vocab_size"],
        "norm_class_name": "LayerNorm" if layer_norm else "RMSNorm",
        "norm_eps": c["layer_norm_eps" if layer_norm else "rms_norm_eps"],
        "parallel_residual": parallel,
        "shared_attention_norm": parallel,
        "n_head": heads,
        "head_size": c.get("head_dim") or c["hidden_size"] // heads,
        "n_query_groups": c.get("num_key_value_heads") or heads,
        "attn_bias": bool(c.get("use_qkv_bias", False)),
        "bias": False,
        "rope_base": scaling["rope_theta"],
        "rotary_percentage": rotary,
        "rope_adjustments": _adjustments(scaling),
        "intermediate_size": c["intermediate_size"],
        "mlp_class_name": "LLaMAMLP",
    }


def _adjustments(scaling: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling of frequencies under litgpt's names."""
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    }
    if scaling["rope_type"] == "default":
        return None
    return {theirs: scaling[ours] for ours, theirs in names.items() if scaling.get(ours) is not None}


def weights_of(folder: Path, config: Any, dtype: Any) -> dict[str, Any]:
    """The tensors of a checkpoint folder under litgpt's names, by its own converter. Raises InputError for a tensor
    that it does not know."""
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    waiting: dict[int, Any] = {}
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            copy_weights_hf_llama(config, waiting, state, load_file(file), dtype=dtype)
        except KeyError as error:  # it looks every name up in a table
            raise InputError(f"--candidate litgpt has no {error.args[0]}: its converter does not know it") from None
    return state
