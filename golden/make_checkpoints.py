"""Writes the embedded checkpoints: `python -m refllm.golden.make_checkpoints [FOLDER]`.

Everything follows from the seeds in this file and from corpus.txt, so a second run gives the same bytes. The weights
are random, but scaled so that nothing in the model is idle: attention picks a few positions out of many, biases and
norm weights differ from 0 and 1 and from each other, every layer changes the residual stream by about its own size, and
logits spread over a few units. On weights like those of a fresh model (small, no biases, norms of ones) many wrong
implementations look right.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refllm.config import ArceeConfig, HeliumConfig, LlamaConfig, ModelConfig, StableLmConfig
from refllm.generation.config import GenerationConfig
from refllm.models import families
from refllm.storage.checkpoint_writer import save_checkpoint
from refllm.text.tokenizer import Tokenizer

from . import FOLDER, train_tokenizers


@dataclass(frozen=True)
class Recipe:
    """What one checkpoint is made from."""

    config: ModelConfig
    tokenizer: Callable[[int], Tokenizer]
    tokens: int
    """Length of the tokenizer; the model's vocab_size may be larger, as in published checkpoints."""
    dtype: str = "bfloat16"
    max_shard_bytes: int = 5_000_000_000
    generation: dict[str, Any] = field(default_factory=dict)


def recipes() -> dict[str, Recipe]:
    """Name of the checkpoint folder -> recipe."""
    return {
        # Interleaved RoPE, biases on q, k, v but not on o, and in the MLP; eps 1e-8; three query heads per key head.
        "helium-tiny": Recipe(
            HeliumConfig(
                vocab_size=768,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=16,
                attention_bias=True,
                mlp_bias=True,
                rms_norm_eps=1e-8,
                max_position_embeddings=256,
                rope_theta=100000.0,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=3,
            ),
            train_tokenizers.pieces_with_byte_fallback,
            tokens=768,
        ),
        # llama3 RoPE whose three bands (kept, blended, slowed) all occur at D = 16; tied embeddings; two EOS ids.
        "llama-tiny": Recipe(
            LlamaConfig(
                vocab_size=640,
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=3,
                head_dim=16,
                rms_norm_eps=1e-5,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                bos_token_id=635,
                eos_token_id=[636, 639],
                pad_token_id=None,
            ),
            train_tokenizers.bytes_with_bos,
            tokens=640,
            dtype="float32",
        ),
        # As StableLM-3B: D = 80, of which 20 dims are rotated; no biases outside of the norms; more rows than tokens.
        "stablelm-tiny-sequential": Recipe(
            StableLmConfig(
                vocab_size=640,
                hidden_size=160,
                intermediate_size=224,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=256,
                partial_rotary_factor=0.25,
                bos_token_id=0,
                eos_token_id=0,
            ),
            train_tokenizers.bytes_plain,
            tokens=620,
        ),
        # As StableLM-2-12B, plus q, k, v biases: parallel residual, a norm per head, grouped heads.
        "stablelm-tiny-parallel": Recipe(
            StableLmConfig(
                vocab_size=640,
                hidden_size=128,
                intermediate_size=224,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                partial_rotary_factor=0.25,
                use_qkv_bias=True,
                qk_layernorm=True,
                use_parallel_residual=True,
                bos_token_id=0,
                eos_token_id=621,
                pad_token_id=0,
            ),
            train_tokenizers.bytes_with_turns,
            tokens=622,
            dtype="float16",
        ),
        # As AFM-4.5B: yarn with factor 20 although 512 / 32 = 16, five query heads per key head; H * D = 160 is not
        # the hidden size; all biases that the family knows; three shards.
        "arcee-tiny": Recipe(
            ArceeConfig(
                vocab_size=640,
                hidden_size=80,
                intermediate_size=400,
                num_hidden_layers=4,
                num_attention_heads=10,
                num_key_value_heads=2,
                head_dim=16,
                attention_bias=True,
                mlp_bias=True,
                max_position_embeddings=512,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 20.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "original_max_position_embeddings": 32,
                },
                bos_token_id=635,
                eos_token_id=638,
                pad_token_id=639,
            ),
            train_tokenizers.bytes_with_named_templates,
            tokens=640,
            max_shard_bytes=400_000,
            # the sampling settings that the publisher of AFM recommends
            generation={"do_sample": True, "temperature": 0.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
        ),
    }


def make(name: str, recipe: Recipe, folder: Path) -> None:
    """Write one checkpoint into `folder`."""
    config = recipe.config
    model = families.find(config.model_type, "causal_lm")
    assert model is not None
    shapes = {_file_name(tensor): shape for tensor, shape in model.tensors(config).items()}
    tensors = {tensor: weight(name, tensor, shape, config) for tensor, shape in shapes.items()}
    config.architectures, config.dtype = [model.__name__], recipe.dtype
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {
        "generation_config.json": GenerationConfig(**ids, **recipe.generation).to_json_string(),
        "config.json": config.to_json_string(),
    }
    save_checkpoint(folder, tensors, recipe.dtype, max_shard_bytes=recipe.max_shard_bytes, texts=texts)
    recipe.tokenizer(recipe.tokens).save_pretrained(folder)


def _file_name(tensor: str) -> str:
    return tensor if tensor.startswith("lm_head.") else f"model.{tensor}"


def weight(checkpoint: str, tensor: str, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """One tensor. Its numbers depend on the two names alone, so that a new tensor leaves the others as they are.

    The standard deviations assume inputs of unit variance, which the norms provide: a projection with std
    `gain / sqrt(fan_in)` has outputs of std `gain`. Scores are q . k / sqrt(D), so their std is gain_q * gain_k = 2.
    """
    seed = hashlib.sha256(f"{checkpoint}/{tensor}".encode()).digest()
    noise = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big"))).standard_normal(shape)
    if tensor.endswith(".bias"):
        return 0.3 * noise
    if len(shape) == 1:  # norms; behind a norm per head, its weight alone makes the scores large
        return (1.5 if "self_attn." in tensor else 1.0) * np.clip(1.0 + 0.25 * noise, 0.2, 1.8)
    if tensor.endswith("embed_tokens.weight"):
        # tied: the same rows make the logits, of std sqrt(E) * 0.25 = 2.5 at E = 96
        return (0.25 if config.tie_word_embeddings else 1.0) * noise
    return _gain(tensor, config) / np.sqrt(shape[1]) * noise


def _gain(tensor: str, config: ModelConfig) -> float:
    squared = config.hidden_act == "relu2"
    gains = {
        "q_proj": 1.4,
        "k_proj": 1.4,
        "v_proj": 1.2,
        "o_proj": 1.2,
        "gate_proj": 1.4,
        "up_proj": 1.0 if squared else 1.4,
        "down_proj": 0.7 if squared else 1.0,
        "lm_head": 2.5,
    }
    return gains[tensor.split(".")[-2]]


def main() -> None:
    """Write all checkpoints, into the package's own folder unless told otherwise."""
    parser = argparse.ArgumentParser(description="Write the embedded checkpoints again.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER / "checkpoints")
    folder = parser.parse_args().folder
    for name, recipe in recipes().items():
        make(name, recipe, folder / name)
        size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        print(f"{folder / name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
