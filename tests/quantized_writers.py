"""Writers of quantised weights, from their definitions and one number at a time: each makes random stored numbers of a
weight [out, in], and the weight that they stand for, in float64."""

import json
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The columns of eight in the order of a word's nibbles, the lowest first."""


@dataclass(frozen=True)
class Written:
    """config: quantization_config. parts: suffix -> stored tensor. value: the weight that they stand for."""

    config: dict[str, Any]
    parts: Arrays
    value: np.ndarray
    more: dict[str, Any] = field(default_factory=dict)


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned numbers as rows of int32 words: number i is at the bits [i * bits, (i + 1) * bits)."""
    rows = []
    for row in numbers.tolist():
        whole = sum(int(number) << (bits * i) for i, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return np.array(rows, np.uint32).view(np.int32)


def scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray:
    """Random scales, some of them zero."""
    found = (rng.uniform(0.5, 2, shape) * 2.0 ** rng.integers(-8, -3, shape)).astype(dtype)
    return np.where(rng.random(shape) < 0.1, 0, found).astype(dtype)


def gptq(rng: np.random.Generator, out: int, inputs: int, bits: int = 4, group: int = 32, act_order: bool = False,
         v2: bool = False) -> Written:  # fmt: skip
    length = inputs if group == -1 else group
    groups = -(-inputs // length)
    g = np.arange(inputs) // length
    g = rng.permutation(g) if act_order else g
    q = rng.integers(0, 2**bits, (inputs, out))
    z, s = rng.integers(0, 2**bits, (groups, out)), scales(rng, (groups, out))
    value = np.array([[float(s[g[i], o]) * (q[i, o] - z[g[i], o]) for i in range(inputs)] for o in range(out)])
    stored_z = z if v2 else (z - 1) % 2**bits
    parts = {"qweight": words(q.T, bits).T.copy(), "qzeros": words(stored_z, bits), "scales": s}
    if act_order:
        parts["g_idx"] = g.astype(np.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    return Written(config | ({"checkpoint_format": "gptq_v2"} if v2 else {}), parts, value)


def awq(rng: np.random.Generator, out: int, inputs: int, group: int = 32) -> Written:
    length = inputs if group == -1 else group
    groups = -(-inputs // length)
    q, z = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (groups, out))
    s = scales(rng, (groups, out))

    def packed(numbers: np.ndarray) -> np.ndarray:
        columns = [8 * (c // 8) + AWQ_COLUMNS[c % 8] for c in range(out)]
        return words(numbers[:, columns], 4)

    value = np.array(
        [[float(s[i // length, o]) * (q[i, o] - z[i // length, o]) for i in range(inputs)] for o in range(out)]
    )
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Written(config, {"qweight": packed(q), "qzeros": packed(z), "scales": s}, value)


def _compressed(form: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def packed_ints(rng: np.random.Generator, out: int, inputs: int, bits: int = 4, group: int = 32, zeros: bool = False,
                act_order: bool = False) -> Written:  # fmt: skip
    """compressed-tensors, pack-quantized; group 0: a scale per row."""
    groups = -(-inputs // group) if group else 1
    g = np.arange(inputs) // (group or inputs)
    g = rng.permutation(g) if act_order else g
    half = 2 ** (bits - 1)
    q, z = rng.integers(-half, half, (out, inputs)), rng.integers(-half, half, (out, groups))
    s = scales(rng, (out, groups), ml_dtypes.bfloat16)
    z = z if zeros else z * 0
    value = np.array([[float(s[o, g[i]]) * float(q[o, i] - z[o, g[i]]) for i in range(inputs)] for o in range(out)])
    shape = np.array([out, inputs], np.int64)
    parts = {"weight_packed": words(q + half, bits), "weight_scale": s, "weight_shape": shape}
    if zeros:
        parts["weight_zero_point"] = words((z + half).T, bits).T.copy()
    if act_order:
        parts["weight_g_idx"] = g.astype(np.int32)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return Written(_compressed("pack-quantized", bits, "int", **strategy), parts, value)


def plain_ints(rng: np.random.Generator, out: int, inputs: int) -> Written:
    q, s = rng.integers(-128, 128, (out, inputs)).astype(np.int8), scales(rng, (out, 1), ml_dtypes.bfloat16)
    value = np.array([[float(s[o, 0]) * int(q[o, i]) for i in range(inputs)] for o in range(out)])
    return Written(_compressed("int-quantized", 8, "int", "channel"), {"weight": q, "weight_scale": s}, value)


def _fp8(rng: np.random.Generator, out: int, inputs: int) -> np.ndarray:
    return np.asarray(rng.normal(size=(out, inputs)) * 100).astype(ml_dtypes.float8_e4m3fn)


def floats(rng: np.random.Generator, out: int, inputs: int, whole: bool = False) -> Written:
    """compressed-tensors, float-quantized: a scale per row, or of the whole tensor."""
    q, s = _fp8(rng, out, inputs), scales(rng, (1,) if whole else (out, 1), np.float32)
    value = np.array(
        [[float(s.reshape(-1)[0 if whole else o]) * float(q[o, i]) for i in range(inputs)] for o in range(out)]
    )
    strategy = "tensor" if whole else "channel"
    return Written(_compressed("float-quantized", 8, "float", strategy), {"weight": q, "weight_scale": s}, value)


def fp8_blocks(rng: np.random.Generator, out: int, inputs: int, block: tuple[int, int] = (16, 16)) -> Written:
    q = _fp8(rng, out, inputs)
    s = scales(rng, (-(-out // block[0]), -(-inputs // block[1])), np.float32)
    value = np.array(
        [[float(s[o // block[0], i // block[1]]) * float(q[o, i]) for i in range(inputs)] for o in range(out)]
    )
    config = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return Written(config, {"weight": q, "weight_scale_inv": s}, value)


def int8_rows(rng: np.random.Generator, out: int, inputs: int) -> Written:
    q, s = rng.integers(-127, 128, (out, inputs)).astype(np.int8), scales(rng, (out,), np.float32)
    one = float(np.float32(1 / 127))
    value = np.array([[int(q[o, i]) * float(s[o]) * one for i in range(inputs)] for o in range(out)])
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Written(config, {"weight": q, "SCB": s, "weight_format": np.array([0], np.uint8)}, value)


def four_bits(rng: np.random.Generator, out: int, inputs: int, nested: bool = False, block: int = 64) -> Written:
    count = out * inputs
    blocks, size = -(-count // block), 4
    table = np.sort(rng.normal(size=16)).astype(np.float32)
    q = rng.integers(0, 16, count).tolist()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [out, inputs]}
    parts: Arrays = {"weight.quant_map": table}
    if nested:
        codes, map_ = rng.integers(0, 256, blocks), rng.normal(size=256).astype(np.float32)
        outer, offset = scales(rng, (-(-blocks // size),), np.float32), 0.0371
        absmax = [np.float32(np.float32(map_[c] * outer[i // size]) + np.float32(offset)) for i, c in enumerate(codes)]
        parts |= {
            "weight.absmax": codes.astype(np.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": map_,
        }
        state |= {"nested_blocksize": size, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        absmax = list(scales(rng, (blocks,), np.float32))
        parts["weight.absmax"] = np.array(absmax, np.float32)
    value = np.array([float(table[number]) * float(absmax[i // block]) for i, number in enumerate(q)])
    pairs = [(q[i] << 4) | (q[i + 1] if i + 1 < count else 0) for i in range(0, count, 2)]
    parts["weight"] = np.array(pairs, np.uint8)[:, None]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = text
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Written(config, parts, value.reshape(out, inputs))


WRITERS = {
    "bitsandbytes 8 bits": int8_rows,
    "bitsandbytes nf4": four_bits,
    "bitsandbytes nf4 nested": lambda rng, out, inputs: four_bits(rng, out, inputs, nested=True),
    "gptq": gptq,
    "gptq whole columns": lambda rng, out, inputs: gptq(rng, out, inputs, group=-1),
    "gptq act-order": lambda rng, out, inputs: gptq(rng, out, inputs, act_order=True),
    "gptq 8 bits v2": lambda rng, out, inputs: gptq(rng, out, inputs, bits=8, v2=True),
    "gptq 3 bits": lambda rng, out, inputs: gptq(rng, out, inputs, bits=3),
    "gptq 2 bits, groups of 64": lambda rng, out, inputs: gptq(rng, out, inputs, bits=2, group=64),
    "awq": awq,
    "awq groups of 128": lambda rng, out, inputs: awq(rng, out, inputs, group=128),
    "awq whole columns": lambda rng, out, inputs: awq(rng, out, inputs, group=-1),
    "compressed int4": packed_ints,
    "compressed int4 zeros": lambda rng, out, inputs: packed_ints(rng, out, inputs, zeros=True),
    "compressed int4 act-order": lambda rng, out, inputs: packed_ints(rng, out, inputs, act_order=True),
    "compressed int8 rows": lambda rng, out, inputs: packed_ints(rng, out, inputs, bits=8, group=0),
    "compressed int8": plain_ints,
    "compressed fp8": floats,
    "compressed fp8 whole": lambda rng, out, inputs: floats(rng, out, inputs, whole=True),
    "fp8 blocks": fp8_blocks,
}
