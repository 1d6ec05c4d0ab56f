"""What a user gets wrong is answered by one sentence: what it was, where, and what would be right."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, tiny_config, tiny_model

import refllm
from refllm.errors import CheckpointError, ConfigError, InputError, RefllmError
from refllm.forward.model import Model
from refllm.models import families
from refllm.models.auto import AutoModelForCausalLM, AutoModelForQuestionAnswering, load
from refllm.precision import POLICIES, arithmetic

IDS = np.array([[1, 2, 3], [4, 5, 6]])
EMBEDS = np.ones((2, 3, 16))


@cache
def model_of(name: str = "LlamaForCausalLM") -> Model:
    return tiny_model(name)


def message_of(error: type[Exception], call: Callable[[], Any]) -> str:
    """The message of the error that `call` raises: one sentence on one line, and exactly this class."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert text
    assert text == text.strip()
    assert "\n" not in text
    assert len(text) < 300
    assert not text.endswith(".")
    return text


def check(error: type[Exception], call: Callable[[], Any], *parts: str) -> None:
    text = message_of(error, call)
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


# -------------------------------------------------------------------------------------------------- tokens, embeddings

WRONG_TOKENS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "neither": ({}, ("exactly one of input_ids and inputs_embeds",)),
    "both": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, ("exactly one of input_ids and inputs_embeds",)),
    "too large": ({"input_ids": [[0, VOCAB]]}, ("input_ids", f"token id {VOCAB}", f"0..{VOCAB - 1}", "vocab_size")),
    "negative": ({"input_ids": [[-1, 0]]}, ("input_ids", "token id -1", f"0..{VOCAB - 1}")),
    "-100": ({"input_ids": [[0, -100]]}, ("token id -100",)),
    "float": ({"input_ids": IDS.astype(float)}, ("input_ids", "expected integers", "float64")),
    "bool": ({"input_ids": IDS > 2}, ("input_ids", "expected integers", "bool")),
    "one axis": ({"input_ids": IDS[0]}, ("input_ids", "[batch, sequence]", "(3,)")),
    "three axes": ({"input_ids": IDS[None]}, ("input_ids", "[batch, sequence]", "(1, 2, 3)")),
    "a number": ({"input_ids": 5}, ("input_ids", "[batch, sequence]", "()")),
    "text": ({"input_ids": "Once upon"}, ("input_ids", "expected real numbers", "str")),
    "ragged": ({"input_ids": [[1, 2], [3]]}, ("input_ids", "equally long lists")),
    "holes": ({"input_ids": [[1, None]]}, ("input_ids", "expected real numbers", "object")),
    "empty prompt": ({"input_ids": np.zeros((1, 0), int)}, ("input_ids", "(1, 0)", "no tokens", "at least one")),
    "empty batch": ({"input_ids": np.zeros((0, 3), int)}, ("input_ids", "(0, 3)", "at least one")),
    "empty list": ({"input_ids": [[]]}, ("input_ids", "no tokens")),
    "embeds width": ({"inputs_embeds": np.ones((2, 3, 15))}, ("inputs_embeds", "15", "hidden_size is 16")),
    "embeds axes": ({"inputs_embeds": np.ones((3, 16))}, ("inputs_embeds", "[batch, sequence, E]", "(3, 16)")),
    "embeds empty": ({"inputs_embeds": np.ones((2, 0, 16))}, ("inputs_embeds", "no tokens")),
    "embeds text": ({"inputs_embeds": np.full((1, 1, 16), "a")}, ("inputs_embeds", "expected real numbers")),
    "embeds complex": ({"inputs_embeds": np.ones((1, 1, 16), complex)}, ("inputs_embeds", "complex128")),
}


@pytest.mark.parametrize("kind", WRONG_TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_cannot_be_are_refused(family: str, kind: str) -> None:
    arguments, parts = WRONG_TOKENS[kind]
    check(InputError, lambda: model_of(f"{family}ForCausalLM")(**arguments), *parts)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint64, np.int64])
def test_token_ids_may_be_integers_of_any_width(dtype: type) -> None:
    model = model_of()
    np.testing.assert_array_equal(model(IDS.astype(dtype)).logits, model(IDS.tolist()).logits)


# ----------------------------------------------------------------------------------------------------- masks, positions

WRONG_MASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rows": (np.ones((3, 3)), ("[2, 3]", "(3, 3)")),
    "one row for two": (np.ones((1, 3)), ("[2, 3]", "(1, 3)")),
    "one axis": (np.ones(3), ("[2, 3]", "(3,)")),
    "three axes": (np.ones((2, 3, 3)), ("[2, 3]", "[2 or 1, 4 or 1, 3, 3]", "(2, 3, 3)")),
    "4-D queries": (np.ones((2, 1, 2, 3), bool), ("(2, 1, 2, 3)", "[2 or 1, 4 or 1, 3, 3]", "axis 2")),
    "4-D keys": (np.ones((2, 1, 3, 4), bool), ("(2, 1, 3, 4)", "axis 3")),
    "4-D heads": (np.ones((2, 3, 3, 3), bool), ("(2, 3, 3, 3)", "axis 1")),
    "4-D rows": (np.ones((3, 1, 3, 3), bool), ("(3, 1, 3, 3)", "axis 0")),
    "4-D integers": (np.ones((2, 1, 3, 3), int), ("4-D mask is bool", "float (added)", "int64")),
    "text": ([["yes", "no", "no"]] * 2, ("expected real numbers",)),
    "ragged": ([[1, 1, 1], [1]], ("equally long lists",)),
}


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_masks_that_do_not_fit_are_refused(kind: str) -> None:
    mask, parts = WRONG_MASKS[kind]
    check(InputError, lambda: model_of()(IDS, mask), "attention_mask", *parts)


WRONG_POSITIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "one axis": (np.arange(3), ("[2 or 1, 3]", "(3,)")),
    "rows": (np.zeros((3, 3), int), ("[2 or 1, 3]", "(3, 3)")),
    "columns": (np.zeros((2, 4), int), ("[2 or 1, 3]", "(2, 4)")),
    "float": (np.zeros((1, 3)), ("expected integers", "float64")),
    "ragged": ([[0, 1, 2], [0]], ("equally long lists",)),
}


@pytest.mark.parametrize("kind", WRONG_POSITIONS)
def test_positions_that_do_not_fit_are_refused(kind: str) -> None:
    positions, parts = WRONG_POSITIONS[kind]
    check(InputError, lambda: model_of()(IDS, position_ids=positions), "position_ids", *parts)


def test_positions_past_the_maximum_only_warn_and_name_the_line_of_the_caller() -> None:
    model = tiny_model("LlamaForCausalLM", max_position_embeddings=4)
    longer = tiny_model("LlamaForCausalLM", max_position_embeddings=5)
    ids = np.arange(5)[None]
    with pytest.warns(UserWarning, match="positions reach beyond max_position_embeddings=4") as record:
        logits = model(ids).logits
    assert [warning.filename for warning in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(longer(ids).logits, logits)
        model(ids[:, :4])


def test_a_long_generation_warns_once() -> None:
    """The text is the same at every step, so that Python shows it once."""
    model = tiny_model("HeliumForCausalLM", max_position_embeddings=4)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        cache_ = model.new_cache()
        for _ in range(8):
            model(np.ones((1, 1), int), past_key_values=cache_)
    assert len(record) == 1


# ------------------------------------------------------------------------------------------- caches, options, arguments


@pytest.mark.parametrize("past", [((1, 2),), [], {}, 5, "cache"], ids=repr)
def test_only_a_cache_is_a_cache(past: Any) -> None:
    found = type(past).__name__
    sentence = "refllm.forward.cache object"
    check(InputError, lambda: model_of()(IDS, past_key_values=past), "past_key_values", sentence, found)


def test_a_cache_of_another_batch_or_model_is_refused() -> None:
    past = model_of()(IDS).past_key_values
    check(InputError, lambda: model_of()(IDS[:1], past_key_values=past), "cache: holds 2 rows", "have 1 rows")
    helium = model_of("HeliumForCausalLM")
    check(InputError, lambda: helium(IDS, past_key_values=past), "cache: holds 2 rows, 2 heads of 8", "2 heads of 4")


WRONG_KEEPS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "float": (1.0, ("expected an int", "float64")),
    "text": ("1", ("expected real numbers",)),
    "flag": (True, ("expected an int", "bool")),
    "too far": (np.array([0, 3]), ("position 3", "0..2")),
    "too far back": (np.array([-4, 0]), ("position -4", "0..2")),
    "rows": (np.array([[0], [1], [2]]), ("[2, n]", "(3, 1)")),
    "mask shape": (np.ones((2, 2), bool), ("bool mask [2, 3]", "(2, 2)")),
    "three axes": (np.zeros((2, 1, 1), int), ("positions [n] or [2, n]", "(2, 1, 1)")),
}


@pytest.mark.parametrize("kind", WRONG_KEEPS)
def test_logits_to_keep_that_select_nothing_are_refused(kind: str) -> None:
    keep, parts = WRONG_KEEPS[kind]
    check(InputError, lambda: model_of()(IDS, logits_to_keep=keep), "logits_to_keep", *parts)


WRONG_LABELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one axis": ({"labels": IDS[0]}, ("labels", "(3,)", "expected (2, 3)")),
    "short": ({"labels": IDS[:, :2]}, ("labels", "(2, 2)", "expected (2, 3)")),
    "rows": ({"labels": IDS[:1]}, ("labels", "(1, 3)", "expected (2, 3)")),
    "float": ({"labels": IDS.astype(float)}, ("labels", "expected integers", "float64")),
    "ragged": ({"labels": [[1, 2, 3], [1]]}, ("labels", "equally long lists")),
    "no token": ({"labels": IDS + VOCAB}, ("labels", f"0..{VOCAB - 1}", "use -100")),
    "shifted short": ({"shift_labels": IDS[:, :2]}, ("shift_labels", "(2, 2)", "expected (2, 3)")),
    "items text": ({"labels": IDS, "num_items_in_batch": "3"}, ("num_items_in_batch", "expected real numbers")),
    "items none": ({"labels": IDS, "num_items_in_batch": 0}, ("num_items_in_batch", "above 0", "found 0")),
    "items many": ({"labels": IDS, "num_items_in_batch": [3, 4]}, ("num_items_in_batch", "one number", "[3, 4]")),
    "ignored": ({"labels": IDS, "ignore_index": 2.5}, ("ignore_index", "expected integers")),
    "ignored many": ({"labels": IDS, "ignore_index": [1, 2]}, ("ignore_index", "one integer")),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_labels_that_do_not_fit_are_refused(kind: str) -> None:
    arguments, parts = WRONG_LABELS[kind]
    check(InputError, lambda: model_of()(IDS, **arguments), *parts)


@pytest.mark.parametrize(
    ("name", "arguments", "takes"),
    [
        ("LlamaModel", {"labels": IDS}, "takes none"),
        ("LlamaModel", {"logits_to_keep": 1}, "takes none"),
        ("LlamaForCausalLM", {"start_positions": [1, 2]}, "labels"),
        ("LlamaForCausalLM", {"attn_mask": IDS}, "labels"),
        ("HeliumForSequenceClassification", {"ignore_index": 1}, "labels, num_items_in_batch"),
        ("HeliumForTokenClassification", {"shift_labels": IDS}, "ignore_index"),
        ("ArceeForQuestionAnswering", {"labels": IDS}, "start_positions, end_positions"),
    ],
)
def test_an_argument_that_a_head_has_no_use_for_is_refused(name: str, arguments: dict[str, Any], takes: str) -> None:
    """Above all a misspelt one, which would otherwise have no effect and no witness."""
    (argument,) = arguments
    head = families.CLASSES[name].head
    check(InputError, lambda: model_of(name)(IDS, **arguments), f"{argument}: not an argument", repr(head), takes)


RIGHT = {
    "input_ids": IDS,
    "attention_mask": np.ones((2, 3)),
    "position_ids": IDS,
    "labels": IDS,
    "shift_labels": IDS,
    "logits_to_keep": np.array([2, 0]),
}


@given(st.dictionaries(st.sampled_from((*RIGHT, "inputs_embeds")), st.booleans(), max_size=3), st.data())
@settings(max_examples=150)
def test_any_arrays_give_a_result_or_an_input_error(wrong: dict[str, bool], data: st.DataObject) -> None:
    """Nothing else, whatever an argument holds: no other exception, and no warning from NumPy."""
    shapes = st.lists(st.sampled_from((0, 1, 2, 3, 4, 16)), max_size=4).map(tuple)
    kinds = st.sampled_from((np.int64, np.uint8, np.float32, bool, np.complex64, "<U2", object))
    arguments: dict[str, Any] = {"input_ids": IDS}
    for name, is_wrong in wrong.items():
        if name in RIGHT and not is_wrong:
            arguments[name] = RIGHT[name]
        else:
            shape = data.draw(st.one_of(st.just((2, 3)), shapes), label=f"{name} shape")
            arguments[name] = np.full(shape, data.draw(st.integers(0, 30))).astype(data.draw(kinds, label=name))
    with warnings.catch_warnings(), suppress(InputError):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="positions reach beyond")
        assert model_of()(**arguments).logits.shape[-1] == VOCAB


# ----------------------------------------------------------------------------------------------------- loading, choices


@pytest.fixture(scope="module")
def helium_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helium")
    tiny_model("HeliumForCausalLM", dtype="float32").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"dtype": "int8"}, ("dtype='int8'", "float64, float32, bfloat16, float16")),
        ({"dtype": None}, ("dtype=None", "float64, float32, bfloat16, float16")),
        ({"policy": "eager"}, ("policy='eager'", *POLICIES)),
        ({"policy": 3}, ("policy=3", *POLICIES)),
        (
            {"policy": "fused", "dtype": "float64"},
            ("policy='fused'", "dtype='float64' is exact", "leave the policy out"),
        ),
        ({"backend": "jax"}, ("backend='jax'", "use one of numpy")),
        ({"device": "cuda"}, ("device='cuda'", "CPU", "leave device out")),
        ({"head": "lm"}, ("head='lm'", "base, causal_lm, sequence_classification")),
        ({"head": "question_answering"}, ("head='question_answering'", "helium", "token_classification")),
    ],
    ids=str,
)
def test_choices_that_do_not_exist_are_refused_with_those_that_do(
    helium_folder: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    check(InputError, lambda: load(helium_folder, **options), *parts)


def test_a_family_without_the_head_of_an_auto_class_is_refused(helium_folder: Path) -> None:
    parts = ("question_answering", "helium", "only base, causal_lm")
    check(InputError, lambda: AutoModelForQuestionAnswering.from_pretrained(helium_folder), *parts)
    check(InputError, lambda: AutoModelForQuestionAnswering.from_config(tiny_config("StableLm")), "stablelm")


@pytest.mark.parametrize("read", [load, AutoModelForCausalLM.from_pretrained, families.HeliumModel.from_pretrained])
def test_a_folder_that_is_not_there_is_named(read: Callable[[Any], Any], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    check(ConfigError, lambda: read(missing), str(missing), "config.json")
    check(ConfigError, lambda: read("kyutai/helium-1-preview-2b"), "kyutai/helium-1-preview-2b")


def test_a_folder_without_a_config_or_without_weights_is_named(helium_folder: Path, tmp_path: Path) -> None:
    check(ConfigError, lambda: load(tmp_path), str(tmp_path), "config.json")
    shutil.copy(helium_folder / "config.json", tmp_path)
    check(CheckpointError, lambda: load(tmp_path), str(tmp_path), "safetensors")


def changed(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of the checkpoint with other values in its config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


@pytest.mark.parametrize("named", ["MistralForCausalLM", "LlamaForCausalLM", "HeliumForQuestionAnswering"])
def test_an_architecture_that_the_family_does_not_have_is_refused_unless_a_head_is_given(
    helium_folder: Path, tmp_path: Path, named: str
) -> None:
    folder = changed(helium_folder, tmp_path, architectures=[named])
    check(ConfigError, lambda: load(folder), "architectures", named, "'helium'", "HeliumForCausalLM", "head=")
    assert type(load(folder, head="causal_lm")) is families.HeliumForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is families.HeliumForCausalLM


@pytest.mark.parametrize("architectures", [None, [], ["HeliumForCausalLM"]])
def test_without_an_architecture_a_checkpoint_is_a_causal_lm(
    helium_folder: Path, tmp_path: Path, architectures: Any
) -> None:
    assert load(changed(helium_folder, tmp_path, architectures=architectures)).head == "causal_lm"


def test_of_several_architectures_the_first_counts(helium_folder: Path, tmp_path: Path) -> None:
    both = ["HeliumForCausalLM", "HeliumModel"]
    for architectures, head in ((both, "causal_lm"), (both[::-1], "base")):
        assert load(changed(helium_folder, tmp_path, architectures=architectures)).head == head


def test_an_unknown_model_type_is_refused_with_those_that_are_known(helium_folder: Path, tmp_path: Path) -> None:
    folder = changed(helium_folder, tmp_path, model_type="mistral")
    with pytest.raises(ConfigError) as caught:
        load(folder)
    text = str(caught.value)  # longer than others: it says what differs from the nearest of them
    for part in ("model_type='mistral'", "helium", "llama", "stablelm", "arcee", "nearest is llama", "have biases"):
        assert part in text


def test_the_checkpoint_of_another_family_is_refused(helium_folder: Path) -> None:
    read = families.LlamaForCausalLM.from_pretrained
    check(ConfigError, lambda: read(helium_folder), "model_type='helium'", "LlamaConfig")


@pytest.mark.parametrize("config", [tiny_config("Helium"), {"vocab_size": 5}, None], ids=lambda c: type(c).__name__)
def test_a_fresh_model_needs_a_config_of_its_family(config: Any) -> None:
    make = families.LlamaForCausalLM.from_config
    check(InputError, lambda: make(config), "LlamaForCausalLM", "expected a LlamaConfig", type(config).__name__)


def test_saving_where_a_file_is_or_in_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check(CheckpointError, lambda: model_of().save_pretrained(tmp_path / "file"), str(tmp_path / "file"))
    check(CheckpointError, lambda: model_of().save_pretrained(tmp_path / "new", dtype="int4"), "'int4'", "bfloat16")


def test_every_error_is_a_refllm_error_and_a_value_error() -> None:
    for error in (ConfigError, CheckpointError, InputError, refllm.errors.TokenizerError):
        assert issubclass(error, RefllmError)
        assert issubclass(error, ValueError)


def test_dtypes_may_be_spelled_as_torch_does() -> None:
    assert arithmetic("torch.bfloat16").dtype == "bfloat16"
    assert re.search("bfloat16", message_of(InputError, lambda: arithmetic("torch.int8")))
