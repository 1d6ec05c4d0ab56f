"""Which profile of an operator a candidate's value has, and whether it has a defect that passes for a rounding.

Every admissible profile is evaluated in float64 on the candidate's own inputs, which predicts its result to the bit
wherever the order of float32 sums cannot matter; the one that agrees in most elements is the candidate's. Of a large
value a sample is taken: a few thousand elements tell all profiles apart.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy import forms, limits
from refllm.accuracy.forms import FORMS, OUT, Nudges, Stores, on_grid
from refllm.accuracy.parts import COUNTS, IN_FLOAT32, WHOLE, possible
from refllm.accuracy.profiles import (
    GIVEN,
    ORDERING,
    SHOWN,
    UNROUNDED,
    Profile,
    habits,
    most,
    with_defects,
)
from refllm.accuracy.propagation import Uncertain, cancels, ulp
from refllm.accuracy.shared import shared_error
from refllm.ops.attention import causal_keys

MOST_ELEMENTS = 1 << 14
"""Elements of a sample."""

_COLUMNS = 256  # of a product
_QUERY_ELEMENTS = 1 << 12
_ROWS, _FEW_ROWS = 64, 4


@dataclass(frozen=True)
class Recognition:
    """What one value says of the profile of its operator.

    asked: whether the inputs are known to the bit, so that it can say anything. fits: the profiles within the limit,
    best first; none is a finding. blurred: the shown inputs do not explain it, and what they were before they were
    rounded is not known to the bit, so that nothing can be said. mismatch: of the best, over `elements` elements.
    defect, shared: one clause each, "" for none.
    """

    asked: bool = False
    fits: tuple[Profile, ...] = ()
    mismatch: float = 0.0
    elements: int = 0
    defect: str = ""
    shared: str = ""
    blurred: bool = False

    @property
    def profile(self) -> Profile | None:
        return self.fits[0] if self.fits else None


NOT_ASKED = Recognition()


@dataclass(frozen=True)
class Made:
    """A result of an operator of a page that is not worked out yet: the operator, its inputs, and what else it takes.

    inputs: as the page handed them on. how: weight, bias, eps, name, interleaved, scale, key_mask, window, as the form
    has it.
    """

    operator: str
    inputs: tuple[Uncertain, ...]
    how: dict[str, Any]

    @property
    def blurred(self) -> bool:
        """Whether an input may be read as it was before it was rounded, which is not known to the bit."""
        return any(x.before is not None and known(x.before) is None for x in self.inputs)

    @property
    def terms(self) -> tuple[Uncertain, ...] | None:
        """The three terms of a sum whose first input is a sum itself."""
        if self.operator != "add" or self.inputs[0].sum_of is None:
            return None
        return (*self.inputs[0].sum_of, self.inputs[1])

    def read(self, profile: Profile) -> tuple[Uncertain, ...]:
        """The inputs as a candidate with that profile reads them."""
        inputs = self.terms if profile.together and self.terms is not None else self.inputs
        reads = profile.reads or (SHOWN,) * len(inputs)
        return tuple(
            x.before if how == UNROUNDED and x.before is not None else x for x, how in zip(inputs, reads, strict=True)
        )


def known(x: Uncertain) -> np.ndarray | None:
    """What a candidate has there, to the bit, if that is known."""
    if x.rounded is not None:
        return x.rounded
    return None if x.variance.any() else x.value


_FIRST = (UNROUNDED, SHOWN, SHOWN)
_TOGETHER = (frozenset({"attention and MLP"}), frozenset[str]())
Arrays = tuple[np.ndarray, ...]
Sample = tuple[Arrays, dict[str, Any]]


def undecided(made: Made, dtype: str) -> float:
    """The share of elements of an activation that float32 may move across a boundary between two numbers of the
    format, since what is left of 1 + erf or 1 + tanh is too little for it to be known better."""
    if made.operator not in ("glu", "activation"):
        return 0.0
    x, *rest = (np.asarray(value.value, np.float64) for value in made.inputs)
    off, factor = cancels(made.how["name"], x), rest[0] if made.operator == "glu" else 1.0
    if not off.any():
        return 0.0
    spacing = ulp(ops.activation(x, made.how["name"]) * factor, dtype, np.float64)
    return float(np.mean(np.minimum(1, 2 * off * np.abs(factor) / np.maximum(spacing, np.finfo(np.float32).tiny))))


class Recogniser:
    """Samples of the values of one run. places [N, 2]: the (row, position) of what is no padding. dtype: narrow.
    splits: of how many parts somebody said that products are the sums."""

    def __init__(self, dtype: str, places: np.ndarray, splits: int = 1) -> None:
        self.dtype, self.places = dtype, places
        self.counts = tuple(dict.fromkeys((*COUNTS, splits)))

    def __call__(self, made: Made, candidate: np.ndarray, record: Sequence[Profile] = ()) -> Recognition:
        """candidate: what was shown of this result. record: profiles that earlier layers had, tried first."""
        if made.operator == "attention":
            return _Attention(self, made, candidate, record).found()
        sampled = _Samples(self, made, candidate)
        tried: dict[Profile, float] = {}
        for profile in _candidates(made, record):
            agreed = sampled.agreement(profile)
            if agreed is None:
                continue
            tried[profile] = agreed
            if profile in record and sampled.fits(profile, agreed) and sampled.missed(agreed) < limits.NAMED_VOTES:
                break  # as before
            if _is_last_shown(made, profile) and any(sampled.fits(p, a) for p, a in tried.items()):
                break  # what reads the shown values explains it
        if made.operator == "linear" and not any(sampled.fits(p, a) for p, a in tried.items()):
            tried |= self._split(made, candidate, sampled)
        if not tried:
            return NOT_ASKED
        found = self._decided(made, sampled, tried)
        if not found.fits and not found.defect and made.blurred:
            return Recognition(blurred=True)
        return found

    def _split(self, made: Made, candidate: np.ndarray, sampled: "_Samples") -> dict[Profile, float]:
        """How well sums of products of parts agree, those that do so in a few rows."""
        few, found = _Samples(self, made, candidate, _FEW_ROWS), {}
        bias, terms = made.how["bias"] is not None, made.inputs[0].shape[-1]
        for parts in possible(terms, bias, self.counts):
            between = bias and (parts.biased or parts.adding == IN_FLOAT32)
            for points in ((), ("product",))[: 1 + between]:
                profile = Profile(frozenset(points), parts=parts)
                agreed = few.agreement(profile)
                if agreed is not None and 1 - agreed <= limits.MISROUNDED + limits.PERHAPS:
                    full = sampled.agreement(profile)
                    assert full is not None
                    found[profile] = full
        return found

    def _decided(self, made: Made, sampled: "_Samples", tried: dict[Profile, float]) -> Recognition:
        ordered = sorted(tried, key=lambda p: (-tried[p], p.size()))
        best = ordered[0]
        fits = _alike(made, tuple(p for p in ordered if sampled.fits(p, tried[p])))
        fits = fits if sampled.stored else tuple(replace(p, stored=False) for p in fits)
        found = Recognition(True, fits, 1 - tried[best], sampled.elements)
        if sampled.missed(tried[best]) < limits.NAMED_VOTES:
            return found
        defect = self._named(made, sampled, fits[:1] or ordered, best)
        if defect or not fits:
            return replace(found, defect=defect)
        return replace(found, shared=sampled.shared(best, [p for p in tried if p.reads == best.reads]))

    @staticmethod
    def _named(made: Made, sampled: "_Samples", on_top_of: Sequence[Profile], best: Profile) -> str:
        """The defect that explains the most elements in which the best habit is wrong."""
        habit, c = sampled.bits(best), sampled.candidate
        assert habit is not None
        changed = (
            (words, sampled.bits(p)) for profile in on_top_of for words, p in with_defects(profile, made.operator)
        )
        return _explains_most(habit, c, changed)


def _explains_most(habit: np.ndarray, candidate: np.ndarray, changed: Iterable[tuple[str, np.ndarray | None]]) -> str:
    """The words of the change that explains the most elements in which a habit is wrong; "" if none explains enough.

    changed: (words, the bits with that change; None if they are not known).
    """
    wrong, most_votes, said = habit != candidate, 0, ""
    for words, bits in changed:
        if bits is None:
            continue
        differ = bits != habit
        votes = int(np.sum((bits == candidate) & differ))
        ahead = votes - int(np.sum(~wrong & differ))
        enough = ahead >= limits.NAMED_VOTES and votes >= limits.NAMED_SHARE * differ.sum()
        if enough and np.sum(bits != candidate) <= limits.NAMED_LEFT * wrong.sum() and ahead > most_votes:
            most_votes, said = ahead, words
    return said


def _alike(made: Made, fits: tuple[Profile, ...]) -> tuple[Profile, ...]:
    """And those that differ only in how they read inputs of which there is but one form."""
    readings = dict.fromkeys((p.reads, p.together) for p in _candidates(made, ()))
    more = [replace(p, reads=reads) for p in fits for reads, together in readings if together == p.together]
    read = {p: tuple(id(x) for x in made.read(p)) for p in (*fits, *more)}
    of_fits = {(p.points, p.parts, p.together, read[p]) for p in fits}
    same = [p for p in more if (p.points, p.parts, p.together, read[p]) in of_fits]
    return tuple(dict.fromkeys([*fits, *same]))


def _candidates(made: Made, record: Sequence[Profile]) -> list[Profile]:
    usual = [p for p in record if not p.together or made.terms is not None]
    every = [*usual, *habits(made.operator, len(made.inputs))]
    if made.terms is not None:
        every += [Profile(points, reads, together=True) for reads in ((), _FIRST) for points in _TOGETHER]
    return list(dict.fromkeys(every))


def _is_last_shown(made: Made, profile: Profile) -> bool:
    shown = [p for p in habits(made.operator, len(made.inputs)) if not p.reads]
    return profile == shown[-1]


class _Samples:
    """One value and its inputs, sampled; predictions are kept."""

    def __init__(self, of: Recogniser, made: Made, candidate: np.ndarray, most_rows: int = _ROWS) -> None:
        self.made, self.dtype = made, of.dtype
        width = max(
            1, int(np.prod([n for axis, n in enumerate(candidate.shape) if axis not in _position_axes(candidate)]))
        )
        self.columns: np.ndarray | slice = slice(None)
        if made.operator == "linear" and width > _COLUMNS:
            self.columns = np.linspace(0, width - 1, _COLUMNS).astype(int)
            width = _COLUMNS
        count = min(
            len(of.places), max(8, min(_ROWS, MOST_ELEMENTS // width) if width > 64 else MOST_ELEMENTS // width)
        )
        count = min(count, most_rows) if most_rows < _ROWS else count
        chosen = np.unique(np.linspace(0, len(of.places) - 1, count).astype(int))
        self.at = of.places[chosen, 0], of.places[chosen, 1]
        self.candidate = np.asarray(self._rows(candidate)[..., self.columns], np.float64)
        self.stored = bool(np.mean(on_grid(self.candidate, self.dtype) == self.candidate) > 0.99)
        self.elements = self.candidate.size
        self.how = self._options()
        self._kept: dict[Profile, np.ndarray | None] = {}
        self._inputs: dict[Any, Arrays | None] = {}

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """[B, S, E] -> [N, E], [B, H, S, D] -> [N, H, D]."""
        return array[self.at] if array.ndim == 3 else array.transpose(0, 2, 1, 3)[self.at]

    def _options(self) -> dict[str, Any]:
        how = dict(self.made.how)
        weight: Any = how.get("weight")
        if self.made.operator == "linear":
            how["weight"] = np.asarray(weight[self.columns], np.float64)
            how["bias"] = None if how["bias"] is None else np.asarray(how["bias"], np.float64)[self.columns]
        elif weight is not None:
            how["weight"] = np.asarray(weight, np.float64)[:, 0] if weight.ndim == 3 else np.asarray(weight, np.float64)
        return how

    def inputs(self, profile: Profile) -> Arrays | None:
        """What a candidate of that profile reads; None where that is not known to the bit."""
        key = profile.reads, profile.together
        if key not in self._inputs:
            if profile.unrounded and all(x.before is None for x in self.made.inputs):
                self._inputs[key] = None
            else:
                arrays = [self._of_input(i, x) for i, x in enumerate(self.made.read(profile))]
                rows = [self._input_rows(i, a) for i, a in enumerate(arrays) if a is not None]
                self._inputs[key] = tuple(rows) if len(rows) == len(arrays) else None
        return self._inputs[key]

    def _of_input(self, index: int, x: Uncertain) -> np.ndarray | None:
        """Tables are the solved ones: what they may still be off by moves next to no element."""
        return x.value if self.made.operator == "rope" and index > 0 else known(x)

    def _input_rows(self, index: int, array: np.ndarray) -> np.ndarray:
        if self.made.operator == "rope" and index > 0:  # a table [B, S, R/2], for all heads
            return np.asarray(array[self.at], np.float64)[:, None]
        return np.asarray(self._rows(array), np.float64)

    def bits(self, profile: Profile) -> np.ndarray | None:
        if profile not in self._kept:
            arrays = self.inputs(profile)
            self._kept[profile] = None if arrays is None else self._cut(self._evaluate(arrays, profile))
        return self._kept[profile]

    def _evaluate(self, arrays: Arrays, profile: Profile) -> np.ndarray:
        store = Stores(stores_of(profile, self.stored), self.dtype)
        with np.errstate(all="ignore"):
            return FORMS[self.made.operator](store, arrays, self.how | {"parts": profile.parts})

    def _cut(self, y: np.ndarray) -> np.ndarray:
        return y[..., : self.candidate.shape[-1]]

    def agreement(self, profile: Profile) -> float | None:
        """The share of elements that are what the profile predicts."""
        bits = self.bits(profile)
        return None if bits is None else _agreement(bits, self.candidate, self.stored)

    def missed(self, agreement: float) -> int:
        return round((1 - agreement) * self.elements)

    def fits(self, profile: Profile, agreement: float) -> bool:
        """Whether as good as every element is what the profile predicts. The sums of a long product move more of them
        across a boundary."""
        mismatch, near = 1 - agreement, 0.0
        if mismatch <= limits.misrounded_limit(self.elements, undecided(self.made, self.dtype)):
            return True
        if self.made.operator == "linear" and mismatch < 0.1:
            bits = self.bits(profile)
            arrays = self.inputs(profile)
            assert bits is not None
            assert arrays is not None
            square = np.square(arrays[0]) @ np.square(self.how["weight"]).T
            noise = np.sqrt(square * (arrays[0].shape[-1] / 6)) * 2.0**-24
            spacing = np.maximum(ulp(bits, self.dtype, np.float64), np.finfo(np.float32).tiny)
            near = float(np.mean(np.minimum(1, 1.6 * noise / spacing))) * profile.parts.count
        return mismatch <= limits.misrounded_limit(self.elements, near)

    def shared(self, best: Profile, all_profiles: Sequence[Profile]) -> str:
        """Whether rows or columns have an error in common, more than any admissible profile's own prediction has."""
        if not self.stored:
            return ""
        truth = self.exact(best)
        arrays = self.inputs(best)
        assert arrays is not None
        V = noise(self.made.operator, arrays, self.how | {"parts": WHOLE}, most(self.made.operator), self.dtype)
        V = self._cut(V + ulp(truth, self.dtype, np.float64) ** 2 / 12 if V.shape == truth.shape else V)
        honest = [(p, self.bits(p)) for p in all_profiles]
        errors = [bits - self.exact(p) for p, bits in honest if bits is not None]
        return shared_error(self.candidate - truth, truth, V, errors)

    def exact(self, profile: Profile) -> np.ndarray:
        arrays = self.inputs(profile)
        assert arrays is not None
        store = Stores(profile.points & (GIVEN | ORDERING), self.dtype)
        with np.errstate(all="ignore"):
            return self._cut(FORMS[self.made.operator](store, arrays, self.how | {"parts": WHOLE}))


def _agreement(predicted: np.ndarray, candidate: np.ndarray, stored: bool) -> float:
    """The share of elements that are as predicted: to the bit if they are stored in the format."""
    if stored:
        same = predicted == candidate
        if np.isnan(candidate).any():
            same |= np.isnan(predicted) & np.isnan(candidate)
    else:
        with np.errstate(invalid="ignore"):
            scale = np.sqrt(np.mean(np.square(predicted), axis=-1, keepdims=True))
            same = np.abs(predicted - candidate) <= limits.FLOAT32_INSIDE * scale
    return np.count_nonzero(same) / max(1, same.size)


def _position_axes(candidate: np.ndarray) -> tuple[int, ...]:
    return (0, 1) if candidate.ndim == 3 else (0, 2)


def stores_of(profile: Profile, stored: bool = True) -> frozenset[str]:
    """The points at which a candidate with that profile stores, its result among them."""
    more = {OUT} if stored and profile.stored else set()
    return profile.points | more | ({"part"} if profile.parts != WHOLE else set())


def noise(operator: str, arrays: Arrays, how: dict[str, Any], profile: Profile, dtype: str) -> np.ndarray:
    """The variance that the roundings of a profile add to an operator's result, but for that of the result itself.

    Each is the square of what its standard deviation, put in at that point, changes: to first order, as every element
    of the result depends on few that are stored. (Attention and products, which sum over them, are `propagation`'s.)
    """
    form: Callable[..., np.ndarray] = FORMS[operator]
    points = profile.points - GIVEN - ORDERING
    if operator == "rope" and "tables" in profile.points:
        arrays = (arrays[0], *(on_grid(table, dtype).astype(table.dtype) for table in arrays[1:]))
    with np.errstate(all="ignore"):
        base = form(Nudges(profile.points, dtype), arrays, how)
        total = np.zeros(base.shape)
        for point in sorted(points):
            total += np.square(form(Nudges(profile.points, dtype, at=point), arrays, how) - base)
    return np.where(np.isfinite(total), total, 0.0)


class _Attention:
    """The profile of a context, by the best agreement: tiles and exponentials of a kernel are not known to the bit."""

    def __init__(self, of: Recogniser, made: Made, candidate: np.ndarray, record: Sequence[Profile]) -> None:
        self.made, self.dtype, self.record = made, of.dtype, record
        _, H, _, D = candidate.shape
        rows = np.unique(of.places[:, 0])
        self.row = int(rows[len(rows) // 2])
        places = of.places[of.places[:, 0] == self.row, 1]
        count = min(len(places), max(4, _QUERY_ELEMENTS // (H * D)))
        self.queries = places[np.unique(np.linspace(0, len(places) - 1, count).astype(int))]
        self.candidate = np.asarray(candidate[self.row].transpose(1, 0, 2)[self.queries], np.float64)
        self.stored = bool(np.mean(on_grid(self.candidate, self.dtype) == self.candidate) > 0.99)

    def found(self) -> Recognition:
        tried: dict[Profile, float] = {}
        for profile in self.record:
            agreed = self._agreements(profile.reads, [profile])
            tried |= agreed
            if agreed and 1 - agreed[profile] <= limits.MISROUNDED + limits.NEAR_RECORD:
                return self._decided(tried)
        every = habits("attention", 3)
        for reads in dict.fromkeys(p.reads for p in every):
            tried |= self._agreements(reads, [p for p in every if p.reads == reads])
            if tried and max(tried.values()) > 1 - limits.MISROUNDED - limits.NEAR_RECORD:
                break
        return self._decided(tried)

    def _decided(self, tried: dict[Profile, float]) -> Recognition:
        if not tried:
            return NOT_ASKED
        # No reading is told from another by a few elements, where none predicts nearly all.
        best = min(tried, key=lambda p: (-tried[p] + (limits.CLEARLY if p.unrounded else 0), p.size()))
        if tried[best] < limits.ATTENTION_KNOWN:
            return Recognition(True, (), 1 - tried[best], self.candidate.size)
        fits = tuple(
            sorted((p for p in tried if tried[p] >= tried[best] - limits.AS_GOOD), key=lambda p: (p != best, p.size()))
        )
        return Recognition(True, fits, 1 - tried[best], self.candidate.size, defect=self._named(best, tried[best]))

    def _arrays(self, reads: tuple[str, ...]) -> Sample | None:
        if UNROUNDED in reads and all(x.before is None for x in self.made.inputs):
            return None
        arrays = [known(x) for x in self.made.read(Profile(reads=reads))]
        if any(a is None for a in arrays):
            return None
        q, k, v = (np.asarray(a[self.row], np.float64) for a in arrays if a is not None)
        T, S = k.shape[1], q.shape[1]
        visible = causal_keys(self.queries + (T - S), T, self.made.how.get("window"))
        mask = self.made.how.get("key_mask")
        if mask is not None:
            visible = visible & (np.asarray(mask)[self.row] != 0)
        how = {"scale": self.made.how.get("scale") or q.shape[-1] ** -0.5, "visible": visible}
        return (q.transpose(1, 0, 2)[self.queries], k, v), how

    def _agreements(self, reads: tuple[str, ...], profiles: Sequence[Profile]) -> dict[Profile, float]:
        sample = self._arrays(reads)
        if sample is None:
            return {}
        (q, k, v), how = sample
        of_scores: dict[frozenset[str], np.ndarray] = {}
        softmax: dict[int, forms.Softmax] = {}
        seen: dict[tuple[int, frozenset[str]], float] = {}
        found = {}
        for profile in profiles:
            before = profile.points & _SCORE_POINTS
            if before not in of_scores:
                s = forms.scores(Stores(before, self.dtype), q, k, how)
                same = next((other for other in of_scores.values() if np.array_equal(other, s)), s)
                of_scores[before] = same
            s = of_scores[before]
            key = id(s), forms.in_tiles_of(k.shape[1], profile.points - before)
            if key not in seen:
                if id(s) not in softmax:
                    softmax[id(s)] = forms.Softmax(s, v, how["visible"])
                store = Stores(stores_of(profile, self.stored) - before, self.dtype)
                with np.errstate(all="ignore"):
                    y = forms.context(store, softmax[id(s)])
                seen[key] = _agreement(y, self.candidate, self.stored)
            found[profile] = seen[key]
        return found

    def _named(self, best: Profile, agreed: float) -> str:
        if 1 - agreed <= limits.MISROUNDED or not self.stored:
            return ""
        sample = self._arrays(best.reads)
        assert sample is not None
        arrays, how = sample
        form = FORMS["attention"]
        with np.errstate(all="ignore"):
            habit = form(Stores(stores_of(best), self.dtype), arrays, how)
            changed = (
                (words, form(Stores(stores_of(p), self.dtype), arrays, how))
                for words, p in with_defects(best, "attention")
            )
            return _explains_most(habit, self.candidate, changed)


_SCORE_POINTS = frozenset({"raw scores", "scores", "scaled q", "scale", "root of the scale"})
