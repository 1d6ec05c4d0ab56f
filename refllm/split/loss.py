"""Cross entropy over a vocabulary that is cut, and over tokens that lie on different ranks."""

from typing import Any

import numpy as np

from refllm.ops.loss import IGNORE_INDEX, check_reduction, counted_rows, cross_entropy, reduced
from refllm.ops.loss_backward import cross_entropy_backward
from refllm.precision import EXACT, Arithmetic
from refllm.split.linear import starts
from refllm.split.reduction import SUM, Parts, Reduce

__all__ = [
    "data_parallel_cross_entropy",
    "data_parallel_cross_entropy_backward",
    "vocabulary_parallel_cross_entropy",
    "vocabulary_parallel_cross_entropy_backward",
]


def vocabulary_parallel_cross_entropy(
    logits_P: Parts,
    labels_N: np.ndarray,
    *,
    vocabulary: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    reduce: Reduce = SUM,
    ar: Arithmetic = EXACT,
) -> np.ndarray:
    """`refllm.ops.cross_entropy` of logits [N, V_p] whose columns are cut over the ranks.

    The ranks share three numbers per row: the largest logit, the sum of e^(z - largest), and the logit of the label,
    which one rank has and the others give as 0.
    vocabulary: how many columns are words; later ones only fill up the last ranks, and never win. None: all.
    Raises InputError as `refllm.ops.cross_entropy`.
    """
    logits_P, labels_N = _words(logits_P, vocabulary, ar), np.asarray(labels_N)
    rows = counted_rows(labels_N, _width(logits_P, vocabulary), ignore_index)
    check_reduction(reduction)
    top_N, total_N = _top_and_total(logits_P, reduce)
    label_N = reduce([own * _at(z, start, labels_N) for own, z, start in _owners(logits_P, labels_N)])
    loss_N = np.zeros(labels_N.shape, ar.work)
    loss_N[rows] = (np.log(total_N) + top_N - label_N)[rows]
    return reduced(loss_N, len(rows), reduction)


def vocabulary_parallel_cross_entropy_backward(
    dloss: np.ndarray,
    logits_P: Parts,
    labels_N: np.ndarray,
    *,
    vocabulary: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    reduce: Reduce = SUM,
    ar: Arithmetic = EXACT,
) -> list[np.ndarray]:
    """Each rank's columns of softmax minus one-hot: the softmax with the sum over all ranks, the one on the owner.

    Raises InputError as `refllm.ops.cross_entropy`. Rounding: `cross_entropy.grad`.
    """
    logits_P, labels_N = _words(logits_P, vocabulary, ar), np.asarray(labels_N)
    rows = counted_rows(labels_N, _width(logits_P, vocabulary), ignore_index)
    check_reduction(reduction)
    top_N, total_N = _top_and_total(logits_P, reduce)
    dloss_N = np.broadcast_to(ar.array(dloss), labels_N.shape) / (max(1, len(rows)) if reduction == "mean" else 1)
    counted_N1 = np.isin(np.arange(len(labels_N)), rows)[:, None]
    found = []
    for own, z, start in _owners(logits_P, labels_N):
        softmax = np.exp(z - top_N[:, None]) / total_N[:, None]
        one_hot = own[:, None] & (np.arange(z.shape[1]) == (labels_N - start)[:, None])
        found.append(ar.round(np.where(counted_N1, (softmax - one_hot) * dloss_N[:, None], 0), "cross_entropy.grad"))
    return found


def data_parallel_cross_entropy(
    logits_P: Parts,
    labels_P: Parts,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduce: Reduce = SUM,
    ar: Arithmetic = EXACT,
) -> np.ndarray:
    """The mean loss over the counted tokens of all ranks: the sum of all losses over the number of all such tokens.

    The mean of each rank's mean is another number where ranks have different numbers of tokens. The same holds for
    micro-batches whose gradients are accumulated. NaN if no token counts.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "sum", "ar": ar}
    sums = [cross_entropy(z, y, **options) for z, y in _pairs(logits_P, labels_P)]
    counted = _counted(labels_P, ignore_index)
    total = reduce([np.asarray(part) for part in sums])
    return total / counted if counted else np.asarray(np.nan, total.dtype)[()]


def data_parallel_cross_entropy_backward(
    dloss: np.ndarray,
    logits_P: Parts,
    labels_P: Parts,
    *,
    ignore_index: int = IGNORE_INDEX,
    ar: Arithmetic = EXACT,
) -> list[np.ndarray]:
    """Each rank's gradient of its logits, over the number of the counted tokens of all ranks.

    The gradients of weights that follow from them are summed, and not averaged, over the ranks.
    """
    share = ar.array(dloss) / max(1, _counted(labels_P, ignore_index))
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "sum"}
    return [cross_entropy_backward(share, z, y, **options, ar=ar) for z, y in _pairs(logits_P, labels_P)]


def _pairs(logits_P: Parts, labels_P: Parts) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(logits, np.asarray(labels)) for logits, labels in zip(logits_P, labels_P, strict=True)]


def _counted(labels_P: Parts, ignore_index: int) -> int:
    return int(sum((np.asarray(labels) != ignore_index).sum() for labels in labels_P))


def _width(logits_P: Parts, vocabulary: int | None) -> int:
    return sum(z.shape[1] for z in logits_P) if vocabulary is None else vocabulary


def _words(logits_P: Parts, vocabulary: int | None, ar: Arithmetic) -> list[np.ndarray]:
    """The logits, -inf in columns that are no words."""
    if vocabulary is None:
        return [ar.array(z) for z in logits_P]
    places = zip(logits_P, starts(logits_P, axis=1), strict=True)
    return [np.where(start + np.arange(z.shape[1]) < vocabulary, ar.array(z), -np.inf) for z, start in places]


def _top_and_total(logits_P: Parts, reduce: Reduce) -> tuple[np.ndarray, np.ndarray]:
    """The largest logit [N] of all ranks, and the sum over all ranks of e^(z - largest)."""
    top_N = np.max([z.max(axis=1, initial=-np.inf) for z in logits_P], axis=0)
    return top_N, reduce([np.exp(z - top_N[:, None]).sum(axis=1) for z in logits_P])


def _owners(logits_P: Parts, labels_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Each rank: the rows of whose label it has the logit, its logits, and where its columns begin in the whole."""
    places = zip(logits_P, starts(logits_P, axis=1), strict=True)
    return [((labels_N >= start) & (labels_N < start + z.shape[1]), z, start) for z, start in places]


def _at(z_NV: np.ndarray, start: int, labels_N: np.ndarray) -> np.ndarray:
    """The logit of each row's label; of some finite column where this rank does not have it."""
    if not z_NV.shape[1]:
        return np.zeros(len(z_NV), z_NV.dtype)
    column_N = labels_N - start
    own = (column_N >= 0) & (column_N < z_NV.shape[1])
    return np.where(own, z_NV[np.arange(len(z_NV)), np.where(own, column_N, 0)], 0)
