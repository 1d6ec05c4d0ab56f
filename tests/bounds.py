"""What an operator may return in a narrow format, whatever the order in which a CPU adds: a page run on ranges.

`Bounds` stands in for `refllm.forward.operators.Operators`. Every operator gets the candidate's own inputs, computes in
float64, and knows how far a float32 evaluation in any order can be from that (Higham 2002, "Accuracy and Stability of
Numerical Algorithms": a sum of n terms is off by at most gamma_n = n u / (1 - n u) times the sum of their absolute
values; the functions by an ulp or two). Both ends of that range are rounded where the policy rounds. So an element is
fixed to the bit, unless a rounding boundary lies within the error of its float32 sum; then it may be the number beside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm import ops
from refllm.precision import Policy, rounding

U = 2.0**-24
TINY = 2.0**-126
FUNCTION = 4  # ulps that a float32 exponential, root or division, with what is done to its result, may be off


@dataclass(frozen=True)
class Range:
    """All numbers from lo to hi, float64. Where a candidate's own value was taken over, both are that."""

    lo: np.ndarray
    hi: np.ndarray

    def map(self, view: Callable[[np.ndarray], np.ndarray]) -> "Range":
        return Range(view(self.lo), view(self.hi))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lo.shape

    @property
    def value(self) -> np.ndarray:
        assert np.array_equal(self.lo, self.hi), "a value that the candidate did not show"
        return self.lo


@dataclass
class Found:
    """One named value. outside: elements that no order of additions explains. open: those that may be one of two."""

    elements: int
    outside: int
    open: int


class Bounds:
    """given: the candidate's values by name. found: what was seen at each, in order of computation."""

    def __init__(self, dtype: str, policy: Policy, given: dict[str, np.ndarray], scope: str = "") -> None:
        self.dtype, self.policy, self.given, self.scope = dtype, policy, given, scope
        self.found: dict[str, Found] = {}

    def within(self, scope: str) -> "Bounds":
        within = Bounds(self.dtype, self.policy, self.given, f"{scope}.")
        within.found = self.found
        return within

    def tap(self, name: str, x: Range) -> Range:
        candidate = self.given.get(self.scope + name)
        if candidate is None:
            return x
        if candidate.shape[:3] != x.shape[:3]:
            candidate = candidate.transpose(0, 2, 1, 3)
        rest = x.lo[..., candidate.shape[-1] :]  # Transformers shows the rotated dims alone
        candidate = np.concatenate([candidate.astype(np.float64), rest], axis=-1)
        inside = (x.lo <= candidate) & (candidate <= x.hi)
        self.found[self.scope + name] = Found(inside.size, int((~inside).sum()), int((x.lo < x.hi).sum()))
        return Range(candidate, candidate)

    def rounded(self, value: np.ndarray, error: np.ndarray | float, point: str) -> Range:
        """value +- error on the grid of the format, if the policy rounds at `point`, else in float32."""
        down, up = (np.asarray(end).astype(np.float32) for end in (value - error, value + error))
        return self._on_grid(np.nextafter(down, -np.inf), np.nextafter(up, np.float32(np.inf)), point)

    def exactly(self, x: Range, point: str) -> Range:
        """x, which float32 arithmetic gives the same on every CPU, on the grid if the policy rounds at `point`."""
        return self._on_grid(x.lo.astype(np.float32), x.hi.astype(np.float32), point)

    def _on_grid(self, lo: np.ndarray, hi: np.ndarray, point: str) -> Range:
        put = rounding(self.dtype) if point in self.policy.points else (lambda x: x)
        return Range(put(lo).astype(np.float64), put(hi).astype(np.float64))

    def _times(self, x: Range, factor: np.ndarray) -> Range:
        one, two = x.lo * factor, x.hi * factor
        return Range(np.minimum(one, two), np.maximum(one, two))

    # ------------------------------------------------------------------------------------------------------- operators

    def split_heads(self, x: Range, heads: int) -> Range:
        return x.map(lambda a: ops.split_heads(a, heads))

    def merge_heads(self, x: Range) -> Range:
        return x.map(ops.merge_heads)

    def linear(self, x: Range, weight: np.ndarray, bias: np.ndarray | None = None) -> Range:
        size = np.abs(x.value) @ np.abs(weight.astype(np.float64)).T + (0 if bias is None else np.abs(bias))
        return self.rounded(ops.linear(x.value, weight, bias), gamma(x.shape[-1] + 1) * size, "linear")

    def add(self, x: Range, y: Range) -> Range:
        return self.exactly(Range(x.value + y.value, x.value + y.value), "add")

    def rms_norm(self, x: Range, weight: np.ndarray, eps: float) -> Range:
        y = x.value / np.sqrt(np.mean(x.value**2, axis=-1, keepdims=True) + eps)
        normalized = self.rounded(y, np.abs(y) * gamma(x.shape[-1] + FUNCTION), "rms_norm.normalized")
        weighted = self._times(normalized, weight.astype(np.float64))
        if "rms_norm.normalized" in self.policy.points and self.dtype != "float32":
            return self.exactly(weighted, "rms_norm")  # a product of two narrow numbers
        middle, half = (weighted.lo + weighted.hi) / 2, (weighted.hi - weighted.lo) / 2
        return self.rounded(middle, half + U * np.abs(middle), "rms_norm")

    def layer_norm(self, x: Range, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Range:
        """The error of the mean shifts a row; that of the variance (relative, times its condition number: Chan, Golub
        and LeVeque 1983) scales it. torch may multiply before it subtracts."""
        n, values = x.shape[-1], x.value
        mean = values.mean(axis=-1, keepdims=True)
        variance = values.var(axis=-1, keepdims=True)
        scale = 1 / np.sqrt(variance + eps)
        y = (values - mean) * scale
        condition = np.sqrt(1 + mean**2 / np.maximum(variance, TINY))
        shift = gamma(n + 1) * np.abs(values).mean(axis=-1, keepdims=True) + 2 * U * (np.abs(values) + np.abs(mean))
        error = np.abs(y) * gamma(n + FUNCTION) * condition + scale * shift
        out = y * weight + (0 if bias is None else bias)
        size = np.abs(y * weight) + (0 if bias is None else np.abs(bias))
        return self.rounded(out, error * np.abs(weight) + 2 * U * size, "layer_norm")

    def rope(self, q: Range, k: Range, cos: Range, sin: Range, *, interleaved: bool) -> tuple[Range, Range]:
        return tuple(self._rotate(x.value, cos.value[:, None], sin.value[:, None], interleaved) for x in (q, k))  # type: ignore[return-value]

    def _rotate(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> Range:
        half = cos.shape[-1]
        first, second = slice(0, half), slice(half, 2 * half)
        if interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        out, a, b = x.copy(), x[..., first], x[..., second]

        def product(u: np.ndarray, v: np.ndarray) -> np.ndarray:
            return self.exactly(Range(u * v, u * v), "rope.product").value

        for lanes, total in ((first, product(a, cos) - product(b, sin)), (second, product(b, cos) + product(a, sin))):
            out[..., lanes] = self.exactly(Range(total, total), "rope").value
        return Range(out, out)

    def attention(self, q: Range, k: Range, v: Range, *, causal: bool = True, **masking: Any) -> Range:
        assert causal, "every call here is causal"
        assert all(mask is None for mask in masking.values()), "and has no other mask"
        k_T, values = (np.repeat(x.value, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        k_T, scale = k_T.swapaxes(-1, -2), np.float64(np.float32(q.shape[-1] ** -0.5))
        error = gamma(q.shape[-1]) * (np.abs(q.value) @ np.abs(k_T))
        scores = self.exactly(
            self._times(self.rounded(q.value @ k_T, error, "attention.scores"), scale), "attention.scaled"
        )
        probs = self.tap("self_attn.probs", self._softmax(self.tap("self_attn.scores", scores)))
        p = probs.value
        return self.rounded(p @ values, gamma(p.shape[-1]) * (np.abs(p) @ np.abs(values)), "attention")

    def _softmax(self, scores: Range) -> Range:
        S, T = scores.shape[-2:]
        seen = np.arange(T) <= np.arange(S)[:, None] + (T - S)
        top = np.where(seen, scores.hi, -np.inf).max(axis=-1, keepdims=True)
        ends = [np.where(seen, end - top, -np.inf) for end in (scores.lo, scores.hi)]
        error = np.where(seen, (np.abs(np.where(seen, ends[0], 0)) + FUNCTION) * U, 0)
        least, most = np.exp(ends[0]) * (1 - error), np.exp(ends[1]) * (1 + error)
        slack = gamma(T + FUNCTION)
        lo = least / most.sum(axis=-1, keepdims=True) * (1 - slack)
        hi = np.minimum(1, most / least.sum(axis=-1, keepdims=True) * (1 + slack))
        return self.rounded((lo + hi) / 2, (hi - lo) / 2 + np.where(seen, TINY, 0), "attention.weights")

    def activation(self, x: Range, name: str) -> Range:
        assert name == "relu2"
        y = np.maximum(x.value, 0) ** 2
        return self.exactly(Range(y, y), "activation")

    def glu(self, gate: Range, up: Range, name: str) -> Range:
        assert name == "silu"
        y = ops.activation(gate.value, name)
        error = np.abs(y) * (np.abs(gate.value) + FUNCTION) * U + TINY
        return self.exactly(self._times(self.rounded(y, error, "glu.activation"), up.value), "glu")


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def table(dtype: str, policy: Policy, value: np.ndarray) -> Range:
    """A rotary table whose float32 entries are off by no more than an ulp."""
    return Bounds(dtype, policy, {}).rounded(value, np.abs(value) * 2 * U, "rope.table")
