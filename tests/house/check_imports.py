"""Checks who imports whom: the contracts of pyproject.toml, by import-linter. Run by `make imports` and by a test."""

import os
import subprocess
import sys
from pathlib import Path

from installed_layout import ROOT, lay_out

PROGRAM = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_logo=True))"


def check(tree: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter over `tree`/refllm (`lay_out`). Exit code 0: every contract is kept."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "pyproject.toml")]
    # PYTHONPATH comes before the finder of an editable install. The cache would be keyed by the folder's name alone.
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    lay_out(ROOT / "build" / "imports")
    result = check(ROOT / "build" / "imports")
    print(result.stdout + result.stderr, end="")
    sys.exit(result.returncode)
