"""The tokens of a command: `--prompt TEXT | --ids 1,2,3 | --ids-file F`."""

import json
import re
from pathlib import Path

import numpy as np

from refllm.errors import InputError
from refllm.storage import input_file

TEXT_LIMIT = 1 << 28
"""Bytes of a text to score: a reference model reads far less in a day."""
IDS_LIMIT = 1 << 24
"""Bytes of a file of token ids: some millions of them."""


def read_tokens(
    folder: Path, vocab_size: int, *, prompt: str | None, ids: str | None, ids_file: Path | None
) -> np.ndarray | None:
    """Token ids [1, S] (int64) of the one source that is given; None if none is.

    folder: checkpoint folder, whose tokenizer reads the prompt. ids: numbers separated by commas or white space.
    ids_file: a file of the same, or a JSON list. Raises InputError for more than one source, no tokens, what is not a
    number, or an id outside the vocabulary; TokenizerError if the folder has no usable tokenizer.
    """
    given = [
        name for name, value in (("--prompt", prompt), ("--ids", ids), ("--ids-file", ids_file)) if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
    if prompt is not None:
        from refllm.text.tokenizer import AutoTokenizer

        numbers, source = AutoTokenizer.from_pretrained(folder).encode(prompt), "--prompt"
    elif ids is not None:
        numbers, source = parse_ids(ids, "--ids"), "--ids"
    elif ids_file is not None:
        numbers, source = parse_ids(read_text(ids_file, IDS_LIMIT), str(ids_file)), str(ids_file)
    else:
        return None
    return checked_ids(numbers, vocab_size, source)


def checked_ids(numbers: list[int], vocab_size: int, source: str) -> np.ndarray:
    """The ids as [1, S] int64; InputError if there are none or one is outside 0 .. vocab_size - 1."""
    if not numbers:
        raise InputError(f"{source} holds no tokens: at least one is needed")
    for position, number in enumerate(numbers):
        if not 0 <= number < vocab_size:
            raise InputError(f"{source}: token id {number} at position {position} is outside 0..{vocab_size - 1}")
    return np.array([numbers], dtype=np.int64)


def parse_ids(text: str, source: str) -> list[int]:
    """Integers from a JSON list or from text that separates them by commas or white space. Raises InputError."""
    if text.lstrip().startswith("["):
        try:
            input_file.count_values(text)
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} starts like a JSON list but is none: {error}") from None
        if not all(type(value) is int for value in values):
            raise InputError(f"{source}: a JSON list of token ids must hold integers only")
        return list(values)
    fields = [field.split() for field in text.split(",")]
    if len(fields) > 1 and not all(fields):
        where = 1 + fields.index([])
        raise InputError(f"{source}: nothing stands in place {where} between the commas; expected ids as in 1,2,3")
    words = [word for field in fields for word in field]
    for word in words:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", word):
            raise InputError(
                f"{source}: {word[:40]!r} is not a token id; expected integers separated by commas or spaces"
            )
    return [int(word) for word in words]


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A file's text, of at most `limit` bytes. Raises InputError if it cannot be read or is not UTF-8."""
    try:
        return input_file.read_text(path, limit)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} is {error}") from None
