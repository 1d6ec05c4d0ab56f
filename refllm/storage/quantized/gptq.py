"""GPTQ: groups of rows of W^T in 2, 3, 4 or 8 bits, each with a scale and a zero per column.

    W[o, i] = scales[g, o] * (q[i, o] - z[g, o])           g = g_idx[i], else i // group_size

qweight: int32 [in * bits / 32, out], the numbers of a column one after another, lowest bits first. qzeros: int32
[groups, out * bits / 32]; it holds z - 1 (z = 0 as the largest number), in the format gptq_v2 z itself. scales: float16
[groups, out]. With act-order (desc_act) g_idx [in] says which group a row is in. The product is exact in float32, and
rounded once in the library's float16. Source: GPTQModel and AutoGPTQ, their QuantLinear of Torch; Frantar et al. 2022.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.storage.quantized.parts import FLOATS, Parts, setting, size, unpacked, wide

TITLE = "GPTQ"
MARKS = ("qweight",)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
DTYPE = "float16"


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """bits, group_size (-1: one group), and whether the zeros are stored as they are."""
    bits = setting(config, "bits", (2, 3, 4, 8))
    stored = setting(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return {"bits": bits, "group_size": size(config, "group_size", 128), "as_they_are": stored == "gptq_v2"}


def shape(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in]."""
    words, out = parts["qweight"].shape
    return out, words * 32 // settings["bits"]


def dequantize(parts: Parts, settings: Mapping[str, Any]) -> NDArray[Any]:
    """W in float64."""
    bits, (out, inputs) = settings["bits"], shape(parts, settings)
    length = inputs if settings["group_size"] == -1 else settings["group_size"]
    groups = -(-inputs // length)
    q = unpacked(parts.of("qweight", ("int32",)), bits, axis=0)
    z = unpacked(parts.of("qzeros", ("int32",), (groups, -(-out * bits // 32))), bits, axis=1)[:, :out]
    z = z if settings["as_they_are"] else (z + 1) & (2**bits - 1)
    scales = wide(parts.of("scales", FLOATS, (groups, out)))
    g = np.arange(inputs) // length
    if "g_idx" in parts:
        g = parts.of("g_idx", ("int32", "int64"), (inputs,)).astype(np.int64)
        if g.min() < 0 or g.max() >= groups:
            raise parts.wrong(f"g_idx names group {int(g.max())} of {groups}")
    return np.ascontiguousarray((scales[g] * (q - z[g])).T)
