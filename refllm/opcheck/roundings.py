"""Where a candidate rounds: found in what it returns, and right if honest code may round there.

The profiles of an operator are those that the check of models knows (`refllm.accuracy.profiles`): the sets of points at
which a value of its own per element may be stored. An operator of several steps has a profile of each. The steps are
evaluated in float64 with the roundings of a profile (`refllm.accuracy.forms`), which is what the candidate is compared
with: to the bit where the order of a float32 sum cannot matter, else by the size of its error and element by element.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.expected import Expected, expect_values, remembered
from refllm.accuracy.forms import FORMS, OUT, Stores, on_grid
from refllm.accuracy.judge import Fault, Judgement, errors, judge, rounding_error
from refllm.accuracy.profiles import HABITS, Profile, in_words
from refllm.accuracy.propagation import ulp
from refllm.opcheck.observe import Result
from refllm.ops.contracts import contract_of
from refllm.precision import HF_EAGER
from refllm.strategies.call import Call
from refllm.strategies.levels import families_of

Step = frozenset[str]
Made = Callable[["Evaluated"], list[np.ndarray]]
Others = Callable[[], list[np.ndarray]]
_STORED = (frozenset({OUT}), frozenset[str]())
"""A result between two steps of an operator: put into the format, or handed on as it is."""
_MANY = 100
"""Profiles of an operator from which on a result that is far off is not compared with each."""
_ASKED_FIRST = 8
"""Profiles that tell whether the predicted error holds for a call: one in so many, from the one that rounds most."""
_NUMBERS_WORTH_KEEPING = 1 << 13
"""Results of a call whose values under a profile are kept: 64 MiB of all calls and profiles at most."""


class _Tilted(Stores):
    """Rounds what is a few float32 roundings more or less: what lies on a boundary falls to one side of it, and then to
    the other. Numbers of few bits lie there often."""

    def __init__(self, points: Step, dtype: str, tilt: float) -> None:
        super().__init__(points, dtype)
        self.tilt = tilt

    def _put(self, x: np.ndarray) -> np.ndarray:
        return on_grid(x * (1 + self.tilt), self.dtype)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: arguments by name, and the points of each step by its name. tilt: of what is rounded."""

    arguments: dict[str, Any]
    dtype: str
    points: dict[str, Step]
    tilt: float = 0.0

    def form(self, step: str, operator: str, arrays: Sequence[np.ndarray], how: dict[str, Any]) -> np.ndarray:
        """The step, with what it stores, without its result."""
        store = _Tilted(self.points.get(step, frozenset()), self.dtype, self.tilt)
        with np.errstate(all="ignore"):
            return FORMS[operator](store, tuple(np.asarray(x, np.float64) for x in arrays), how)

    def between(self, name: str, x: np.ndarray) -> np.ndarray:
        """A value that one step hands to the next."""
        return on_grid(x * (1 + self.tilt), self.dtype) if OUT in self.points.get(name, frozenset()) else x


def _normed(e: Evaluated, x: np.ndarray, layer: bool, weight: np.ndarray, bias: Any, step: str = "norm") -> np.ndarray:
    a = e.arguments
    weight = np.asarray(weight, np.float64)
    how = {"weight": weight, "eps": a["eps"]} | (
        {"bias": None if bias is None else np.asarray(bias, np.float64)} if layer else {}
    )
    return e.form(step, "layer_norm" if layer else "rms_norm", (x,), how)


def _norm(e: Evaluated, layer: bool) -> list[np.ndarray]:
    return [_normed(e, e.arguments["x"], layer, e.arguments["weight"], e.arguments.get("bias"))]


def _add_norm(e: Evaluated, layer: bool) -> list[np.ndarray]:
    a = e.arguments
    together = np.asarray(a["residual"], np.float64) + a["x"]
    y = _normed(e, e.between("sum", together), layer, a["weight"], a.get("bias"))
    return [y, together]


def _rotated(e: Evaluated, *heads: np.ndarray) -> list[np.ndarray]:
    a = e.arguments
    tables = [np.asarray(a[name], np.float64)[..., None, :, :] for name in ("cos", "sin")]
    return [e.form("rope", "rope", (x, *tables), {"interleaved": a["interleaved"]}) for x in heads]


def _norm_rope(e: Evaluated) -> list[np.ndarray]:
    a = e.arguments
    layer = a["norm"] == "layer"
    normed = [_normed(e, a[x], layer, a[w][:, None], None) for x, w in (("q", "q_weight"), ("k", "k_weight"))]
    return _rotated(e, *(e.between("normed", x) for x in normed))


def _projected(e: Evaluated) -> list[np.ndarray]:
    a = e.arguments
    x = e.between("normed", _normed(e, a["x"], False, a["norm_weight"], None))
    bias = None if a["b_qkv"] is None else np.asarray(a["b_qkv"], np.float64)
    w = np.asarray(a["w_qkv"], np.float64)
    y = e.form("linear", "linear", (x,), {"weight": w, "bias": bias})
    H, K = a["num_heads"], a["num_kv_heads"]
    heads = y.reshape(*y.shape[:-1], H + 2 * K, -1).swapaxes(1, 2)
    q, k, v = heads[:, :H], heads[:, H : H + K], heads[:, H + K :]
    return [*_rotated(e, e.between("projected", q), e.between("projected", k)), v]


def _attended(e: Evaluated) -> list[np.ndarray]:
    """Row by row of the batch; queries that see no key are 0."""
    a = e.arguments
    q, k, v = (np.asarray(a[name], np.float64) for name in _attention_names(a))
    S, T = q.shape[2], k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    scale = np.float64(q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"])
    for b in range(len(q)):
        keys = T if "lengths" not in a else int(a["lengths"][b])
        visible = np.ones((S, keys), bool)
        if a.get("causal", True):
            visible = np.arange(keys) <= np.arange(S)[:, None] + keys - S
        if a.get("key_mask") is not None:
            visible = visible & a["key_mask"][b][None]
        seen = visible.any(axis=0)  # what none of them sees may be NaN
        rows = visible.any(axis=1)
        if rows.any():
            how = {"scale": scale, "visible": visible[rows][:, seen]}
            arrays = (q[b].transpose(1, 0, 2)[rows], k[b, :, :keys][:, seen], v[b, :, :keys][:, seen])
            out[b][:, rows] = e.form("attention", "attention", arrays, how).transpose(1, 0, 2)
    return [out]


def _attention_names(a: dict[str, Any]) -> tuple[str, ...]:
    return ("q", "k_cache", "v_cache") if "lengths" in a else ("q", "k", "v")


def _glu(e: Evaluated) -> list[np.ndarray]:
    return [e.form("glu", "glu", (e.arguments["gate"], e.arguments["up"]), {"name": "silu"})]


def _relu2(e: Evaluated) -> list[np.ndarray]:
    """The ReLU has its bits; nothing is left to be rounded but the square."""
    return [e.form("activation", "activation", (e.arguments["x"],), {"name": "relu2"})]


_WAYS: dict[str, tuple[Made, dict[str, Sequence[Step]]]] = {
    "rms_norm": (lambda e: _norm(e, False), {"norm": HABITS["rms_norm"]}),
    "layer_norm": (lambda e: _norm(e, True), {"norm": HABITS["layer_norm"]}),
    "add_rms_norm": (lambda e: _add_norm(e, False), {"norm": HABITS["rms_norm"], "sum": _STORED}),
    "add_layer_norm": (lambda e: _add_norm(e, True), {"norm": HABITS["layer_norm"], "sum": _STORED}),
    "rope": (lambda e: _rotated(e, e.arguments["q"], e.arguments["k"]), {"rope": HABITS["rope"]}),
    "norm_rope": (_norm_rope, {"norm": HABITS["rms_norm"], "normed": _STORED, "rope": HABITS["rope"]}),
    "rms_norm_qkv_rope": (
        _projected,
        {
            "norm": HABITS["rms_norm"],
            "normed": _STORED,
            "linear": HABITS["linear"],
            "projected": _STORED,
            "rope": HABITS["rope"],
        },
    ),
    "attention": (_attended, {"attention": HABITS["attention"]}),
    "decode_attention": (_attended, {"attention": HABITS["attention"]}),
    "swiglu": (_glu, {"glu": HABITS["glu"]}),
    "relu2": (_relu2, {"activation": HABITS["activation"]}),
}
"""Operator -> its steps, and what each may store. The losses are float32 inside, and have no profile."""


@lru_cache
def profiles(operator: str) -> tuple[dict[str, Step], ...]:
    """The admissible profiles of an operator, those that round least first: step -> its points."""
    found: list[dict[str, Step]] = [{}]
    for step, choices in _WAYS[operator][1].items() if operator in _WAYS else ():
        found = [{**one, step: points} for one in found for points in choices]
    return tuple(sorted(found, key=lambda one: sum(map(len, one.values()))))


def said(operator: str, points: dict[str, Step]) -> str:
    """A profile in words: "norm twice: before the weight, and the result"."""
    known = _WAYS[operator][1]
    parts = []
    for step, choices in known.items():
        if choices is _STORED:
            parts += [f"{step} is rounded"] if points[step] else []
        elif points[step]:
            name = {"norm": "rms_norm"}.get(step, step)
            parts.append((f"{step}: " if len(known) > 1 else "") + in_words(name, Profile(points[step])))
    return "; ".join(parts) or "once, at the end"


class Roundings:
    """The profiles of one candidate. calls: in words -> how many calls hold so; once: those that hold as the policy
    says. worst: the largest error of those that do not, in ulp of the result."""

    def __init__(self, policy: str) -> None:
        self.policy, self.calls, self.once, self.worst = policy, Counter[str](), 0, 0.0
        self._last: dict[str, Step] | None = None

    def judged(
        self,
        call: Call,
        arguments: Sequence[Any],
        keywords: dict[str, Any],
        results: tuple[Result, ...],
        expected: tuple[Expected, ...],
        judged: list[Judgement],
        whole: bool = True,
    ) -> list[Judgement]:
        """The judgements under the policy, or under the first profile in which every output holds. whole: whether the
        arguments are those of the call, and not a row of them."""
        if all(j.holds for j in judged):
            self.once += 1
            return judged
        if any(f.property != "value" for j in judged for f in j.faults) or call.operator not in _WAYS:
            return judged
        given = contract_of(call.operator).bound(arguments, keywords)
        if len(profiles(call.operator)) >= _MANY and not _may_hold(call, arguments, keywords, results, expected, whole):
            return judged
        kept = whole and sum(e.exact.size for e in expected) <= _NUMBERS_WORTH_KEEPING
        for points in self._in_turn(call.operator):
            found = _under(points, call, given, results, expected, kept)
            if found is not None:
                self._last = points
                self.calls[said(call.operator, points)] += 1
                if "extreme_values" not in families_of(call):  # where an ulp is lost to the size of what cancels
                    narrow = [(r, e) for r, e in zip(results, expected, strict=True) if e.dtype == call.dtype]
                    self.worst = max(self.worst, *(_ulp(r, e) for r, e in narrow))
                return found
        return judged

    def _in_turn(self, operator: str) -> Iterator[dict[str, Step]]:
        """What held before first."""
        if self._last is not None:
            yield self._last
        yield from (p for p in profiles(operator) if p != self._last)

    @property
    def words(self) -> str:
        """Where the candidate rounds, and what that costs."""
        if not self.calls:
            return "once, at the end" if self.once else ""
        most, _ = self.calls.most_common(1)[0]
        return f"{most}; up to {self.worst:.2g} ulp off where one rounding gives 0.5"


def _ulp(result: Result, e: Expected) -> float:
    """How far the worst element is off, in ulp of the exact one, or of its row where that is smaller by far."""
    error, finite = errors(np.asarray(result.value, np.float64), e.exact)
    spacing = np.asarray(ulp(np.where(finite, e.exact, 1.0), e.dtype, np.float64))
    if spacing.ndim and spacing.size:
        spacing = np.maximum(spacing, np.sqrt(np.mean(np.square(spacing), axis=-1, keepdims=True)))
    return float((error / np.maximum(spacing, np.finfo(np.float32).smallest_subnormal)).max(initial=0.0))


def _under(
    points: dict[str, Step],
    call: Call,
    given: dict[str, Any],
    results: tuple[Result, ...],
    expected: tuple[Expected, ...],
    kept: bool,
) -> list[Judgement] | None:
    """The judgements under one profile if every output holds. kept: whether its values are those of the call, and few
    enough to be kept for the next candidate that is given it."""
    way = _WAYS[call.operator][0]

    @cache
    def evaluated(tilt: float) -> list[np.ndarray]:
        return _kept(call, tuple(points.items()), tilt) if kept else way(Evaluated(given, call.dtype, points, tilt))

    values = evaluated(0.0)
    found = []
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        if i >= len(values):  # the log-sum-exp, which is float32 whatever else is
            exact = not points.get("attention")
            one = judge(result.value, e) if exact else _of_rounded_scores(result, e, call.dtype, given["k"].shape[2])
        else:
            stores = sum(map(len, points.values()))
            others = partial(_others, evaluated, i)
            one = _judged(result, e, values[i], contract_of(call.operator).product, stores, others)
        if not one.holds:
            return None
        found.append(one)
    return found


def _may_hold(
    call: Call,
    arguments: Sequence[Any],
    keywords: dict[str, Any],
    results: tuple[Result, ...],
    expected: tuple[Expected, ...],
    whole: bool,
) -> bool:
    """Whether an error is small enough for any profile: beside that of eager code, which rounds nearly everywhere.

    Where one of a few profiles is farther off than that, the predicted error says nothing (a softmax of large scores
    falls to another key when they are rounded), and every profile is asked.
    """
    eager = HF_EAGER.name
    most = remembered(call, eager) if whole else expect_values(call.operator, arguments, keywords, call.dtype, eager)
    wide = [
        replace(e, variance=np.square(limits.ANY_PROFILE) * np.maximum(e.variance, m.variance), once=False)
        for e, m in zip(expected, most, strict=True)
    ]

    def near(values: Sequence[Any]) -> bool:
        return all(judge(value, e, ("rms", "element")).holds for value, e in zip(values, wide, strict=False))

    if near([result.value for result in results]):
        return True
    given = contract_of(call.operator).bound(arguments, keywords)
    way, every = _WAYS[call.operator][0], profiles(call.operator)
    asked = every[:: -(len(every) // _ASKED_FIRST)]
    return not all(near(way(Evaluated(given, call.dtype, points))) for points in asked)


@lru_cache(maxsize=1024)
def _kept(call: Call, points: tuple[tuple[str, Step], ...], tilt: float) -> list[np.ndarray]:
    arguments, keywords = call.arrays()
    given = contract_of(call.operator).bound(arguments, keywords)
    return _WAYS[call.operator][0](Evaluated(given, call.dtype, dict(points), tilt))


def _others(evaluated: Callable[[float], list[np.ndarray]], output: int) -> list[np.ndarray]:
    """Arithmetic moves what is rounded inside, and the result, or the inner values alone: the product of two numbers of
    the format is exact."""
    return [evaluated(tilt)[output] * (1 + last) for tilt in (-limits.TILT, limits.TILT) for last in (0.0, tilt)]


def _with_its_bits(result: Result, e: Expected, product: bool, points: int, others: Others) -> np.ndarray | None:
    """The values of a profile before they are rounded, those of `others` where these have the bits of the result; None
    if the elements that have not are more than float32 arithmetic makes them.

    It may move a value across a boundary at each of the points. others: what the profile gives where it does.
    """
    y, value = np.asarray(result.value, np.float64), e.exact
    if not y.size:
        return value
    wrong = (y != e.contract) & ~(np.isnan(y) & np.isnan(e.contract))
    spacing = np.asarray(ulp(np.where(np.isfinite(e.exact), e.exact, 1.0), e.dtype, np.float64))
    near = np.minimum(1.0, 2 * e.inner / np.maximum(spacing, np.finfo(np.float32).smallest_subnormal))
    more = limits.CONTEXT_FAR_WORSE if product else points * limits.MISROUNDED
    most = limits.misrounded_limit(y.size, more + float(near.mean()))
    if wrong.mean() > most:
        for other in others():
            right = wrong & (y == on_grid(other, e.dtype))
            value, wrong = np.where(right, other, value), wrong & ~right
    return value if wrong.mean() <= most else None


def _judged(result: Result, e: Expected, value: np.ndarray, product: bool, points: int, others: Others) -> Judgement:
    """A result beside the value that a profile gives it before it is rounded: right code is one rounding away from it,
    and what float32 arithmetic inside may do.

    Where there is a product that arithmetic may round an inner value the other way, which is no small thing for the
    elements that hang on it: they are judged by their distance from the exact ones.
    """
    rounded = _around(value, e)
    explained = _with_its_bits(result, rounded, product, points, others)
    if explained is None:
        other = Fault("value", "one rounding", "these roundings give other bits")
        return replace(judge(result.value, rounded, ("not finite",)), faults=(other,))
    if explained is not value:
        value, rounded = explained, _around(explained, e)
    if not product:
        return judge(result.value, rounded)
    one = judge(result.value, rounded, ("not finite", "rms"))
    if not one.holds:
        return one
    with np.errstate(invalid="ignore"):
        inside = np.square(value - e.exact)
    inside = np.where(np.isfinite(inside), inside, 0.0)
    if inside.size:  # an element of its own may be rounded by little, by luck
        inside = np.maximum(inside, inside.mean(axis=-1, keepdims=True))
    return judge(result.value, replace(e, variance=e.variance + inside, once=False), ("not finite", "row", "element"))


def _around(value: np.ndarray, e: Expected) -> Expected:
    """What is expected of one rounding of these values."""
    variance = np.square(rounding_error(np.where(np.isfinite(value), value, 0.0), e.dtype))
    return replace(e, exact=value, contract=on_grid(value, e.dtype), variance=variance, once=False)


def _of_rounded_scores(result: Result, e: Expected, dtype: str, keys: int) -> Judgement:
    """A log-sum-exp of scores that are rounded, the largest of which is as large as it, less the log of the keys."""
    largest = np.abs(np.where(np.isfinite(e.exact), e.exact, 0.0)) + np.log(max(1, keys))
    wide = np.square(ulp(largest, dtype, np.float64)) / 12
    return judge(result.value, replace(e, variance=e.variance + wide), ("not finite", "element"))
