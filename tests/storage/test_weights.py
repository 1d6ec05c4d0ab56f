"""Weights: the pages read the numbers that Transformers reads, and a report says what did not fit."""

import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from refllm.errors import CheckpointError
from refllm.precision import rounding
from refllm.storage import fresh_tensors
from refllm.storage import weights as weights_module
from refllm.storage.checkpoint import Checkpoint, save_checkpoint
from refllm.storage.fresh_tensors import fresh_tensor
from refllm.storage.load_report import LoadReport, file_name, find_prefix
from refllm.storage.weights import Weights, fresh_weights, identity, init_weights, keeps_grid, load_weights

DTYPES = ("float64", "float32", "float16", "bfloat16")
SMALL = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Helium": {"head_dim": 4, "attention_bias": True, "mlp_bias": True},
    "Llama": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "StableLm": {"use_qkv_bias": True, "qk_layernorm": True},
    "Arcee": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
}
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
CLASSES = [
    family + head for family in FAMILIES for head in HEADS if hasattr(transformers, family + head) or family == "Arcee"
]
ROOTS = ("embed_tokens.", "layers.", "norm.")


def witness(name: str, **changes: Any) -> Any:
    """A random Transformers model, every tensor of it random: a bias that is zero could hide anywhere."""
    family = next(family for family in FAMILIES if name.startswith(family))
    config = getattr(transformers, family + "Config")(**{**SMALL, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def page_name(name: str) -> str:
    for prefix in ("model.", "transformer."):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {
        page_name(name): tensor.detach().to(torch.float64).numpy()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors_of(model).items()}


def write(folder: Path, arrays: dict[str, np.ndarray], dtype: str = "float32") -> Checkpoint:
    save_checkpoint(folder, arrays, dtype)
    return Checkpoint.open(folder)


def quietly(checkpoint: Checkpoint, expected: dict[str, Any], **options: Any) -> Weights:
    """Load, and fail on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_weights(checkpoint, expected, **options)


def same(weights: Weights, expected: dict[str, np.ndarray]) -> None:
    assert set(weights) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)
        assert weights[name].flags.c_contiguous


# --- against Transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("low_memory", [False, True])
def test_checkpoint_of_every_class_loads_equal(tmp_path: Path, name: str, low_memory: bool) -> None:
    model = witness(name)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    weights = quietly(Checkpoint.open(tmp_path), shapes_of(model), low_memory=low_memory)
    same(weights, tensors_of(model))
    assert weights.low_memory is low_memory
    assert weights.report == LoadReport()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("max_shard_bytes", [3000, 10**9])
def test_transformers_loads_what_we_write(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    model = witness(name).to(torch.bfloat16)
    weights = Weights(shapes_of(model), {n: a.astype(np.float32) for n, a in tensors_of(model).items()})
    prefix = {"Model": "", "ForQuestionAnswering": "transformer."}
    renamed = weights.renamed(next((p for head, p in prefix.items() if name.endswith(head)), "model."))
    if name == "LlamaForQuestionAnswering" or name == "ArceeForQuestionAnswering":
        assert "transformer.norm.weight" in renamed
    save_checkpoint(tmp_path, renamed, "bfloat16", max_shard_bytes=max_shard_bytes)
    model.config.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype="bfloat16", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (key, ours), (_, theirs) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("low_memory", [False, True])
def test_numbers_are_rounded_as_torch_rounds_them(tmp_path: Path, stored: str, wanted: str, low_memory: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-30, 10, (300, 7), generator=generator)
    values = (torch.randn(300, 7, generator=generator, dtype=torch.float64) * 2.0**exponents).to(getattr(torch, stored))
    save_file({"model.norm.weight": values}, tmp_path / "model.safetensors")
    expected = values.to(getattr(torch, wanted)).double().numpy()
    for round in {rounding(wanted), None if wanted == "float64" else rounding(wanted)}:
        weights = quietly(Checkpoint.open(tmp_path), {"norm.weight": (300, 7)}, round=round, low_memory=low_memory)
        assert weights["norm.weight"].dtype == (np.float64 if wanted == "float64" else np.float32)
        np.testing.assert_array_equal(weights["norm.weight"], expected)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_rounding_is_skipped_where_the_stored_numbers_are_on_the_grid(stored: str, wanted: str) -> None:
    coarser = {("bfloat16", "bfloat16"), ("float16", "float16")}
    assert keeps_grid(rounding(wanted), stored) == (wanted == "float32" or (stored, wanted) in coarser)


def test_stored_bfloat16_asked_for_as_bfloat16_is_not_rounded_again(tmp_path: Path) -> None:
    calls = []

    def round(values: np.ndarray) -> np.ndarray:
        calls.append(values.size)
        return rounding("bfloat16")(values)

    checkpoint = write(tmp_path, {"norm.weight": np.ones(12345)}, "bfloat16")
    quietly(checkpoint, {"norm.weight": (12345,)}, round=round)
    assert 12345 not in calls


# --- across classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("source", HEADS)
def test_backbone_loads_across_classes(tmp_path: Path, source: str, target: str) -> None:
    written, wanted = witness("Arcee" + source), witness("Arcee" + target)
    written.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = load_weights(Checkpoint.open(tmp_path), shapes_of(wanted), seed=7)
    for name, array in tensors_of(written).items():
        if name.startswith(ROOTS):
            np.testing.assert_array_equal(weights[name], array, err_msg=name)
    given = {name for name in tensors_of(written) if not name.startswith(ROOTS)}
    needed = {name for name in tensors_of(wanted) if not name.startswith(ROOTS)}
    # A score.weight of either classification head fits the other one.
    assert set(weights.report.fresh) == set(weights.report.missing) == needed - given
    assert set(weights.report.unexpected) == given - needed
    said = " / ".join(str(warning.message) for warning in caught)
    assert all(f"'{name}'" in said for name in given ^ needed)
    assert len(caught) == bool(needed - given) + bool(given - needed)
    for name in weights.report.fresh:
        np.testing.assert_array_equal(weights[name], fresh_tensor(name, shapes_of(wanted)[name], 0.02, 7))


def test_transformers_does_not_load_a_causal_lm_backbone_into_question_answering(tmp_path: Path) -> None:
    """The deviation that the module docstring states: if this fails, Transformers has changed, and so may the text."""
    witness("ArceeForCausalLM").save_pretrained(tmp_path)
    _, info = transformers.ArceeForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert any("norm.weight" in key for key in info["missing_keys"])


def test_heads_are_fresh_from_the_seed_and_kept_in_low_memory_mode(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"norm.weight": np.ones(4)})
    expected = {"norm.weight": (4,), "score.weight": (3, 4)}
    with pytest.warns(UserWarning, match=r"initialised at random, so train them: 1 tensor: 'score.weight'"):
        first = load_weights(checkpoint, expected, seed=3, initializer_range=0.5)
    with pytest.warns(UserWarning, match="initialised at random"):
        low = load_weights(checkpoint, expected, seed=3, initializer_range=0.5, low_memory=True, round=None)
    assert low["score.weight"] is low["score.weight"]
    assert low["score.weight"].dtype == np.float64
    np.testing.assert_array_equal(low["score.weight"], first["score.weight"])
    assert 0.1 < first["score.weight"].std() < 1.0


# --- tied weights ----------------------------------------------------------------------------------------------------

TIED = {"lm_head.weight": "embed_tokens.weight"}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", [family + "ForCausalLM" for family in FAMILIES])
def test_tied_head_is_the_embedding(tmp_path: Path, name: str, low_memory: bool) -> None:
    model = witness(name, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    weights = quietly(Checkpoint.open(tmp_path), shapes_of(model), tied=TIED, low_memory=low_memory)
    same(weights, tensors_of(model))
    assert "lm_head.weight" in weights
    assert "lm_head.weight" not in list(weights)
    np.testing.assert_array_equal(weights["lm_head.weight"], weights["embed_tokens.weight"])
    assert low_memory or weights["lm_head.weight"] is weights["embed_tokens.weight"]
    assert "lm_head.weight" not in weights.renamed("model.")


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kept", ["embedding", "head", "both", "both different"])
def test_file_may_hold_either_or_both_of_a_tied_pair_as_in_transformers(
    tmp_path: Path, kept: str, low_memory: bool
) -> None:
    model = witness("LlamaForCausalLM", tie_word_embeddings=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kept == "both different":
        tensors["lm_head.weight"] += 1
    if kept == "embedding":
        del tensors["lm_head.weight"]
    if kept == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = shapes_of(model)
    assert "lm_head.weight" not in expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = load_weights(Checkpoint.open(tmp_path), expected, tied=TIED, low_memory=low_memory)
    assert [str(warning.message).split(": ")[1][:34] for warning in caught] == (
        ["the config ties lm_head.weight to "] if kept == "both different" else []
    )
    for name in ("embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(weights[name], theirs[file_name(name, "model.")].numpy())
    assert set(weights) == set(expected) | ({"lm_head.weight"} if kept == "both different" else set())
    assert dict(weights.tied) == ({} if kept == "both different" else TIED)
    assert not weights.report.missing
    assert not weights.report.unexpected


def test_tied_pair_without_either_is_missing(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"model.norm.weight": np.ones(4)})
    with pytest.raises(CheckpointError, match=r"missing 1 tensor: 'model.embed_tokens.weight'$"):
        load_weights(checkpoint, {"embed_tokens.weight": (5, 4), "norm.weight": (4,)}, tied=TIED)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_missing_backbone_tensors_are_listed(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"model.norm.weight": np.ones(4)})
    expected = {"norm.weight": (4,), **{f"layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(9)}}
    with pytest.raises(CheckpointError) as caught:
        load_weights(checkpoint, expected)
    listed = ", ".join(f"'model.layers.{i}.mlp.up_proj.weight'" for i in range(5))
    assert str(caught.value) == f"{tmp_path}: missing 9 tensors: {listed}, ..."


def test_wrong_shape_says_expected_and_found(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"norm.weight": np.ones((2, 3)), "lm_head.weight": np.ones(3)})
    with pytest.raises(CheckpointError) as caught:
        load_weights(checkpoint, {"norm.weight": (3, 2), "lm_head.weight": (4,)})
    assert str(caught.value) == (
        f"{tmp_path}: wrong shape of 2 tensors: 'norm.weight' (expected [3, 2], found [2, 3]), "
        "'lm_head.weight' (expected [4], found [3])"
    )


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool])
def test_dtype_that_is_no_weight_is_refused_where_it_is_used(tmp_path: Path, dtype: Any, low_memory: bool) -> None:
    tensors = {"model.norm.weight": torch.ones(4), "model.layers.0.bad": torch.ones(4).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.bad' is stored as .*, expected one of float64"):
        load_weights(checkpoint, {"norm.weight": (4,), "layers.0.bad": (4,)}, low_memory=low_memory)
    with pytest.warns(UserWarning, match="not used by this model: 1 tensor: 'model.layers.0.bad'"):
        load_weights(checkpoint, {"norm.weight": (4,)}, low_memory=low_memory)


def test_unexpected_tensors_are_listed_and_inv_freq_is_not(tmp_path: Path) -> None:
    arrays = {"model.norm.weight": np.ones(4), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}
    quietly(write(tmp_path, arrays), {"norm.weight": (4,)})
    checkpoint = write(tmp_path, arrays | {f"odd\n{i}": np.ones(1) for i in range(7)})
    with pytest.warns(UserWarning, match="not used") as caught:
        weights = load_weights(checkpoint, {"norm.weight": (4,)})
    listed = r", ".join(rf"'odd\n{i}'" for i in range(5))
    assert [str(w.message) for w in caught] == [f"{tmp_path}: not used by this model: 7 tensors: {listed}, ..."]
    assert weights.report.unexpected == [f"odd\n{i}" for i in range(7)]


def test_layernorm_biases_may_be_left_out_together_but_not_in_part(tmp_path: Path) -> None:
    expected = {f"layers.{i}.input_layernorm.{part}": (4,) for i in range(2) for part in ("weight", "bias")}
    biases = {name for name in expected if name.endswith("bias")}
    full = {"model." + name: np.full(4, 2.0) for name in expected}
    without = {name: array for name, array in full.items() if name.endswith("weight")}
    weights = quietly(write(tmp_path, without), expected, optional_zero=biases)
    assert set(weights.report.zeroed) == {"model." + name for name in biases}
    assert all(not weights[name].any() for name in biases)
    same(quietly(write(tmp_path, full), expected, optional_zero=biases), {name: np.full(4, 2.0) for name in expected})
    del full["model.layers.1.input_layernorm.bias"]
    with pytest.raises(CheckpointError, match=r"missing 1 tensor: 'model.layers.1.input_layernorm.bias'"):
        load_weights(write(tmp_path, full), expected, optional_zero=biases)
    with pytest.raises(CheckpointError, match="missing 2 tensors"):
        load_weights(write(tmp_path, without), expected)


def test_two_prefixes_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    for pair in (("model.norm.weight", "norm.weight"), ("transformer.norm.weight", "model.layers.0.x")):
        with pytest.raises(CheckpointError, match="have different prefixes, expected one"):
            load_weights(write(tmp_path, {name: np.ones(4) for name in pair}), {"norm.weight": (4,)})


@given(st.lists(st.text(alphabet="modelyrsnt.0", max_size=12), max_size=6))
@settings(max_examples=200)
def test_any_names_have_a_prefix_or_are_refused(names: list[str]) -> None:
    try:
        prefix = find_prefix(names)
    except CheckpointError:
        return
    assert prefix in ("model.", "transformer.", "")
    assert file_name("norm.weight", prefix) == prefix + "norm.weight"
    assert file_name("score.weight", prefix) == "score.weight"


@pytest.mark.parametrize("threads", [1, 3])
def test_nan_and_infinity_are_counted_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(weights_module, "TASK", 64)
    values = np.ones((100, 4))
    values[3, 1], values[50, 2], values[99, 3] = np.nan, np.inf, -np.inf
    checkpoint = write(tmp_path, {"model.norm.weight": values, "model.layers.0.w": np.ones(4)})
    expected = {"norm.weight": (100, 4), "layers.0.w": (4,)}
    with pytest.warns(UserWarning, match=r"NaN or infinite numbers in 1 tensor: 'model.norm.weight' \(3\)"):
        weights = load_weights(checkpoint, expected, threads=threads)
    assert weights.report.nonfinite == {"model.norm.weight": 3}
    np.testing.assert_array_equal(weights["norm.weight"], values)

    low = quietly(checkpoint, expected, threads=threads, low_memory=True)
    with pytest.warns(UserWarning, match="3 NaN or infinite numbers in tensor 'model.norm.weight'") as caught:
        np.testing.assert_array_equal(low["norm.weight"], values)
    assert len(caught) == 1
    assert low.report.nonfinite == {"model.norm.weight": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(low["norm.weight"], values)
        assert low.layer(0)["w"].shape == (4,)
    again = quietly(checkpoint, expected, threads=threads, low_memory=True)
    with pytest.warns(UserWarning, match="1 NaN or infinite"):
        again.rows("norm.weight", np.array([3, 4]))


def test_overflow_of_the_emulated_dtype_is_counted(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"norm.weight": np.array([1.0, 1e6])}, "bfloat16")
    with pytest.warns(UserWarning, match=r"NaN or infinite numbers in 1 tensor: 'norm.weight' \(1\)"):
        load_weights(checkpoint, {"norm.weight": (2,)}, round=rounding("float16"))


# --- access ----------------------------------------------------------------------------------------------------------

EXPECTED = {
    "embed_tokens.weight": (50, 8),
    "layers.0.mlp.up_proj.weight": (12, 8),
    "layers.1.mlp.up_proj.weight": (12, 8),
    "layers.10.mlp.up_proj.weight": (12, 8),
    "layers.1.empty": (0, 8),
    "layers.1.scalar": (),
    "norm.weight": (8,),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("weights")
    generator = np.random.default_rng(0)
    arrays = {name: np.asarray(generator.standard_normal(shape)) for name, shape in EXPECTED.items()}
    save_checkpoint(folder, {"model." + name: array for name, array in arrays.items()}, "float32")
    return folder, {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("task", [1, 7, 8, 1 << 20])
@pytest.mark.parametrize("low_memory", [False, True])
def test_every_way_in_gives_the_same_numbers_every_time(
    written: Any, monkeypatch: pytest.MonkeyPatch, low_memory: bool, task: int, threads: int
) -> None:
    monkeypatch.setattr(weights_module, "TASK", task)
    folder, arrays = written
    weights = quietly(Checkpoint.open(folder), EXPECTED, low_memory=low_memory, threads=threads)
    ids = np.array([[0, 49, 3], [3, 3, 17]])
    for _ in range(3):
        same(weights, arrays)
        assert set(weights.layer(1)) == {"mlp.up_proj.weight", "empty", "scalar"}
        for layer in (0, 1, 10):
            name = f"layers.{layer}.mlp.up_proj.weight"
            np.testing.assert_array_equal(weights.layer(layer)["mlp.up_proj.weight"], arrays[name])
        np.testing.assert_array_equal(weights.rows("embed_tokens.weight", ids), arrays["embed_tokens.weight"][ids])
        for rows in (1, 7, 50, 1000):
            chunks = list(weights.chunks("embed_tokens.weight", rows))
            assert {len(chunk) for chunk in chunks[:-1]} <= {rows}
            np.testing.assert_array_equal(np.concatenate(chunks), arrays["embed_tokens.weight"])
    assert weights.shapes == EXPECTED
    with pytest.raises(KeyError):
        weights["lm_head.weight"]
    with pytest.raises(KeyError):
        weights.layer(2)["mlp.up_proj.weight"]


def test_full_weights_are_the_same_array_at_every_access(written: Any) -> None:
    weights = quietly(Checkpoint.open(written[0]), EXPECTED)
    assert weights.layer(0)["mlp.up_proj.weight"] is weights["layers.0.mlp.up_proj.weight"]
    assert weights.layer(0) is weights.layer(0)
    assert np.shares_memory(next(weights.chunks("embed_tokens.weight", 3)), weights["embed_tokens.weight"])


def test_tensor_larger_than_all_blocks_is_converted_whole(tmp_path: Path) -> None:
    """Real block sizes: a tensor of more than two tasks, whose last block is odd."""
    values = np.arange(2 * weights_module.TASK + 12345, dtype=np.float32) % 256
    checkpoint = write(tmp_path, {"norm.weight": values}, "bfloat16")
    for round in (identity, None):
        weights = quietly(checkpoint, {"norm.weight": values.shape}, round=round, threads=2)
        np.testing.assert_array_equal(weights["norm.weight"], values)


def test_progress_rises_to_the_bytes_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "TASK", 100)
    checkpoint = write(tmp_path, {"norm.weight": np.ones(1050), "model": np.ones(9)}, "bfloat16")
    calls: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.get_ident())

    with pytest.warns(UserWarning, match="not used"):
        load_weights(checkpoint, {"norm.weight": (1050,)}, progress=progress, threads=3)
    assert calls == [(min(200 * i, 2100), 2100) for i in range(1, 12)]
    assert threads == {threading.get_ident()}


def test_failing_rounding_is_raised_and_not_swallowed(written: Any) -> None:
    def round(values: np.ndarray) -> np.ndarray:
        if values.size == 400:
            raise ZeroDivisionError
        return values + np.float32(1)

    with pytest.raises(ZeroDivisionError):
        load_weights(Checkpoint.open(written[0]), EXPECTED, round=round, threads=2)


# --- fresh weights ---------------------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(initializer_range=0.05, pad_token_id=3)


@pytest.mark.parametrize("name", CLASSES)
def test_fresh_weights_follow_transformers(name: str) -> None:
    """Which tensors are zeros, which are ones, and which are normal with what deviation."""
    family = next(family for family in FAMILIES if name.startswith(family))
    sizes = {"hidden_size": 64, "vocab_size": 400, "intermediate_size": 96}
    if family == "Helium":
        sizes["head_dim"] = 16
    values = {**SMALL, **FAMILIES[family], **sizes, "initializer_range": 0.05}
    torch.manual_seed(0)
    theirs = tensors_of(getattr(transformers, name)(getattr(transformers, family + "Config")(**values)))
    ours = init_weights({key: array.shape for key, array in theirs.items()}, CONFIG, seed=5)
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        assert ours[key].dtype == np.float32
        if array.std() == 0:
            np.testing.assert_array_equal(ours[key], array, err_msg=key)
        else:
            spread = 5 / np.sqrt(2 * array.size)  # five standard deviations of a sample's deviation
            assert abs(ours[key].std() / 0.05 - 1) < spread + 0.005, key
            assert abs(ours[key].mean()) < 5 * 0.05 / np.sqrt(array.size), key
    assert not ours["embed_tokens.weight"][3].any()
    assert not theirs["embed_tokens.weight"][3].any()


def test_fresh_tensors_depend_on_seed_and_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_tensors, "TASK", 16)
    full = fresh_weights(EXPECTED, CONFIG, 1)
    part = fresh_weights({"norm.weight": (8,), "embed_tokens.weight": (50, 8)}, CONFIG, 1, low_memory=True)
    for _ in range(2):
        np.testing.assert_array_equal(part["embed_tokens.weight"], full["embed_tokens.weight"])
    np.testing.assert_array_equal(part.rows("embed_tokens.weight", np.array([4])), full["embed_tokens.weight"][[4]])
    np.testing.assert_array_equal(next(part.chunks("embed_tokens.weight", 5)), full["embed_tokens.weight"][:5])
    other = fresh_weights(EXPECTED, CONFIG, 2)
    assert not np.array_equal(other["layers.0.mlp.up_proj.weight"], full["layers.0.mlp.up_proj.weight"])
    assert not np.array_equal(full["layers.1.mlp.up_proj.weight"], full["layers.0.mlp.up_proj.weight"])
    blocks = full["embed_tokens.weight"].reshape(-1, 16)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


def test_fresh_weights_are_on_the_grid_and_exact_ones_are_the_float32_values() -> None:
    plain = fresh_weights(EXPECTED, CONFIG, 1)
    exact = fresh_weights(EXPECTED, CONFIG, 1, round=None)
    half = fresh_weights(EXPECTED, CONFIG, 1, round=rounding("bfloat16"))
    for name in EXPECTED:
        assert exact[name].dtype == np.float64
        np.testing.assert_array_equal(exact[name], plain[name])
        np.testing.assert_array_equal(half[name], rounding("bfloat16")(plain[name]))


@pytest.mark.parametrize("pad", [None, 0, -1])
def test_padding_row_is_zero(pad: int | None) -> None:
    table = fresh_tensor("embed_tokens.weight", (7, 4), 0.02, 0, pad)
    assert [row for row in range(7) if not table[row].any()] == ([] if pad is None else [pad % 7])


def test_fresh_weights_stream_to_a_checkpoint(tmp_path: Path) -> None:
    weights = fresh_weights(EXPECTED, CONFIG, 1, low_memory=True)
    save_checkpoint(tmp_path, weights.renamed("model."), "float32", max_shard_bytes=500)
    same(quietly(Checkpoint.open(tmp_path), EXPECTED), dict(fresh_weights(EXPECTED, CONFIG, 1)))
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == len(EXPECTED)


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
from types import SimpleNamespace
from refllm.storage.checkpoint import Checkpoint, save_checkpoint
from refllm.storage.weights import fresh_weights, load_weights

LAYERS, SHAPE = 24, (2048, 1024)
EXPECTED = {f"layers.{i}.mlp.up_proj.weight": SHAPE for i in range(LAYERS)}
FLOAT32 = LAYERS * SHAPE[0] * SHAPE[1] * 4

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

folder, action = sys.argv[1:]
anonymous, resident = status("RssAnon"), status("VmRSS")
if action == "write":
    config = SimpleNamespace(initializer_range=0.02, pad_token_id=None)
    save_checkpoint(folder, fresh_weights(EXPECTED, config, low_memory=True).renamed("model."), "bfloat16")
elif action == "load":
    weights = load_weights(Checkpoint.open(folder), EXPECTED, threads=2)
    assert status("RssAnon") - anonymous >= FLOAT32
elif action == "stream":
    weights = load_weights(Checkpoint.open(folder), EXPECTED, threads=2, low_memory=True)
    anonymous_peak = 0
    for i in range(LAYERS):
        array = weights.layer(i)["mlp.up_proj.weight"]
        for block in weights.chunks(f"layers.{i}.mlp.up_proj.weight", 500):
            anonymous_peak = max(anonymous_peak, status("RssAnon") - anonymous)
    print(anonymous_peak)
print((status("VmHWM") - resident) / FLOAT32)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc/self/status")
def test_loading_100_mb_takes_the_float32_weights_and_streaming_takes_one_tensor(tmp_path: Path) -> None:
    """100 MB of bfloat16 in tensors of 8 MiB float32. The peaks are of all resident memory, file pages included."""

    def measure(action: str) -> list[float]:
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), action], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return [float(line) for line in result.stdout.split()]

    assert measure("write")[0] < 0.25
    assert (tmp_path / "model.safetensors").stat().st_size > 100e6
    assert measure("load")[0] < 1.1
    anonymous, peak = measure("stream")
    assert anonymous < 25e6
    assert peak < 0.25
