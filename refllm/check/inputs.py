"""What a check runs: token ids with their mask and positions, and how they are fed (at once, or in cached pieces)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refllm.errors import InputError


@dataclass(frozen=True)
class Inputs:
    """One run.

    input_ids: int [B, S]. attention_mask: [B, S], 1 = a token, 0 = padding; None: all tokens. position_ids: [B, S], or
    None for 0 .. S-1. chunks: sizes of the pieces to feed with a KV cache, () for all at once. embeds_scale: feed the
    embeddings times this (rounded to the dtype) instead of the ids. label: what to call it in a report. until: the name
    of the value with which the run ends, if the candidate shows it; "" for the end of the pass. embeds: float32
    [B, S, hidden_size] to feed instead of the ids.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    chunks: tuple[int, ...] = ()
    embeds_scale: float | None = None
    label: str = "tokens"
    until: str = ""
    embeds: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if self.input_ids.ndim != 2 or 0 in shape:
            raise InputError(f"input_ids: expected [batch, sequence] with at least one token, found shape {shape}")
        for name in ("attention_mask", "position_ids"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise InputError(f"{name}: shape {value.shape} for input_ids of shape {shape}")
        if self.chunks and sum(self.chunks) != shape[1]:
            raise InputError(f"chunks: {sum(self.chunks)} tokens in all, the sequence has {shape[1]}")

    @property
    def feeds_embeddings(self) -> bool:
        """Whether embeddings are fed, and no ids."""
        return self.embeds is not None or self.embeds_scale is not None

    def embedded(self, table: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What is fed, not yet rounded to the dtype: float32 [B, S, hidden_size]. table: ids -> their rows."""
        if self.embeds is not None:
            return self.embeds
        rows = table(self.input_ids)
        return np.asarray(rows if self.embeds_scale is None else rows * rows.dtype.type(self.embeds_scale))

    @property
    def valid(self) -> np.ndarray:
        """[B, S] bool: positions that are not padding. Only these are compared."""
        return self.mask != 0

    @property
    def mask(self) -> np.ndarray:
        """[B, S] int: the attention mask, ones where none was given."""
        return np.ones(self.input_ids.shape, np.int64) if self.attention_mask is None else self.attention_mask

    @property
    def last(self) -> np.ndarray:
        """[B] int: the column of the last token of every row that is no padding."""
        return np.asarray(self.valid.shape[1] - 1 - self.valid[:, ::-1].argmax(axis=1))

    @property
    def positions(self) -> np.ndarray:
        """[B, S] int: the position of every token."""
        if self.position_ids is not None:
            return self.position_ids
        return np.broadcast_to(np.arange(self.input_ids.shape[1]), self.input_ids.shape)

    def pieces(self) -> list[slice]:
        """The columns of each piece."""
        ends = np.cumsum(self.chunks or (self.input_ids.shape[1],)).tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


FAR = 2000
"""Where "far positions" begin: rotary defects that are invisible near 0 are plain there."""


_ROWS_AT_MOST = 64  # tokens of a row of a batch of stressed inputs


ALL_AT_MOST = 4096
"""Tokens up to which every id of a vocabulary may go through a whole model."""


def stressed(input_ids: np.ndarray) -> list[Inputs]:
    """The same tokens under conditions in which defects show that plain inputs hide.

    Far positions, embeddings times 1/100 and times 8, a batch of rows that are padded differently (one is not padded,
    so it is a row in a batch and alone in the plain run), the same sequence in cached pieces of one and of several
    tokens, and both together. Positions are counted from the first token of a row.
    """
    B, S = input_ids.shape
    far = np.broadcast_to(np.arange(FAR, FAR + S), (B, S)).copy()
    runs = [
        Inputs(input_ids, np.ones((B, S), np.int64), far, label="far positions"),
        Inputs(input_ids, embeds_scale=0.01, label="small embeddings"),
        Inputs(input_ids, embeds_scale=8.0, label="large embeddings"),
    ]
    ids, mask, positions = _padded_rows(input_ids)
    if S > 1:
        runs.append(Inputs(ids, mask, positions, label="rows padded differently"))
        runs.append(Inputs(input_ids, chunks=_pieces(S), label="cached decode"))
        runs.append(Inputs(ids, mask, positions, chunks=_pieces(ids.shape[1]), label="padding with a cache"))
    return runs


def _padded_rows(input_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and positions of four rows: little padding on the left, none, much on the left, some on the right."""
    B, S = input_ids.shape[0], min(input_ids.shape[1], _ROWS_AT_MOST)
    ids = np.stack([np.roll(input_ids[i % B, :S], 0 if i == 1 else i) for i in range(4)])
    little = min(S // 4, 5)
    mask = np.ones((4, S), np.int64)
    mask[0, :little] = 0
    mask[2, : S // 2] = 0
    mask[3, S - max(little, 1) :] = 0
    return ids, mask, np.maximum(np.cumsum(mask, axis=-1) - 1, 0)


def _pieces(length: int) -> tuple[int, ...]:
    """Half of a sequence, then one token, several, one, and more at once than came last."""
    sizes, left = [max(1, length // 2)], length - max(1, length // 2)
    for size in (1, 3, 1, 1, 5):
        if left > size:
            sizes.append(size)
            left -= size
    return (*sizes, left) if left else tuple(sizes)


def every_token(vocab_size: int, length: int) -> Inputs | None:
    """All ids of a vocabulary in rows of `length`; None where they are too many for a whole forward pass each."""
    if vocab_size > ALL_AT_MOST:
        return None
    return Inputs(in_rows(np.arange(vocab_size), length), label="every token id")


def in_rows(ids: np.ndarray, length: int) -> np.ndarray:
    """Ids [n] as rows of `length` [B, length], with the first of them repeated at the end where they do not fill it."""
    length = min(length, len(ids))
    return np.resize(ids, (-(-len(ids) // length), length))
