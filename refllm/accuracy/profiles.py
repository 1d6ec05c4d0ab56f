"""Where an operator may round: for each one its admissible profiles, and the defects that pass for roundings.

An implementation is honest if it computes the formula, in at least float32 inside, from what it is given, in any order,
and rounds to the format at any of the places where a value of its own per element could be stored. What a row shares (a
mean, a root, a denominator, an accumulator) stays in float32. So a *profile* is an order of the steps and a set of
stores; some are habits of stacks that people use, and each is said in words. Rounding what is shared, and constants
that are off, are *defects*, whatever else the code does.

A value that is shown need not be the value that is read: a fused kernel may hand on what it has not rounded, and show
the rounded form of it. So a profile also says which of its inputs are read as they were before their last rounding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations

from refllm.accuracy.parts import WHOLE, Parts
from refllm.accuracy.readings import AS_IT_IS
from refllm.precision import Policy

SHOWN, UNROUNDED = "", "unrounded"


@dataclass(frozen=True)
class Profile:
    """points: where an operator stores, of `refllm.accuracy.forms`, without its result. reads: of each input, SHOWN or
    UNROUNDED; () is all shown. stored: whether the result is put on the grid of the format. parts: of what products of
    parts a product is the sum. together: a residual sum of three terms adds the last two
    first. order: of the float32 sums; asked for in float32 only, as are tf32 and `inputs`: what a product reads in
    place of its input (`refllm.accuracy.readings`)."""

    points: frozenset[str] = frozenset()
    reads: tuple[str, ...] = ()
    stored: bool = True
    parts: Parts = WHOLE
    together: bool = False
    order: str = ""
    tf32: bool = False
    inputs: str = AS_IT_IS

    @property
    def unrounded(self) -> bool:
        """Whether any input is read as it was before it was rounded."""
        return UNROUNDED in self.reads

    def size(self) -> tuple[int, int]:
        """The smaller it is, the less is rounded: of several that fit, the smallest is meant."""
        return (self.unrounded + self.together + (self.parts != WHOLE), len(self.points) + self.parts.biased)


ONCE = Profile()
"""Nothing but the result is rounded."""


def _subsets(*names: str) -> list[frozenset[str]]:
    every = chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))
    return [frozenset(names) for names in every]


def _either(*choices: str | tuple[str, ...]) -> list[frozenset[str]]:
    return [frozenset()] + [frozenset((c,) if isinstance(c, str) else c) for c in choices]


def _times(*lists: list[frozenset[str]]) -> list[frozenset[str]]:
    found = [frozenset[str]()]
    for choices in lists:
        found = [a | b for a in found for b in choices]
    return found


_MIRRORED = [
    frozenset({"mirrored", *points})
    for points in (
        (),
        ("exp",),
        ("exp", "sigmoid"),
        ("exp", "1 + exp"),
        ("exp", "1 + exp", "sigmoid of -|x|", "sigmoid"),
    )
]
SCORES = _times(
    _either("raw scores", "scores", ("raw scores", "scores"), "scaled q", ("scaled q", "scores")), _either("scale")
) + [frozenset({"root of the scale", *more}) for more in ((), ("scores",), ("scaled q",), ("scaled q", "scores"))]
"""The points of the scaled scores."""
_NARROW_SOFTMAX = ("less the largest", "exp", "probs")
WEIGHTS = _either("probs", "exp", ("exp", "sum of rounded"), _NARROW_SOFTMAX, (*_NARROW_SOFTMAX, "sum of rounded")) + [
    frozenset({f"exp in tiles of {tile}", *more}) for tile in (16, 32, 64, 128) for more in ((), ("sum of rounded",))
]
"""The points of the softmax and its product with v."""

HABITS: dict[str, list[frozenset[str]]] = {
    "rms_norm": _either("normalized", "times weight"),
    "layer_norm": _subsets("centred", "normalized", "weighted"),
    "rope": _times(_either("tables"), _either("products", "second product")),
    "glu": _times(_subsets("exp", "1 + exp", "sigmoid"), _either("activation", "gate times up"))
    + _times(_MIRRORED, _either("activation", "gate times up")),
    "activation": _either(),
    "add": _either(),
    "linear": _either("product"),
    "attention": _times(SCORES, WEIGHTS),
}
"""Operator -> the sets of points at which honest code rounds besides its result."""

MOST: dict[str, frozenset[str]] = {
    "rms_norm": frozenset({"normalized"}),
    "layer_norm": frozenset({"centred", "normalized", "weighted"}),
    "rope": frozenset({"tables", "products"}),
    "glu": frozenset({"exp", "1 + exp", "sigmoid", "activation"}),
    "linear": frozenset({"product"}),
    "attention": frozenset({"raw scores", "scores", "probs"}),
}
"""Operator -> the set that rounds most: the top of the range in which an honest error lies."""

_OF_A_NORM = ("reciprocal root", "variance", "partial sums", "n - 1", "eps times 10", "eps outside the root")
_NARROW = ("variance", "with eps", "reciprocal root")
DEFECTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "rms_norm": (
        *((point,) for point in (*_OF_A_NORM, "squares")),
        ("squares", "partial sums", "variance", "reciprocal root"),
        ("squares", *_NARROW),
        _NARROW,
    ),
    "layer_norm": (
        *((point,) for point in (*_OF_A_NORM, "mean")),
        ("mean", "partial sums", "variance", "reciprocal root"),
        ("mean", *_NARROW),
    ),
    "glu": (("gate and up swapped",),),
    "attention": (
        ("denominator",),
        ("reciprocal",),
        ("denominator", "reciprocal"),
        ("accumulator",),
        ("scale off by 1%",),
    ),
}
"""Operator -> what no honest code does: roundings of what a row shares, together or alone, and wrong constants."""

GIVEN = frozenset({"scale", "root of the scale", "tables"})
"""Points that round what all rows are given: their error is no noise, and stands in the values."""

ORDERING = frozenset({"times weight", "mirrored", "gate times up", "sum of rounded"})
"""Points that say in which order the steps are done, or do."""


@cache
def habits(operator: str, inputs: int) -> tuple[Profile, ...]:
    """The profiles of an operator of so many inputs, what reads the shown values first."""
    return tuple(Profile(points, reads) for reads in _readings(operator, inputs) for points in HABITS[operator])


def _readings(operator: str, inputs: int) -> Iterator[tuple[str, ...]]:
    yield ()
    if operator == "attention":
        yield (UNROUNDED, SHOWN, SHOWN)
        yield (UNROUNDED, UNROUNDED, SHOWN)
    elif operator == "add":
        yield (UNROUNDED, SHOWN)
        yield (SHOWN, UNROUNDED)
    if operator != "rope":
        yield (UNROUNDED,) * inputs
    else:
        yield (UNROUNDED, SHOWN, SHOWN)


def most(operator: str) -> Profile:
    """The profile that rounds most."""
    return Profile(MOST.get(operator, frozenset()))


def of_policy(operator: str, policy: Policy) -> Profile:
    """Where an operator rounds under a policy that somebody named."""
    points = {name for name, point in _IN_A_POLICY.get(operator, {}).items() if point in policy.points}
    if operator == "attention" and "attention.weights" in policy.points:
        points.add("probs" if policy.normalize_first else "exp")
    return Profile(frozenset(points))


_IN_A_POLICY = {
    "rms_norm": {"normalized": "rms_norm.normalized"},
    "rope": {"tables": "rope.table", "products": "rope.product"},
    "glu": {"activation": "glu.activation"},
    "attention": {"raw scores": "attention.scores", "scores": "attention.scaled"},
}


def with_defects(profile: Profile, operator: str) -> Iterable[tuple[str, Profile]]:
    """(in words, the profile with a defect on top of it)."""
    for points in DEFECTS.get(operator, ()):
        yield defect_in_words(operator, points), replace(profile, points=profile.points | set(points))


# ------------------------------------------------------------------------------------------------------------- in words

_SAID = {
    "normalized": "before the weight",
    "times weight": "after the weight, before the root",
    "centred": "after the mean is taken off",
    "weighted": "before the bias",
    "tables": "tables",
    "products": "both products",
    "second product": "one product (the other fused)",
    "product": "before the bias",
    "raw scores": "q k",
    "scores": "scaled scores",
    "scaled q": "q times the scale",
    "scale": "the scale",
    "root of the scale": "the scale's root, on q and on k",
    "less the largest": "scores less the largest",
    "exp": "the exponential",
    "sum of rounded": "which is then summed",
    "1 + exp": "1 + the exponential",
    "sigmoid of -|x|": "the sigmoid of -|x|",
    "sigmoid": "the sigmoid",
    "activation": "the activation",
    "gate times up": "gate times up first",
    "probs": "the weights",
    "mirrored": "sigmoid by e^|x|",
}
_DEFECT_SAID = {
    "reciprocal root": "1 / root, which a row shares, is rounded",
    "variance": "the variance, which a row shares, is rounded",
    "partial sums": "partial sums of a row are rounded",
    "squares": "the squares are rounded before they are summed",
    "mean": "the mean, which a row shares, is rounded",
    "n - 1": "the variance is divided by n - 1",
    "eps times 10": "eps is 10 times what the config says",
    "eps outside the root": "eps is added outside the root",
    "gate and up swapped": "gate and up are swapped",
    "denominator": "the denominator of the softmax, which a row shares, is rounded",
    "reciprocal": "1 / denominator of the softmax, which a row shares, is rounded",
    "accumulator": "the running sum over the keys is rounded after every tile",
    "scale off by 1%": "the scale is off by about 1 %",
}


def defect_in_words(operator: str, points: tuple[str, ...]) -> str:
    """One clause."""
    return (
        _DEFECT_SAID[points[0]] if len(points) == 1 else "everything that a row shares is rounded (narrow statistics)"
    )


def in_words(operator: str, profile: Profile) -> str:
    """What a report says of a profile: "once", "twice: before the weight, and the result"."""
    if profile.order or profile.tf32:
        return ", ".join(["TF32 products"] * profile.tf32 + [f"float32 sums {profile.order}"] * bool(profile.order))
    said = [_SAID.get(point, point) for point in sorted(profile.points, key=_place)]
    words = "once" if not said and profile.stored else "not at all: held in float32" if not said else ""
    if operator in ("glu", "attention", "rope") and not said and profile.stored:
        words = "float32 inside"
    if said:
        words = f"rounds {', '.join(said)}" + (" and the result" if profile.stored else "; the result is float32")
    if len(said) == 1 and operator in ("rms_norm", "layer_norm", "glu", "linear") and profile.stored:
        words = f"twice: {said[0]}, and the result"
    if profile.parts != WHOLE:
        words = str(profile.parts) + (", rounded before the bias" if "product" in profile.points else "")
    if profile.together:
        words = "attention and MLP added first"
    return words + (", inputs shown rounded and read unrounded" if profile.unrounded else "")


def _place(point: str) -> int:
    names = list(_SAID)
    return names.index(point) if point in names else len(names)
