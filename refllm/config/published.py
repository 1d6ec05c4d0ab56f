"""Sizes of published models, in the words of their config.json: what benchmarks and checks on real shapes are made of.

Only what decides shapes and the order of operations; tests/published_configs.py has whole files of such models.
"""

from typing import Any

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "helium-1-preview-2b": (
        "HeliumForCausalLM",
        {
            "vocab_size": 48_000,
            "hidden_size": 2560,
            "intermediate_size": 7040,
            "num_hidden_layers": 24,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "head_dim": 128,
        },
    ),
    "helium-1-2b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 64_000,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "stablelm-3b-4e1t": (
        "StableLmForCausalLM",
        {
            "vocab_size": 50_304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
        },
    ),
    "stablelm-2-12b": (
        "StableLmForCausalLM",
        {
            "vocab_size": 100_352,
            "hidden_size": 5120,
            "intermediate_size": 13_824,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.25,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "afm-4.5b": (
        "ArceeForCausalLM",
        {
            "vocab_size": 128_005,
            "hidden_size": 2560,
            "intermediate_size": 18_432,
            "num_hidden_layers": 36,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}
"""Class of the causal language model, and sizes, by name."""
