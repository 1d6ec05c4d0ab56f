"""Which hypotheses give a candidate's numbers: all that do, or none.

A hypothesis fits if on every designed input all of the candidate's elements are its own within their predicted
rounding, NaN and infinities in the same places, and enough of them are not what is right.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refllm.accuracy.limits import ELEMENT_LIMIT
from refllm.hypotheses.operators.catalogue import catalogue
from refllm.hypotheses.operators.designed import is_corner
from refllm.hypotheses.operators.hypothesis import NUMBER, OpHypothesis, Outputs, Variant
from refllm.hypotheses.operators.outcomes import Outcomes, outcomes
from refllm.hypotheses.operators.solve import readings, solved

_ROUGH = {"float32": 3e-3, "float16": 3e-2, "bfloat16": 0.2}
"""The share of a row's largest number from which on what is off is not looked at any closer."""
_NEARER = 0.25
"""How much nearer than what is right a hypothesis has to be, root mean square over the elements where they differ."""

_ENOUGH = 3
"""Elements of a call in which a number that is solved for has to show: with one, any number fits."""

Answers = dict[int, Outputs]
"""What a candidate returned, by the number of the designed call."""


@dataclass(frozen=True)
class Fit:
    """A hypothesis that gives a candidate's numbers. says: with its number, and what it is restricted to
    (`restricted`): one result, or one value of an argument. definition,
    changed: the lines that its edit changes, before and after; "" where it is no edit. corners: whether it also gives
    what the candidate has where more than the formula is asked."""

    hypothesis: OpHypothesis
    says: str
    definition: str
    changed: str
    restricted: bool = False


def fitting(operator: str, dtype: str, answers: Answers, without: Sequence[str] = ()) -> list[Fit]:
    """All hypotheses that fit, none where none does. without: the names of some that are left out.

    First as those of a kernel that computes in float32 inside, then of one that rounds every step to its dtype. They
    have to fit on all calls; where none does, on those that ask no more than the formula: a beginner's code is often
    wrong as well where there is no key, a NaN or an overflow.
    """
    hypotheses = [h for h in catalogue(operator) if h.name not in without and not (h.place and dtype != "float32")]
    return fitting_among(hypotheses, (outcomes(operator, dtype, i) for i in dict.fromkeys(("float32", dtype))), answers)


def fitting_among(hypotheses: Sequence[OpHypothesis], every: Iterable[Outcomes], answers: Answers) -> list[Fit]:
    """The same among hypotheses of any definition, in one way to round inside after the other."""
    for known in every:
        for numbers in _parts(known, answers):
            wrong = [n for n in numbers if not _agree(known, known.right, n, answers[n])]
            order = sorted(numbers, key=lambda n: (n not in wrong, sum(x.size for x in answers[n])))
            for search in (_whole, _with_argument, _one_result, _solved) if wrong else ():
                found = list(search(known, hypotheses, order, answers))
                if found:
                    return found
    return []


def is_right(operator: str, dtype: str, answers: Answers) -> bool:
    """Whether all that a candidate returned is right, as one that rounds every step."""
    return all_right(outcomes(operator, dtype, dtype), answers)


def all_right(known: Outcomes, answers: Answers) -> bool:
    """The same of any definition."""
    return all(_agree(known, known.right, n, answer) for n, answer in answers.items())


def wrong_elements(known: Outcomes, n: int, answer: Outputs) -> list[np.ndarray]:
    """Which elements of each result of a call are not what is right."""
    truth = known.results(known.right, n)
    assert truth is not None
    return [~_alike(t, s, y) for t, s, y in zip(truth, known.sigmas(known.right, n), answer, strict=True)]


def _parts(known: Outcomes, answers: Answers) -> Iterator[list[int]]:
    """Numbers of calls: all, then those that ask no more than the formula."""
    every = list(answers)
    formula = [n for n in every if not is_corner(known.calls[n])]
    yield every
    if formula and formula != every:
        yield formula


def _whole(
    known: Outcomes, hypotheses: Sequence[OpHypothesis], numbers: Sequence[int], answers: Answers
) -> Iterator[Fit]:
    for hypothesis in hypotheses:
        fits = [v for v in hypothesis.variants if _fits(known, v, numbers, answers)]
        if fits:
            yield _said(fits)


def _with_argument(
    known: Outcomes, hypotheses: Sequence[OpHypothesis], numbers: Sequence[int], answers: Answers
) -> Iterator[Fit]:
    """Hypotheses that hold for one value of an argument, with the others of which all is right."""
    given = [dict(known.calls[n].keywords) for n in numbers]
    for name in dict.fromkeys(name for words in given for name in words):
        for value in dict.fromkeys(w for words in given if isinstance(w := words.get(name), str | bool)):
            inside = [n for n, words in zip(numbers, given, strict=True) if words.get(name) == value]
            outside = [n for n in numbers if n not in inside]
            if not outside or not all(_agree(known, known.right, n, answers[n]) for n in outside):
                continue
            for fit in _whole(known, hypotheses, inside, answers):
                yield replace(fit, says=f"{fit.says}; with {name}={value!r} alone", restricted=True)


def _said(fits: Sequence[Variant]) -> Fit:
    """A hypothesis with all the numbers that fit."""
    first = fits[0]
    values = list(dict.fromkeys(v.number for v in fits))
    number = " or ".join(values[:3]) if len(values) < 4 else f"{values[0]} or more"
    return Fit(first.hypothesis, replace(first, number=number).says, *first.lines)


def _fits(known: Outcomes, variant: Variant, numbers: Sequence[int], answers: Answers) -> bool:
    if not all(_agree(known, variant, n, answers[n]) for n in numbers):
        return False
    return _evidence(known, variant, numbers, answers)


def _evidence(known: Outcomes, variant: Variant, numbers: Sequence[int], answers: Answers) -> bool:
    """Whether it is seen: two elements that are finite and not what is right, or one and others that are right; and
    not the infinities and NaN of a call without a single number."""
    wrong = right = strange = 0
    near = far = 0.0
    for n in numbers:
        results, truth = known.results(variant, n), known.results(known.right, n)
        assert results is not None
        assert truth is not None
        sigmas = known.sigmas(variant, n)
        for h, t, s, y in zip(results, truth, sigmas, answers[n], strict=True):
            both = np.isfinite(h) & np.isfinite(t)
            apart = np.where(both, np.abs(_minus(h, t)), 0) / s
            seen = apart > 2 * ELEMENT_LIMIT
            wrong += int((seen | (np.isfinite(h) & ~np.isfinite(t))).sum())
            strange += int((~np.isfinite(h) & ~((h == t) | (np.isnan(h) & np.isnan(t)))).sum())
            right += int((both & ~seen).sum())
            near += float(np.square(np.where(seen, _minus(y, h), 0) / s).sum())
            far += float(np.square(np.where(seen, _minus(y, t), 0) / s).sum())
    known_values = wrong >= 2 or (wrong + strange >= 1 and right >= 1)
    return known_values and near <= _NEARER**2 * far


def _one_result(
    known: Outcomes, hypotheses: Sequence[OpHypothesis], numbers: Sequence[int], answers: Answers
) -> Iterator[Fit]:
    """Hypotheses that hold in some results, the others of which are right."""
    names = known.names
    if max(len(answers[n]) for n in numbers) < 2:
        return
    for hypothesis in hypotheses:
        like: dict[tuple[int, ...], list[Variant]] = {}
        for variant in hypothesis.variants:
            which = _results_like(known, variant, numbers, answers)
            if which:
                like.setdefault(tuple(which), []).append(variant)
        for results, variants in like.items():
            fit = _said(variants)
            yield replace(fit, says=f"{fit.says}; in {' and '.join(names[i] for i in results)} alone", restricted=True)


def _results_like(known: Outcomes, variant: Variant, numbers: Sequence[int], answers: Answers) -> list[int]:
    """The results that are the variant's on all calls, where the others are right and would not be with it; [] if it is
    not so."""
    like: set[int] | None = None
    seen = 0
    for n in numbers:
        results, truth = known.results(variant, n), known.results(known.right, n)
        if results is None or truth is None or len(results) != len(answers[n]):
            return []
        here = set()
        for i, y in enumerate(answers[n]):
            if not _near(results[i], y, known.dtype) and not _near(truth[i], y, known.dtype):
                return []
            as_h = _agrees(results[i], known.sigmas(variant, n)[i], y)
            as_t = _agrees(truth[i], known.sigmas(known.right, n)[i], y)
            if as_h and as_t:
                here.add(-1 - i)  # it makes no difference here
            elif as_h:
                here.add(i)
                seen += 1
            elif not as_t:
                return []
        of = {i for i in here if i >= 0}
        free = {-1 - i for i in here if i < 0}
        if like is None:
            like = of if of else None
        elif (of and not (of <= like | free and like <= of | free)) or (not of and not like <= free):
            return []
    return sorted(like or ()) if seen else []


def _solved(
    known: Outcomes, hypotheses: Sequence[OpHypothesis], numbers: Sequence[int], answers: Answers
) -> Iterator[Fit]:
    """Hypotheses with a number that is solved for: one number for all calls, or one of their lengths."""
    wrong = [n for n in numbers if not _agree(known, known.right, n, answers[n])]
    numeric = [n for n in wrong if sum(x.size for x in answers[n]) >= _ENOUGH]
    for hypothesis in hypotheses:
        for code in hypothesis.codes if hypothesis.solved and numeric else ():
            variant = Variant(hypothesis, code)
            found: dict[int, float] = {}
            for n in numeric:
                value = solved(known, variant, n, answers[n])
                if value is None:
                    break
                found[n] = value
            else:
                yield from _read(known, variant, found, numbers, answers)


def _read(
    known: Outcomes, variant: Variant, found: dict[int, float], numbers: Sequence[int], answers: Answers
) -> Iterator[Fit]:
    for words, exact in readings(found, known.calls, numbers, known.dtype):
        if all(_agree(known, variant.at(value), n, answers[n]) for n, value in exact.items()):
            says = variant.hypothesis.says.replace(NUMBER, words)
            shown = replace(variant, number=words)
            yield Fit(variant.hypothesis, says, *shown.lines)


def _minus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinity less infinity, which nobody counts
        return x - y


def _agree(known: Outcomes, variant: Variant, n: int, answer: Outputs) -> bool:
    results = known.results(variant, n)
    if results is None or [x.shape for x in results] != [y.shape for y in answer]:
        return False
    if not all(_near(x, y, known.dtype) for x, y in zip(results, answer, strict=True)):
        return False
    return all(map(_agrees, results, known.sigmas(variant, n), answer))


def _near(x: np.ndarray, y: np.ndarray, dtype: str) -> bool:
    """A first look, without a prediction."""
    finite = np.isfinite(x)
    if x.shape != y.shape or not np.array_equal(finite, np.isfinite(y)):
        return False
    size = np.abs(np.where(finite, x, 0))
    top = size.max(axis=-1, keepdims=True, initial=0.0) if x.ndim else size
    # The results of a row share what they are computed from, and a small one may be a difference of large ones.
    return bool((np.abs(np.where(finite, x - np.where(finite, y, 0), 0)) <= _ROUGH[dtype] * (top + 1)).all())


def _agrees(x: np.ndarray, sigma: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and bool(_alike(x, sigma, y).all())


def _alike(x: np.ndarray, sigma: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which elements are the same up to rounding; NaN is NaN."""
    finite = np.isfinite(x) & np.isfinite(y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    return np.where(finite, np.abs(np.where(finite, x, 0) - np.where(finite, y, 0)) <= ELEMENT_LIMIT * sigma, same)
