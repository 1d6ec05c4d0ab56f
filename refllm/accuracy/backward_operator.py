"""What one call of a backward operator should return: the exact gradients, and how far a right one may be from them.

    (dx, dweight) = expect_backward("rms_norm_backward", (dy, x, weight, 1e-6), {}, "bfloat16", FUSED)

As `refllm.accuracy.operator` and `refllm.accuracy.expected` for the forward operators: exact values from the definition
in float64, the variance of what a right implementation rounds, and how much float32 arithmetic inside may do. The rules
of each backward operator are those of `refllm.accuracy.backward`; those that are made of several are chained here. What
the forward pass kept is computed again: a candidate may do so too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy import limits
from refllm.accuracy.backward import Backward, Variances
from refllm.accuracy.propagation import BLOCKS, ONE_CHAIN, Uncertain, certain, ulp
from refllm.ops.backward_contracts import BACKWARD, BackwardContract, forward_name
from refllm.ops.contracts import ROWS
from refllm.ops.linear import as_rows
from refllm.precision import EXACT, NATIVE, Arithmetic, Policy, rounding

_FLOAT32_ROUNDING = 2.0**-24
_DRAWS = 6
"""Errors that are drawn to see how one of an inner value reaches the results, where no formula says it."""
LOG_PROBABILITIES = "cross_entropy.grad.log_probabilities"
"""A rounding point of a policy: torch's cross entropy keeps log p in the format of the logits, and makes p = e^(log p)
in it."""


class _Steps(Backward):
    """The rules of every backward operator, those that are made of several included."""

    given_exactly = True

    def of(self, operator: str, grads: Sequence[Uncertain], given: dict[str, Any]) -> Variances:
        """The variances of what <operator>_backward gives. given: its other arguments by name."""
        rule = getattr(self, f"_op_{operator}", None)
        if rule is not None:
            return list(rule(*grads, **given))
        return list(getattr(self, f"_{operator}")(*grads, **given))

    def _op_linear(self, d: Uncertain, x: Any, weight: Any, bias: Any) -> Variances:
        return self._linear(d, x, weight, bias, needed=(True, True, bias is not None))

    def _op_embedding(self, d: Uncertain, ids: Any, weight: Any) -> Variances:
        return self._embedding(d, ids=ids, counted=np.ones(np.shape(ids), bool), table=weight)

    def _op_add_rms_norm(
        self, d: Uncertain, dsum: Uncertain, x: Any, residual: Any, weight: Any, eps: Any
    ) -> Variances:
        return self._after_a_sum("rms_norm", d, dsum, x, residual, (weight, eps))

    def _op_add_layer_norm(
        self, d: Uncertain, dsum: Uncertain, x: Any, residual: Any, weight: Any, bias: Any, eps: Any
    ) -> Variances:
        return self._after_a_sum("layer_norm", d, dsum, x, residual, (weight, bias, eps))

    def _after_a_sum(
        self, norm: str, d: Uncertain, dsum: Uncertain, x: Any, residual: Any, rest: tuple[Any, ...]
    ) -> Variances:
        """The norm at a sum that may be rounded: how that reaches the gradients is drawn, as no formula is short."""
        r = np.asarray(residual, np.float64) + x
        first, *others = getattr(self, f"_{norm}")(d, r, *rest)
        spread = np.asarray(self._forward.add(certain(residual), certain(x)).variance)
        backward = getattr(ops, f"{norm}_backward")
        through, *of_others = _drawn(lambda moved: backward(d.value, moved, *rest), r, spread)
        dx = dsum.value + backward(d.value, r, *rest)[0]
        of_x = first + through + dsum.variance + self._noise(dx, "add")
        more = [None if V is None else V + own for V, own in zip(others, of_others, strict=True)]
        return [of_x, of_x, *more]

    def _op_norm_rope(
        self,
        dq: Uncertain,
        dk: Uncertain,
        q: Any,
        k: Any,
        q_weight: Any,
        k_weight: Any,
        cos: Any,
        sin: Any,
        eps: Any,
        norm: str,
        interleaved: bool,
    ) -> Variances:
        turned = self.rope(dq, dk, certain(cos), certain(-np.asarray(sin)), interleaved=interleaved)
        found = []
        for d, x, weight in zip(turned, (q, k), (q_weight, k_weight), strict=True):
            each = np.asarray(weight)[:, None, :]
            both = self._rms_norm(d, x, each, eps) if norm == "rms" else self._layer_norm(d, x, each, None, eps)
            assert both[1] is not None
            found.append((both[0], both[1][:, 0]))
        return [found[0][0], found[1][0], found[0][1], found[1][1]]

    def _op_rms_norm_qkv_rope(
        self,
        dq: Uncertain,
        dk: Uncertain,
        dv: Uncertain,
        x: Any,
        norm_weight: Any,
        w_qkv: Any,
        b_qkv: Any,
        cos: Any,
        sin: Any,
        eps: Any,
        interleaved: bool,
        **_: Any,
    ) -> Variances:
        turned = self.rope(dq, dk, certain(cos), certain(-np.asarray(sin)), interleaved=interleaved)
        parts = (*turned, dv)
        value, variance = (ops.merge_heads(np.concatenate([getattr(p, n) for p in parts], axis=1)) for n in _BOTH)
        d = Uncertain(value, variance)
        normed = self._forward.rms_norm(certain(x), norm_weight, eps)
        of_normed, of_w, of_b = self._linear(d, normed.value, w_qkv, None, needed=(True, True, b_qkv is not None))
        assert of_normed is not None
        assert of_w is not None
        square, spread = as_rows(np.square(d.value)), as_rows(np.asarray(normed.variance))
        dnormed = ops.linear_backward(d.value, normed.value, w_qkv)[0]
        of_x, of_weight = self._rms_norm(Uncertain(dnormed, of_normed), x, norm_weight, eps)
        return [of_x, of_weight, of_w + square.T @ spread, of_b]

    def _op_attention(self, do: Uncertain, q: Any, k: Any, v: Any, dlse: Any = None, **how: Any) -> Variances:
        return self._attention(do, q, k, v, **how, dlse=dlse)

    def _op_decode_attention(
        self, do: Uncertain, q: Any, k_cache: Any, v_cache: Any, lengths: Any, scale: float | None = None
    ) -> Variances:
        of_q, of_k, of_v = (np.zeros(np.shape(x)) for x in (q, k_cache, v_cache))
        for b, n in enumerate(np.asarray(lengths).tolist()):
            row, seen = slice(b, b + 1), slice(0, n)
            if n:
                parts = self._attention(do[row], q[row], k_cache[row, :, seen], v_cache[row, :, seen], scale=scale)
                of_q[row], of_k[row, :, seen], of_v[row, :, seen] = parts
        return [of_q, of_k, of_v]

    def _op_softmax(self, d: Uncertain, p: Any) -> Variances:
        """ds = p (dp - s), s = sum p dp. Its name in a policy is that of attention's."""
        p = np.asarray(p, np.float64)
        terms = p * d.value
        s = terms.sum(axis=-1, keepdims=True)
        ds = p * (d.value - s)
        count = np.full(s.shape, max(1, p.shape[-1]))
        of_sum = self._sum_noise(count, s, lambda: np.square(terms).sum(axis=-1, keepdims=True))
        inside = self._inside(terms, 2) + self._inside(p * s, 2) + np.square(p) * of_sum
        return [inside + np.asarray(self._ulp(ds, self.dtype) ** 2 / 12)]

    def _op_swiglu(self, d: Uncertain, gate: Any, up: Any) -> Variances:
        return self._glu(d, gate, up, "silu")

    def _op_relu2(self, d: Uncertain, x: Any) -> Variances:
        return self._activation(d, x, "relu2")

    def _op_cross_entropy(self, d: Uncertain, logits: Any, labels: Any, **how: Any) -> Variances:
        (own,) = self._cross_entropy(d, logits, labels, **how)
        assert own is not None
        return [own + self._of_log_probabilities(d, logits, labels, how)]

    def _of_log_probabilities(self, d: Uncertain, logits: Any, labels: Any, how: dict[str, Any]) -> Any:
        if not self._rounds(LOG_PROBABILITIES.replace(".grad", "")) or self.dtype == "float32":
            return 0.0
        log_p = _log_softmax(np.asarray(logits, np.float64))
        each = np.where(
            (labels != how.get("ignore_index", ops.IGNORE_INDEX))[:, None], self._per_row(d.value, labels, how), 0
        )
        known = np.where(np.isfinite(log_p), log_p, 0)
        p = np.exp(log_p)
        of_log = np.square(p) * np.asarray(self._ulp(known, self.dtype)) ** 2
        return np.square(each) * (of_log + np.asarray(self._ulp(p, self.dtype)) ** 2) / 12

    def _op_linear_cross_entropy(self, d: Uncertain, x: Any, weight: Any, labels: Any, **how: Any) -> Variances:
        logits = self._forward.linear(certain(x), np.asarray(weight, np.float64))
        (own,) = self._cross_entropy(d, logits.value, labels, **how)
        value = ops.cross_entropy_backward(d.value, logits.value, labels, **how)
        p = np.exp(_log_softmax(logits.value))
        counted = (labels != how.get("ignore_index", ops.IGNORE_INDEX))[:, None]
        each = np.where(counted, self._per_row(d.value, labels, how), 0)
        through = np.square(each) * self._probs_variance(p, np.asarray(logits.variance))
        return self._linear(Uncertain(value, own + through), x, weight, None, needed=(True, True, False))[:2]


_BOTH = ("value", "variance")


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def _drawn(function: Any, x: np.ndarray, variance: np.ndarray) -> list[np.ndarray | None]:
    """The variance of every result for errors of this variance of x, drawn a few times; an element counts as at least
    the mean of its row, since few draws may leave it out."""
    exact, rng = function(x), np.random.default_rng(7)
    if not variance.any():
        return [None if e is None else np.zeros(np.shape(e)) for e in exact]
    total = [None if e is None else np.zeros(np.shape(e)) for e in exact]
    for _ in range(_DRAWS):
        moved = function(x + np.sqrt(variance) * rng.standard_normal(x.shape))
        for sum_of, a, b in zip(total, moved, exact, strict=True):
            if sum_of is not None:
                sum_of += np.square(a - b) / _DRAWS
    return [None if V is None or not V.size else np.maximum(V, V.mean(axis=-1, keepdims=True)) for V in total]


def predicted_variance(
    known: BackwardContract, given: Mapping[str, Any], dtype: str, policy: Policy, order: str = BLOCKS
) -> list[np.ndarray | None]:
    """The variance of each output of a call, None where there is none. given: every argument by name."""
    steps = _Steps(dtype, policy, order)
    tame = {name: _tame(name, x) for name, x in given.items() if name not in known.kept}
    grads = [Uncertain(tame[name], np.zeros(np.shape(tame[name]))) for name in known.incoming if name != "dlse"]
    rest = {name: x for name, x in tame.items() if name not in known.incoming or name == "dlse"}
    with np.errstate(all="ignore"):
        found = steps.of(forward_name(known.operator), grads, rest)
    return [*found, *[None] * (len(known.outputs) - len(found))]


def _tame(name: str, x: Any) -> Any:
    """Float arrays as float64 without NaN and infinities, which reach nothing; -inf stays among logits."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    finite = np.isfinite(x) | (np.isneginf(x) if name == "logits" else False)
    return np.where(finite, x, 0.0).astype(np.float64)


def evaluate_backward(
    known: BackwardContract, given: Mapping[str, Any], ar: Arithmetic
) -> tuple[np.ndarray | None, ...]:
    """The definition in `ar`, with what the forward pass kept computed again: one result per output, None included."""
    function = getattr(ops, known.operator)
    parameters = known.parameters
    values = {name: None if name in known.kept else given[name] for name in parameters}
    positional = [values[name] for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    keywords = {p.name: values[name] for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    keywords |= {name: given[name] for name in ("mask",) if name in given}
    with np.errstate(all="ignore"):
        out = function(*positional, **keywords, ar=ar)
    return out if isinstance(out, tuple) else (out,)


def expect_backward(
    operator: str,
    arguments: Sequence[Any],
    keywords: dict[str, Any],
    dtype: str,
    policy: Policy,
    dtypes: Mapping[str, str] | None = None,
    fused: bool = True,
) -> list[dict[str, Any]]:
    """The fields of `refllm.accuracy.expected.Expected` for every gradient that is no None.

    keywords: those of the operator, and a mask of attention. dtypes: of the arguments by name, where they are not that
    of the activations. fused: whether the policy is the
    contract's, under which some results are rounded once.
    """
    known = BACKWARD[operator]
    given = known.bound(arguments, keywords) | {name: keywords[name] for name in ("mask",) if name in keywords}
    policy = replace(policy, masked_rows_are_zero=True)
    exact = evaluate_backward(known, given, EXACT)
    contract = evaluate_backward(known, given, Arithmetic(dtype, policy))
    inner = _inner(known, given, exact, policy)
    variances = predicted_variance(known, given, dtype, policy)
    found = []
    for i, (name, axes) in enumerate(known.outputs.items()):
        if exact[i] is None:
            continue
        own = (dtypes or {}).get(known.like(name), dtype)
        value, variance = np.asarray(exact[i], np.float64), np.asarray(variances[i], np.float64)
        variance = np.broadcast_to(variance, value.shape)
        same = np.asarray(contract[i], np.float64)
        if own != dtype:  # float32 beside a narrower format: the last rounding is finer
            variance = np.maximum(variance - np.square(ulp(value, dtype, np.float64)) / 12, 0)
            same = np.asarray(evaluate_backward(known, given, Arithmetic("float32", NATIVE))[i], np.float64)
        if operator == "softmax_backward" and own != "float32":  # inside of attention nothing is rounded there
            same = np.asarray(_rounded(value, own), np.float64)
        variance = np.where(np.isfinite(value) & np.isfinite(variance), variance, 0.0)
        found.append({
            "operator": operator, "name": name, "axes": axes if value.ndim else (), "dtype": own, "exact": value,
            "contract": same, "variance": variance, "inner": np.broadcast_to(inner[i], value.shape),
            "once": fused and name in known.once and own == dtype != "float32",
            "independent": None if axes[:1] in ((ROWS,), ("B",), ("N",)) else _independent(variance, inner[i]),
        })  # fmt: skip
    return found


def _rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(rounding(dtype)(value.astype(np.float32)))


def _independent(variance: np.ndarray, inner: np.ndarray) -> int:
    """How many independent errors of one size a gradient of a weight has: each element is a sum of its own."""
    V = variance + np.square(inner)
    scale = float(V.max(initial=0.0))
    return max(1, int((V / scale).sum() ** 2 / np.square(V / scale).sum())) if scale else int(V.size)


def _inner(
    known: BackwardContract, given: Mapping[str, Any], exact: Sequence[np.ndarray | None], policy: Policy
) -> list[Any]:
    """How much float32 arithmetic inside may move each element of each result.

    As `refllm.accuracy.expected` has it: the exact results of inputs that are moved by a float32 rounding each, and the
    definition in float32. Beside that the predicted error of float32 arithmetic, with sums in blocks and in one chain:
    over many rows they are what an honest gradient of a weight is off by.
    """
    rng = np.random.default_rng(0x5EED)
    moved = {name: _moved(x, rng) for name, x in given.items()}
    near = evaluate_backward(known, moved, EXACT)
    plain = evaluate_backward(known, given, Arithmetic("float32", NATIVE))
    sigmas = [predicted_variance(known, given, "float32", policy, order) for order in (BLOCKS, ONE_CHAIN)]
    found: list[Any] = []
    for i, e in enumerate(exact):
        if e is None:
            found.append(None)
            continue
        e = np.asarray(e, np.float64)
        row = _own_error if known.elementwise else _row_error
        own = limits.INNER * np.maximum(row(near[i], e), _FLOAT32_ROUNDING * np.where(np.isfinite(e), np.abs(e), 0.0))
        squares = np.square(own) + np.square(2 * row(plain[i], e))
        V = np.maximum(*(np.broadcast_to(np.asarray(s[i], np.float64), e.shape) for s in sigmas))
        squares = squares + np.square(limits.INNER) * np.where(np.isfinite(V), V, 0.0)
        found.append(np.sqrt(squares))
    return found


def _own_error(value: Any, exact: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        error = np.abs(np.asarray(value, np.float64) - exact)
    return np.where(np.isfinite(error), error, 0.0)


def _row_error(value: Any, exact: np.ndarray) -> np.ndarray:
    """The error of an element, or the root mean square of its row's if that is more."""
    error = _own_error(value, exact)
    if not error.ndim or not error.size:
        return error
    return np.maximum(np.sqrt(np.mean(np.square(error), axis=-1, keepdims=True)), error)


def _moved(x: Any, rng: np.random.Generator) -> Any:
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    size = np.maximum(np.abs(np.where(np.isfinite(x), x, 0.0).astype(np.float64)), np.finfo(np.float32).tiny)
    return x + np.where(x == 0, 0.0, _FLOAT32_ROUNDING * size * rng.standard_normal(np.shape(x)))
