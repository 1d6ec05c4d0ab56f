"""The KV cache under any sequence of operations equals a full pass over the tokens that it should hold."""

import copy
from collections.abc import Callable
from functools import cache as memoised
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import FAMILIES, VOCAB, tiny_model
from transformers import DynamicCache as TransformersCache
from witness import to_torch

from refllm.errors import InputError
from refllm.forward import cache as cache_module
from refllm.forward.cache import DynamicCache, LayerCache, StaticCache
from refllm.forward.model import Model

FIRST_CAPACITY = cache_module._FIRST_CAPACITY
SLOTS = 40
MOST_ROWS = 6

seeds = st.integers(0, 2**32 - 1)


@memoised
def model_of(family: str) -> Model:
    return tiny_model(f"{family}ForCausalLM")


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * max(1.0, np.abs(expected).max(initial=0)))


def contents(cache: DynamicCache) -> list[tuple[bytes, bytes, tuple[int, ...]]]:
    """What the layers hold, to the last bit; a layer without tokens counts as absent."""
    layers = [cache.layer(i) for i in range(len(cache)) if cache.layer(i).length]
    return [(layer.keys.tobytes(), layer.values.tobytes(), layer.keys.shape) for layer in layers]


class InterruptingRecorder:
    """Raises in the middle of a forward pass, when some layers have appended to the cache and others have not."""

    def wants(self, name: str) -> bool:
        return True

    def record(self, name: str, value: np.ndarray) -> None:
        if name == "model.layers.1.input_layernorm":
            raise KeyboardInterrupt


class CacheMachine(RuleBasedStateMachine):
    """Beside the cache stand the tokens of each row and which of them may be attended to (0 is padding)."""

    @initialize(family=st.sampled_from(FAMILIES), static=st.booleans(), rows=st.integers(1, 3))
    def start(self, family: str, static: bool, rows: int) -> None:
        cache_module._FIRST_CAPACITY = 4  # so that buffers grow, more than once
        self.model = model_of(family)
        self.cache = StaticCache(self.model.config, SLOTS) if static else self.model.new_cache()
        self.forget(rows)

    def teardown(self) -> None:
        cache_module._FIRST_CAPACITY = FIRST_CAPACITY

    def forget(self, rows: int) -> None:
        self.tokens, self.mask = np.zeros((rows, 0), int), np.zeros((rows, 0), int)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def full_pass(self) -> Any:
        return self.model(self.tokens, self.mask, use_cache=True)

    # ------------------------------------------------------------------------------------------------------- operations

    @precondition(lambda self: self.length < SLOTS)
    @rule(
        seed=seeds,
        count=st.integers(1, 9),
        padded=st.booleans(),
        part=st.sampled_from((0.3, 1.0)),
        columns=st.sampled_from((0, 0, 3, -1, -2)),
    )
    def append(self, seed: int, count: int, padded: bool, part: float, columns: int) -> None:
        """`columns`: by how many the mask that is passed is too long (they are ignored) or too short (taken as 0)."""
        rng = np.random.default_rng(seed)
        shape = (len(self.tokens), min(count, SLOTS - self.length))
        chunk, may_be_seen = rng.integers(0, VOCAB, shape), (rng.random(shape) < part).astype(int)
        if not padded:
            may_be_seen[:] = 1
        missing = min(-columns, shape[1])
        if missing > 0:
            may_be_seen[:, shape[1] - missing :] = 0
        self.tokens = np.concatenate([self.tokens, chunk], axis=1)
        self.mask = np.concatenate([self.mask, may_be_seen], axis=1)
        beyond = rng.integers(0, 2, (len(self.tokens), max(columns, 0)))
        passed = np.concatenate([self.mask[:, : self.length - max(missing, 0)], beyond], axis=1)
        mask = None if self.mask.all() and not padded else passed
        out = self.model(chunk, mask, past_key_values=self.cache)
        assert out.past_key_values is self.cache
        close(out.logits, self.full_pass().logits[:, -chunk.shape[1] :])

    @precondition(lambda self: self.length < SLOTS)
    @rule(seed=seeds)
    def decode(self, seed: int) -> None:
        self.append(seed, count=1, padded=False, part=1.0, columns=0)

    @rule(keep=st.integers(0, SLOTS + 5))
    def crop(self, keep: int) -> None:
        self.cache.crop(keep)
        self.tokens, self.mask = self.tokens[:, :keep], self.mask[:, :keep]

    @rule(drop=st.integers(1, SLOTS + 5))
    def crop_from_the_end(self, drop: int) -> None:
        self.cache.crop(-drop)
        keep = max(0, self.length - drop)
        self.tokens, self.mask = self.tokens[:, :keep], self.mask[:, :keep]

    @precondition(lambda self: self.length and 2 * len(self.tokens) <= MOST_ROWS)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        repeats = min(repeats, MOST_ROWS // len(self.tokens))
        self.cache.batch_repeat_interleave(repeats)
        self.tokens, self.mask = self.tokens.repeat(repeats, axis=0), self.mask.repeat(repeats, axis=0)

    @precondition(lambda self: self.length)
    @rule(data=st.data(), count=st.integers(1, MOST_ROWS))
    def select(self, data: st.DataObject, count: int) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.tokens) - 1), min_size=count, max_size=count))
        self.cache.batch_select_indices(np.array(rows))
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = data.draw(st.permutations(range(len(self.tokens))))
        self.cache.reorder_cache(np.array(rows))
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]

    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        """A cache that was reset takes a batch of any size."""
        self.cache.reset()
        self.forget(rows)

    @precondition(lambda self: self.length < SLOTS)
    @rule(seed=seeds)
    def fork(self, seed: int) -> None:
        """A copy goes its own way."""
        other = copy.deepcopy(self.cache)
        chunk = np.random.default_rng(seed).integers(0, VOCAB, (len(self.tokens), 1))
        self.model(chunk, past_key_values=other)
        assert other.get_seq_length() == self.length + 1

    # -------------------------------------------------------------------------------------------------- calls that fail

    def refused(self, *arguments: Any, error: type[BaseException] = InputError, **options: Any) -> None:
        before = contents(self.cache)
        with pytest.raises(error):
            self.model(*arguments, past_key_values=self.cache, **options)
        assert contents(self.cache) == before

    @rule(
        kind=st.sampled_from(
            ("mask rows", "mask axes", "4-D mask", "positions", "id", "labels", "label", "logits_to_keep", "interrupt")
        )
    )
    def fail(self, kind: str) -> None:
        if self.length == SLOTS:
            return
        rows = len(self.tokens)
        ids = np.zeros((rows, 1), int)
        wrong: dict[str, Callable[[], dict[str, Any]]] = {
            "mask rows": lambda: {"attention_mask": np.ones((rows + 1, self.length + 1))},
            "mask axes": lambda: {"attention_mask": np.ones(self.length + 1)},
            "4-D mask": lambda: {"attention_mask": np.ones((rows, 1, 1, self.length + 2), bool)},
            "positions": lambda: {"position_ids": np.zeros((rows, 2), int)},
            "id": lambda: {"input_ids": ids + VOCAB},
            "labels": lambda: {"labels": np.zeros((rows, 3), int)},
            "label": lambda: {"shift_labels": ids + VOCAB},
            "logits_to_keep": lambda: {"logits_to_keep": np.array([1])},
            "interrupt": lambda: {"recorder": InterruptingRecorder(), "error": KeyboardInterrupt},
        }
        self.refused(**{"input_ids": ids, **wrong[kind]()})

    @precondition(lambda self: self.length)
    @rule()
    def fail_with_another_batch_size(self) -> None:
        self.refused(np.zeros((len(self.tokens) + 1, 1), int))
        with pytest.raises(InputError, match="row"):
            self.cache.batch_select_indices(np.array([0, len(self.tokens)]))

    @precondition(lambda self: isinstance(self.cache, StaticCache))
    @rule(more=st.integers(1, 3))
    def fail_to_overflow(self, more: int) -> None:
        self.refused(np.zeros((len(self.tokens), SLOTS - self.length + more), int))

    # ------------------------------------------------------------------------------------------------------ what holds

    @invariant()
    def length_is_right(self) -> None:
        if hasattr(self, "cache"):
            assert [self.cache.get_seq_length(i) for i in range(2)] == [self.length] * 2

    @invariant()
    def keys_and_values_are_those_of_a_full_pass(self) -> None:
        if not hasattr(self, "cache") or not self.length:
            return
        expected = self.full_pass().past_key_values
        for i in range(self.model.config.num_hidden_layers):
            close(self.cache.layer(i).keys, expected.layer(i).keys)
            close(self.cache.layer(i).values, expected.layer(i).values)


CacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow]
)
TestCacheMachine = CacheMachine.TestCase


# -------------------------------------------------------------------------------------------------- single properties


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_holds_what_transformers_caches(family: str) -> None:
    """Prefill in chunks of 5 and 3, then rows repeated and reordered, then one token: keys, values and logits."""
    model = model_of(family)
    witness = to_torch(model, dtype="float64", widened=True)
    rng = np.random.default_rng(0)
    cache, expected = model.new_cache(), TransformersCache()
    for ids, rows in (
        (rng.integers(0, VOCAB, (2, 5)), None),
        (rng.integers(0, VOCAB, (2, 3)), None),
        (rng.integers(0, VOCAB, (4, 1)), [3, 1, 0, 0]),
    ):
        if rows is not None:
            for of, index in ((cache, np.array(rows)), (expected, torch.tensor(rows))):
                of.batch_repeat_interleave(2)
                of.crop(-2)
                of.reorder_cache(index)
        logits = model(ids, past_key_values=cache).logits
        with torch.no_grad():
            wanted = witness(torch.tensor(ids), past_key_values=expected).logits
        close(logits, wanted.numpy())
        assert cache.get_seq_length() == expected.get_seq_length()
        for i, layer in enumerate(expected.layers):
            close(cache.layer(i).keys, layer.keys.numpy())
            close(cache.layer(i).values, layer.values.numpy())


def filled(rows: int, length: int, heads: int = 2, dim: int = 4, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(rows * length).standard_normal((rows, heads, length, dim)).astype(dtype)


def test_a_static_cache_allocates_once() -> None:
    layer = StaticCache(None, 10).layer(0)
    first, _ = layer.append(filled(2, 3), filled(2, 3))
    for _ in range(7):
        keys, _ = layer.append(filled(2, 1), filled(2, 1))
        assert np.shares_memory(first, keys)
    assert keys.shape == (2, 2, 10, 4)


def test_appending_to_a_dynamic_cache_copies_rarely() -> None:
    layer = LayerCache()
    buffers = {layer.append(filled(1, 1), filled(1, 1))[0].__array_interface__["data"][0] for _ in range(1000)}
    assert len(buffers) <= 8


@pytest.mark.parametrize("cache", [DynamicCache(), StaticCache(None, 8)], ids=["dynamic", "static"])
def test_a_reset_cache_takes_keys_of_any_shape_and_dtype(cache: DynamicCache) -> None:
    """Nothing of the model that used it before remains, its precision least of all."""
    for shape in (
        (2, 3, 2, 4, np.float32),
        (2, 3, 1, 4, np.float32),
        (2, 3, 1, 4, np.float64),
        (2, 3, 1, 8, np.float64),
    ):
        cache.reset()
        new = filled(*shape)
        keys, values = cache.layer(0).append(new, 2 * new)
        assert keys.dtype == new.dtype
        np.testing.assert_array_equal(keys, new)
        np.testing.assert_array_equal(values, 2 * new)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ((3, 1, 2, 4, np.float64), "3 rows"),
        ((2, 1, 1, 4, np.float64), "1 heads of 4"),
        ((2, 1, 2, 8, np.float64), "2 heads of 8"),
        ((2, 1, 2, 4, np.float32), "float32"),
    ],
)
def test_keys_of_another_shape_or_dtype_are_refused(other: Any, says: str) -> None:
    layer = LayerCache()
    layer.append(filled(2, 3), filled(2, 3))
    with pytest.raises(InputError, match=f"cache: holds 2 rows, 2 heads of 4, float64; the new keys have .*{says}"):
        layer.append(filled(*other), filled(*other))
    assert layer.length == 3


def test_a_model_in_another_precision_cannot_continue_a_cache() -> None:
    ids = np.array([[1, 2, 3]])
    cache = model_of("Llama")(ids).past_key_values
    before = contents(cache)
    with pytest.raises(InputError, match=r"float64; the new keys have .*float32"):
        tiny_model("LlamaForCausalLM", dtype="float32")(ids, past_key_values=cache)
    assert contents(cache) == before


def test_resetting_does_not_make_a_cache_grow() -> None:
    layer = LayerCache()
    for rows in (1, 2) * 20:
        layer.crop(0)
        keys, _ = layer.append(filled(rows, 3), filled(rows, 3))
    assert keys.base.shape[2] == 64


def test_a_failed_call_does_not_stretch_dynamic_rope() -> None:
    """Its frequencies depend on the longest call so far, which a call that failed is not."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    model = tiny_model("LlamaForCausalLM", rope_parameters=rope, max_position_embeddings=8)
    ids = np.arange(8)[None]
    before = model(ids).logits
    with pytest.raises(InputError), pytest.warns(UserWarning, match="beyond max_position_embeddings"):
        model(np.ones((1, 12), int), past_key_values=StaticCache(None, 10))
    np.testing.assert_array_equal(model(ids).logits, before)
    with pytest.warns(UserWarning, match="beyond max_position_embeddings"):
        model(np.ones((1, 12), int))
    assert np.abs(model(ids).logits - before).max() > 1e-6


def test_static_overflow_says_how_many_slots_there_are() -> None:
    with pytest.raises(InputError, match="cache: 5 tokens do not fit into the 4 slots it was made with"):
        model_of("Helium")(np.ones((1, 5), int), past_key_values=StaticCache(None, 4))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([0, 2], r"row 2 is outside 0\.\.1"),
        ([-1], r"row -1 is outside 0\.\.1"),
        ([0.0, 1.0], "expected row numbers .*float64"),
        ([True, False], "expected row numbers .*bool"),
        ([[0, 1]], r"expected row numbers .*\(1, 2\)"),
    ],
)
def test_selecting_rows_that_are_not_there_changes_nothing(rows: Any, says: str) -> None:
    cache = DynamicCache()
    cache.layer(0).append(filled(2, 3), filled(2, 3))
    before = contents(cache)
    for method in (cache.batch_select_indices, cache.reorder_cache):
        with pytest.raises(InputError, match=f"cache: {says}"):
            method(np.array(rows))
    assert contents(cache) == before


def test_repeats_and_slots_are_at_least_one() -> None:
    with pytest.raises(InputError, match="repeats=0 must be at least 1"):
        DynamicCache().batch_repeat_interleave(0)
    with pytest.raises(InputError, match="max_cache_len=0 must be an integer of at least 1"):
        StaticCache()
