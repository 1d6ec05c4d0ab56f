"""Rotary tables: printed values, agreement with Transformers in float64 and in float32, and the state."""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refllm.config import AutoConfig, ModelConfig
from refllm.forward.rotary import RotaryEmbedding
from refllm.ops import rope_tables
from refllm.precision import torch_elementary
from refllm.precision.torch_cpu import this_cpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NAMES = {"helium": "Helium", "llama": "Llama", "stablelm": "StableLm", "arcee": "Arcee"}
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def make_config(family: str, head_dim: int, max_positions: int, **rope: Any) -> tuple[ModelConfig, Any]:
    """The same one-layer config in both libraries."""
    values = {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": 4,
        "vocab_size": 9,
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": max_positions,
        "rope_parameters": rope,
    } | ({} if family == "stablelm" else {"head_dim": head_dim})
    ours = AutoConfig.for_model(family, **values)
    return ours, getattr(transformers, f"{NAMES[family]}Config")(**values)


def their_rotary(config: Any) -> torch.nn.Module:
    module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    return getattr(module, f"{NAMES[config.model_type]}RotaryEmbedding")(config)


def their_tables(module: torch.nn.Module, positions_BS: np.ndarray, dtype: torch.dtype) -> list[np.ndarray]:
    """cos and sin without their repeated second half."""
    tables = module(torch.zeros(1, dtype=dtype), torch.from_numpy(positions_BS))
    return [table.numpy()[..., : table.shape[-1] // 2] for table in tables]


@contextmanager
def transformers_in_float64() -> Iterator[None]:
    """Every float32 that the rotary code of Transformers asks for is float64 inside."""
    default = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


# ---------------------------------------------------------------------- printed values

# R = 16, theta = 10000, 10 significant digits: name, inv_freq, attention factor
YARN_20 = rope_tables.yarn_inv_freq(16, 1e4, 20, 4096)
YARN_4 = rope_tables.yarn_inv_freq(16, 1e4, 4, 1024, truncate=False)
KNOWN = {
    "default": (
        rope_tables.default_inv_freq(16, 1e4),
        "1 0.316227766 0.1 0.0316227766 0.01 0.00316227766 0.001 0.000316227766",
    ),
    "linear": (
        rope_tables.linear_inv_freq(16, 1e4, 4),
        "0.25 0.0790569415 0.025 0.00790569415 0.0025 0.000790569415 0.00025 7.90569415e-05",
    ),
    "dynamic": (
        rope_tables.default_inv_freq(16, rope_tables.dynamic_theta(16, 1e4, 3, 4096, 9000)),
        "1 0.2543495932 0.06469371557 0.01645482024 0.004185276835 0.00106452346 0.0002707611091 6.886797797e-05",
    ),
    "llama3": (
        rope_tables.llama3_inv_freq(16, 1e4, 8, 1, 4, 1024),
        "1 0.316227766 0.1 0.0316227766 0.003086760967 0.0003952847075 0.000125 3.952847075e-05",
    ),
    "yarn, factor 20": (
        YARN_20,
        "1 0.316227766 0.1 0.02411236716 0.00525 0.0009091548273 5e-05 1.58113883e-05",
    ),
    "yarn, factor 4, not truncated": (
        YARN_4,
        "1 0.316227766 0.08539863663 0.01912677583 0.003556971521 0.000790569415 0.00025 7.90569415e-05",
    ),
    "longrope, short": (
        rope_tables.longrope_inv_freq(16, 1e4, [1 + i / 10 for i in range(8)]),
        "1 0.2874797873 0.08333333333 0.02432521277 0.007142857143 0.002108185107 0.000625 0.000186016333",
    ),
    "longrope, long": (
        rope_tables.longrope_inv_freq(16, 1e4, range(1, 9)),
        "1 0.158113883 0.03333333333 0.00790569415 0.002 0.0005270462767 0.0001428571429 3.952847075e-05",
    ),
    "proportional": (
        rope_tables.proportional_inv_freq(16, 1e4, 0.5, 2),
        "0.5 0.158113883 0.05 0.0158113883 0 0 0 0",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_frequencies_have_their_printed_values(name: str) -> None:
    computed, printed = KNOWN[name]
    np.testing.assert_allclose(computed, [float(word) for word in printed.split()], rtol=5e-10)


def test_attention_factors_have_their_printed_values() -> None:
    assert rope_tables.yarn_attention_factor(20, 1.0) == pytest.approx(1.299573227, abs=5e-10)
    assert rope_tables.yarn_attention_factor(4, 1.0, 0.5) == pytest.approx(1.064821625, abs=5e-10)
    assert rope_tables.yarn_attention_factor(0.5) == 1
    assert rope_tables.longrope_attention_factor(4, 1024) == pytest.approx(1.095445115, abs=5e-10)
    assert rope_tables.longrope_attention_factor(1, 1024) == 1


@pytest.mark.parametrize("absent", [0, 0.0, None])
def test_zero_or_null_betas_of_yarn_are_the_defaults(absent: float | None) -> None:
    def inv_freq(**betas: Any) -> np.ndarray:
        config, theirs = make_config("llama", 16, 4096, rope_type="yarn", rope_theta=1e4, factor=4.0, **betas)
        np.testing.assert_array_equal(RotaryEmbedding(config, False).inv_freq, their_rotary(theirs).inv_freq.numpy())
        return RotaryEmbedding(config, exact=True).inv_freq

    np.testing.assert_array_equal(inv_freq(beta_fast=absent, beta_slow=absent), inv_freq())


def test_default_is_the_power_of_the_definition() -> None:
    expected = [10000 ** (-2 * i / 80) for i in range(40)]
    np.testing.assert_allclose(rope_tables.default_inv_freq(80, 10000), expected, rtol=4e-16)


# ---------------------------------------------------------------------- against Transformers


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, int, dict[str, Any]]:
    """Family, head size, max positions and legal rope parameters of every type."""
    family, rope_type = draw(st.sampled_from(sorted(NAMES))), draw(st.sampled_from(ROPE_TYPES))
    head_dim, max_positions = 2 * draw(st.integers(1, 128)), draw(st.integers(4, 300) | st.just(4096))
    partial = draw(st.sampled_from([0, 0.25, 0.5, 1.0])) if family == "stablelm" else 1.0
    if family == "stablelm" and rope_type == "proportional":
        partial = 1.0
    rotary_dim = int(head_dim * partial)
    assume(rotary_dim % 2 == 0 and not (rope_type == "dynamic" and rotary_dim == 2))
    theta = draw(st.sampled_from([1e4, 10000, 1e5, 20000, 5e5, 1e6]) | st.floats(2, 1e8) | st.integers(2, 10**8))
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    if family == "stablelm":
        rope["partial_rotary_factor"] = partial
    factor = st.sampled_from([2.0, 4, 20]) | st.floats(1, 50)
    if rope_type != "default":
        rope["factor"] = draw(factor)
    if rope_type == "proportional" and family != "stablelm":
        rope["partial_rotary_factor"] = draw(st.floats(0, 1))
    if rope_type in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = draw(st.integers(2, max_positions))
    if rope_type == "llama3":
        rope |= {"low_freq_factor": draw(st.floats(0.5, 2)), "high_freq_factor": draw(st.floats(2.5, 8))}
    options: dict[str, st.SearchStrategy[Any]] = {}
    if rope_type == "longrope":
        divisors = st.lists(st.floats(0.5, 20), min_size=rotary_dim // 2, max_size=rotary_dim // 2)
        rope |= {"short_factor": draw(divisors), "long_factor": draw(divisors)}
        options = {"attention_factor": st.floats(0.5, 2), "factor": st.none()}
    if rope_type == "yarn":
        options = {
            "factor": st.none(),
            "attention_factor": st.floats(0.5, 2),
            "beta_fast": st.floats(1, 64),
            "beta_slow": st.floats(0.2, 4) | st.just(0),
            "mscale": st.floats(0, 2),
            "mscale_all_dim": st.floats(0, 2),
            "truncate": st.booleans(),
        }
    return family, head_dim, max_positions, rope | {k: draw(v) for k, v in options.items() if draw(st.booleans())}


def call_lengths(max_positions: int) -> st.SearchStrategy[list[int]]:
    near = st.sampled_from([max_positions - 1, max_positions, max_positions + 1, 2 * max_positions])
    return st.lists(st.integers(1, 9000) | near, min_size=1, max_size=5)


def positions_up_to(length: int) -> np.ndarray:
    """Two rows of four, not in order, whose largest position is length - 1."""
    return np.array([[length - 1, 0, length // 2, length // 3], [length // 4, length - 1, 0, 0]])


@settings(max_examples=150)
@given(case=cases(), data=st.data())
def test_exact_tables_equal_transformers_widened_to_float64(
    case: tuple[str, int, int, dict[str, Any]], data: st.DataObject
) -> None:
    ours, theirs = make_config(*case[:3], **case[3])
    rotary = RotaryEmbedding(ours, exact=True)
    with transformers_in_float64():
        module = their_rotary(theirs)
        assert rotary.attention_factor == module.attention_scaling
        for length in data.draw(call_lengths(case[2])):
            positions = positions_up_to(length)
            for table, expected in zip(
                rotary.tables(positions), their_tables(module, positions, torch.float64), strict=True
            ):
                assert table.dtype == np.float64
                assert table.shape == (*positions.shape, ours.rotary_dim // 2)
                np.testing.assert_allclose(table, expected, rtol=0, atol=1e-14 * length + 1e-14)
            np.testing.assert_allclose(rotary.inv_freq, module.inv_freq.numpy(), rtol=1e-12)


def ulps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.abs(ours - theirs) / np.spacing(np.abs(theirs))


@pytest.mark.cpu
@settings(max_examples=100)
@given(case=cases(), data=st.data())
def test_float32_tables_are_those_of_transformers_to_one_ulp(
    case: tuple[str, int, int, dict[str, Any]], data: st.DataObject
) -> None:
    ours, theirs = make_config(*case[:3], **case[3])
    rotary, module = RotaryEmbedding(ours, exact=False), their_rotary(theirs)
    lengths = data.draw(call_lengths(case[2]))
    assert lengths
    for length in lengths:
        positions = positions_up_to(length)
        tables, expected = rotary.tables(positions), their_tables(module, positions, torch.float32)
        # (test_powers_are_those_of_torch says how few differ at all)
        np.testing.assert_allclose(rotary.inv_freq, module.inv_freq.numpy(), rtol=4 * 2.0**-23, atol=0)
        same = rotary.inv_freq == module.inv_freq.numpy()
        for ours_BSR, theirs_BSR in zip(tables, expected, strict=True):
            # each of the two functions is off by less than an ulp, and so may the product with the attention factor be
            allowed = 1 if rotary.attention_factor == 1 else 2
            assert (ulps(ours_BSR, theirs_BSR)[..., same] <= allowed).all()


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
def test_frequencies_equal_the_functions_of_transformers_in_float64(rope_type: str) -> None:
    own = {
        "longrope": {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8},
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "proportional": {"partial_rotary_factor": 0.6},
    }.get(rope_type, {})
    ours, theirs = make_config("arcee", 16, 512, rope_type=rope_type, rope_theta=1e4, factor=4.0, **own)
    with transformers_in_float64():
        expected, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](theirs)
    rotary = RotaryEmbedding(ours, exact=True)
    np.testing.assert_allclose(rotary.inv_freq, expected.numpy(), rtol=1e-14)
    assert rotary.attention_factor == attention_factor


# ---------------------------------------------------------------------- lengths and state


@pytest.mark.parametrize("exact", [True, False])
def test_dynamic_follows_a_sequence_of_calls_as_transformers_does(exact: bool) -> None:
    ours, theirs = make_config("helium", 16, 32, rope_type="dynamic", rope_theta=1e4, factor=3.0)
    rotary, module = RotaryEmbedding(ours, exact=exact), their_rotary(theirs)
    for length in (9, 40, 36, 32, 31, 33, 45, 32, 5):
        positions = np.arange(length)[None]
        cos, _ = rotary.tables(positions)
        np.testing.assert_allclose(cos, their_tables(module, positions, torch.float32)[0], atol=1e-4)
        np.testing.assert_allclose(rotary.inv_freq, module.inv_freq.numpy(), rtol=2e-6)


def test_dynamic_keeps_the_longest_call_until_a_shorter_one_than_trained() -> None:
    config, _ = make_config("llama", 16, 32, rope_type="dynamic", rope_theta=1e4, factor=2.0)
    rotary = RotaryEmbedding(config, exact=True)
    plain = rotary.inv_freq

    def after(length: int) -> np.ndarray:
        rotary.tables(np.array([[0], [length - 1]]))  # the longest row of the batch counts
        return rotary.inv_freq

    assert after(32) is plain
    stretched = after(40)
    assert (stretched[1:] < plain[1:]).all()
    assert after(36) is stretched
    assert after(32) is stretched  # exactly the trained length does not reset
    assert after(31) is plain
    after(50)
    rotary.reset()
    assert rotary.inv_freq is plain
    assert after(33) is not plain


def test_longrope_chooses_the_list_per_call_without_memory() -> None:
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config, _ = make_config(
        "arcee", 8, 64, rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=16, **lists
    )
    rotary = RotaryEmbedding(config, exact=True)
    plain = rope_tables.default_inv_freq(8, 1e4)
    for length, divisor in ((16, 1), (17, 2), (16, 1), (64, 2), (1, 1)):
        rotary.tables(np.array([[0, length - 1]]))
        np.testing.assert_array_equal(rotary.inv_freq, plain / divisor)


@pytest.mark.parametrize("rope_type", ["default", "dynamic", "yarn", "linear"])
def test_no_rotary_dims_give_empty_tables(rope_type: str) -> None:
    config, _ = make_config("stablelm", 16, 8, rope_type=rope_type, rope_theta=1e4, factor=2.0, partial_rotary_factor=0)
    for exact in (True, False):
        cos, sin = RotaryEmbedding(config, exact).tables(np.arange(20)[None])
        assert cos.shape == sin.shape == (1, 20, 0)


def test_empty_calls_leave_the_state_alone() -> None:
    config, _ = make_config("llama", 16, 8, rope_type="dynamic", rope_theta=1e4, factor=2.0)
    rotary = RotaryEmbedding(config, exact=True)
    rotary.tables(np.arange(20)[None])
    stretched = rotary.inv_freq
    assert rotary.tables(np.zeros((2, 0), np.int64))[0].shape == (2, 0, 8)
    assert rotary.inv_freq is stretched


def test_exact_angles_stay_exact_at_large_positions() -> None:
    config, _ = make_config("llama", 8, 8, rope_type="default", rope_theta=1e4)
    position = 10**7 + 1
    cos, _ = RotaryEmbedding(config, exact=True).tables(np.array([[position]]))
    assert cos[0, 0, 0] == math.cos(position)
    assert abs(cos[0, 0, 1] - math.cos(position / 10)) < 1e-9


# ---------------------------------------------------------------------- the functions of torch

EDGES = np.array([0, 1e-45, 1e-30, 1e-7, 2.44e-4, 0.25, 0.5, math.pi / 2, math.pi, 9999.999, 1e6], np.float32)


@pytest.mark.cpu
@pytest.mark.parametrize("scale", [1, 1e3, 1e6])
def test_cos_and_sin_are_correctly_rounded_and_within_an_ulp_of_those_of_torch(scale: float) -> None:
    """Whatever torch's math library is on this CPU. Its own error shows in a few percent of the arguments."""
    drawn = np.random.default_rng(0).uniform(-scale, scale, 20_000).astype(np.float32)
    near_half_turns = np.arange(0, 3183)[:, None] * (math.pi / 2) + np.linspace(-1e-3, 1e-3, 9)
    x = np.concatenate([drawn, EDGES, -EDGES, near_half_turns.ravel().astype(np.float32)])
    ours = rope_tables.cos_sin_tables(np.ones(1, np.float32), x)
    for table, function, theirs in zip(ours, (math.cos, math.sin), (torch.cos, torch.sin), strict=True):
        np.testing.assert_array_equal(table[:, 0], np.array([function(float(value)) for value in x], np.float32))
        torchs = theirs(torch.from_numpy(x)).numpy()
        assert (ulps(table[:, 0], torchs) <= 1).all()
        assert (table[:, 0] != torchs).mean() < 0.1


@pytest.mark.cpu
def test_powers_are_those_of_torch() -> None:
    """Those of the vector code to the bit; of those that the C library computes few are off, by an ulp."""
    drawn = np.random.default_rng(0).uniform(1, 1e7, 2).tolist()
    bases = [1e4, 10000, 1e5, 20000, 5e5, 1e6, 1, 1e-5, 2.5, 3e38, *drawn]
    step = 2 * this_cpu().lanes
    differing = counted = 0
    for dim in range(2, 257, 6):
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        whole = len(exponents) // step * step if step else 0
        for base in bases:
            ours, theirs = torch_elementary.power(base, exponents.numpy()), (base**exponents).numpy()
            np.testing.assert_array_equal(ours[:whole], theirs[:whole], err_msg=f"base {base}, {dim} dims")
            assert (ulps(ours, theirs) <= 1).all()
            differing, counted = differing + int((ours != theirs).sum()), counted + len(ours) - whole
    assert differing <= 0.01 * counted


def test_powers_of_one_element_are_those_of_torch() -> None:
    bases = np.random.default_rng(0).uniform(1, 1e4, 300).astype(np.float32)
    assert len(bases) == 300
    for base in bases:
        for dim in (4, 6, 20, 128):
            exponent = dim / (dim - 2)
            ours, theirs = torch_elementary.power_of_scalar(base, exponent), (torch.tensor(base) ** exponent).item()
            assert ours == theirs


def test_non_finite_arguments_do_as_torch_does() -> None:
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    with np.errstate(invalid="ignore"):
        for table in rope_tables.cos_sin_tables(np.ones(1, np.float32), x):
            assert np.isnan(table).all()
    assert torch_elementary.power(math.inf, np.array([0, 0.5], np.float32)).tolist() == [1, math.inf]
