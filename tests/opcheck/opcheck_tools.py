"""What the tests of `check_op` share: reproductions run in a process of their own, and the command."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from refllm.commands.cli import main
from refllm.opcheck.api import OpReport
from refllm.strategies import Array

HERE = Path(__file__).parent


def command(monkeypatch: Any, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["refllm", "check-op", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def shapes(report: OpReport) -> dict[str, tuple[int, ...]]:
    assert report.finding is not None
    call = report.finding.call
    return {n: x.shape for n, x in zip(call.names, call.arguments, strict=True) if isinstance(x, Array)}


def run_alone(program: str) -> tuple[int, str]:
    """Exit code and output of a reproduction, in a process of its own that has Torch already."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        sys.stdout, code = os.fdopen(write, "w"), 70
        try:
            exec(compile(program, "reproduction.py", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 71
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as output:
        said = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def shown(report: OpReport) -> str:
    """The output of the report's reproduction, which must fail, import nothing of refllm and be short."""
    code, said = run_alone(report.repro)
    assert code == 1, said + report.repro
    assert len(report.repro.splitlines()) <= 90
    assert max(len(line) for line in report.repro.splitlines()) <= 120
    return said


def is_there(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
