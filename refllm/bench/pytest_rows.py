"""A line of JSON per test result, written as soon as there is one: whoever ends the tests keeps what was found.

    python -m pytest -p refllm.bench.pytest_rows --rows FILE ...

A row has test (pytest's name for it), outcome ("passed", "failed", "error" or "skipped"), seconds and message. The last
line is {"done": true}, as in the files of `refllm.bench.gpu_checks`. With pytest-xdist the process that hands out the
tests writes the file.
"""

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --rows."""
    parser.getgroup("refllm").addoption("--rows", type=Path, help="a file that receives a line per test result")


def pytest_configure(config: pytest.Config) -> None:
    """Starts to write if this process is the one that hears of every result."""
    file = config.getoption("--rows")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(file))


class _Rows:
    """Hears of every result, before it is shown."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w", encoding="utf-8")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Setup and teardown count only where something went wrong in them.
        if report.when == "call" or report.outcome != "passed":
            self._write(row(report, wrong="failed" if report.when == "call" else "error"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(row(report, wrong="error"))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.INTERRUPTED:
            self._write({"done": True})
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._file, flush=True)


def row(report: pytest.TestReport | pytest.CollectReport, wrong: str) -> dict[str, Any]:
    """The line of a report. wrong: the outcome, if it is neither passed nor skipped."""
    outcome = wrong if report.outcome == "failed" else report.outcome
    crash = getattr(report.longrepr, "reprcrash", None)
    message = "" if outcome == "passed" else str(crash.message if crash is not None else report.longrepr)
    seconds = round(getattr(report, "duration", 0.0), 3)
    return {"test": report.nodeid, "outcome": outcome, "seconds": seconds, "message": message[:1000]}
