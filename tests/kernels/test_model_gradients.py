"""The gradients of the fast models on Torch, against those of the definitions in float64."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from refllm.errors import InputError
from refllm.inputs import to_numpy
from refllm.kernels.models.fast_model import FastModel
from refllm.strategies.small_models import EVERY_FLAG, FAMILIES, build, model_class, small_config

PAD = 3
RNG = np.random.default_rng(2)
IDS = RNG.integers(4, 23, (2, 7))
LABELS = np.where(RNG.random((2, 7)) < 0.3, -100, IDS)
LEFT = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
TWO = np.array([0, 0, 0, 1, 1, 1, 1])  # sequences of three and of four tokens in a row
SEEN = ((TWO[:, None] == TWO) & np.tri(7, dtype=bool))[None, None]
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"input_ids": IDS, "labels": IDS},
    "padded": {"input_ids": np.where(LEFT == 0, PAD, IDS), "attention_mask": LEFT, "labels": LABELS},
    "packed": {"input_ids": IDS, "position_ids": np.array([[0, 1, 2, 0, 1, 2, 3]]), "labels": LABELS},
    "mask of pairs": {"input_ids": IDS, "attention_mask": SEEN, "labels": LABELS},
    "added mask": {"input_ids": IDS, "attention_mask": np.where(SEEN, 0.5 * np.eye(7), -np.inf), "labels": LABELS},
    "embeds": {"inputs_embeds": RNG.standard_normal((2, 7, 32)), "labels": LABELS, "num_items_in_batch": 5},
}  # fmt: skip
LAYERS = [(family, number) for family in FAMILIES for number in range(len(EVERY_FLAG[family]))]


@cache
def pair(family: str, flags: int, head: str = "causal_lm", **more: Any) -> tuple[Any, FastModel]:
    """The exact model, and the fast one with its weights."""
    config = small_config(family, hidden_size=32, intermediate_size=24, vocab_size=23, head_dim=8, pad_token_id=PAD,
                          **{"num_labels": 3, **EVERY_FLAG[family][flags], **more})  # fmt: skip
    made = build(model_class(family, head), config, 5, "float32")
    exact = build(model_class(family, head), config, {name: x.astype(float) for name, x in made.weights.items()})
    return exact, FastModel.of(made, backend="torch", device="cpu")


def same(found: Any, expected: Any) -> None:
    """Up to float32 roundings, of the largest element."""
    assert found.loss.item() == pytest.approx(float(expected.loss), rel=1e-6)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].shape == gradient.shape
        error = np.abs(to_numpy(found.gradients[name]) - gradient).max()
        assert error <= 1e-5 * max(1e-2, np.abs(gradient).max()), name


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize(("family", "flags"), LAYERS)
def test_gradients_are_those_of_the_definitions(family: str, flags: int, how: str) -> None:
    exact, fast = pair(family, flags, tie_word_embeddings=how in ("plain", "embeds"))
    same(fast.gradients(**CALLS[how]), exact.gradients(**CALLS[how]))


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("sequence_classification", {"labels": np.array([2, 0])}),
        ("sequence_classification", {"labels": np.array([[0.0, 1, 1], [1, 0, 0]])}),
        ("sequence_classification", {"labels": np.array([0.3, -2.0])}),
        ("token_classification", {"labels": np.where(LABELS < 0, -100, LABELS % 3)}),
        ("question_answering", {"start_positions": np.array([1, 4]), "end_positions": np.array([6, 9])}),
    ],
)
def test_every_head_and_loss(head: str, labels: dict[str, np.ndarray]) -> None:
    more = {"num_labels": 1} if labels.get("labels", LABELS).dtype == float and labels["labels"].ndim == 1 else {}
    exact, fast = pair("arcee" if head == "question_answering" else "helium", 0, head, **more)
    exact.config.problem_type = fast.config.problem_type = None
    same(fast.gradients(IDS, **labels), exact.gradients(IDS, **labels))


@pytest.mark.parametrize(("family", "flags", "how"), [("helium", 0, "padded"), ("stablelm", 1, "plain"),
                                                      ("arcee", 0, "mask of pairs")])  # fmt: skip
def test_the_gradients_of_the_kernels_are_those_of_the_definitions(family: str, flags: int, how: str) -> None:
    """Interpreted on the CPU: norms, rotations, attention, activations and the loss, forward and backward."""
    exact, _ = pair(family, flags)
    kernels = FastModel.of(exact, dtype="float32", backend="triton", device="cpu")
    same(kernels.gradients(**CALLS[how]), exact.gradients(**CALLS[how]))


def test_frozen_and_accumulated() -> None:
    exact, fast = pair("stablelm", 1)
    frozen = ["model.layers.0.self_attn.k_proj.*", "model.embed_tokens.weight"]
    halves: Any = {}
    for row in (slice(0, 1), slice(1, 2)):
        call = {"labels": torch.from_numpy(IDS[row]), "num_items_in_batch": 12, "accumulated": halves, "frozen": frozen}
        halves = fast.gradients(torch.from_numpy(IDS[row]), **call).gradients
    expected = exact.gradients(IDS, labels=IDS, frozen=frozen)
    same(type(expected)(torch.tensor(expected.loss), halves), expected)
    assert fast.gradients(IDS, labels=IDS, frozen=["*"]).gradients == {}
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not fast(IDS).logits.requires_grad


def test_bfloat16_gradients_are_near_the_exact_ones() -> None:
    exact, _ = pair("llama", 0)
    narrow = FastModel.of(exact, dtype="bfloat16", backend="torch", device="cpu")
    expected = exact.gradients(IDS, labels=IDS).gradients
    for name, gradient in narrow.gradients(IDS, labels=IDS).gradients.items():
        assert gradient.dtype == torch.bfloat16
        assert np.linalg.norm(to_numpy(gradient) - expected[name]) < 0.05 * np.linalg.norm(expected[name]), name


def test_what_a_fast_model_cannot_do_is_said() -> None:
    exact, fast = pair("helium", 0)
    triton = FastModel.of(exact, dtype="float32", backend="triton", device="cpu")
    for call, said in (
        (lambda: triton.gradients(IDS, labels=IDS, recorder=object()), "backend triton shows no named values; load"),
        (lambda: fast.gradients(IDS, labels=IDS, recorder=object()), "backend torch shows no named values; load"),
        (lambda: fast.gradients(IDS), "gradients: give labels, which the loss is made of"),
        (fast.gradient_checkpointing_enable, "gradient_checkpointing_enable: backend torch keeps every value; load"),
    ):
        with pytest.raises(InputError, match=said):
            call()
