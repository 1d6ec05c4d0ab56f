"""bitsandbytes in 4 bits (nf4 and fp4): blocks of numbers out of a table of 16, times the block's largest magnitude.

    W = quant_map[q] * absmax[block]           q: the numbers of the flat weight, two to a byte, high half first
    absmax = nested_quant_map[c] * nested_absmax[block of blocks] + offset        where it is quantised as well

absmax is float32; where it is quantised, its product and its sum are each rounded to float32, as the library holds it.
A JSON text beside the weight (quant_state) has shape, block sizes and offset; the last block may be short. Source:
bitsandbytes, functional.QuantState and dequantize_4bit; Dettmers et al. 2023, "QLoRA".
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.storage.quantized.parts import Parts, wide
from refllm.storage.safetensors_format import quote

TITLE = "bitsandbytes, 4 bits"
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
MARKS = _STATES
PARTS = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *_STATES,
)
DTYPE = "float32"


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything stands beside the weights."""
    return {}


def shape(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in]."""
    found = _state(parts)["shape"]
    if not isinstance(found, list) or not all(type(n) is int and n > 0 for n in found):
        raise parts.wrong(f"its quant_state has the shape {quote(found)}, expected two numbers of 1 or more")
    return tuple(found)


def dequantize(parts: Parts, settings: Mapping[str, Any]) -> NDArray[Any]:
    """W in float64."""
    state, wanted = _state(parts), shape(parts, settings)
    count, block = int(np.prod(wanted)), _size(parts, state, "blocksize")
    packed = parts.of("weight", ("uint8",)).reshape(-1)
    if packed.size != -(-count // 2):
        raise parts.wrong(f"weight has {packed.size} bytes, expected {-(-count // 2)} for the shape {list(wanted)}")
    table = wide(parts.of("weight.quant_map", ("float32",), (16,)))
    absmax = _absmax(parts, state, -(-count // block))
    numbers = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:count]
    return (table[numbers] * np.repeat(wide(absmax), block)[:count]).reshape(wanted)


def _absmax(parts: Parts, state: dict[str, Any], blocks: int) -> NDArray[np.float32]:
    """The largest magnitude of every block, float32."""
    if "weight.nested_absmax" not in parts:
        return parts.of("weight.absmax", ("float32",), (blocks,))
    codes, size = parts.of("weight.absmax", ("uint8",), (blocks,)), _size(parts, state, "nested_blocksize")
    outer = parts.of("weight.nested_absmax", ("float32",), (-(-blocks // size),))
    table = parts.of("weight.nested_quant_map", ("float32",), (256,))
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float):
        raise parts.wrong(f"its quant_state has the nested_offset {quote(offset)}, expected a number")
    return np.asarray(table[codes] * np.repeat(outer, size)[:blocks] + np.float32(offset), np.float32)


def _state(parts: Parts) -> dict[str, Any]:
    raw = parts[next((name for name in _STATES if name in parts), _STATES[0])]
    try:
        found = json.loads(raw.astype(np.uint8).tobytes().decode())
    except ValueError:
        found = None
    if not isinstance(found, dict) or "shape" not in found:
        raise parts.wrong("its quant_state is no JSON object with the shape of the weight")
    return found


def _size(parts: Parts, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or value < 1:
        raise parts.wrong(f"its quant_state has the {key} {quote(value)}, expected a number of 1 or more")
    return value
