"""FP8 with a scale per block, as DeepSeek-V3 has it: float8_e4m3fn numbers times the scale of their 128 x 128 block.

    W[o, i] = weight[o, i] * weight_scale_inv[o // 128, i // 128]         despite its name the scale is multiplied

The block is that of weight_block_size; blocks at the edges may be short. The product has 28 bits: exact in float64, and
rounded once in float32. Source: Transformers, integrations/finegrained_fp8.py; DeepSeek-AI 2024, section 3.3.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.errors import CheckpointError
from refllm.storage.quantized.parts import FLOATS, Parts, wide
from refllm.storage.safetensors_format import quote

TITLE = "FP8 with block scales"
MARKS = ("weight_scale_inv",)
PARTS = ("weight", "weight_scale_inv", "activation_scale")
DTYPE = "float32"


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The block, [rows, columns]."""
    block = config.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            f"quantization_config: weight_block_size is {quote(block)}, expected two numbers of 1 or more"
        )
    return {"block": tuple(block)}


def shape(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in]."""
    return parts["weight"].shape


def dequantize(parts: Parts, settings: Mapping[str, Any]) -> NDArray[Any]:
    """W in float64."""
    weight, (rows, columns) = parts.of("weight", ("float8_e4m3fn",)), settings["block"]
    out, inputs = weight.shape
    scale = wide(parts.of("weight_scale_inv", FLOATS, (-(-out // rows), -(-inputs // columns))))
    every = np.repeat(np.repeat(scale, rows, axis=0)[:out], columns, axis=1)[:, :inputs]
    return wide(weight) * every
