"""Configs: every spelling is read, every illegal value is refused by name, and Transformers reads what we write."""

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from published_configs import FILE_BYTES, PUBLISHED_CONFIGS

from refllm import ops
from refllm.config import (
    ACTIVATIONS,
    CONFIG_CLASSES,
    GENERATION_KEYS,
    ArceeConfig,
    AutoConfig,
    HeliumConfig,
    LlamaConfig,
    ModelConfig,
    StableLmConfig,
    published,
)
from refllm.config.rope_parameters import ROPE_TYPES
from refllm.config.traits import TRAITS
from refllm.errors import ConfigError
from refllm.forward.rotary import RotaryEmbedding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HF_CLASSES = {name: getattr(transformers, f"{traits.class_prefix}Config") for name, traits in TRAITS.items()}
FAMILIES = sorted(CONFIG_CLASSES)
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(family: str, /, **changes: Any) -> dict[str, Any]:
    """A small valid config.json of the family, head size 8; a change to `...` removes the key."""
    values = SMALL | {"model_type": family} | ({"head_dim": 8} if family == "helium" else {}) | changes
    return {key: value for key, value in values.items() if value is not ...}


def assert_same_attributes(ours: ModelConfig, theirs: Any) -> None:
    """Every field that the family has in Transformers holds the same value there."""
    theirs.standardize_rope_params()  # as its models do: a top-level original length enters rope_parameters only now
    for field in dataclasses.fields(ours):
        if field.name in ("extra", "generation_defaults", "classifier_dropout"):
            continue
        value, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "dtype" and expected is not None:
            expected = str(expected).removeprefix("torch.")
        if field.name == "rope_parameters":
            expected = {key: item for key, item in expected.items() if key != "type"}
        assert value == expected, field.name
    assert ours.num_labels == theirs.num_labels
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads


# ---------------------------------------------------------------------- defaults and published files


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    ours, theirs = CONFIG_CLASSES[family](), HF_CLASSES[family]()
    assert_same_attributes(ours, theirs)
    assert_same_attributes(CONFIG_CLASSES[family].from_dict(theirs.to_dict()), theirs)
    inherited = {"architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version"}
    names = {f.name for f in dataclasses.fields(theirs)} - {
        f.name for f in dataclasses.fields(transformers.PreTrainedConfig)
    }
    assert names | inherited - {"transformers_version"} <= {f.name for f in dataclasses.fields(ours)} | {
        "pretraining_tp"
    }


def test_name_lists_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    generation = transformers.GenerationConfig._get_default_generation_params()
    assert set(ACTIVATIONS) == set(ACT2FN) - {"prelu", "xielu"} == set(ops.ACTIVATIONS)
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS}
    assert set(GENERATION_KEYS) == set(generation) - {"use_cache"}


@pytest.mark.parametrize("name", published.MODELS)
def test_the_sizes_that_benchmarks_use_are_those_of_the_published_files(name: str) -> None:
    cls, sizes = published.MODELS[name]
    owners = {repository.rpartition("/")[2]: config for repository, config in PUBLISHED_CONFIGS.items()}
    file = owners["Austral-AFM-SFT" if name == "afm-4.5b" else name]
    assert file["architectures"] == [cls]
    assert {key: file[key] for key in sizes} == sizes


@pytest.mark.parametrize("repository", PUBLISHED_CONFIGS)
def test_published_config_loads_and_equals_transformers(repository: str, tmp_path: Path) -> None:
    values = PUBLISHED_CONFIGS[repository]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    assert_same_attributes(config, transformers.AutoConfig.from_pretrained(tmp_path))
    assert config.unknown_keys == (("is_llama_config", "rope_interleaved") if "SmolLM" in repository else ())
    assert config.rotary_dim % 2 == 0


@pytest.mark.parametrize("repository", FILE_BYTES)
def test_published_config_has_the_size_of_the_file(repository: str) -> None:
    assert len(json.dumps(PUBLISHED_CONFIGS[repository], indent=2, sort_keys=True)) + 1 == FILE_BYTES[repository]


def test_rotary_dims_of_published_configs() -> None:
    def rotary(name: str) -> tuple[int, int]:
        config = AutoConfig.from_dict(PUBLISHED_CONFIGS[name])
        return config.head_dim, config.rotary_dim

    assert rotary("kyutai/helium-1-preview-2b") == (128, 128)
    assert rotary("stabilityai/stablelm-zephyr-3b") == (80, 20)
    assert rotary("stabilityai/stablelm-2-1_6b") == (64, 16)
    assert rotary("stabilityai/stablelm-2-12b") == (160, 40)


# ---------------------------------------------------------------------- illegal values

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ANY = ("helium", "llama", "stablelm", "arcee")
FULL = ("helium", "llama", "arcee")  # families that rotate all dims of a head
DERIVED = ("llama", "arcee")  # families with a head_dim and null defaults

# families, changes to `small`, what the sentence must name
ILLEGAL: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    # divisibility
    (ANY, {"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3"),
    (("llama", "stablelm", "arcee"), {"hidden_size": 34}, "hidden_size=34"),
    (("llama", "arcee"), {"hidden_size": 34, "head_dim": 8}, "hidden_size=34"),
    (("helium",), {"head_dim": 6}, "head_dim=6"),
    (("helium",), {"hidden_size": 40}, "hidden_size=40"),
    # null where it is not allowed
    (("helium",), {"head_dim": None}, "head_dim=null"),
    (("helium", "stablelm"), {"num_key_value_heads": None}, "num_key_value_heads=null"),
    *[(ANY, {name: None}, f"{name}=null") for name in ("vocab_size", "hidden_size", "num_hidden_layers", "use_cache")],
    # sizes
    *[(ANY, {"num_attention_heads": bad}, "num_attention_heads") for bad in (0, -4, 4.5, "4", True, [4], {}, 2**40)],
    *[(ANY, {"vocab_size": bad}, "vocab_size") for bad in (0, 1.5, True, float("nan"), float("inf"), 10**400)],
    (ANY, {"vocab_size": 10**5000}, "vocab_size=an integer of thousands of digits"),
    (ANY, {"max_position_embeddings": 0}, "max_position_embeddings=0"),
    (ANY, {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    # floats, flags, names
    *[(FULL, {"rms_norm_eps": bad}, "rms_norm_eps") for bad in (-1e-5, None, "1e-5", True, float("nan"), [1])],
    (("stablelm",), {"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0"),
    (ANY, {"initializer_range": -0.1}, "initializer_range=-0.1"),
    (("llama",), {"initializer_range": 1.5}, "initializer_range=1.5"),
    *[(ANY, {"attention_dropout": bad}, "attention_dropout") for bad in (1.5, -0.1, "0")],
    (("stablelm",), {"hidden_dropout": 2.0}, "hidden_dropout=2.0"),
    (ANY, {"classifier_dropout": 2}, "classifier_dropout=2"),
    *[(ANY, {"tie_word_embeddings": bad}, "tie_word_embeddings") for bad in (2, "true", None, [], 0.0)],
    (("stablelm",), {"qk_layernorm": "yes"}, "qk_layernorm='yes'"),
    *[(ANY, {"hidden_act": bad}, "hidden_act") for bad in ("swiglu", "prelu", "xielu", "", None, 3, ["silu"])],
    *[
        (ANY, {key: bad}, key)
        for key in ("dtype", "torch_dtype")
        for bad in ("int8", "auto", "torch.", 16, ["float32"])
    ],
    (ANY, {"architectures": "LlamaForCausalLM"}, "architectures"),
    (ANY, {"architectures": [1]}, "architectures[0]=1"),
    # tokens
    (ANY, {"pad_token_id": 32}, "pad_token_id=32"),
    (ANY, {"pad_token_id": -33}, "pad_token_id=-33"),
    (ANY, {"pad_token_id": "0"}, "pad_token_id='0'"),
    (ANY, {"bos_token_id": [1]}, "bos_token_id=[1]"),
    (ANY, {"eos_token_id": [1, None]}, "eos_token_id[1]=null"),
    (ANY, {"eos_token_id": 1.5}, "eos_token_id=1.5"),
    # labels
    (ANY, {"problem_type": "single_label_classification", "num_labels": 1}, "problem_type=single_label"),
    (ANY, {"problem_type": "ranking"}, "problem_type='ranking'"),
    *[(ANY, {"num_labels": bad}, "num_labels") for bad in (0, -1, "2", 2.5, 2**30)],
    *[(ANY, {"id2label": bad}, "id2label") for bad in ({}, [], {"a": "x"}, {"0": 1}, {"-1": "x"}, "LABEL_0")],
    *[(ANY, {"label2id": bad}, "label2id") for bad in ([], {"a": "x"}, {"a": 1.5}, {"a": True})],
    # rope
    *[(ANY, {key: "yarn"}, key) for key in ("rope_parameters", "rope_scaling")],
    (ANY, {"rope_scaling": [1]}, "rope_scaling=[1]"),
    (ANY, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    (ANY, {"rope_scaling": {"type": "linear", "nested": {}}}, "rope_parameters"),
    *[
        (ANY, {"rope_parameters": {"rope_type": bad}}, "rope_type")
        for bad in ("su", "Linear", "", None, 1, ["default"])
    ],
    (ANY, {"rope_scaling": {"type": None}}, "rope_type=null"),
    *[(ANY, {"rope_theta": bad}, "rope_theta") for bad in (0, -1.0, None, "1e4", float("inf"), 10**400, 1e39)],
    (ANY, {"rope_parameters": {"rope_theta": None}, "rope_theta": 1e4}, "rope_theta=null"),
    *[(ANY, {"rope_scaling": {"type": kind}}, "factor") for kind in ("linear", "dynamic", "yarn", "llama3")],
    *[(ANY, {"rope_scaling": {"type": kind, "factor": None}}, "factor=null") for kind in ("linear", "dynamic")],
    *[(ANY, {"rope_scaling": {"type": "linear", "factor": bad}}, "factor") for bad in (0, -2.0, "2", True, [2])],
    (FULL, {"rope_parameters": {"rope_type": "proportional", "factor": None}}, "factor=null"),
    (
        FULL,
        {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 1.5}},
        "partial_rotary_factor=1.5",
    ),
    *[
        (ANY, {"rope_parameters": LLAMA3 | {key: bad}}, key)
        for key in ("low_freq_factor", "factor")
        for bad in (None, 0)
    ],
    (ANY, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
    (ANY, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
    (ANY, {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
    *[
        (ANY, {"rope_parameters": YARN | {"original_max_position_embeddings": bad}}, "original_max")
        for bad in (None, 0, 1.5)
    ],
    (ANY, {"rope_parameters": YARN, "original_max_position_embeddings": None}, "original_max_position_embeddings=null"),
    (ANY, {"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope_theta=1"),
    *[(ANY, {"rope_parameters": YARN | {"beta_fast": bad}}, "beta_fast") for bad in (-1, "32", True)],
    *[(ANY, {"rope_parameters": YARN | {"truncate": bad}}, "truncate") for bad in (None, 2, "no")],
    *[(ANY, {"rope_parameters": YARN | {"attention_factor": bad}}, "attention_factor") for bad in ("1", float("nan"))],
    *[(ANY, {"rope_parameters": YARN | {"mscale_all_dim": bad}}, f"mscale_all_dim={bad}") for bad in (-10.0, -0.5)],
    (FULL, {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "long_factor"),
    (FULL, {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 4}}, "short_factor"),
    *[
        (FULL, {"rope_parameters": LONGROPE | {"long_factor": bad}}, "long_factor")
        for bad in ([1.0] * 3, None, 2.0, [0] * 4)
    ],
    (FULL, {"rope_parameters": LONGROPE | {"short_factor": [1.0, 1.0, "1", 1.0]}}, "short_factor[2]='1'"),
    (
        FULL,
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1}},
        "original_max_position_embeddings=1",
    ),
    (("helium",), {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 1}, "rotary dimension is 1"),
    (DERIVED, {"head_dim": 7}, "rotary dimension is 7"),
    (DERIVED, {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "must not be 2"),
    *[
        (FULL, {"partial_rotary_factor": 0.5, "rope_parameters": rope}, "partial_rotary_factor=0.5")
        for rope in (
            YARN,
            LLAMA3,
            LONGROPE,
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
        )
    ],
    *[
        (("stablelm",), {"partial_rotary_factor": bad}, "partial_rotary_factor")
        for bad in (None, 1.5, -0.5, "0.5", True)
    ],
    (("stablelm",), {"rope_parameters": {"partial_rotary_factor": None}}, "partial_rotary_factor=null"),
    (("stablelm",), {"partial_rotary_factor": 0.125}, "rotary dimension is 1"),
    (("stablelm",), {"partial_rotary_factor": 0.4}, "rotary dimension is 3"),
    (("stablelm",), {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "must not be 2"),
    (("stablelm",), {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    # keys that would change the mathematics
    (("stablelm",), {"head_dim": 16}, "head_dim=16"),
    *[(ANY, {"sliding_window": bad}, "sliding_window") for bad in (4, 0, False)],
    (ANY, {"attention_chunk_size": 4}, "attention_chunk_size=4"),
    (ANY, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (ANY, {"layer_types": "full_attention"}, "layer_types"),
    (ANY, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    (ANY, {"is_causal": False}, "is_causal=false"),
    (ANY, {"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    (ANY, {"is_encoder_decoder": True}, "is_encoder_decoder=true"),
    (ANY, {"text_config": {"model_type": "llama"}}, "text_config"),
    (ANY, {"token_classification_bias": False}, "token_classification_bias=false"),
    (ANY, {"tie_last_hidden_states": False}, "tie_last_hidden_states=false"),
    (ANY, {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    (ANY, {"kv_sharing_modes": ["reuse", "none"]}, "kv_sharing_modes"),
    (ANY, {"model_type": "gpt2"}, "model_type='gpt2'"),
    (ANY, {"mystery": json.loads("[" * 300 + "]" * 300)}, "mystery is nested deeper"),
    (ANY, {"eos_token_id": json.loads('{"a":' * 300 + "1" + "}" * 300)}, "eos_token_id is nested deeper"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_illegal_value_gives_one_sentence_that_names_it(family: str) -> None:
    illegal = [(changes, names) for families, changes, names in ILLEGAL if family in families]
    assert len(illegal) > 100
    for changes, names in illegal:
        try:
            CONFIG_CLASSES[family].from_dict(small(family, **changes))
            message = "it is taken"
        except ConfigError as error:
            message = str(error)
        assert message.startswith("config.json: "), changes
        assert names in message, changes
        assert "\n" not in message, changes
        assert 20 < len(message) < 400, changes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_config_itself_is_legal(family: str) -> None:
    CONFIG_CLASSES[family].from_dict(small(family))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "valid JSON"),
        ("{", "valid JSON"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "valid JSON"),
        ("[" * 100_000, "valid JSON"),
        ("{}", "model_type is missing"),
        ('{"model_type": "stablelm_epoch"}', "stablelm_epoch"),
        ('{"model_type": null}', "helium, llama, stablelm, arcee"),
        ('{"model_type": ["llama"]}', "helium, llama, stablelm, arcee"),
    ],
)
def test_unreadable_config_file_gives_one_sentence(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert names in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_config_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.json in this folder"):
        AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid JSON"):
        AutoConfig.from_pretrained(tmp_path)


# ---------------------------------------------------------------------- what is read, and how


@pytest.mark.parametrize(
    ("given_as", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope_scaling": None, "rope_parameters": None}, {"rope_type": "default"}),
        ({"rope_scaling": {}, "rope_theta": 7}, {"rope_type": "default", "rope_theta": 7}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 3.0}, "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 3.0}),
        (
            {
                "rope_parameters": {"rope_theta": 3.0, "rope_type": "llama3"},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            {"rope_type": "linear", "factor": 2},
        ),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, {"rope_type": "default"}),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 16},
            YARN | {"original_max_position_embeddings": 16},
        ),
        (
            {"rope_parameters": YARN | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": 16},
            YARN | {"original_max_position_embeddings": 16},
        ),
        ({"rope_parameters": dict(LLAMA3)}, LLAMA3 | {"original_max_position_embeddings": 64}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rope_spelling_gives_the_dict_of_transformers(
    family: str, given_as: dict[str, Any], expected: dict[str, Any]
) -> None:
    values = small(family, **given_as)
    before = json.dumps(values)
    ours = CONFIG_CLASSES[family].from_dict(values)
    assert json.dumps(values) == before, "the caller's dict was modified"
    theirs = HF_CLASSES[family].from_dict(json.loads(before))
    assert_same_attributes(ours, theirs)
    family_part = {"partial_rotary_factor": 0.25} if family == "stablelm" else {}
    theta = {"helium": 100000.0}.get(family, 10000.0)
    assert ours.rope_parameters == {"rope_theta": theta} | family_part | expected


@pytest.mark.parametrize(
    ("key", "spelled", "value"),
    [
        ("hidden_size", 32.0, 32),
        ("max_position_embeddings", np.int64(64), 64),
        ("initializer_range", 1, 1.0),
        ("attention_dropout", 0, 0.0),
        ("attention_dropout", None, 0.0),
        ("use_cache", 0, False),
        ("tie_word_embeddings", np.bool_(True), True),
        ("eos_token_id", (1, 2.0), [1, 2]),
        ("pad_token_id", -1, -1),
        ("dtype", "torch.bfloat16", "bfloat16"),
        ("dtype", torch.float16, "float16"),
        ("torch_dtype", "half", "float16"),
        ("head_dim", 8.0, 8),
    ],
)
def test_lossless_conversions_are_made(key: str, spelled: Any, value: Any) -> None:
    config = LlamaConfig.from_dict(small("llama", **{key: spelled}))
    read = getattr(config, key.removeprefix("torch_"))
    assert read == value
    assert type(read) is type(value)


def test_dtype_wins_over_torch_dtype() -> None:
    assert LlamaConfig(dtype="float16", torch_dtype="bfloat16").dtype == "float16"
    assert LlamaConfig(dtype=None, torch_dtype="bfloat16").dtype == "bfloat16"


def test_unknown_keys_are_kept_reported_and_written_back() -> None:
    config = LlamaConfig.from_dict(
        small("llama", rope_pct=0.25, mystery=[1], temperature=0.7, rope_scaling=YARN | {"x": 1})
    )
    assert config.mystery == [1]
    assert config.unused_keys == ("mystery", "rope_pct", "rope_parameters.x")
    assert config.unknown_keys == ("mystery", "rope_parameters.x")
    assert config.generation_defaults == {"temperature": 0.7}
    written = config.to_dict()
    assert (written["mystery"], written["rope_pct"], written["temperature"]) == ([1], 0.25, 0.7)
    with pytest.raises(AttributeError, match="no attribute 'enigma'"):
        _ = config.enigma


def test_a_key_may_be_named_like_an_attribute_of_the_class() -> None:
    keys = {"extra": 1, "generation_defaults": [2], "to_dict": 3, "rotary_dim": 4, "model": {"model_type": "x"}}
    config = LlamaConfig.from_dict(small("llama", **keys))
    assert {key: config.to_dict()[key] for key in keys} == keys
    assert config.rotary_dim == 8
    assert config.unknown_keys == tuple(sorted(keys))


def test_copies_and_replacements_are_configs() -> None:
    config = StableLmConfig.from_dict(small("stablelm", num_labels=3))
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config, num_hidden_layers=7).num_hidden_layers == 7
    with pytest.raises(ConfigError, match="num_key_value_heads=3"):
        dataclasses.replace(config, num_key_value_heads=3)


def test_partial_factor_without_effect_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"partial_rotary_factor=0.5 has no effect"):
        config = HeliumConfig.from_dict(small("helium", partial_rotary_factor=0.5))
    assert config.rotary_dim == 8
    assert config.unused_keys == ("rope_parameters.partial_rotary_factor",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 32}, "eos_token_id=32 is outside the vocabulary"),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, "num_labels=3 replaces id2label"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 of rope_type linear is below 1"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 8}}, "factor=4.0 is used, although"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast=0.5 is below beta_slow=1"),
        ({"rope_scaling": YARN | {"beta_slow": 32.5}}, "beta_fast=32 is below beta_slow=32.5"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor=-1.0 is negative"),
    ],
)
def test_doubtful_value_is_accepted_with_a_warning(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        ours = LlamaConfig.from_dict(small("llama", **changes))
    assert_same_attributes(ours, transformers.LlamaConfig.from_dict(json.loads(json.dumps(small("llama", **changes)))))


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"num_labels": 5},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"id2label": {"0": "no", "1": "yes", "2": "?"}},
        {"label2id": {"no": 0}},
        {"num_labels": 1, "problem_type": "regression"},
    ],
)
def test_labels_are_those_of_transformers(labels: dict[str, Any]) -> None:
    ours = LlamaConfig.from_dict(small("llama", **labels))
    theirs = transformers.LlamaConfig.from_dict(small("llama", **labels))
    assert_same_attributes(ours, theirs)
    assert LlamaConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


def test_num_labels_can_be_set() -> None:
    config = LlamaConfig()
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_constructor_takes_the_keywords_of_transformers_and_names_the_class_in_errors() -> None:
    assert LlamaConfig(rope_theta=5e5, num_labels=3).rope_parameters["rope_theta"] == 5e5
    with pytest.raises(ConfigError, match=r"^StableLmConfig: hidden_size=0 must be"):
        StableLmConfig(hidden_size=0)
    with pytest.raises(ConfigError, match=r"^config\.json: model_type='llama', but ArceeConfig reads 'arcee'"):
        ArceeConfig.from_dict(small("llama"))


def test_from_pretrained_overrides_replace_keys_of_the_file(tmp_path: Path) -> None:
    LlamaConfig.from_dict(small("llama")).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, num_labels=4).num_labels == 4
    assert isinstance(AutoConfig.for_model("stablelm", hidden_size=64), StableLmConfig)
    with pytest.raises(ConfigError, match="must be one of helium, llama, stablelm, arcee"):
        AutoConfig.for_model("mistral")


# ---------------------------------------------------------------------- drawn configs, both ways


@st.composite
def rope_keys(draw: st.DrawFn, family: str, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Rotary settings in any spelling that both libraries accept."""
    rope_type = draw(st.sampled_from(ROPE_TYPES))
    number = st.floats(1, 64) | st.integers(1, 64)
    own: dict[str, Any] = {}
    partial = draw(st.sampled_from([0.25, 0.5, 1.0])) if family == "stablelm" else 1.0
    rotary = int(head_dim * partial)
    if (rope_type == "dynamic" and rotary == 2) or rotary % 2 or (rope_type == "proportional" and family == "stablelm"):
        rope_type = "default"
    if rope_type != "default":
        own["factor"] = draw(number)
    if rope_type == "proportional":
        own["partial_rotary_factor"] = draw(st.floats(0, 1))
    if rope_type == "llama3":
        own |= {"low_freq_factor": draw(st.floats(0.1, 2)), "high_freq_factor": draw(st.floats(2.5, 8))}
    if rope_type == "yarn":
        options = {
            "beta_fast": number,
            "mscale": st.floats(0, 2),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.1, 2),
        }
        own |= {key: draw(values) for key, values in options.items() if draw(st.booleans())}
    if rope_type == "longrope":
        own |= {
            key: draw(st.lists(st.floats(0.5, 9), min_size=rotary // 2, max_size=rotary // 2))
            for key in ("short_factor", "long_factor")
        }
    top: dict[str, Any] = {}
    if rope_type in ("llama3", "yarn", "longrope") and draw(st.booleans()):
        place = draw(st.sampled_from([top, own]))
        place["original_max_position_embeddings"] = draw(st.integers(2, max_positions))
    if draw(st.booleans()):
        draw(st.sampled_from([top, own]))["rope_theta"] = draw(st.floats(2, 1e7) | st.integers(2, 10**7))
    if family == "stablelm" and rotary % 2 == 0:
        draw(st.sampled_from([top, own]))["partial_rotary_factor"] = partial
    own[draw(st.sampled_from(["rope_type", "type"]))] = rope_type
    return top | {draw(st.sampled_from(["rope_parameters", "rope_scaling"])): own}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config.json with the value types that Transformers insists on."""
    family = draw(st.sampled_from(FAMILIES))
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 12))
    heads = kv_heads * group
    head_dim = head_dim * 4 if family == "stablelm" else head_dim
    max_positions, vocab = draw(st.integers(4, 5000)), draw(st.integers(1, 200000))
    token = st.none() | st.integers(0, vocab - 1)
    values: dict[str, Any] = {
        "model_type": family,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "vocab_size": vocab,
        "pad_token_id": draw(token),
    }
    if family == "helium" or (family != "stablelm" and draw(st.booleans())):
        values["head_dim"] = head_dim if family == "helium" else 2 * draw(st.integers(3, 20))
    values |= draw(rope_keys(family, values.get("head_dim", head_dim), max_positions))
    eps = "layer_norm_eps" if family == "stablelm" else "rms_norm_eps"
    flags = (
        ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")
        if family == "stablelm"
        else ("attention_bias", "mlp_bias")
    )
    optional: dict[str, st.SearchStrategy[Any]] = {
        "intermediate_size": st.integers(1, 999),
        "num_hidden_layers": st.integers(1, 99),
        "hidden_act": st.sampled_from(ACTIVATIONS),
        "initializer_range": st.floats(0, 1),
        "attention_dropout": st.floats(0, 1) | st.just(0),
        eps: st.floats(0, 1),
        "eos_token_id": token | st.lists(st.integers(0, vocab - 1), max_size=3),
        "bos_token_id": token,
        "architectures": st.none() | st.lists(st.text(max_size=5), max_size=2),
        "problem_type": st.none() | st.just("regression"),
        "num_labels": st.integers(1, 9),
        "temperature": st.floats(0.1, 2),
        "some_key": st.text(max_size=3),
        "pretraining_tp": st.just(1),
    }
    for name in ("use_cache", "tie_word_embeddings", *flags):
        optional[name] = st.booleans()
    optional[draw(st.sampled_from(["dtype", "torch_dtype"]))] = st.sampled_from(
        ["float32", "bfloat16", "float16", "float64"]
    )
    return values | {key: draw(strategy) for key, strategy in optional.items() if draw(st.booleans())}


@settings(max_examples=examples(100, 200))
@given(values=configs())
def test_config_is_read_alike_and_round_trips_through_both_libraries(values: dict[str, Any]) -> None:
    family = values["model_type"]
    ours, theirs = AutoConfig.from_dict(values), HF_CLASSES[family].from_dict(json.loads(json.dumps(values)))
    assert_same_attributes(ours, theirs)
    written = json.loads(json.dumps(ours.to_dict()))
    assert AutoConfig.from_dict(written) == ours
    assert_same_attributes(ours, HF_CLASSES[family].from_dict(written))
    assert_same_attributes(AutoConfig.from_dict(json.loads(theirs.to_json_string())), theirs)
    assert_same_attributes(AutoConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_files_are_read_by_the_other_library(family: str, tmp_path: Path) -> None:
    ours = CONFIG_CLASSES[family].from_dict(small(family, rope_scaling=YARN, torch_dtype="bfloat16", num_labels=3))
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert_same_attributes(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoConfig.from_pretrained(tmp_path / "theirs")
    assert_same_attributes(again, theirs)
    assert {key: value for key, value in again.to_dict().items() if key in ours.to_dict()} == ours.to_dict()


# ---------------------------------------------------------------------- fuzz

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 130) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
NUMBERS = st.floats(0, 64) | st.integers(-1, 64)
FACTORS = st.lists(st.floats(0.5, 2), min_size=4, max_size=4)
ROPE_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "factor": NUMBERS | st.none(),
    "rope_theta": st.floats(0, 1e9) | st.integers(0, 10**6),
    "partial_rotary_factor": st.sampled_from([0, 0.25, 0.5, 1, 1.0]),
    "original_max_position_embeddings": st.integers(0, 100),
    "attention_factor": NUMBERS,
    "beta_fast": NUMBERS | st.none(),
    "beta_slow": NUMBERS | st.none(),
    "mscale": NUMBERS,
    "mscale_all_dim": NUMBERS,
    "truncate": st.booleans() | st.integers(-1, 2),
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "low_freq_factor": NUMBERS,
    "high_freq_factor": NUMBERS,
}
REQUIRED = {"longrope": ("short_factor", "long_factor"), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
PLAUSIBLE = st.sampled_from(["silu", "relu2", "bfloat16", 0, 1, 2, 4, 8, 0.0, 0.25, 1.0, 4.0, 1e-5, True]) | FACTORS


@st.composite
def rope_dicts(draw: st.DrawFn) -> dict[str, Any]:
    """Rotary settings that are often legal: a type, what it needs, a few more keys, and here and there any JSON."""
    rope_type = draw(st.sampled_from(ROPE_TYPES))
    keys = {*REQUIRED.get(rope_type, ("factor",)), *draw(st.lists(st.sampled_from(sorted(ROPE_VALUES)), max_size=3))}
    values = {key: draw(ROPE_VALUES[key]) for key in sorted(keys)}
    values |= {"rope_type": rope_type} if draw(st.booleans()) else {"type": rope_type}
    if draw(st.integers(0, 9)) == 0:
        values[draw(st.sampled_from(sorted(values)))] = draw(ANY_JSON)
    return values


KNOWN_KEYS = sorted(
    {f.name for cls in CONFIG_CLASSES.values() for f in dataclasses.fields(cls)}
    | {"head_dim", "torch_dtype", "num_labels", "rope_scaling", "rope_theta", "partial_rotary_factor", "sliding_window"}
    | {"original_max_position_embeddings", "layer_types", "quantization_config", "temperature", "use_norm_bias"}
)
FUZZ = st.dictionaries(
    st.sampled_from(KNOWN_KEYS) | st.text(max_size=8), PLAUSIBLE | ANY_JSON | rope_dicts(), max_size=3
)


def is_valid(config: ModelConfig) -> bool:
    """What every accepted config promises: usable shapes, and finite rotary tables where they are not huge."""
    promises = [
        config.num_attention_heads % config.num_key_value_heads == 0,
        config.rotary_dim % 2 == 0 and 0 <= config.rotary_dim <= config.head_dim,
        config.num_labels >= 1,
    ]
    if config.head_dim <= 256:
        rotary = RotaryEmbedding(config, exact=True)
        for length in (1, min(config.max_position_embeddings + 3, 100)):
            cos, sin = rotary.tables(np.arange(length)[None])
            promises += [cos.shape == (1, length, config.rotary_dim // 2), bool(np.isfinite([cos, sin]).all())]
    return all(promises)


def read(values: dict[str, Any]) -> tuple[ModelConfig | None, str]:
    """The config, or None and the sentence that says why there is none. Any other exception is a failure."""
    try:
        return AutoConfig.from_dict(values), ""
    except ConfigError as error:
        return None, str(error)


@settings(max_examples=examples(500, 2500))
@given(family=st.sampled_from(FAMILIES), changes=FUZZ, rope=st.none() | rope_dicts(), data=st.data())
def test_any_json_gives_a_valid_config_or_a_config_error(
    family: str, changes: dict[str, Any], rope: dict[str, Any] | None, data: st.DataObject
) -> None:
    values = small(family, **changes)
    if rope is not None:
        values[data.draw(st.sampled_from(["rope_parameters", "rope_scaling"]))] = rope
    config, message = read(values)
    if config is None:
        assert "\n" not in message
        assert message.startswith("config.json: ")
        assert len(message) < 600
        return
    assert is_valid(config)
    text = json.dumps(config.to_dict(), sort_keys=True)
    assert json.dumps(AutoConfig.from_dict(json.loads(text)).to_dict(), sort_keys=True) == text


@settings(max_examples=examples(150, 300))
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.dictionaries(st.sampled_from(KNOWN_KEYS), PLAUSIBLE, max_size=3),
    rope=rope_dicts(),
)
def test_what_is_written_after_any_input_is_read_by_transformers(
    family: str, changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    config, _ = read(small(family, **{"rope_parameters": rope} | changes))
    if config is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_attributes(config, HF_CLASSES[family].from_dict(json.loads(json.dumps(config.to_dict()))))


@settings(max_examples=examples(150, 300))
@given(text=st.text(max_size=40) | ANY_JSON.map(json.dumps), cut=st.integers(0, 200))
def test_any_text_as_config_file_is_a_config_error_or_a_config(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    for content in (text, json.dumps(small("arcee"))[:cut] + text):
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
        try:
            config = AutoConfig.from_pretrained(path)
        except ConfigError:
            continue
        assert is_valid(config)


def test_infinite_numbers_in_inert_keys_do_not_matter() -> None:
    assert math.isinf(LlamaConfig.from_dict(small("llama", x=float("inf"))).x)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_key_of_rope_settings_that_is_no_text_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} has the key 7, which must be a string"):
        LlamaConfig(**{name: {7: "default", "rope_theta": 1e4}})
