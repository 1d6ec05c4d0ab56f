"""Every family computes what Transformers computes: any config, head, mask, position, cache split and RoPE type.

In float64 the witness is Transformers with its float32 islands widened, so that formulas can be compared to 1e-10; in
float32 it is Transformers as it is. Attention is its eager code, except where a query may have no key to attend to:
there eager attention averages all values, and the witness is "sdpa", which gives 0 as we do.
"""

from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from witness import numpy_of, to_torch

from refllm.forward.cache import StaticCache
from refllm.models import families
from refllm.strategies.models import ROPE_TYPES, configs, cuts, inputs, key_masks, seeds
from refllm.strategies.small_models import FAMILIES, build, model_class, small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*beyond max_position_embeddings"),
    pytest.mark.filterwarnings("ignore:.*factor=.* is used, although"),
]

EXACT = 1e-10
LOSS = 1e-6  # Transformers casts logits to float32 before a token loss, whatever the model's dtype
FLOAT32 = 1e-5
LENGTH_DEPENDENT = ("dynamic", "longrope")
data = st.data()


def call(model: Any, **arguments: Any) -> Any:
    """One forward pass of a Transformers model on NumPy arguments."""
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    # RoPE type "dynamic" divides an integer tensor by a number, which gives the default dtype: one more float32 island.
    torch.set_default_dtype(model.dtype)
    try:
        with torch.no_grad():
            return model(**tensors)
    finally:
        torch.set_default_dtype(torch.float32)


def close(ours: np.ndarray, theirs: torch.Tensor, tolerance: float, rows: np.ndarray | None = None) -> None:
    """Equal to `tolerance` times the largest value (at least 1), in the given rows."""
    expected = numpy_of(theirs)
    assert ours.shape == expected.shape
    if rows is not None:
        ours, expected = ours[rows], expected[rows]
    if expected.size:
        assert np.abs(ours - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


class Contexts:
    """Records what attention gives, [B, H, S, D] per layer."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []

    def wants(self, name: str) -> bool:
        return name.endswith("self_attn.context")

    def record(self, name: str, value: np.ndarray) -> None:
        self.values.append(value.copy())


# ------------------------------------------------------------------------------------------------------------ float64


@pytest.mark.parametrize("family", FAMILIES)
@given(data, seeds)
@settings(max_examples=examples(15, 30))
def test_logits_hidden_states_and_attentions(family: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(configs(family))
    ids = data.draw(inputs(config)).ids
    ours = build(model_class(family), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    expected = call(theirs, input_ids=ids, output_hidden_states=True, output_attentions=True)
    out = ours(ids, output_hidden_states=True, output_attentions=True)
    close(out.logits, expected.logits, EXACT)
    for kind in ("hidden_states", "attentions"):
        assert len(out[kind]) == len(expected[kind])
        for mine, other in zip(out[kind], expected[kind], strict=True):
            close(mine, other, EXACT)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILIES)
@given(data, seeds)
@settings(max_examples=10)
def test_every_rope_type(family: str, rope_type: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(configs(family, rope_types=(rope_type,), smallest_head=4, num_hidden_layers=1))
    assert config.rope_parameters["rope_type"] == rope_type
    drawn = data.draw(inputs(config, shortest=4))
    ours = build(model_class(family), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    close(ours(drawn.ids).logits, call(theirs, input_ids=drawn.ids).logits, EXACT)
    far = drawn.rng.integers(0, 300, drawn.shape)
    out = ours(drawn.ids, position_ids=far)
    close(out.logits, call(theirs, input_ids=drawn.ids, position_ids=far).logits, EXACT)


@given(data, seeds)
@settings(max_examples=examples(30, 60))
def test_padding_masks(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs())
    ids = data.draw(inputs(config)).ids
    B, S = ids.shape
    mask = data.draw(key_masks(B, S))
    sees = np.cumsum(mask, axis=1) > 0  # [B, S]: the query has a key to attend to
    given_mask = mask.astype(data.draw(st.sampled_from([np.int64, bool, np.float64])))
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="sdpa", widened=True)
    contexts = Contexts()
    out = ours(ids, attention_mask=given_mask, recorder=contexts)
    close(out.logits, call(theirs, input_ids=ids, attention_mask=mask).logits, EXACT, rows=sees)
    for context in contexts.values:
        assert not context.transpose(0, 2, 1, 3)[~sees].any()


@given(data, seeds)
@settings(max_examples=examples(10, 20))
def test_masks_of_another_length(data: st.DataObject, seed: int) -> None:
    """A short mask is continued with 0, of a long one the end is ignored."""
    config = data.draw(configs())
    ids = data.draw(inputs(config)).ids
    B, S = ids.shape
    mask = np.ones((B, data.draw(st.integers(1, S + 3))), np.int64)
    mask[0, 0] = data.draw(st.integers(0, 1))
    sees = np.cumsum(np.pad(mask, ((0, 0), (0, S)))[:, :S], axis=1) > 0
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="sdpa", widened=True)
    out = ours(ids, attention_mask=mask)
    close(out.logits, call(theirs, input_ids=ids, attention_mask=mask).logits, EXACT, rows=sees)


@pytest.mark.parametrize("kind", ["bool", "added", "added, -inf"])
@given(data, seeds)
@settings(max_examples=examples(13, 25))
def test_four_dim_masks(kind: str, data: st.DataObject, seed: int) -> None:
    """bool (True = attend) and float (added), shared by rows or heads or not; causality is not added to them."""
    config = data.draw(configs())
    drawn = data.draw(inputs(config, longest=12))
    B, S = drawn.shape
    shape = (data.draw(st.sampled_from([1, B])), data.draw(st.sampled_from([1, config.num_attention_heads])), S, S)
    allowed = drawn.rng.random(shape) < data.draw(st.sampled_from([0.3, 0.7, 1.0]))
    mask = allowed if kind == "bool" else np.where(allowed, 0.0, drawn.rng.standard_normal(shape) * 3)
    if kind == "added, -inf":
        mask = np.where(allowed, drawn.rng.standard_normal(shape), -np.inf)
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager" if kind == "added" else "sdpa", widened=True)
    contexts = Contexts()
    out = ours(drawn.ids, attention_mask=mask, recorder=contexts)
    close(out.logits, call(theirs, input_ids=drawn.ids, attention_mask=mask).logits, EXACT)
    if kind != "added":
        blind = np.broadcast_to(~allowed.any(-1), (B, config.num_attention_heads, S))
        for context in contexts.values:
            assert not context[blind].any()


@pytest.mark.parametrize("kind", ["any", "packed", "shifted"])
@pytest.mark.parametrize("alone", [True, False])
@given(data, seeds)
@settings(max_examples=examples(10, 20))
def test_position_ids(alone: bool, kind: str, data: st.DataObject, seed: int) -> None:
    """Any positions. Alone, without mask and cache, a jump in them begins another packed sequence."""
    config = data.draw(configs())
    drawn = data.draw(inputs(config, shortest=3))
    B, S = drawn.shape
    rows = data.draw(st.sampled_from([1, B]))
    positions = np.arange(S) + drawn.rng.integers(0, 40, (rows, 1))
    if kind == "any":
        positions = drawn.rng.integers(0, 60, (rows, S))
    if kind == "packed":
        starts = drawn.rng.random((rows, S)) < 0.4
        positions = np.arange(S) - np.maximum.accumulate(np.where(starts, np.arange(S), 0), axis=1)
    more: dict[str, Any] = {"use_cache": not alone and data.draw(st.booleans())}
    if not (alone or more["use_cache"]):
        more["attention_mask"] = np.ones((B, S), np.int64)
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    out = ours(drawn.ids, position_ids=positions, **more)
    close(out.logits, call(theirs, input_ids=drawn.ids, position_ids=positions, **more).logits, EXACT)


@given(data, seeds)
@settings(max_examples=examples(10, 20))
def test_inputs_embeds(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs())
    drawn = data.draw(inputs(config, longest=10))
    embeds = drawn.rng.standard_normal((*drawn.shape, config.hidden_size))
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    close(ours(inputs_embeds=embeds).logits, call(theirs, inputs_embeds=embeds).logits, EXACT)
    looked_up = ours.weights["embed_tokens.weight"][drawn.ids]
    np.testing.assert_array_equal(ours(inputs_embeds=looked_up).logits, ours(drawn.ids).logits)


@pytest.mark.parametrize("kind", ["int", "positions", "positions per row", "marks"])
@given(data, seeds)
@settings(max_examples=12)
def test_logits_to_keep(kind: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(configs())
    drawn = data.draw(inputs(config, longest=10))
    B, S = drawn.shape
    keep: Any = data.draw(st.integers(-S, S + 2)) if kind == "int" else None
    if kind == "positions":
        keep = drawn.rng.integers(-S, S, data.draw(st.integers(1, 4)))
    elif kind == "positions per row":
        keep = drawn.rng.integers(0, S, (B, data.draw(st.integers(1, 4))))
    elif kind == "marks":
        keep = drawn.rng.random((B, S)) < 0.5
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    close(
        ours(drawn.ids, logits_to_keep=keep).logits,
        call(theirs, input_ids=drawn.ids, logits_to_keep=keep).logits,
        EXACT,
    )


@given(data, seeds)
@settings(max_examples=examples(35, 70))
def test_cached_calls(data: st.DataObject, seed: int) -> None:
    """Chunked prefill and decode, padded, with either cache, across the lengths at which RoPE types change."""
    config = data.draw(configs())
    ids = data.draw(inputs(config)).ids
    B, S = ids.shape
    mask = data.draw(key_masks(B, S)) if data.draw(st.booleans()) else None
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="sdpa", widened=True)
    cache = StaticCache(config, S) if data.draw(st.booleans()) else ours.new_cache()
    their_cache = None
    for piece in data.draw(cuts(S)):
        so_far = None if mask is None else mask[:, : piece.stop]
        sees = np.ones((B, piece.stop), bool) if mask is None else np.cumsum(mask[:, : piece.stop], axis=1) > 0
        expected = call(
            theirs, input_ids=ids[:, piece], attention_mask=so_far, past_key_values=their_cache, use_cache=True
        )
        their_cache = expected.past_key_values
        out = ours(ids[:, piece], attention_mask=so_far, past_key_values=cache)
        close(out.logits, expected.logits, EXACT, rows=sees[:, piece])
        assert cache.get_seq_length() == piece.stop
    assert cache.get_seq_length() == S > 0


@given(data, seeds)
@settings(max_examples=examples(20, 40))
def test_decode_equals_prefill(data: st.DataObject, seed: int) -> None:
    """... for every RoPE type whose frequencies do not depend on the length of the call."""
    config = data.draw(configs())
    assume(config.rope_parameters["rope_type"] not in LENGTH_DEPENDENT)
    ids = data.draw(inputs(config)).ids
    B, S = ids.shape
    mask = data.draw(key_masks(B, S))
    ours = build(model_class(config.model_type), config, seed)
    whole, cache, parts = ours(ids, attention_mask=mask).logits, ours.new_cache(), []
    for piece in data.draw(cuts(S)):
        parts.append(ours(ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=cache).logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-11 * max(1, np.abs(whole).max()))


@pytest.mark.parametrize("rope_type", LENGTH_DEPENDENT)
@given(data, seeds)
@settings(max_examples=examples(10, 20))
def test_calls_of_changing_length(rope_type: str, data: st.DataObject, seed: int) -> None:
    """Types dynamic and longrope look at the length of each call, and dynamic remembers the longest."""
    config = data.draw(configs(rope_types=(rope_type,), smallest_head=4, num_hidden_layers=1))
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    M = config.max_position_embeddings
    lengths = data.draw(
        st.permutations([M + 6, M, M - 1, M + 1, 1, config.rope_parameters.get("original_max_position_embeddings", 3)])
    )
    rng = np.random.default_rng(seed)
    assert len(lengths) == 6
    for length in lengths:
        ids = rng.integers(0, config.vocab_size, (1, length))
        close(ours(ids).logits, call(theirs, input_ids=ids).logits, EXACT)


# -------------------------------------------------------------------------------------------------------------- heads


@given(data, seeds)
@settings(max_examples=examples(20, 40))
def test_causal_lm_loss(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs(num_hidden_layers=1))
    drawn = data.draw(inputs(config, longest=10))
    labels = np.where(drawn.rng.random(drawn.shape) < 0.3, -100, drawn.rng.integers(0, config.vocab_size, drawn.shape))
    options: dict[str, Any] = {}
    if data.draw(st.booleans()):
        options["num_items_in_batch"] = data.draw(st.integers(1, 50))
    if data.draw(st.booleans()):
        options["shift_labels"] = drawn.rng.permuted(labels, axis=1)
    if data.draw(st.booleans()):
        options["ignore_index"] = data.draw(st.integers(0, config.vocab_size - 1))
        labels = np.abs(labels) % config.vocab_size
        if "shift_labels" in options:
            options["shift_labels"] = np.abs(options["shift_labels"]) % config.vocab_size
    ours = build(model_class(config.model_type), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    expected = call(theirs, input_ids=drawn.ids, labels=labels, **options).loss
    check_loss(ours(drawn.ids, labels=labels, **options).loss, expected, LOSS)


def check_loss(ours: Any, theirs: torch.Tensor, tolerance: float) -> None:
    expected = float(theirs)
    assert np.isnan(ours) if np.isnan(expected) else abs(ours - expected) <= tolerance * max(1, abs(expected))


@pytest.mark.parametrize("problem", [None, "regression", "single_label_classification", "multi_label_classification"])
@given(data, seeds)
@settings(max_examples=examples(10, 20))
def test_sequence_classification(problem: str | None, data: st.DataObject, seed: int) -> None:
    fewest = 2 if problem == "single_label_classification" else 1
    config = data.draw(configs(num_labels=data.draw(st.integers(fewest, 4)), problem_type=problem))
    drawn = data.draw(inputs(config, longest=10))
    C, ids = config.num_labels, drawn.ids
    if config.pad_token_id is None:
        ids = ids[:1]
    elif data.draw(st.booleans()):  # padding at the end, and inside, and whole rows of it
        ids[drawn.rng.random(ids.shape) < 0.4] = config.pad_token_id
    B = len(ids)
    kind = problem or ("regression" if C == 1 else data.draw(st.sampled_from(["single", "multi"])))
    if kind.startswith("single"):
        labels: Any = drawn.rng.integers(0, C, B)
    else:
        labels = drawn.rng.standard_normal((B, C)) if kind == "regression" else drawn.rng.integers(0, 2, (B, C)) * 1.0
        if kind == "regression" and C == 1 and data.draw(st.booleans()):
            labels = labels[:, 0]
    ours = build(model_class(config.model_type, "sequence_classification"), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    expected, out = call(theirs, input_ids=ids, labels=labels), ours(ids, labels=labels)
    close(out.logits, expected.logits, EXACT)
    check_loss(out.loss, expected.loss, EXACT)
    assert ours.config.problem_type == theirs.config.problem_type


@given(data, seeds)
@settings(max_examples=examples(13, 25))
def test_token_classification(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs(num_labels=data.draw(st.integers(1, 4))))
    drawn = data.draw(inputs(config, longest=10))
    labels = np.where(drawn.rng.random(drawn.shape) < 0.3, -100, drawn.rng.integers(0, config.num_labels, drawn.shape))
    options = {"num_items_in_batch": data.draw(st.integers(1, 20))} if data.draw(st.booleans()) else {}
    ours = build(model_class(config.model_type, "token_classification"), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    expected, out = call(theirs, input_ids=drawn.ids), ours(drawn.ids, labels=labels, **options)
    close(out.logits, expected.logits, EXACT)
    # Their forward does not hand num_items_in_batch on to their loss, which knows it.
    loss = theirs.loss_function(expected.logits, torch.from_numpy(labels), theirs.config, **options)
    check_loss(out.loss, loss, LOSS)


@given(data, seeds)
@settings(max_examples=examples(15, 30))
def test_question_answering(data: st.DataObject, seed: int) -> None:
    """Positions before, within and after the text; shapes [B] and [B, 1]."""
    config = data.draw(configs(data.draw(st.sampled_from(["arcee", "llama"]))))
    drawn = data.draw(inputs(config, longest=10))
    B, S = drawn.shape
    shape = data.draw(st.sampled_from([(B,), (B, 1)]))
    start, end = (drawn.rng.integers(-2, S + 3, shape) for _ in range(2))
    ours = build(model_class(config.model_type, "question_answering"), config, seed)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    expected = call(theirs, input_ids=drawn.ids, start_positions=start.copy(), end_positions=end.copy())
    out = ours(drawn.ids, start_positions=start, end_positions=end)
    close(out.start_logits, expected.start_logits, EXACT)
    close(out.end_logits, expected.end_logits, EXACT)
    check_loss(out.loss, expected.loss, EXACT)


@pytest.mark.parametrize("name", sorted(families.CLASSES))
def test_every_class_has_the_tensors_of_its_namesake(name: str) -> None:
    """... and each loads the other's: `to_torch` refuses a name that is missing or too many."""
    cls = families.CLASSES[name]
    flags = {"attention_bias": True, "mlp_bias": True, "use_qkv_bias": True, "qk_layernorm": True}
    fields = {field: value for field, value in flags.items() if hasattr(cls.config_class, field)}
    config = small_config(cls.config_class.model_type, num_labels=3, **fields)
    ours = build(cls, config, 0)
    state = to_torch(ours).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == dict(ours.weights.renamed(ours.prefix).shapes)
    assert ours.num_parameters() == sum(value.numel() for value in state.values())


# ------------------------------------------------------------------------------------------------------------ float32


@pytest.mark.parametrize("family", FAMILIES)
@given(data, seeds)
@settings(max_examples=examples(13, 25))
def test_float32_against_unmodified_transformers(family: str, data: st.DataObject, seed: int) -> None:
    """... masked, in cached pieces, every RoPE type. (A per-head LayerNorm of two numbers is a step function, whose
    steps no two float32 computations put at the same place; so heads have four dims or more, and eps is not tiny.)"""
    eps = {("layer_norm_eps" if family == "stablelm" else "rms_norm_eps"): data.draw(st.sampled_from([1e-5, 1e-3]))}
    config = data.draw(configs(family, smallest_head=4, **eps))
    ids = data.draw(inputs(config)).ids
    B, S = ids.shape
    mask = data.draw(key_masks(B, S))
    sees = np.cumsum(mask, axis=1) > 0
    ours = build(model_class(family), config, seed, "float32")
    theirs = to_torch(ours, dtype="float32", attention=data.draw(st.sampled_from(["sdpa", "eager"])))
    cache, their_cache = ours.new_cache(), None
    for piece in data.draw(cuts(S)):
        so_far = mask[:, : piece.stop]
        expected = call(
            theirs, input_ids=ids[:, piece], attention_mask=so_far, past_key_values=their_cache, use_cache=True
        )
        their_cache = expected.past_key_values
        out = ours(ids[:, piece], attention_mask=so_far, past_key_values=cache)
        assert out.logits.dtype == np.float32
        close(out.logits, expected.logits, FLOAT32, rows=sees[:, piece])
    assert cache.get_seq_length() == S > 0
