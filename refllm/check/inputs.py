"""What a check runs: token ids with their mask and positions, and how they are fed (at once, or in cached pieces)."""

from dataclasses import dataclass

import numpy as np

from refllm.errors import InputError


@dataclass(frozen=True)
class Inputs:
    """One run.

    input_ids: int [B, S]. attention_mask: [B, S], 1 = a token, 0 = padding; None: all tokens. position_ids: [B, S], or
    None for 0 .. S-1. chunks: sizes of the pieces to feed with a KV cache, () for all at once. embeds_scale: feed the
    embeddings times this (rounded to the dtype) instead of the ids. label: what to call it in a report.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    chunks: tuple[int, ...] = ()
    embeds_scale: float | None = None
    label: str = "tokens"

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
    def valid(self) -> np.ndarray:
        """[B, S] bool: positions that are not padding. Only these are compared."""
        return self.mask != 0

    @property
    def mask(self) -> np.ndarray:
        """[B, S] int: the attention mask, ones where none was given."""
        return np.ones(self.input_ids.shape, np.int64) if self.attention_mask is None else self.attention_mask

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


def stressed(input_ids: np.ndarray) -> list[Inputs]:
    """The same tokens under conditions in which defects show that plain inputs hide.

    Far positions, embeddings times 1/100 and times 8, left padding (positions counted from the first token), and a
    cached run: most of the sequence at once, the rest token by token.
    """
    B, S = input_ids.shape
    ones = np.ones((B, S), np.int64)
    pad = min(S // 3, 7)
    mask = ones.copy()
    mask[:, :pad] = 0
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    tail = min(S - 1, 6)
    runs = [
        Inputs(input_ids, ones, np.broadcast_to(np.arange(FAR, FAR + S), (B, S)).copy(), label="far positions"),
        Inputs(input_ids, embeds_scale=0.01, label="small embeddings"),
        Inputs(input_ids, embeds_scale=8.0, label="large embeddings"),
    ]
    if pad:
        runs.append(Inputs(input_ids, mask, positions, label="left padding"))
    if tail > 0:
        runs.append(Inputs(input_ids, chunks=(S - tail, *[1] * tail), label="cached decode"))
    return runs
