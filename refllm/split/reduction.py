"""The sum over ranks: in which order it is added, and in which format every partial sum is stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from refllm.errors import InputError
from refllm.precision.arithmetic import Dtype, check_dtype, rounding

__all__ = ["ORDERS", "SUM", "AllReduce"]

Parts = Sequence[np.ndarray]
"""What each rank holds, in the order of the ranks."""
Reduce = Callable[[Parts], np.ndarray]
"""The parts of all ranks -> their sum, such as `AllReduce`."""

ORDERS = ("ring", "tree", "one by one")
"""Orders of addition: see `AllReduce`."""


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce: called with the parts of all ranks, it gives their sum, which every rank then holds.

    order: "one by one", from rank 0 to the last; "tree", neighbours first, then the sums of neighbours; "ring", in
        which the tensor is cut into as many chunks as there are ranks, and chunk c is passed on from rank c + 1 around
        to rank c (a reduce-scatter over a ring).
    dtype: the format in which parts and every partial sum are stored; None stores them as they are.
    Raises InputError for another order or dtype.
    """

    order: str = "ring"
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"order={self.order!r} is not known; use one of {', '.join(ORDERS)}")
        if self.dtype is not None:
            check_dtype(self.dtype)

    def __call__(self, parts_P: Parts) -> np.ndarray:
        parts_P = [self._stored(np.asarray(part)) for part in parts_P]
        if self.order == "tree":
            return self._tree(parts_P)
        if self.order == "one by one":
            return self._chain(parts_P)
        ranks, shape = len(parts_P), parts_P[0].shape
        chunks_PC = [np.array_split(part.ravel(), ranks) for part in parts_P]
        sums_C = [self._chain([chunks_PC[(c + 1 + turn) % ranks][c] for turn in range(ranks)]) for c in range(ranks)]
        return np.concatenate(sums_C).reshape(shape)

    def _stored(self, x: np.ndarray) -> np.ndarray:
        return x if self.dtype is None else rounding(self.dtype)(x)

    def _chain(self, parts: Parts) -> np.ndarray:
        total = parts[0]
        for part in parts[1:]:
            total = self._stored(total + part)
        return total

    def _tree(self, parts: list[np.ndarray]) -> np.ndarray:
        while len(parts) > 1:
            pairs = [self._stored(a + b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
            parts = pairs + parts[2 * len(pairs) :]
        return parts[0]


SUM = AllReduce()
"""The sum in the working precision: nothing is rounded on the way."""
