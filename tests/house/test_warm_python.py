"""A fork that stands for a new interpreter behaves as one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from warm_python import WarmPopen

PROGRAM = """
import os, signal, sys
print(signal.getsignal(signal.SIGINT) == signal.default_int_handler)
print(sys.argv, os.environ["COLOUR"], os.environ.get("HOME"), os.getcwd(), __name__, os.getsid(0) == os.getpid())
print(sys.stdin.read(), file=sys.stderr)
GIVEN
"""
ENDS = {"": 0, "sys.exit(3)": 3, "sys.exit('a sentence')": 1, "1 / 0": 1, "os.kill(os.getpid(), 9)": -9}


@pytest.mark.parametrize("end", ENDS)
def test_it_behaves_as_a_new_interpreter(end: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("GIVEN", f"sys.stdout.flush(); {end}")
    (tmp_path / "program.py").write_text(program)
    for words in (["-P", "-c", program, "a", "b"], ["program.py", "--c"]):
        told = []
        for start in (subprocess.Popen, WarmPopen):
            process = start(
                [sys.executable, *words], cwd=tmp_path, env={"COLOUR": "red"}, text=True, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            out, errors = process.communicate("asked", timeout=20)
            told.append((process.returncode, out, errors.splitlines()[:1], errors.splitlines()[-1:]))
        assert told[0] == told[1]
        assert told[0][0] == ENDS[end]


def test_what_was_imported_here_is_there_and_what_is_said_there_stays_there() -> None:
    marked = "import sys; print('pytest' in sys.modules); sys.modules['marked'] = sys"
    assert WarmPopen([sys.executable, "-c", marked], stdout=subprocess.PIPE).communicate()[0] == b"True\n"
    assert "marked" not in sys.modules


def test_a_pipe_ends_with_the_process_that_holds_it() -> None:
    """Another that was started meanwhile holds no end of it."""
    first = WarmPopen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    second = WarmPopen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert first.stdin is not None
    first.stdin.close()
    assert first.wait(20) == 1
    second.kill()
    second.communicate()
