"""What one call of an operator should return: the exact values, and beside each the variance of its rounding error.

    (y,) = predict("rms_norm", (x, weight, 1e-6), {}, dtype="bfloat16", policy=FUSED)
    z = (candidate - y.exact) / y.sigma

The exact values are the definition (`refllm.ops`) in float64, on exactly the numbers that the call got. The variance is
that of a right implementation that works in `dtype` and rounds where `policy` says: propagated to first order through
the steps of the definition (`refllm.accuracy.propagation`), every rounding point adding ulp^2 / 12. An operator made of
several steps (a norm and a rotation, say) may round between them as its definition does; one that does not is better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy.propagation import Propagation, Uncertain, sum_noise
from refllm.errors import InputError
from refllm.ops.contracts import CONTRACTS
from refllm.precision import Dtype, Policy, check_dtype

# float64 arithmetic is float32 arithmetic with an ulp 2^-29 times as large; the exact values have the same error.
_FLOAT64_VARIANCE = 2 * 4.0**-29
_VECTOR = 8  # numbers that are added at a time


@dataclass(frozen=True)
class Predicted:
    """One output. exact: float64, NaN and infinities included. variance: float64, same shape; 0 where the value is not
    finite, or where it is bit-equal to an input."""

    exact: np.ndarray
    variance: np.ndarray

    @property
    def sigma(self) -> np.ndarray:
        """The standard deviation, the unit of reports."""
        return np.sqrt(self.variance)


def predict(
    operator: str, arguments: Sequence[Any], keywords: dict[str, Any], *, dtype: str, policy: Policy
) -> tuple[Predicted, ...]:
    """One `Predicted` per output of refllm.ops.<operator>(*arguments, **keywords).

    arguments, keywords: arrays, numbers and None, as the operator takes them; the arrays hold the values that the
    implementation gets, so on the grid of its dtype. dtype: "bfloat16", "float16", "float32" or "float64". Raises
    InputError for another operator or dtype, and what the operator itself raises for its arguments.
    """
    dtype = check_dtype(dtype)
    if operator not in _STEPS:
        raise InputError(f"operator {operator!r} is not known; there are {', '.join(OPERATORS)}")
    with np.errstate(all="ignore"):
        exact = _evaluate(operator, arguments, keywords)
        op = _Steps("float32" if dtype == "float64" else dtype, policy)
        tame = _tame_logits if "logits" in CONTRACTS[operator].kinds.values() else _tame
        steps = _STEPS[operator](op, *map(tame, arguments), **{key: tame(value) for key, value in keywords.items()})
        scale = _FLOAT64_VARIANCE if dtype == "float64" else 1.0
        return tuple(_predicted(e, u.variance * scale) for e, u in zip(exact, steps, strict=True))


def predict_loss(
    logits_NV: np.ndarray,
    variance_NV: np.ndarray,
    labels_N: np.ndarray,
    *,
    dtype: str,
    policy: Policy,
    ignore_index: int = ops.IGNORE_INDEX,
    reduction: str = "mean",
) -> np.ndarray:
    """The variance of the cross entropy of logits that have an error themselves, of variance variance_NV."""
    logits = Uncertain(np.asarray(logits_NV, np.float64), np.asarray(variance_NV, np.float64))
    with np.errstate(all="ignore"):
        loss = _Steps(dtype, policy)._loss(logits, labels_N, ignore_index=ignore_index, reduction=reduction)
    return loss.variance


def _evaluate(operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[np.ndarray, ...]:
    out = getattr(ops, operator)(*arguments, **keywords)
    return tuple(np.asarray(x, np.float64) for x in (out if isinstance(out, tuple) else (out,)))


def _tame(x: Any) -> Any:
    """Float arrays as float64, with 0 for NaN and infinity: what the rows that do not see them should not feel."""
    if not isinstance(x, np.ndarray) or not np.issubdtype(x.dtype, np.floating):
        return x
    x = x.astype(np.float64)
    return x if np.isfinite(x).all() else np.where(np.isfinite(x), x, 0.0)


def _tame_logits(x: Any) -> Any:
    """What `_tame` gives, but a logit of -inf stays: its probability is 0, and the loss of another label is finite."""
    return np.where(np.isneginf(x), -np.inf, _tame(x)) if isinstance(x, np.ndarray) and x.ndim == 2 else x


def _predicted(exact: np.ndarray, variance: np.ndarray) -> Predicted:
    variance = np.broadcast_to(np.asarray(variance, np.float64), exact.shape)
    return Predicted(exact, np.where(np.isfinite(exact) & np.isfinite(variance), variance, 0.0))


def _given(x: np.ndarray) -> Uncertain:
    return Uncertain(x, np.zeros(x.shape))


class _Steps(Propagation):
    """The steps of a page, and the operators that are made of several, with variances in float64."""

    width = np.float64

    def __init__(self, dtype: Dtype, policy: Policy) -> None:
        super().__init__(dtype, policy, at_tap=lambda name, x: x, wants=lambda name: False)

    # Beside a narrow format float32 noise is nothing, except where an element cancels to about 0.

    def _inside(self, value: np.ndarray, steps: Any = 1) -> np.ndarray | float:
        return np.asarray(steps * self._ulp(value, "float32") ** 2 / 12)

    def _sum_noise(
        self, terms: np.ndarray, value: np.ndarray, square_sum: Callable[[], np.ndarray], point: str | None = None
    ) -> np.ndarray | float:
        return self._accumulated(terms, value, square_sum())

    def _to_the_bit(self, function: Callable[..., np.ndarray], *inputs: Uncertain) -> None:
        return None

    def _to_the_bit_pair(self, *inputs: Any) -> tuple[None, None]:
        return None, None

    # Of the operators' names: arrays in, as `refllm.ops` takes them, one Uncertain per output.

    def call_rms_norm(self, x: Any, weight: Any, eps: float) -> tuple[Uncertain, ...]:
        return (self.rms_norm(_given(x), weight, eps),)

    def call_layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> tuple[Uncertain, ...]:
        return (self.layer_norm(_given(x), weight, bias, eps),)

    def call_add_rms_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Uncertain, ...]:
        r = self.add(_given(residual), _given(x))
        return self.rms_norm(r, weight, eps), r

    def call_add_layer_norm(self, x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> tuple[Uncertain, ...]:
        r = self.add(_given(residual), _given(x))
        return self.layer_norm(r, weight, bias, eps), r

    def call_rope(self, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> tuple[Uncertain, ...]:
        return self.rope(_given(q), _given(k), _given(cos), _given(sin), interleaved=interleaved)

    def call_norm_rope(
        self, q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float, *, norm: str, **how: Any
    ) -> tuple[Uncertain, ...]:
        def per_head(x: Any, weight: Any) -> Uncertain:
            weight = weight[:, None, :]
            if norm == "rms":
                return self.rms_norm(_given(x), weight, eps)
            return self.layer_norm(_given(x), weight, None, eps)

        return self.rope(per_head(q, q_weight), per_head(k, k_weight), _given(cos), _given(sin), **how)

    def call_rms_norm_qkv_rope(
        self,
        x: Any,
        weight: Any,
        w: Any,
        b: Any,
        cos: Any,
        sin: Any,
        eps: float,
        *,
        num_heads: int,
        num_kv_heads: int,
        interleaved: bool,
    ) -> tuple[Uncertain, ...]:
        qkv = self.linear(self.rms_norm(_given(x), weight, eps), w, b)
        heads = self.split_heads(qkv, num_heads + 2 * num_kv_heads)
        q, k, v = (heads[:, part] for part in _parts(num_heads, num_kv_heads))
        return *self.rope(q, k, _given(cos), _given(sin), interleaved=interleaved), v

    def call_attention(
        self, q: Any, k: Any, v: Any, *, return_lse: bool = False, **masking: Any
    ) -> tuple[Uncertain, ...]:
        both = self.attention_and_lse(_given(q), _given(k), _given(v), **masking)
        return both if return_lse else both[:1]

    def call_decode_attention(
        self, q: Any, k: Any, v: Any, lengths: Any, *, scale: float | None = None
    ) -> tuple[Uncertain, ...]:
        variance = np.zeros((*q.shape[:3], v.shape[-1]))
        for b, length in enumerate(np.asarray(lengths).tolist()):
            row = slice(b, b + 1)
            seen = (_given(x) for x in (q[row], k[row, :, :length], v[row, :, :length]))
            variance[row] = self.attention(*seen, scale=scale).variance
        return (Uncertain(variance, variance),)

    def call_swiglu(self, gate: Any, up: Any) -> tuple[Uncertain, ...]:
        return (self.glu(_given(gate), _given(up), "silu"),)

    def call_relu2(self, x: Any) -> tuple[Uncertain, ...]:
        return (self.activation(_given(x), "relu2"),)

    def call_cross_entropy(self, logits: Any, labels: Any, **how: Any) -> tuple[Uncertain, ...]:
        return (self._loss(_given(logits), labels, **how),)

    def call_linear_cross_entropy(self, x: Any, weight: Any, labels: Any, **how: Any) -> tuple[Uncertain, ...]:
        return (self._loss(self.linear(_given(x), weight), labels, **how),)

    def _loss(
        self, logits: Uncertain, labels: Any, *, ignore_index: int = ops.IGNORE_INDEX, reduction: str = "mean"
    ) -> Uncertain:
        """-log softmax(z)[y] = log(sum_j e^d_j) - d_y with d = z - max z, in float32 whatever the format of z.

        z has its variance, and d that of the difference.
        """
        rows = np.flatnonzero(labels != ignore_index)
        if reduction == "none":
            _, variance = self._of_rows(logits.value[rows], logits.variance[rows], labels[rows, None])
            out = np.zeros(labels.shape)
            out[rows] = variance
            return Uncertain(out, out)
        # Equal rows make equal errors, which add up: they are taken as one row with several labels.
        _, first, row_of = np.unique(_bytes(logits.value[rows]), return_index=True, return_inverse=True)
        losses, variances = np.zeros(len(first)), np.zeros(len(first))
        for i, row in enumerate(rows[first]):
            wanted = labels[rows[row_of == i]]
            one = self._of_rows(logits.value[row, None], logits.variance[row, None], wanted[None])
            losses[i], variances[i] = one[0][0], one[1][0]
        return self._reduced(losses, variances, len(rows), reduction)

    def _of_rows(self, z: np.ndarray, variance: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the losses [N] and its variance for logits [N, V] with n labels each, [N, n].

        The derivative by z_j is n p_j - (how many labels are j). d is exact for narrow z, which have few digits.
        """
        n = labels.shape[-1]
        below = z - z.max(axis=-1, keepdims=True, initial=-np.inf)
        e = np.exp(below)
        total = e.sum(axis=-1)
        weights = e / total[:, None]
        wanted = np.zeros(z.shape)
        np.add.at(wanted, (np.arange(len(z))[:, None], labels), 1)
        difference = self._ulp(below, "float32") ** 2 / 12
        V = (n * weights - wanted) ** 2 * (variance + (difference if self.dtype == "float32" else 0.0))
        V = (V + (n * weights) ** 2 * difference).sum(axis=-1)  # of the argument of the exponential
        log = np.log(total)
        losses = log[:, None] - np.take_along_axis(below, labels, axis=-1)
        of_log = sum_noise(z.shape[-1], 1.0, weights.max(axis=-1, initial=0.0)) + self._ulp(log, "float32") ** 2 / 12
        V += n**2 * of_log + self._ulp(losses, "float32").sum(axis=-1) ** 2 / 12
        return losses.sum(axis=-1), V

    def _reduced(self, losses: np.ndarray, variances: np.ndarray, n: int, reduction: str) -> Uncertain:
        """The result of a reduction over n losses, equal ones added up already."""
        total = losses.sum()
        V = variances.sum() + sum_noise(n, total, losses.max(initial=0.0), left_over=min(n, _VECTOR) / 2)
        if reduction == "mean" and n > 1:
            V = V / n**2 + self._ulp(total / n, "float32") ** 2 / 12
        return Uncertain(np.asarray(total), np.asarray(V))


def _bytes(rows: np.ndarray) -> np.ndarray:
    """[N, V] -> [N]: one value per row, equal for equal rows."""
    return np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[-1] * rows.itemsize)))[:, 0]


def _parts(num_heads: int, num_kv_heads: int) -> tuple[slice, slice, slice]:
    first, second = num_heads, num_heads + num_kv_heads
    return slice(0, first), slice(first, second), slice(second, None)


_STEPS: dict[str, Callable[..., tuple[Uncertain, ...]]] = {
    name.removeprefix("call_"): getattr(_Steps, name) for name in vars(_Steps) if name.startswith("call_")
}

OPERATORS = tuple(_STEPS)
"""The operators that `predict` knows: those of `refllm.kernels`."""
