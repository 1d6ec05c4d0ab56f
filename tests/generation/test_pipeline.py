"""`pipeline("text-generation")` takes and returns what Transformers' pipeline does, and says what is wrong."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from refllm import golden
from refllm.errors import InputError, RefllmError, TokenizerError
from refllm.generation.config import GenerationConfig
from refllm.generation.pipelines import DEFAULTS, TextGenerationPipeline, pipeline
from refllm.models.auto import load
from refllm.text.tokenizer import AutoTokenizer

CHAT = [{"role": "user", "content": "What is a head?"}]
PREFILL = [*CHAT, {"role": "assistant", "content": "A head is"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
NAMES = sorted(golden.checkpoints())
CHATTY = ["arcee-tiny", "llama-tiny", "stablelm-tiny-parallel"]
PADDED = ["arcee-tiny", "helium-tiny", "stablelm-tiny-parallel"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers


@cache
def ours(name: str) -> TextGenerationPipeline:
    return pipeline("text-generation", model=golden.path(name))


@cache
def theirs(name: str) -> Any:
    return transformers.pipeline("text-generation", model=str(golden.path(name)), dtype=torch.float32)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one text": ("Attention", {}),
    "texts one by one": (["Attention is", "A", "The key"], {}),
    "continuation only": ("Attention", {"return_full_text": False}),
    "ids": ("Attention", {"return_tensors": True}),
    "several beams": ("Attention", {"num_beams": 3, "num_return_sequences": 2}),
    "several beams of several texts": (["Attention is", "A"], {"num_beams": 2, "num_return_sequences": 2}),
    "empty text": ("", {}),
    "stop string": ("Attention", {"stop_sequence": ["e", "zz"], "max_new_tokens": 12}),
    "total length": ("Attention", {"max_length": 9}),
    "total length and no new length": ("Attention", {"max_length": 9, "max_new_tokens": None}),
    "prompt beyond the total length": ("Attention is all", {"max_length": 3, "max_new_tokens": 2}),
    "prefix": ("Attention", {"prefix": "The "}),
    "prefix and total length": ("Attention", {"prefix": "The ", "max_length": 12}),
    "prefix and total lengths": ("Attention", {"prefix": "The matrix ", "max_length": 16, "min_length": 14}),
    "special tokens asked for": ("Attention", {"add_special_tokens": False}),
    "special tokens kept": ("Attention", {"skip_special_tokens": False, "max_new_tokens": 20}),
    "tokenizer options": ("Attention is", {"tokenizer_encode_kwargs": {"max_length": 2, "truncation": True}}),
    "truncation": ("Attention is all you need", {"truncation": True, "max_length": 5, "max_new_tokens": 3}),
    "min_new_tokens": ("Attention", {"min_new_tokens": 8, "repetition_penalty": 1.3}),
    "a prompt beyond the limit, cut": ("word " * 20, {"handle_long_generation": "hole"}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prompt", "options"), CALLS.values(), ids=CALLS)
def test_texts_are_continued_as_by_transformers(name: str, prompt: Any, options: dict[str, Any]) -> None:
    length = {} if "max_length" in options else {"max_new_tokens": 6}
    options = {"do_sample": False, **length, **options}
    assert ours(name)(prompt, **options) == theirs(name)(prompt, **options)


@pytest.mark.parametrize("name", CHATTY)
@pytest.mark.parametrize("prompt", [CHAT, PREFILL, [CHAT, PREFILL]], ids=["chat", "prefill", "chats"])
@pytest.mark.parametrize(
    "options", [{}, {"return_full_text": False}, {"return_tensors": True}, {"continue_final_message": True}]
)
def test_chats_are_continued_as_by_transformers(name: str, prompt: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    assert ours(name)(prompt, **options) == theirs(name)(prompt, **options)


def test_tools_choose_their_template_as_in_transformers() -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "tools": [TOOL]}
    out = ours("arcee-tiny")(CHAT, **options)
    assert out == theirs("arcee-tiny")(CHAT, **options)
    assert out != ours("arcee-tiny")(CHAT, **{**options, "tools": None})


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"return_tensors": True}, {"num_beams": 2, "num_return_sequences": 2}])
def test_batches_are_padded_as_by_transformers(name: str, size: int, options: dict[str, Any]) -> None:
    prompts = ["Attention is all", "A", "The key of a head", "Two", "Norms"]
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": size, **options}
    assert ours(name)(prompts, **options) == theirs(name)(prompts, **options)


@pytest.mark.parametrize("name", PADDED)
def test_a_prompt_gets_the_same_answer_alone_and_in_a_batch(name: str) -> None:
    prompts = ["Attention is all", "A", "The key of a head"]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert ours(name)(prompts, batch_size=3, **options) == [ours(name)(prompt, **options) for prompt in prompts]


def test_an_iterator_of_prompts_gives_an_iterator_of_results() -> None:
    options = {"max_new_tokens": 3, "do_sample": False}
    taken = []

    def prompts() -> Any:
        for prompt in ("one", "two", "three"):
            taken.append(prompt)
            yield prompt

    results = ours("helium-tiny")(prompts(), **options)
    assert taken == []
    first = next(results)
    assert taken == ["one"]
    assert [first, *results] == ours("helium-tiny")(["one", "two", "three"], **options)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": False},
        {"max_length": 30},
        {"do_sample": False, "max_new_tokens": 3},
        {"generation_config": GenerationConfig(max_new_tokens=5, top_k=3)},
        {"generation_config": GenerationConfig(do_sample=False, max_length=50), "temperature": 0.1},
    ],
)
def test_defaults_fill_in_what_nobody_set_as_in_transformers(name: str, options: dict[str, Any]) -> None:
    given = dict(options)
    if "generation_config" in given:
        given["generation_config"] = transformers.GenerationConfig(**options["generation_config"].to_dict())
    _, forward, _ = theirs(name)._sanitize_parameters(**given)
    expected = theirs(name)._prepare_generate_kwargs(forward)
    config = expected.pop("generation_config", None)
    expected.pop("tokenizer", None)
    if config is not None:
        expected |= {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    _, mine = ours(name)._split(options)
    passed = mine.pop("generation_config", None)
    mine.pop("tokenizer")
    assert (passed.set_fields() if passed else {}) | mine == expected


def test_the_tokenizers_pad_token_is_used_where_the_model_has_none() -> None:
    folder = golden.path("llama-tiny")
    pipe = pipeline(model=folder, tokenizer=AutoTokenizer.from_pretrained(folder, pad_token="<|end_of_text|>"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|end_of_text|>")
    witness = transformers.pipeline("text-generation", model=str(folder), tokenizer=tokenizer, dtype=torch.float32)
    assert pipe._split({})[1]["pad_token_id"] == witness._prepare_generate_kwargs({})["pad_token_id"] == 636
    prompts = ["Attention is all", "A", "The key of a head"]
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": 3, "return_tensors": True}
    assert pipe(prompts, **options) == witness(prompts, **options)


def test_the_pipelines_own_options_apply_to_every_call() -> None:
    pipe = pipeline(
        "text-generation", model=golden.path("helium-tiny"), max_new_tokens=4, do_sample=False, batch_size=2
    )
    ids = pipe("x", return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) == 2 + 4
    assert len(pipe("x", return_tensors=True, max_new_tokens=2)[0]["generated_token_ids"]) == 2 + 2
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert len(pipe("x", return_tensors=True, generation_config=config)[0]["generated_token_ids"]) == 2 + 3


def test_sampling_is_the_default_and_a_seed_repeats_it() -> None:
    pipe = ours("helium-tiny")
    texts = [pipe("Attention", max_new_tokens=12, seed=seed)[0]["generated_text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# --- making one -------------------------------------------------------------------------------------------------------


def test_a_model_and_a_tokenizer_can_be_passed() -> None:
    folder = golden.path("helium-tiny")
    expected = ours("helium-tiny")("Attention", max_new_tokens=4, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for arguments in (
        (load(folder), tokenizer),
        (load(folder), folder),
        (str(folder), tokenizer),
        (folder, str(folder)),
    ):
        pipe = pipeline("text-generation", *arguments)
        assert pipe("Attention", max_new_tokens=4, do_sample=False) == expected


def test_dtype_and_memory_are_those_of_load() -> None:
    folder = golden.path("helium-tiny")
    assert pipeline(model=folder).model.dtype == "float32"
    assert pipeline(model=folder, dtype="auto").model.dtype == "bfloat16"
    pipe = pipeline(model=folder, dtype="bfloat16", policy="fused", low_memory=True)
    assert (pipe.model.dtype, pipe.model.policy, pipe.model.weights.low_memory) == ("bfloat16", "fused", True)


def test_the_public_name_is_the_function() -> None:
    import refllm
    import refllm.generation.pipelines

    assert refllm.pipeline is refllm.generation.pipelines.pipeline


# --- what is wrong is said in one sentence ----------------------------------------------------------------------------

BAD_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompts": ([], {}, "must be text or a list of messages"),
    "a number": (5, {}, "must be text or a list of messages"),
    "a number among texts": (["a", 5], {}, "not int"),
    "a message without content": ([{"role": "user"}], {}, "a role and a content"),
    "two kinds of output": ("a", {"return_tensors": True, "return_full_text": True}, "exclude each other"),
    "return_text": ("a", {"return_text": True, "return_full_text": True}, "return_text excludes"),
    "long generation": ("a", {"handle_long_generation": "cut"}, "handle_long_generation='cut'"),
    "batch size": ("a", {"batch_size": 0}, "batch_size=0"),
    "empty prompt in a batch": (["a", ""], {"batch_size": 2, "add_special_tokens": False}, "cannot be part of a batch"),
    "unknown option": ("a", {"max_tokens": 3}, "max_tokens"),
    "too many new tokens": ("a", {"handle_long_generation": "hole", "max_new_tokens": 600}, "exceed the tokenizer's"),
}


@pytest.mark.parametrize(("prompt", "options", "expected"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_one_sentence(prompt: Any, options: dict[str, Any], expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("helium-tiny"), model_max_length=512)
    with pytest.raises(InputError, match=expected) as caught:
        pipeline(model=load(golden.path("helium-tiny")), tokenizer=tokenizer)(prompt, **options)
    assert "\n" not in str(caught.value)


def test_a_batch_without_a_pad_token_is_said() -> None:
    with pytest.raises(InputError, match="needs a pad token"):
        ours("llama-tiny")(["a b c", "d"], batch_size=2, max_new_tokens=2)


def test_settings_that_nobody_gives_are_those_of_transformers() -> None:
    theirs = transformers.TextGenerationPipeline._default_generation_config
    assert {name: getattr(theirs, name) for name in DEFAULTS} == DEFAULTS
    assert theirs.to_diff_dict().keys() - {"transformers_version"} <= DEFAULTS.keys()


def test_a_chat_without_a_template_is_said() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        ours("helium-tiny")(CHAT, max_new_tokens=2)


def test_what_no_pipeline_can_be_made_from_is_said(tmp_path: Any) -> None:
    folder = golden.path("helium-tiny")
    base = load(folder, head="base")
    cases: tuple[tuple[tuple[Any, ...], str], ...] = (
        (("translation", folder), "'translation' is not supported"),
        (("text-generation",), "name a model"),
        (("text-generation", base), "pass tokenizer="),
        (("text-generation", base, folder), "not the head 'base'"),
        (("text-generation", tmp_path), "tokenizer.json|config.json"),
    )
    for arguments, expected in cases:
        with pytest.raises(RefllmError, match=expected):
            pipeline(*arguments)


def test_a_tokenizer_with_more_tokens_than_the_model_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="ids up to 767, but the model's vocab_size is 640"):
        pipeline(model=load(golden.path("llama-tiny")), tokenizer=golden.path("helium-tiny"))


def test_generated_ids_are_plain_integers() -> None:
    ids = ours("helium-tiny")("a", max_new_tokens=2, return_tensors=True)[0]["generated_token_ids"]
    assert all(type(token) is int for token in ids)
    assert not isinstance(ids, np.ndarray)
