"""What a config.json says, and what a family has that others have not.

from refllm.config import AutoConfig

config = AutoConfig.from_pretrained("folder")          # HeliumConfig, LlamaConfig, StableLmConfig or ArceeConfig
"""

from refllm.config.config import (
    ACTIVATIONS,
    CONFIG_CLASSES,
    GENERATION_KEYS,
    ArceeConfig,
    AutoConfig,
    HeliumConfig,
    LlamaConfig,
    ModelConfig,
    StableLmConfig,
    as_config,
)

__all__ = [
    "ACTIVATIONS",
    "CONFIG_CLASSES",
    "GENERATION_KEYS",
    "ArceeConfig",
    "AutoConfig",
    "HeliumConfig",
    "LlamaConfig",
    "ModelConfig",
    "StableLmConfig",
    "as_config",
]
