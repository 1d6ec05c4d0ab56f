"""When a value is wrong: the rules, for everybody who judges. The numbers are in `limits.py`.

`judge` has those for one result of one operator: is this array what the contract says, up to rounding? Arrays in, a
list of faults out. `refllm check-op` asks all of them, for single calls of any size; `refllm.kernels.verify` the first
two, which need no prediction. From coarse to fine:

    not finite    NaN and infinities stand where the contract in the same precision has them, in both directions
    rms           the RMS error against that of the contract in the same precision
    row           the worst row against its predicted sigma
    element       the worst element against its predicted sigma
    one rounding  where the result alone is rounded: nothing is further off than half an ulp, and nearly all elements
                  have the contract's very bits

`broken_rules` has those for a value that was measured against a predicted error (`refllm.accuracy.measure`): of a model
(`refllm check`), end to end and operator by operator, and of a golden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refllm.accuracy import cancellation, limits
from refllm.accuracy.expected import Expected
from refllm.accuracy.measure import Measure, measure
from refllm.accuracy.propagation import ulp
from refllm.ops.contracts import contract_of
from refllm.precision import largest

RULES = ("not finite", "rms", "row", "element", "one rounding")
"""The rules of `judge`, in the order in which their faults are told."""


@dataclass(frozen=True)
class Fault:
    """One broken rule. property: "value" or "NaN pattern". rule: of the module docstring. text: one clause."""

    property: str
    rule: str
    text: str


@dataclass(frozen=True)
class Judgement:
    """One output. ratio: RMS error over that of the contract in the same precision. limit: what it may be. size: the
    RMS error itself.

    score: the worst of all rules as measured / allowed; over 1 is a fault. worst: the index of the worst element,
    by its sigma if the rule "element" is asked, else by its error;
    value, exact, contract: its numbers; sigma and ulp: its distance. wrong: which elements are over a limit of their
    own; all of them where none is, and only the whole.
    """

    name: str
    ratio: float
    limit: float
    score: float
    worst: tuple[int, ...]
    value: float
    exact: float
    contract: float
    sigma: float
    ulp: float
    faults: tuple[Fault, ...]
    wrong: np.ndarray
    size: float = 0.0

    @property
    def holds(self) -> bool:
        return not self.faults


def judge(value: np.ndarray, expected: Expected, rules: Sequence[str] = RULES, limit: float | None = None) -> Judgement:
    """value: an array of the expected shape. rules: those to ask. limit: of the rule "rms", another one than
    `limits.rms_limit` says."""
    limit = limit or limits.rms_limit(expected.operator)
    with np.errstate(invalid="ignore"):  # memory that nobody wrote may hold NaN that signal
        y, exact, contract = (np.asarray(x, np.float64) for x in (value, expected.exact, expected.contract))
    strange = strangers(y, contract, exact, expected.dtype)
    if "not finite" in rules and strange.any():
        return _strange(expected, y, strange, limit)
    beyond = np.isinf(contract) & np.isfinite(y)  # at the border, or it would be strange
    if beyond.any():
        contract = np.where(beyond, np.copysign(largest(expected.dtype), contract), contract)
        expected = replace(expected, contract=contract)
    error, finite = errors(y, exact)
    if not finite.any():
        return _nothing(expected, exact, limit)
    z = error
    if "element" in rules:
        z = _over(error, _sigma(expected, finite))
        # What the definition gives in the same precision is honest, also where no derivative tells its error.
        z = np.where(y == contract, np.minimum(z, limits.ELEMENT_LIMIT), z)
    worst = _index(z)
    ratio, unit = rms_ratio(error, expected, finite)
    if not expected.once:
        limit *= 1 + float(limits.chance(_independent(expected, finite), measured=2))
    checks = []
    if "element" in rules and expected.gate is not None:
        checks += _cancelled(y, expected)
    if "rms" in rules:
        text = f"the RMS error is {ratio:.3g} times that of the contract in the same precision"
        checks.append(_check("rms", ratio, limit, text))
    if "row" in rules:
        checks.append(_row(y, expected, finite))
    if "element" in rules:
        checks.append(_check("element", z[worst], limits.ELEMENT_LIMIT, _element(y[worst], exact[worst], z[worst])))
    if "one rounding" in rules and expected.once and unit:
        checks += _one_rounding(y, error, expected, finite)
    faults = tuple(Fault("value", rule, text) for rule, score, text in checks if score > 1)
    wrong = np.zeros(y.shape, bool)
    if faults:
        wrong = _wrong(z, error, expected, finite) if "element" in rules else finite
    return Judgement(
        expected.name,
        ratio,
        limit,
        max((score for _, score, _ in checks), default=0.0),
        worst,
        float(y[worst]),
        float(exact[worst]),
        float(contract[worst]),
        float(z[worst]),
        float(error[worst] / max(float(ulp(exact[worst], expected.dtype)), np.finfo(np.float32).smallest_subnormal)),
        faults,
        wrong,
        rms(error[finite]),
    )


def strangers(y: np.ndarray, contract: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """Where y is NaN or infinite and the contract in the same precision is not, or the other way round.

    Where a format overflows is part of the format; at its border one rounding decides, and both results are right.
    """
    if np.isfinite(y).all() and np.isfinite(contract).all():
        return np.zeros(np.broadcast_shapes(y.shape, contract.shape, exact.shape), bool)
    kinds = kind(y), kind(contract)
    top = largest(dtype)
    at_border = np.abs(np.abs(exact) - top) <= limits.BORDER * float(ulp(np.array(top, np.float32), dtype))
    forgiven = at_border & (kinds[0] < 3) & (kinds[1] < 3) & (np.sign(y) == np.sign(contract))
    return (kinds[0] != kinds[1]) & ~forgiven


def kind(x: np.ndarray) -> np.ndarray:
    """0 finite, 1 +inf, 2 -inf, 3 NaN."""
    return np.select([np.isnan(x), x == np.inf, x == -np.inf], [3, 1, 2], 0)


def errors(y: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|y - exact| where both are finite, 0 elsewhere; and where that is."""
    finite = np.isfinite(y) & np.isfinite(exact)
    if finite.all():
        return np.abs(y - exact), finite
    return np.where(finite, np.abs(np.where(finite, y, 0) - np.where(finite, exact, 0)), 0.0), finite


def rms_ratio(error: np.ndarray, expected: Expected, finite: np.ndarray) -> tuple[float, float]:
    """RMS error over its unit, and the unit: the RMS error of the contract in the same precision, or that of rounding
    its results if that is more. Or the predicted one: where there are few independent errors, and in float32, where the
    contract's own depends on the order in which it happens to add."""
    contract, _ = errors(expected.contract, expected.exact)
    unit = max(rms(_where(finite, contract)), rms(rounding_error(_where(finite, expected.exact), expected.dtype)))
    own = np.square(_where(finite, expected.inner) / limits.INNER)
    unit = max(unit, float(np.sqrt(np.mean(own))))
    lucky = expected.dtype == "float32" or _independent(expected, finite) <= limits.FEW
    if not expected.once and lucky:
        unit = max(unit, float(np.sqrt(np.mean(_where(finite, expected.variance) + own))))
    size = rms(_where(finite, error))
    return (size / unit if unit else (0.0 if size == 0 else np.inf)), unit


def _where(finite: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x[finite], which takes its time."""
    return x.reshape(-1) if finite.all() else x[finite]


def rms(x: np.ndarray) -> float:
    """Root mean square, without overflow or underflow on the way."""
    scale = float(np.abs(x).max(initial=0.0))
    return scale * float(np.sqrt(np.mean((x / scale) ** 2))) if scale else 0.0


def rounding_error(exact: np.ndarray, dtype: str) -> np.ndarray:
    """Standard deviation of one rounding to `dtype`: a twelfth of the spacing squared, as variance."""
    return ulp(np.where(exact == 0, np.finfo(np.float32).tiny, exact), dtype) / np.sqrt(12)


# ----------------------------------------------------------------------------------------------------------- the rules


def _score(measured: float, limit: float) -> float:
    score = float(measured / limit)
    return np.inf if np.isnan(score) else score


def _check(rule: str, measured: float, limit: float, text: str) -> tuple[str, float, str]:
    return rule, _score(measured, limit), f"{text} (limit {limit:.3g})"


def _element(value: float, exact: float, z: float) -> str:
    if np.isinf(z):  # nothing is rounded there
        return f"an element is {value:.6g}, and has to be {exact:.6g} exactly"
    return f"an element is {z:.3g} sigma off"


def _cancelled(y: np.ndarray, expected: Expected) -> list[tuple[str, float, str]]:
    """Elements of which a cancellation has left nothing: where that is so, it comes first."""
    assert expected.gate is not None
    lost = cancellation.nothing_left(expected.gate, y, expected.exact, expected.dtype)
    if not lost.any():
        return []
    return [("element", np.inf, cancellation.in_words(expected.gate, y, expected.exact, lost))]


def _row(y: np.ndarray, expected: Expected, finite: np.ndarray) -> tuple[str, float, str]:
    shape = (-1, y.shape[-1]) if y.ndim > 1 else (1, max(1, y.size))
    variance = expected.variance + np.square(expected.inner)
    y0, exact, V = (np.where(finite, x, 0.0).reshape(shape) for x in (y, expected.exact, variance))
    found = measure(y0, exact, V)
    row = ", ".join(str(i) for i in np.unravel_index(found.row[0], y.shape[:-1])) if y.ndim > 1 else "0"
    text = f"the error of row {row} is {found.row_ratio:.3g} times the predicted one"
    return _check("row", found.row_ratio, limits.row_limit(found, expected.dtype), text)


def _one_rounding(y: np.ndarray, error: np.ndarray, expected: Expected, finite: np.ndarray) -> list:
    """See the module docstring."""
    spacing = ulp(np.where(finite, expected.exact, 0), expected.dtype).astype(np.float64)
    beyond = _over(np.maximum(error - spacing / 2, 0), np.maximum(expected.inner, np.finfo(np.float32).tiny))
    near = np.minimum(1.0, _over(2 * expected.inner, spacing))
    differs = float(np.mean((y != expected.contract)[finite]))
    share = limits.misrounded_limit(int(finite.sum()), float(np.mean(np.minimum(near, 1.0)[finite])))
    most = float(beyond.max())
    off = float(_over(error, spacing)[_index(beyond)])
    past = (
        f"rounded more than once: {off:.2g} ulp off where one rounding gives 0.5 (float32 inside, one cast at the end)"
    )
    twice = f"rounded more than once: {differs:.2%} of the elements are not the exact value, rounded"
    return [
        ("one rounding", _score(most, limits.ELEMENT_LIMIT), past),
        _check("one rounding", differs, share, twice),
    ]


def _sigma(expected: Expected, finite: np.ndarray) -> np.ndarray:
    """The sigma of every element, but not less than a part of its row's: a rounding inside is of the row's size, unless
    nothing in the row is shared."""
    V = np.where(finite, expected.variance, 0.0)
    alone = not V.ndim or contract_of(expected.operator).elementwise
    row = V if alone else V.mean(axis=-1, keepdims=True)
    return np.sqrt(np.maximum(V, limits.ROW_FLOOR * row) + np.square(expected.inner))


def _wrong(z: np.ndarray, error: np.ndarray, expected: Expected, finite: np.ndarray) -> np.ndarray:
    wrong = z > limits.ELEMENT_LIMIT
    if not wrong.any() and expected.once:
        half = ulp(np.where(finite, expected.exact, 0), expected.dtype).astype(np.float64) / 2
        wrong = error > half + limits.ELEMENT_LIMIT * expected.inner
    return wrong if wrong.any() else finite


def _strange(expected: Expected, y: np.ndarray, strange: np.ndarray, limit: float) -> Judgement:
    at = tuple(int(i) for i in np.argwhere(strange)[0])
    where = f" at {at}" if at else ""
    text = f"{y[at]:.6g}{where}, expected {expected.contract[at]:.6g}"
    count = int(strange.sum())
    text += f" ({count} such elements)" if count > 1 else ""
    values = float(y[at]), float(expected.exact[at]), float(expected.contract[at]), float("nan"), float("nan")
    fault = Fault("NaN pattern", "not finite", text)
    return Judgement(expected.name, float("inf"), limit, float("inf"), at, *values, (fault,), strange)


def _nothing(expected: Expected, exact: np.ndarray, limit: float) -> Judgement:
    """No element is finite, or there is none: nothing left to compare."""
    values = float("nan"), float("nan"), float("nan"), 0.0, 0.0
    return Judgement(expected.name, 0.0, limit, 0.0, (), *values, (), np.zeros(exact.shape, bool))


def _over(error: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """error / sigma; 0 / 0 is 0, anything else / 0 infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / sigma)


def _index(z: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(z.argmax()), z.shape)) if z.ndim else ()


def _independent(expected: Expected, finite: np.ndarray) -> int:
    """How many independent errors of one size there are: (sum V)^2 / sum V^2, V their variances.

    In float32 the elements of a row share the errors of its sums, if there are any; in the narrow formats every element
    has a rounding of its own, and an operator with products one of its terms besides, which `limits.SHARED` elements
    share.
    """
    if expected.independent is not None:
        return expected.independent
    V = np.where(finite, expected.variance + np.square(expected.inner), 0.0)
    by_row = expected.dtype == "float32" and contract_of(expected.operator).sums
    if by_row and V.ndim and expected.axes[-1] in limits.SUMMED:
        V = V.sum(axis=-1)
    scale = float(V.max(initial=0.0))
    if not scale:
        return int(V.size)
    V = V / scale
    count = float(V.sum() ** 2 / np.square(V).sum())
    shared = contract_of(expected.operator).product and not by_row
    return max(1, int(count / limits.SHARED if shared else count))


# ----------------------------------------------------------------------------------------- values of a predicted error

MEASURED: dict[str, Callable[[Measure, str], tuple[float, float]]] = {
    "NaN or infinity": lambda found, dtype: (found.nonfinite, 0),
    "error": lambda found, dtype: (found.ratio, limits.isolated_limit(found, dtype)),
    "one row": lambda found, dtype: (found.row_ratio, limits.row_limit(found, dtype)),
    "rounding points": lambda found, dtype: (found.misrounded, limits.misrounded_limit(found.elements)),
    "error end to end": lambda found, dtype: (found.ratio, limits.end_to_end_limit(found)),
    "one element": lambda found, dtype: (found.largest, limits.golden_element_limit(found)),
}
"""Rule -> (what was measured, up to which it holds), of a value in a dtype."""

_ALONE = ("NaN or infinity", "error", "one row", "rounding points")
_AFTER_ALL = ("NaN or infinity", "error end to end")


def broken_rules(found: Measure, dtype: str, rules: Sequence[str]) -> list[str]:
    """Those of the rules, names in `MEASURED`, that the measured value breaks."""
    figures = ((rule, *MEASURED[rule](found, dtype)) for rule in rules)
    return [rule for rule, measured, limit in figures if measured > limit]


def broken_isolated(found: Measure, dtype: str) -> list[str]:
    """Names of the rules that an operator's result breaks on its own inputs."""
    return broken_rules(found, dtype, _ALONE)


def broken(end_to_end: Measure, isolated: Measure | None, dtype: str) -> list[str]:
    """Names of the rules that a value of a model breaks, isolated ones first."""
    alone = [] if isolated is None else broken_isolated(isolated, dtype)
    return list(dict.fromkeys([*alone, *broken_rules(end_to_end, dtype, _AFTER_ALL)]))
