"""Type-checks refllm, kernels and golden under the names they are imported by. Run by `make types` and by a test."""

import subprocess
import sys
from pathlib import Path

from installed_layout import ROOT, lay_out


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
