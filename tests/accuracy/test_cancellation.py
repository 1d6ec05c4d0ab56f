"""A sigmoid that cancels gets one answer, alone and in a model: nothing is left of it where the gate is far below 0."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refllm.accuracy.cancellation import nothing_left
from refllm.accuracy.expected import expect_values
from refllm.accuracy.judge import judge as judge_operator
from refllm.check.candidates import record
from refllm.check.inputs import Inputs
from refllm.check.oracle import judge as judge_model
from refllm.mutants.in_pages import Defect, planted
from refllm.precision import rounding
from refllm.strategies import small_models

Form = Callable[[np.ndarray], np.ndarray]


def one_plus_tanh(g: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * g * (1 + np.tanh(np.float32(0.5) * g))


def one_less_sigmoid(g: np.ndarray) -> np.ndarray:
    return g * (1 - 1 / (1 + np.exp(g)))


def by_exp(g: np.ndarray) -> np.ndarray:
    return g / (1 + np.exp(-g))


def mirrored(g: np.ndarray) -> np.ndarray:
    part = 1 / (1 + np.exp(np.abs(g)))
    return g * np.where(g < 0, part, 1 - part)


def one_plus_tanh_in_float64(g: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * g.astype(np.float64) * (1 + np.tanh(0.5 * g.astype(np.float64))))


CANCEL, HONEST = (one_plus_tanh, one_less_sigmoid), (by_exp, mirrored, one_plus_tanh_in_float64)


def swiglu(form: Form, gate: np.ndarray, up: np.ndarray, dtype: str) -> np.ndarray:
    """float32 inside, rounded once."""
    with np.errstate(over="ignore"):
        return rounding(dtype)(form(gate.astype(np.float32)) * up.astype(np.float32))


def operands(low: float, high: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    gate, up = rng.uniform(low, high, (4, 50)).astype(np.float32), rng.standard_normal((4, 50)).astype(np.float32)
    return rounding(dtype)(gate), rounding(dtype)(up)


def holds_alone(form: Form, gate: np.ndarray, up: np.ndarray, dtype: str) -> tuple[bool, str]:
    (expected,) = expect_values("swiglu", (gate, up), {}, dtype, "fused")
    found = judge_operator(swiglu(form, gate, up, dtype), expected)
    return found.holds, found.faults[0].text if found.faults else ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [*CANCEL, *HONEST])
def test_nothing_is_left_of_what_cancels_and_all_of_the_rest(form: Form, dtype: str) -> None:
    gate, up = operands(-33, -18.5, dtype)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    lost = nothing_left(gate, swiglu(form, gate, up, dtype), exact, dtype)
    assert lost.mean() > 0.9 if form in CANCEL else not lost.any()
    # A value that is read as it was before it was rounded is no sigmoid lost.
    before = gate.astype(np.float64) * (1 + 2.0**-9)
    unrounded = before / (1 + np.exp(-before)) * up
    assert not nothing_left(gate, unrounded, exact, dtype).any()
    for low, high in ((-17, 20), (-80, -33)):
        gate, up = operands(low, high, dtype)
        exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
        assert form in CANCEL or not nothing_left(gate, swiglu(form, gate, up, dtype), exact, dtype).any()
    gate, up = operands(-17, 20, dtype)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    assert not nothing_left(gate, swiglu(form, gate, up, dtype), exact, dtype).any()


def test_float16_cannot_hold_such_a_sigmoid_itself() -> None:
    gate, up = operands(-60, -18.5, "float16")
    assert not nothing_left(gate, np.zeros_like(gate), gate * np.exp(gate.astype(np.float64)) * up, "float16").any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [*CANCEL, *HONEST])
def test_a_form_gets_the_same_answer_alone_and_in_a_model(form: Form, dtype: str) -> None:
    cls, config = small_models.model_class("llama"), small_models.small_config("llama", intermediate_size=160)
    tensors = small_models.random_tensors(cls.tensors(config), 3)
    tensors |= {name: 10 * x for name, x in tensors.items() if "gate_proj" in name}
    model = small_models.build(cls, config, tensors, dtype, None if dtype == "float32" else "fused")

    def wrong(op: Any, gate: np.ndarray, up: np.ndarray, *_: Any, **choices: Any) -> np.ndarray:
        return swiglu(form, gate, up, dtype)

    candidate = planted(model, Defect("glu", ("mlp.act",), wrong), layer=1)
    trace = record(candidate, model, Inputs(np.random.default_rng(0).integers(0, 96, (1, 40))))
    gate, up = (trace.taps[f"model.layers.1.mlp.{name}_proj"][0] for name in ("gate", "up"))
    assert (gate < -18).any()
    alone, sentence = holds_alone(form, gate, up, dtype)
    report = judge_model(model, trace)
    assert (alone, report.verdict == "holds") == (form in HONEST, form in HONEST), (report.verdict, sentence)
    if form in CANCEL:
        assert report.verdict == "fails"
        assert report.first_failure is not None
        assert report.first_failure.name == "model.layers.1.mlp.act"
        assert report.first_failure.named == sentence
        assert "nothing is left of the sigmoid" in sentence
