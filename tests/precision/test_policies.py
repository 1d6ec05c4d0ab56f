"""Precision: exact mode rounds nothing, emulated formats stay on their grids, and policies differ as they say."""

import re
from dataclasses import replace
from importlib import import_module
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm import ops
from refllm.errors import InputError
from refllm.precision import DTYPES, EXACT, FUSED, HF_EAGER, NATIVE, POLICIES, Arithmetic, arithmetic, rounding
from refllm.strategies.models import configs, inputs, seeds
from refllm.strategies.small_models import EVERY_FLAG, FAMILIES, build, model_class, random_tensors, small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*beyond max_position_embeddings"),
    pytest.mark.filterwarnings("ignore:.*factor=.* is used, although"),
]
LAYERS = [(family, flags) for family in FAMILIES for flags in EVERY_FLAG[family]]
every_layer = pytest.mark.parametrize(("family", "flags"), LAYERS, ids=lambda x: x if isinstance(x, str) else len(x))
EVERY_POINT = HF_EAGER.forward_points | FUSED.forward_points
UNIT = {"bfloat16": 2.0**-9, "float16": 2.0**-12}  # the largest relative error of one rounding, halved: about its rms


class Everything:
    """Records every value."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def wants(self, name: str) -> bool:
        return True

    def record(self, name: str, value: np.ndarray) -> None:
        self.values[name] = value.copy()


class Spy(Arithmetic):
    """An arithmetic that notes which rounding points it is asked for."""

    asked: ClassVar[set[str]] = set()

    def round(self, x: np.ndarray, point: str) -> np.ndarray:
        self.asked.add(point)
        return super().round(x, point)


def random_ids(seed: int, batch: int = 2, length: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, (batch, length))


# --------------------------------------------------------------------------------------------------------- exact mode


@pytest.mark.parametrize("point", sorted(EVERY_POINT))
def test_exact_mode_and_plain_float32_round_nothing(point: str) -> None:
    x = np.random.default_rng(0).standard_normal(100)
    assert EXACT.round(x, point) is x
    for policy in (NATIVE, HF_EAGER, FUSED):
        assert Arithmetic("float32", policy).round(x, point) is x


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_mode_computes_in_float64_throughout(family: str) -> None:
    recorder = Everything()
    build(model_class(family), small_config(family), 0)(random_ids(0), recorder=recorder)
    assert {value.dtype for value in recorder.values.values()} == {np.dtype(np.float64)}


@given(seeds, st.sampled_from(FAMILIES))
@settings(max_examples=10)
def test_float32_approaches_exact(seed: int, family: str) -> None:
    config, cls = small_config(family), model_class(family)
    tensors = {name: x.astype(np.float32) for name, x in random_tensors(cls.tensors(config), seed).items()}
    exact = build(cls, config, tensors)(random_ids(seed)).logits
    ours = build(cls, config, tensors, "float32")(random_ids(seed)).logits
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()


# -------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(st.data(), seeds)
@settings(max_examples=15)
def test_every_tap_lies_on_the_grid(dtype: str, policy: str, data: st.DataObject, seed: int) -> None:
    """... but for the inside of a fused attention kernel."""
    config = data.draw(configs())
    model = build(model_class(config.model_type), config, seed, dtype, policy)
    recorder = Everything()
    out = model(data.draw(inputs(config)).ids, recorder=recorder)
    put_on_grid = rounding(dtype)
    inside = () if POLICIES[policy].normalize_first else ("self_attn.scores", "self_attn.probs")
    for name, value in recorder.values.items():
        assert value.dtype == np.float32
        if not name.endswith(inside):
            np.testing.assert_array_equal(put_on_grid(value), value, err_msg=name)
    np.testing.assert_array_equal(put_on_grid(out.logits), out.logits)
    for layer in range(config.num_hidden_layers):
        keys = out.past_key_values.layer(layer).keys
        np.testing.assert_array_equal(put_on_grid(keys), keys)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_given_embeddings_are_put_on_the_grid(dtype: str) -> None:
    model = build(model_class("llama"), small_config("llama"), 0, dtype)
    embeds = np.random.default_rng(0).standard_normal((1, 4, 48))
    rounded = rounding(dtype)(embeds.astype(np.float32))
    np.testing.assert_array_equal(model(inputs_embeds=embeds).logits, model(inputs_embeds=rounded).logits)


# ----------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_layer
def test_fused_is_as_accurate_as_eager_and_different(family: str, flags: dict[str, Any], dtype: str) -> None:
    """Error against exact mode with the same weights, over several models. Fused rounds less often."""
    config, cls, put_on_grid = small_config(family, **flags), model_class(family), rounding(dtype)
    errors: dict[str, list[np.ndarray]] = {policy: [] for policy in POLICIES}
    scale = 0.0
    for seed in range(6):
        shapes = cls.tensors(config)
        tensors = {name: put_on_grid(x.astype(np.float32)) for name, x in random_tensors(shapes, seed).items()}
        exact = build(cls, config, tensors)(random_ids(seed)).logits
        scale = max(scale, exact.std())
        logits = {policy: build(cls, config, tensors, dtype, policy)(random_ids(seed)).logits for policy in errors}
        for one, other in combinations(POLICIES, 2):
            assert (logits[one] != logits[other]).mean() > 0.2
        for policy, values in logits.items():
            errors[policy].append(values - exact)
    rms = {policy: float(np.sqrt(np.mean(np.square(values)))) for policy, values in errors.items()}
    for error in rms.values():  # some dozen roundings on the way to a logit, so some units of error
        assert UNIT[dtype] < error / scale < 10 * UNIT[dtype]
        assert error <= 1.2 * rms["hf-eager"]


def test_models_ask_for_the_documented_rounding_points_and_no_others() -> None:
    Spy.asked.clear()
    for family, flags in LAYERS:
        model = build(model_class(family), small_config(family, **flags), 0, "bfloat16")
        model.arithmetic = Spy(model.arithmetic.dtype, model.arithmetic.policy)
        mask = np.ones((2, 16), np.int64)
        mask[0, :2] = 0
        model(random_ids(0), attention_mask=mask)
    assert Spy.asked == EVERY_POINT
    table = re.findall(r"^([a-z_., ]+?)  +\S", str(import_module("refllm.precision.arithmetic").__doc__), re.MULTILINE)
    assert {point for row in table for point in row.split(", ")} >= EVERY_POINT


def test_a_family_says_what_it_does_not_round() -> None:
    """Helium multiplies the norm's weight before the only rounding; Llama's norm of the same numbers rounds twice."""
    x = rounding("bfloat16")(np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32))
    w = rounding("bfloat16")(1 + 0.3 * np.random.default_rng(1).standard_normal(64).astype(np.float32))
    results = {}
    for family in ("helium", "llama"):
        model = build(model_class(family), small_config(family), 0, "bfloat16")
        results[family] = ops.rms_norm(x, w, 1e-6, ar=model.arithmetic)
    share = (results["helium"] != results["llama"]).mean()
    assert 0.2 < share < 0.32  # about a quarter of the elements


def test_masked_rows() -> None:
    """A query that sees nothing: the mean of all values in eager code, 0 in fused kernels and in exact mode."""
    mask = np.array([[0, 0, 1, 1, 1, 1]])
    for dtype, policy in [*(("bfloat16", policy) for policy in POLICIES), ("float64", None), ("float32", None)]:
        recorder = Everything()
        model = build(model_class("llama"), small_config("llama"), 0, dtype, policy)
        model(random_ids(0, 1, 6), attention_mask=mask, recorder=recorder)
        weights = recorder.values["model.layers.0.self_attn.probs"][0, :, :2]
        expected = rounding("bfloat16")(np.float32(1 / 6)) if policy == "hf-eager" else 0
        np.testing.assert_array_equal(weights, expected)


def test_fused_attention_rounds_its_weights_before_it_divides() -> None:
    """o = round(round(e^(s - max)) v / sum e^(s - max)), checked in float64; only ties may fall otherwise."""
    rng, put_on_grid = np.random.default_rng(0), rounding("bfloat16")
    q, k, v = (put_on_grid(rng.standard_normal((2, 4, 40, 16)).astype(np.float32)) for _ in range(3))
    ours = ops.attention(q, k, v, causal=False, ar=arithmetic("bfloat16", "fused"))

    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) / 4
    e = np.exp(scores - scores.max(-1, keepdims=True))
    for weights, share in ((put_on_grid(e.astype(np.float32)), (0.998, 1.0)), (e, (0.0, 0.9))):
        expected = put_on_grid((weights @ v / e.sum(-1, keepdims=True)).astype(np.float32))
        assert share[0] <= (ours == expected).mean() <= share[1]


def test_a_policy_of_ones_own() -> None:
    """Rounding at no point is float32 arithmetic on bfloat16 weights; each further point changes the logits."""
    model = build(model_class("arcee"), small_config("arcee"), 0, "bfloat16")
    none = replace(NATIVE, name="none")
    model.arithmetic = Arithmetic("bfloat16", none)
    unrounded = model(random_ids(0)).logits
    model.arithmetic = Arithmetic("float32", NATIVE)
    np.testing.assert_allclose(unrounded, model(random_ids(0)).logits, rtol=0, atol=2e-5 * np.abs(unrounded).max())
    for point in ("linear", "rms_norm", "rope", "attention", "activation", "add"):
        model.arithmetic = Arithmetic("bfloat16", replace(none, points=frozenset({point})))
        assert (model(random_ids(0)).logits != unrounded).any()


# -------------------------------------------------------------------------------------------------------------- names


def test_names_of_dtypes_and_policies() -> None:
    for dtype in DTYPES:
        assert arithmetic(f"torch.{dtype}").dtype == dtype
    assert arithmetic("float64") is EXACT
    assert arithmetic("float32").policy is NATIVE
    assert arithmetic("bfloat16").policy is HF_EAGER
    assert arithmetic("float32", "hf-eager").policy is HF_EAGER
    assert arithmetic("float16", FUSED).policy is FUSED


@pytest.mark.parametrize(
    ("dtype", "policy", "sentence"),
    [
        ("bf8", None, "dtype='bf8' is not known; use one of float64, float32, bfloat16, float16"),
        ("", None, "dtype='' is not known; use one of float64, float32, bfloat16, float16"),
        ("bfloat16", "eager", f"policy='eager' is not known; use one of {', '.join(POLICIES)}"),
        ("float64", "fused", "policy='fused' rounds, and dtype='float64' is exact; leave the policy out"),
    ],
)
def test_unknown_names_are_refused_in_one_sentence(dtype: str, policy: str | None, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        arithmetic(dtype, policy)
    assert str(raised.value) == sentence
    config = small_config("llama")
    with pytest.raises(InputError, match=re.escape(sentence)):
        model_class("llama").from_config(config, dtype=dtype, policy=policy)


def test_the_order_of_torch_is_that_of_the_policies_of_transformers_alone() -> None:
    """A fused kernel adds in an order of its own."""
    assert {name: policy.torch_order for name, policy in POLICIES.items()} == {
        "hf-eager": True, "hf-sdpa": True, "fused": False,
    }  # fmt: skip
