"""Work in processes of their own: candidates and tests that end theirs, when they are called or when imported."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

from typer.testing import CliRunner  # noqa: E402

from refllm import cli  # noqa: E402
from refllm.check import check_op  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.opcheck import audit as auditing  # noqa: E402
from refllm.opcheck.audit import TestIsVoidError, audit  # noqa: E402
from refllm.opcheck.forked import Ended, forked  # noqa: E402


def test_what_a_fork_returns_and_how_it_may_end(capfd: Any) -> None:
    here = os.getpid()
    assert forked(lambda: (os.getpid() != here, 3)) == (True, 3)
    assert forked(lambda: os._exit(3)) == Ended("its process ended: exit code 3")
    assert forked(lambda: os.kill(os.getpid(), 9)) == Ended("its process ended: SIGKILL")
    assert forked(lambda: time.sleep(60), 0.05) == Ended("no answer within 0.05 s", in_time=False)
    assert "ZeroDivisionError" in forked(lambda: 1 // 0).text
    assert forked(lambda: (print("first\nlast\n \n", flush=True), os._exit(3))).text.endswith("exit code 3 (last)")
    assert forked(lambda: (print("the only line", flush=True), os._exit(3))).text.endswith("(the only line)")
    assert forked(lambda: (print("w" * 300, flush=True), os._exit(3))).text.endswith(f"({'w' * 200})")
    forked(lambda: print("a word on standard output"))
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
