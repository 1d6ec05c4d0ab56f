"""Heads and losses against the Transformers classes, and every rule for where a row ends and what counts."""

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, tiny_model
from torch.nn import functional as F
from transformers.loss.loss_utils import ForTokenClassification
from witness import to_torch

from refllm.errors import InputError
from refllm.forward.model import Model

CAUSAL = [f"{family}ForCausalLM" for family in FAMILIES]
SEQUENCE = [f"{family}ForSequenceClassification" for family in FAMILIES]
TOKEN = [f"{family}ForTokenClassification" for family in FAMILIES]
QUESTION = ["LlamaForQuestionAnswering", "ArceeForQuestionAnswering"]
PAD = 3

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def losses_in_float64() -> Iterator[None]:
    """Transformers upcasts logits to float32 before a loss; here they stay in float64, to compare far below that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@cache
def pair(name: str, **changes: Any) -> tuple[Model, Any]:
    """Our model and Transformers' with the same weights, in float64."""
    model = tiny_model(name, **changes)
    return model, to_torch(model, dtype="float64", widened=True)


def both(name: str, arguments: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """The outputs of both for the same call; what an earlier call inferred is forgotten first."""
    model, witness = pair(name, **changes)
    model.config.problem_type = witness.config.problem_type = changes.get("problem_type")
    tensors = {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in arguments.items()}
    with torch.no_grad():
        expected = witness(**tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**arguments), expected


def close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def tokens(rng: np.random.Generator, rows: int = 2, length: int = 6) -> np.ndarray:
    return rng.integers(0, VOCAB, (rows, length))


# ------------------------------------------------------------------------------------------------------------ causal LM


@pytest.mark.parametrize("name", CAUSAL)
@given(
    seed=seeds,
    part=st.sampled_from((0.0, 0.4)),
    items=st.sampled_from((None, 7, "array")),
    ignored=st.sampled_from((None, 5)),
    shifted=st.booleans(),
)
@settings(max_examples=12)
def test_causal_lm_loss_is_that_of_transformers(
    name: str, seed: int, part: float, items: Any, ignored: int | None, shifted: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids, labels = tokens(rng), tokens(rng)
    labels[rng.random(labels.shape) < part] = -100 if ignored is None else ignored
    call: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if items is not None:
        call["num_items_in_batch"] = np.array(9) if items == "array" else items
    if ignored is not None:
        call["ignore_index"] = ignored
    if shifted:
        call["shift_labels"] = labels[:, ::-1].copy()
    found, expected = both(name, call)
    close(found.loss, expected.loss)
    close(found.logits, expected.logits)


def test_causal_lm_loss_is_the_mean_over_the_labels_that_follow() -> None:
    """Written out: position s is judged by the label of s + 1, and the last position by none."""
    rng = np.random.default_rng(0)
    ids, labels = tokens(rng), tokens(rng)
    labels[0, 2], labels[1, 5] = -100, -100
    out = pair("HeliumForCausalLM")[0](ids, labels=labels)
    losses = [
        -torch.log_softmax(torch.from_numpy(out.logits[b, s]), dim=-1)[labels[b, s + 1]].item()
        for b in range(2)
        for s in range(5)
        if labels[b, s + 1] != -100
    ]
    assert len(losses) == 8
    close(out.loss, np.mean(losses))


def test_the_first_column_of_labels_is_never_used() -> None:
    rng = np.random.default_rng(1)
    ids, labels = tokens(rng), tokens(rng)
    model = pair("LlamaForCausalLM")[0]
    expected = model(ids, labels=labels).loss
    labels[:, 0] = -100
    assert model(ids, labels=labels).loss == expected


def test_padding_counts_in_the_loss_unless_its_labels_are_ignored() -> None:
    """The attention mask changes logits and nothing else."""
    rng = np.random.default_rng(2)
    ids, mask = tokens(rng), np.array([[1] * 6, [1] * 4 + [0] * 2])
    found, expected = both("ArceeForCausalLM", {"input_ids": ids, "labels": ids, "attention_mask": mask})
    close(found.loss, expected.loss)
    rows, targets = found.logits[:, :-1].reshape(10, -1), ids[:, 1:].reshape(10)
    close(found.loss, F.cross_entropy(torch.from_numpy(rows), torch.from_numpy(targets)))


@pytest.mark.parametrize("name", [*CAUSAL, *TOKEN])
def test_nothing_counted_is_nan_as_a_mean_and_0_over_a_given_number(name: str) -> None:
    ids = tokens(np.random.default_rng(3))
    labels = np.full_like(ids, -100)
    found, expected = both(name, {"input_ids": ids, "labels": labels})
    assert np.isnan(found.loss)
    assert torch.isnan(expected.loss)
    assert pair(name)[0](ids, labels=labels, num_items_in_batch=4).loss == 0


def test_shifted_labels_alone_are_enough() -> None:
    rng = np.random.default_rng(4)
    ids, labels = tokens(rng), tokens(rng)
    model = pair("StableLmForCausalLM")[0]
    shifted = np.concatenate([labels[:, 1:], np.full((2, 1), -100)], axis=1)
    assert model(ids, shift_labels=shifted).loss == model(ids, labels=labels).loss


def test_labels_do_not_go_with_logits_to_keep() -> None:
    ids = tokens(np.random.default_rng(5))
    with pytest.raises(InputError, match=r"labels: shape \(2, 6\) for logits of shape \(2, 1, 23\); expected \(2, 1\)"):
        pair("HeliumForCausalLM")[0](ids, labels=ids, logits_to_keep=1)


@pytest.mark.parametrize("name", [*CAUSAL, *TOKEN])
def test_a_label_that_is_no_class_is_an_error(name: str) -> None:
    ids = tokens(np.random.default_rng(6))
    labels = np.zeros_like(ids)
    classes = VOCAB if name in CAUSAL else 2
    for bad in (classes, -1):
        labels[1, 3] = bad
        with pytest.raises(InputError, match=rf"labels: {bad} is outside 0\.\.{classes - 1}"):
            pair(name)[0](ids, labels=labels)


@pytest.mark.parametrize(
    "keep",
    [
        *(0, 1, 4, 6, 9, -2, -6),
        *(np.array([0, 5, 2]), np.array([-1]), np.array([[4, 1], [5, 5]]), np.array([[True, False] * 3] * 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_to_keep_selects_what_transformers_selects(name: str, keep: Any) -> None:
    ids = tokens(np.random.default_rng(7))
    found, expected = both(name, {"input_ids": ids, "logits_to_keep": keep})
    assert found.logits.shape == tuple(expected.logits.shape)
    close(found.logits, expected.logits)


# ---------------------------------------------------------------------------------------------- sequence classification


def end_of_row(ids: np.ndarray, pad: int) -> int:
    """The rightmost position that is not padding; 0 if all are."""
    return max([0, *(s for s, token in enumerate(ids) if token != pad)])


@pytest.mark.parametrize("name", SEQUENCE)
@given(seed=seeds, rows=st.integers(1, 4), length=st.integers(1, 6), part=st.sampled_from((0.3, 0.7, 1.0)))
@settings(max_examples=15)
def test_a_row_is_judged_at_its_last_token_that_is_not_padding(
    name: str, seed: int, rows: int, length: int, part: float
) -> None:
    """Padding before, between and after the tokens, and rows of nothing else."""
    rng = np.random.default_rng(seed)
    ids = tokens(rng, rows, length)
    ids[rng.random(ids.shape) < part] = PAD
    found, expected = both(name, {"input_ids": ids})
    close(found.logits, expected.logits)
    model = pair(name)[0]
    everywhere = tiny_model(name.replace("Sequence", "Token"))
    hidden = everywhere(ids, output_hidden_states=True).hidden_states[-1]
    at = [end_of_row(row, PAD) for row in ids]
    close(found.logits, hidden[np.arange(rows), at] @ model.weights["score.weight"].T)


@pytest.mark.parametrize("name", SEQUENCE)
def test_the_attention_mask_does_not_move_the_end_of_a_row(name: str) -> None:
    rng = np.random.default_rng(8)
    ids = np.where(tokens(rng) == PAD, 4, tokens(rng))
    ids[ids == PAD] = 4
    mask = np.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found, expected = both(name, {"input_ids": ids, "attention_mask": mask})
    close(found.logits, expected.logits)
    assert np.abs(found.logits[1] - both(name, {"input_ids": ids[1:, :3]})[0].logits[0]).max() > 1e-6


def test_a_row_of_padding_alone_is_judged_at_its_first_position() -> None:
    """Equal tokens make equal rows, so a mask that hides the first position has to tell it from the others."""
    ids, mask = np.full((2, 4), PAD), np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    found, expected = both(SEQUENCE[1], {"input_ids": ids, "attention_mask": mask})
    close(found.logits, expected.logits)
    assert np.abs(found.logits[0] - found.logits[1]).max() > 1e-6


def test_the_end_token_as_padding_is_skipped_too() -> None:
    name = SEQUENCE[1]
    found, expected = both(name, {"input_ids": np.array([[5, 6, 2, 2], [7, 2, 8, 2]])}, pad_token_id=2)
    close(found.logits, expected.logits)
    one, _ = both(name, {"input_ids": np.array([[5, 6]])}, pad_token_id=2)
    close(found.logits[0], one.logits[0])


@pytest.mark.parametrize("name", SEQUENCE)
def test_without_a_pad_id_one_row_ends_at_its_last_position(name: str) -> None:
    ids = np.array([[5, 6, PAD, PAD]])
    found, expected = both(name, {"input_ids": ids}, pad_token_id=None)
    close(found.logits, expected.logits)
    with_pad, _ = both(name, {"input_ids": ids})
    assert np.abs(found.logits - with_pad.logits).max() > 1e-6


@pytest.mark.parametrize("name", SEQUENCE)
def test_without_a_pad_id_the_ends_of_several_rows_are_unknown(name: str) -> None:
    model, witness = pair(name, pad_token_id=None)
    ids = np.array([[5, 6], [7, 8]])
    with pytest.raises(InputError, match="pad_token_id is not set, so where the rows of a batch end cannot be told"):
        model(ids)
    with pytest.raises(ValueError, match="no padding token"):
        witness(torch.tensor(ids))


@pytest.mark.parametrize("name", SEQUENCE)
def test_embeddings_are_judged_at_the_last_position_with_a_warning(name: str) -> None:
    model, witness = pair(name)
    ids = np.array([[5, 6, PAD], [7, PAD, PAD]])
    embeds = model.weights["embed_tokens.weight"][ids]
    with pytest.warns(UserWarning, match="inputs_embeds do not show which positions are padding"):
        found = model(inputs_embeds=embeds).logits
    with torch.no_grad():
        close(found, witness(inputs_embeds=torch.from_numpy(embeds)).logits)


def test_a_pad_id_of_minus_1_pads_nothing() -> None:
    found, expected = both(SEQUENCE[2], {"input_ids": np.array([[5, 6, VOCAB - 1], [7, 8, 9]])}, pad_token_id=-1)
    close(found.logits, expected.logits)


def problem(kind: str, rng: np.random.Generator, rows: int) -> tuple[dict[str, Any], np.ndarray]:
    """(config changes, labels) of one row of the table of problem types."""
    return {
        "one output": ({"num_labels": 1}, rng.standard_normal(rows)),
        "one output, column": ({"num_labels": 1}, rng.standard_normal((rows, 1))),
        "one output, integers": ({"num_labels": 1}, rng.integers(0, 5, rows)),
        "classes": ({"num_labels": 4}, rng.integers(0, 4, rows)),
        "classes, column": ({"num_labels": 4}, rng.integers(0, 4, (rows, 1))),
        "flags": ({"num_labels": 4}, rng.integers(0, 2, (rows, 4)).astype(np.float64)),
        "several numbers": ({"num_labels": 3, "problem_type": "regression"}, rng.standard_normal((rows, 3))),
        "flags of one class": (
            {"num_labels": 1, "problem_type": "multi_label_classification"},
            rng.integers(0, 2, (rows, 1)).astype(np.float64),
        ),
    }[kind]


INFERRED = {
    "one output": "regression",
    "one output, column": "regression",
    "one output, integers": "regression",
    "classes": "single_label_classification",
    "classes, column": "single_label_classification",
    "flags": "multi_label_classification",
    "several numbers": "regression",
    "flags of one class": "multi_label_classification",
}


@pytest.mark.parametrize("kind", INFERRED)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SEQUENCE)
def test_sequence_loss_and_the_problem_type_inferred_for_it_are_those_of_transformers(
    name: str, rows: int, kind: str
) -> None:
    rng = np.random.default_rng(rows)
    changes, labels = problem(kind, rng, rows)
    found, expected = both(name, {"input_ids": tokens(rng, rows), "labels": labels}, **changes)
    close(found.loss, expected.loss)
    model, witness = pair(name, **changes)
    assert model.config.problem_type == witness.config.problem_type == INFERRED[kind]


def test_class_labels_may_be_integers_of_any_width() -> None:
    """Torch itself takes int64 only."""
    ids, labels = tokens(np.random.default_rng(9), 4), np.array([1, 0, 2, -100])
    losses = set()
    for dtype in (np.int8, np.int32, np.int64):
        model = tiny_model(SEQUENCE[0], num_labels=3)
        losses.add(float(model(ids, labels=labels.astype(dtype)).loss))
        assert model.config.problem_type == "single_label_classification"
    assert len(losses) == 1


def test_sequence_loss_ignores_labels_of_minus_100_and_the_number_of_items() -> None:
    rng = np.random.default_rng(9)
    ids = tokens(rng, 4)
    labels = np.array([1, -100, 0, -100])
    for call in ({"labels": labels}, {"labels": labels, "num_items_in_batch": 77}):
        found, expected = both(SEQUENCE[0], {"input_ids": ids, **call}, num_labels=3)
        close(found.loss, expected.loss)
    found, expected = both(SEQUENCE[0], {"input_ids": ids, "labels": np.full(4, -100)}, num_labels=3)
    assert np.isnan(found.loss)
    assert torch.isnan(expected.loss)


def test_an_inferred_problem_type_stays_for_later_calls() -> None:
    """Integers that were classes once are flags after a call with floats."""
    ids = tokens(np.random.default_rng(10))
    model = tiny_model(SEQUENCE[3], num_labels=2)
    flags = np.array([[0, 1], [1, 0]])
    first = model(ids, labels=flags.astype(float)).loss
    assert model.config.problem_type == "multi_label_classification"
    assert model(ids, labels=flags).loss == first


def test_a_call_that_fails_infers_nothing() -> None:
    ids = tokens(np.random.default_rng(11))
    model = tiny_model(SEQUENCE[1], num_labels=3)
    says = r"labels: shape \(2,\) for multi_label_classification with logits of shape \(2, 3\); they must be equal"
    with pytest.raises(InputError, match=says):
        model(ids, labels=np.array([0.0, 1.0]))
    assert model.config.problem_type is None
    assert np.isfinite(model(ids, labels=np.array([0, 1])).loss)


@pytest.mark.parametrize(
    ("changes", "labels", "says"),
    [
        ({"num_labels": 3}, [0, 1, 2], "labels: 3 for a batch of 2; expected one per row"),
        ({"num_labels": 3}, [0, 3], r"labels: 3 is outside 0\.\.2"),
        ({"num_labels": 1}, [0.0, 1.0, 2.0], r"labels: shape \(3,\) for regression with logits of shape \(2,\)"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, [0.0, 1.0], "labels: expected integers"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[1, 0], [0, 1]], r"labels: shape \(2, 2\)"),
    ],
)
def test_labels_that_do_not_fit_the_problem_are_refused(changes: dict[str, Any], labels: Any, says: str) -> None:
    model = tiny_model(SEQUENCE[1], **changes)
    with pytest.raises(InputError, match=says):
        model(tokens(np.random.default_rng(12)), labels=np.array(labels))


# ------------------------------------------------------------------------------------------------- token classification


@pytest.mark.parametrize("name", TOKEN)
@given(seed=seeds, part=st.sampled_from((0.0, 0.5)), classes=st.sampled_from((1, 2, 5)))
@settings(max_examples=12)
def test_token_classification_judges_every_position_unshifted(name: str, seed: int, part: float, classes: int) -> None:
    rng = np.random.default_rng(seed)
    ids, labels = tokens(rng), rng.integers(0, classes, (2, 6))
    labels[rng.random(labels.shape) < part] = -100
    labels[0, 0] = 0
    found, expected = both(name, {"input_ids": ids, "labels": labels}, num_labels=classes)
    close(found.logits, expected.logits)
    close(found.loss, expected.loss)


@pytest.mark.parametrize("name", TOKEN)
@given(seed=seeds, items=st.integers(1, 20), ignored=st.sampled_from((-100, 1)))
@settings(max_examples=5)
def test_token_loss_takes_the_options_of_its_loss_function(name: str, seed: int, items: int, ignored: int) -> None:
    """Transformers' class does not hand them on to its loss function; here they reach it."""
    rng = np.random.default_rng(seed)
    ids, labels = tokens(rng), rng.integers(0, 2, (2, 6))
    model, witness = pair(name)
    out = model(ids, labels=labels, num_items_in_batch=items, ignore_index=ignored)
    expected = ForTokenClassification(
        torch.from_numpy(out.logits),
        torch.from_numpy(labels),
        witness.config,
        num_items_in_batch=items,
        ignore_index=ignored,
    )
    close(out.loss, expected)


def test_dropout_settings_change_nothing_outside_training() -> None:
    ids = tokens(np.random.default_rng(13))
    plain = tiny_model("StableLmForTokenClassification")(ids).logits
    dropout = dict.fromkeys(("classifier_dropout", "hidden_dropout", "attention_dropout"), 0.5)
    dropping = tiny_model("StableLmForTokenClassification", **dropout)
    np.testing.assert_array_equal(dropping(ids).logits, plain)


# --------------------------------------------------------------------------------------------------- question answering


@pytest.mark.parametrize("name", QUESTION)
@given(seed=seeds, rows=st.integers(1, 4), column=st.booleans(), items=st.sampled_from((None, 3)), data=st.data())
@settings(max_examples=25)
def test_question_answering_loss_is_that_of_transformers(
    name: str, seed: int, rows: int, column: bool, items: int | None, data: st.DataObject
) -> None:
    """Positions before 0 count as 0, positions at or beyond the length 6 do not count, none left is NaN."""
    positions = st.lists(st.integers(-2, 8), min_size=rows, max_size=rows)
    start, end = (np.array(data.draw(positions)) for _ in range(2))
    ids = tokens(np.random.default_rng(seed), rows)
    call: dict[str, Any] = {"input_ids": ids, "start_positions": start, "end_positions": end}
    if column:
        call |= {"start_positions": start[:, None], "end_positions": end[:, None]}
    if items is not None:
        call["num_items_in_batch"] = items
    found, expected = both(name, call)
    close(found.start_logits, expected.start_logits)
    close(found.end_logits, expected.end_logits)
    close(found.loss, expected.loss)
    if (start >= 6).all() and items is None:
        assert np.isnan(found.loss)


def test_answer_positions_are_clamped() -> None:
    ids = tokens(np.random.default_rng(14), 3)
    model = pair(QUESTION[0])[0]

    def loss(start: list[int], end: list[int]) -> float:
        return float(model(ids, start_positions=np.array(start), end_positions=np.array(end)).loss)

    assert loss([-5, 1, 2], [0, 1, 2]) == loss([0, 1, 2], [0, 1, 2])
    assert loss([6, 1, 2], [0, 1, 2]) == loss([1000, 1, 2], [0, 1, 2])
    assert loss([5, 1, 2], [0, 1, 2]) != loss([6, 1, 2], [0, 1, 2])


@pytest.mark.parametrize("given_position", ["start_positions", "end_positions"])
def test_one_position_alone_makes_no_loss(given_position: str) -> None:
    ids = tokens(np.random.default_rng(15))
    found, expected = both(QUESTION[1], {"input_ids": ids, given_position: np.array([1, 2])})
    assert found.loss is None
    assert expected.loss is None


def test_answer_positions_fit_the_batch() -> None:
    ids = tokens(np.random.default_rng(16))
    with pytest.raises(InputError, match="end_positions: 3 for a batch of 2"):
        pair(QUESTION[0])[0](ids, start_positions=np.array([1, 2]), end_positions=np.array([1, 2, 3]))


# ------------------------------------------------------------------------------------------------------------ all heads


@pytest.mark.parametrize("name", [*CAUSAL, *SEQUENCE, *TOKEN, *QUESTION])
def test_without_labels_there_is_no_loss(name: str) -> None:
    out = pair(name)[0](tokens(np.random.default_rng(17)))
    assert out.loss is None
    assert "loss" not in out


@pytest.mark.parametrize("name", ["HeliumForCausalLM", "LlamaForTokenClassification", "ArceeForQuestionAnswering"])
def test_a_loss_under_emulation_is_computed_in_float32_from_rounded_logits(name: str) -> None:
    model = tiny_model(name, dtype="bfloat16")
    rng = np.random.default_rng(18)
    ids, labels = tokens(rng), rng.integers(0, 2, (2, 6))
    if name in QUESTION:
        out = model(ids, start_positions=labels[:, 0], end_positions=labels[:, 1])
        rows = torch.from_numpy(np.concatenate([out.start_logits, out.end_logits]))
        expected = F.cross_entropy(rows, torch.from_numpy(labels[:, :2].T.reshape(-1)))
    else:
        out = model(ids, labels=labels)
        shift = 1 if name in CAUSAL else 0
        rows = torch.from_numpy(out.logits[:, : 6 - shift].reshape(2 * (6 - shift), -1))
        expected = F.cross_entropy(rows, torch.from_numpy(labels[:, shift:].reshape(-1)))
    assert rows.dtype == torch.float32
    close(out.loss, expected, 1e-6)
