"""The predicted error of backward operators: what their own roundings add, and what an uncertain gradient hands on.

A backward operator is linear in its incoming gradient, so the variance of that goes through it as through any operator
of a page: `Backward` is the propagation of `refllm.accuracy.propagation` once more, which reads its rounding points in
the backward half of a policy. What the forward pass kept is taken as it stands; whether it is right is a question about
the forward pass (and how its error reaches a gradient end to end: `refllm.accuracy.gradients`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy.propagation import BLOCKS, VANISHED, Propagation, Uncertain, cancels, certain
from refllm.ops.attention import visible_keys
from refllm.ops.attention_backward import queries_per_block, weights_of_head
from refllm.ops.linear_backward import turns
from refllm.ops.norm_backward import rows_first, summed_to
from refllm.precision import EXACT, Arithmetic, Policy, rounding

Variances = list[np.ndarray | None]
_STEPS = 4  # float32 roundings between a gradient and what a norm makes of it: products, difference, root
_ONE_ADDITION = 0.541 * 2.0**-46 / 12  # relative variance, on average over a binade
_OF_AN_EXPONENTIAL = (4 * 2.0**-24) ** 2  # relative variance of those of a kernel, which are good to some ulp
_SLOPE_STEPS, _LEAST_SLOPE = 4, 0.25  # of the derivative of an activation; where it crosses 0 its terms do not


class _InOrder(Propagation):
    """Operators whose float32 sums may be one chain in an order that is not random: first those of one sign, as where
    some dims of a query and a key agree and others do not. The partial sums are then of the size of the terms."""

    width = np.float64  # gradients are small, and the squares of their ulp are smaller

    def _accumulated(self, terms: np.ndarray, value: np.ndarray, square_sum: np.ndarray) -> np.ndarray:
        found = super()._accumulated(terms, value, square_sum)
        if self.order == BLOCKS:
            return found
        drift = np.maximum(np.square(value), terms * square_sum / 4) / 3
        return np.maximum(found, terms * drift * _ONE_ADDITION)


class Backward(_InOrder):
    """The backward operators of an implementation in `dtype` under `policy`. order: in which float32 sums are added."""

    given_exactly = False
    """Whether what the forward pass kept is exact, and not the result of scores with the errors that are made again."""

    def __init__(self, dtype: str, policy: Policy, order: str = BLOCKS) -> None:
        points = frozenset(point.replace(".grad", "") for point in policy.points if ".grad" in point)
        super().__init__(dtype, replace(policy, points=points), lambda _, x: x, lambda _: False)
        self.order = order
        self._forward = _InOrder(dtype, policy, lambda _, x: x, lambda _: False)
        self._forward.order = order

    def back(
        self, operator: str, grads: Sequence[Uncertain], kept: tuple[Any, ...], how: dict[str, Any], needed: Any
    ) -> Variances:
        """The variances of what `<operator>_backward` gives. kept, how: what it takes beside the incoming gradients."""
        if operator == "linear":
            how = {**how, "needed": needed}
        found: Variances = getattr(self, f"_{operator}")(*grads, *kept, **how)
        return found

    # ------------------------------------------------------------------------------------------------ products and sums

    def _linear(
        self, d: Uncertain, x: np.ndarray, weight: np.ndarray, bias: Any = None, *, needed: tuple[bool, ...]
    ) -> Variances:
        """dx = dy W and dW = dy^T x are products like any other; db is one with ones."""
        dy, rows = d.map(_in_rows), _in_rows(x)
        of_x, of_weight, of_bias = (*needed, *[False] * (3 - len(needed)))
        across = dy.map(np.transpose)
        return [
            self.linear(dy, np.asarray(weight, np.float64).T).variance.reshape(x.shape) if of_x else None,
            self.linear(across, rows.T).variance if of_weight else None,
            self.linear(across, np.ones((1, len(rows)))).variance[:, 0] if of_bias else None,
        ]

    def _embedding(self, d: Uncertain, *, ids: np.ndarray, counted: np.ndarray, table: np.ndarray) -> Variances:
        """A sum over the places of an id, which may be rounded after every addition but the first."""
        dy, shape = d[counted], table.shape
        total, variance, added = (np.zeros(shape) for _ in range(3))
        ids, onto = ids.ravel(), rounding(self.dtype)
        running, chained = np.zeros(shape, np.float32), self.dtype != "float32" and self._rounds("embedding.sum")
        value, of_value = _in_rows(dy.value), _in_rows(dy.variance)
        places = np.bincount(ids, minlength=shape[0])[:, None]
        for number, turn in enumerate(turns(ids)):
            at = ids[turn]
            total[at] += value[turn]
            variance[at] += of_value[turn]
            if number and self._rounds("embedding.sum"):
                added[at] += np.asarray(self._noise(total[at], "embedding.sum"))
            if chained:
                running[at] = onto(running[at] + value[turn].astype(np.float32))
        if chained:  # see `_of_a_chain`
            added = np.maximum(added, np.square(running - total))
        elif self.dtype != "float32":
            added = np.where(places > 1, self._noise(total, "embedding"), 0)
        return [variance + added]

    def _add(self, d: Uncertain) -> Variances:
        """A sum hands its gradient on."""
        return [d.variance, d.variance]

    def sum(self, before: Uncertain, gradient: Uncertain) -> Uncertain:
        """Two gradients of one value, added."""
        return replace(self.add(before, gradient), rounded=None, shares={})

    # ------------------------------------------------------------------------------------------------------------ norms

    def _rms_norm(self, d: Uncertain, x: np.ndarray, weight: np.ndarray, eps: float) -> Variances:
        x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
        r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        n, g = x * r, d.value * weight
        of_g = np.square(weight) * d.variance + self._noise(g, "rms_norm.scaled")
        m = np.mean(g * n, axis=-1, keepdims=True)
        dx = r * (g - n * m)
        of_x = self._projected(of_g, n, r, centred=False) + self._of_a_row(r, n, g, m) + self._noise(dx, "rms_norm")
        of_x = of_x + self._of_parts("rms_norm", r * g, r * n * m)
        rounded = np.square(d.value) * self._forward._noise(n, "rms_norm.normalized")
        terms = np.square(n) * d.variance + rounded + self._noise(d.value * n, "rms_norm.terms")
        return [of_x, self._over_rows(terms, d.value * n, weight.shape, "rms_norm")]

    def _layer_norm(self, d: Uncertain, x: np.ndarray, weight: np.ndarray, bias: Any, eps: float) -> Variances:
        """The same, less the mean. That and 1 / standard deviation may be kept rounded, which a whole row shares."""
        x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
        mean = x.mean(axis=-1, keepdims=True)
        r = 1 / np.sqrt(np.mean(np.square(x - mean), axis=-1, keepdims=True) + eps)
        n, g = (x - mean) * r, d.value * weight
        m, of_mean, of_root = (g * n).mean(axis=-1, keepdims=True), self._statistic(mean), self._statistic(r) / r**2
        level = g.mean(axis=-1, keepdims=True)
        dx = r * (g - level - n * m)
        of_x = self._projected(np.square(weight) * d.variance + self._inside(g), n, r, centred=True)
        of_x = of_x + self._of_a_row(r, n, g, m) + self._inside(r * level, 2) + self._noise(dx, "layer_norm")
        of_x = of_x + self._of_parts("layer_norm", r * (g - level), r * n * m)
        of_x = of_x + of_mean * np.square(r * r * (m + n * level)) + of_root * np.square(r * (g - level - 3 * n * m))
        shared = of_mean * r**2 + of_root * np.square(n)
        terms = np.square(n) * d.variance + np.square(d.value) * shared + self._inside(d.value * n)
        of_bias = None
        if bias is not None:
            of_bias = self._over_rows(d.variance, d.value, np.shape(bias), "layer_norm", "layer_norm.sum")
        return [of_x, self._over_rows(terms, d.value * n, weight.shape, "layer_norm", "layer_norm.sum"), of_bias]

    def _of_parts(self, point: str, *parts: np.ndarray) -> Any:
        """What rounding the two gradients of an x that is read twice adds, which are then summed."""
        if self.dtype == "float32" or not self._rounds(f"{point}.parts"):
            return 0.0
        return sum(np.asarray(self._noise(part, f"{point}.parts")) for part in parts)

    def _statistic(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(self._noise(value, "layer_norm.statistics"))

    def _of_a_row(self, r: np.ndarray, n: np.ndarray, g: np.ndarray, m: np.ndarray) -> Any:
        """Float32 noise of r (g - n m), whose terms may cancel, and of the mean m of g n."""
        if self.dtype != "float32":
            return 0.0
        E = n.shape[-1]
        of_mean = self._accumulated(np.full(m.shape, E), m * E, np.square(g * n).sum(axis=-1, keepdims=True)) / E**2
        return self._inside(r * g, _STEPS) + self._inside(r * n * m, _STEPS) + np.square(r * n) * of_mean

    def _over_rows(
        self, variance: np.ndarray, terms: np.ndarray, shape: tuple[int, ...], point: str, every: str = ""
    ) -> np.ndarray:
        """The variance of the sum of terms over all rows that share a weight of this shape. every: the point at which
        the sum is rounded after each row, where it is."""
        variance = np.broadcast_to(variance, terms.shape)
        total, summed = summed_to(terms, shape), summed_to(variance, shape)
        count = np.full(total.shape, max(1, terms.size // max(1, total.size)))
        summed = summed + self._sum_noise(count, total, lambda: summed_to(np.square(terms), shape), point)
        if every and self.dtype != "float32" and self._rounds(every):
            return np.asarray(summed + self._of_a_chain(rows_first(terms, shape), total, every))
        return np.asarray(summed + self._noise(total, point))

    def _of_a_chain(self, terms: np.ndarray, total: np.ndarray, point: str) -> np.ndarray:
        """What rounding a sum over the first axis after every addition adds. The roundings are not independent where
        the sum is so large that it swallows terms; then the error of such a sum itself is more."""
        noise = np.asarray(self._noise(np.cumsum(terms, axis=0)[1:], point)).sum(axis=0)
        running, onto = np.zeros(total.shape, np.float32), rounding(self.dtype)
        for term in terms.astype(np.float32):
            running = onto(running + term)
        return np.maximum(noise, np.square(running - total))

    # ------------------------------------------------------------------------------------------------ RoPE, activations

    def _rope(self, dq: Uncertain, dk: Uncertain, cos: np.ndarray, sin: np.ndarray, *, interleaved: bool) -> Variances:
        q, k = self.rope(dq, dk, certain(cos), certain(-np.asarray(sin)), interleaved=interleaved)
        return [q.variance, k.variance]

    def _to_the_bit_pair(self, *_: Any) -> tuple[None, None]:
        return None, None

    def _activation(self, d: Uncertain, x: np.ndarray, name: str) -> Variances:
        slope = ops.activation_backward(np.ones(np.shape(x)), x, name)
        dx = d.value * slope
        return [np.square(slope) * d.variance + self._of_a_slope(d.value, slope) + self._noise(dx, "activation")]

    def _glu(self, d: Uncertain, gate: np.ndarray, up: np.ndarray, name: str) -> Variances:
        gate, up = np.asarray(gate, np.float64), np.asarray(up, np.float64)
        act = np.asarray(ops.activation(gate, name))
        slope = ops.activation_backward(np.ones(gate.shape), gate, name)
        inner = d.value * up
        of_inner = np.square(up) * d.variance + self._noise(inner, "glu.activation")
        of_gate = np.square(slope) * of_inner + self._of_a_slope(inner, slope) + self._noise(inner * slope, "glu")
        of_act = self._forward._noise(act, "glu.activation") + self._inside(act, 2) + _vanished(act)
        of_act = of_act + np.square(cancels(name, gate))
        return [of_gate, np.square(act) * d.variance + np.square(d.value) * of_act + self._noise(d.value * act, "glu")]

    def _of_a_slope(self, d: np.ndarray, slope: np.ndarray) -> Any:
        size = d * np.maximum(np.abs(slope), _LEAST_SLOPE)
        inside = self._inside(size, _SLOPE_STEPS) + np.square(d) * _vanished(slope)
        if self.dtype != "float32" and "activation.terms" in self.policy.points:
            inside = inside + _SLOPE_STEPS * np.asarray(self._noise(2 * size, "activation.terms"))
        return inside

    # -------------------------------------------------------------------------------------------------------- attention

    def _attention(self, d: Uncertain, q: np.ndarray, k: np.ndarray, v: np.ndarray, **how: Any) -> Variances:
        """Let p = softmax(s), c = dp - sum p dp and ds = p c: an error e of the scores moves ds by
        p_i (e_i - sum p e) c_i - p_i sum_j p_j c_j (e_j - sum p e), and an error f of dp by p_i (f_i - sum p f)."""
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
        scale = how.get("scale") or D**-0.5
        of_q, of_k, of_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
        dk, dv = np.zeros(k.shape), np.zeros(v.shape)
        key_mask, mask, window = (how.get(name) for name in ("key_mask", "mask", "window"))
        dlse = how.pop("dlse", None)
        visible = visible_keys(how.get("causal", True), key_mask, mask, window, (B, H, S, T))
        o, lse = ops.attention(q, k, v, **{**how, "scale": scale}, return_lse=True, ar=self._exact())
        for b, h in np.ndindex(B, H):
            g = h * K // H
            allowed = visible(b, slice(h, h + 1), slice(0, S), T)
            row, keys, do = q[b, h], k[b, g], d.value[b, h]
            p, s = weights_of_head(row[None], keys, scale, allowed, lse[b, h][None], self._exact())
            made = o[b, h], lse[b, h], scale, None if dlse is None else np.asarray(dlse[b, h], np.float64)
            each = _Head(self, p[0], s[0], row, keys, v[b, g], do, d.variance[b, h], *made)
            found = each.variances(dk[b, g], dv[b, g], last=(h + 1) * K % H == 0)
            of_q[b, h] = found[0]
            of_k[b, g] += found[1]
            of_v[b, g] += found[2]
            dk[b, g] += each.ds.T @ row
            dv[b, g] += p[0].T @ do
        return [of_q, of_k + self._noise(dk, "attention"), of_v + self._noise(dv, "attention")]

    def _exact(self) -> Arithmetic:
        """Float64, which gives a query without keys what the policy gives it."""
        return exact_arithmetic(self.policy)

    # ----------------------------------------------------------------------------------------------------------- losses

    def _cross_entropy(self, d: Uncertain, logits: np.ndarray, labels: np.ndarray, **how: Any) -> Variances:
        """Float32 inside, whose log-probabilities are off by their own ulp; and the rounding of what is handed on."""
        logits = np.asarray(logits, np.float64)
        value = ops.cross_entropy_backward(d.value, logits, labels, **how)
        counted = value.any(axis=-1, keepdims=True)
        log_p = logits - logits.max(axis=-1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
        p, each = np.exp(log_p), self._per_row(d.value, labels, how)
        of_p = np.square(p) * (self._ulp(log_p, "float32") ** 2 / 6 + 3 * 2.0**-46 / 12)
        noise = np.square(each) * of_p + self._inside(value)
        return [np.where(counted, noise + self._noise(value, "cross_entropy"), 0)]

    @staticmethod
    def _per_row(d: np.ndarray, labels: np.ndarray, how: dict[str, Any]) -> np.ndarray:
        """What every row's gradient is multiplied with: [N, 1]."""
        counted = labels != how.get("ignore_index", ops.IGNORE_INDEX)
        of = max(1, int(counted.sum())) if how.get("reduction", "mean") == "mean" else 1
        return np.asarray(np.broadcast_to(d, labels.shape)[:, None] / of)

    def _mean_squared_error(self, d: Uncertain, x: np.ndarray, target: np.ndarray) -> Variances:
        value = ops.mean_squared_error_backward(d.value, x, target)
        return [np.asarray(self._inside(value, 2) + self._noise(value, "loss"))]

    def _binary_cross_entropy(self, d: Uncertain, logits: np.ndarray, target: np.ndarray) -> Variances:
        value = ops.binary_cross_entropy_backward(d.value, logits, target)
        size = np.broadcast_to(d.value / max(1, logits.size), logits.shape)
        return [np.asarray(self._inside(size, 2) + self._noise(value, "loss"))]


class _Head:
    """One query head of attention's backward pass: [S, D] against [T, D], at weights p [S, T] of scores s; lse [S] is
    the logarithm of their denominators."""

    def __init__(
        self,
        of: Backward,
        p: np.ndarray,
        s: np.ndarray,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        do: np.ndarray,
        of_do: np.ndarray,
        o: np.ndarray,
        lse: np.ndarray,
        scale: float,
        dlse: np.ndarray | None = None,
    ) -> None:
        self.lse = lse
        self.of, self.p, self.s, self.q, self.k, self.v = of, p, s, q, k, v
        self.do, self.of_do, self.o, self.scale = do, of_do, o, scale
        self.dp = do @ v.T
        extra = 0.0 if dlse is None else dlse[:, None]
        self.c = np.where(p == 0, 0, self.dp - (p * self.dp).sum(axis=-1, keepdims=True) + extra)
        self.ds = scale * p * self.c

    def variances(
        self, dk_before: np.ndarray, dv_before: np.ndarray, last: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The variances of dq, and of this head's part of dk and dv. dk_before, dv_before: the sums over the heads of
        its group that come before it. last: it is the last of them."""
        of, p, ds, square = self.of, self.p, self.ds, np.square
        (of_scores, of_p), of_dp, of_delta = self._of_scores(), self._of_dp(), self._of_delta()
        if of.given_exactly and not of.policy.normalize_first:
            of_delta = of_delta + (square(p * self.c) * of_scores).sum(axis=-1, keepdims=True)
        rounded = self.scale**2 * self._seen(of._noise(ds / self.scale, "attention.scores"))
        if of.policy.normalize_first or of.dtype == "float32":
            rounded = rounded + self._seen(of._noise(ds, "attention.scaled"))
        shared = self._through_softmax(of_scores) + self._centred(of_dp) + square(p) * of_delta
        of_row = self._of_row()
        of_ds = self.scale**2 * shared + rounded + of_row * square(ds)
        dq, dk, dv = ds @ self.k, ds.T @ self.q, p.T @ self.do
        of_q = self.scale**2 * self._of_dq(of_scores, of_dp, of_delta) + rounded @ square(self.k)
        of_q = of_q + of_row * square(dq) + of._noise(dq, "attention")
        of_p = of_p + of_row * square(p)
        of_k, of_v = of_ds.T @ square(self.q), of_p.T @ square(self.do) + square(p).T @ self.of_do
        terms, ones = np.maximum(np.count_nonzero(p, axis=-1, keepdims=True), 1), np.full((len(self.k), 1), len(p))
        of_q = of_q + of._sum_noise(terms, dq, lambda: square(ds) @ square(self.k))
        of_k = of_k + of._sum_noise(ones, dk, lambda: square(ds).T @ square(self.q))
        of_v = of_v + of._sum_noise(ones, dv, lambda: square(p).T @ square(self.do))
        if of.dtype != "float32" and of._rounds("attention.blocks"):
            of_k = of_k + self._of_blocks(dk_before, ds, self.q, last)
            of_v = of_v + self._of_blocks(dv_before, p, self.do, last)
        elif dk_before.any() or not last:  # a group of several
            of_k, of_v = of_k + of._noise(dk, "attention.heads"), of_v + of._noise(dv, "attention.heads")
        return of_q, of_k, of_v

    def _of_dq(self, of_scores: np.ndarray, of_dp: np.ndarray, of_delta: np.ndarray) -> np.ndarray:
        """The errors of a row of ds have sums in common, so that they meet k less its mean under p: one of dp at j
        comes as p_j (k_j - mean), one of a score as p_j (c_j (k_j - mean) - sum p c k), one of delta as the mean."""
        p, c, k, square = self.p, self.c, self.k, np.square
        mean, along = p @ k, (p * c) @ k

        def spread(weights: np.ndarray) -> np.ndarray:
            total = weights.sum(axis=-1, keepdims=True)
            return np.maximum(weights @ square(k) - 2 * mean * (weights @ k) + square(mean) * total, 0)

        V, W = square(p) * of_scores, square(p) * of_scores * c
        out = spread(square(p) * of_dp) + spread(W * c) + square(along) * V.sum(axis=-1, keepdims=True)
        cross = W @ k - mean * W.sum(axis=-1, keepdims=True)
        return np.maximum(out - 2 * along * cross, 0) + of_delta * square(mean)

    def _of_blocks(self, total: np.ndarray, w: np.ndarray, x: np.ndarray, last: bool) -> np.ndarray:
        """What rounding the sum after every block of queries adds to it, but for the very last time."""
        step, added = queries_per_block(len(w)), np.zeros(total.shape)
        for start in range(0, len(w), step):
            total = total + w[start : start + step].T @ x[start : start + step]
            if not last or start + step < len(w):
                added += np.asarray(self.of._noise(total, "attention.blocks"))
        return added

    def _of_row(self) -> np.ndarray:
        """The relative variance of the weights of a row that are made again of its log-sum-exp, in float32."""
        lse = np.where(np.isfinite(self.lse), self.lse, 0)[:, None]
        if self.of.dtype != "float32" or self.of.policy.normalize_first:
            return np.zeros(lse.shape)
        return np.asarray(2 * self.of._ulp(lse, "float32") ** 2 / 12)

    def _of_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """The variance of the scores that are made again, or were kept; and of the weights that meet the gradient."""
        forward = self.of._forward
        q, k = certain(self.q), certain(self.k)
        of_scores = sum(forward._score_variance(q, k, self.s, self.p, self.scale), start=np.zeros(self.p.shape))
        seen = self.p > 0
        if self.of.dtype == "float32" and not self.of.policy.normalize_first:
            of_scores = of_scores + _OF_AN_EXPONENTIAL
        of_scores = np.where(seen, of_scores, 0)
        rounded = np.minimum(forward._noise(self.p, "attention.weights"), np.square(1 - self.p))
        of_p = forward._probs_variance(self.p, of_scores) + forward._inside(self.p, 3) + np.where(seen, rounded, 0)
        return of_scores, of_p + np.square(self.p) * forward._total_noise(self.p)

    def _through_softmax(self, of_scores: np.ndarray) -> np.ndarray:
        p, c, V = self.p, self.c, of_scores
        a, b, e = ((np.square(p) * V * x).sum(axis=-1, keepdims=True) for x in (1, c, np.square(c)))
        out = np.square(p) * (np.square(c) * V * (1 - 4 * p) + np.square(c) * a + 2 * c * b + e)
        return np.maximum(out, 0)

    def _of_dp(self) -> np.ndarray:
        """What dp = do v^T hands on and adds."""
        of, square = self.of, np.square
        V = self.of_do @ square(self.v).T + self._seen(of._noise(self.dp, "attention.weights"))
        terms = np.array([[self.v.shape[-1]]])
        return np.asarray(V + of._sum_noise(terms, self.dp, lambda: square(self.do) @ square(self.v).T))

    def _centred(self, V: np.ndarray) -> np.ndarray:
        """The variance of p (e - sum p e) for errors e of variance V."""
        p = self.p
        shared = (np.square(p) * V).sum(axis=-1, keepdims=True)
        return np.asarray(np.square(p) * np.maximum(V * (1 - 2 * p) + shared, 0))

    def _of_delta(self) -> np.ndarray:
        """The variance of sum p dp, which a row shares, beyond that of dp: of its sum in float32; and where it is made
        of the output, of the rounding of that and of the product do v^T beside it."""
        of, square = self.of, np.square
        eager = of.policy.normalize_first
        terms = self.p * self.dp if eager else self.do * self.o
        delta = terms.sum(axis=-1, keepdims=True)
        if of.dtype == "float32":
            count = np.full(delta.shape, terms.shape[-1])
            return of._accumulated(count, delta, square(terms).sum(axis=-1, keepdims=True)) * (1 if eager else 2)
        if eager:
            return np.zeros(delta.shape)
        alone = self.p.max(axis=-1, keepdims=True, initial=0) == 1
        of_o = np.where(alone, 0, of._forward._noise(self.o, "attention"))
        return np.asarray((square(self.do) * of_o).sum(axis=-1, keepdims=True))

    def _seen(self, noise: Any) -> np.ndarray:
        return np.where(self.p > 0, noise, 0)


def _vanished(value: np.ndarray) -> np.ndarray:
    """The square of what is so small that the e^-x in it is beyond float32, so that it is 0 there."""
    return np.where(np.abs(value) < VANISHED, np.square(value), 0)


def exact_arithmetic(policy: Policy) -> Arithmetic:
    """Float64 that rounds nothing; a query without keys gets what it gets under `policy`."""
    native = replace(EXACT.policy, masked_rows_are_zero=policy.masked_rows_are_zero)
    return replace(EXACT, policy=native)


def _in_rows(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).reshape(-1, np.shape(x)[-1])
