"""Which configs compute the same: a short name of what a config says about the mathematics."""

import hashlib
import json
from typing import Any

from refllm.config.config import ModelConfig


def config_hash(config: ModelConfig) -> str:
    """A hash of the fields that decide what is computed: names, dtypes and versions left out."""
    values: dict[str, Any] = config.to_dict()
    for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"):
        values.pop(key, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
