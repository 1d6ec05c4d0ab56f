"""bitsandbytes in 8 bits (LLM.int8): a row of a weight is int8 numbers times the row's largest absolute value over 127.

    W[o, i] = weight[o, i] * SCB[o] * (1/127)            weight: int8 [out, in]. SCB: float32 [out]

Its 1/127 is the float32 number. The library multiplies in float32, from left to right, so that a value of it may be
one float32 ulp from the exact one. Source: bitsandbytes, int8_vectorwise_dequant; Dettmers et al. 2022, "LLM.int8()".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.storage.quantized.parts import Parts, wide

TITLE = "bitsandbytes, 8 bits"
MARKS = ("SCB",)
PARTS = ("weight", "SCB", "weight_format")
DTYPE = "float32"
"""The library dequantises in it."""
_1_127 = np.float32(1 / 127)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: this format has nothing to set."""
    return {}


def shape(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in]."""
    return parts["weight"].shape


def dequantize(parts: Parts, settings: Mapping[str, Any]) -> NDArray[Any]:
    """W in float64."""
    weight = parts.of("weight", ("int8",))
    if "weight_format" in parts and int(parts["weight_format"].reshape(-1)[0]) != 0:
        raise parts.wrong("its weight_format is a layout of tiles for one kind of GPU, expected 0 (rows)")
    scale = parts.of("SCB", ("float32",), weight.shape[:1])
    return wide(weight) * wide(scale)[:, None] * float(_1_127)
