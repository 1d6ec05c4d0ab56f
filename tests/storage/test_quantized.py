"""Quantised checkpoints: every format's page against a writer that makes its stored numbers one at a time
(tests/quantized_writers.py), as a weight and as a model; and that a wrong field is a sentence. Against the formats' own
libraries: tests/stacks/test_quantized.py."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantized_writers
from quantized_writers import WRITERS, Written
from safetensors.numpy import save_file
from tiny import tiny_model

import refllm
from refllm.commands.info import describe
from refllm.errors import CheckpointError, ConfigError
from refllm.storage.quantized import open_checkpoint, page_of
from refllm.storage.quantized.parts import Parts, unpacked


def dequantized(written: Written) -> np.ndarray:
    page = page_of(written.config)
    parts, settings = Parts("a weight", written.parts), page.settings(written.config)
    value: np.ndarray = page.dequantize(parts, settings)
    assert page.shape(parts, settings) == value.shape
    return value


@pytest.mark.parametrize("name", WRITERS)
def test_a_weight_is_what_its_format_says(name: str) -> None:
    """Groups that do not divide the row, short last blocks, scales of zero: the exact value, and float64."""
    ragged = "gptq" not in name and "awq" not in name
    for seed, (out, inputs) in enumerate([(32, 64), (16, 96), *([(17, 43)] if ragged else [(32, 224)])]):
        written = WRITERS[name](np.random.default_rng(seed), out, inputs)
        found = dequantized(written)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, written.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_come_out_of_words_along_either_axis(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (5, 64))
    packed = quantized_writers.words(numbers, bits)
    np.testing.assert_array_equal(unpacked(packed, bits, axis=1)[:, :64], numbers)
    np.testing.assert_array_equal(unpacked(packed.T.copy(), bits, axis=0)[:64], numbers.T)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("plain")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "tie_word_embeddings": False}
    model = tiny_model("LlamaForCausalLM", **sizes, attention_bias=False, mlp_bias=False)
    model.save_pretrained(folder, dtype="float32")
    return folder, dict(model.weights.renamed("model."))


def write_quantized(plain: tuple[Path, dict[str, np.ndarray]], folder: Path, name: str) -> dict[str, np.ndarray]:
    """A checkpoint whose layers' matrices are quantised; returns what all weights stand for."""
    source, weights = plain
    tensors, values, config = {}, {}, json.loads((source / "config.json").read_text())
    rng = np.random.default_rng(0)
    for tensor, value in weights.items():
        if value.ndim == 2 and "layers" in tensor:
            written = WRITERS[name](rng, *value.shape)
            config["quantization_config"] = written.config
            tensors |= {f"{tensor.removesuffix('weight')}{part}": array for part, array in written.parts.items()}
            values[tensor] = written.value
        else:
            tensors[tensor] = values[tensor] = np.asarray(value, np.float32)
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("name", WRITERS)
def test_a_quantised_checkpoint_loads_as_what_it_stands_for(name: str, plain: Any, tmp_path: Path) -> None:
    values = write_quantized(plain, tmp_path / "q", name)
    for low_memory in (False, True):
        loaded = refllm.load(tmp_path / "q", dtype="float64", low_memory=low_memory)
        found = loaded.weights.renamed("model.")
        assert set(found) == set(values)
        assert not loaded.weights.report.unexpected
        for tensor, value in values.items():
            np.testing.assert_array_equal(found[tensor], value)
    logits = loaded(input_ids=np.array([[1, 5, 7]])).logits
    narrow = refllm.load(tmp_path / "q", dtype="float32")
    narrow.save_pretrained(tmp_path / "saved")  # what is saved of it is not quantised, and says so
    again = refllm.load(tmp_path / "saved", dtype="float64")
    np.testing.assert_allclose(again(input_ids=np.array([[1, 5, 7]])).logits, logits, rtol=1e-4, atol=1e-4)


def test_info_says_how_weights_are_quantised(plain: Any, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path / "q", "gptq")
    info = describe(tmp_path / "q")
    assert info.quantized == "GPTQ, bits 4, group_size 32: 14 of 21 tensors"
    assert not info.findings
    assert not info.unexpected
    assert info.stored is not None
    assert info.stored["model.layers.0.self_attn.q_proj.weight"] == ("GPTQ", (32, 32))


def test_weights_of_a_check_may_be_a_quantised_checkpoint(plain: Any, tmp_path: Path) -> None:
    from refllm.check.weights import Given

    values = write_quantized(plain, tmp_path / "q", "fp8 blocks")
    model = Given.open(tmp_path / "q").in_place_of(refllm.load(plain[0], dtype="float64"))
    assert len(values) == len(model.weights)
    for tensor, value in values.items():
        np.testing.assert_array_equal(model.weights[tensor.removeprefix("model.")], value)


WRONG = {
    "method": ("gptq", {"quant_method": "squeeze"}, {}, "quant_method is 'squeeze'; refllm reads bitsandbytes, gptq"),
    "bits": ("gptq", {"bits": 5}, {}, "bits is 5; refllm reads 2, 3, 4, 8"),
    "group size": ("gptq", {"group_size": 0}, {}, "group_size is 0, expected a number of 1 or more, or -1"),
    "version": ("awq", {"version": "gemv"}, {}, "version is 'gemv'; refllm reads gemm, GEMM"),
    "format": ("compressed int4", {"format": "marlin-24"}, {}, "format is 'marlin-24'; refllm reads pack-quantized"),
    "groups": ("compressed int4", {"config_groups": {}}, {}, "config_groups names no group of layers"),
    "block": ("fp8 blocks", {"weight_block_size": [0, 1]}, {}, r"weight_block_size is \[0, 1\], expected two numbers"),
    "no zeros": ("gptq", {}, {"qzeros": None}, "it has no 'qzeros', which its format needs"),
    "zeros": ("awq", {}, {"qzeros": np.zeros((2, 3), np.int32)}, r"qzeros has shape \[2, 3\], expected \[2, 4\]"),
    "scales": ("gptq", {}, {"scales": np.zeros((2, 32), np.int32)}, "scales is stored as int32, expected float32"),
    "g_idx": ("gptq", {}, {"g_idx": np.full(64, 9, np.int32)}, "g_idx names group 9 of 2"),
    "tiles": ("bitsandbytes 8 bits", {}, {"weight_format": np.array([1], np.uint8)}, "a layout of tiles"),
    "SCB": ("bitsandbytes 8 bits", {}, {"SCB": np.ones(3, np.float32)}, r"SCB has shape \[3\], expected \[32\]"),
    "state": (
        "bitsandbytes nf4",
        {},
        {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)},
        "its quant_state is no JSON object",
    ),
    "packed": ("bitsandbytes nf4", {}, {"weight": np.zeros((3, 1), np.uint8)}, "weight has 3 bytes, expected 1024"),
    "scale": (
        "compressed int8",
        {},
        {"weight_scale": np.ones((32, 5), ml_dtypes.bfloat16)},
        r"weight_scale has shape \[32, 5\], expected \[32, 1\]",
    ),
    "inverse": (
        "fp8 blocks",
        {},
        {"weight_scale_inv": np.ones((9, 9), np.float32)},
        r"weight_scale_inv has shape \[9, 9\], expected \[2, 4\]",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_field_is_a_sentence(fault: str) -> None:
    name, config, parts, said = WRONG[fault]
    written = WRITERS[name](np.random.default_rng(0), 32, 64)
    given = {part: array for part, array in {**written.parts, **parts}.items() if array is not None}
    with pytest.raises(CheckpointError, match=said):
        dequantized(Written({**written.config, **config}, given, written.value))


def test_a_config_of_another_format_is_refused_with_the_formats_that_there_are(plain: Any, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path / "q", "gptq")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config.json: quantization_config: quant_method is 'hqq'; refllm reads"):
        refllm.load(tmp_path / "q")


def test_a_checkpoint_without_quantised_weights_is_the_plain_one(plain: Any) -> None:
    with open_checkpoint(plain[0]) as checkpoint:
        assert type(checkpoint).__name__ == "Checkpoint"
