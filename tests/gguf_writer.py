"""Writes a checkpoint as a GGUF file, as the converter of llama.cpp lays one out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from refllm.config import AutoConfig, ModelConfig
from refllm.forward.rotary import RotaryEmbedding
from refllm.storage.checkpoint import Checkpoint
from refllm.storage.gguf_file import PAIRED, in_pairs


def write_gguf(folder: Path, path: Path, kind: str = "F32", **planted: Any) -> Path:
    """kind: of the matrices, "F32", "F16", "BF16", "Q8_0", "Q4_0"; those whose rows are no whole blocks, and all
    vectors and norms, stay F32. planted: what to write wrongly: keys of `metadata`, `edit` of the tensors by their
    names, the tensor to write `without`, or `rows_as_they_are`."""
    config: Any = AutoConfig.from_pretrained(folder)
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**_metadata(config), **planted.get("metadata", {})}.items():
        _add(writer, key.replace("ARCH", arch), value)
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    planted.get("edit", lambda tensors: None)(tensors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, values in _heads_together(tensors, config).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads and arch in PAIRED and not planted.get("rows_as_they_are"):
            values = in_pairs(values, heads)
        wanted = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        stored = (
            wanted
            if values.ndim == 2 and "norm" not in name and values.shape[-1] % block == 0
            else gguf.GGMLQuantizationType.F32
        )
        name = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    if config.rope_parameters["rope_type"] == "llama3" and planted.get("without") != "rope_freqs":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _metadata(c: Any) -> dict[str, Any]:
    rope = c.rope_parameters
    found = {
        "ARCH.context_length": c.max_position_embeddings,
        "ARCH.embedding_length": c.hidden_size,
        "ARCH.feed_forward_length": c.intermediate_size,
        "ARCH.block_count": c.num_hidden_layers,
        "ARCH.attention.head_count": c.num_attention_heads,
        "ARCH.attention.head_count_kv": c.num_key_value_heads,
        "ARCH.attention.key_length": c.head_dim,
        "ARCH.attention.value_length": c.head_dim,
        "ARCH.rope.dimension_count": c.rotary_dim,
        "ARCH.rope.freq_base": float(rope["rope_theta"]),
        "ARCH.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    if c.model_type == "stablelm":
        found["ARCH.attention.layer_norm_epsilon"] = float(c.layer_norm_eps)
        found["ARCH.use_parallel_residual"] = bool(c.use_parallel_residual)
    else:
        found["ARCH.attention.layer_norm_rms_epsilon"] = float(c.rms_norm_eps)
    if rope["rope_type"] == "yarn":
        found["ARCH.rope.scaling.type"] = "yarn"
        found["ARCH.rope.scaling.factor"] = float(rope["factor"])
        found["ARCH.rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return found


def _heads_together(tensors: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The norms of single heads as one tensor [heads, D]."""
    found: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        if ".norms." not in name:
            found[name] = values
        elif name.split(".norms.")[0] + ".weight" not in found:
            stem = name.split(".norms.")[0]
            parts = [key for key in tensors if key.startswith(f"{stem}.norms.")]
            ordered = sorted(parts, key=lambda key: int(key.split(".")[-2]))
            found[f"{stem}.weight"] = np.stack([tensors[key] for key in ordered])
    return found


def _llama3_factors(config: ModelConfig) -> np.ndarray:
    """What the frequencies of a plain rotation are divided by."""
    scaled = RotaryEmbedding(config, exact=True).inv_freq
    R = 2 * len(scaled)
    plain = float(config.rope_parameters["rope_theta"]) ** (-np.arange(0, R, 2) / R)
    return (plain / scaled).astype(np.float32)
