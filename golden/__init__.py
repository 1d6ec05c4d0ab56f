"""Embedded checkpoints, imported as `refllm.golden`: tiny models in Hugging Face format, with tokenizers.

README.md beside this file says what each of them is for; `python -m refllm.golden.make_checkpoints` makes them again.
"""

from pathlib import Path

from refllm.errors import InputError

FOLDER = Path(__file__).resolve().parent
CORPUS = FOLDER / "corpus.txt"
"""The text that the tokenizers were trained on: how these models work, in plain English."""


def checkpoints() -> dict[str, Path]:
    """The folder of every embedded checkpoint by its name."""
    return {config.parent.name: config.parent for config in sorted((FOLDER / "checkpoints").glob("*/config.json"))}


def path(name: str) -> Path:
    """The folder of one embedded checkpoint. Raises InputError for a name that is none."""
    known = checkpoints()
    if name not in known:
        raise InputError(f"{name!r} is no embedded checkpoint; there are {', '.join(known)}")
    return known[name]


def corpus() -> str:
    """The text of the corpus."""
    return CORPUS.read_text(encoding="utf-8")
