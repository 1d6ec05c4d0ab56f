"""Installs the wheel into clean environments of several Pythons and runs what it must do there; `make test-wheel`.

    python tests/house/check_wheel.py                                 # python3.11, python3.12, python3.13 as found
    python tests/house/check_wheel.py --python /opt/py312/bin/python  # these; repeat for more
    python tests/house/check_wheel.py --extras fast,witness           # with Torch and Transformers: refllm check too

Without extras that is the core: NumPy alone, nothing of Torch. Needs a network. Nothing outside build/wheel is changed.
Exit codes: 0 it holds, 1 a Python in which it does not, 2 no Python to try.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("python3.11", "python3.12", "python3.13")
TORCH = "torch==2.13.0"
"""In a call of its own, as in the Makefile: on a machine without a GPU this takes the small build."""

_OPERATOR = """
import numpy as np

def relu2(x):
    return np.square(np.maximum(x, 0), dtype=np.float32).astype(x.dtype)
"""
CORE = (
    ("--help",),
    ("info", "{checkpoint}"),
    ("golden", "verify"),
    ("check", "--candidate", "numpy"),
    ("generate", "{checkpoint}", "--prompt", "The residual stream", "--max-new-tokens", "5"),
    ("check-op", "relu2", "--candidate", "operator_of_mine.py:relu2", "--arrays", "numpy", "--max-examples", "0"),
)
"""What works with NumPy alone."""
REFUSED = (("check",), ("audit", "relu2"), ("kernels", "list"), ("bench", "cpu"))
"""What needs more and says so: exit code 2, one sentence."""
FULL = (("check",), ("kernels", "list"), ("golden", "verify", "--backend", "torch"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", default=[], help=f"default: {', '.join(NAMES)} on the PATH")
    parser.add_argument("--extras", default="", help="of pyproject.toml, with commas")
    options = parser.parse_args()
    pythons = options.python or [found for found in map(shutil.which, NAMES) if found]
    if not pythons:
        print(f"none of {', '.join(NAMES)} is on the PATH; name one with --python", file=sys.stderr)
        return 2
    wheel = build()
    failed = [python for python in pythons if not holds(python, wheel, options.extras)]
    print(f"{len(pythons) - len(failed)} of {len(pythons)} hold" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def build() -> Path:
    """The wheel of this tree."""
    folder = ROOT / "build" / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], ROOT)
    return next(folder.glob("refllm-*.whl"))


def holds(python: str, wheel: Path, extras: str) -> bool:
    """Whether everything runs in a new environment of one Python; says what does not."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "operator_of_mine.py").write_text(_OPERATOR)
        try:
            version = run([python, "-c", "import platform; print(platform.python_version())"], home).strip()
            run([python, "-m", "venv", str(home / "venv")], home)
            own = str(home / "venv" / "bin" / "python")
            if "fast" in extras or "witness" in extras:
                run([own, "-m", "pip", "install", "--quiet", TORCH], home)
            run([own, "-m", "pip", "install", "--quiet", f"{wheel}[{extras}]" if extras else str(wheel)], home)
            where = "import refllm.golden as g; print(g.path('helium-tiny'))"
            checkpoint = run([own, "-P", "-c", where], home).strip()
            commands = [*CORE, *(FULL if extras else ())]
            for command in commands:
                run([own, "-P", "-m", "refllm", *(part.format(checkpoint=checkpoint) for part in command)], home)
            for command in () if extras else REFUSED:
                refused([own, "-P", "-m", "refllm", *command], home)
        except (RuntimeError, OSError) as error:
            print(f"{python}: {error}")
            return False
    count = len(commands) + (0 if extras else len(REFUSED))
    print(f"{version} with {extras or 'the core alone'}: holds, {count} commands, {time.monotonic() - start:.0f} s")
    return True


def run(command: Sequence[str], folder: Path) -> str:
    """Standard output of a command. Raises RuntimeError unless its exit code is 0."""
    done = started(command, folder)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[-6:])}: exit code {done.returncode}\n{(done.stderr or done.stdout)[-2000:]}"
        )
    return done.stdout


def refused(command: Sequence[str], folder: Path) -> None:
    """Raises RuntimeError unless a command ends with one sentence that says what to install."""
    done = started(command, folder)
    if done.returncode != 2 or done.stderr.count("\n") != 1 or " install " not in done.stderr:
        raise RuntimeError(
            f"{' '.join(command[-3:])}: exit code {done.returncode}, expected one sentence: {done.stderr}"
        )


def started(command: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    quiet.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
