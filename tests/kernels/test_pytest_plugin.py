"""refllm.kernels.pytest_plugin, in pytest runs of its own: off unless asked for, and what it says on a failure."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from refllm import extras
from refllm.kernels import pytest_plugin

pytest.importorskip("triton")

KERNELS = """
import pytest, torch, triton, triton.language as tl
from refllm.kernels import interpreter

@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

def run(n=5, programs=1):
    x, y = torch.arange(5.0), torch.empty(5)
    scale[(programs,)](x, y, n, BLOCK=8)
    return y
"""


def session(folder: Path, test: str, *arguments: str) -> tuple[int, str]:
    """The exit code and the output of pytest on one file of tests, in a fork: Torch and Triton are imported there."""
    (folder / "test_it.py").write_text(KERNELS + test)
    command = ["-p", "no:cacheprovider", "-p", "refllm.kernels.pytest_plugin", *arguments, "test_it.py"]
    with tempfile.TemporaryFile() as output:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, command, output.fileno()))
        with warnings.catch_warnings():  # that this process has threads
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        process.join(300)
        output.seek(0)
        return int(process.exitcode if process.exitcode is not None else -1), output.read().decode()


def _run(folder: Path, command: list[str], output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = open(output, "w", buffering=1, closefd=False)  # noqa: SIM115 (as long as the process)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.exit(int(pytest.main(command)))


def test_imports_neither_torch_nor_triton(tmp_path: Path) -> None:
    code = "import sys, pytest\n" + (
        "class Look:\n"
        "    def pytest_sessionfinish(self):\n"
        "        print('LOADED', sorted({'torch', 'triton', 'numpy'} & set(sys.modules)),"
        " 'refllm.kernels.pytest_plugin' in sys.modules)\n"
        "pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'refllm.kernels.pytest_plugin', 'test_it.py'], [Look()])"
    )
    (tmp_path / "test_it.py").write_text("def test_nothing(): pass\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "LOADED [] True" in result.stdout


def test_inactive_by_default_and_active_where_asked_for(tmp_path: Path) -> None:
    test = """
def test_default():
    assert not interpreter.active()

@pytest.mark.triton_interpreted
def test_marked():
    assert run().tolist() == [0, 2, 4, 6, 8]

@pytest.fixture
def result():
    return run()

@pytest.mark.triton_interpreted(races=False)
def test_fixtures_of_a_marked_test_run_inside(result):
    run(programs=1)
    assert result.tolist() == [0, 2, 4, 6, 8]

def test_fixture(triton_interpreter):
    assert run().tolist() == [0, 2, 4, 6, 8]
    with triton_interpreter(bounds="view"):
        assert interpreter.active()

def test_default_again():
    assert not interpreter.active()
"""
    code, output = session(tmp_path, test, "--strict-markers")
    assert code == 0, output
    assert "5 passed" in output
    assert "interpreter of refllm" not in output  # the line of --triton-interpret


def test_option_runs_every_test_inside_and_says_so(tmp_path: Path) -> None:
    test = """
def test_plain():
    assert run().tolist() == [0, 2, 4, 6, 8]
"""
    code, output = session(tmp_path, test, "--triton-interpret")
    assert code == 0, output
    assert "kernels run on the CPU, on the interpreter of refllm" in output


def test_a_failure_is_one_sentence(tmp_path: Path) -> None:
    test = """
@pytest.mark.triton_interpreted
def test_out_of_bounds():
    run(n=7)

@pytest.mark.triton_interpreted("view")
def test_positional():
    pass
"""
    code, output = session(tmp_path, test)
    assert code == 1, output
    sentences = [line for line in output.splitlines() if line.startswith("E ")]
    assert len(sentences) == 1
    assert "OutOfBoundsError: scale, program 0, test_it.py:8: tl.load through `x`: 2 of 7 active" in sentences[0]
    assert "takes keywords only" in output
    assert "memory.py" not in output  # no tour of the interpreter


def test_works_under_xdist(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    test = """
@pytest.mark.parametrize("i", range(4))
def test_plain(i):
    assert run().tolist() == [0, 2, 4, 6, 8]
"""
    code, output = session(tmp_path, test, "--triton-interpret", "-n", "2")
    assert code == 0, output
    assert "4 passed" in output


def test_a_second_thread_is_refused(tmp_path: Path) -> None:
    test = """
import threading

@pytest.mark.triton_interpreted
def test_threads():
    errors = []
    def other(enter):
        try:
            if enter:
                with interpreter.interpreted(): pass
            else:
                run()
        except interpreter.KernelError as error:
            errors.append(str(error))
    for enter in (True, False):
        thread = threading.Thread(target=other, args=(enter,)); thread.start(); thread.join()
    assert "another thread is inside" in errors[0]
    assert "second thread" in errors[1]
"""
    code, output = session(tmp_path, test)
    assert code == 0, output


def test_marker_and_fixture_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "not_installed", list)
    with pytest.raises(pytest.fail.Exception, match="needs torch and triton, which are not installed; install with: "):
        pytest_plugin._interpreted()


def test_settings_come_from_the_command_line_and_a_marker_overrides_them(tmp_path: Path) -> None:
    test = """
@triton.jit
def summed(x, y, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n)))

def total():
    y = torch.zeros(1)
    summed[(1,)](torch.ones(3), y, 3, 4)
    return y

@pytest.mark.filterwarnings("ignore:.*masks lanes off")
def test_masked_off_is_zero(triton_interpreter):
    assert total().item() == 3

@pytest.mark.triton_interpreted(masked="nan")
def test_masked_off_is_nan():
    assert total().isnan().all()
"""
    code, output = session(tmp_path, test, "--triton-interpret", "--triton-setting", "masked=zero")
    assert code == 0, output
    assert "interpreter of refllm" in output
    assert "masked=zero" in output


ASKS_AT_IMPORT = """
import torch, triton
CAPABILITY = torch.cuda.get_device_capability()
assert triton.runtime.driver.active.get_current_target().arch == 10 * CAPABILITY[0]
"""


def test_cuda_is_stood_in_for_before_a_conftest_asks(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(ASKS_AT_IMPORT)
    test = """
from conftest import CAPABILITY
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def test_on_the_gpu():
    x, y = torch.arange(5.0, device=DEVICE), torch.empty(5, device=DEVICE)
    scale[(1,)](x, y, 5, BLOCK=8)
    assert y.is_cuda
    assert (CAPABILITY, y.tolist()) == ((8, 0), [0, 2, 4, 6, 8])

def test_a_tensor_of_the_host_is_found():
    with pytest.raises(interpreter.KernelError, match="never moved to cuda"):
        run()
"""
    options = ("--triton-interpret", "--cuda-stand-in", "--cuda-stand-in-target", "sm_80")
    code, output = session(tmp_path, test, *options)
    assert code == 0, output
    assert "in place of cuda" in output
    code, output = session(tmp_path, test)
    assert code != 0, output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--cuda-stand-in",), "--cuda-stand-in needs --triton-interpret"),
        (("--triton-setting", "races=false"), "--triton-setting needs --triton-interpret"),
        (("--triton-interpret", "--cuda-stand-in-target", "sm_80"), "--cuda-stand-in-target needs --cuda-stand-in"),
        (("--triton-interpret", "--triton-setting", "race=false"), "'race=false' is no setting; write NAME=VALUE with"),
        (("--triton-interpret", "--triton-setting", "races=no"), "'races=no': races is true or false"),
        (
            ("--triton-interpret", "--cuda-stand-in", "--cuda-stand-in-target", "gfx942"),
            "expected sm_80, sm_90 or sm_100",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    code, output = session(tmp_path, "", *options)
    assert code == int(pytest.ExitCode.USAGE_ERROR)
    (line,) = [line for line in output.splitlines() if line.startswith("ERROR")]
    assert sentence in line
