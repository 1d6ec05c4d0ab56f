"""Edits of a definition's text: what stands in it, and what would stand there if a mistake had been made.

The text of an operator is the program of its record (`refllm.ops.contracts`): a few lines of NumPy that need nothing
else. Edits compose, take a number by substitution, and can show the line that they change; and so they serve any other
text that defines `definition`, as that of an exercise.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from refllm.errors import RefllmError
from refllm.precision import rounding

Edits = tuple[tuple[str, str], ...]
"""(what stands in the text, what stands in its place), one after the other; all its places are changed."""


class NoSuchTextError(RefllmError):
    """An edit changes what does not stand in the text."""


def edited(text: str, edits: Sequence[tuple[str, str]]) -> str:
    """The text after all edits. Raises NoSuchTextError for one whose first part does not stand in it."""
    for old, new in edits:
        if old not in text:
            raise NoSuchTextError(f"there is no {old!r} in the definition:\n{text}")
        text = text.replace(old, new)
    return text


def changed_lines(text: str, other: str) -> tuple[str, str]:
    """The lines that differ between two texts, first to last, of each: what a definition has, and what it would be."""
    before, after = text.splitlines(), other.splitlines()
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    end = 0
    while end < min(len(before), len(after)) - same and before[-1 - end] == after[-1 - end]:
        end += 1
    kept = (before[same : len(before) - end], after[same : len(after) - end])
    old, new = ("\n".join(line.strip() for line in lines) for lines in kept)
    return old, new


@cache
def compiled(text: str) -> Callable[..., tuple[np.ndarray, ...]]:
    """The function `definition` of a text, in which the names of `TOOLS` mean something."""
    space = dict(TOOLS)
    exec(compile(text, "<definition>", "exec"), space)
    made: Callable[..., tuple[np.ndarray, ...]] = space["definition"]
    return made


# -------------------------------------------------------------------------------------------- what edits may call


def next_power(n: int) -> int:
    """The power of two from n on: how long a block of a row of n is."""
    return 1 << max(0, int(n) - 1).bit_length()


def whole(n: int, tile: int) -> int:
    """How many of n lie in whole tiles."""
    return n // tile * tile


def whole_of_long(n: int, tile: int) -> int:
    """The same where there is a whole one, else all."""
    return whole(n, tile) if n >= tile else n


def padded(n: int, tile: int) -> int:
    """How many there are with those that fill the last tile."""
    return -(-n // tile) * tile


def narrow(x: Any, dtype: str) -> np.ndarray:
    """x on the grid of a narrow format."""
    with np.errstate(over="ignore"):
        return np.asarray(rounding(dtype)(np.asarray(x, np.float32)), np.float64)


def running(s: np.ndarray, tile: int) -> np.ndarray:
    """The maximum that an online softmax has when it comes to each entry of the last axis, tile by tile."""
    n = s.shape[-1]
    pad = np.full((*s.shape[:-1], padded(n, tile) - n), -np.inf)
    tiles = np.concatenate([s, pad], -1).reshape(*s.shape[:-1], -1, tile).max(-1)
    top = np.maximum.accumulate(tiles, -1)
    return np.repeat(np.where(np.isneginf(top), -1e300, top), tile, -1)[..., :n]


def tile_tops(s: np.ndarray, tile: int) -> np.ndarray:
    """The maximum of each entry's own tile of the last axis."""
    n = s.shape[-1]
    pad = np.full((*s.shape[:-1], padded(n, tile) - n), -np.inf)
    top = np.concatenate([s, pad], -1).reshape(*s.shape[:-1], -1, tile).max(-1)
    return np.repeat(np.where(np.isneginf(top), -1e300, top), tile, -1)[..., :n]


def lane_tops(s: np.ndarray, lanes: int) -> np.ndarray:
    """The maximum of each entry's own lane: of those of the last axis that lie `lanes` apart."""
    n = s.shape[-1]
    pad = np.full((*s.shape[:-1], padded(n, lanes) - n), -np.inf)
    top = np.concatenate([s, pad], -1).reshape(*s.shape[:-1], -1, lanes).max(-2)
    return np.tile(np.where(np.isneginf(top), -1e300, top), -(-n // lanes))[..., :n]


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """e^x / sum e^x along an axis."""
    e = exp(x - x.max(axis=axis, keepdims=True, initial=-1e300))
    return e / e.sum(axis=axis, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(-x))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """Phi(x), of the normal distribution."""
    return np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)), otypes=[np.float64])(x)


def exp(x: Any) -> Any:
    """e^x with the range of float32, in which kernels of every format take it: infinite from 88.7 on."""
    return np.where(x > _LARGEST, np.inf, np.where(x < _SMALLEST, 0.0, np.exp(np.clip(x, _SMALLEST, _LARGEST))))


_LARGEST, _SMALLEST = 88.722839, -103.972084


class _WithRange:
    """NumPy, with exponentials of the range of float32."""

    exp = staticmethod(exp)

    @staticmethod
    def exp2(x: Any) -> Any:
        """2^x."""
        return exp(x * np.log(2))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


TOOLS: dict[str, Any] = {
    "math": math,
    "np": _WithRange(),
    "whole_of_long": whole_of_long,
    "next_power": next_power,
    "whole": whole,
    "padded": padded,
    "narrow": narrow,
    "running": running,
    "tile_tops": tile_tops,
    "lane_tops": lane_tops,
    "softmax": softmax,
    "sigmoid": sigmoid,
    "normal_cdf": normal_cdf,
}
"""What the text of an edit may use."""
