"""`make test-stacks`: what it installs, what it calls a failure, and that its table and its page are up to date."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import run_stacks
from environments import ENVIRONMENTS, only_by_hand
from packaging.requirements import Requirement

EXTRAS = run_stacks.extras()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_pins_are_what_the_extra_of_a_stack_allows_and_all_of_it(name: str) -> None:
    environment = ENVIRONMENTS[name]
    pins = {Requirement(pin).name: Requirement(pin) for pin in environment.pins}
    allowed = [Requirement(text) for text in EXTRAS.get(environment.extra, [])]
    here = [r for r in allowed if r.marker is None or r.marker.evaluate({"platform_system": "Linux"})]
    assert {r.name for r in here} == (pins.keys() if environment.extra else set())
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins.values())
    assert all(str(pins[r.name].specifier).removeprefix("==") in r.specifier for r in here)
    ours = next(Requirement(text) for text in EXTRAS["test"] if text.startswith("refllm["))
    assert environment.in_make_test == (not environment.pins or environment.extra in ours.extras)


def test_every_test_file_of_a_stack_has_an_environment() -> None:
    files = {file.stem.removeprefix("test_") for file in run_stacks.STACKS.glob("test_*.py")}
    assert files - {"harness"} <= ENVIRONMENTS.keys()
    assert "test_litgpt.py" in only_by_hand()
    assert "test_mlx.py" not in only_by_hand()


def test_an_environment_gets_torch_first_then_refllm_then_the_pins() -> None:
    torch, refllm, pins = run_stacks.installs(ENVIRONMENTS["litgpt"])
    assert torch == ["torch==2.13.0"]
    assert refllm[:2] == ["--editable", ".[check,fast,witness]"]
    assert pins == ["--no-deps", *ENVIRONMENTS["litgpt"].pins]
    assert len(run_stacks.installs(ENVIRONMENTS["torch_module"])) == 2


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What is run, in a repository whose documents are elsewhere; `code` can be set."""
    seen: dict[str, Any] = {"code": 0, "commands": []}

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        seen["commands"].append(command)
        seen["environment"] = how.get("env")
        return subprocess.CompletedProcess(command, seen["code"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(run_stacks, "RESULTS", tmp_path / "stacks")
    monkeypatch.setattr(run_stacks, "PAGE", tmp_path / "page")
    (tmp_path / "stacks").mkdir()
    monkeypatch.setattr(run_stacks, "STACKS", tmp_path)
    (tmp_path / "test_torch_module.py").touch()
    return seen


@pytest.mark.parametrize("code", [0, 1])
def test_a_stack_holds_when_its_tests_pass(code: int, seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    seen["code"] = code
    assert run_stacks.main(["--here", "harness"]) == 2
    assert "no tests of a stack 'harness'" in capsys.readouterr().err
    assert run_stacks.main(["--here", "torch_module"]) == code
    assert seen["commands"][-1][-1].endswith("/test_torch_module.py")
    assert seen["environment"]["REFLLM_STACK_RESULTS"].endswith("stacks/torch_module.json")
    said = capsys.readouterr().out
    assert ("1 of 1 hold" if code == 0 else "0 of 1 hold; not: torch_module") in said


def test_the_page_of_the_stacks_is_up_to_date() -> None:
    assert run_stacks.PAGE.read_text() == run_stacks.page(), "run_stacks.py --page writes it again"


def test_the_page_says_what_was_named_and_in_how_many_values_together(tmp_path: Path, seen: dict[str, Any]) -> None:
    bug = {"bug": "eps", "checkpoint": "llama-tiny", "dtype": "float32", "named": "model.norm", "of": 3, "said": "x"}
    run = {"checkpoint": "llama-tiny", "family": "llama", "dtype": "float32", "values": 5, "inputs": ["tokens"]}
    stack = {"stack": "x", "versions": {"x": "1"}, "checkpoints": ["llama-tiny"], "dtypes": ["float32"]}
    found = {**stack, "right": [{**run, "sigma": 0.9}], "bugs": [bug, {**bug, "bug": "b", "of": 1}]}
    (tmp_path / "stacks" / "x.json").write_text(json.dumps(found))
    text = run_stacks.page()
    assert "| x | x 1 | float32 | 1 | 2, 1 of them to the operator |" in text
    assert "| llama-tiny | float32 | tokens | 5 | 0.90 |" in text
    assert "| eps | llama-tiny | float32 | `model.norm`, last of 3 values together | x |" in text
    assert "| b | llama-tiny | float32 | `model.norm` | x |" in text
