"""Products that are sums of products of parts of the row, each rounded: split over devices, or over blocks of a kernel.

    y = summed(x, weight, Parts(4, IN_FLOAT32), None, store)

The parts have equal sizes where the row can be cut so. Where it cannot, code differs: sizes that differ by one at the
most, or equal ones and a shorter last one, of which all but the last are whole tiles, or whole heads.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ONE_BY_ONE, IN_PAIRS, IN_FLOAT32 = "one after another", "in pairs", "in float32"
"""How parts are added: the first two round every sum, the last one none."""

COUNTS = (2, 3, 4, 5, 6, 7, 8, 12, 16)
"""Numbers of parts that are looked for, besides the one that somebody said."""

_TILES = (0, 1, 16, 32, 64, 128)


@dataclass(frozen=True)
class Parts:
    """How a product is made of `count` products of parts. adding: how they are added. tile: 0 where the sizes differ by
    one at the most; else all have the smallest multiple of it that suffices, and the last one what is left. biased: the
    bias is added to the first part, before that is rounded; else to the sum."""

    count: int = 1
    adding: str = ""
    tile: int = 0
    biased: bool = False

    def cuts(self, terms: int) -> tuple[slice, ...]:
        """The parts of a row of so many terms; fewer than `count` where there are not enough tiles."""
        if self.tile:
            size = -(-terms // self.count // self.tile) * self.tile
            return tuple(slice(at, min(at + size, terms)) for at in range(0, terms, size))
        small, more = divmod(terms, self.count)
        ends = np.cumsum([0] + [small + 1] * more + [small] * (self.count - more)).tolist()
        return tuple(slice(*both) for both in pairwise(ends))

    def __str__(self) -> str:
        said = f"{self.count} parts, each rounded, added {self.adding}"
        said += f", cut at multiples of {self.tile}" if self.tile > 1 else ""
        return said + (", the bias in the first" if self.biased else "")


WHOLE = Parts()
"""One product."""


def possible(terms: int, bias: bool, counts: Iterable[int]) -> list[Parts]:
    """The ways to make a product of so many terms of parts, each once, though it may have several descriptions."""
    found: dict[tuple[tuple[tuple[int, int], ...], str, bool], Parts] = {}
    for parts in (Parts(n, how, tile) for n in counts for tile in _TILES for how in _ways(n)):
        cuts = parts.cuts(terms)
        if 1 < parts.count == len(cuts) and cuts[-1].stop > cuts[-1].start:
            bounds = tuple((cut.start, cut.stop) for cut in cuts)
            for biased in (False, True)[: 1 + bias]:
                with_bias = Parts(parts.count, parts.adding, parts.tile, biased)
                found.setdefault((bounds, parts.adding, biased), with_bias)
    return list(found.values())


def _ways(count: int) -> tuple[str, ...]:
    """How parts are added, so many of them: of two there is one sum, and pairs are asked for where all are whole."""
    whole = count > 2 and not count & (count - 1)
    return (ONE_BY_ONE, IN_PAIRS, IN_FLOAT32) if whole else (ONE_BY_ONE, IN_FLOAT32)


def summed(
    x: np.ndarray,
    weight: np.ndarray,
    parts: Parts,
    bias: np.ndarray | None,
    store: Callable[[np.ndarray, str], np.ndarray],
) -> np.ndarray:
    """x W^T in parts, which are stored at "part", as are their sums; with the bias where it belongs to the first of
    them, which is stored at "product" before it. [..., n], [O, n], [O] -> [..., O]."""
    each = [x[..., cut] @ weight[:, cut].T for cut in parts.cuts(x.shape[-1])]
    if parts.biased and bias is not None:
        each[0] = store(each[0], "product") + bias
    each = [store(part, "part") for part in each]
    if parts.adding == IN_FLOAT32:
        return np.sum(each, axis=0)
    if parts.adding == IN_PAIRS:
        while len(each) > 1:
            each = [store(a + b, "part") for a, b in zip(each[::2], each[1::2], strict=True)]
        return each[0]
    total = each[0]
    for part in each[1:]:
        total = store(total + part, "part")
    return total
