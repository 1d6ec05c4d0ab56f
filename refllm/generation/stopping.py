"""Stopping rules: which rows of a batch end after the token they just got.

A criterion is a callable (ids_BT, scores) -> bool [B] (or one bool for all rows); `scores` is the tuple of score
arrays so far, or None where they are not recorded. Names and rules are those of
`transformers.generation.stopping_criteria` (5.23.0).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.text.arguments import check_unicode

StoppingCriterion = Callable[[np.ndarray, Any], Any]


class StoppingCriteriaList(list[StoppingCriterion]):
    """A row stops where any of the criteria says so."""

    def __call__(self, ids_BT: np.ndarray, scores: Any) -> np.ndarray:
        """Bool [B]. Raises InputError where a criterion returns something else."""
        rows = ids_BT.shape[0]
        done_B = np.zeros(rows, dtype=bool)
        for criterion in self:
            answer = np.asarray(criterion(ids_BT, scores)).astype(bool)
            if answer.shape not in ((), (rows,)):
                name = getattr(criterion, "__name__", type(criterion).__name__)
                raise InputError(f"stopping_criteria: {name} returned the shape {answer.shape}, expected ({rows},)")
            done_B |= answer
        return done_B


class MaxLengthCriteria:
    """Stops all rows at `max_length` tokens; warns once where the text grows past the model's positions."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, ids_BT: np.ndarray, scores: Any) -> bool:
        """Whether the length is reached."""
        length, limit = ids_BT.shape[1], self.max_position_embeddings
        if limit is not None and limit < length < self.max_length:
            text = f"generate: the text is longer than max_position_embeddings={limit}; its quality may suffer"
            warnings.warn(text, UserWarning, stacklevel=2)
            self.max_position_embeddings = None
        return length >= self.max_length


class MaxTimeCriteria:
    """Stops all rows once more than `max_time` seconds have passed since the criterion was made."""

    def __init__(self, max_time: float) -> None:
        self.max_time = max_time
        self.start = time.monotonic()

    def __call__(self, ids_BT: np.ndarray, scores: Any) -> bool:
        """Whether the time is over."""
        return time.monotonic() - self.start > self.max_time


class EosTokenCriteria:
    """Stops rows whose last token is one of the end-of-sequence ids."""

    def __init__(self, eos_token_id: Sequence[int]) -> None:
        self.eos_token_id = list(eos_token_id)

    def __call__(self, ids_BT: np.ndarray, scores: Any) -> np.ndarray:
        """Bool [B]."""
        return np.isin(ids_BT[:, -1], self.eos_token_id)


class StopStringCriteria:
    """Stops rows whose last tokens spell a stop string that reaches into the last token.

    The string may begin in the middle of an earlier token and end in the middle of the last one. A string that was
    complete before the last token does not stop the row. Tokens count as the text they add when decoded after other
    text, as UTF-8 bytes where the tokenizer works on bytes; so a string is found even where a character is split over
    several tokens. Only as many tokens are looked at as the longest stop string has characters (or bytes).

    `tokenizer` needs `get_vocab()` and `decode(ids)` or `convert_tokens_to_string(tokens)`; its
    `backend_tokenizer` (a `tokenizers.Tokenizer`) says whether it works on bytes.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not strings or not all(isinstance(s, str) and s for s in strings):
            raise InputError("stop_strings: must be a non-empty string or a list of them")
        for string in strings:
            check_unicode(string, "stop_strings")
        self.pieces = TokenPieces(tokenizer)
        self.targets = [s.encode() if self.pieces.as_bytes else s for s in strings]
        self.window = max(len(target) for target in self.targets)

    def _matches(self, row: Sequence[int]) -> bool:
        empty: Any = b"" if self.pieces.as_bytes else ""
        before, last = empty, self.pieces[row[-1]]
        for token in row[-2 : -self.window - 1 : -1]:
            piece = self.pieces[token]
            if piece is None:  # not a token of the tokenizer: text cannot go through it
                break
            before = piece + before
        if not last:
            return False
        # An occurrence that starts at most len(target) - 1 before the last token ends inside it.
        return any(target in before[max(0, len(before) - len(target) + 1) :] + last for target in self.targets)

    def __call__(self, ids_BT: np.ndarray, scores: Any) -> np.ndarray:
        """Bool [B]."""
        return np.array([self._matches(row) for row in ids_BT.tolist()], dtype=bool)


class TokenPieces:
    """Token id -> the text (str, or bytes for byte-level and byte-fallback tokenizers) it adds, None if unknown."""

    PREFIX = "abcdef"
    """Text in front of the token, so that nothing that only happens at the start of a text happens to it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        self.mode = _byte_mode(tokenizer)
        self.as_bytes = self.mode is not None
        encoded = tokenizer(self.PREFIX, add_special_tokens=False)
        self.prefix_ids = [int(i) for i in encoded["input_ids"]]
        self.known: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.known:
            self.known[index] = self._piece(index) if index in self.tokens else None
        return self.known[index]

    def _piece(self, index: int) -> str | bytes:
        token = self.tokens[index]
        if self.mode == "ByteLevel" and all(char in byte_of_character() for char in token):
            return bytes(byte_of_character()[char] for char in token)
        if self.mode == "ByteFallback" and (byte := _fallback_byte(token)) is not None:
            return byte
        text = self._decode([*self.prefix_ids, index])
        start = text.find(self.PREFIX)
        text = self._decode([index]) if start < 0 else text[start + len(self.PREFIX) :]
        return text.encode() if self.as_bytes else text

    def _decode(self, ids: list[int]) -> str:
        if hasattr(self.tokenizer, "convert_tokens_to_string"):
            text = self.tokenizer.convert_tokens_to_string([self.tokens[i] for i in ids])
        else:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return str(text)


def _byte_mode(tokenizer: Any) -> str | None:
    """ "ByteFallback" or "ByteLevel" where the decoder of the tokenizer has such a step, else None."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    try:
        kinds = _types_in(json.loads(decoder.__getstate__()))
    except (AttributeError, TypeError, ValueError):
        kinds = {type(decoder).__name__}
    if type(decoder).__name__ == "ByteLevel":
        return "ByteLevel"
    return next((kind for kind in ("ByteFallback", "ByteLevel") if kind in kinds), None)


def _types_in(node: Any) -> set[str]:
    """All values of "type" in a JSON tree."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    found = {str(node["type"])} if isinstance(node, dict) and "type" in node else set()
    return found.union(*(_types_in(child) for child in children))


def _fallback_byte(token: str) -> bytes | None:
    """The byte of a token such as <0x0A>."""
    digits = token[3:5]
    is_byte = (
        len(token) == 6
        and token[:3] == "<0x"
        and token[5] == ">"
        and all(d in "0123456789abcdefABCDEF" for d in digits)
    )
    return bytes([int(digits, 16)]) if is_byte else None


@cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: a printable character for each of the 256 bytes.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, for the characters from 256 on.
    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2) and its encoder.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
