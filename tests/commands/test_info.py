"""`refllm info`: published parameter counts from the published configs, and what differs from the files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_configs import PARAMETER_COUNTS, PUBLISHED_CONFIGS

from refllm.commands.info import describe, expected_shapes
from refllm.errors import CheckpointError, ConfigError, RefllmError
from refllm.storage.checkpoint import save_checkpoint


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.filterwarnings("ignore:.*factor=20")
@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_published_config_gives_published_parameter_count(name: str, tmp_path: Path) -> None:
    info = describe(write_config(tmp_path, PUBLISHED_CONFIGS[name]))
    assert info.parameters == PARAMETER_COUNTS[name] == sum(info.groups.values())
    assert info.stored is None
    assert not info.findings


def test_cache_of_a_token_is_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    config = write_config(tmp_path, PUBLISHED_CONFIGS["stabilityai/stablelm-2-12b"])
    assert describe(config).cache_numbers_per_token == 2 * 40 * 8 * 160


TINY = {
    "model_type": "stablelm",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_checkpoint(
    folder: Path, values: dict[str, Any], edit: Any = lambda tensors: None, head: str = "causal_lm"
) -> None:
    from refllm.config import AutoConfig

    write_config(folder, values)
    shapes = expected_shapes(AutoConfig.from_pretrained(folder), head)
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    edit(tensors)
    save_checkpoint(folder, tensors, dtype="bfloat16")


def test_complete_checkpoint_has_no_findings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    info = describe(tmp_path)
    assert info.stored is not None
    assert {dtype for dtype, _ in info.stored.values()} == {"bfloat16"}
    assert (info.findings, info.unexpected) == ([], [])


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("StableLmModel", "base"),
        ("StableLmForSequenceClassification", "sequence_classification"),
        ("StableLmForTokenClassification", "token_classification"),
    ],
)
def test_head_follows_from_architectures(architecture: str, head: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY | {"architectures": [architecture]}, head=head)
    info = describe(tmp_path)
    assert info.head == head
    assert (info.findings, info.unexpected) == ([], [])


def test_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    tied = TINY | {"tie_word_embeddings": True}
    write_checkpoint(tmp_path, tied)
    assert (describe(tmp_path).findings, describe(tmp_path).unexpected) == ([], [])
    write_checkpoint(tmp_path, tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert (describe(tmp_path).findings, describe(tmp_path).unexpected) == ([], [])


def test_layer_norm_biases_may_be_absent_all_together(tmp_path: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if "norm.bias" in name]:
            del tensors[name]

    write_checkpoint(tmp_path, TINY, drop)
    assert describe(tmp_path).findings == []


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.surplus"] = np.zeros(3, dtype=np.float32)
        tensors["model.norm.weight"] = np.zeros(15, dtype=np.float32)

    write_checkpoint(tmp_path, TINY, edit)
    info = describe(tmp_path)
    assert info.findings == [
        "missing: model.layers.1.mlp.up_proj.weight",
        "wrong shape: model.norm.weight is [15], expected [16]",
    ]
    assert info.unexpected == ["model.layers.7.surplus"]


def test_unreadable_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        describe(tmp_path)
    write_config(tmp_path, TINY)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError):
        describe(tmp_path)
    with pytest.raises(RefllmError, match="architectures"):
        describe(write_config(tmp_path, TINY | {"architectures": ["StableLmForImages"]}))
