"""A model_type without a page hears which family is nearest, and what differs; nothing is called exact that is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from refllm.config import AutoConfig, LlamaConfig
from refllm.config.config import read_as
from refllm.config.nearest import PAGES, compared_with, nearest
from refllm.errors import ConfigError

LLAMA = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """The whole config.json of a type, as Transformers writes it."""
    config: dict[str, Any] = transformers.AutoConfig.for_model(model_type, **changes).to_dict()
    return config


def names(*suffixes: str) -> list[str]:
    return [f"model.layers.{i}.{suffix}" for i in range(2) for suffix in suffixes]


@pytest.mark.parametrize(
    ("model_type", "family", "said"),
    [
        ("mistral", "llama", ["sliding_window=4096 with max_position_embeddings=131072"]),
        ("qwen2", "llama", ["q, k and v have biases, o has none"]),
        ("qwen3", "llama", ["q and k are normed before the rotation"]),
        ("gemma", "llama", ["1 + its weight", "sqrt(hidden_size)"]),
        ("gemma2", "llama", ["1 + its weight", "normed before and after", "attn_logit_softcapping=50.0"]),
        ("olmo2", "llama", ["normed after they ran", "q and k are normed"]),
        ("phi3", "llama", ["the same mathematics under other names"]),
        ("granite", "llama", ["attention_multiplier=1.0"]),
        ("mixtral", "llama", ["a router chooses"]),
        ("smollm3", "llama", ["some layers do not rotate"]),
        ("glm", "helium", ["a part of every head is rotated", "biases"]),
        ("cohere", "stablelm", ["rotary pairs are (2i, 2i+1)", "logit_scale=0.0625"]),
        ("phi", "stablelm", ["its MLP has no gate", "attention and MLP read the same norm"]),
        ("nemotron", "stablelm", ["1 + its weight", "no gate"]),
    ],
)
def test_what_differs_is_said_of_the_nearest_family(model_type: str, family: str, said: list[str]) -> None:
    found = nearest(config_of(model_type))
    assert found.family == family
    assert not found.exact
    for words in said:
        assert any(words in clause for clause in found.differs), found
        assert words in found.sentence
    assert "--page FILE.PY" in found.sentence


@pytest.mark.parametrize("window", [None, 131072, 1 << 20])
def test_mistral_is_llama_exactly_where_its_window_is_never_reached(window: int | None) -> None:
    found = nearest(config_of("mistral", sliding_window=window), names(*LLAMA))
    assert found.exact, found
    assert "llama exactly" in found.sentence
    assert "--page llama" in found.sentence


@pytest.mark.parametrize("changes", [{"sliding_window": ...}, {"sliding_window": 131071}, {"a_key_of_tomorrow": 2}])
def test_a_window_that_is_left_out_or_reached_and_keys_that_nobody_reads_are_not_exact(changes: dict[str, Any]) -> None:
    values = config_of("mistral", sliding_window=None) | changes
    found = nearest({key: value for key, value in values.items() if value is not ...})
    assert not found.exact
    assert any(key in found.sentence for key in changes)


def test_a_type_that_nobody_knows_is_never_called_exact() -> None:
    found = nearest(config_of("llama") | {"model_type": "next"}, names(*LLAMA))
    assert (found.family, found.differs, found.exact) == ("llama", (), False)
    assert "if you know" in found.sentence


@pytest.mark.parametrize(
    ("more", "without", "words"),
    [
        (["self_attn.k_proj.bias", "self_attn.q_proj.bias", "self_attn.v_proj.bias"], [], "only q, k, v have biases"),
        (["self_attn.k_norm.weight", "self_attn.q_norm.weight"], [], "self_attn.q_norm.weight"),
        (["post_feedforward_layernorm.weight"], ["input_layernorm.weight"], "after they ran"),
        (["post_feedforward_layernorm.weight"], [], "before and after they ran"),
        (["self_attn.qkv_proj.weight"], LLAMA[:3], "self_attn.qkv_proj.weight"),
        (["mlp.experts.0.up_proj.weight"], LLAMA[4:7], "a router"),
        (["self_attn.sinks"], [], "self_attn.sinks"),
        ([], ["mlp.gate_proj.weight"], "no gate"),
        (["input_layernorm.bias"], [], "LayerNorms"),
    ],
)
def test_the_names_of_tensors_say_what_a_config_does_not(more: list[str], without: list[str], words: str) -> None:
    suffixes = [name for name in LLAMA if name not in without] + more
    found = compared_with("llama", config_of("llama") | {"model_type": "next"}, names(*suffixes))
    assert any(words in clause for clause in found.differs), found


def test_a_page_that_is_there_is_named() -> None:
    written = Path(__file__).parents[2] / "docs" / "pages"
    assert set(PAGES) == {page.stem for page in written.glob("*.py")}
    assert "docs/pages/qwen2.py" in nearest(config_of("qwen2")).sentence
    assert "docs/pages says how to write one" in nearest(config_of("gemma")).sentence


def test_all_four_biases_are_no_difference() -> None:
    biases = [f"self_attn.{name}_proj.bias" for name in "qkvo"]
    assert compared_with("llama", config_of("llama") | {"model_type": "next"}, names(*LLAMA, *biases)).differs == ()


@pytest.mark.parametrize("value", [None, True, -1, 10**400, float("nan"), "x", [], [[]], {}, {"a": 1}])
def test_no_value_of_any_key_ends_it(value: Any) -> None:
    found = set()
    for model_type in ("mistral", "gemma2", "glm", "next"):
        values = config_of(model_type if model_type != "next" else "llama") | {"model_type": model_type}
        keys = [*values, "rope_scaling", "hidden_activation", "layer_types", "query_pre_attn_scalar", "rotary_pct"]
        found |= {nearest(values | {key: value}).family for key in keys if key != "model_type"}
    assert found <= {"llama", "helium", "arcee", "stablelm"}
    assert found


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_reading_an_unknown_type_says_all_that_in_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, config_of("gemma"))
    with pytest.raises(ConfigError) as caught:
        AutoConfig.from_pretrained(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: model_type='gemma' must be one of helium, llama, ")
    assert "the nearest is llama, but not exactly: a norm multiplies" in text
    assert "\n" not in text


def test_a_config_is_read_as_a_known_family_where_nothing_differs(tmp_path: Path) -> None:
    values = config_of("mistral", sliding_window=None, architectures=["MistralForCausalLM"])
    write(tmp_path, {key: value for key, value in values.items() if key != "num_key_value_heads"})
    with read_as("llama"):
        config: Any = AutoConfig.from_pretrained(tmp_path)
        assert LlamaConfig.from_pretrained(tmp_path) == config
    assert (config.model_type, config.architectures) == ("llama", ["LlamaForCausalLM"])
    assert config.num_key_value_heads == 8  # Mistral's default, not Llama's
    write(tmp_path, config_of("mistral"))
    with read_as("llama"), pytest.raises(ConfigError, match="cannot be read as llama: sliding_window=4096"):
        AutoConfig.from_pretrained(tmp_path)
    write(tmp_path, config_of("helium"))
    with read_as("llama"), pytest.raises(ConfigError, match="has a page of its own"):
        AutoConfig.from_pretrained(tmp_path)
