"""Which stacks' tests are collected, and where their results go."""

import json
import os
from pathlib import Path

import environments
import pytest
from harness import ALL, installed_versions, results

RESULTS = "REFLLM_STACK_RESULTS"
"""Names the file into which `make test-stacks STACK=NAME` wants the results of that stack's tests."""

# `make test` has not the packages of these: tests/house/run_stacks.py runs them, each in an environment of its own, by
# naming the file (what is named is collected in any case). Not skipped, which would look like a pass, but not there.
collect_ignore = environments.only_by_hand()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing is written of a run in which a test failed, nor of a stack in which no model is judged."""
    file = Path(os.environ.get(RESULTS, ""))
    if exitstatus == 0 and file.stem in ALL:
        checks = ALL[file.stem]
        found = results(checks, installed_versions(environments.ENVIRONMENTS[checks.stack].pins))
        file.write_text(json.dumps(found, indent=1) + "\n")
