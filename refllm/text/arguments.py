"""Checking what a tokenizer is called with: texts, pairs of texts, token ids. Misuse is an InputError."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.extras import require
from refllm.inputs import as_tensor


def check_unicode(text: str, name: str) -> None:
    """Refuses half a surrogate pair: what Python makes of a byte that is no text, and no encoding can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not Unicode text: its character {error.start} is {text[error.start]!a}, half of a "
            "surrogate pair (on a command line: a byte that is no text in the locale's encoding)"
        ) from None


def check_text(text: Any, name: str, split: bool) -> bool:
    """True for a batch. `split`: a text is itself a list of words."""
    words = [word for part in (text if isinstance(text, (list, tuple)) else [text]) for word in _words(part)]
    for word in words:
        check_unicode(word, name)
    kind = "a list of words" if split else "a string"

    def is_text(value: Any) -> bool:
        if not split:
            return isinstance(value, str)
        return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)

    if is_text(text) and not (split and not text):
        return False
    if not isinstance(text, (list, tuple)) or not all(map(is_text, text)):
        raise InputError(f"{name} must be {kind} or a list of such, not {type(text).__name__}")
    if not text:
        raise InputError(f"{name} is an empty list: give at least one text")
    return True


def _words(value: Any) -> list[str]:
    return [word for word in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(word, str)]


def check_pair(text: Any, pair: Any, batched: bool, split: bool) -> None:
    """Refuse a second text that does not go with the first."""
    if check_text(pair, "text_pair", split) != batched:
        raise InputError("text and text_pair must both be one text or both be lists")
    if batched and len(text) != len(pair):
        raise InputError(f"text has {len(text)} entries and text_pair has {len(pair)}: they must be pairs")


def as_array(name: str, rows: list[Any], kind: Any) -> Any:
    """Rows of equal length as int64 [B, S]; `kind` is the caller's `return_tensors`: "np" for an array, "pt" for a
    tensor. `name` is what the rows are."""
    kind = getattr(kind, "value", kind)  # Transformers has an enumeration of them
    if kind not in ("np", "pt"):
        raise InputError(
            f"return_tensors={kind!r}: use 'np' for NumPy arrays, 'pt' for tensors of Torch, None for lists"
        )
    if kind == "pt":
        require("return_tensors='pt'", "torch")
    if len({len(row) for row in rows if isinstance(row, list)}) > 1:
        raise InputError(f"{name}: the texts have different lengths, which no array can hold: pass padding=True")
    array = np.array(rows, dtype=np.int64)
    return array if kind == "np" else as_tensor(array)


def as_ids(ids: Any) -> Any:
    """Token ids as an int, a list of ints, or a list of such lists; from lists, NumPy arrays and tensors."""
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, (list, tuple)):
        return [as_ids(item) for item in ids]
    try:
        index = operator.index(ids)
    except TypeError:
        raise InputError(f"a token id must be an integer, not {ids!r}") from None
    if not 0 <= index < 2**32:
        raise InputError(f"{index} is not a token id: ids are not negative and below 2**32")
    return index
