"""Candidates of `check` and `trace` that misbehave: each is one finding in one sentence, and takes nobody with it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import misbehaving
import numpy as np
import pytest

from refllm import LlamaConfig, LlamaForCausalLM
from refllm.check import assert_matches, compare, process
from refllm.check.oracle import Report
from refllm.check.run import Settings, check_all
from refllm.commands import cli
from refllm.errors import InputError

FILE = Path(misbehaving.__file__)
IDS = "3,1,4,1,5,9,2,6,5,3,5,8,9,7,9,3"
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**SIZES, num_attention_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    LlamaForCausalLM.from_config(config, seed=1).save_pretrained(folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def reports(checkpoint: Path) -> dict[str, Report]:
    """On every candidate, all in one process as long as that lives."""
    tokens = {"prompt": None, "ids": IDS, "ids_file": None}
    settings = [
        Settings(f"{FILE}:{name}", ("float32",), tokens=tokens, seconds=1.0, policy="fused")
        for name in misbehaving.TOLD
    ]
    found = list(check_all([checkpoint], settings))
    assert len(found) == len(settings)
    return dict(zip(misbehaving.TOLD, found, strict=True))


def lines_of(function: Callable[..., Any]) -> range:
    """The lines of its body."""
    code = function.__code__
    return range(code.co_firstlineno, max(line for _, _, line in code.co_lines() if line) + 1)


@pytest.mark.parametrize("name", misbehaving.TOLD)
def test_misbehaviour_is_one_finding_with_file_and_line(name: str, reports: dict[str, Report]) -> None:
    kind, text = misbehaving.TOLD[name]
    found = reports[name].misbehaviour
    if not kind:
        assert found is None, found
        assert [tap.name for tap in reports[name].taps] == ["lm_head"]
        assert reports[name].verdict != "fails"
        return
    assert found is not None
    assert reports[name].verdict == "fails"
    pattern = re.escape(text).replace("LINE", r"(\d+)")
    said = re.match(pattern, found.text)
    assert (found.kind, bool(said)) == (kind, True), found
    assert "\n" not in found.text
    if said is not None and said.groups():
        assert int(said[1]) == found.line
        assert found.line in lines_of(getattr(misbehaving, name))
        assert Path(found.file) == FILE


def test_a_wrong_candidate_that_does_not_misbehave_is_measured(reports: dict[str, Report]) -> None:
    """The table above must not hold for want of a check that can fail."""
    right = reports["right"].taps[0].end_to_end
    assert 0 < right.ratio < 2


# In this process it is the user who interrupts, and who is asked.
HERE = [
    name
    for name, (kind, _) in misbehaving.TOLD.items()
    if kind in ("raises", "purity", "result") and name not in ("interrupts", "asks_the_user")
]


@pytest.mark.parametrize("name", HERE)
def test_a_live_function_runs_here_and_its_misbehaviour_is_the_same(
    name: str, checkpoint: Path, reports: dict[str, Report]
) -> None:
    ids = [int(i) for i in IDS.split(",")]
    before = list(ids)
    (report,) = compare(checkpoint, getattr(misbehaving, name), input_ids=np.array(ids))
    assert report.misbehaviour == reports[name].misbehaviour
    assert ids == before
    with pytest.raises(AssertionError, match=report.misbehaviour.name if report.misbehaviour else "nothing"):
        assert_matches(checkpoint, getattr(misbehaving, name), input_ids=ids)


def test_a_live_function_that_exits_does_not_end_this_process(checkpoint: Path) -> None:
    (report,) = compare(checkpoint, misbehaving.exits, input_ids=[1, 2])
    assert report.misbehaviour is not None
    assert report.misbehaviour.text.startswith("it ends the process: SystemExit: 0 (misbehaving.py:")


def test_inputs_of_a_live_function_are_copies(checkpoint: Path) -> None:
    ids = np.array([[3, 1, 4]])
    compare(checkpoint, misbehaving.wrong_and_changes_its_input, input_ids=ids)
    assert ids.tolist() == [[3, 1, 4]]


# ------------------------------------------------------------------------------------------------------ when imported


IMPORTED = {
    "exits": ("import sys; LOG\nsys.exit(0)", "ends the process when it is imported: SystemExit: 0 (mine.py:2)"),
    "ends": ("import os; LOG\nos._exit(0)", "it ends the process: exit code 0"),
    "raises": ("LOG\n1 / 0", "raises ZeroDivisionError: division by zero when it is imported (mine.py:2)"),
    "syntax": ("def f(:", "raises SyntaxError: invalid syntax"),
    "lacks": ("LOG\nimport no_such_module", "No module named 'no_such_module' when it is imported (mine.py:2)"),
}


@pytest.mark.parametrize("name", IMPORTED)
def test_what_a_file_does_when_it_is_imported_is_a_finding(
    name: str, warm_python: None, checkpoint: Path, tmp_path: Path
) -> None:
    source, text = IMPORTED[name]
    log = tmp_path / "log"
    log.touch()
    (tmp_path / "mine.py").write_text(source.replace("LOG", f"open({str(log)!r}, 'a').write('x')"))
    found = list(check_all([checkpoint], Settings(f"{tmp_path / 'mine.py'}:f", ("float32", "bfloat16"))))
    assert [report.verdict for report in found] == ["fails", "fails"]
    assert all(report.misbehaviour is not None and text in report.misbehaviour.text for report in found), found
    assert len(log.read_text()) == ("LOG" in source)  # not once more for every checkpoint and precision


def test_a_file_whose_import_does_not_end_hangs(
    warm_python: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SECONDS_TO_START", 0.5)
    (tmp_path / "mine.py").write_text("while True:\n    pass")
    found = list(check_all([checkpoint], Settings(f"{tmp_path / 'mine.py'}:f", seconds=0.5)))
    assert [report.verdict for report in found] == ["fails"]  # and not once more for a precision that it is not told
    assert found[0].misbehaviour is not None
    assert re.fullmatch(
        r"it was not ready to run within 1 s \(mine.py:[12]\); --time-limit gives it more", found[0].misbehaviour.text
    )


def test_what_cannot_be_opened_is_said_at_once_where_nobody_said_a_dtype(
    warm_python: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked twice: whether it takes a dtype, and to run."""
    monkeypatch.setattr(process, "SECONDS_TO_START", 20.0)
    (tmp_path / "mine.py").write_text("def f(checkpoint): return 3")
    (report,) = check_all([checkpoint], Settings(f"{tmp_path / 'mine.py'}:f", seconds=0.5))
    assert report.misbehaviour is not None
    assert "returns a int; expected a model of a stack" in report.misbehaviour.text


@pytest.mark.parametrize("reference", ["nowhere:forward", "json:no_such_function", "/no/such/file.py:forward"])
def test_a_function_that_is_not_there_is_wrong_use(reference: str, warm_python: None, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be imported|has no function"):
        list(check_all([checkpoint], Settings(reference)))


def test_a_candidate_finds_what_lies_beside_it(warm_python: None, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(
        f"import sys\nsys.path.append({str(FILE.parent)!r})\nfrom misbehaving import right"
    )
    (tmp_path / "mine.py").write_text("from beside import right as forward")
    (report,) = check_all([checkpoint], Settings(f"{tmp_path / 'mine.py'}:forward", ("float32",)))
    assert report.misbehaviour is None


# ---------------------------------------------------------------------------------------------------- the command line


def refllm(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["refllm", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_says_it_everywhere_and_checks_the_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [word for name in ("ends_quietly", "raises", "right") for word in ("--candidate", f"{FILE}:{name}")]
    files = ["--json", tmp_path / "out.json", "--html", tmp_path / "out.html"]
    code = refllm(monkeypatch, "check", checkpoint, *names, "--dtype", "float32", "--ids", IDS, *files)
    out, err = capsys.readouterr()
    assert (code, err) == (1, "")
    values = json.loads((tmp_path / "out.json").read_text())
    ended, raised, right = values["reports"]
    assert (values["verdict"], ended["verdict"], right["misbehaviour"]) == ("fails", "fails", None)
    assert ended["misbehaviour"] == {
        "kind": "crashes",
        "text": "it ends the process: exit code 0",
        "file": "",
        "line": 0,
    }
    assert raised["misbehaviour"]["file"] == str(FILE)
    assert right["taps"]
    page = (tmp_path / "out.html").read_text()
    for sentence in ("it ends the process: exit code 0", f"boom (misbehaving.py:{raised['misbehaviour']['line']})"):
        assert sentence in out
        assert sentence in page


def test_trace_of_a_candidate_that_misbehaves_is_a_finding_and_no_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trace", checkpoint, "--candidate", f"{FILE}:exits", "--ids", "1,2", "-o", tmp_path / "t.safetensors"]
    assert refllm(monkeypatch, *words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"refllm: \S+:exits: it ends the process: SystemExit: 0 \(misbehaving.py:\d+\)\n", err)
    assert not (tmp_path / "t.safetensors").exists()


def test_a_limit_of_no_time_is_wrong_use(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--time", "--time-limit"):
        for seconds in ("0", "-1", "nan"):
            assert refllm(monkeypatch, "check", checkpoint, option, seconds) == 2
            assert capsys.readouterr().err == f"refllm: {option} {seconds}: expected more than 0 seconds\n"


def test_check_does_not_wait_for_a_run_that_outlasts_its_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the time of the whole is no finding; that of one run (--time-limit) is one, with its line."""
    words = ["check", checkpoint, "--candidate", f"{FILE}:never_returns", "--ids", "1,2", "--json", tmp_path / "f.json"]
    begin = time.monotonic()
    assert refllm(monkeypatch, *words, "--dtype", "float32", "--time", "3") == 1
    assert time.monotonic() - begin < 30
    assert "incomplete: the time of 3 s was up at" in " ".join(capsys.readouterr().out.split())
    values = json.loads((tmp_path / "f.json").read_text())
    assert (values["verdict"], values["reports"]) == ("incomplete", [])


SLEEPER = """
import os, subprocess, time


def forward(*_):
    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["PIDS"] + ".new", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(os.environ["PIDS"] + ".new", os.environ["PIDS"])
    time.sleep(600)
"""


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_ends_everything_at_once(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SLEEPER)
    pids = tmp_path / "pids"
    words = ["check", checkpoint, "--candidate", tmp_path / "mine.py:forward", "--ids", "1,2"]
    running = subprocess.Popen(
        [sys.executable, "-c", "from refllm.commands.cli import main; main()", *map(str, words)],
        env={**os.environ, "PIDS": str(pids)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while not pids.exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=10)
    assert (running.returncode, err) == (130, "")
    left = [int(pid) for pid in pids.read_text().split()]
    end = time.monotonic() + 5
    while any(map(is_there, left)) and time.monotonic() < end:
        time.sleep(0.01)
    assert [pid for pid in left if is_there(pid)] == []


# ------------------------------------------------------------------------------------------------- nothing to judge by


def test_where_the_reference_is_not_finite_there_is_no_verdict(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    config = LlamaConfig(**SIZES, num_attention_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    LlamaForCausalLM.from_config(config, seed=1).save_pretrained(tmp_path, dtype="float32")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = -np.inf
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        (report,) = compare(tmp_path, "numpy", dtype=dtype, input_ids=range(30), isolate=False)
        assert report.verdict == "incomplete"
        why = {tap.name: tap.untested for tap in report.taps if tap.verdict != "holds"}
        assert set(why) >= {"model.norm", "lm_head"}
        assert {reason for reasons in why.values() for reason in reasons} == {"not finite: no verdict at these values"}
