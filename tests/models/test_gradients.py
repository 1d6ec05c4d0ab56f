"""The gradients of whole models: Transformers' in float64, differences of the loss, and what they keep.

Transformers is widened as for the forward pass, and casts nothing to float32 before a loss.
"""

import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from witness import numpy_of, to_torch

from refllm import load
from refllm.errors import InputError
from refllm.forward.gradients import EMBEDDINGS
from refllm.forward.model import Model
from refllm.forward.operators import Operators
from refllm.models.own_page import in_use
from refllm.ops.linear_backward import linear_backward
from refllm.strategies.models import configs, key_masks, packed_positions, paddings
from refllm.strategies.small_models import EVERY_FLAG, FAMILIES, build, model_class, small_config
from refllm.training.optimisers import AdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*beyond max_position_embeddings"),
    pytest.mark.filterwarnings("ignore:.*factor=.* is used, although"),
    pytest.mark.filterwarnings("ignore:inputs_embeds do not show which"),
]

PAGES = Path(__file__).parents[2] / "docs" / "pages"
EXACT = 1e-10
PAD, CLASSES = 3, 3
LAYERS = [(family, number) for family in FAMILIES for number in range(len(EVERY_FLAG[family]))]


@pytest.fixture(scope="module", autouse=True)
def losses_in_float64() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@cache
def pair(family: str, flags: int, head: str, attention: str = "sdpa", **more: Any) -> tuple[Any, Any]:
    """Our model and Transformers' with the same weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 23, "head_dim": 4}
    config = small_config(
        family, **sizes, pad_token_id=PAD, **{"num_labels": CLASSES, **EVERY_FLAG[family][flags], **more}
    )
    ours = build(model_class(family, head), config, 5)
    return ours, to_torch(ours, dtype="float64", attention=attention, widened=True)


def theirs(model: Any, call: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """Loss and gradients by autograd."""
    tensors = {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in call.items()}
    model.zero_grad()
    if EMBEDDINGS in tensors:
        tensors[EMBEDDINGS].requires_grad_()
    loss = model(**tensors, use_cache=False).loss
    loss.backward()
    found = {key: numpy_of(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    return loss, found | ({EMBEDDINGS: numpy_of(tensors[EMBEDDINGS].grad)} if EMBEDDINGS in tensors else {})


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = EXACT) -> None:
    """Every tensor to `tolerance` of its largest element."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape
        assert np.abs(found[name] - gradient).max() <= tolerance * max(1e-3, np.abs(gradient).max()), name


def against_transformers(ours: Any, witness: Any, call: dict[str, Any]) -> None:
    ours.config.problem_type = witness.config.problem_type = None
    loss, expected = theirs(witness, call)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in expected.values())
    found = ours.gradients(**call)
    assert abs(found.loss - loss.item()) <= EXACT * max(1, abs(loss.item()))
    same(found.gradients, expected)


RNG = np.random.default_rng(1)
IDS = RNG.integers(4, 23, (2, 7))
LABELS = np.where(RNG.random((2, 7)) < 0.3, -100, IDS)
LEFT = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
PADDED = np.where(LEFT == 0, PAD, IDS)
TWO = np.array([0, 0, 0, 1, 1, 1, 1])  # sequences of three and of four tokens in a row, seen both ways
SEEN = np.stack([TWO[:, None] == TWO, np.tri(7, k=2, dtype=bool)])[:, None]
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"input_ids": IDS, "labels": IDS},
    "padded": {"input_ids": PADDED, "attention_mask": LEFT, "labels": np.where(LEFT == 0, -100, LABELS)},
    "packed": {"input_ids": IDS, "position_ids": np.array([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]]),
               "labels": LABELS},
    "embeds": {"inputs_embeds": RNG.standard_normal((2, 7, 16)), "labels": LABELS, "num_items_in_batch": 5},
    "mask of pairs": {"input_ids": IDS, "attention_mask": SEEN, "labels": LABELS},
    "added mask": {"input_ids": IDS, "attention_mask": np.where(SEEN, RNG.standard_normal((7, 7)), -np.inf),
                   "labels": LABELS},
}  # fmt: skip


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize(("family", "flags"), LAYERS)
def test_gradients_are_those_of_transformers(family: str, flags: int, how: str) -> None:
    tied = how in ("plain", "embeds")
    against_transformers(*pair(family, flags, "causal_lm", tie_word_embeddings=tied), CALLS[how])


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
    family = "arcee" if head == "question_answering" else "helium"
    more = {"num_labels": 1} if labels.get("labels", LABELS).dtype == float and labels["labels"].ndim == 1 else {}
    ids = np.where(np.arange(7) > np.array([[4], [6]]), PAD, IDS)
    against_transformers(*pair(family, 0, head, **more), {"input_ids": ids, **labels})


# -- without a witness -------------------------------------------------------------------------------------------------


def moved(model: Any, direction: dict[str, np.ndarray], step: float) -> Any:
    """The model with its tensors moved. direction: by the names of files."""
    names = dict(zip(model.weights.shapes, model.weights.renamed(model.prefix), strict=True))
    tensors = {name: model.weights[name] + step * direction.get(key, 0) for name, key in names.items()}
    return build(type(model), model.config, tensors)


def along(model: Any, call: dict[str, Any], direction: dict[str, np.ndarray], step: float = 1e-3) -> float:
    """The derivative of the loss along a direction, by differences of four points."""
    losses = [float(moved(model, direction, n * step)(**call, use_cache=False).loss) for n in (-2, -1, 1, 2)]
    return (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)


def drawn_labels(data: st.DataObject, config: Any, ids: np.ndarray, seed: int) -> tuple[str, dict[str, np.ndarray]]:
    """A head that the family has, and labels of one of its losses; the config is told of its classes."""
    heads = ["causal_lm", "sequence_classification", "token_classification"]
    heads += ["question_answering"] * (config.model_type in ("arcee", "llama"))
    head, rng, (B, S) = data.draw(st.sampled_from(heads)), np.random.default_rng(seed), ids.shape
    if head == "question_answering":
        end = rng.integers(0, S + 1, B)  # S and beyond are not counted, and one has to be
        end[0] %= S
        return head, {"start_positions": rng.integers(0, S, B), "end_positions": end}
    if head == "causal_lm":
        labels = np.where(rng.random((B, S)) < 0.2, -100, ids)
        labels[0, -1] = ids[0, -1]
        return head, {"labels": labels}
    config.num_labels = data.draw(st.integers(2, 4))
    if head == "token_classification":
        labels = np.where(rng.random((B, S)) < 0.2, -100, rng.integers(0, config.num_labels, (B, S)))
        labels[0, 0] = 0
        return head, {"labels": labels}
    config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    loss = data.draw(st.sampled_from(["one of several", "several", "a number"]))
    if loss == "a number":
        config.num_labels = 1
        return head, {"labels": rng.standard_normal(B)}
    if loss == "several":
        return head, {"labels": rng.integers(0, 2, (B, config.num_labels)).astype(float)}
    return head, {"labels": rng.integers(0, config.num_labels, B)}


def drawn_mask(data: st.DataObject, B: int, S: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """None, padding, holes, packed sequences, or pairs of positions, as bool or as numbers that are added."""
    match data.draw(st.sampled_from(["none", "padded", "holes", "packed", "pairs", "added"])):
        case "none":
            return {}
        case "packed":
            return {"position_ids": data.draw(packed_positions(B, S))}
        case "pairs":
            return {"attention_mask": rng.random((B, 1, S, S)) < 0.6}
        case "added":
            seen = np.tri(S, dtype=bool) & (rng.random((B, 1, S, S)) < 0.8)
            return {"attention_mask": np.where(seen, rng.standard_normal((1, 1, S, S)), -np.inf)}
        case kind:
            return {"attention_mask": data.draw((paddings if kind == "padded" else key_masks)(B, S))}


@given(st.data(), st.integers(0, 2**31))
@settings(max_examples=examples(30, 70))
def test_gradients_are_the_slopes_of_the_loss(data: st.DataObject, seed: int) -> None:
    """Any config with a smooth activation, any head and loss, any mask; checkpointed or not, the same bits."""
    smooth = st.sampled_from(["silu", "gelu", "gelu_new", "mish", "tanh", "sigmoid", "quick_gelu"])
    config = data.draw(
        configs(smallest_head=4, hidden_act=data.draw(smooth), num_hidden_layers=data.draw(st.integers(1, 2)))
    )
    for eps in {"rms_norm_eps", "layer_norm_eps"} & set(vars(config)):
        setattr(config, eps, 0.01)
    rng, (B, S) = np.random.default_rng(seed), (data.draw(st.integers(1, 2)), data.draw(st.integers(2, 6)))
    ids = rng.integers(0, config.vocab_size, (B, S))
    head, labels = drawn_labels(data, config, ids, seed)
    ids[ids == config.pad_token_id] = 1  # its row has no gradient, and moves the loss all the same
    call = {"input_ids": ids, **labels, **drawn_mask(data, B, S, rng)}
    ours = build(model_class(config.model_type, head), config, seed)
    loss, found = ours.gradients(**call)
    assert loss == ours(**call, use_cache=False).loss
    direction = {name: rng.standard_normal(x.shape) / np.sqrt(x.size) for name, x in found.items()}
    if config.pad_token_id is not None:
        direction[f"{ours.prefix}embed_tokens.weight"][config.pad_token_id] = 0
    slope = sum(float((found[name] * d).sum()) for name, d in direction.items())
    size = sum(float(np.linalg.norm(found[name]) * np.linalg.norm(d)) for name, d in direction.items())
    assert abs(slope - along(ours, call, direction)) <= 1e-6 * max(size, 1e-3)
    ours.gradient_checkpointing_enable()
    for name, again in ours.gradients(**call).gradients.items():
        assert again.tobytes() == found[name].tobytes(), name


def test_a_tied_tensor_has_the_sum_of_both_uses() -> None:
    tied = pair("helium", 0, "causal_lm", tie_word_embeddings=True)[0]
    apart_config = type(tied.config).from_dict({**tied.config.to_dict(), "tie_word_embeddings": False})
    tensors = {**dict(tied.weights), "lm_head.weight": tied.weights["embed_tokens.weight"].copy()}
    apart = build(type(tied), apart_config, tensors).gradients(IDS, labels=IDS).gradients
    both = apart.pop("lm_head.weight") + apart["model.embed_tokens.weight"]
    found = tied.gradients(IDS, labels=IDS).gradients
    same(found, {**apart, "model.embed_tokens.weight": both}, 1e-14)


def test_weights_that_are_read_when_they_are_used(tmp_path: Path) -> None:
    """low_memory=True: the same bits, checkpointed too."""
    pair("stablelm", 1, "causal_lm")[0].save_pretrained(tmp_path, dtype="float32")
    whole = load(tmp_path, dtype="float64").gradients(**CALLS["padded"])
    lazy = load(tmp_path, dtype="float64", low_memory=True)
    for checkpointed in (False, True):
        lazy.is_gradient_checkpointing = checkpointed
        found = lazy.gradients(**CALLS["padded"])
        assert found.loss == whole.loss
        assert found.gradients.keys() == whole.gradients.keys()
        assert all(x.tobytes() == whole.gradients[name].tobytes() for name, x in found.gradients.items())
    assert lazy.weights.low_memory


def test_micro_batches_add_up_to_the_batch() -> None:
    """Counted labels differ from row to row, so a mean of means would be another number."""
    ours = pair("arcee", 0, "causal_lm")[0]
    counts = (LABELS[:, 1:] != -100).sum(axis=1)
    assert counts[0] != counts[1]
    whole, so_far, losses = ours.gradients(IDS, labels=LABELS), {}, []
    for row in (slice(0, 1), slice(1, 2)):
        loss, so_far = ours.gradients(IDS[row], labels=LABELS[row], num_items_in_batch=counts.sum(), accumulated=so_far)
        losses.append(loss)
    assert abs(sum(losses) - whole.loss) < 1e-13
    same(so_far, whole.gradients, 1e-13)


def test_what_is_padded_or_ignored_has_exactly_no_gradient() -> None:
    ours = pair("llama", 0, "causal_lm")[0]
    embeds = np.random.default_rng(2).standard_normal((2, 7, 16))
    labels = np.where(LEFT == 0, -100, IDS)
    labels[0, 2] = -100  # which the last padding would have to say
    loss, found = ours.gradients(inputs_embeds=embeds, attention_mask=LEFT, labels=labels)
    assert not found[EMBEDDINGS][LEFT == 0].any()
    assert found[EMBEDDINGS][:, :-1][LEFT[:, :-1] == 1].any(axis=-1).all()
    assert "model.embed_tokens.weight" not in found
    embeds[LEFT == 0] = 1e30
    again = ours.gradients(inputs_embeds=embeds, attention_mask=LEFT, labels=labels)
    assert again.loss == loss
    same(again.gradients, found, 1e-14)
    found = ours.gradients(PADDED, attention_mask=LEFT, labels=labels).gradients
    read = np.isin(np.arange(23), PADDED[LEFT == 1])
    assert not found["model.embed_tokens.weight"][~read].any()


def test_frozen_tensors_have_no_gradient_and_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, made = pair("stablelm", 1, "causal_lm")[0], []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        found = linear_backward(*arguments, **keywords)
        made.append([x is not None for x in found])
        return found

    monkeypatch.setattr("refllm.ops.linear_backward", counted)
    everything = ours.gradients(IDS, labels=IDS).gradients
    assert len(made) == 15  # seven products in each of two layers, and the head
    made.clear()
    body = ["model.embed_tokens.weight", "model.layers.0.*", "model.layers.1.self_attn.*", "model.norm.*"]
    found = ours.gradients(IDS, labels=IDS, frozen=body).gradients
    assert {name for name in everything if not name.startswith(("model.embed", "model.layers.0", "model.norm"))
            and ".self_attn." not in name} == found.keys()  # fmt: skip
    same(found, {name: everything[name] for name in found}, 0)
    # Head and MLP; of attention, which has no gradient, only what leads on: the norm of this layer is before it.
    assert [(x, w) for x, w, _ in made].count((True, True)) == 4
    assert [(x, w) for x, w, _ in made].count((True, False)) == 4
    made.clear()
    only_head = ours.gradients(IDS, labels=IDS, frozen=["model.*"]).gradients
    assert only_head.keys() == {"lm_head.weight"}
    assert made == [[False, True, False]]


def test_checkpointing_saves_memory_and_keeps_every_bit() -> None:
    """Of eight layers of float32, whose products of one input share one, about a quarter is held at once."""
    config = small_config("llama", num_hidden_layers=8, intermediate_size=200)
    ours = build(model_class("llama"), config, 2, "float32")
    ids = np.random.default_rng(0).integers(0, 96, (2, 60))

    def measured() -> tuple[Any, int]:
        tracemalloc.start()
        out = ours.gradients(ids, labels=ids)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return out, peak

    kept, much = measured()
    ours.gradient_checkpointing_enable()
    again, little = measured()
    ours.gradient_checkpointing_disable()
    assert little < 0.5 * much, (little, much)
    assert again.loss == kept.loss
    for name, gradient in kept.gradients.items():
        assert gradient.tobytes() == again.gradients[name].tobytes(), name


@pytest.mark.parametrize("policy", ["hf-eager", "hf-sdpa", "fused"])
def test_bfloat16_gradients_are_on_the_grid_and_the_same_again(policy: str) -> None:
    """... and close to the exact ones of the same weights: a hundred roundings, not another formula."""
    config = small_config("helium", tie_word_embeddings=True)
    ours = build(model_class("helium"), config, 2, "bfloat16", policy)
    exact = build(model_class("helium"), config, dict(ours.weights)).gradients(IDS, labels=IDS).gradients
    found = ours.gradients(IDS, labels=IDS).gradients
    ours.gradient_checkpointing_enable()
    again = ours.gradients(IDS, labels=IDS).gradients
    for name, gradient in found.items():
        assert not (gradient.view(np.uint32) & 0xFFFF).any()
        assert gradient.tobytes() == again[name].tobytes()
        assert 0 < np.linalg.norm(gradient - exact[name]) < 0.05 * np.linalg.norm(exact[name]), name


class Heard:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def wants(self, name: str) -> bool:
        return True

    def record(self, name: str, value: np.ndarray) -> None:
        assert name not in self.values
        self.values[name] = value.copy()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_named_value_has_its_gradient_shown(checkpointed: bool) -> None:
    """... once, and no value again when its layer is computed again."""
    ours, heard = build(model_class("llama"), pair("llama", 0, "causal_lm")[0].config, 3), Heard()
    ours.is_gradient_checkpointing = checkpointed
    _, found = ours.gradients(inputs_embeds=CALLS["embeds"]["inputs_embeds"], labels=LABELS, recorder=heard)
    values = {name for name in heard.values if not name.startswith("grad:")}
    inside = {name for name in values if name.endswith((".scores", ".probs"))}
    assert {f"grad:{name}" for name in values - inside} == heard.values.keys() - values
    for name in values - inside:
        assert heard.values[f"grad:{name}"].shape == heard.values[name].shape
    np.testing.assert_array_equal(heard.values["grad:model.embed_tokens"], found[EMBEDDINGS])
    up = heard.values["grad:model.layers.1.mlp.up_proj"]
    np.testing.assert_array_equal(found["model.layers.1.mlp.up_proj.bias"], up.reshape(-1, up.shape[-1]).sum(axis=0))


def test_tensors_in_tensors_out_and_the_model_is_as_before() -> None:
    ours = pair("helium", 0, "causal_lm")[0]
    before = {name: x.copy() for name, x in ours.weights.items()}
    loss, found = ours.gradients(torch.from_numpy(IDS), labels=torch.from_numpy(LABELS))
    assert isinstance(loss, torch.Tensor)
    same({name: numpy_of(x) for name, x in found.items()}, ours.gradients(IDS, labels=LABELS).gradients, 0)
    assert all((before[name] == x).all() for name, x in ours.weights.items())
    assert isinstance(ours(IDS).logits, np.ndarray)
    assert ours.gradients(IDS, labels=LABELS, frozen=["*"]) == (ours(IDS, labels=LABELS, use_cache=False).loss, {})


@pytest.mark.parametrize(
    ("head", "call", "said"),
    [
        ("base", {"labels": IDS}, "gradients: LlamaModel has no loss; use the same checkpoint with a head"),
        ("causal_lm", {}, "gradients: give labels, which the loss is made of"),
        ("question_answering", {"start_positions": np.zeros(2, int)}, "gradients: give start_positions and end_posi"),
        ("causal_lm", {"labels": IDS, "frozen": ["lm_hed.*"]}, "frozen: 'lm_hed.*' is the name of no tensor"),
        ("causal_lm", {"labels": IDS, "frozen": "lm_head.weight"}, "expected a list of names or patterns"),
        ("causal_lm", {"labels": IDS, "accumulated": {"x": IDS}}, "accumulated: 'x' is the name of no tensor of this"),
        ("causal_lm", {"labels": IDS, "past_key_values": 1}, "past_key_values holds what has no gradient any more"),
        ("causal_lm", {"labels": IDS[:, 1:]}, "labels: shape"),
    ],
)
def test_bad_calls_in_one_sentence(head: str, call: dict[str, Any], said: str) -> None:
    model: Model = build(model_class("llama", head), small_config("llama"), 0)
    with pytest.raises(InputError, match=said.replace("*", r"\*")):
        model.gradients(IDS, **call)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "olmo2"])
def test_a_page_of_ones_own_has_gradients(name: str) -> None:
    """... with its window, and with norms of whole projections; once more with weights that the page computes with."""
    with in_use(PAGES / f"{name}.py"):
        config = small_config(name, hidden_size=16, intermediate_size=24, vocab_size=23)
        if name == "mistral":
            config.sliding_window = 3
        ours = build(model_class(name), config, 4)
        call = {"input_ids": IDS, "labels": LABELS}
        rng = np.random.default_rng(5)
        direction = {key: rng.standard_normal(x.shape) for key, x in ours.gradients(**call).gradients.items()}
        slope = sum(float((x * direction[key]).sum()) for key, x in ours.gradients(**call).gradients.items())
        assert len(direction) == len(ours.weights)
        assert abs(slope - along(ours, call, direction, 1e-4)) < 1e-7 * abs(slope)


def test_weights_that_a_page_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + w for a norm's weight, parts of tensors put together; what has no known reverse is named."""
    model = pair("llama", 0, "causal_lm")[0]
    rms_norm = Operators().rms_norm

    def odd(op: Any, c: Any, w: Any, x: Any, *_: Any) -> Any:
        together = np.concatenate([w["norm.weight"][:9], 2 * w["embed_tokens.weight"][3, 9:] / 3 - 0.5])
        return op.tap("model.norm", op.rms_norm(x, 1 + together * w["norm.weight"], c.rms_norm_eps))

    monkeypatch.setattr(model.page, "forward", odd)
    call = {"input_ids": IDS, "labels": LABELS}
    found = model.gradients(**call).gradients
    rng = np.random.default_rng(4)
    direction = {key: rng.standard_normal(x.shape) for key, x in found.items()}
    assert direction.keys() == {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
    slope = sum(float((x * direction[key]).sum()) for key, x in found.items())
    assert abs(slope - along(model, call, direction)) < 1e-7 * abs(slope)
    monkeypatch.setattr(model.page, "forward", lambda op, c, w, x, *_: rms_norm(x, np.exp(w["norm.weight"]), 1e-5))
    with pytest.raises(InputError, match=r"np.exp: no gradient of it is known; write it in calls of `op`"):
        model.gradients(**call)


def test_training_is_that_of_torch() -> None:
    """Twenty steps of AdamW: gradients, optimiser and the use of both."""
    ours = build(model_class("stablelm"), pair("stablelm", 1, "causal_lm")[0].config, 3)
    witness = to_torch(ours, dtype="float64", widened=True)
    mine = AdamW(dict(ours.named_parameters()), lr=1e-2)
    other = torch.optim.AdamW(witness.parameters(), lr=1e-2)
    losses, rng = [], np.random.default_rng(3)  # its own: the order of tests is nobody's promise
    for _ in range(20):
        ids = rng.integers(4, 23, (2, 7))
        loss, found = ours.gradients(ids, labels=ids)
        expected, _ = theirs(witness, {"input_ids": ids, "labels": ids})
        assert abs(loss - expected.item()) < 1e-8
        mine.step(found)
        other.step()
        losses.append(loss)
    assert losses[-1] < 0.9 * losses[0]
