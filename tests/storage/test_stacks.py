"""Projections of one input as one product: the same numbers, the same names, and only where nothing is rounded."""

from copy import deepcopy
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refllm
from refllm import golden, ops
from refllm.forward import operators
from refllm.forward.operators import Operators
from refllm.precision import arithmetic
from refllm.storage.stacks import Stack, rooms, stack_of

NAMES = ("q_proj", "k_proj", "v_proj")
ROWS = {"q_proj": 48, "k_proj": 16, "v_proj": 16}
CHECKPOINTS = golden.checkpoints()


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """q, k and v under each other, with values."""
    found = rooms({f"{name}.weight": (rows, 64) for name, rows in ROWS.items()}, np.dtype(np.float32))
    for seed, name in enumerate(NAMES):
        found[f"{name}.weight"][...] = drawn(ROWS[name], 64, seed=seed)
    return {name: found[f"{name}.weight"] for name in NAMES}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weight of every product that is computed."""
    rows: list[int] = []
    linear = ops.linear

    def counted(x: np.ndarray, weight: np.ndarray, *rest: Any, **options: Any) -> np.ndarray:
        rows.append(len(weight))
        return linear(x, weight, *rest, **options)

    monkeypatch.setattr(operators.ops, "linear", counted)
    return rows


@pytest.mark.parametrize("order", list(permutations(NAMES)))
@pytest.mark.parametrize("tokens", [1, 5])
def test_parts_of_one_product_are_the_separate_products(
    weights: dict[str, np.ndarray], order: tuple[str, ...], tokens: int
) -> None:
    """In any order, with and without bias, and for inputs that alternate: each sum of 64 products of float32 numbers
    is within 64 roundings of the exact one."""
    op = Operators(arithmetic("float32"))
    inputs, compared = [drawn(2, tokens, 64, seed=seed) for seed in (7, 8)], list[bool]()
    for name in order:
        for x in inputs:
            bias = drawn(ROWS[name], seed=9) if name == "k_proj" else None
            y = op.linear(x, weights[name], bias)
            exact = ops.linear(x, weights[name], bias)
            bound = 65 * 2.0**-24 * (np.abs(x).astype(float) @ np.abs(weights[name].T) + 4)
            assert y.shape == exact.shape
            compared.append(bool((np.abs(y - exact) <= bound).all()))
    assert compared == [True] * 2 * len(NAMES)


def test_one_product_serves_all_parts_and_is_not_kept_after_the_last(
    weights: dict[str, np.ndarray], products: list[int]
) -> None:
    op, x = Operators(arithmetic("float32")), drawn(1, 3, 64)
    for name in NAMES:
        op.linear(x, weights[name])
    assert products == [80]
    assert op._shared[0] is None


def test_a_weight_that_stands_alone_is_multiplied_alone(weights: dict[str, np.ndarray], products: list[int]) -> None:
    op, x = Operators(arithmetic("float32")), drawn(1, 3, 64)
    for weight in (deepcopy(weights["k_proj"]), drawn(40, 64)[8:24], weights["k_proj"].astype(np.float64)):
        assert stack_of(weight) is None
        op.linear(x, weight)
    assert products == [16] * 3


@pytest.mark.parametrize("missing", NAMES)
def test_what_is_no_whole_group_of_one_width_is_not_put_together(missing: str) -> None:
    shapes = {f"layers.0.self_attn.{name}.weight": (rows, 64) for name, rows in ROWS.items()}
    assert len(rooms(shapes, np.dtype(np.float32))) == 3
    name = f"layers.0.self_attn.{missing}.weight"
    assert not rooms({key: shape for key, shape in shapes.items() if key != name}, np.dtype(np.float32))
    assert not rooms(shapes | {name: (16, 32)}, np.dtype(np.float32))


@pytest.mark.parametrize("checkpoint", sorted(CHECKPOINTS))
def test_a_loaded_model_computes_projections_together_and_tells_what_it_told(
    checkpoint: str, products: list[int]
) -> None:
    """The same values, named alike, as a model whose weights are copies and therefore stand alone."""
    model = refllm.load(CHECKPOINTS[checkpoint], dtype="float32")
    ids = np.arange(24).reshape(2, 12)
    together, alone = Kept(), Kept()
    model(input_ids=ids, recorder=together)
    count = len(products)
    for index in range(model.config.num_hidden_layers):
        model.weights._layers[index] = {name: w.copy() for name, w in model.weights.layer(index).items()}
    model(input_ids=ids, recorder=alone)
    gated = model.config.model_type != "arcee"
    assert len(products) - count == count + model.config.num_hidden_layers * (3 if gated else 2)
    assert list(together.values) == list(alone.values)
    for name, value in alone.values.items():
        found = together.values[name]
        assert found.shape == value.shape
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "policy"), [("float64", None), ("float32", "hf-eager"), ("float32", "fused"), ("bfloat16", "fused")]
)
def test_where_rounding_points_are_kept_products_stay_apart(
    dtype: str, policy: str | None, products: list[int]
) -> None:
    model = refllm.load(CHECKPOINTS["helium-tiny"], dtype=dtype, policy=policy)
    model(input_ids=np.arange(6)[None])
    assert len(products) == 7 * model.config.num_hidden_layers + 1


def test_low_memory_and_saved_models_have_the_same_tensors(tmp_path: Path) -> None:
    folder = CHECKPOINTS["helium-tiny"]
    model, low = refllm.load(folder, dtype="float32"), refllm.load(folder, dtype="float32", low_memory=True)
    assert isinstance(model.weights.layer(0)["mlp.up_proj.weight"].base, Stack)
    ids = np.arange(10)[None]
    model.save_pretrained(tmp_path)
    for other in (low, refllm.load(tmp_path, dtype="float32")):
        assert all(np.array_equal(other.weights[name], model.weights[name]) for name in model.weights)
        np.testing.assert_allclose(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 40)])
@pytest.mark.parametrize("outputs", [1, 3, 50])
def test_a_product_cut_for_several_threads_is_the_product(
    shape: tuple[int, int], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_WORTH_READING_TOGETHER", 1)
    x, weight, bias = drawn(*shape, 64), drawn(outputs, 64, seed=1), drawn(outputs, seed=2)
    y = Operators(arithmetic("float32")).linear(x, weight, bias)
    exact = ops.linear(x, weight, bias)
    assert y.dtype == np.float32
    assert (np.abs(y - exact) <= 65 * 2.0**-24 * (np.abs(x).astype(float) @ np.abs(weight.T) + np.abs(bias))).all()


class Kept:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def wants(self, name: str) -> bool:
        return not name.endswith(("scores", "probs"))

    def record(self, name: str, value: np.ndarray) -> None:
        self.values[name] = value.copy()
