"""Programs of Transformers' documentation of Helium, StableLM, Arcee and Llama run with refllm in the import line.

Each test is such a program: the calls are as they are shown there, the texts are others, checkpoints are the embedded
ones, and there are few new tokens.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config

from refllm import (
    ArceeForCausalLM,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    HeliumForCausalLM,
    HeliumModel,
    StableLmForCausalLM,
    devices,
    golden,
    pipeline,
    set_seed,
)
from refllm.errors import InputError, TokenizerError
from refllm.forward import model as model_module
from refllm.forward.loading import shard_bytes, understood
from refllm.generation import seeds
from refllm.models.families import CLASSES

pytestmark = pytest.mark.filterwarnings("ignore:.*factor=", "ignore:.*token_id=", "ignore:.*(initialised at|used by)")

HELIUM, LLAMA, ARCEE = (str(golden.path(f"{name}-tiny")) for name in ("helium", "llama", "arcee"))
STABLELM = str(golden.path("stablelm-tiny-parallel"))
FOLDERS = {"Helium": HELIUM, "Llama": LLAMA, "Arcee": ARCEE, "StableLm": STABLELM}
CHATTY = [LLAMA, ARCEE, STABLELM]


def of_head(suffix: str) -> list[str]:
    return [name for name in CLASSES if name.endswith(suffix)]


def folder_of(class_name: str) -> str:
    return next(folder for prefix, folder in FOLDERS.items() if class_name.startswith(prefix))


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No device was missed yet, and no seed was set, before and after."""
    monkeypatch.setattr(devices, "_missed", set())
    yield
    seeds._generator.clear()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: 0)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checkpoints with a generation_config.json that asks for 3 new tokens, for programs that name no number."""
    made = {}
    for folder in FOLDERS.values():
        copy = tmp_path_factory.mktemp("short") / Path(folder).name
        shutil.copytree(folder, copy)
        settings = json.loads((Path(folder) / "generation_config.json").read_text())
        (copy / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 3}))
        made[folder] = str(copy)
    return made


# ------------------------------------------------------------------------------------------------- text from a model


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("folder", CHATTY)
@pytest.mark.filterwarnings("ignore:device cuda")
def test_a_chat(folder: str) -> None:
    device = "cuda"

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    messages = [{"role": "user", "content": "What is a residual stream?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pt").to(device)

    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=5, do_sample=True)
    generated_ids = [ids[len(prompt) :] for prompt, ids in zip(model_inputs.input_ids, generated_ids, strict=True)]
    response = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]

    assert isinstance(text, str)
    assert messages[0]["content"] in text
    assert all(isinstance(ids, torch.Tensor) and 1 <= len(ids) <= 5 for ids in generated_ids)
    assert response == tokenizer.decode(generated_ids[0], skip_special_tokens=True)


def test_a_chat_with_a_tokenizer_that_has_no_template_is_one_sentence() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HELIUM)
    with pytest.raises(TokenizerError, match="no chat template: pass the prompt as text, or a chat_template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)


@pytest.mark.usefixtures("no_gpu")
def test_a_prompt_on_a_device_of_somebody_else() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(HELIUM).to("mps")
        tokenizer = AutoTokenizer.from_pretrained(HELIUM)
        model_inputs = tokenizer("Give me a short proof.", return_tensors="pt").to("mps")
        generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=4, do_sample=True)
    assert [str(each.message) for each in caught] == [
        "device mps: not here (refllm computes on the CPU and on CUDA), so the CPU is used"
    ]
    assert caught[0].filename == __file__
    assert generated_ids.shape[1] > model_inputs.input_ids.shape[1]
    assert generated_ids.device == model.device == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.filterwarnings("ignore:device cuda")
@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2"}], ids=str)
def test_a_seeded_continuation(how: dict[str, Any]) -> None:
    def run(seed: int) -> list[str]:
        set_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(STABLELM)
        model = AutoModelForCausalLM.from_pretrained(STABLELM, **how)
        model.to("cuda")
        model_inputs = tokenizer("The tides are always higher in", return_tensors="pt").to(model.device)
        generated_ids = model.generate(**model_inputs, max_length=24, do_sample=True)
        return tokenizer.batch_decode(generated_ids, skip_special_tokens=True)

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("name", of_head("ForCausalLM"))
@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_a_continuation_in_half_precision(name: str, dtype: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    model = CLASSES[name].from_pretrained(folder_of(name), dtype=dtype, device_map="auto")

    inputs = tokenizer("What is new in this model is", return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)
    assert torch.equal(outputs[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    assert model.dtype == dtype
    arrays = tokenizer("What is new in this model is", return_tensors="np")
    assert np.array_equal(model.generate(**arrays, max_new_tokens=4, do_sample=False), outputs.numpy())


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.filterwarnings("ignore:device cuda")
@pytest.mark.parametrize("folder", FOLDERS.values())
@pytest.mark.parametrize(
    "spelled",
    [
        {"torch_dtype": torch.bfloat16, "device_map": "auto"},
        {"task": "text-generation", "dtype": torch.float16, "device": 0},
        {"device": "cpu", "trust_remote_code": False, "model_kwargs": {"attn_implementation": "sdpa"}},
    ],
    ids=str,
)
def test_a_pipeline(short: dict[str, str], folder: str, spelled: dict[str, Any]) -> None:
    pipe = pipeline(**{"task": "text-generation", **spelled}, model=short[folder])
    output = pipe("The key idea here is")
    assert output[0]["generated_text"].startswith("The key idea here is")
    assert pipe.model.dtype == spelled.get("torch_dtype", spelled.get("dtype", torch.float32))
    assert pipe.device == torch.device("cpu")


def test_a_pipeline_with_a_tokenizer_of_transformers() -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(LLAMA)
    ours = pipeline("text-generation", model=LLAMA, max_new_tokens=3, do_sample=False)
    mixed = pipeline("text-generation", model=ours.model, tokenizer=theirs, max_new_tokens=3, do_sample=False)
    chat = [{"role": "user", "content": "Why?"}]
    assert [mixed("Why?"), mixed(chat)] == [ours("Why?"), ours(chat)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "summarization"}, "the task 'summarization' is not supported, only 'text-generation'"),
        ({"device": 0, "device_map": "auto"}, "device and device_map both say where the model goes; give one of them"),
        ({"device": "fpga"}, "device='fpga' is no device; use cpu, cuda, cuda:0, or the number of a GPU"),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_be_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pipeline(**{"model": HELIUM, **options})


# --------------------------------------------------------------------------------------------------------- fresh models


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_its_config_alone(name: str) -> None:
    """Billions of weights, which are not made before they are needed."""
    configuration = CLASSES[name].config_class()
    model = CLASSES[name](configuration)
    configuration = model.config
    assert configuration is model.config
    assert model.num_parameters() > 1_800_000_000
    assert "random, to be made when they are needed" in model.report()
    assert "weights" not in vars(model)


@pytest.mark.parametrize("name", ["HeliumForCausalLM", "StableLmForTokenClassification", "ArceeForQuestionAnswering"])
def test_a_fresh_model_is_that_of_from_config(name: str) -> None:
    config = tiny_config(name.split("For")[0])
    fresh, made = CLASSES[name](config), CLASSES[name].from_config(config)
    assert not fresh.weights.low_memory
    assert fresh.weights.keys() == made.weights.keys()
    assert all(np.array_equal(fresh.weights[key], made.weights[key]) for key in made.weights)


def test_weights_that_do_not_fit_are_made_at_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    config, ids = tiny_config("Helium"), np.array([[1, 5, 2]])
    fits = HeliumModel(config)(ids).last_hidden_state
    monkeypatch.setattr(model_module, "free_memory", lambda: 1000)
    model = HeliumModel(config)
    with pytest.warns(UserWarning, match="random weights do not fit into the free memory, so each tensor is made at"):
        assert model.weights.low_memory
    assert np.array_equal(model(ids).last_hidden_state, fits)


# ---------------------------------------------------------------------------------------------------- heads and losses


@pytest.mark.parametrize("name", of_head("ForCausalLM"))
def test_a_causal_language_model(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    model = CLASSES[name].from_pretrained(folder_of(name), low_cpu_mem_usage=True, trust_remote_code=False)
    inputs = tokenizer("Are you conscious?", return_tensors="pt")

    outputs = model(**inputs, labels=inputs["input_ids"])
    logits = outputs.logits
    next_token = logits[:, -1].argmax(-1)
    generate_ids = model.generate(inputs.input_ids, max_length=inputs.input_ids.shape[1] + 1, do_sample=False)

    assert logits.shape == (*inputs.input_ids.shape, model.config.vocab_size)
    assert torch.equal(generate_ids[:, -1], next_token)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], inputs.input_ids[0, 1:])
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", of_head("ForSequenceClassification"))
@pytest.mark.parametrize("kind", [None, "multi_label_classification"])
def test_a_classifier_of_texts(name: str, kind: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    model = CLASSES[name].from_pretrained(folder_of(name), num_labels=3, problem_type=kind)
    inputs = tokenizer("My cat is cute.", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, 3)
    assert model.config.id2label[logits.argmax().item()] in ("LABEL_0", "LABEL_1", "LABEL_2")
    if kind is None:
        labels = torch.tensor([1])
        expected = torch.nn.functional.cross_entropy(logits, labels)
    else:
        above = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]
        labels = torch.sum(torch.nn.functional.one_hot(above[None, :].clone(), num_classes=3), dim=1).to(torch.float)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", of_head("ForTokenClassification"))
def test_a_classifier_of_tokens(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    names = {0: "O", 1: "PLACE", 2: "PERSON"}
    model = CLASSES[name].from_pretrained(folder_of(name), id2label=names, label2id={v: k for k, v in names.items()})
    inputs = tokenizer("A company of Paris", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted = logits.argmax(-1)
    assert {model.config.id2label[token.item()] for token in predicted[0]} <= {*names.values()}
    expected = torch.nn.functional.cross_entropy(logits[0], predicted[0])
    assert round(model(**inputs, labels=predicted).loss.item(), 4) == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("name", of_head("ForQuestionAnswering"))
def test_an_answer_in_a_text(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    model = CLASSES[name].from_pretrained(folder_of(name))
    question, text = "Who was first?", "It was a small frog"
    inputs = tokenizer(question, text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
    answer = tokenizer.decode(inputs.input_ids[0, start : end + 1], skip_special_tokens=True)
    assert answer == tokenizer.decode(inputs.input_ids[0, int(start) : int(end) + 1].tolist(), skip_special_tokens=True)
    first, last = torch.tensor([2]), torch.tensor([4])
    loss = model(**inputs, start_positions=first, end_positions=last).loss
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(outputs.start_logits, first) + entropy(outputs.end_logits, last)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_class_for_any_family_takes_the_same(auto: Any) -> None:
    model = auto.from_pretrained(STABLELM, num_labels=5, torch_dtype="float16", attn_implementation="sdpa")
    fresh = auto.from_config(model.config, num_labels=4, dtype=torch.float16, attn_implementation="sdpa")
    assert [each.config.num_labels for each in (model, fresh)] == [5, 4]
    assert {(each.dtype, each.policy) for each in (model, fresh)} == {("float16", "hf-sdpa")}


def test_what_a_tokenizer_returns_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the one device beside the CPU that Torch has everywhere."""
    monkeypatch.setattr(devices, "found", lambda device: torch.device("meta"))
    tokenizer = AutoTokenizer.from_pretrained(HELIUM)
    inputs = tokenizer("a", return_tensors="pt")
    assert inputs.to("cuda") is inputs
    assert {value.device.type for value in inputs.values()} == {"meta"}
    assert isinstance(tokenizer("a", return_tensors="np").to("cuda").input_ids, np.ndarray)
    assert tokenizer("a").to("cuda").input_ids == tokenizer("a").input_ids


# -------------------------------------------------------------------------------------------- what the text tells about


@pytest.mark.parametrize(
    ("asked", "policy", "said"),
    [
        ("eager", "hf-eager", "eager was asked for: NumPy, rounded as policy hf-eager says: after every step"),
        ("sdpa", "hf-sdpa", "sdpa was asked for: NumPy, rounded as policy hf-sdpa says: its result alone"),
        ("flash_attention_2", "hf-sdpa", "flash_attention_2 was asked for: NumPy, rounded as policy hf-sdpa says"),
    ],
)
def test_the_implementation_of_attention_is_a_policy_and_the_report_says_so(asked: str, policy: str, said: str) -> None:
    model = StableLmForCausalLM.from_pretrained(STABLELM, dtype=torch.bfloat16, attn_implementation=asked)
    assert model.policy == policy
    assert said in model.report()
    assert "StableLmForCausalLM, bfloat16 on cpu" in model.report()
    exact = StableLmForCausalLM.from_pretrained(STABLELM, dtype="float64", attn_implementation=asked)
    assert f"{asked} was asked for: NumPy, exact" in exact.report()


def test_on_a_fast_backend_attention_is_a_kernel_and_the_report_says_so() -> None:
    model = HeliumForCausalLM.from_pretrained(HELIUM, backend="torch", device_map="cpu", attn_implementation="sdpa")
    assert "sdpa was asked for: backend torch, one kernel with float32 inside" in model.report()
    prompt = torch.tensor([[1, 5, 9]])
    assert isinstance(model.generate(prompt, max_new_tokens=2), torch.Tensor)
    assert isinstance(model.generate(prompt.numpy(), max_new_tokens=2), np.ndarray)


@pytest.mark.parametrize("dtype", [torch.float16, "auto", None, np.float32, "bf16"])
def test_dtypes_by_all_their_names(dtype: Any) -> None:
    names = {torch.float16: "float16", "auto": "bfloat16", None: "float32", np.float32: "float32", "bf16": "bfloat16"}
    assert HeliumForCausalLM.from_pretrained(HELIUM, dtype=dtype).dtype == names[dtype]
    assert HeliumForCausalLM.from_pretrained(HELIUM, torch_dtype=dtype).dtype == names[dtype]


def test_checkpointing_on_a_fast_backend_is_refused_in_one_sentence() -> None:
    model = HeliumForCausalLM.from_pretrained(HELIUM, backend="torch")
    with pytest.raises(InputError, match="backend torch keeps every value; load the model with backend='numpy'"):
        model.gradient_checkpointing_enable()


class BitsAndBytesConfig:
    """Stands for that of Transformers."""

    load_in_4bit = True


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"quantization_config": BitsAndBytesConfig()}, "weights are not quantised while they are loaded"),
        ({"load_in_8bit": True}, "load_in_8bit is not possible here: weights are not quantised"),
        ({"attn_implementation": "paged"}, "attn_implementation='paged' is not known; use one of eager, sdpa, flash"),
        ({"attn_implementation": "sdpa", "policy": "fused"}, "both say where attention rounds; give one of them"),
        ({"device_map": {"model.embed_tokens": 0, "lm_head": "cpu"}}, "device_map names 2 devices"),
        ({"device_map": "moon"}, "device='moon' is no device"),
        ({"use_safetensors": False}, "asks for pickles, which are not read; leave it out"),
        ({"output_attentions": True}, "give it to the call"),
        ({"tp_plan": "auto"}, "a model is computed on one device; leave it out"),
        ({"gguf_file": "m.gguf"}, "weights are read from safetensors files"),
        ({"config": {"vocab_size": 5}}, "config: expected a HeliumConfig, found dict"),
        ({"device_mapp": "auto"}, "unknown argument device_mapp; did you mean device_map?"),
        ({"zzz": 1}, "HeliumForCausalLM.from_pretrained: unknown argument zzz; leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_possible_is_one_sentence(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        AutoModelForCausalLM.from_pretrained(HELIUM, **keywords)
    assert "\n" not in str(caught.value)


ASKS_FOR_NOTHING = {
    "quantization_config": None, "load_in_8bit": False, "output_attentions": False, "use_safetensors": True,
    "low_cpu_mem_usage": True, "trust_remote_code": False, "token": "secret", "revision": "main", "max_memory": None,
    "device_map": {"": "cpu"}, "local_files_only": True, "tp_plan": None, "weights_only": True, "use_cache": False,
}  # fmt: skip


def test_a_checkpoint_that_is_quantised_may_be_told_so(tmp_path: Path) -> None:
    config = tiny_config("Helium").to_dict() | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"quantization_config": BitsAndBytesConfig()}
    asked = understood("load", HeliumForCausalLM.config_class, given, dtype="float32", policy=None, folder=tmp_path)
    assert asked.changes == {}


def test_what_asks_for_nothing_is_taken() -> None:
    model = AutoModelForCausalLM.from_pretrained(HELIUM, **ASKS_FOR_NOTHING)
    assert (model.config.use_cache, model.dtype, model.policy) == (False, "float32", None)
    assert AutoTokenizer.from_pretrained(HELIUM, use_fast=True, trust_remote_code=False, token=None).pad_token


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, t: t("a", return_tensor="np"), "tokenizer: unknown argument return_tensor; did you mean"),
        (lambda model, t: t.decode([1], skip_specials=True), "decode: unknown argument skip_specials"),
        (lambda model, t: t.batch_decode([[1]], zzz=1), "decode: unknown argument zzz"),
        (lambda model, t: model.generate([[1]], max_tokens=3), "generate: unknown argument max_tokens"),
        (lambda model, t: model.generate([[1]], assistant_model=model), "assistant_model is not supported"),
        (lambda model, t: model([[1]], cache_position=[0]), "cache_position: not an argument of head 'causal_lm'"),
        (lambda model, t: model.save_pretrained("x", push_to_hub=True), "save_pretrained: unknown argument push_to"),
        (lambda model, t: model.save_pretrained("x", safe_serialization=False), "asks for a pickle; leave it out"),
        (lambda model, t: model.save_pretrained("x", max_shard_size="big"), "max_shard_size='big' is no size"),
        (lambda model, t: type(model).from_config(model.config, zzz=1), "from_config: unknown argument zzz"),
        (lambda model, t: type(model).from_config(model.config, backend="torch"), "unknown argument backend"),
        (lambda model, t: model.half(), "load it again with dtype='float16' instead"),
        (lambda model, t: type(model)("folder"), "expected a HeliumConfig, found str"),
        (lambda model, t: model.to(torch.float16), "load it again with dtype='float16' instead"),
        (lambda model, t: model.resize_token_embeddings(0), "0 tokens are no vocabulary"),
        (lambda model, t: set_seed(-1), "seed=-1 must be an integer from 0"),
    ],
)
def test_a_call_that_is_not_possible_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = HeliumForCausalLM(tiny_config("Helium")), AutoTokenizer.from_pretrained(HELIUM)
    with pytest.raises(InputError, match=said):
        call(model, tokenizer)
    assert [*tmp_path.iterdir()] == []


# ---------------------------------------------------------------------------------------------------- models as modules


def test_a_model_is_used_as_a_module() -> None:
    model = HeliumForCausalLM(tiny_config("Helium", tie_word_embeddings=True))
    assert (
        model.eval()
        is model.float()
        is model.to("cpu")
        is model.to(torch.device("cpu"), torch.float32)
        is model.cpu()
        is model
    )
    assert not model.training
    assert model.train().training
    assert (model.device.type, model.device.index) == ("cpu", None)
    assert torch.zeros(2, device=model.device).device == model.device
    assert model.dtype == torch.float32 != model.to(dtype="float32").dtype + "!"
    named = dict(model.named_parameters())
    theirs = transformers.HeliumForCausalLM(transformers.HeliumConfig(**model.config.to_dict()))
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == {n: p.shape for n, p in named.items()}
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert sum(p.size for p in model.parameters()) == model.num_parameters()
    assert np.array_equal(model.forward([[1, 2]]).logits, model([[1, 2]]).logits)


def test_a_model_that_would_drop_out_cannot_be_trained() -> None:
    model = HeliumModel(tiny_config("Helium", attention_dropout=0.1))
    with pytest.raises(InputError, match=r"the config has attention_dropout=0\.1; set it to 0"):
        model.train()
    assert model.eval() is model


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_saved_and_loads_in_transformers(tmp_path: Path, backend: str, tied: bool) -> None:
    config = tiny_config("Llama", tie_word_embeddings=tied)
    CLASSES["LlamaForCausalLM"](config).save_pretrained(tmp_path / "before", max_shard_size="4KB")
    assert len([*(tmp_path / "before").glob("*.safetensors")]) > 2
    model = CLASSES["LlamaForCausalLM"].from_pretrained(tmp_path / "before", backend=backend)
    before = np.asarray(model.weights["embed_tokens.weight"])
    embeddings = model.resize_token_embeddings(config.vocab_size + 2, pad_to_multiple_of=8)
    assert embeddings.shape == (32, config.hidden_size)
    np.testing.assert_array_equal(np.asarray(embeddings)[: len(before)], before)
    np.testing.assert_allclose(np.asarray(embeddings)[len(before) :], np.tile(before.mean(0), (9, 1)), atol=1e-7)
    model.save_pretrained(tmp_path / "after")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    ids = torch.tensor([[1, 31, 5]])
    logits = torch.as_tensor(model(ids).logits)
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert model.resize_token_embeddings(7).shape == (7, config.hidden_size)
    drawn = np.asarray(model.resize_token_embeddings(9, mean_resizing=False))[7:]
    assert 0.5 < drawn.std() / config.initializer_range < 2
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("3 MiB", 3 << 20), ("10kb", 10_000), (17, 17), ("2TB", 2 * 10**12)]
)
def test_sizes_of_shards_are_read_as_in_transformers(size: int | str, expected: int) -> None:
    assert shard_bytes(size) == expected
    with pytest.raises(InputError, match="is no size; expected one like '5GB'"):
        shard_bytes(0)


def test_on_a_gpu_a_model_becomes_the_fast_one_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the CPU stands for it."""
    model = HeliumForCausalLM.from_pretrained(HELIUM, attn_implementation="sdpa")
    ids = torch.tensor([[1, 5, 9]])
    before = model(ids).logits
    monkeypatch.setattr(model_module, "backend", lambda: "torch")
    monkeypatch.setattr(model_module, "CPU", devices.Device("elsewhere"))
    assert model.to("cpu") is model
    assert (type(model).__name__, model.backend) == ("HeliumForCausalLM", "torch")
    assert "sdpa was asked for: backend torch" in model.report()
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_fast_model_can_be_moved() -> None:
    model = ArceeForCausalLM.from_pretrained(ARCEE, backend="torch", dtype="bfloat16")
    ids = torch.tensor([[1, 5, 9]])
    before = model(ids).logits
    model._device = torch.device("meta")  # so that it comes from elsewhere
    assert model.to("cpu").device == torch.device("cpu")
    assert torch.equal(model(ids).logits, before)


# -------------------------------------------------------------------------------------- Transformers' objects passed in


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_a_config_of_transformers_makes_the_model_that_ours_makes(folder: str) -> None:
    theirs = transformers.AutoConfig.from_pretrained(folder)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    for made in (type(ours)(theirs), AutoModelForCausalLM.from_config(theirs)):
        assert dict(made.weights.shapes) == dict(ours.weights.shapes)
        assert made.config.rope_parameters == ours.config.rope_parameters
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=theirs)
    assert np.array_equal(loaded([[1, 2]]).logits, ours([[1, 2]]).logits)


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_what_a_tokenizer_of_transformers_returns_is_taken(kind: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(ARCEE)
    model = AutoModelForCausalLM.from_pretrained(ARCEE)
    inputs = theirs(["One", "Two and three"], padding=True, padding_side="left", return_tensors=kind)
    ours = AutoTokenizer.from_pretrained(ARCEE)(
        ["One", "Two and three"], padding=True, padding_side="left", return_tensors=kind
    )
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    made = model.generate(**inputs, generation_config=settings, token_type_ids=None)
    assert type(made) is type(ours.input_ids)
    assert made.tolist() == model.generate(**ours, max_new_tokens=3, do_sample=False).tolist()
    whole = model.generate(inputs, max_new_tokens=3, do_sample=False)
    assert whole.tolist() == made.tolist()
    assert theirs.batch_decode(made) == AutoTokenizer.from_pretrained(ARCEE).batch_decode(made)
    assert type(model(**inputs).logits) is type(made)


def test_outputs_of_tensors_are_tensors_of_the_dtype_of_the_model() -> None:
    model = HeliumForCausalLM.from_pretrained(HELIUM, dtype=torch.bfloat16)
    embeds = torch.randn(1, 3, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    found = model(inputs_embeds=embeds, **asked)
    exact = model(inputs_embeds=embeds.detach().float().numpy(), **asked)
    for theirs, ours in ((found.logits, exact.logits), (found.hidden_states[1], exact.hidden_states[1])):
        assert theirs.dtype == torch.bfloat16
        assert np.array_equal(theirs.float().numpy(), ours)
    assert found.attentions[0].shape == exact.attentions[0].shape
    made = model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert isinstance(made.sequences, torch.Tensor)
    assert [type(step) for step in made.scores] == [torch.Tensor] * 2
