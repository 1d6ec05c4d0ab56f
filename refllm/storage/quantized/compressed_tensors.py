"""compressed-tensors, as vLLM's LLM Compressor writes them: int4 and int8 in words, int8, and fp8.

    W[o, i] = (q[o, i] - z) * weight_scale          z and the scale: of the row, group, block or tensor of (o, i)

pack-quantized: weight_packed int32 [out, ceil(in * bits / 32)], q + 2^(bits-1) in unsigned numbers, lowest bits first;
weight_shape is [out, in]; zero points are packed alike along the rows, or int8. int-quantized, float-quantized: weight
int8 or float8_e4m3fn. weight_scale: [1], [out, 1], [out, groups], or of blocks; weight_g_idx [in] with act-order. The
product is exact in float32, and rounded once in the dtype of the scale, in which the library computes. Source:
compressed-tensors, compressors/quantized_compressors and quantization/lifecycle/forward.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.errors import CheckpointError
from refllm.storage.quantized.parts import FLOATS, Parts, setting, unpacked, wide
from refllm.storage.safetensors_format import quote

TITLE = "compressed-tensors"
MARKS = ("weight_packed", "weight_scale")
PARTS = (
    *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale"),
)
DTYPE = ""
"""That of the scale."""
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """bits, and the length of a group (0: none), of the one group of layers."""
    setting(config, "format", _FORMATS)
    setting(config, "quantization_status", ("compressed", "frozen", "initialized"), "compressed")
    groups: Any = config.get("config_groups")
    schemes = [group.get("weights") for group in groups.values()] if _are_objects(groups) else []
    if not schemes or not all(isinstance(scheme, dict) for scheme in schemes):
        raise CheckpointError("quantization_config: config_groups names no group of layers with quantised weights")
    found = [_scheme(scheme) for scheme in schemes]
    if any(scheme != found[0] for scheme in found):
        raise CheckpointError("quantization_config: config_groups has several schemes; refllm reads one")
    return found[0]


def _are_objects(groups: Any) -> bool:
    return isinstance(groups, dict) and all(isinstance(group, dict) for group in groups.values())


def _scheme(scheme: Mapping[str, Any]) -> dict[str, Any]:
    setting(scheme, "type", ("int", "float"), "int")
    bits = setting(scheme, "num_bits", (4, 8), 8)
    strategy = setting(scheme, "strategy", ("tensor", "channel", "group", "block"), "tensor")
    length, block = scheme.get("group_size"), scheme.get("block_structure") or [0, 0]
    if strategy == "group" and (type(length) is not int or length < 1):
        raise CheckpointError(f"quantization_config: group_size is {quote(length)}, expected a number of 1 or more")
    if strategy == "block" and (not isinstance(block, list) or not all(type(n) is int and n > 0 for n in block)):
        raise CheckpointError(f"quantization_config: block_structure is {quote(block)}, expected two numbers")
    return {"bits": bits, "length": length if strategy == "group" else 0, "block": tuple(block)}


def shape(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in]."""
    if "weight_packed" not in parts:
        return parts["weight"].shape
    found = parts.of("weight_shape", ("int64", "int32"), (2,))
    return int(found[0]), int(found[1])


def dequantize(parts: Parts, settings: Mapping[str, Any]) -> NDArray[Any]:
    """W in float64."""
    (out, inputs), bits = shape(parts, settings), settings["bits"]
    if "weight_packed" in parts:
        words = -(-inputs * bits // 32)
        q = unpacked(parts.of("weight_packed", ("int32",), (out, words)), bits, axis=1)[:, :inputs] - 2 ** (bits - 1)
    else:
        q = parts.of("weight", ("int8", "float8_e4m3fn"))
    scale = wide(parts.of("weight_scale", FLOATS))
    zero = _zeros(parts, scale.shape, bits)
    every = _spread(parts, settings, np.ascontiguousarray(scale), (out, inputs))
    shift = 0.0 if zero is None else _spread(parts, settings, zero, (out, inputs))
    return np.ascontiguousarray((wide(q) - shift) * every)


def _zeros(parts: Parts, wanted: tuple[int, ...], bits: int) -> NDArray[Any] | None:
    """The zero points in the shape of the scales."""
    if "weight_zero_point" not in parts:
        return None
    stored = parts["weight_zero_point"]
    if stored.dtype.name == "int32" and stored.shape != wanted:
        rows = unpacked(stored, bits, axis=0)[: wanted[0]] - 2 ** (bits - 1)
        if rows.shape == wanted:
            return wide(rows)
    if stored.shape != wanted:
        raise parts.wrong(
            f"weight_zero_point has shape {list(stored.shape)}, expected that of weight_scale {list(wanted)}"
        )
    return wide(stored)


def _spread(parts: Parts, settings: Mapping[str, Any], values: NDArray[Any], wanted: tuple[int, int]) -> NDArray[Any]:
    """Values of the tensor, of rows, groups or blocks as one of every element, or what broadcasts to it."""
    (out, inputs), (rows, columns) = wanted, settings["block"]
    if values.size == 1:
        return values.reshape(1, 1)
    if values.ndim == 1 and len(values) == out:
        values = values[:, None]
    if rows and values.shape == (-(-out // rows), -(-inputs // columns)):
        return np.repeat(np.repeat(values, rows, axis=0)[:out], columns, axis=1)[:, :inputs]
    length = settings["length"]
    groups = -(-inputs // length) if length else 1
    if values.shape != (out, groups):
        raise parts.wrong(f"weight_scale has shape {list(values.shape)}, expected {[out, groups]}")
    g = np.arange(inputs) // (length or inputs)
    if "weight_g_idx" in parts:
        stored = parts.of("weight_g_idx", ("int32", "int64"), (inputs,)).astype(np.int64)
        if stored.min() >= 0:  # -1: there is no order
            g = stored
        if g.max() >= groups:
            raise parts.wrong(f"weight_g_idx names group {int(g.max())} of {groups}")
    return values[:, g]
