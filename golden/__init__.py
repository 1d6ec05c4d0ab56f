"""Embedded checkpoints and golden vectors, imported as `refllm.golden`.

The checkpoints are tiny models in Hugging Face format, with tokenizers; the vectors are inputs, exact outputs and their
predicted error for every operator and family. README.md beside this file says what each of them is for.
`python -m refllm.golden.make_checkpoints` makes the checkpoints again, `refllm golden make` the vectors.
"""

from pathlib import Path

from refllm.errors import InputError

FOLDER = Path(__file__).resolve().parent
CORPUS = FOLDER / "corpus.txt"
"""The text that the tokenizers were trained on, and some checkpoints: how these models work, in plain English."""
TRAINED = "-trained"


def checkpoints() -> dict[str, Path]:
    """The folder of every embedded checkpoint with designed weights by its name: what is checked by default."""
    return {name: folder for name, folder in _all().items() if not name.endswith(TRAINED)}


def trained() -> dict[str, Path]:
    """The folder of every embedded checkpoint that has learnt the corpus by its name, one of each family."""
    return {name: folder for name, folder in _all().items() if name.endswith(TRAINED)}


def _all() -> dict[str, Path]:
    return {config.parent.name: config.parent for config in sorted((FOLDER / "checkpoints").glob("*/config.json"))}


def path(name: str) -> Path:
    """The folder of one embedded checkpoint. Raises InputError for a name that is none."""
    known = _all()
    if name not in known:
        raise InputError(f"{name!r} is no embedded checkpoint; there are {', '.join(known)}")
    return known[name]


def corpus() -> str:
    """The text of the corpus."""
    return CORPUS.read_text(encoding="utf-8")
