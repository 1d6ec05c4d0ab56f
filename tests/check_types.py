"""Type-checks refllm, kernels and golden under the names they are imported by. Run by `make types` and by a test.

mypy finds a package by its folder, but `refllm.kernels` lives in kernels/ and `refllm.golden` in golden/. So this lays
out build/types/refllm as links to the three folders and checks that tree.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lay_out(tree: Path) -> None:
    """Makes `tree`/refllm: a link to everything in refllm/, plus kernels and golden."""
    package = tree / "refllm"
    shutil.rmtree(tree, ignore_errors=True)
    package.mkdir(parents=True)
    for source in [*(ROOT / "refllm").iterdir(), ROOT / "kernels", ROOT / "golden"]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(os.path.relpath(source, package))


def check(tree: Path = ROOT / "build" / "types") -> subprocess.CompletedProcess[str]:
    """Runs mypy over the whole of refllm; paths in its output are relative to `tree`."""
    lay_out(tree)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "refllm"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    result = check()
    print(result.stdout + result.stderr, end="")
    sys.exit(result.returncode)
