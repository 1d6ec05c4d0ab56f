"""`make test-cpus`: which CPUs it simulates, what it calls a failure, and what it prints."""

from typing import Any

import pytest
import run_cpus


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the runs get to see, and what they answer: `holds` and `output` can be set."""
    seen: dict[str, Any] = {"holds": True, "output": "", "environments": []}

    def run(what: str, command: list[str], environment: dict[str, str], lines: list[str]) -> tuple[bool, str]:
        seen["environments"].append(environment)
        return seen["holds"], seen["output"]

    monkeypatch.setattr(run_cpus, "_run", run)
    return seen


def test_every_cpu_gets_its_settings_and_no_others(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert run_cpus.main(["--no-check"]) == 0
    known = set().union(*run_cpus.SIMULATED.values()) - {"OPENBLAS_CORETYPE"}
    settings = [{key: value for key, value in e.items() if key in known} for e in seen["environments"]]
    for values in run_cpus.SIMULATED.values():
        assert {key: value for key, value in values.items() if key in known} in settings
    assert len(settings) == len(run_cpus.SIMULATED)


@pytest.mark.parametrize("options", [[], ["--no-check"]])
def test_what_fails_is_named(seen: dict[str, Any], options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    seen["holds"] = False
    assert run_cpus.main(["--only", "mkl that", *options]) == 1
    assert "failed: MKL that takes no notice of the CPU" in capsys.readouterr().out
    assert len(seen["environments"]) == (1 if options else 2)


def test_reasons_of_skips_are_counted_and_none_may_be_there_where_the_kernels_are_known(
    seen: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen["output"] = "SKIPPED [2] tests/a.py:1: one reason\nSKIPPED [3] tests/b.py:7: one reason\n"
    assert run_cpus.main(["--only", "AVX2 in MKL", "--no-check"]) == 0
    assert "skipped 5: one reason" in capsys.readouterr().out
    assert run_cpus.main(["--only", run_cpus.NOTHING_SKIPPED, "--no-check"]) == 1


def test_a_name_that_no_cpu_has_is_wrong_use(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cpus.main(["--only", "Cray"]) == 2
    assert "no simulated CPU is called 'Cray'; there are: as it is, AVX2 only" in capsys.readouterr().err
    assert seen["environments"] == []
