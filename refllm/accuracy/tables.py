"""The rotary tables that a candidate turned with, from what it shows before and after the turning.

The truth is float64: the angle is the position times the exact frequency. Honest code is off by a few float32 ulp of
the frequency, which a pair of dims shares over all positions and heads, and it may round the angle to float32 as well.
So the frequency of every pair is solved: of those within 16 float32 ulp of the truth, the one that agrees best.
Whatever is farther off (another base, positions off by one, narrow angles) is not among them, and shows as an error.

A turn of z by t is e^it z, so that conj(z) times the result has the angle t, whatever z is: with the weight |z|^2 the
rows of all heads and layers are averaged, position by position.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.chained_angles import Chain, chains
from refllm.accuracy.forms import FORMS, OUT, Stores
from refllm.accuracy.profiles import HABITS
from refllm.accuracy.propagation import Propagation, Uncertain
from refllm.config import ModelConfig
from refllm.forward.rotary import RotaryEmbedding

_UNKNOWN = 4.0  # standard deviation, in units of 2^-24 of the angle, of a frequency somewhere within 7 ulp
_SAMPLE = 1 << 14  # elements that are compared to the bit
_EXACT, _AS_TORCH = "exact tables", "tables of float32 angles, as Transformers"
_CHAINED = "tables of float32 angles, each the one of the pair before times a step, as llama.cpp"
_EITHER = "tables exact, or of float32 angles as Transformers: these positions do not tell"


@dataclass(frozen=True)
class Tables:
    """The angles [..., R/2] at positions, and what cos and sin are multiplied by.

    name: in words, as a report says it. solved: from values that were shown; else they are the exact ones, and
    `_UNKNOWN` is what they may be off by. farthest: of the frequencies from the exact ones, in float32 ulp. chain: what
    makes the angles, where they are not position times frequency.
    """

    positions: np.ndarray
    frequencies: np.ndarray
    narrow: bool
    factor: float
    name: str
    solved: bool = True
    farthest: float = 0.0
    chain: Chain | None = None

    @property
    def turned(self) -> np.ndarray:
        """The angles, in float64."""
        if self.chain is not None:
            return self.chain.angles(self.positions)
        return angles(self.positions, self.frequencies, self.narrow)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float64."""
        turned = self.turned
        return np.cos(turned) * self.factor, np.sin(turned) * self.factor

    def uncertain(self, op: Propagation) -> tuple[Uncertain, Uncertain]:
        """cos and sin with the variance of what is left: an ulp of a float32 function, and where nothing was shown, of
        the frequency."""
        turned = self.turned
        found = []
        for value, slope in zip(self.values(), (np.sin(turned), np.cos(turned)), strict=True):
            # A float32 function of a math library is right to an ulp, and so is the table that is made with it; at 0 it
            # is exact.
            variance = op._ulp(value, "float32") ** 2 / (4 if op.dtype == "float32" else 12)
            variance = np.where((turned == 0) & (self.factor == 1), 0, variance)
            if not self.solved:
                variance = variance + np.square(slope * self.factor * turned * _UNKNOWN * 2.0**-24)
            found.append(Uncertain(value, np.asarray(variance, op.width)))
        return found[0], found[1]


def angles(positions: np.ndarray, frequencies: np.ndarray, narrow: bool) -> np.ndarray:
    """[...] x [R/2] -> [..., R/2] in float64: the product, rounded to float32 if it is narrow."""
    if narrow:
        product = positions.astype(np.float32)[..., None] * frequencies.astype(np.float32)
        return product.astype(np.float64)
    return positions.astype(np.float64)[..., None] * frequencies


def unknown(config: ModelConfig, positions: np.ndarray) -> Tables:
    """The exact tables, with the error that honest ones may have: for a candidate that does not show the turning."""
    exact = RotaryEmbedding(config, exact=True)
    exact.tables(positions)
    return Tables(positions, np.asarray(exact.inv_freq), False, exact.attention_factor, "not shown", solved=False)


def guesses(config: ModelConfig, positions: np.ndarray) -> list[Tables]:
    """What a candidate that does not show the turning may have used, the most frequent first; `unknown` at last."""
    exact, as_torch = (RotaryEmbedding(config, exact=flag) for flag in (True, False))
    exact.tables(positions), as_torch.tables(positions)
    torch_like = np.asarray(as_torch.inv_freq, np.float64)
    return [
        Tables(positions, torch_like, True, exact.attention_factor, f"{_AS_TORCH}, explain the rest"),
        Tables(positions, np.asarray(exact.inv_freq), False, exact.attention_factor, f"{_EXACT} explain the rest"),
        unknown(config, positions),
    ]


Turned = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(positions [N], before [N, H, R], after [N, H, R]): rows before and after the turning, the two dims of each pair side
by side (`in_pairs`)."""


def solve(config: ModelConfig, positions: np.ndarray, turned: Iterable[Turned], dtype: str) -> Tables:
    """The tables of a candidate at `positions` [B, S]. turned: of any number of layers; without any, `unknown`."""
    exact, as_torch = (RotaryEmbedding(config, exact=flag) for flag in (True, False))
    exact.tables(positions), as_torch.tables(positions)
    truth = np.asarray(exact.inv_freq)
    rows = _of_one_kind(list(turned), truth)
    places, sums = _averaged(rows)
    if not len(places):
        return unknown(config, positions)
    error_NR = np.angle(sums * np.exp(-1j * angles(places, truth, False)))
    weight_NR = np.abs(sums)

    def misfit(frequencies: np.ndarray, narrow: bool) -> np.ndarray:
        """[R/2], or [J, R/2] of frequencies [J, R/2]."""
        return of_angles(np.stack([angles(places, f, narrow) for f in np.atleast_2d(frequencies)]))

    def of_angles(table: np.ndarray) -> np.ndarray:
        off = error_NR - (table - angles(places, truth, False))
        off -= 2 * np.pi * np.round(off / (2 * np.pi))
        return (weight_NR * np.square(off)).sum(axis=1)

    def tables(name: str, frequencies: np.ndarray, narrow: bool) -> Tables:
        farthest = float(np.max(np.abs(frequencies - truth) / np.spacing(truth.astype(np.float32)), initial=0))
        name = name or f"tables within {max(1, round(farthest))} float32 ulp of the exact frequencies"
        return Tables(positions, frequencies, narrow, exact.attention_factor, name, farthest=farthest)

    near_JR = _neighbours(truth)
    known = (_EXACT, truth, False), (_AS_TORCH, np.asarray(as_torch.inv_freq, np.float64), True)
    found = [(float(misfit(f, narrow).sum()), tables(name, f, narrow)) for name, f, narrow in known]
    if dtype == "float32":  # in a narrow format nothing is told by so few ulp
        for chain in chains(exact):
            made = Tables(positions, truth, True, exact.attention_factor, _CHAINED, chain=chain)
            found.append((float(of_angles(chain.angles(places)[None]).sum()), made))
    for narrow in (False, True):
        each = misfit(near_JR, narrow)
        as_good = each <= each.min(axis=0) * (1 + limits.TABLES_NO_WORSE / len(places)) + 1e-30
        best = near_JR[as_good.argmax(axis=0), np.arange(len(truth))]  # the nearest of them
        found.append((float(each.min(axis=0).sum()), tables("", best, narrow)))
    least = min(fit for fit, _ in found)
    fitting = [t for fit, t in found if fit <= least * (1 + limits.TABLES_NO_WORSE / len(places)) + 1e-30]
    if dtype == "float32":
        return _one_of(fitting, fitting[:1])
    return _to_the_bit(fitting, near_JR, rows, dtype, tables)


def _of_one_kind(rows: Sequence[Turned], truth: np.ndarray) -> list[Turned]:
    """Those of the rows that turn by about the exact angles, if any do: a layer that turns otherwise is a defect of its
    own, and says nothing about the others."""

    def error(one: Turned) -> float:
        places, sums = _averaged([one])
        off, weight = np.angle(sums * np.exp(-1j * angles(places, truth, False))), np.abs(sums)
        return float(np.sqrt((weight * np.square(off)).sum() / weight.sum())) if weight.any() else np.inf

    errors = [error(one) for one in rows]
    farthest = max((float(at.max(initial=0)) for at, _, _ in rows), default=0.0) * truth.max(initial=0)
    most = max(limits.TABLES_OF_ONE * min(errors, default=0.0), limits.TABLES_WITHIN * 2.0**-23 * farthest)
    return [one for one, off in zip(rows, errors, strict=True) if off <= most]


def _one_of(fitting: Sequence[Tables], best: Sequence[Tables]) -> Tables:
    """The first of the best; named both where both that have a name fit."""
    names = {t.name for t in fitting}
    return replace(best[0], name=_EITHER) if {_EXACT, _AS_TORCH} <= names and best[0].name in names else best[0]


def _to_the_bit(
    fitting: Sequence[Tables],
    near_JR: np.ndarray,
    rows: Sequence[Turned],
    dtype: str,
    tables: Callable[[str, np.ndarray, bool], Tables],
) -> Tables:
    """The tables that predict most elements to the bit, of those that the angles do not tell apart; and where none
    predicts nearly all, the frequencies that do so pair by pair."""
    places, before, after = _few(rows)

    def agreement(frequencies: np.ndarray, narrow: bool, factor: float, points: frozenset[str]) -> np.ndarray:
        """[R/2]: the share of elements of each pair."""
        turned = angles(places, frequencies, narrow)[:, None]
        arrays = before, np.cos(turned) * factor, np.sin(turned) * factor
        bits = FORMS["rope"](Stores(points | {OUT}, dtype), arrays, {"interleaved": True})
        return np.asarray((bits == after).mean(axis=(0, 1)).reshape(-1, 2).mean(axis=-1))

    tried = [
        (float(agreement(t.frequencies, t.narrow, t.factor, points).mean()), -i, points)
        for i, t in enumerate(fitting)
        for points in HABITS["rope"]
    ]
    agreed, index, points = max(tried, key=lambda entry: entry[:2])
    best = fitting[-index]
    if agreed >= limits.TABLES_NEARLY_ALL:
        as_good = [t for share, i, _ in tried if share >= agreed - limits.TABLES_NO_FEWER for t in [fitting[-i]]]
        return _one_of(as_good, [best])
    found = [(best.frequencies, best.narrow, agreement(best.frequencies, best.narrow, best.factor, points))]
    for narrow in (False, True):
        shares = np.stack([agreement(f, narrow, best.factor, points) for f in near_JR])
        nearest = (shares >= shares.max(axis=0) - limits.TABLES_NO_FEWER).argmax(axis=0)
        frequencies = near_JR[nearest, np.arange(near_JR.shape[1])]
        found.append((frequencies, narrow, shares.max(axis=0)))
    frequencies, narrow, shares = max(found, key=lambda entry: entry[2].mean())
    return best if frequencies is best.frequencies else tables("", frequencies, narrow)


def _few(rows: Sequence[Turned]) -> Turned:
    """Some rows of all layers, `_SAMPLE` elements at the most."""
    count = max(1, _SAMPLE // max(1, sum(before[0].size for _, before, _ in rows)))
    chosen = [np.unique(np.linspace(0, len(at) - 1, count).astype(int)) for at, _, _ in rows]
    widest = max(before.shape[1] for _, before, _ in rows)

    def heads(x: np.ndarray) -> np.ndarray:
        """Queries and keys have different numbers of heads: keys are repeated."""
        return np.resize(x.transpose(1, 0, 2), (widest, len(x), x.shape[-1])).transpose(1, 0, 2)

    parts = [(at[c], heads(before[c]), heads(after[c])) for (at, before, after), c in zip(rows, chosen, strict=True)]
    at, before, after = (np.concatenate(part) for part in zip(*parts, strict=True))
    return at, before.astype(np.float64), after.astype(np.float64)


def _averaged(turned: Sequence[Turned]) -> tuple[np.ndarray, np.ndarray]:
    """The positions that occur [N], and the sum over rows and heads of conj(before) x after there [N, R/2]."""
    at, products = [], []
    for positions, before, after in turned:
        z, w = (
            np.asarray(x[..., 0::2], np.float64) + 1j * np.asarray(x[..., 1::2], np.float64) for x in (before, after)
        )
        with np.errstate(invalid="ignore", over="ignore"):
            product = (np.conj(z) * w).sum(axis=1)
        at.append(positions)
        products.append(np.where(np.isfinite(product), product, 0))
    if not at:
        return np.empty(0, np.int64), np.empty((0, 0), complex)
    places, where = np.unique(np.concatenate(at), return_inverse=True)
    sums = np.zeros((len(places), products[0].shape[-1]), complex)
    np.add.at(sums, where, np.concatenate(products))
    return places, sums


def _neighbours(truth: np.ndarray) -> np.ndarray:
    """[33, R/2]: the float32 numbers around each exact frequency, nearest first."""
    middle = truth.astype(np.float32)
    steps = sorted(range(-limits.TABLES_WITHIN, limits.TABLES_WITHIN + 1), key=abs)
    return np.stack([(middle + step * np.spacing(middle)).astype(np.float64) for step in steps])


def in_pairs(x: np.ndarray, rotary_dim: int, interleaved: bool) -> np.ndarray:
    """The rotary dims of [..., D], with the two of each pair side by side: [..., R]."""
    x = x[..., :rotary_dim]
    if interleaved:
        return x
    half = rotary_dim // 2
    return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(*x.shape[:-1], rotary_dim)
