"""Which rank made a wrong value: sentences for the report of a run that was split over ranks.

A sharded value shows it by where the errors lie. A sum over ranks (a product with a row-parallel weight) has them
everywhere: there the sum of the candidate is fitted by c_1 part_1 + ... + c_n part_n + c_b bias, with the parts that
the page makes of the candidate's own input. Right is 1 for each; a part that is missing has 0, a bias that
every rank adds n. Rows of an embedding belong to the rank that holds their tokens.
"""

import numpy as np

from refllm.accuracy import limits
from refllm.check.error_map import column_edges, row_edges
from refllm.check.oracle import Report, TapReport
from refllm.check.ranks import Ranks
from refllm.check.trace import Trace
from refllm.forward.model import Model

INPUT_OF = {"o_proj": "context", "down_proj": "act"}
"""Row-parallel products of a layer -> the value that they read, whose last axis is cut."""


def blamed(report: Report, whole: Trace, ranks: Ranks, model: Model) -> list[str]:
    """Sentences on the first wrong value of a report; none where it does not show whose it is."""
    first = report.first_failure
    if first is None:
        return []
    by_place = _by_place(first, whole, ranks)
    return by_place or _of_sum(first.name, whole, ranks, model) or _of_tokens(first, whole, ranks, model)


# ------------------------------------------------------------------------------------------------------ sharded values


def _by_place(first: TapReport, whole: Trace, ranks: Ranks) -> list[str]:
    """The ranks in whose piece the errors lie, if the others' are right."""
    parts = ranks.parts(first.name) if first.name in ranks.placements else []
    if not parts or first.zmap is None:
        return []
    shape = whole.taps[first.name].shape
    worst = [(number, _rms(first.zmap, shape, axis, begin, stop)) for number, axis, begin, stop in parts]
    wrong = [number for number, rms in worst if not rms <= limits.PIECE_OF_A_RANK]
    if not wrong or len(wrong) == len(worst):
        return []
    return [f"{first.name}: wrong in the piece of {_ranks(wrong)}, right in the others"]


def _rms(zmap: np.ndarray, shape: tuple[int, ...], axis: int, begin: int, stop: int) -> float:
    """The RMS of the blocks of a map whose middle lies in a piece of a value [B, S, n] or [B, heads, S, n]."""
    heads, sequence = (shape[1], shape[2]) if len(shape) == 4 else (1, shape[1])
    of_heads, of_channels = column_edges(heads, shape[-1])
    if len(shape) == 4 and axis == 1:
        keep = np.repeat(_inside(of_heads, begin, stop), len(of_channels) - 1)
        blocks = zmap[:, keep]
    elif axis == len(shape) - 1:
        blocks = zmap[:, np.tile(_inside(of_channels, begin, stop), len(of_heads) - 1)]
    else:
        rows = row_edges(shape[0] * sequence)
        middle = (rows[:-1] + rows[1:] - 1) // 2
        at = middle // sequence if axis == 0 else middle % sequence
        blocks = zmap[(at >= begin) & (at < stop)]
    return float(np.sqrt(np.mean(np.square(blocks, dtype=np.float64)))) if blocks.size else 0.0


def _inside(edges: np.ndarray, begin: int, stop: int) -> np.ndarray:
    whole = (edges[:-1] >= begin) & (edges[1:] <= stop)
    middle = (edges[:-1] + edges[1:]) / 2
    return np.asarray(whole if whole.any() else (middle > begin) & (middle < stop))


# ---------------------------------------------------------------------------------------------------------------- sums


def _of_sum(name: str, whole: Trace, ranks: Ranks, model: Model) -> list[str]:
    """What became of the parts of a sum over ranks."""
    front, _, last = name.rpartition(".")
    read = f"{front}.{INPUT_OF.get(last, '')}"
    parts = _summed(ranks, read) if read in whole.taps else []
    if not parts:
        return []
    tensor = name.removeprefix("model.")
    x = _rows(np.asarray(whole.taps[read], np.float64))
    weight = np.asarray(model.weights[f"{tensor}.weight"], np.float64)
    y = np.asarray(whole.taps[name], np.float64).reshape(len(x), -1)
    width = x.shape[-1] // parts[-1][3]  # numbers per step of the axis that is cut: a head, or 1
    cuts = [slice(begin * width, stop * width) for *_, begin, stop in parts]
    numbers = [number for number, *_ in parts]
    each = [x[:, cut] @ weight[:, cut].T for cut in cuts]
    bias = model.weights.get(f"{tensor}.bias")
    constant = [] if bias is None else [np.broadcast_to(np.asarray(bias, np.float64), y.shape)]
    return (
        _factors(name, each, constant, y, numbers)
        or _missing_in_rows(name, each, constant, y, numbers)
        or _other_piece(name, each, y - sum(constant), numbers, x, weight, cuts)
    )


def _factors(
    name: str, each: list[np.ndarray], constant: list[np.ndarray], y: np.ndarray, numbers: list[int]
) -> list[str]:
    """Parts that are missing or added twice, and a bias that is added by every rank."""
    columns = np.stack([part.ravel() for part in (*each, *constant)], axis=1)
    found = np.linalg.lstsq(columns, y.ravel(), rcond=None)[0]
    if _off(columns @ found, y.ravel()) > limits.SUM_OF_RANKS * _scatter(each, y):
        return []
    said = [
        f"{name}: the part of rank {number} {'is missing' if round(c) == 0 else f'is added {c:.2g} times'}"
        for number, c in zip(numbers, found, strict=False)
        if round(c) != 1
    ]
    if constant and round(found[-1]) != 1:
        said.append(f"{name}: its bias is added {found[-1]:.2g} times, by {len(numbers)} ranks")
    return said


def _missing_in_rows(
    name: str, each: list[np.ndarray], constant: list[np.ndarray], y: np.ndarray, numbers: list[int]
) -> list[str]:
    """The part that is missing in the rows that are wrong, if it is one and the same."""
    total = sum([*each, *constant])
    near = limits.SUM_OF_RANKS * _scatter(each, y)
    wrong = np.sqrt(np.mean(np.square(y - total), axis=-1)) > near
    for number, part in zip(numbers, each, strict=True):
        if wrong.any() and (np.sqrt(np.mean(np.square(y - (total - part))[wrong], axis=-1)) < near).all():
            return [f"{name}: the part of rank {number} is missing in {int(wrong.sum())} of {len(y)} rows"]
    return []


def _other_piece(
    name: str,
    each: list[np.ndarray],
    y: np.ndarray,
    numbers: list[int],
    x: np.ndarray,
    weight: np.ndarray,
    cuts: list[slice],
) -> list[str]:
    """The rank that multiplied with the piece of the weight that belongs to another. y: without the bias."""
    for r, (number, cut) in enumerate(zip(numbers, cuts, strict=True)):
        rest = y - sum(part for s, part in enumerate(each) if s != r)
        for other, of in zip(numbers, cuts, strict=True):
            fits = other != number and of.stop - of.start == cut.stop - cut.start
            if fits and _off(x[:, cut] @ weight[:, of].T, rest) <= limits.SUM_OF_RANKS * _scatter(each, y):
                return [f"{name}: rank {number} has the piece of the weight of rank {other}"]
    return []


def _off(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x - y))))


def _summed(ranks: Ranks, read: str) -> list[tuple[int, int, int, int]]:
    """The pieces of what a row-parallel product reads, if it is cut along heads or channels."""
    parts = ranks.parts(read)
    value = next(iter(ranks.files.values()))[1].taps.get(read)
    across = value is not None and parts and parts[0][1] == (1 if value.ndim == 4 else value.ndim - 1)
    return parts if across else []


def _rows(x: np.ndarray) -> np.ndarray:
    """[B, S, n] or [B, heads, S, D] -> [N, n], the heads beside each other."""
    if x.ndim == 4:
        x = x.transpose(0, 2, 1, 3)
    return x.reshape(x.shape[0] * x.shape[1], -1)


def _scatter(each: list[np.ndarray], y: np.ndarray) -> float:
    """What rounding may leave: an ulp of bfloat16 of every part and of the sum."""
    return float(np.sqrt(sum(np.mean(np.square(part)) for part in (*each, y)))) * 2.0**-8


# --------------------------------------------------------------------------------------------------------------- tokens


def _of_tokens(first: TapReport, whole: Trace, ranks: Ranks, model: Model) -> list[str]:
    """The rank that holds the tokens whose embeddings are wrong, where the vocabulary is cut evenly."""
    sizes = [size for _, size in ranks.mesh if size > 1]
    if first.name != "model.embed_tokens" or len(sizes) != 1 or first.name in ranks.placements:
        return []
    rows = np.asarray(model.weights["embed_tokens.weight"], np.float64)
    ids = whole.inputs.input_ids.ravel()
    value = np.asarray(whole.taps[first.name], np.float64).reshape(len(ids), -1)
    wrong = (value != rows[ids]).any(axis=-1)  # an embedding is read, and nothing is rounded
    each = -(-len(rows) // sizes[0])
    owners = np.unique(ids[wrong] // each)
    if not wrong.any() or len(owners) == sizes[0]:
        return []
    numbers = ranks.numbers
    return [f"{first.name}: wrong for the tokens that {_ranks([numbers[int(o)] for o in owners])} holds"]


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def splits_of(ranks: Ranks) -> int:
    """The number of parts that the products with o_proj and down_proj sum up: 1 where what they read is not cut."""
    found = [len(_summed(ranks, name)) for name in ranks.placements if name.rpartition(".")[2] in INPUT_OF.values()]
    return max([1, *found])


def note(ranks: Ranks, splits: int) -> str:
    """What was put together, for the report."""
    mesh = " x ".join(f"{size} {name}" for name, size in ranks.mesh)
    summed = f"; o_proj and down_proj are sums of {splits} parts" if splits > 1 else ""
    return f"put together from {len(ranks.files)} ranks ({mesh}){summed}"
