"""`make gpu`, as far as it goes without a GPU: every part of it, interpreted and reduced."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refllm import kernels
from refllm.kernels import end_to_end, gpu
from refllm.kernels.cases import LAYERS, REDUCED, cases
from refllm.status_line import StatusLine

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DTYPES", ("bfloat16", "float32"))
    monkeypatch.setattr(gpu, "REDUCED", REDUCED[1:])
    one = {"llama-tiny": end_to_end.golden.path("llama-tiny")}
    monkeypatch.setattr(end_to_end.golden, "checkpoints", lambda: one)


def test_everything_runs_and_is_written_down(reduced: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--no-tests", "-o", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["verdict"] == "holds"
    assert result["machine"]["torch"] == torch.__version__
    assert {row["operator"] for row in result["operators"]} == set(kernels.OPERATORS)
    assert {row["form"] for row in result["operators"]} == {"triton", "plain"}
    assert all(row["problem"] == "" and row["ratio"] is not None for row in result["operators"])
    assert {(row["backend"], row["what"]) for row in result["models"]} == {
        (backend, what) for backend in ("torch", "triton") for what in ("check", "recorded decoding")
    }
    assert "holds" in capsys.readouterr().out


def test_a_wrong_kernel_and_one_that_raises_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (c for c in cases(REDUCED[0], "bfloat16", "cpu", tokens=4) if c.operator == "relu2")
    contract = gpu.Contract(case.operator, case.arguments, case.keywords)

    class Broken:
        relu2 = staticmethod(lambda x: kernels.plain.relu2(x) * 1.02)

    class Raising:
        @staticmethod
        def relu2(x: Any) -> Any:
            raise RuntimeError("misaligned address")

    (row,) = gpu._check_call(case, contract, "plain", Broken, ("reduced", "bfloat16"))
    assert "times that of the contract" in row["problem"]
    (row,) = gpu._check_call(case, contract, "plain", Raising, ("reduced", "bfloat16"))
    assert row["problem"] == "RuntimeError: misaligned address"


def test_a_model_that_decodes_other_tokens_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from refllm.kernels.models.decode import DecodeStep

    right = DecodeStep.forward
    monkeypatch.setattr(DecodeStep, "forward", lambda self: -right(self))
    rows = end_to_end.check_models("cpu", (), StatusLine(sys.stderr), real=False, only="llama")
    problems = {row["backend"]: row["problem"] for row in rows}
    assert problems["torch"] == "other tokens than without the recorded step"


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    (tmp_path / "test_kernel_mine.py").write_text(
        "def test_right(): pass\ndef test_wrong(): assert 1 + 1 == 3, 'sums'\n"
    )
    result = gpu.run_tests("cpu", tmp_path, tmp_path / "report.xml")
    assert result["counts"] == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert result["failures"][0]["test"].endswith("test_wrong")
    assert "sums" in result["failures"][0]["message"]
    assert result["problem"] == "tests failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["-o", str(tmp_path / "gpu.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("refllm: make gpu needs a GPU")
    assert error.count("\n") == 1


def test_without_the_tests_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "check_operators", lambda *_: iter(()))
    monkeypatch.setattr(gpu, "check_models", lambda *_, **__: iter(()))
    assert gpu.main(["--device", "cpu", "-o", "gpu.json"]) == 2
    assert "run this from the root of the project" in capsys.readouterr().err


def test_cases_cover_every_operator_on_every_real_layer() -> None:
    for layer in (*LAYERS, *REDUCED):
        assert layer.H % layer.K == 0
        assert layer.R <= layer.D
    assert {case.operator for case in cases(REDUCED[0], "float16", "cpu", tokens=2)} == set(kernels.OPERATORS)


def test_installs_into_a_folder_of_its_own_without_a_network(tmp_path: Path) -> None:
    """As `make gpu` does it: no dependencies, no build isolation; and the parts outside refllm/ come along."""
    pytest.importorskip("setuptools")
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("refllm", "kernels", "golden"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    program = "import refllm.kernels.gpu as g, refllm.golden as h; print(g.__file__, len(h.checkpoints()))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": str(target), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert str(target) in run.stdout
    assert run.stdout.split()[-1] == "5"
