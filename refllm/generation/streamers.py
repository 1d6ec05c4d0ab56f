"""Streamers: receivers of the tokens of a running `generate`.

`generate` calls `put` with the prompt (int64 [B, S]), then with every new token (int64 [B]), then `end`. The rule for
when text is final is that of `transformers.generation.streamers` (5.23.0), made safe: there a line break forgets the
tokens before it, so that the next word loses the blank that decoders strip from the beginning of a text; here the
pieces always join to the decoded text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
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
_WINDOW = 512
"""Tokens that are decoded at a step; of more, the first half is let go once its text is out."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOCAL_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder", "CTC"}
"""Decoders of the `tokenizers` library under which a token changes no text before the last word, or the last run of
bytes."""


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

    Earlier tokens are decoded again at every step, because how a token decodes depends on those before it. Final is:
    everything after a line break, everything up to an ideograph at the end, else everything up to the last space; of
    tokens that spell bytes nothing before their run is over, which may turn out to be no text; and where the decoder
    replaces longer pieces of the whole text, nothing before the end. The pieces join to what `tokenizer.decode` makes
    of all tokens. `decode_kwargs` go to it. Raises InputError for more than one row.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._start()

    def _start(self) -> None:
        self.tokens: list[int] = []  # those that are still decoded
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
        if not self._decoder_is_local:
            return self.on_finalized_text("")
        text = self._text(self.tokens[: len(self.tokens) - self._open_bytes()])
        self._emit(text, max(self.emitted, _final_length(text, self._cleans_up)))
        if len(self.tokens) > _WINDOW:
            self._let_go(text)

    def end(self) -> None:
        """Passes on the rest."""
        text = self._text(self.tokens)
        rest = text[self.emitted :]
        self._start()
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives each piece of final text, which may be empty; override to do something else than print."""
        print(text, end="\n" if stream_end else "", flush=True)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, **self.decode_kwargs)) if tokens else ""

    def _let_go(self, text: str) -> None:
        """Forgets the first half of the tokens, if the text of the others says all that is not out yet.

        text: of all tokens that are kept, but for an open run of bytes.
        """
        half = len(self.tokens) // 2
        rest = self._text(self.tokens[half : len(self.tokens) - self._open_bytes()])
        gone = len(text) - len(rest)
        if rest and text.endswith(rest) and gone <= self.emitted:
            self.tokens, self.emitted = self.tokens[half:], self.emitted - gone

    @cached_property
    def _decoder(self) -> list[dict[str, Any]]:
        """The steps of the decoder, of a tokenizer that runs on the `tokenizers` library; else none."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = None if backend is None else json.loads(backend.to_str())["decoder"]
        return [] if decoder is None else list(decoder.get("decoders", [decoder]))

    @cached_property
    def _decoder_is_local(self) -> bool:
        """Whether text is final that has a word behind it."""
        return all(
            step["type"] in _LOCAL_DECODERS
            or (step["type"] == "Replace" and len(step["pattern"].get("String", "more than one")) == 1)
            for step in self._decoder
        )

    @cached_property
    def _cleans_up(self) -> bool:
        """Whether a blank goes away when punctuation follows."""
        asked = self.decode_kwargs.get("clean_up_tokenization_spaces")
        return bool(getattr(self.tokenizer, "clean_up_tokenization_spaces", False) if asked is None else asked)

    @cached_property
    def _falls_back_to_bytes(self) -> bool:
        return any(step["type"] == "ByteFallback" for step in self._decoder)

    def _open_bytes(self) -> int:
        """How many tokens at the end spell bytes, or nothing: the next one may belong to them."""
        count = 0
        while self._falls_back_to_bytes and count < len(self.tokens) and self._may_join(self.tokens[-1 - count]):
            count += 1
        return count

    def _may_join(self, token: int) -> bool:
        name = self.tokenizer.backend_tokenizer.id_to_token(token)
        return name is None or token in self._left_out or _BYTE.fullmatch(name) is not None

    @cached_property
    def _left_out(self) -> set[int]:
        """Special tokens, where decoding skips them."""
        if not self.decode_kwargs.get("skip_special_tokens", False):
            return set()
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        return {index for index, token in added.items() if token.special}

    def _emit(self, text: str, end: int) -> None:
        piece = text[self.emitted : end]
        self.emitted += len(piece)
        self.on_finalized_text(piece)


def _final_length(text: str, cleans_up: bool) -> int:
    """How many characters of `text` no later token is expected to change. cleans_up: a last blank may go away."""
    last = ord(text[-1]) if text else 0
    if text.endswith("\n") or any(low <= last <= high for low, high in _CJK_BLOCKS):
        return len(text)
    return max(0, text.rfind(" ") + (not cleans_up))


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
