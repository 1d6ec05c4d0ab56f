"""Weights of projections that read the same input, one under the other in one matrix: one product computes them all.

    q_proj [Q, I], k_proj [KV, I], v_proj [KV, I]    rows 0 .. Q-1, Q .. Q+KV-1, ... of one [Q + 2 KV, I]
    gate_proj [F, I], up_proj [F, I]                 of one [2 F, I]

A model page asks for each projection by itself, with arrays that are views of such a matrix. `Operators.linear` sees
whose view a weight is, computes the whole when the first part is asked for, and hands out the columns of each. A weight
that was copied (pickle, deepcopy) is no view any more and is multiplied alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Stack(np.ndarray[Any, Any]):
    """A matrix of weights; the type is how its parts are told from views of any other array."""


def rooms(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    """Name -> an array to be filled, for the tensors of `shapes` that belong together: plain views of a `Stack`."""
    found: dict[str, np.ndarray] = {}
    for names in _groups(shapes):
        columns = shapes[names[0]][1]
        whole = Stack((sum(shapes[name][0] for name in names), columns), dtype)
        first = 0
        for name in names:
            offset = first * columns * dtype.itemsize
            found[name] = np.ndarray(shapes[name], dtype, buffer=whole, offset=offset)
            first += shapes[name][0]
    return found


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[list[str]]:
    """Names of `shapes` that belong together, each group in the order of `_TOGETHER`."""
    for parts in _TOGETHER:
        for first in (name for name in shapes if name.endswith(f"{parts[0]}.weight")):
            names = [first.removesuffix(f"{parts[0]}.weight") + f"{part}.weight" for part in parts]
            if all(name in shapes and shapes[name][1:] == shapes[first][1:] for name in names):
                yield names


def stack_of(weight: np.ndarray) -> tuple[np.ndarray, slice] | None:
    """The whole matrix of which `weight` is a part, and its rows there; None for a weight that stands alone."""
    whole = weight.base
    if type(whole) is not Stack:
        return None
    first = (_address(weight) - _address(whole)) // weight.strides[0]
    return whole, slice(first, first + len(weight))


def _address(x: np.ndarray) -> int:
    return int(x.__array_interface__["data"][0])
