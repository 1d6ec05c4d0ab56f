"""Files that a user asks for: refused before the work if they cannot be written, and at no moment half a file."""

import os
from pathlib import Path

from refllm.errors import InputError


def must_be_writable(option: str, path: str | os.PathLike[str]) -> None:
    """Raises InputError for a file whose folder is not there, or that cannot be written. option: "--json"."""
    file = Path(path)
    folder = file.resolve().parent
    if not folder.is_dir():
        raise InputError(f"{option} {path} cannot be written: there is no folder {file.parent}")
    if file.is_dir():
        raise InputError(f"{option} {path} cannot be written: it is a folder")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise InputError(f"{option} {path} cannot be written: permission denied")


def write(option: str, path: str | os.PathLike[str], text: str) -> None:
    """Raises InputError for a file that cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def replace(file: Path, text: str) -> None:
    """Writes a file in one piece: who reads meanwhile, or is left with it, has all of the old text or of the new.

    Raises OSError if it cannot be written.
    """
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
