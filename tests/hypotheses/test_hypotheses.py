"""Hypotheses as changes of a set-up: each does something, is the same on arrays and on values that carry their error,
and changes nothing but what it says."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from refllm.accuracy.propagation import Propagation, Uncertain
from refllm.forward.model import Model
from refllm.forward.operators import Operators
from refllm.hypotheses.catalogue import catalogue
from refllm.hypotheses.hypothesis import Hypothesis
from refllm.hypotheses.setup import Arrays, DoesNotApplyError, Setup, Tokens, Until
from refllm.hypotheses.solve import roundest
from refllm.parallel import one_blas_thread
from refllm.precision import EXACT, HF_EAGER
from refllm.strategies.small_models import EVERY_FLAG, build, model_class, small_config

S = 43
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", EVERY_FLAG["llama"][0] | {"rope_parameters": LLAMA3}),
    "helium": ("helium", EVERY_FLAG["helium"][0]),
    "arcee": ("arcee", EVERY_FLAG["arcee"][0] | {"rope_parameters": YARN}),
    "stablelm": ("stablelm", EVERY_FLAG["stablelm"][0]),
    "parallel stablelm": ("stablelm", EVERY_FLAG["stablelm"][1]),
    "square": ("llama", {"head_dim": 12, "num_key_value_heads": 4, "tie_word_embeddings": False}),
}
SHORT = ("window 64", "window 128", "positions restart after 64", "positions stop at 64", "tail of 64 keys",
         "chunks of 64", "last 64 of the MLP")  # fmt: skip
"""What a run of 43 tokens does not reach, or a model of 112 channels does."""


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """Small random models, of which each hypothesis changes at least one."""
    found = {}
    for n, (name, (family, flags)) in enumerate(MODELS.items()):
        values = {"max_position_embeddings": 128, **flags}
        found[name] = build(model_class(family), small_config(family, **values), n, "float32")
    return found


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Small products on one thread."""
    with one_blas_thread():
        yield


def tokens(model: Model, length: int = S) -> Tokens:
    """Two rows, one of them padded and one with a gap in its positions, fed in three pieces."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length))
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    positions[0, length // 2 :] += 7
    return Tokens(ids, mask, positions, pieces=(0, length // 2, length // 2 + 3))


def run(model: Model, given: Tokens, arrays: Arrays, *changes: Callable[[Setup], None], op: Any = None) -> Any:
    """The logits under some changes; None where one does not apply."""
    setup = Setup(model, given, arrays)
    try:
        for change in changes:
            change(setup)
        with np.errstate(all="ignore"):
            return setup.run(Operators(EXACT) if op is None else op)
    except DoesNotApplyError:
        return None


def uncertain() -> Propagation:
    """The operators of values with an error."""
    return Propagation("float32", HF_EAGER, lambda name, x: x, lambda name: False)


def test_without_a_change_it_is_the_page(models: dict[str, Model]) -> None:
    off = {}
    for name, model in models.items():
        given = tokens(model)
        right = build(type(model), model.config, {n: np.asarray(model.weights[n]) for n in model.weights.shapes})
        expected = right(given.ids, given.mask, given.positions, use_cache=False).logits[given.valid]
        off[name] = np.abs(run(model, given, Arrays(model))[given.valid] - expected).max()
    assert set(off) == set(MODELS)
    assert max(off.values()) < 1e-11


def test_every_hypothesis_changes_something_and_there_are_enough(models: dict[str, Model]) -> None:
    unchanged: set[str] = set()
    changing: set[str] = set()
    for model in models.values():
        given, arrays = tokens(model), Arrays(model)
        right = run(model, given, arrays)
        for hypothesis in catalogue(model.config):
            if hypothesis.name in changing:
                continue
            value = run(model, given, arrays, hypothesis)
            moves = value is not None and (
                value.shape != right.shape or np.abs(value - right)[given.valid].max() > 1e-9
            )
            (changing if moves else unchanged).add(hypothesis.name)
    # Weights on the grid of a format do not change when they are put there; two halves may lie far below 7.
    silent = unchanged - changing - {*SHORT, "gate capped at 7", "activation gelu_10"}
    assert not silent
    assert len(changing) > 300
    assert min(len(catalogue(model.config)) for model in models.values()) > 200


@pytest.mark.parametrize("name", ["llama", "parallel stablelm"])
def test_values_with_an_error_are_the_same_values(models: dict[str, Model], name: str) -> None:
    model = models[name]
    given, arrays, compared = tokens(model, 10), Arrays(model), 0
    for hypothesis in catalogue(model.config):
        value = run(model, given, arrays, hypothesis)
        other = run(model, given, arrays, hypothesis, op=uncertain())
        if value is None or not np.isfinite(value[:, hypothesis.name == "BOS in front" :]).all():
            continue
        assert isinstance(other, Uncertain), hypothesis.name
        shown = given.valid[:, : value.shape[1]]
        near = np.abs(other.value - value)[shown] <= 1e-4 * max(1.0, np.abs(value).max())  # float32 of a rounding
        assert near.mean() > 0.99, hypothesis.name
        assert np.isfinite(other.variance[shown]).all(), hypothesis.name
        assert (other.variance[shown] >= 0).all(), hypothesis.name
        assert other.variance[shown].any(), hypothesis.name
        compared += 1
    assert compared > 200


def _named(model: Model, name: str) -> Hypothesis:
    return next(h for h in catalogue(model.config) if h.name == name)


def test_in_one_layer_it_changes_that_layer(models: dict[str, Model]) -> None:
    model = models["llama"]
    given, arrays = tokens(model), Arrays(model)
    for name in ("gate and up swapped", "rope scaling ignored", "not causal", "q bias dropped", "norm weight plus one"):
        second = _named(model, name).within([1])
        values = []
        for change in ((), (second,)):
            setup = Setup(model, given, arrays)
            for one in change:
                one(setup)
            first_layer = setup.run(Operators(EXACT), Until("model.layers.0"))
            setup = Setup(model, given, arrays)
            for one in change:
                one(setup)
            values.append((first_layer, setup.run(Operators(EXACT))))
        (before, right), (same, wrong) = values
        assert np.array_equal(before, same), name
        assert np.abs(right - wrong).max() > 1e-6, name


def test_changes_lie_on_top_of_each_other(models: dict[str, Model]) -> None:
    model = models["llama"]
    given, arrays = tokens(model), Arrays(model)
    swap, sign = _named(model, "gate and up swapped"), _named(model, "sign of sin")
    twice = run(model, given, arrays, swap, swap)
    assert np.abs(twice - run(model, given, arrays)).max() < 1e-12
    both, other = run(model, given, arrays, swap, sign), run(model, given, arrays, sign, swap)
    assert np.array_equal(both, other)
    assert np.abs(both - run(model, given, arrays, swap)).max() > 1e-6


def test_what_a_candidate_has_shown_is_taken_over(models: dict[str, Model]) -> None:
    model = models["llama"]
    given, arrays = tokens(model), Arrays(model)
    shown = np.random.default_rng(1).standard_normal((2, S, model.config.hidden_size))
    until = Until("model.norm", {"model.layers.1": shown})
    setup = Setup(model, given, arrays)
    _named(model, "layer 0 skipped")(setup)
    got = Setup(model, given, arrays).run(Operators(EXACT), until)
    weight = np.asarray(model.weights["norm.weight"], float)
    expected = shown / np.sqrt(np.square(shown).mean(-1, keepdims=True) + model.config.rms_norm_eps) * weight
    assert np.allclose(got, expected)


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.031415, 1e-3, 0.031),
        (0.031415, 2e-5, 0.0314),
        (1234567.3, 1.0, 1234567.0),
        (0.5, 0.0, 0.5),
        (-0.9701, 1e-3, -0.97),
    ],
)
def test_the_roundest_number_within_an_error(value: float, error: float, expected: float) -> None:
    assert roundest(value, error) == expected
