"""Why a value is wrong: the hypotheses under which the reference gives what the candidate has.

A hypothesis explains a value if, by the sigma of the changed page, what is left is rounding in the whole and in every
row, the slope of the error along its effect is 1, and the error falls at least threefold. Those that leave as little
are named together: the value cannot tell them apart. First come the hypotheses without a number, then those with one,
which is solved for, then single layers, then pairs. Where none explains it, only what is right every time is said:
what the first row, the first bad row and the space of the head tell.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from refllm.accuracy import limits
from refllm.forward.taps import HEAD_TAPS
from refllm.hypotheses.catalogue import catalogue
from refllm.hypotheses.hypothesis import Hypothesis
from refllm.hypotheses.search import Hypotheses, Judged, Search, Trial, fits_the_place, short_names
from refllm.hypotheses.solve import Solved, is_identified, solve, solved_from
from refllm.parallel import one_blas_thread

Kind = Literal["explained", "nearly", "slope", "none"]
Step = Callable[[str], None]

_JUDGED = 6  # of the best, by their own sigma
_SHARE = 0.3  # of the error, that a hypothesis may leave by the reference's sigma to be judged by its own
_LAYERED, _PAIRED, _PAIRS = 8, 40, 8
_FIRST, _PROMISING = 2, 0.4  # hypotheses that a second one is put on top of, and their least cosine
_ROUNDING = 1.1  # sigma of the changed page, up to which what is left is as small as rounding mostly is
_NO_CHANCE = 300.0  # times an error falls, so that it is not by chance
_RIGHT = 3.0  # rms sigma of the first row, up to which it is right


@dataclass(frozen=True)
class Cause:
    """One hypothesis that fits. says: what completes "with ... the reference gives". sigma: what is left, in rms sigma
    of the changed page. slope: of the error along its effect. family: what its number is of. low, value, high: that
    number, and between which numbers all fit as well."""

    name: str
    says: str
    operator: str
    sigma: float
    slope: float
    effect: float
    layers: tuple[int, ...] = ()
    family: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What explains one wrong value, the best first. kind: explained; nearly, if the error shrinks to a small part but
    not to rounding; slope, if it is below the limit and has the shape of what a hypothesis does; none. before: the
    error without any. facts: what is certain where nothing explains it. tried: hypotheses, of how many; out_of_time:
    whether the others were left out.
    """

    value: str
    kind: Kind
    causes: tuple[Cause, ...] = ()
    before: float = 0.0
    share: float = 1.0
    facts: tuple[str, ...] = ()
    tried: int = 0
    of: int = 0
    out_of_time: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def explain(
    search: Search,
    config: Any,
    hidden: tuple[str, ...] = (),
    step: Step = lambda text: None,
    *,
    is_all: bool = True,
    hypotheses: list[Hypothesis] | None = None,
) -> Explanation:
    """Why the value of a search is wrong. hidden: values that go into it and were not shown. is_all: whether nothing
    before it was shown, so that every hypothesis may be seen in it. hypotheses: others than those of the catalogue."""
    found = catalogue(config) if hypotheses is None else hypotheses
    if not is_all:
        places = short_names(search.target, hidden)
        found = [h for h in found if fits_the_place(h, places)]
    # Small products are quicker on one thread, and starting others for each of them is slower than all of them.
    with one_blas_thread() if search.arrays.small else nullcontext():
        return _Explaining(search, found, step).result()


@dataclass(frozen=True)
class _Found:
    """A judged change, and the intervals of its numbers: hypothesis -> (low, high)."""

    judged: Judged
    ranges: dict[str, tuple[float, float]]

    @property
    def family(self) -> tuple[object, ...]:
        """The same for changes that differ by a number alone."""
        return tuple(h.name if h.parameter is None else (h.parameter.name, h.layers) for h in self.judged.changes)

    def together_with(self, other: "_Found") -> "_Found":
        """The better one, whose intervals take in those of the other."""
        ours, theirs = ([*f.ranges.values()] for f in (self, other))
        if len(ours) != len(theirs):
            return self
        wide = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(ours, theirs, strict=True)]
        return _Found(self.judged, dict(zip(self.ranges, wide, strict=True)))

    def cause(self) -> Cause:
        """In words and numbers."""
        changes, last = self.judged.changes, self.judged.changes[-1]
        low, high = self.ranges.get(last.name, (None, None))
        return Cause(
            name=" and ".join(h.name for h in changes),
            says=" and ".join(_said(h, self.ranges.get(h.name)) for h in changes),
            operator=last.operator,
            sigma=self.judged.found.ratio,
            slope=self.judged.slope,
            effect=self.judged.effect,
            layers=tuple(sorted(last.layers or ())),
            family="" if last.parameter is None else last.parameter.name,
            value=last.value,
            low=low,
            high=high,
        )


def _said(hypothesis: Hypothesis, fits: tuple[float, float] | None) -> str:
    value = hypothesis.value
    if fits is None or value is None or is_identified(value, *fits):
        return hypothesis.says
    low, high = max(fits[0], 0.0) if value > 0 else fits[0], fits[1]
    size = max(abs(low), abs(high))
    digits = 2 + max(0, math.ceil(math.log10(size / (high - low)))) if high > low else 2
    return f"{hypothesis.says} ({low:.{digits}g} to {high:.{digits}g} fit as well)"


class _Explaining:
    """The stages of one explanation, each only where those before explain nothing."""

    def __init__(self, search: Search, hypotheses: list[Hypothesis], step: Step) -> None:
        self.search, self.step = search, step
        self.plain = [h for h in hypotheses if not h.open]
        self.free = [h for h in hypotheses if h.open]
        self.trials: list[Trial] = []
        self.close: Judged | None = None
        self.tried: set[str] = set()

    def result(self) -> Explanation:
        if not np.isfinite(self.search.seen(True)).all():
            return self._none()
        self._screen()
        if not self._wrong():
            return self._below()
        found = self._against_numbers(self._fits(self.trials))
        if not found and self.search.reference.ratio < limits.FALLS * limits.END_TO_END:
            below = self._below()  # so little is wrong that it cannot fall threefold
            if below.causes:
                return below
        for stage in (self._solved, self._single_layers, self._pairs):
            if found or self.search.out_of_time:
                break
            found = stage()
        if found:
            return self._explanation("explained", self._causes(found, self._explains))
        return self._nearly() or self._none()

    def _wrong(self) -> bool:
        return not Judged((), self.search.reference, 0, 0, 0).holds(self.search.dtype)

    def _screen(self) -> None:
        """The effects of all plain hypotheses on the first tokens; on all of them where the first are right."""
        search = self.search
        if not search.few or not np.any(search.error()):
            search.few = False
        sigma = max(search.reference.rms_sigma, np.finfo(float).tiny)
        rows = np.sqrt(np.mean(np.square(search.error()), axis=-1)) / sigma
        if float(rows.max()) < limits.ROW[search.dtype] and self._wrong():
            search.few = False
        self.trials = self._until_one_fits() if search.large else self._all_of(self.plain, "trying")

    def _until_one_fits(self) -> list[Trial]:
        """Of a large model: those first that the first token does not rule out; after one that fits only others for the
        same operator, which the value may not tell from it."""
        ordered = sorted(self.plain, key=_last_if_seen_late if self._first_is_wrong() else _last_if_seen_early)
        trials, operator = [], ""
        for n, hypothesis in enumerate(ordered):
            if self.search.out_of_time:
                break
            if operator not in ("", hypothesis.operator):
                continue
            self.step(f"trying {n + 1} of {len(ordered)} hypotheses: {hypothesis.name}")
            self.tried.add(hypothesis.name)
            trial = self.search.tried((hypothesis,))
            if trial is None:
                continue
            trials.append(trial)
            if not operator and trial.share < _SHARE and self._fits([trial]):
                operator = hypothesis.operator
        return sorted(trials, key=lambda t: t.left)

    def _first_is_wrong(self) -> bool:
        """Whether the first token of a row is, which sees itself alone."""
        error, sigma = self.search.error()[0], max(self.search.reference.rms_sigma, np.finfo(float).tiny)
        return float(np.sqrt(np.mean(np.square(error)))) > _RIGHT * sigma

    def _all_of(self, hypotheses: list[Hypothesis], words: str, before: Hypotheses = ()) -> list[Trial]:
        def step(n: int) -> None:
            self.step(f"{words} {n + 1} of {len(hypotheses)} hypotheses: {hypotheses[n].name}")
            if hypotheses is self.plain:
                self.tried.add(hypotheses[n].name)

        return self.search.all_of(hypotheses, step, before)

    # ------------------------------------------------------------------------------------------------------- judgement

    def _fits(self, trials: Iterable[Trial]) -> list[Judged]:
        """Those of the trials that explain the value and are as good as the best, the best first."""
        found: list[Judged] = []
        ordered = sorted(trials, key=lambda t: t.left)
        best = ordered[0].left if ordered else 0.0
        for n, trial in enumerate(ordered):
            near = trial.left <= best * limits.AS_GOOD_AS_THE_BEST + 0.05
            if (n >= _JUDGED and not near) or (n > 0 and trial.share > _SHARE) or n > 4 * _JUDGED:
                break
            judged = self.search.judged(trial.changes)
            if judged is None:
                continue
            if self._explains(judged):
                found.append(judged)
            elif self.close is None or judged.found.rms_error < self.close.found.rms_error:
                self.close = judged
        return _as_good_as_the_best(found)

    def _explains(self, judged: Judged) -> bool:
        off = max(limits.SLOPE[self.search.dtype], 3 * judged.slope_error)
        if not judged.holds(self.search.dtype) or abs(judged.slope - 1) > off or off > 0.3:
            return False
        return judged.found.ratio * limits.FALLS <= self.search.reference.ratio or self._row_falls(judged)

    def _row_falls(self, judged: Judged) -> bool:
        """Whether the worst row falls so far: of an error in few rows the whole says little."""
        before = self.search.reference.row_ratio
        return before > limits.row_limit(self.search.reference, self.search.dtype) and (
            judged.found.row_ratio * limits.FALLS <= before
        )

    def _against_numbers(self, found: list[Judged]) -> list[Judged]:
        """What fits, or what fits better by a number that is nobody's name for anything. No number can where all that
        is left is rounding, and none would by chance where nearly all is gone."""
        if not found or found[0].found.ratio < _ROUNDING:
            return found
        if self.search.reference.rms_error > _NO_CHANCE * found[0].found.rms_error:
            return found
        numbers = self._solved(_SHARE)
        better = numbers and numbers[0].found.ratio * limits.AS_GOOD_AS_THE_BEST < found[0].found.ratio
        return numbers if better else found

    def _causes(self, found: list[Judged], accepts: Callable[[Judged], bool]) -> list[Cause]:
        """In words, the best first. Those that differ by a number alone are one, with a number that is known for
        something, if there is one."""
        known = {h.name for h in self.plain}
        by_family: dict[tuple[object, ...], _Found] = {}
        for judged in sorted(found, key=lambda j: (any(h.name not in known for h in j.changes), j.found.ratio)):
            one = self._settled(judged, accepts)
            other = by_family.get(one.family)
            by_family[one.family] = one if other is None else other.together_with(one)
        return [one.cause() for one in sorted(by_family.values(), key=lambda f: f.judged.found.ratio)]

    def _settled(self, judged: Judged, accepts: Callable[[Judged], bool]) -> _Found:
        """With the numbers that fit best, unless those that it has fit as well, and their intervals."""
        ranges: dict[str, tuple[float, float]] = {}
        for hypothesis in judged.changes:
            if hypothesis.parameter is None or hypothesis.value is None:
                continue
            others = tuple(h for h in judged.changes if h is not hypothesis)
            trial = self.search.tried((*others, hypothesis))
            solved = None if trial is None else solved_from(self.search, trial)
            if solved is None:
                continue
            better = self.search.judged((*others, solved.hypothesis))
            low, high, kept = solved.low, solved.high, hypothesis
            if better is not None and accepts(better) and (
                better.found.ratio * limits.AS_GOOD_AS_THE_BEST < judged.found.ratio
            ):  # fmt: skip
                judged, kept = better, solved.hypothesis
            value = kept.value
            assert value is not None
            ranges[kept.name] = min(low, value), max(high, value)
        return _Found(judged, ranges)

    # ---------------------------------------------------------------------------------------------------------- stages

    def _solved(self, least: float = 0.9) -> list[Judged]:
        """Hypotheses with a number. least: the part of the error that the best of its grid may leave."""
        trials = self._numbers(least)
        self.trials = sorted([*self.trials, *trials], key=lambda t: t.left)
        return self._fits(trials)

    def _numbers(self, least: float) -> list[Trial]:
        trials = []
        for n, hypothesis in enumerate(self.free):
            self.step(f"solving for {hypothesis.name}, {n + 1} of {len(self.free)}")
            if self.search.out_of_time:
                break
            self.tried.add(hypothesis.name)
            solved: Solved | None = solve(self.search, hypothesis, least=least)
            trial = None if solved is None else self.search.tried((solved.hypothesis,))
            if trial is not None:
                trials.append(trial)
        return trials

    def _single_layers(self) -> list[Judged]:
        """The hypotheses whose direction is nearest, in one layer each."""
        layers = int(self.search.model.config.num_hidden_layers)
        if layers < 2:
            return []
        nearest = sorted((t for t in self.trials if not t.changes[-1].alone), key=lambda t: -abs(t.cosine))
        some = [t.changes[-1].within([i]) for t in nearest[:_LAYERED] for i in range(layers)]
        trials = self._all_of(some, "in one layer,")
        self.trials = sorted([*self.trials, *trials], key=lambda t: t.left)
        return self._fits(trials)

    def _pairs(self) -> list[Judged]:
        """Two hypotheses at once: those whose effects add up to the error, and a second one on top of the best. Each
        has to explain much of what the other leaves: nearly all of an error and anything beside it explain nothing."""
        trials = []
        for pair, least in self._by_sums():
            trial = None if self.search.out_of_time else self.search.tried(pair)
            if trial is not None and trial.left * limits.FALLS <= least:
                trials.append(trial)
        found = self._fits(trials)
        nearest = sorted((t for t in self.trials if len(t.changes) == 1), key=lambda t: -t.cosine)[:_FIRST]
        for first in nearest:
            if found or first.cosine < _PROMISING or self.search.out_of_time:
                break
            trials = self._all_of(self._nearest_to_the_rest(first), "two at once,", first.changes)
            found = self._fits([t for t in trials if t.left * limits.FALLS <= first.left])
        return found

    def _nearest_to_the_rest(self, first: Trial) -> list[Hypothesis]:
        """Those whose effect has most of the direction of what a first one leaves."""
        rest = (self.search.error() - first.d).ravel()
        single = [t for t in self.trials if len(t.changes) == 1 and t.changes[0].layers is None and t is not first]
        along = [abs(float(np.vdot(rest, t.d))) / float(np.linalg.norm(t.d)) for t in single]
        return [single[n].changes[0] for n in np.argsort(along)[::-1][:_PAIRED]]

    def _by_sums(self) -> list[tuple[Hypotheses, float]]:
        """Pairs, and what the better one of each leaves alone."""
        some = sorted(self.trials, key=lambda t: -abs(t.cosine))[:_PAIRED]
        some = [t for t in some if len(t.changes) == 1 and t.d.shape == self.search.error().shape]
        if len(some) < 2:
            return []
        D = np.stack([t.d.ravel() for t in some])
        G, along = D @ D.T, D @ self.search.error().ravel()
        cost = {
            (i, j): G[i, i] + G[j, j] + 2 * G[i, j] - 2 * along[i] - 2 * along[j]
            for i, j in combinations(range(len(some)), 2)
        }
        return [
            ((*some[i].changes, *some[j].changes), min(some[i].left, some[j].left))
            for i, j in sorted(cost, key=lambda at: cost[at])[:_PAIRS]
        ]

    # --------------------------------------------------------------------------------------------------------- results

    def _explanation(self, kind: Kind, causes: list[Cause], share: float = 0.0) -> Explanation:
        before, of = self.search.reference.ratio, len(self.plain) + len(self.free)
        return Explanation(
            self.search.target, kind, tuple(causes), before, share, (), len(self.tried), of, self.search.out_of_time
        )

    def _below(self) -> Explanation:
        """An error within its limit that has the shape of what a hypothesis does, with or without a number."""
        found = self._of_the_shape(self.trials)
        if found:
            numbers = self._numbers(1.0)
            found = self._of_the_shape([*self.trials, *numbers])
        if not found or not self._alike([trial for trial, _ in found]):
            return self._none()
        named = [j for _, j in found if j.changes[-1].parameter is None] or [j for _, j in found]
        causes = self._causes(named, self._has_the_shape)
        return self._explanation("slope", causes, causes[0].sigma / max(self.search.reference.ratio, 1e-300))

    def _of_the_shape(self, trials: Iterable[Trial]) -> list[tuple[Trial, Judged]]:
        """Those that leave the least, and as little as the best."""
        found: list[tuple[Trial, Judged]] = []
        for trial in sorted(trials, key=lambda t: -t.cosine)[: 2 * _JUDGED]:
            if trial.changes[-1].places or trial.slope < limits.BELOW_SLOPE or trial.effect < limits.EFFECT:
                continue
            judged = self.search.judged(trial.changes)
            if judged is not None and self._has_the_shape(judged):
                found.append((trial, judged))
        least = min((j.found.ratio for _, j in found), default=0.0)
        return [(t, j) for t, j in found if j.found.ratio <= least * limits.AS_GOOD_AS_THE_BEST]

    @staticmethod
    def _alike(trials: list[Trial]) -> bool:
        """Whether these change the value in one direction. Where they do not, the error does not tell which it is."""
        effects = [t.d.ravel() / np.linalg.norm(t.d) for t in trials]
        return all(float(a @ b) > limits.ALIKE for a, b in combinations(effects, 2))

    def _has_the_shape(self, judged: Judged) -> bool:
        return (
            judged.effect >= limits.EFFECT
            and abs(judged.slope - 1) <= min(1 - limits.BELOW_SLOPE, max(limits.BELOW_OFF, 3 * judged.slope_error))
            and judged.slope >= limits.BELOW_SIGMAS * judged.slope_error
            and judged.holds(self.search.dtype)
        )

    def _nearly(self) -> Explanation | None:
        judged = self.close
        if judged is None or not judged.changes:
            return None
        share = judged.found.rms_error / max(self.search.reference.rms_error, np.finfo(float).tiny)
        if share > limits.NEARLY or abs(judged.slope - 1) > limits.SLOPE["bfloat16"]:
            return None
        return self._explanation("nearly", self._causes([judged], lambda found: True), share)

    def _none(self) -> Explanation:
        found = self._explanation("none", [], 1.0)
        facts = _facts(self.search) if self._wrong() and np.isfinite(self.search.seen(True)).all() else ()
        return replace(found, facts=facts)


def _last_if_seen_late(hypothesis: Hypothesis) -> bool:
    """Order of hypotheses where the first token is wrong: it has no other position and no other key."""
    return hypothesis.operator == "rope" and "context" not in hypothesis.values


def _last_if_seen_early(hypothesis: Hypothesis) -> bool:
    """Where it is right."""
    return hypothesis.operator not in ("rope", "attention") and not {"q_proj", "k_proj"} & set(hypothesis.values)


def _as_good_as_the_best(found: list[Judged]) -> list[Judged]:
    found = sorted(found, key=lambda judged: judged.found.ratio)
    return [j for j in found if j.found.ratio <= found[0].found.ratio * limits.AS_GOOD_AS_THE_BEST + 0.02]


# --------------------------------------------------------------------------------------------------------------- facts


def _facts(search: Search) -> tuple[str, ...]:
    """What is certain of an error that nothing explains."""
    if search.target != HEAD_TAPS.get(search.model.head):
        return ()
    e, sigma = search.error(whole=True), max(search.reference.rms_sigma, np.finfo(float).tiny)
    rows = np.sqrt(np.mean(np.square(e.reshape(len(e), -1)), axis=-1)) / sigma
    said = []
    outside = _outside(search, e)
    if outside is not None and outside > limits.OUTSIDE_OF_THE_HEAD:
        said.append("no hidden state makes this error: the head is wrong, or what is done after it")
    places = np.argwhere(search.tokens.valid)
    first = np.flatnonzero(np.concatenate([[True], places[1:, 0] != places[:-1, 0]]))
    if not said and (rows[first] <= _RIGHT).all() and len(rows) > len(first):
        said.append(
            "the first token, which sees itself alone, is right: look at what tells positions and keys apart "
            "(RoPE, scale, mask, q, k)"
        )
        said += _first_bad_row(search, rows)
    elif not said and (rows[first] > _RIGHT).all():
        said.append(
            "the first token, which sees itself alone, is wrong too: RoPE, scale, masks, q and k cannot be all of it"
        )
    return tuple(said)


def _first_bad_row(search: Search, rows: np.ndarray) -> list[str]:
    bad = np.flatnonzero(rows > limits.row_limit(search.reference, search.dtype))
    if not len(bad) or bad[0] < 2:
        return []
    place = np.argwhere(search.tokens.valid)[bad[0]]
    return [f"everything before position {place[1]} is right: look for a window, a chunk or a limit of that length"]


def _outside(search: Search, e: np.ndarray) -> float | None:
    """Rms sigma of the part of a head's error that is no product with a hidden state; None where every error is."""
    name = f"{search.target}.weight"
    V, E = search.arrays.shape(name)
    if V < E + 16:
        return None
    columns = np.linspace(0, V - 1, min(V, max(4 * E, 1024))).astype(int)
    weight = np.asarray(search.arrays.rows(name, columns), np.float64)
    basis = np.linalg.qr(weight)[0]
    part = e[:, columns]
    outside = part - (part @ basis) @ basis.T
    free = np.sqrt((len(columns) - E) / len(columns))
    return float(np.sqrt(np.mean(np.square(outside)))) / free / max(search.reference.rms_sigma, 1e-300)
