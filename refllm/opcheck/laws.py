"""What a wrong gradient breaks beside its values, in plain words: laws that need no reference.

    named = laws.named(examine, offers, finding)
    named.property      # "layout" for what is right where the same numbers lie densely; "value" if no law says more
    named.broken        # ("linear in the incoming gradient: twice ...", "identity <dx, x> = 0 of each row ...")

A gradient is linear in the incoming gradient; that of a weight is the sum over the rows; what nothing is read of gets
exactly 0; and each operator has identities of its own. They are a third opinion beside the definition and its predicted
error: asked only where those say that something is wrong, with limits that no right code comes near.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy import limits
from refllm.accuracy.expected import Expected, remembered
from refllm.errors import RefllmError
from refllm.opcheck import gradients, inputs
from refllm.opcheck.examine import Examiner, Finding
from refllm.opcheck.offers import Offers
from refllm.opcheck.shrink import resized
from refllm.ops.backward_contracts import BACKWARD, forward_name, is_backward
from refllm.ops.contracts import ROWS, contract_of
from refllm.strategies.arrays import Array, Kept
from refllm.strategies.call import Call
from refllm.strategies.levels import families_of

_OF_VALUES = ("value", "NaN pattern")
_FEW = 16
"""Rows of the call beside which one of many rows is put."""


@dataclass(frozen=True)
class Named:
    """property: of the finding, a more telling one where there is one; text: with why. broken: the laws that do not
    hold, a clause each."""

    property: str
    text: str
    broken: tuple[str, ...] = ()


def named(examine: Examiner, offers: Offers, finding: Finding) -> Named:
    """What a wrong gradient breaks; the finding as it is where its values are not what is wrong."""
    same = Named(finding.property, finding.text)
    if not is_backward(finding.call.operator) or finding.property not in _OF_VALUES or not finding.results:
        return same
    try:
        found = _Asked(examine, offers, finding)
        return replace(found.property_of(same), broken=tuple(found.broken()))
    except RefllmError:  # the time is up, or a call that is not asked
        return same


class _Asked:
    """Asks the candidate of a finding again."""

    def __init__(self, examine: Examiner, offers: Offers, finding: Finding) -> None:
        self.examine, self.offers, self.finding, self.call = examine, offers, finding, finding.call
        self.expected = remembered(self.call, examine.task.policy, examine.convention)
        names = [e.name for e in self.expected]
        self.values = self._values(self.call)
        self.first = names.index(finding.output) if finding.output in names else 0

    def _values(self, call: Call, rows: tuple[int, int] | None = None) -> list[np.ndarray] | None:
        task = replace(self.examine.task, call=call, deep=False, rows=rows)
        seen = self.examine.runner.observe(task, self.examine.limit, self.examine.until)
        seen = gradients.without_none(call, seen, self.expected)
        if seen.property or len(seen.results) != len(self.expected):
            return None
        return [np.asarray(r.value, np.float64) for r in seen.results]

    def _holds(self, call: Call) -> bool:
        return self.offers.asks(call) and self.examine(call, deep=False) is None

    # ------------------------------------------------------------------------------------------------- which property

    def property_of(self, same: Named) -> Named:
        """The property by its own name, where a call that differs in one thing says which."""
        e, where = self.expected[self.first], self._where_it_has_to_be_0()
        if where is not None and self.values is not None:
            at = tuple(int(i) for i in np.argwhere(where)[0])
            said = (
                f"{e.name}: what nothing is read of has the gradient 0 exactly; it is {self.values[self.first][at]:.4g}"
            )
            return Named("masking", f"{said} at {at}")
        dense = _dense(self.call)
        if dense != self.call and self._holds(dense):
            which = [f"{name} ({x.layout})" for name, x in _arrays(self.call) if x.layout not in ("dense", "far")]
            return Named("layout", f"{same.text}; right where {' and '.join(which)} is stored densely")
        few = self._of_few_rows()
        if few is not None and self._holds(few):
            return Named("growth", f"{same.text}; right for {_FEW} rows: its error grows faster than that of the sum")
        return same

    def _where_it_has_to_be_0(self) -> np.ndarray | None:
        """Elements of rows of nothing but 0 that are something else."""
        e = self.expected[self.first]
        if self.values is None or self.values[self.first].shape != e.exact.shape or e.exact.ndim < 2:
            return None
        nothing = (e.exact == 0).all(axis=-1, keepdims=True) & (e.inner == 0) & (e.variance == 0)
        y = self.values[self.first]
        wrong = nothing & (y != 0)
        off = np.abs(np.where(np.isfinite(y), y - e.exact, np.inf)) > limits.ELEMENT_LIMIT * np.sqrt(
            e.variance + np.square(e.inner)
        )
        return wrong if wrong.any() and not (off & ~wrong).any() else None

    def _of_few_rows(self) -> Call | None:
        if "many_rows" not in families_of(self.call):
            return None
        axes = contract_of(self.call.operator).arguments
        name = next(n for n in ("x", "ids") if n in axes)
        x = dict(zip(self.call.names, self.call.arguments, strict=True))[name]
        if ROWS in axes[name]:
            return resized(self.call, {"rows": _FEW}) if len(x.shape) == len(axes[name]) else None  # type: ignore[union-attr]
        return resized(self.call, {"N" if "N" in axes[name] else "S": _FEW})

    # ------------------------------------------------------------------------------------------------------- which laws

    def broken(self) -> Iterator[str]:
        """Every law that does not hold, a clause each."""
        if self.values is None or any(not np.isfinite(v).all() for v in self.values):
            return
        yield from self._linear()
        yield from self._additive()
        yield from self._identities()

    def _linear(self) -> Iterator[str]:
        """Twice the incoming gradient, and none at all: a power of 2 moves no digit."""
        assert self.values is not None
        known = BACKWARD[self.call.operator]
        for factor, said in (
            (2.0, "twice the incoming gradient does not give twice"),
            (0.0, "a gradient of 0 gives no 0 as"),
        ):
            other = self._values(_scaled(self.call, known.incoming, factor))
            for e, a, b in zip(self.expected, self.values, other or (), strict=False):
                size = np.abs(a).max(initial=0.0)
                if a.shape == b.shape and np.abs(b - factor * a).max(initial=0.0) > _ROUNDINGS * _eps(e.dtype) * size:
                    yield f"linear in the incoming gradient: {said} {e.name}"
                    break

    def _additive(self) -> Iterator[str]:
        """The rows in two parts: gradients of what all share add up, the others are those of their rows."""
        assert self.values is not None
        rows = inputs.rows_of(self.call)
        if rows < 2 or (inputs.is_reduced(self.call) and dict(self.call.keywords).get("reduction") != "sum"):
            return
        if forward_name(self.call.operator) in ("mean_squared_error", "binary_cross_entropy"):
            return
        parts = [self._values(self.call, part) for part in ((0, rows // 2), (rows // 2, rows))]
        if parts[0] is None or parts[1] is None:
            return
        for e, whole, a, b in zip(self.expected, self.values, parts[0], parts[1], strict=True):
            shared = a.shape == whole.shape
            if not shared and a.shape[:1] + b.shape[:1] != (rows // 2, rows - rows // 2):
                continue
            together = a + b if shared else np.concatenate([a, b])
            if self._far(e, whole - together, 2.0):
                how = "does not add up over the rows" if shared else "of a row depends on the other rows"
                yield f"additive over rows: {e.name} of the batch in two halves {how}"

    def _far(self, e: Expected, error: np.ndarray, times: float) -> bool:
        """Whether it is more than the predicted error of so many right results."""
        allowed = limits.ELEMENT_LIMIT * np.sqrt(times * (e.variance + np.square(e.inner)))
        floor = _eps(e.dtype) * np.abs(e.exact).max(initial=0.0)
        return error.shape == e.exact.shape and bool((np.abs(error) > times * (allowed + floor)).any())

    def _identities(self) -> Iterator[str]:
        assert self.values is not None
        known = contract_of(self.call.operator)
        arguments, keywords = self.call.arrays()
        given = known.bound(arguments, keywords)
        given = {
            n: x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
            for n, x in given.items()
        }
        found = {e.name: v for e, v in zip(self.expected, self.values, strict=True)}
        spread = {
            e.name: limits.ELEMENT_LIMIT * np.sqrt(e.variance + np.square(e.inner)) + _eps(e.dtype) * np.abs(e.exact)
            for e in self.expected
        }
        with np.errstate(all="ignore"):
            for says, identity in IDENTITIES.get(forward_name(self.call.operator), ()):
                checked = identity(found, spread, given)
                if checked is None:
                    continue
                off, allowed = (np.asarray(x, np.float64) for x in checked)
                wrong = np.abs(off) > allowed
                if wrong.any():
                    worst = float(np.abs(np.where(wrong, off, 0)).max())
                    most = float(allowed[wrong].max())
                    yield f"identity {says}: off by {worst:.3g}, of which rounding makes {most:.2g} at most"


_ROUNDINGS = 4.0
"""Steps of the format, at the size of the largest element, by which a doubled gradient may be off twice the first."""


def _eps(dtype: str) -> float:
    return {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(dtype, 2.0**-19)


def _arrays(call: Call) -> list[tuple[str, Array]]:
    return [(n, x) for n, x in (*zip(call.names, call.arguments, strict=True), *call.keywords) if isinstance(x, Array)]


def _mapped(call: Call, change: Callable[[str, Array], Array]) -> Call:
    def one(name: str, x: Any) -> Any:
        return change(name, x) if isinstance(x, Array) else x

    arguments = tuple(one(n, x) for n, x in zip(call.names, call.arguments, strict=True))
    return replace(call, arguments=arguments, keywords=tuple((n, one(n, x)) for n, x in call.keywords))


def _dense(call: Call) -> Call:
    """The same recipes, each in memory of its own."""
    return _mapped(call, lambda _, x: x if x.layout == "far" else replace(x, layout="dense"))


def _scaled(call: Call, incoming: tuple[str, ...], factor: float) -> Call:
    def times(name: str, x: Array) -> Array:
        if name not in incoming or isinstance(x, Kept):
            return x
        planted = tuple((index, factor * value) for index, value in x.planted)
        if x.values == "integers":
            return x
        return replace(x, scale=factor * x.scale, mean=factor * x.mean, planted=planted)

    return _mapped(call, times)


# --------------------------------------------------------------------------------------------------------- identities

Values = dict[str, Any]
Identity = Callable[[Values, Values, Values], tuple[Any, Any] | None]
"""Gradients, how far each may be off, and the arguments, by name -> what has to be 0, and how far it may be off."""


def _inner(a: np.ndarray, b: np.ndarray, axis: Any = -1) -> np.ndarray:
    return np.asarray((a * b).sum(axis=axis))


def _orthogonal(d: Values, s: Values, a: Values) -> tuple[Any, Any]:
    """A longer x gives the same y, but for eps."""
    x = a["x"] - (a["x"].mean(axis=-1, keepdims=True) if "bias" in a else 0)
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + a["eps"])
    of_eps = a["eps"] * r[..., 0] ** 3 * np.abs(_inner(a["dy"] * a["weight"], x))
    return _inner(d["dx"], x), _inner(s["dx"], np.abs(x)) + 1.01 * of_eps


def _of_the_weight(d: Values, s: Values, a: Values) -> tuple[Any, Any]:
    x, w = a["x"] - (a["x"].mean(axis=-1, keepdims=True) if "bias" in a else 0), a["weight"]
    y = w * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + a["eps"])
    return (d["dweight"] * w).sum() - (a["dy"] * y).sum(), (s["dweight"] * np.abs(w)).sum()


def _sum_of(name: str, axis: Any) -> Identity:
    return lambda d, s, _: (d[name].sum(axis=axis), s[name].sum(axis=axis))


def _of_a_softmax(d: Values, s: Values, a: Values) -> tuple[Any, Any]:
    """A shift of all scores changes no weight. The weights are given, and may not sum to 1."""
    missing = np.abs(1 - a["p"].sum(axis=-1)) * np.abs(_inner(a["p"], a["dp"]))
    return d["ds"].sum(axis=-1), s["ds"].sum(axis=-1) + 1.01 * missing


def _of_the_bias(d: Values, s: Values, a: Values) -> tuple[Any, Any] | None:
    dy = a["dy"].reshape(-1, a["dy"].shape[-1])
    return (d["dbias"] - dy.sum(axis=0), s["dbias"]) if "dbias" in d else None


def _length(name: str) -> Identity:
    def identity(d: Values, s: Values, a: Values) -> tuple[Any, Any] | None:
        if np.abs(np.square(a["cos"]) + np.square(a["sin"]) - 1).max(initial=0.0) > 0.02:
            return None  # tables that do not turn
        before = np.square(a[name]).sum(axis=-1)
        return np.square(d[name]).sum(axis=-1) - before, 2 * _inner(np.abs(d[name]), s[name]) + 0.05 * before

    return identity


def _squared(d: Values, s: Values, a: Values) -> tuple[Any, Any]:
    y = np.square(np.maximum(a["x"], 0))
    return _inner(d["dx"], a["x"]) - 2 * _inner(a["dy"], y), _inner(s["dx"], np.abs(a["x"]))


def _product(name: str) -> Identity:
    def identity(d: Values, s: Values, a: Values) -> tuple[Any, Any]:
        through = (a["dy"] * (a["x"] @ a["weight"].T)).sum()
        return (d[f"d{name}"] * a[name]).sum() - through, (s[f"d{name}"] * np.abs(a[name])).sum()

    return identity


def _same_length(d: Values, s: Values, a: Values) -> tuple[Any, Any] | None:
    if a.get("dlse") is not None:
        return None
    (B, H), K = a["q"].shape[:2], a["k"].shape[1]
    seen = np.isfinite(a["k"])
    k = np.where(seen, a["k"], 0)
    of_q = _inner(d["dq"], a["q"], (2, 3)).reshape(B, K, H // K).sum(axis=-1)
    allowed = _inner(s["dq"], np.abs(a["q"]), (2, 3)).reshape(B, K, H // K).sum(axis=-1)
    return of_q - _inner(d["dk"], k, (2, 3)), allowed + _inner(s["dk"], np.abs(k), (2, 3))


def _keys_sum(d: Values, s: Values, a: Values) -> tuple[Any, Any] | None:
    """A shift of all keys shifts all scores of a row, which a softmax does not see; unless a mask cuts."""
    if a["causal"] or a.get("key_mask") is not None or a.get("dlse") is not None:
        return None
    return d["dk"].sum(axis=2), s["dk"].sum(axis=2)


def _values_sum(d: Values, s: Values, a: Values) -> tuple[Any, Any] | None:
    if a.get("key_mask") is not None or (a["causal"] and a["q"].shape[2] > a["k"].shape[2]) or not a["k"].shape[2]:
        return None
    (B, H, _, D), K = a["do"].shape, a["k"].shape[1]
    total = a["do"].sum(axis=2).reshape(B, K, H // K, D).sum(axis=2)
    return d["dv"].sum(axis=2) - total, s["dv"].sum(axis=2)


def _of_the_table(d: Values, s: Values, a: Values) -> tuple[Any, Any]:
    dy = a["dy"].reshape(-1, a["dy"].shape[-1])
    return d["dweight"].sum(axis=0) - dy.sum(axis=0), s["dweight"].sum(axis=0)


IDENTITIES: dict[str, tuple[tuple[str, Identity], ...]] = {
    "rms_norm": (("<dx, x> = 0 of each row", _orthogonal), ("<dweight, weight> = <dy, y>", _of_the_weight)),
    "layer_norm": (
        ("<dx, x> = 0 of each row", _orthogonal),
        ("the sum of each row of dx is 0", _sum_of("dx", -1)),
        ("dbias is the sum of dy over the rows", _of_the_bias),
    ),
    "rope": (
        ("|dq| is that of the incoming gradient", _length("dq")),
        ("|dk| is that of the incoming one", _length("dk")),
    ),
    "softmax": (("the sum of each row of ds is 0", _of_a_softmax),),
    "cross_entropy": (("the sum of each row of dlogits is 0", _sum_of("dlogits", -1)),),
    "linear_cross_entropy": (("the sum of dweight over the classes is 0", _sum_of("dweight", 0)),),
    "relu2": (("<dx, x> = 2 <dy, y> of each row", _squared),),
    "linear": (("<dweight, weight> = <dy, x W^T>", _product("weight")), ("<dx, x> = <dy, x W^T>", _product("x"))),
    "attention": (
        ("the sum of dk over the keys is 0", _keys_sum),
        ("the sum of dv over the keys is that of do over the queries", _values_sum),
        ("<dq, q> = <dk, k> of each key/value head", _same_length),
    ),
    "embedding": (("the sum of dweight is that of dy", _of_the_table),),
}
"""Forward operator -> (identity in words, what is 0 and how far it may be off)."""


def exact_identities(operator: str, given: Values) -> dict[str, tuple[float, float]]:
    """How far the definition itself is off each identity that applies to a call, in float64; and how far it may be, for
    what an eps does."""
    known = BACKWARD[f"{operator}_backward"]
    parameters = known.parameters
    values = [given[n] for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    named = {p.name: given[n] for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n in given}
    out = getattr(ops, known.operator)(*values, **named)
    both = zip(known.outputs, out if isinstance(out, tuple) else (out,), strict=True)
    found = {name: x for name, x in both if x is not None}
    none = {name: np.zeros(np.shape(x)) for name, x in found.items()}
    checked = {says: identity(found, none, given) for says, identity in IDENTITIES.get(operator, ())}
    largest = lambda x: float(np.abs(np.asarray(x)).max(initial=0.0))  # noqa: E731
    return {says: (largest(found[0]), largest(found[1])) for says, found in checked.items() if found is not None}
