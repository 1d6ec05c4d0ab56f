"""The code under the names it is imported by, for tools that find a package by its folder.

`refllm.kernels` lives in kernels/ and `refllm.golden` in golden/, which mypy and import-linter cannot know.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"refllm": Path("refllm"), "kernels": Path("refllm/kernels"), "golden": Path("refllm/golden")}
"""Folder of the repository -> where it is installed."""


def modules() -> Iterator[tuple[Path, Path]]:
    """Every module: where it is installed, and its file."""
    for folder, installed in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield installed / file.relative_to(ROOT / folder), file


def lay_out(tree: Path) -> None:
    """Makes `tree`/refllm: real folders, as import-linter follows no linked ones, with a link to every module."""
    shutil.rmtree(tree, ignore_errors=True)
    for installed, file in modules():
        (tree / installed).parent.mkdir(parents=True, exist_ok=True)
        (tree / installed).symlink_to(file)
