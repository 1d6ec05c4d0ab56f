"""One wrong value of one run, and what the reference makes of it under a hypothesis.

e is the candidate less the reference, d what a hypothesis changes in the reference. With the right one e - d is
rounding, and the slope <e, d> / <d, d> is 1; it is 0 with one that has nothing to do with the error.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.measure import Measure, measure
from refllm.accuracy.propagation import Propagation, Uncertain
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.forward.operators import Operators
from refllm.forward.taps import HEAD_TAPS
from refllm.hypotheses.hypothesis import Hypothesis
from refllm.hypotheses.rotation import KINDS, Kind
from refllm.hypotheses.setup import Arrays, DoesNotApplyError, Setup, Tokens, Until
from refllm.parallel import one_blas_thread
from refllm.precision import EXACT, Arithmetic, Policy

_TOKENS, _COLUMNS = 48, 256  # what is looked at first: rows of a sequence, and columns of the head's output
_TOKENS_OF_LARGE, _WHOLE_OF_LARGE, _MORE = 12, 32, 4  # of a model that takes a second for each run: rows that are
# looked at first, rows that are judged if one of them is wrong, and how many times as many if none is
_KEPT_AT_MOST = 2000  # runs
_QUICK = Arithmetic("float32")

_NO_MEANING = (DoesNotApplyError, LookupError, ValueError, TypeError, AttributeError, InputError)
"""What a page or an operator raises on a change that has no meaning for it, or for the change below it."""

Hypotheses = tuple[Hypothesis, ...]
"""Changes that are made one on top of the other."""


@dataclass(frozen=True)
class Trial:
    """What one change, or several together, does to the value. effect: rms of d, left: rms of e - d, both in rms sigma
    of the reference. share: the part of the error that is left. slope, cosine: of e and d."""

    changes: Hypotheses
    effect: float
    left: float
    share: float
    slope: float
    cosine: float
    d: np.ndarray


@dataclass(frozen=True)
class Judged:
    """A change, measured over everything that was shown, by its own sigma. slope_error: the standard error of slope,
    from how much rows differ."""

    changes: Hypotheses
    found: Measure
    slope: float
    slope_error: float
    effect: float

    def holds(self, dtype: str) -> bool:
        """Whether what is left is rounding."""
        return holds(self.found, dtype)


def holds(found: Measure, dtype: str) -> bool:
    """Whether an error is rounding, as a whole and in its worst row."""
    if found.nonfinite:
        return False
    return found.ratio <= limits.end_to_end_limit(found) and found.row_ratio <= limits.row_limit(found, dtype)


Kept = dict[str, "Uncertain | np.ndarray | None"]
"""What runs under a single hypothesis gave, by what was run."""


class Search:
    """The runs of one model and input, up to one value.

    target: its name, "" for the end of the page. candidate: what was shown for it, [B, S, n] or [B, H, S, n]. shown:
    values before it, which are taken over. policy: where the candidate rounds, about. seconds: after which nothing new
    is tried. kept: what runs under single hypotheses gave, for other candidates for the same value of the same run.

    A large model is looked at in float32, and judged in the first rows that are wrong. Raises DoesNotApplyError where
    the reference itself has no finite value.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        target: str,
        candidate: np.ndarray,
        shown: Mapping[str, np.ndarray] | None = None,
        policy: Policy | None = None,
        dtype: str = "float32",
        seconds: float = 30.0,
        kept: Kept | None = None,
    ) -> None:
        from refllm.precision import HF_EAGER

        self.model, self.tokens, self.target, self.candidate, self.dtype = model, tokens, target, candidate, dtype
        self.shown, self.policy = dict(shown or {}), (policy or HF_EAGER).without(model.page.NOT_ROUNDED)
        self.arrays, self.ends = Arrays(model), time.monotonic() + seconds
        self.kinds: tuple[Kind, ...] = KINDS if dtype == "float32" else ("exact",)
        self.large = not self.arrays.small
        self._whole, self._first = tokens, _TOKENS_OF_LARGE if self.large else _TOKENS
        self.ran, self.few, self._kept = 0, True, {} if kept is None and self.large else kept
        self._references: dict[tuple[bool, bool], np.ndarray] = {}
        at_head = target == HEAD_TAPS.get(model.head)
        width = candidate.shape[-1]
        self._columns = np.linspace(0, width - 1, _COLUMNS).astype(int) if at_head and width > _COLUMNS else None
        with one_blas_thread() if self.arrays.small else nullcontext():
            self.reference = self._in_the_first_wrong_rows() if self.large else self._of_the_reference()

    @property
    def out_of_time(self) -> bool:
        """Whether nothing new is to be tried."""
        return time.monotonic() > self.ends

    # ------------------------------------------------------------------------------------------------------------ runs

    def run(self, changes: Hypotheses, whole: bool, kind: Kind | None = None) -> Uncertain | np.ndarray | None:
        """The rows of the value under some changes; None where they do not apply. whole: all rows and columns, and not
        the first. kind: of the tables, and then with its error."""
        if self._kept is None or len(changes) > 1:
            return self._run(changes, whole, kind)
        key = [(h.name, h.layers, h.value) for h in changes], whole, whole or self.few, kind
        if (name := repr(key)) in self._kept:
            return self._kept[name]
        found = self._run(changes, whole, kind)
        if len(self._kept) < _KEPT_AT_MOST:
            self._kept[name] = found
        return found

    def _part(self, whole: bool) -> Tokens:
        return self._whole if whole or not self.few else self._whole.first(self._first)

    def _run(self, changes: Hypotheses, whole: bool, kind: Kind | None) -> Uncertain | np.ndarray | None:
        first = self._part(whole)
        tokens = self.tokens if any(change.ahead for change in changes) else first
        S = tokens.ids.shape[1]
        shown = {name: value[..., :S, :] for name, value in self.shown.items()}
        until = Until(self.target, shown, None if whole else self._columns)
        setup = Setup(self.model, tokens, self.arrays)
        self.ran += 1
        try:
            for change in changes:
                change(setup)
            with np.errstate(all="ignore"):
                quick = self.large and not whole
                inner = Operators(_QUICK if quick else EXACT) if kind is None else self._propagation()
                found = setup.run(inner, until, kind or "exact")
        except _NO_MEANING:
            return None
        if isinstance(found, Uncertain):
            value, variance = self._rows(found.value, first), self._rows(found.variance, first)
            return Uncertain(value, variance) if np.isfinite(value).all() else None
        value = self._rows(found, first)
        return value if np.isfinite(value).all() else None

    def _propagation(self) -> Propagation:
        return Propagation(self.dtype, self.policy, lambda name, x: x, lambda name: False)

    def _rows(self, values: np.ndarray, tokens: Tokens) -> np.ndarray:
        """[B, S, n] or [B, H, S, n] -> [N, n] or [N, H, n], of what is no padding."""
        values = values[..., : tokens.ids.shape[1], : self.candidate.shape[-1]]
        by_position = values if values.ndim == 3 else values.transpose(0, 2, 1, 3)
        return np.asarray(by_position[tokens.valid], np.float64)

    def seen(self, whole: bool) -> np.ndarray:
        """The rows of what was shown."""
        tokens = self._part(whole)
        candidate = self.candidate[..., : tokens.ids.shape[1], :]
        if not whole and self._columns is not None:
            candidate = candidate[..., self._columns]
        return self._rows(candidate, tokens)

    def _base(self, whole: bool) -> np.ndarray:
        key = whole, whole or self.few
        if key not in self._references:
            found = self.run((), whole)
            if not isinstance(found, np.ndarray):
                raise DoesNotApplyError
            self._references[key] = found
        return self._references[key]

    def error(self, whole: bool = False) -> np.ndarray:
        """e: the candidate less the reference."""
        return self.seen(whole) - self._base(whole)

    # -------------------------------------------------------------------------------------------------------- measured

    def _of_the_reference(self) -> Measure:
        found = []
        for kind in self.kinds[:1] if self.large else self.kinds:
            x = self.run((), True, kind)
            if not isinstance(x, Uncertain):
                raise DoesNotApplyError
            found.append(measure(self.seen(True), x.value, x.variance))
            if holds(found[-1], self.dtype):
                break
        return min(found, key=lambda m: m.ratio)

    def _in_the_first_wrong_rows(self) -> Measure:
        """Of the reference, in as few rows as one of them is wrong in: what comes later does not reach them."""
        rows, S = _WHOLE_OF_LARGE, self.tokens.ids.shape[1]
        while True:
            self._whole, self._references = self.tokens.first(rows), {}
            assert self._kept is not None
            self._kept.clear()
            found = self._of_the_reference()
            if rows >= S or not holds(found, self.dtype):
                return found
            rows *= _MORE

    def tried(self, changes: Hypotheses) -> Trial | None:
        """What some changes do to the rows and columns that are looked at first; None where they do nothing."""
        value = self.run(changes, False)
        if not isinstance(value, np.ndarray) or value.shape != self._base(False).shape:
            return None
        e, d = self.error(), value - self._base(False)
        sigma, n = self.reference.rms_sigma, np.sqrt(e.size)
        by_row = np.sqrt(np.mean(np.square(d), axis=-1)) / max(sigma, np.finfo(float).tiny)
        effect = float(np.linalg.norm(d) / n / max(sigma, np.finfo(float).tiny))
        if effect < limits.EFFECT and not by_row.max() > limits.EFFECT_OF_A_ROW:
            return None
        size, square = float(np.linalg.norm(e)), float(np.vdot(d, d))
        left, along = float(np.linalg.norm(e - d)), float(np.vdot(e, d))
        return Trial(
            changes, effect, left / n / sigma, left / max(size, np.finfo(float).tiny), along / square,
            along / max(size * np.sqrt(square), np.finfo(float).tiny), d,
        )  # fmt: skip

    def all_of(
        self, hypotheses: Iterable[Hypothesis], step: Callable[[int], None] = lambda n: None, before: Hypotheses = ()
    ) -> list[Trial]:
        """The trials of those that do anything, the best first. before: what they are put on top of."""
        found = []
        for n, hypothesis in enumerate(hypotheses):
            if self.out_of_time:
                break
            step(n)
            trial = self.tried((*before, hypothesis))
            if trial is not None:
                found.append(trial)
        return sorted(found, key=lambda trial: trial.left)

    def judged(self, changes: Hypotheses) -> Judged | None:
        """Some changes over all rows and columns, by their own sigma, with the tables that fit best."""
        best: Judged | None = None
        for kind in self.kinds:
            x = self.run(changes, True, kind)
            if not isinstance(x, Uncertain) or x.shape != self.seen(True).shape:
                return None
            found = measure(self.seen(True), x.value, x.variance)
            if best is None or found.ratio < best.found.ratio:
                best = Judged(changes, found, *self._slope(x.value))
            if holds(found, self.dtype):
                break
        return best

    def _slope(self, value: np.ndarray) -> tuple[float, float, float]:
        """The slope, its standard error, and the effect in sigma."""
        base = self._base(True)
        e, d = (x.reshape(len(x), -1) for x in (self.seen(True) - base, value - base))
        square = float(np.vdot(d, d))
        if not square:
            return 0.0, np.inf, 0.0
        slope = float(np.vdot(e, d)) / square
        rows = np.einsum("ij,ij->i", d, e - slope * d)
        effect = float(np.sqrt(square / d.size)) / max(self.reference.rms_sigma, np.finfo(float).tiny)
        return slope, float(np.sqrt(np.square(rows).sum()) / square), effect


def short_names(target: str, hidden: Sequence[str]) -> set[str]:
    """The last parts of the names of a value and of those that go into it unseen; "layer" for a layer's own."""
    found = set()
    for name in (target, *hidden):
        last = name.rpartition(".")[2]
        found.add("layer" if last.isdigit() else last)
    return found


def fits_the_place(hypothesis: Hypothesis, places: set[str]) -> bool:
    """Whether a hypothesis can be seen in one of these values first."""
    return not hypothesis.values or bool(places & set(hypothesis.values))
