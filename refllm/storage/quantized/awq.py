"""AWQ: groups of rows of W^T in 4 bits, each with a scale and a zero per column.

    W[o, i] = scales[i // group_size, o] * (q[i, o] - z[i // group_size, o])

qweight: int32 [in, out / 8], qzeros: int32 [groups, out / 8]; the eight numbers of a word are columns 0, 2, 4, 6, 1, 3,
5, 7, lowest bits first. scales: float16 [groups, out]. The product is exact in float32, and rounded once in the
library's float16. Source: AutoAWQ, utils/packing_utils.py (version "gemm"); Lin et al. 2023.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.storage.quantized.parts import FLOATS, Parts, setting, size, unpacked, wide

TITLE = "AWQ"
MARKS = ("qweight",)
PARTS = ("qweight", "qzeros", "scales")
DTYPE = "float16"
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column of eight -> its place in the word."""


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """group_size (-1: one group)."""
    setting(config, "bits", (4,), config.get("w_bit", 4))
    setting(config, "version", ("gemm", "GEMM"), "gemm")
    return {"group_size": size(config, "group_size", config.get("q_group_size", 128))}


def shape(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in]."""
    inputs, words = parts["qweight"].shape
    return words * 8, inputs


def dequantize(parts: Parts, settings: Mapping[str, Any]) -> NDArray[Any]:
    """W in float64."""
    out, inputs = shape(parts, settings)
    length = inputs if settings["group_size"] == -1 else settings["group_size"]
    groups, g = -(-inputs // length), np.arange(inputs) // length
    q = _in_order(unpacked(parts.of("qweight", ("int32",)), 4, axis=1))
    z = _in_order(unpacked(parts.of("qzeros", ("int32",), (groups, out // 8)), 4, axis=1))
    scales = wide(parts.of("scales", FLOATS, (groups, out)))
    return np.ascontiguousarray((scales[g] * (q - z[g])).T)


def _in_order(numbers: NDArray[Any]) -> NDArray[Any]:
    """The columns out of the order of the words."""
    return numbers.reshape(len(numbers), -1, 8)[:, :, list(_PLACE)].reshape(len(numbers), -1)
