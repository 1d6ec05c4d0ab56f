"""What asserts in the stacks' tests can fail: a wrong model does not hold, and a bug elsewhere is not named."""

from typing import Any

import harness
import pytest
from harness import LLAMA, Bug, Checks, must_be_named, must_hold

import refllm
from refllm import golden

IDS = [[5, 17, 300, 12, 9, 88, 41, 7, 260, 33, 512, 64, 2, 71, 19, 450]]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    monkeypatch.setattr(harness, "ALL", {})
    return Checks("none", (LLAMA,), ("float32",))


class Shown:
    """A recorder that hands values on, one of them times 1.5, and those that end as named not at all."""

    def __init__(self, tap: Any, wrong: str, without: tuple[str, ...]) -> None:
        self.tap, self.wrong, self.without = tap, wrong, without

    def wants(self, name: str) -> bool:
        return name != "lm_head" and not (self.without and name.endswith(self.without))

    def record(self, name: str, value: Any) -> None:
        self.tap(name, value * 1.5 if self.wrong and name.endswith(self.wrong) else value)


def port(wrong: str = "", without: tuple[str, ...] = ()) -> Any:
    model = refllm.load(golden.path(LLAMA))

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any) -> Any:
        return model(input_ids=ids, recorder=Shown(tap, wrong, without)).logits

    return forward


def test_a_right_model_is_recorded_and_a_wrong_one_is_an_error(checks: Checks) -> None:
    must_hold(checks, LLAMA, "float32", port(), input_ids=IDS)
    assert [(run["checkpoint"], run["family"], run["values"]) for run in checks.held] == [(LLAMA, "llama", 54)]
    with pytest.raises(AssertionError, match=r"layers\.1\.mlp\.act"):
        must_hold(checks, LLAMA, "float32", port("layers.1.mlp.act"), input_ids=IDS)
    assert len(checks.held) == 1


def test_a_bug_is_named_at_its_place_or_in_a_span_that_has_it_and_nowhere_else(checks: Checks) -> None:
    act = Bug("act times 1.5", None, "layers.1.mlp.act")
    must_be_named(checks, act, "float32", port("layers.1.mlp.act"), input_ids=IDS)
    assert checks.named[-1]["named"] == "model.layers.1.mlp.act"
    assert checks.named[-1]["of"] == 1
    gate = Bug("gate times 1.5", None, "layers.1.mlp.gate_proj")
    with pytest.raises(AssertionError, match=r"expected layers.1.mlp.gate_proj, named fails; model.layers.1.mlp.act"):
        must_be_named(checks, gate, "float32", port("layers.1.mlp.act"), input_ids=IDS)
    hidden = ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")
    must_be_named(checks, gate, "float32", port("layers.1.mlp.act", hidden), input_ids=IDS)
    assert checks.named[-1]["of"] == 3
    with pytest.raises(AssertionError, match=r"act times 1\.5: holds"):
        must_be_named(checks, act, "float32", port(), input_ids=IDS)


def test_each_bug_is_planted_once_and_the_formats_take_turns() -> None:
    checks = Checks("none", (LLAMA,), ("float32", "bfloat16"))
    bugs = (Bug("a", None, "x"), Bug("b", None, "x"), Bug("c", None, "x", dtype="bfloat16"))
    assert [case.values[1] for case in checks.planted(bugs)] == ["float32", "bfloat16", "bfloat16"]
    harness.ALL.pop("none")


def test_what_a_stack_has_installed_is_named() -> None:
    found = harness.installed_versions(["ml_dtypes==0.1", "typer[all]==1"])
    assert list(found) == ["python", "ml_dtypes", "typer", "numpy", "torch"]
