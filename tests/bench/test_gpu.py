"""`make gpu`, as far as it goes without a GPU: every part of it, interpreted and reduced."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from refllm import apart, kernels
from refllm.apart import Batch
from refllm.bench import end_to_end, gpu, gpu_benchmarks, gpu_checks
from refllm.bench import kernels as kernel_bench
from refllm.kernels.calls import LAYERS, REDUCED, calls
from refllm.terminal.status_line import StatusLine

ROOT = Path(__file__).resolve().parents[2]
GPU_SIZES: dict[str, Any] = {
    "kernels": {"sizes": kernel_bench.SIZES["cuda"], "layers": tuple(layer.name for layer in LAYERS)},
    "attention": {name: getattr(kernel_bench, name.upper())["cuda"] for name in ("head_dims", "lengths", "batches")},
}


def _counted(jobs: list[Any]) -> tuple[int, int, int, int]:
    """Calls, forms, forms through torch.compile, and calls that a target names: of the plan for a GPU."""
    plan = kernel_bench.plan(jobs, "cuda", None)
    forms = [form.name for _, chosen in plan for form in chosen]
    return len(plan), len(forms), forms.count("compile"), sum(map(kernel_bench.named_by_a_target, jobs))


def test_everything_runs_and_is_written_down(
    warm_python: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--no-tests", "-o", str(file), "--only", "reduced partial,llama-tiny"]) == 0
    result = json.loads(file.read_text())
    assert (result["schema"], result["verdict"]) == (2, "holds")
    assert result["missing"] == []
    assert result["machine"]["torch"] == torch.__version__
    assert {row["operator"] for row in result["operators"]} == set(kernels.OPERATORS)
    assert {row["form"] for row in result["operators"]} == {"triton", "plain"}
    assert all(row["problem"] == "" and row["ratio"] is not None for row in result["operators"])
    assert {(row["backend"], row["what"]) for row in result["models"]} == {
        (backend, what) for backend in ("torch", "triton") for what in ("check", "recorded decoding")
    }
    assert {row["check"] for row in result["checks"]} == {"operators, reduced partial", "models"}
    assert "holds" in capsys.readouterr().out


def test_a_wrong_kernel_and_one_that_raises_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = (c for c in calls(REDUCED[0], "bfloat16", "cpu", tokens=4) if c.operator == "relu2")
    contract = gpu_checks.Contract(one.operator, one.arguments, one.keywords)

    class Broken:
        relu2 = staticmethod(lambda x: kernels.plain.relu2(x) * 1.02)

    class Raising:
        @staticmethod
        def relu2(x: Any) -> Any:
            raise RuntimeError("misaligned address")

    (row,) = gpu_checks.check_call(one, contract, "plain", Broken, ("reduced", "bfloat16"))
    assert "times that of the contract" in row["problem"]
    (row,) = gpu_checks.check_call(one, contract, "plain", Raising, ("reduced", "bfloat16"))
    assert row["problem"] == "RuntimeError: misaligned address"


def test_a_model_that_decodes_other_tokens_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from refllm.kernels.models.decode import DecodeStep

    right = DecodeStep.forward
    monkeypatch.setattr(DecodeStep, "forward", lambda self: -right(self))
    rows = end_to_end.check_models("cpu", (), StatusLine(sys.stderr), real=False, only="llama")
    problems = {row["backend"]: row["problem"] for row in rows}
    assert problems["torch"] == "other tokens than without the recorded step"


def test_tests_are_counted_and_failures_named(warm_python: None, tmp_path: Path) -> None:
    (tmp_path / "test_kernel_mine.py").write_text(TESTS)
    (tmp_path / "test_kernel_broken.py").write_text("import no_such_module\n")
    rows = tmp_path / "rows.jsonl"
    result = gpu.end_tests(gpu.start_tests("cpu", tmp_path, rows, 100), rows)
    assert result["counts"] == {"tests": 5, "failures": 1, "errors": 2, "skipped": 1}
    said = {failure["test"].rpartition("::")[2]: failure["message"] for failure in result["failures"]}
    assert {Path(name).name for name in said} == {"test_wrong", "test_no_fixture", "test_kernel_broken.py"}
    assert "sums" in said["test_wrong"]
    assert "no_such_fixture" in said["test_no_fixture"]
    assert any("no_such_module" in text for text in said.values())
    assert (result["problem"], result["missing"]) == ("tests failed", "")


TESTS = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "sums"
def test_no_fixture(no_such_fixture): pass
def test_skipped(): pytest.skip("today")
"""


def test_tests_that_are_ended_early_keep_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is left of the time to tidy up: neither pytest nor its workers can say a last word."""
    (tmp_path / "test_kernel_mine.py").write_text(
        "import time\ndef test_wrong(): assert 0\ndef test_hangs(): time.sleep(100)\n"
    )
    monkeypatch.setattr(apart, "SECONDS_TO_TIDY_UP", 0.0)
    file = tmp_path / "rows.jsonl"
    process = gpu.start_tests("cpu", tmp_path, file, 100)
    while not (file.exists() and file.read_text().endswith("\n")):  # the result of test_wrong, whole
        time.sleep(0.05)
    assert "done" not in file.read_text(), "it came while the tests ran"
    process._limit = 0.0
    result = gpu.end_tests(process, file)
    assert [failure["test"].rpartition("::")[2] for failure in result["failures"]] == ["test_wrong"]
    assert "ended after" in result["missing"]
    assert (result["problem"], result["exit"]) == ("tests failed", None)


def _so_far(process: Batch) -> str:
    return os.pread(process._streams[0].fileno(), 10_000, 0).decode()


def test_a_process_ends_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "child"
    program = f"""
import subprocess, sys, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(file)!r}, "w").write(str(child.pid))
print("said", flush=True)
time.sleep(100)
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "SECONDS_TO_TIDY_UP", 0.2)
        process = Batch(["-c", program], 100)
        while not _so_far(process):
            time.sleep(0.05)
        process._limit = 0.0
        process.wait()
    assert (process.code, process.output) == (None, "said")
    for _ in range(100):
        if _ended(int(file.read_text())):
            return
        time.sleep(0.05)
    pytest.fail("the grandchild lives on")


def _ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_check_that_breaks_off_leaves_its_rows_and_says_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"layer": "a", "problem": ""}
    file.write_text(json.dumps(row) + '\n{"layer": "b", "pro')
    broke = Batch(["-c", "import os; print('last words', file=__import__('sys').stderr); os._exit(3)"], 100)
    late = Batch(["-c", "import time; time.sleep(100)"], 0.0)
    result: dict[str, Any] = {"checks": [], "operators": [], "models": [], "tests": None, "benchmarks": []}
    gpu.end_checks({"operators, a": (broke, file), "models": (late, tmp_path / "none")}, result)
    assert result["operators"] == [row]
    output = tmp_path / "gpu.json"
    gpu._write(result, 0.0, output, ["tests", "decode"])
    written = json.loads(output.read_text())
    assert written["verdict"] == "fails"  # it broke: that is a finding
    assert "exit code 3: last words" in written["missing"][0]
    assert "models: what comes behind (its time was over)" in written["missing"]
    assert written["missing"][-2:] == ["tests: not run yet", "decode: not run yet"]
    result["checks"] = [part | {"problem": ""} for part in result["checks"]]
    gpu._write(result, 0.0, output, [])
    assert json.loads(output.read_text())["verdict"] == "incomplete"


def test_the_plan_of_time_is_what_the_pages_say() -> None:
    for text, names in ((gpu.__doc__, gpu_benchmarks.BENCHMARKS), (gpu_benchmarks.__doc__, ("kernels", "attention"))):
        assert text
        assert all(name in text for name in names)
    counted = {
        name: _counted(jobs(kernel_bench.Settings(device="cpu", **GPU_SIZES[name])))
        for name, jobs in (("kernels", kernel_bench.kernel_jobs), ("attention", kernel_bench.head_jobs))
    }
    assert counted == {"kernels": (152, 516, 20, 50), "attention": (72, 360, 0, 23)}
    said = " ".join((gpu_benchmarks.__doc__ or "").split())
    assert "kernels 152 calls in 516 forms, 20 of these through torch.compile; targets name 50 calls" in said
    assert "attention 72 calls in 360 forms; targets name 23 calls" in said
    left = gpu.TOTAL_SECONDS - gpu.CHECK_SECONDS
    shares = {name: share for name, (share, _) in gpu_benchmarks.BENCHMARKS.items()}
    slots = [f"{name} {left * share / sum(shares.values()):.0f}" for name, share in shares.items()]
    assert f"(at least {left:.0f} s: {', '.join(slots)})" in " ".join((gpu.__doc__ or "").split())
    assert gpu.TOTAL_SECONDS <= 540  # of the 600 s for which such a machine is lent


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
    monkeypatch.setattr(gpu, "start_checks", lambda *_: pytest.fail("began"))
    assert gpu.main(["--device", "cpu", "-o", "gpu.json"]) == 2
    assert "run this from the root of the project" in capsys.readouterr().err


def test_installs_into_a_folder_of_its_own_without_a_network(tmp_path: Path) -> None:
    """As `make gpu` does it: no dependencies, no build isolation; and the parts outside refllm/ come along."""
    if importlib.util.find_spec("setuptools") is None:  # not imported here: it would exchange this process's distutils
        pytest.skip("there is no setuptools to build with")
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("refllm", "kernels", "golden"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    program = "import refllm.bench.gpu as g, refllm.golden as h; print(g.__file__, len(h.checkpoints()))"
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
