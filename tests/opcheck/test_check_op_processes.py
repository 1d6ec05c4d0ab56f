"""Work in processes of their own: candidates and tests that end theirs, when they are called or when imported."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import opcheck_candidates as candidates  # noqa: E402
from opcheck_tools import is_there, run_alone, shown  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from refllm.apart import Ended, run  # noqa: E402
from refllm.check import check_op  # noqa: E402
from refllm.commands import cli  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.opcheck import audit as auditing  # noqa: E402
from refllm.opcheck.audit import TestIsVoidError, audit  # noqa: E402
from refllm.strategies import corners  # noqa: E402


def test_what_a_fork_returns_and_how_it_may_end(capfd: Any) -> None:
    here = os.getpid()
    assert run(lambda: (os.getpid() != here, 3)) == [True, 3]
    assert run(lambda: os._exit(3)) == Ended("its process ended: exit code 3", in_time=True)
    assert run(lambda: os.kill(os.getpid(), 9)) == Ended("its process ended: SIGKILL", in_time=True)
    assert run(lambda: time.sleep(60), 0.05) == Ended("no answer within 0.05 s", in_time=False)
    assert "ZeroDivisionError" in run(lambda: 1 // 0).text
    assert run(lambda: (print("first\nlast\n \n", flush=True), os._exit(3))).text.endswith("exit code 3 (last)")
    assert run(lambda: (print("the only line", flush=True), os._exit(3))).text.endswith("(the only line)")
    assert run(lambda: (print("w" * 300, flush=True), os._exit(3))).text.endswith(f"({'w' * 200})")
    run(lambda: print("a word on standard output"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "how"), [("os._exit(0)", "exit code 0"), ("os._exit(3)", "exit code 3"), ("os.abort()", "SIGABRT")]
)
def test_a_file_whose_import_ends_the_process_is_one_sentence(source: str, how: str, tmp_path: Path) -> None:
    file = tmp_path / "ends_everything.py"
    file.write_text(f"import os\n{source}\n")
    for ask in (lambda: check_op("rms_norm", f"{file}:f"), lambda: audit("rms_norm", f"{file}:f")):
        with pytest.raises(InputError, match=f"cannot be imported: its process ended: {how}"):
            ask()


MINE = """
import os


def ends_on_a_mutant(fn):
    if fn.__module__ != "refllm.kernels.plain.activation":
        os._exit(3)


def ends(fn):
    os._exit(3)
"""


def test_a_test_that_ends_the_process_has_answered(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("refllm.kernels.plain.activation", plain.relu2.__module__))
    report = audit("relu2", f"{file}:ends_on_a_mutant")
    assert {o.by for o in report.outcomes} == {"its process ended: exit code 3"}
    assert report.kill_rate == 1
    with pytest.raises(TestIsVoidError, match=r"it rejects the right relu2 .* with its process ended: exit code 3"):
        audit("relu2", f"{file}:ends")
    done = CliRunner().invoke(cli.app, ["audit", "relu2", "--test", f"{file}:ends_on_a_mutant"])
    assert "bugs found" in done.output


def test_a_test_leaves_nothing_behind_in_this_process() -> None:
    seen: list[Any] = []
    assert audit("relu2", seen.append).kill_rate == 0
    assert seen == []


def test_a_test_runs_in_this_process_where_that_holds_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU does not survive a fork; here there is none."""
    seen: list[Any] = []
    monkeypatch.setattr(auditing, "_gpu_in_use", lambda: True)
    report = audit("relu2", seen.append)
    assert len(seen) == 1 + len(report.outcomes)


def test_dtype_is_explained_for_a_test_too() -> None:
    done = CliRunner().invoke(cli.app, ["audit", "--help"], env={"COLUMNS": "200"})
    assert "name the one that your test works in" in " ".join(done.output.replace("│", " ").split())


# -- what only a second call shows -------------------------------------------------------------------------------------


REUSES = [
    ("rms_norm", candidates.static_buffer, "torch"),
    ("rms_norm", candidates.pool, "torch"),
    ("rms_norm", candidates.numpy_static_buffer, "numpy"),
    ("add_rms_norm", candidates.static_residual, "torch"),
]


@pytest.mark.parametrize("case", REUSES, ids=lambda case: case[1].__name__)
def test_a_result_that_a_later_call_overwrites_is_a_finding(case: Any) -> None:
    operator, function, arrays = case
    report = check_op(operator, function, dtype="float32", arrays=arrays, max_examples=0, isolate=False)
    assert (report.verdict, report.property) == ("fails", "reuse"), str(report)
    assert "a later call overwrites what an earlier one returned" in report.finding.text
    assert report.finding.output == ("residual + x" if function is candidates.static_residual else "y")
    assert "results that a later call overwrote" in shown(report)


def test_results_that_stay_what_they_are_may_lie_where_they_like() -> None:
    """A result that is made once for good is not overwritten, though it lies in one place."""
    kept: dict[Any, Any] = {}

    def remembers(x: Any, weight: Any, eps: float) -> Any:
        key = (*(str(t.dtype) + str(t.double().tolist()) for t in (x, weight)), x.shape)
        return kept.setdefault(key, candidates.right(x, weight, eps))

    report = check_op("rms_norm", remembers, dtype="float32", max_examples=0, isolate=False)
    assert report.verdict == "holds", str(report)


NOW_AND_THEN = [
    (candidates.wrong_in_one_call_of_50, "wrong now and then: calls 1 to 49 right, 50 wrong, same inputs"),
    (candidates.raises_in_one_call_of_50, "calls 1 to 49 right, 50 ValueError: no memory left"),
]


@pytest.mark.parametrize("case", NOW_AND_THEN, ids=lambda case: case[0].__name__)
def test_what_is_wrong_in_one_call_of_50_is_said_to_be_so(case: Any) -> None:
    function, text = case
    report = check_op("rms_norm", function, dtype="float32", max_examples=100)
    assert (report.verdict, report.property) == ("fails", "determinism"), str(report)
    assert text in report.finding.text
    assert len(report.repro.splitlines()) < 90
    assert run_alone(report.repro)[0] == (1 if function is candidates.wrong_in_one_call_of_50 else 70)


def test_what_is_wrong_in_its_first_call_alone_is_said_to_be_so() -> None:
    report = check_op("rms_norm", candidates.wrong_in_its_first_call, dtype="float32", max_examples=0)
    assert report.finding.text == "wrong now and then: call 1 wrong, calls 2 to 201 right, same inputs"


def test_a_right_function_that_forks_passes_and_leaves_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FORKED", str(tmp_path))
    report = check_op("rms_norm", candidates.forks, dtype="float32", calls=corners("rms_norm", "float32")[:8])
    assert report.verdict == "holds", str(report)
    children = [int(file.name) for file in tmp_path.iterdir()]
    assert len(children) > 8
    end = time.monotonic() + 5
    while any(map(is_there, children)) and time.monotonic() < end:
        time.sleep(0.01)
    assert [pid for pid in children if is_there(pid)] == []


def test_what_a_candidate_prints_is_neither_kept_nor_shown(capfd: Any) -> None:
    call = corners("rms_norm", "float32")[:1]
    report = check_op("rms_norm", candidates.prints_much, dtype="float32", calls=call)
    assert report.verdict == "holds", str(report)
    assert capfd.readouterr() == ("", "")


def test_a_function_that_crashes_or_hangs_is_told_with_its_line() -> None:
    call = corners("rms_norm", "float32")[:1]
    for function, property in ((candidates.hangs, "hangs"), (candidates.aborts, "crashes")):
        large = [c for c in corners("rms_norm", "float32") if c.arguments[0].shape[-1] > 30][:1] or call
        report = check_op("rms_norm", function, dtype="float32", calls=large, time_limit=0.5, shrink=False)
        lines = function.__code__
        found = re.search(r"opcheck_candidates.py:(\d+)\)", report.finding.text)
        assert report.property == property
        assert found is not None, report.finding.text
        assert lines.co_firstlineno < int(found[1]) <= lines.co_firstlineno + 6
