"""A Transformers model behind the interface that `refllm.generation.generate` calls.

With it both sides of a comparison see the same logits bit for bit, so that tokens must be identical.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refllm.generation.config import GenerationConfig
from refllm.generation.generate import GenerateOutput, generate


class CacheAdapter:
    """A Transformers cache with NumPy indices."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length())

    def reorder_cache(self, rows: np.ndarray) -> None:
        self.cache.reorder_cache(torch.tensor(rows))


class TorchAdapter:
    """NumPy arrays in and out of a Transformers causal language model. `calls` counts columns of each forward call."""

    def __init__(self, model: Any, generation_config: GenerationConfig | None = None) -> None:
        self.model = model
        self.config = model.config
        self.generation_config = generation_config or GenerationConfig()
        self.calls: list[int] = []

    def __call__(self, *, past_key_values: CacheAdapter | None = None, **arguments: Any) -> SimpleNamespace:
        tensors = {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
        self.calls.append(next(v for n, v in arguments.items() if n in ("input_ids", "inputs_embeds")).shape[1])
        past = None if past_key_values is None else past_key_values.cache
        with torch.no_grad():
            out = self.model(past_key_values=past, **tensors)
        return SimpleNamespace(
            logits=out.logits.numpy(),
            past_key_values=None if out.past_key_values is None else CacheAdapter(out.past_key_values),
            hidden_states=None if out.hidden_states is None else tuple(h.numpy() for h in out.hidden_states),
            attentions=None if out.attentions is None else tuple(a.numpy() for a in out.attentions),
        )


@cache
def tiny_model(vocab: int = 19, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A random Llama whose logits spread over several units, so that some tokens are likely and no two are equal."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    return model


def both(model: Any, ids: Any, mask: Any = None, **settings: Any) -> tuple[GenerateOutput, Any]:
    """The outputs of refllm and of Transformers for the same call."""
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | settings
    shared = {name: settings.pop(name) for name in ("input_ids", "tokenizer") if name in settings}
    own = generate(TorchAdapter(model), ids, mask, **shared, **settings)
    assert isinstance(own, GenerateOutput)
    tensors = {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in settings.items()}
    witness = model.generate(
        None if ids is None else torch.tensor(ids),
        attention_mask=None if mask is None else torch.tensor(mask),
        **shared,
        **tensors,
    )
    return own, witness
