"""Values whose channels are the page's in another order.

A program may name a value in the order in which its file has the rows of a projection, and compute the right thing from
it. So where a value is wrong and the exact one with its channels in another order is not, it is put in order, and the
values that read it say whose order it is: the tap's if they hold, the model's if they do not.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from refllm.check import formulas
from refllm.check.layout import gguf_order

_ATTENTION = ("q_proj", "k_proj", "v_proj", "q_layernorm", "k_layernorm", "q_rope", "k_rope")
_MLP = ("gate_proj", "up_proj", "act")
_WITHOUT_V = {"scores", "probs"}
"""What stands between v and what reads it, and does not read it."""
REORDERED = (*_ATTENTION, "context", *_MLP)
"""The short names of values that may be in another order, since what reads them may be in the same."""
ROWS = 48
"""How many rows an order is made from."""
_FAR = 0.2  # rms error over rms, from where a value may be another in disorder
_NEAR = 0.05  # up to where it is that one
_AT_ONCE = 512  # channels that are looked for at a time


def order_of(shown: np.ndarray, exact: np.ndarray) -> np.ndarray | None:
    """[n] int: which of the channels that are shown [N, n] is each of the exact ones; None if they are in order, or no
    permutation of each other."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (shown, exact))
    if a.shape != b.shape or not np.isfinite(a).all():
        return None
    size = float(np.sqrt(np.mean(b**2)))
    if _rms(a - b) < _FAR * size or _rms(np.sort(a, axis=-1) - np.sort(b, axis=-1)) > _NEAR * size:
        return None
    order = np.concatenate([_nearest(a, b[:, at : at + _AT_ONCE]) for at in range(0, b.shape[1], _AT_ONCE)])
    if len(np.unique(order)) < len(order) or _rms(a[:, order] - b) > _NEAR * size:
        return None
    return order


def _nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[m] int: the column of a [N, n] that is nearest to each of b [N, m]."""
    distance = np.square(a).sum(axis=0)[:, None] - 2 * (a.T @ b)
    return np.asarray(distance.argmin(axis=0))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def put_in_order(value: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[B, S, n] or [B, heads, S, D] with the channels of all heads as `order_of` says."""
    if value.ndim == 3:
        return value[..., order]
    B, H, S, D = value.shape
    flat = value.transpose(0, 2, 1, 3).reshape(B, S, H * D)[..., order]
    return flat.reshape(B, S, H, D).transpose(0, 2, 1, 3)


def in_words(name: str, order: np.ndarray, head_dim: int) -> str:
    """What kind of order it is: a clause."""
    width = len(order)
    if formulas.short(name) not in _MLP and width % head_dim == 0:
        gguf = gguf_order(width, head_dim) if head_dim % 2 == 0 else order[:0]
        if np.array_equal(order, gguf):
            return "the order of a GGUF file (dims i and i + D/2 of a head side by side)"
        if np.array_equal(np.argsort(order), gguf):
            return "another order (dims 2i and 2i + 1 of a head apart, in two halves)"
        heads = order.reshape(-1, head_dim)
        if (heads == heads[:, :1] + np.arange(head_dim)).all() and (heads[:, 0] % head_dim == 0).all():
            return f"another order of whole heads ({', '.join(str(head) for head in heads[:, 0] // head_dim)})"
        within = heads - np.arange(0, width, head_dim)[:, None]
        if (within == within[0]).all():
            return "another order, the same within each head"
    return f"another order of its {width} channels"


def by_words(orders: dict[str, np.ndarray], head_dim: int) -> dict[str, list[str]]:
    """The orders in words -> the short names of the values that have them."""
    found: dict[str, list[str]] = {}
    for name, order in orders.items():
        names = found.setdefault(in_words(name, order, head_dim), [])
        if formulas.short(name) not in names:
            names.append(formulas.short(name))
    return found


def readers(name: str, shown: Sequence[str], reordered: Iterable[str]) -> list[str]:
    """The values that tell whose the order of a value is: what is shown after it in attention or the MLP, up to the
    first one that has left it. shown: all of them, in order of computation."""
    layer = formulas.split(name)[0]
    inside = {*(_ATTENTION if formulas.short(name) not in _MLP else _MLP)}
    if formulas.short(name) == "v_proj":
        inside |= _WITHOUT_V
    disordered, found = set(reordered), []
    for other in shown[list(shown).index(name) + 1 :]:
        found.append(other)
        if other not in disordered and not (formulas.split(other)[0] == layer and formulas.short(other) in inside):
            return found
    return []
