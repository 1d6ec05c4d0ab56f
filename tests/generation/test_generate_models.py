"""Generation with this package's own models against Transformers on the same checkpoint; and calls that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_adapter import CacheAdapter, TorchAdapter, tiny_model
from transformers import AutoModelForCausalLM
from transformers.generation import utils as hf_utils

import refllm
from refllm.errors import ConfigError, InputError
from refllm.generation.config import GenerationConfig
from refllm.generation.decoding import GenerateOutput
from refllm.generation.generate import generate

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (refllm.LlamaConfig, refllm.LlamaForCausalLM, {}),
    "helium": (refllm.HeliumConfig, refllm.HeliumForCausalLM, {"head_dim": 8}),
    "stablelm": (refllm.StableLmConfig, refllm.StableLmForCausalLM, {"use_parallel_residual": True}),
    "arcee": (refllm.ArceeConfig, refllm.ArceeForCausalLM, {}),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same weights in this package and in Transformers."""
    config_class, model_class, extra = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model_class.from_config(config_class(**SHAPE, **extra), seed=1).save_pretrained(folder)
    return refllm.load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


IDS = np.array([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 31, 32, 33, 34]])
MASK = (IDS != 0).astype(np.int64)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_new_tokens": 12, "eos_token_id": [2, 30, 31, 32]},
        {"max_new_tokens": 10, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 10, "num_beams": 4, "eos_token_id": [2, 30, 31], "length_penalty": -1.0},
        {"max_new_tokens": 10, "prefill_chunk_size": 2},
        {"max_new_tokens": 10, "use_cache": False},
        {"max_new_tokens": 10, "guidance_scale": 1.5},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_own_models_generate_what_transformers_generates(pair: tuple[Any, Any], values: dict[str, Any]) -> None:
    own, witness = pair
    found = own.generate(IDS, attention_mask=MASK, **values)
    expected = witness.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK), **values)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_static_cache_has_room_for_a_prompt_of_embeddings(pair: tuple[Any, Any], with_ids: bool) -> None:
    own = pair[0]
    given: dict[str, Any] = {"input_ids": IDS[:, -1:]} if with_ids else {}
    given |= {"inputs_embeds": own.weights.rows("embed_tokens.weight", IDS), "attention_mask": np.ones(IDS.shape, int)}
    given |= {"max_new_tokens": 5, "do_sample": False}
    expected = own.generate(**given)
    assert expected.shape[1] > with_ids
    np.testing.assert_array_equal(own.generate(cache_implementation="static", **given), expected)


def test_static_cache_and_float64_give_the_same_text(pair: tuple[Any, Any], tmp_path: Path) -> None:
    own, _ = pair
    for num_beams in (1, 3):
        values = {"attention_mask": MASK, "max_new_tokens": 8, "num_beams": num_beams}
        expected = own.generate(IDS, **values)
        np.testing.assert_array_equal(own.generate(IDS, cache_implementation="static", **values), expected)
        np.testing.assert_array_equal(
            own.generate(IDS, cache_implementation="static", max_cache_len=99, **values), expected
        )
    own.save_pretrained(tmp_path)
    exact = refllm.load(tmp_path, dtype="float64")
    out = exact.generate(IDS, return_dict_in_generate=True, output_scores=True, **values)
    np.testing.assert_array_equal(out.sequences, expected)
    assert out.scores[0].dtype == np.float32


def test_cache_of_own_model_is_continued_with_beams() -> None:
    model = refllm.LlamaForCausalLM.from_config(refllm.LlamaConfig(**SHAPE), seed=1)
    expected = model.generate(IDS[1:2], max_new_tokens=8, num_beams=3)
    cache = model(input_ids=IDS[1:2, :3], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    np.testing.assert_array_equal(
        model.generate(IDS[1:2], max_new_tokens=8, num_beams=3, past_key_values=cache), expected
    )


def test_settings_of_the_checkpoint_are_used_and_a_call_overrides_them(tmp_path: Path) -> None:
    model = refllm.LlamaForCausalLM.from_config(refllm.LlamaConfig(**SHAPE), seed=1)
    model.generation_config = GenerationConfig(max_new_tokens=3, suppress_tokens=[7], eos_token_id=2)
    model.save_pretrained(tmp_path)
    loaded = refllm.load(tmp_path)
    assert loaded.generation_config == model.generation_config
    assert loaded.generate([[5, 6]]).shape[1] <= 5
    assert loaded.generate([[5, 6]], max_new_tokens=1).shape == (1, 3)
    witness = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_array_equal(loaded.generate([[5, 6]]), witness.generate(torch.tensor([[5, 6]])).numpy())


# ------------------------------------------------------------------------------------------------------------- refusals

BAD_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("max_length", {"max_length": 0}),
    ("max_length", {"max_length": "10"}),
    ("max_length", {"max_length": 2}),  # not longer than the prompt
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": -3}),
    ("max_new_tokens", {"max_new_tokens": 2.5}),
    ("max_new_tokens", {"max_new_tokens": True}),
    ("min_length", {"min_length": -1}),
    ("min_new_tokens", {"min_new_tokens": -1}),
    ("max_time", {"max_time": -1.0}),
    ("max_time", {"max_time": float("nan")}),
    ("stop_strings", {"stop_strings": [1]}),
    ("stop_strings", {"stop_strings": []}),
    ("do_sample", {"do_sample": "yes"}),
    ("num_beams", {"num_beams": 0}),
    ("num_return_sequences", {"num_return_sequences": 0}),
    ("num_return_sequences", {"num_return_sequences": 2}),
    ("num_return_sequences", {"num_return_sequences": 3, "num_beams": 2}),
    ("early_stopping", {"early_stopping": "always", "num_beams": 2}),
    ("early_stopping", {"early_stopping": 2}),
    ("length_penalty", {"length_penalty": float("inf")}),
    ("length_penalty", {"length_penalty": "1"}),
    ("temperature", {"temperature": 0.0, "do_sample": True}),
    ("temperature", {"temperature": -1.0, "do_sample": True}),
    ("temperature", {"temperature": "hot"}),
    ("top_k", {"top_k": -1, "do_sample": True}),
    ("top_k", {"top_k": 2.5}),
    ("top_p", {"top_p": -0.1, "do_sample": True}),
    ("top_p", {"top_p": float("nan"), "do_sample": True}),
    ("min_p", {"min_p": 1.1, "do_sample": True}),
    ("top_h", {"top_h": 0.0, "do_sample": True}),
    ("typical_p", {"typical_p": 0.0, "do_sample": True}),
    ("epsilon_cutoff", {"epsilon_cutoff": 1.0, "do_sample": True}),
    ("eta_cutoff", {"eta_cutoff": -0.1, "do_sample": True}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("repetition_penalty", {"repetition_penalty": [1.0]}),
    ("encoder_repetition_penalty", {"encoder_repetition_penalty": -2.0}),
    ("no_repeat_ngram_size", {"no_repeat_ngram_size": -1}),
    ("encoder_no_repeat_ngram_size", {"encoder_no_repeat_ngram_size": 1.5}),
    ("bad_words_ids", {"bad_words_ids": []}),
    ("bad_words_ids", {"bad_words_ids": [3]}),
    ("bad_words_ids", {"bad_words_ids": [[]]}),
    ("bad_words_ids", {"bad_words_ids": [[-1]]}),
    ("bad_words_ids", {"bad_words_ids": [[99]]}),
    ("sequence_bias", {"sequence_bias": {}}),
    ("sequence_bias", {"sequence_bias": {(): 1.0}}),
    ("sequence_bias", {"sequence_bias": {(1,): "a"}}),
    ("sequence_bias", {"sequence_bias": {(1,): float("nan")}}),
    ("sequence_bias", {"sequence_bias": [[1, 2.0]]}),
    ("sequence_bias", {"sequence_bias": {(99,): 2.0}}),
    ("forced_bos_token_id", {"forced_bos_token_id": -1}),
    ("forced_eos_token_id", {"forced_eos_token_id": 99}),
    ("forced_eos_token_id", {"forced_eos_token_id": 3, "suppress_tokens": [3, 4]}),
    ("suppress_tokens", {"suppress_tokens": 3}),
    ("suppress_tokens", {"suppress_tokens": ["a"]}),
    ("begin_suppress_tokens", {"begin_suppress_tokens": "3"}),
    ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": 2}),
    ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (1, 2, 3)}),
    ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": None}),
    ("guidance_scale", {"guidance_scale": float("nan")}),
    ("watermarking_config", {"watermarking_config": 3}),
    ("watermarking_config", {"watermarking_config": {"ngram_len": 5}}),
    ("greenlist_ratio", {"watermarking_config": {"greenlist_ratio": 2.0}}),
    ("watermarking_config", {"watermarking_config": hf_utils.GenerationConfig()}),
    ("eos_token_id", {"eos_token_id": []}),
    ("eos_token_id", {"eos_token_id": "2"}),
    ("eos_token_id", {"eos_token_id": [2.5]}),
    ("pad_token_id", {"pad_token_id": "0"}),
    ("cache_implementation", {"cache_implementation": "magic"}),
    ("cache_implementation=quantized", {"cache_implementation": "quantized"}),
    ("prefill_chunk_size", {"prefill_chunk_size": 0}),
    ("prefill_chunk_size", {"prefill_chunk_size": 2, "use_cache": False}),
    ("use_cache", {"use_cache": "no"}),
    ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
    ("num_beam_groups", {"num_beams": 4, "num_beam_groups": 2}),
    ("constraints", {"constraints": [1]}),
    ("force_words_ids", {"force_words_ids": [[1]]}),
    ("dola_layers", {"dola_layers": "low"}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
    ("use_mtp", {"use_mtp": True}),
    ("token_healing", {"token_healing": True}),
    ("temprature; did you mean temperature", {"temprature": 0.5}),
    ("assistant_model", {"assistant_model": object()}),
    ("labels", {"labels": [[1]]}),
    ("seed", {"seed": -1, "do_sample": True}),
    ("seed", {"seed": "a", "do_sample": True}),
    ("num_beams", {"num_beams": 2, "streamer": object()}),
    ("generation_config", {"generation_config": {"top_k": 3}}),
    ("attention_mask", {"attention_mask": [1, 1, 1]}),
    ("attention_mask", {"attention_mask": [[1, 1]]}),
    ("attention_mask", {"attention_mask": [[1, 1, 1, 1]]}),
    ("attention_mask", {"attention_mask": [[1, 1, 1], [1, 1, 1]]}),
    ("position_ids", {"position_ids": [[0, 1]]}),
    ("position_ids", {"position_ids": [[0.0, 1.0, 2.0]]}),
    ("negative_prompt_ids", {"negative_prompt_ids": [[1], [2]], "guidance_scale": 2.0}),
    ("inputs_embeds", {"inputs_embeds": np.zeros((1, 3))}),
    ("inputs_embeds", {"inputs_embeds": np.zeros((2, 3, 32))}),
    ("inputs_embeds", {"inputs_embeds": np.zeros((1, 0, 32))}),
    ("two names", {"inputs": [[1]]}),
]


@pytest.mark.parametrize(("words", "values"), BAD_SETTINGS, ids=[words for words, _ in BAD_SETTINGS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_call_is_refused_in_one_sentence_that_names_it(words: str, values: dict[str, Any]) -> None:
    model = TorchAdapter(tiny_model(), GenerationConfig(eos_token_id=2))
    with pytest.raises(InputError, match=words) as caught:
        generate(model, [[3, 4, 5]], **values)
    message = str(caught.value)
    assert "\n" not in message
    assert 15 < len(message) < 250


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("empty", np.zeros((1, 0), int)),
        ("empty", np.zeros((0, 3), int)),
        ("shape", [1, 2, 3]),
        ("shape", 5),
        ("integers", [[1.0, 2.0]]),
        ("integers", [["a"]]),
        ("holds 19", [[1, 19]]),
        ("holds -1", [[1, -1]]),
        ("bos_token_id", None),
    ],
)
def test_wrong_prompt_is_refused_in_one_sentence(words: str, ids: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        generate(TorchAdapter(tiny_model()), ids)
    assert "\n" not in str(caught.value)


def test_prompt_without_room_names_the_limit() -> None:
    with pytest.raises(InputError, match="max_position_embeddings=64"):
        generate(TorchAdapter(tiny_model()), [[1] * 64])
    with pytest.raises(InputError, match="max_length=9"):
        generate(TorchAdapter(tiny_model()), [[1] * 9], max_length=9)


def test_cache_that_does_not_fit_the_prompt_is_refused() -> None:
    class Holds:
        def __init__(self, tokens: int) -> None:
            self.tokens = tokens

        def get_seq_length(self) -> int:
            return self.tokens

    model = TorchAdapter(tiny_model())
    for tokens in (3, 5):
        with pytest.raises(InputError, match=f"holds {tokens} tokens"):
            generate(model, [[1, 2, 3]], past_key_values=Holds(tokens))
    with pytest.raises(InputError, match=r"2 cached and 3 given"):
        generate(model, [[1, 2, 3]], [[1] * 4], past_key_values=Holds(2))
    with pytest.raises(InputError, match="not both"):
        generate(model, [[1, 2, 3]], past_key_values=Holds(2), cache_implementation="static")


def test_scores_without_a_distribution_are_refused_when_sampling() -> None:
    model = TorchAdapter(tiny_model())
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match="scores of row 0"):
            generate(model, [[3]], do_sample=True, logits_processor=[lambda ids, s, bad=bad: np.full_like(s, bad)])


def test_rows_that_end_apart_need_a_padding_id_in_the_vocabulary() -> None:
    model = TorchAdapter(tiny_model())
    ids = np.array([[5, 6, 7], [8, 9, 1]])
    free = generate(model, ids, max_new_tokens=4)
    ends = int(free[0, 3])
    assert ends not in free[1, 3:]
    with pytest.raises(InputError, match="pad_token_id=99"):
        generate(model, ids, max_new_tokens=4, eos_token_id=ends, pad_token_id=99)
    assert generate(model, ids[1:], max_new_tokens=4, eos_token_id=ends, pad_token_id=99).shape == (1, 7)


def test_settings_without_effect_are_reported() -> None:
    model = TorchAdapter(tiny_model(), GenerationConfig(temperature=0.5))
    with pytest.warns(UserWarning, match=r"without do_sample=True .* temperature=0\.7, top_k=3"):
        generate(model, [[3]], temperature=0.7, top_k=3)
    with pytest.warns(UserWarning, match="without num_beams > 1 .* early_stopping=never"):
        generate(model, [[3]], early_stopping="never")
    with pytest.warns(UserWarning, match="without return_dict_in_generate=True .* output_scores=True"):
        generate(model, [[3]], output_scores=True)


@pytest.mark.filterwarnings("error")
def test_settings_of_the_checkpoint_without_effect_are_not_reported() -> None:
    set_there = GenerationConfig(temperature=0.5, top_p=0.9, length_penalty=2.0)
    plain = generate(TorchAdapter(tiny_model(), GenerationConfig()), [[3]])
    assert np.array_equal(generate(TorchAdapter(tiny_model(), set_there), [[3]]), plain)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"top_k": "many"}', "generation_config.json: top_k"),
        ('{"eos_token_id": []}', "generation_config.json: eos_token_id"),
        ('{"max_length": -5}', "generation_config.json: max_length"),
        ('{"watermarking_config": {"bias": "x"}}', "bias"),
        ('{"watermarking_config": {"what": 1}}', "what"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_broken_generation_config_is_refused_with_the_name_of_the_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        GenerationConfig.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        GenerationConfig.from_checkpoint(tmp_path)


def test_constructor_refuses_unknown_names_and_wrong_values() -> None:
    with pytest.raises(TypeError, match="temprature"):
        GenerationConfig(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="GenerationConfig: top_k"):
        GenerationConfig(top_k="3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown argument"):
        GenerationConfig().updated({"x": 1})
    assert GenerationConfig().updated({"top_k": 3}).top_k == 3


def test_published_settings_of_other_ways_of_decoding_load_and_are_refused_in_use(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"penalty_alpha": 0.6, "top_k": 4, "num_assistant_tokens": 5}')
    config = GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="penalty_alpha"):
        generate(TorchAdapter(tiny_model()), [[3]], generation_config=config)
    generate(TorchAdapter(tiny_model()), [[3]], generation_config=config, do_sample=True)


def test_numbers_of_numpy_and_integers_for_floats_are_taken() -> None:
    model = TorchAdapter(tiny_model())
    out = generate(
        model, np.array([[3]], np.int32), max_new_tokens=np.int64(2), repetition_penalty=2, eos_token_id=np.array([2])
    )
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.int64


def test_output_is_read_by_attribute_name_and_place() -> None:
    out = generate(
        TorchAdapter(tiny_model()), [[3]], max_new_tokens=2, return_dict_in_generate=True, output_scores=True
    )
    assert isinstance(out, GenerateOutput)
    assert out.keys() == ["sequences", "scores", "past_key_values"]
    assert out[0] is out["sequences"] is out.sequences
    assert out[1] is out.scores
    with pytest.raises(KeyError):
        out["logits"]


def test_other_heads_and_things_that_are_no_cache_are_refused() -> None:
    model = refllm.LlamaForSequenceClassification.from_config(refllm.LlamaConfig(**SHAPE))
    with pytest.raises(InputError, match="head sequence_classification"):
        generate(model, [[3]])
    with pytest.raises(InputError, match="is a tuple, not a cache"):
        generate(TorchAdapter(tiny_model()), [[3]], past_key_values=())


def test_output_holds_only_what_was_asked_for() -> None:
    out = generate(TorchAdapter(tiny_model()), [[3]], max_new_tokens=2, return_dict_in_generate=True, num_beams=2)
    assert isinstance(out, GenerateOutput)
    assert out.scores is None
    assert out.logits is None
    assert out.sequences_scores is None
    assert isinstance(out.past_key_values, CacheAdapter)
