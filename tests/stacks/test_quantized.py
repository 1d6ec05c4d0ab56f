"""Quantised weights against the libraries of their formats, on a CPU: what the library writes is read, and the value of
a page, rounded once to the dtype in which the library dequantises, is the library's to the bit. A million blocks each.

GPTQ has no writer that runs on a CPU: its page stands against a writer of its own in tests/storage/test_quantized.py.
"""

import importlib.util
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from harness import Checks
from quantized_writers import words

from refllm.storage.quantized import page_of
from refllm.storage.quantized.parts import Parts

CHECKS = Checks("quantized", (), ())
BLOCKS = 1_000_000
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def as_stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a checkpoint's array."""
    import ml_dtypes

    odd = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    tensor = tensor.detach().contiguous()
    if tensor.dtype not in odd:
        return tensor.numpy()
    carrier, dtype = odd[tensor.dtype]
    return tensor.view(carrier).numpy().view(dtype)


def must_be_equal(
    what: str, config: dict[str, Any], stored: dict[str, Any], library: torch.Tensor, blocks: int
) -> None:
    """Asserts that the page's value, rounded once to the library's dtype, has the library's bits."""
    page = page_of(config)
    parts = {name: as_stored(value) for name, value in stored.items()}
    value = page.dequantize(Parts(what, parts), page.settings(config))
    name = str(library.dtype).removeprefix("torch.")
    assert name == (page.DTYPE or "bfloat16")
    found = torch.from_numpy(rounded_once(value, name)).to(library.dtype)
    different = int((found != library).sum())
    assert different == 0, f"{what}: {different} of {library.numel()} differ"
    CHECKS.held.append(
        {
            "checkpoint": what,
            "family": page.TITLE,
            "dtype": name,
            "values": library.numel(),
            "inputs": [f"{blocks:,} blocks"],
            "sigma": 0.0,
        }
    )


def rounded_once(value: np.ndarray, dtype: str) -> np.ndarray:
    """float64 -> a float32 array on the grid of `dtype`, rounded once: on the way float32 is rounded to odd."""
    near = value.astype(np.float32)
    if dtype == "float32":
        return near
    bits = near.view(np.int32)
    toward_zero = np.where(np.abs(near.astype(np.float64)) > np.abs(value), bits - 1, bits)
    return np.where(near.astype(np.float64) == value, bits, toward_zero | 1).astype(np.int32).view(np.float32)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """[4000, 16000]: a million blocks of 64, zeros among them."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(4000, 16000, generator=generator) * 0.02
    found[7] = 0
    return found


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits(weight: torch.Tensor, kind: str, nested: bool) -> None:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    stored = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    library = functional.dequantize_4bit(packed, state)
    must_be_equal(f"{kind}{', nested' if nested else ''}", config, stored, library, weight.numel() // 64)


def test_bitsandbytes_in_8_bits() -> None:
    from bitsandbytes import functional

    weight = torch.randn(BLOCKS, 24, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[7] = 0
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    library = functional.int8_vectorwise_dequant(codes, scale)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    must_be_equal("int8 rows", config, {"weight": codes, "SCB": scale}, library, BLOCKS)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq(group: int) -> None:
    dequantize = _awq().dequantize_gemm
    inputs = 24 if group == -1 else 128
    length = inputs if group == -1 else group
    groups, out = inputs // length, 8 * -(-BLOCKS // 8 // (inputs // length))
    rng = np.random.default_rng(group + 1)
    q, z = rng.integers(0, 2**32, (inputs, out // 8), np.uint32), rng.integers(0, 2**32, (groups, out // 8), np.uint32)
    scale = torch.from_numpy(rng.uniform(0.001, 0.1, (groups, out)).astype(np.float16))
    stored = {"qweight": torch.from_numpy(q.view(np.int32)), "qzeros": torch.from_numpy(z.view(np.int32))}
    library = dequantize(stored["qweight"], stored["qzeros"], scale, 4, length).T
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    must_be_equal(f"groups of {length}", config, stored | {"scales": scale}, library, groups * out)


def _awq() -> ModuleType:
    """The file of AutoAWQ that packs and unpacks: the package itself imports what has nothing to do with it."""
    path = Path(str(distribution("autoawq").locate_file("awq/utils/packing_utils.py")))
    spec = importlib.util.spec_from_file_location("awq_packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


INTS = {
    "int4 groups of 32": (4, "group", 32, True),
    "int4 groups of 64": (4, "group", 64, True),
    "int4 groups of 128, zero points": (4, "group", 128, False),
    "int4 rows": (4, "channel", None, True),
    "int8 rows": (8, "channel", None, True),
}


@pytest.mark.parametrize("name", INTS)
def test_compressed_tensors_packed(name: str) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor

    bits, strategy, group, symmetric = INTS[name]
    length = group or 40
    inputs = 4 * length if group else 43  # ragged: no whole words
    groups = inputs // length if group else 1
    rows = -(-BLOCKS // groups)
    rng = torch.Generator().manual_seed(bits)
    scheme, config = _scheme("pack-quantized", bits, "int", strategy, group, symmetric)
    scale = (torch.rand(rows, groups, generator=rng) * 0.01 + 0.001).bfloat16()
    state = {"weight": torch.randn(rows, inputs, generator=rng).mul(0.02).bfloat16(), "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, (rows, groups), generator=rng).to(torch.int8)
    stored = Compressor.compress(state, scheme)
    library = Compressor.decompress(stored, scheme)["weight"]
    must_be_equal(name, config, stored, library, rows * groups)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_compressed_tensors_plain(kind: str) -> None:
    from compressed_tensors.compressors.naive_quantized import base

    compressor = {"int": base.IntQuantizationCompressor, "float": base.FloatQuantizationCompressor}[kind]
    rng = torch.Generator().manual_seed(3)
    scheme, config = _scheme(f"{kind}-quantized", 8, kind, "channel", None, True)
    scale = (torch.rand(BLOCKS, 1, generator=rng) * 0.01 + 0.001).bfloat16()
    stored = compressor.compress(
        {"weight": torch.randn(BLOCKS, 24, generator=rng).mul(0.02).bfloat16(), "weight_scale": scale}, scheme
    )
    library = compressor.decompress(stored, scheme)["weight"]
    must_be_equal(f"{'int8' if kind == 'int' else 'fp8'} rows as they are", config, stored, library, BLOCKS)


def _scheme(form: str, bits: int, kind: str, strategy: str, group: int | None, symmetric: bool) -> Any:
    """The library's scheme, and quantization_config of config.json."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how: dict[str, Any] = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    how |= {"group_size": group} if group else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**how))
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": how}}}
    return scheme, config


def test_fp8_blocks() -> None:
    """As Transformers dequantises them."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns, block = 8000, 2000, 4
    rng = torch.Generator().manual_seed(4)
    codes = (torch.randn(rows, columns, generator=rng) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(rows // block, columns // block, generator=rng) * 0.01
    library = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    config = {"quant_method": "fp8", "weight_block_size": [block, block]}
    must_be_equal("blocks", config, {"weight": codes, "weight_scale_inv": scale}, library, scale.numel())


def test_gptq_by_its_documented_layout() -> None:
    """A million groups of random words: float16 arithmetic, as the library's, of numbers unpacked by shifts."""
    rng = np.random.default_rng(5)
    inputs, out, group = 128, 250_000, 32
    q, z = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (inputs // group, out))
    scale = rng.uniform(0.001, 0.1, (inputs // group, out)).astype(np.float16)
    shifts = (4 * np.arange(8)).astype(np.uint64)
    packed = (q.reshape(-1, 8, out).astype(np.uint64) << shifts[None, :, None]).sum(axis=1).astype(np.uint32)
    zeros = (((z - 1) % 16).reshape(len(z), -1, 8).astype(np.uint64) << shifts).sum(axis=-1).astype(np.uint32)
    assert np.array_equal(zeros[0, :2].view(np.int32), words(((z - 1) % 16)[:1, :16], 4)[0])
    g = rng.permutation(np.arange(inputs) // group)
    library = torch.from_numpy(scale[g]) * torch.from_numpy((q - z[g]).astype(np.int32))
    stored = {
        "qweight": packed.view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": scale,
        "g_idx": g.astype(np.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True}
    tensors = {name: torch.from_numpy(value) for name, value in stored.items()}
    must_be_equal("4 bits, act-order", config, tensors, library.T, (inputs // group) * out)
