"""The long run of the drawn tests: it stops at the first failure and says how to get it again."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN_LONG = Path(__file__).with_name("run_long.py")
TOY = """
from hypothesis import given, settings, strategies as st

settings.register_profile("long", print_blob=True, database=None)
settings.load_profile("long")


@given(st.integers())
def test_drawn(x):
    assert x < LIMIT


def test_not_drawn():
    raise AssertionError("never run")
"""


@pytest.mark.parametrize("fails", [True, False])
def test_it_stops_at_a_failure_and_names_the_seed(warm_python: None, tmp_path: Path, fails: bool) -> None:
    (tmp_path / "test_toy.py").write_text(TOY.replace("LIMIT", "100" if fails else "float('inf')"))
    command = [sys.executable, str(RUN_LONG), "--tests", str(tmp_path), "--seed", "5", "--rounds", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == int(fails), result.stdout + result.stderr
    assert "round 1: seed 5" in result.stdout
    assert ("round 2: seed" in result.stdout) == (not fails)
    assert ("no failure" in result.stdout) == (not fails)
    if fails:
        assert "failed in round 1. Again: python tests/house/run_long.py --seed 5 --rounds 1" in result.stdout
        assert "@reproduce_failure" in result.stdout
        assert "x=100" in result.stdout
        assert "never run" not in result.stdout


def test_the_time_ends_a_round(warm_python: None, tmp_path: Path) -> None:
    (tmp_path / "test_toy.py").write_text(TOY.replace("assert x < LIMIT", "__import__('time').sleep(60)"))
    command = [sys.executable, str(RUN_LONG), "--tests", str(tmp_path), "--minutes", "0.03"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120
    )  # what does not hear is killed
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no failure" in result.stdout


@pytest.mark.parametrize(("option", "words"), [("--minutes=0", "above 0"), ("--minutes=long", "invalid float")])
def test_wrong_use_is_a_sentence(warm_python: None, option: str, words: str) -> None:
    result = subprocess.run([sys.executable, str(RUN_LONG), option], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert words in result.stderr
