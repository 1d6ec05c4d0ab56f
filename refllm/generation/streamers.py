"""Streamers: receivers of the tokens of a running `generate`.

`generate` calls `put` with the prompt (int64 [B, S]), then with every new token (int64 [B]), then `end`. The rule for
when text is final is that of `transformers.generation.streamers` (5.23.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, Queue
from typing import Any

import numpy as np

from refllm.errors import InputError

_CJK_BLOCKS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
"""Unicode blocks of ideographs: scripts that put no space between words."""


class BaseStreamer:
    """What `generate` expects of a streamer."""

    def put(self, value: np.ndarray) -> None:
        """Receives the prompt, int64 [B, S], and then each step's tokens, int64 [B]."""
        raise NotImplementedError

    def end(self) -> None:
        """Called once, after the last token."""
        raise NotImplementedError


class TextStreamer(BaseStreamer):
    """Prints the text of one row as soon as it is final.

    All tokens since the last line break are decoded at every step, because a token may change how earlier ones
    decode. Final is: everything after a line break, everything up to an ideograph at the end, else everything up to
    the last space. `decode_kwargs` go to `tokenizer.decode`. Raises InputError for more than one row.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._start()

    def _start(self) -> None:
        self.tokens: list[int] = []
        self.emitted = 0  # characters of the text of `tokens` that are out already
        self.at_prompt = True

    def put(self, value: np.ndarray) -> None:
        """Takes tokens and passes on what became final."""
        rows = value.shape[0] if value.ndim > 1 or not self.at_prompt else 1
        if rows > 1:
            raise InputError(f"{type(self).__name__}: streams one row, and the batch has {rows}")
        is_prompt, self.at_prompt = self.at_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self.tokens.extend(int(token) for token in value.reshape(-1))
        text = self._text()
        self._emit(text, _final_length(text, self.emitted))
        if text.endswith("\n"):
            self.tokens, self.emitted = [], 0

    def end(self) -> None:
        """Passes on the rest."""
        text = self._text() if self.tokens else ""
        rest = text[self.emitted :]
        self._start()
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives each piece of final text, which may be empty; override to do something else than print."""
        print(text, end="\n" if stream_end else "", flush=True)

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, **self.decode_kwargs))

    def _emit(self, text: str, end: int) -> None:
        piece = text[self.emitted : end]
        self.emitted += len(piece)
        self.on_finalized_text(piece)


def _final_length(text: str, emitted: int) -> int:
    """How many characters of `text` no later token is expected to change."""
    last = ord(text[-1]) if text else 0
    if text.endswith("\n") or any(low <= last <= high for low, high in _CJK_BLOCKS):
        return len(text)
    return max(emitted, text.rfind(" ") + 1)


class TextIteratorStreamer(TextStreamer):
    """Hands the pieces of text to whoever iterates over it, for a `generate` that runs in another thread.

    `timeout`: seconds to wait for a piece before the iteration raises `queue.Empty`; None waits for ever.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.queue: Queue[str | BaseException | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queues a piece, and the end."""
        self.queue.put(text)
        if stream_end:
            self.queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Makes the iteration raise `error`; for the thread that runs `generate`."""
        self.queue.put(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            item = self.queue.get(timeout=self.timeout)
        except Empty:
            raise Empty(f"no text for {self.timeout} s") from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item
