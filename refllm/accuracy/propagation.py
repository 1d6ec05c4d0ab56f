"""Predicted rounding error: a model page run on values that carry the variance of their rounding error.

A page is written in calls to operators and does not look into the arrays that it passes on. Here it is run with
`Propagation` in place of `refllm.forward.operators.Operators` and `Uncertain` in place of arrays: beside each exact
value goes the variance of the error that an implementation in the given format makes under the given policy. The
propagation is of first order: an operator with Jacobian J turns the variances V of its inputs into J^2 V (errors taken
as independent), and each rounding point adds ulp(y)^2 / 12, the variance of a uniform error of half an ulp to either
side.

The square root of the variance is the sigma in which errors are reported. Nothing in it is calibrated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from refllm import ops
from refllm.parallel import blocks, for_each
from refllm.precision import EXACT, Arithmetic, Dtype, Policy

_FRACTION_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
_LEAST_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126}
_EXPONENT_BITS = np.uint64(0x7FF << 52)  # of a float64

_MEAN_SQUARE_ULP = 0.541  # the mean of (ulp / value)^2 over a binade, in ulp(1)^2
CHAIN = 256
"""Terms of a matrix product that are added one after another."""
_FLOAT32_ULP = 2.0**-23
_ONE_ADDITION = _MEAN_SQUARE_ULP * _FLOAT32_ULP**2 / 12  # relative variance
_AT_ONCE = 1 << 19  # numbers of a weight: 4 MiB as float64, which stay in cache from one product to the next
LANES = 16
"""Partial sums that every vectorised reduction keeps."""
_ONE_PLUS_NOTHING = 17.4  # -log of half a float32 ulp of 1
VANISHED = 2.0**-121  # about the largest |silu(x)| for which e^-x is beyond float32, so that the result is 0
_ROOT_STEPS = 4  # float32 roundings of a norm's mean, of eps added, of the root and of its reciprocal


BLOCKS, ONE_CHAIN, ONE_PASS = "in blocks", "in one chain", "in one chain, the variance in one pass"
"""Orders in which the float32 sums inside an operator are added: the ends of what honest code does, and the variance
of a LayerNorm as E x^2 - (E x)^2."""

HERE = ""
"""The key in `Uncertain.shares` of what was added since the last named value."""


@dataclass(frozen=True)
class Uncertain:
    """value: exact, float64. variance: of the error, float32, same shape.

    shares: named value -> the part of the mean variance that was added by the operators up to that name and after the
    names before it. The parts sum to 1.
    rounded: what an implementation has that rounds where the policy says, to the bit. It is known in the narrow formats
    after operators whose float32 arithmetic is too exact to matter (norms, RoPE, activations, sums of two), as long as
    their inputs are known; None elsewhere.
    before: the same value before its last rounding, where a reader may find that instead (`refllm.accuracy.profiled`).
    sum_of: of a sum, its two terms. spoilt: the candidate has an infinity or NaN in it, or in what it was made of.
    """

    value: np.ndarray
    variance: np.ndarray
    shares: dict[str, float] = field(default_factory=dict)
    rounded: np.ndarray | None = None
    before: "Uncertain | None" = None
    sum_of: "tuple[Uncertain, Uncertain] | None" = None
    spoilt: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __getitem__(self, index: Any) -> "Uncertain":
        return self.map(lambda values: values[index])

    def map(self, view: Callable[[np.ndarray], np.ndarray]) -> "Uncertain":
        """The same numbers, moved: `view` is applied to values and variances."""
        rounded = None if self.rounded is None else view(self.rounded)
        before = None if self.before is None else self.before.map(view)
        return Uncertain(view(self.value), view(self.variance), self.shares, rounded, before, spoilt=self.spoilt)

    def named(self, name: str) -> "Uncertain":
        """The same value; what was added since the last name is attributed to this one."""
        shares = dict(self.shares)
        shares[name] = shares.pop(HERE, 0.0) + shares.get(name, 0.0)
        return replace(self, shares=shares)

    @property
    def sigma(self) -> np.ndarray:
        return np.sqrt(self.variance)


def certain(value: np.ndarray) -> Uncertain:
    """A value that both sides have exactly."""
    value = np.asarray(value, np.float64)
    return Uncertain(value, np.zeros(value.shape, np.float32))


def ulp(value: np.ndarray, dtype: Dtype, width: type[np.floating] = np.float32) -> np.ndarray:
    """Distance of neighbouring numbers of `dtype` at `value`, as `width`; 0 where the value is 0, and that of 1/2 where
    it is not finite."""
    spacing = np.array(value, np.float64)
    bits = spacing.view(np.uint64)
    bits &= _EXPONENT_BITS  # 2^exponent, with |value| in [1, 2) * 2^exponent
    if np.maximum.reduce(spacing, axis=None, initial=0) == np.inf:
        np.copyto(spacing, 0.5, where=spacing == np.inf)
    np.maximum(spacing, 2.0 ** _LEAST_EXPONENT[dtype], out=spacing)
    spacing *= 2.0 ** -_FRACTION_BITS[dtype]
    spacing *= np.not_equal(value, 0)  # several times as fast as np.where, whose branches nobody foresees
    return spacing.astype(width)


def _activation_steps(name: str, x: np.ndarray) -> Any:
    """Float32 roundings before the last one: of the exponential and of the sum; none where all is one product, or where
    1 + e^-x is 1."""
    if name in ("linear", "relu", "relu2", "relu6", "leaky_relu"):
        return 0
    return np.where(x > _ONE_PLUS_NOTHING, 0, 2) if name in ("silu", "swish") else 2


def cancels(name: str, x: np.ndarray) -> np.ndarray:
    """How far off float32 puts act(x), as a standard deviation, where it is 1 + erf or 1 + tanh of what is near -1:
    those are off by a step of float32 below 1, and so is the little that is left. x: [...] -> [...]; else 0."""
    if "gelu" in name and name != "quick_gelu":
        return np.where(x < 0, np.abs(x) / 2 * 2.0**-24, 0.0)
    return np.full(x.shape, 2.0**-25) if name == "laplace" else np.zeros(x.shape)


def _terms(x: np.ndarray) -> np.ndarray:
    """How many products of a row of x with anything are not 0, at least 1: [..., n] -> [..., 1]."""
    return np.maximum(np.count_nonzero(x, axis=-1, keepdims=True), 1)


def sum_noise(terms: int, total: Any, largest: Any, spread: Any = 0.0, left_over: float = 0.0) -> Any:
    """Variance of the float32 sum of `terms` numbers: [...] -> [...]. total: the sum. largest: the number farthest out.
    spread: the sum of squares of the numbers less their mean; 0 where all have one sign. left_over: how many numbers do
    not fill a vector and are added to the whole one by one.

    Numbers are added one by one in chains of at most 16, then chains are added in pairs (NumPy, Torch and GPUs differ
    in details). All additions after the largest number round at its size; without it partial sums are a part of the
    total, of the same part of the spread, or both.
    """
    chain = min(LANES, -(-terms // LANES))
    levels = np.log2(max(1, terms) / max(1, chain))
    squares = np.square(total - largest) * (chain**2 / (3 * max(1, terms)) + 2 + left_over)
    squares = squares + np.square(largest) * (chain + levels) + spread * (chain / 2 + levels)
    return squares * _MEAN_SQUARE_ULP * _FLOAT32_ULP**2 / 12


class _SquareOf:
    """W*W, made when it is asked for: not where no error comes in and none is made by adding."""

    def __init__(self, weight: np.ndarray, width: type[np.floating]) -> None:
        self._weight, self._width = weight, width

    @cached_property
    def transposed(self) -> np.ndarray:
        """[O, I] -> [I, O]."""
        return np.square(np.asarray(self._weight, self._width)).T

    def times(self, x: np.ndarray) -> np.ndarray:
        """x (W*W)^T: [..., I] -> [..., O]."""
        return x @ self.transposed


Substitute = Callable[[str, Uncertain], Uncertain]


class Propagation:
    """The operators of a page on `Uncertain` values, for an implementation in `dtype` under `policy`.

    at_tap: called with (name, value) at every named value; what it returns is passed on in its place. It sees the
    predicted error, and it can put a candidate's own value there, so that the next operator is judged alone.
    """

    order: str = BLOCKS
    """The order in which float32 sums are added."""

    width: type[np.floating] = np.float32
    """What variances are held in. float32 is enough for the values of a model; the square of a float32 ulp of 1e-20 is
    not a float32 any more (`refllm.accuracy.operator`)."""

    def __init__(
        self, dtype: Dtype, policy: Policy, at_tap: Substitute, wants: Callable[[str], bool], scope: str = ""
    ) -> None:
        self.dtype, self.policy, self.at_tap, self.wants, self.scope = dtype, policy, at_tap, wants, scope
        self.ar = EXACT
        # The order of sums does not matter here: it moves a float32 value by less than 1/1000 of a narrow ulp.
        self._emulated = Arithmetic(dtype, replace(policy, torch_order=False))

    def within(self, scope: str) -> "Propagation":
        return Propagation(self.dtype, self.policy, self.at_tap, self.wants, f"{scope}.")

    def tap(self, name: str, x: Uncertain) -> Uncertain:
        x = x.named(self.scope + name)
        return self.at_tap(self.scope + name, x) if self.wants(self.scope + name) else x

    # --------------------------------------------------------------------------------------------------------- rounding

    def _ulp(self, value: np.ndarray, dtype: Dtype) -> np.ndarray:
        return ulp(value, dtype, self.width)

    def _rounds(self, point: str) -> bool:
        return self.dtype == "float32" or point in self.policy.points

    def _noise(self, value: np.ndarray, point: str) -> np.ndarray | float:
        """Variance that rounding `value` at `point` adds."""
        if not self._rounds(point):
            return self._ulp(value, "float32") ** 2 / 12  # what is held in float32 here is no better than that
        return self._ulp(value, self.dtype) ** 2 / 12

    def _inside(self, value: np.ndarray, steps: Any = 1) -> np.ndarray | float:
        """Variance of `steps` float32 roundings of about `value`, inside a kernel: nothing beside a narrower format."""
        return steps * self._ulp(value, "float32") ** 2 / 12 if self.dtype == "float32" else 0.0

    def _sum_noise(
        self, terms: np.ndarray, value: np.ndarray, square_sum: Callable[[], np.ndarray], point: str | None = None
    ) -> np.ndarray | float:
        """Variance of accumulating `terms` products other than 0 in float32 to `value`; square_sum(): of their squares.

        Nothing beside a narrower format to which the sum is rounded, at `point` if that is given.
        Every addition rounds a partial sum. In random order the k-th of n partial sums has mean (k / n) s and variance
        k (n - k) / n^2 (Q - s^2 / n), s the sum and Q the sum of squares: the mean of its square over k is
        s^2 / 3 + (Q - s^2 / n) / 6. A sum is kept as m chains, and then the chains are added.
        """
        if self.dtype != "float32" and (point is None or self._rounds(point)):
            return 0.0
        return self._accumulated(terms, value, square_sum())

    def _accumulated(self, terms: np.ndarray, value: np.ndarray, square_sum: np.ndarray) -> np.ndarray:
        chain = np.minimum(terms, CHAIN) if self.order == BLOCKS else terms
        chains = terms / chain
        square = np.square(value, dtype=self.width)
        drift, spread = square / 3, np.maximum(square_sum - square / terms, 0) / 6
        squares = chain * (drift / chains + spread) + (chains - 1) * (drift + spread)
        return _MEAN_SQUARE_ULP * _FLOAT32_ULP**2 / 12 * squares

    def _result(self, value: np.ndarray, inherited: list[tuple[Uncertain, Any]], added: Any) -> Uncertain:
        """value with the variance that its inputs hand on, (input, variance) each, and the variance added here."""
        parts = [np.asarray(variance, self.width) for _, variance in inherited]
        variance = np.zeros(value.shape, self.width)
        for part in (*parts, np.asarray(added, self.width)):
            variance += part
        total = float(variance.mean(dtype=np.float64)) if variance.size else 0.0
        shares: dict[str, float] = {}
        if total > 0:
            for (source, _), part in zip(inherited, parts, strict=True):
                weight = float(part.mean(dtype=np.float64)) / total
                for name, share in source.shares.items():
                    shares[name] = shares.get(name, 0.0) + weight * share
            shares[HERE] = shares.get(HERE, 0.0) + max(0.0, 1.0 - sum(shares.values()))
        return Uncertain(value, variance, shares)

    def _to_the_bit(self, function: Callable[..., np.ndarray], *inputs: Uncertain) -> np.ndarray | None:
        """function(*arrays, ar=...) in the emulated format, if that is a narrow one and the inputs are known."""
        if self.dtype == "float32":
            return None
        known = [self._known(x) for x in inputs]
        if any(x is None for x in known):
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            return function(*known, ar=self._emulated)

    @staticmethod
    def _known(x: Uncertain) -> np.ndarray | None:
        if x.rounded is not None:
            return x.rounded
        return None if x.variance.any() else x.value.astype(np.float32)

    # ------------------------------------------------------------------------------------------------ products and sums

    def linear(self, x: Uncertain, weight: np.ndarray, bias: np.ndarray | None = None) -> Uncertain:
        """V(x W^T) = V_x (W*W)^T."""
        value = np.empty((*x.shape[:-1], len(weight)))
        variance, added = (np.zeros(value.shape, self.width) for _ in range(2))
        squared, terms, inherits = np.square(x.value, dtype=self.width), _terms(x.value), bool(x.variance.any())

        def rows(block: slice) -> None:
            some = weight[block]
            square = _SquareOf(some, self.width)
            value[..., block] = ops.linear(x.value, some, None if bias is None else bias[block])
            if inherits:
                variance[..., block] = square.times(x.variance)
            product = value[..., block] if bias is None else value[..., block] - bias[block]
            accumulated = self._sum_noise(terms, product, partial(square.times, squared))
            before_bias = 0.0 if bias is None else self._inside(product)
            added[..., block] = accumulated + before_bias + self._noise(value[..., block], "linear")

        # In blocks of rows of the weight, which would else be copied as float64 whole.
        step = max(64, _AT_ONCE // max(1, weight.shape[1]) // 64 * 64)
        if len(weight) <= step:
            rows(slice(None))
        else:
            for_each(rows, blocks(len(weight), step))
        return self._result(value, [(x, variance)], added)

    def add(self, x: Uncertain, y: Uncertain) -> Uncertain:
        """V(a + b) = V_a + V_b.

        a and b lie on the format's grid, and so does their sum, on the finer of their two spacings g: it is rounded
        only where its own spacing u is wider, and then halves of u occur, with the variance u^2 / 12 + g^2 / 6. It is
        never off by more than the smaller of the two, since the other one alone lies on the grid.
        """
        value = x.value + y.value
        added: Any = 0.0
        if self._rounds("add"):
            added = self._sum_rounding(value, x.value, y.value)
        out = self._result(value, [(x, x.variance), (y, y.variance)], added)
        return replace(out, rounded=self._to_the_bit(ops.add, x, y))

    def _sum_rounding(self, value: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        u, v, w = (self._ulp(a, self.dtype) for a in (value, x, y))
        g = np.minimum(v, w)
        smaller = np.minimum(np.abs(x), np.abs(y))
        return np.where(u > g, np.minimum(u**2 / 12 + g**2 / 6, np.square(smaller)), 0)

    def split_heads(self, x: Uncertain, heads: int) -> Uncertain:
        return x.map(lambda a: ops.split_heads(a, heads))

    def merge_heads(self, x: Uncertain) -> Uncertain:
        return x.map(ops.merge_heads)

    # ------------------------------------------------------------------------------------------------------------ norms

    def rms_norm(self, x: Uncertain, weight: np.ndarray, eps: float) -> Uncertain:
        """J_ij = (w_i / r) (delta_ij - y_i y_j / n), with y = x / r and r the root mean square."""
        scale = 1 / np.sqrt(np.mean(x.value**2, axis=-1, keepdims=True) + eps)
        y = x.value * scale
        handed_on = self._projected(x.variance, y, scale, centred=False)
        added = self._noise(y, "rms_norm.normalized") + self._inside(y, _ROOT_STEPS) + self._root_of_one_chain(y)
        out = self._weighted(x, y, handed_on, added, weight, None, "rms_norm")
        return replace(out, rounded=self._to_the_bit(partial(ops.rms_norm, weight=weight, eps=eps), x))

    def layer_norm(self, x: Uncertain, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Uncertain:
        """J_ij = (w_i / s) (delta_ij - (1 + y_i y_j) / n), with y = (x - mean) / s and s the standard deviation."""
        mean = x.value.mean(axis=-1, keepdims=True)
        centred = x.value - mean
        scale = 1 / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
        y = centred * scale
        handed_on = self._projected(x.variance, y, scale, centred=True)
        added = self._inside(y, _ROOT_STEPS) + np.square(scale) * self._mean_noise(x.value, mean)
        added = added + self._root_of_one_chain(y) + self._moments_of_one_chain(y, mean, scale)
        out = self._weighted(x, y, handed_on, added, weight, bias, "layer_norm")
        return replace(out, rounded=self._to_the_bit(partial(ops.layer_norm, weight=weight, bias=bias, eps=eps), x))

    def _mean_noise(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """The noise of the mean of a row of x in float32, whatever the format. All of the row shift by it; beside a
        mean of 1000 standard deviations it is what limits a LayerNorm."""
        n = x.shape[-1]
        far = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
        spread = np.square(x - mean).sum(axis=-1, keepdims=True) - np.square(far - mean)
        summed = sum_noise(n, mean * n, far, spread) / n**2
        return np.asarray(summed + self._ulp(mean, "float32") ** 2 / 12, self.width)

    def _root_of_one_chain(self, y: np.ndarray) -> np.ndarray | float:
        """What a mean of squares adds whose n terms are added one after another: its k-th addition rounds at k / n of
        the sum, and the root halves the error."""
        if self.order == BLOCKS or self.dtype != "float32":
            return 0.0
        return np.square(y) * (y.shape[-1] / 12) * _ONE_ADDITION

    def _moments_of_one_chain(self, y: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray | float:
        """The same of the mean, and of a variance made of E x^2 and (E x)^2, whose difference keeps their errors."""
        if self.order == BLOCKS or self.dtype != "float32":
            return 0.0
        n, square, variance = y.shape[-1], np.square(mean), 1 / np.square(scale)
        added = n * (square / 3 + variance / 6) / variance * _ONE_ADDITION
        if self.order == ONE_PASS:
            lanes, relative = 8 + n / 64, (square + variance) / variance
            added = added + np.square(y * relative) / 4 * (5 * lanes + 4) * _ONE_ADDITION
            added = added + square / variance * (lanes + 2) * _ONE_ADDITION
        return np.asarray(added)

    @staticmethod
    def _projected(variance: np.ndarray, y: np.ndarray, scale: np.ndarray, *, centred: bool) -> np.ndarray:
        """sum_j J_ij^2 V_j without the weight; a norm takes away what lies along y (and along the mean, if centred)."""
        n, c = y.shape[-1], float(centred)
        total = variance.sum(axis=-1, keepdims=True) * c
        first = (y * variance).sum(axis=-1, keepdims=True) * 2 * c
        second = (y * y * variance).sum(axis=-1, keepdims=True)
        out = variance * (1 - 2 * (c + y * y) / n) + (total + y * first + y * y * second) / n**2
        return np.square(scale) * np.maximum(out, 0)

    def _weighted(
        self, x: Uncertain, y: np.ndarray, handed_on: Any, added: Any, weight: np.ndarray, bias: Any, point: str
    ) -> Uncertain:
        square, value = np.square(weight), y * weight
        added = added * square + self._inside(value)
        value = value if bias is None else value + bias
        return self._result(value, [(x, handed_on * square)], added + self._noise(value, point))

    # ------------------------------------------------------------------------------------------------------------- RoPE

    def rope(
        self, q: Uncertain, k: Uncertain, cos: Uncertain, sin: Uncertain, *, interleaved: bool
    ) -> tuple[Uncertain, Uncertain]:
        """V(a c - b s) = c^2 V_a + s^2 V_b + a^2 V_c + b^2 V_s."""
        rotated = [self._rotate(x, cos, sin, interleaved) for x in (q, k)]
        both = self._to_the_bit_pair(q, k, cos, sin, interleaved)
        q_out, k_out = (replace(x, rounded=bits) for x, bits in zip(rotated, both, strict=True))
        return q_out, k_out

    def _to_the_bit_pair(
        self, q: Uncertain, k: Uncertain, cos: Uncertain, sin: Uncertain, interleaved: bool
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        known = [self._known(x) for x in (q, k, cos, sin)]
        if self.dtype == "float32" or any(x is None for x in known):
            return None, None
        return ops.rope(*known, interleaved=interleaved, ar=self._emulated)  # type: ignore[arg-type]

    def _rotate(self, x: Uncertain, cos: Uncertain, sin: Uncertain, interleaved: bool) -> Uncertain:
        half = cos.shape[-1]
        first, second = slice(0, half), slice(half, 2 * half)
        if interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = x[..., first], x[..., second]
        c, s = (t.map(lambda table: table[..., None, :, :]) for t in (cos, sin))
        value, inherited, added = x.value.copy(), x.variance.copy(), np.zeros(x.shape, self.width)
        for lanes, (u, v, sign) in ((first, (a, b, -1)), (second, (b, a, 1))):
            one, two = u.value * c.value, sign * v.value * s.value
            value[..., lanes] = one + two
            inherited[..., lanes] = c.value**2 * u.variance + s.value**2 * v.variance
            added[..., lanes] = u.value**2 * c.variance + v.value**2 * s.variance
            added[..., lanes] += self._turning_noise((one, c.value), (two, s.value))
        return self._result(value, [(x, inherited)], added)

    def _turning_noise(self, *products: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Variance of two products and their sum. products: (of a dim and its table, the table)."""
        (one, _), (two, _) = products
        noise = self._noise(one, "rope.product") + self._noise(two, "rope.product")
        return np.asarray(noise + self._noise(one + two, "rope"))

    # -------------------------------------------------------------------------------------------------------- attention

    def attention(self, q: Uncertain, k: Uncertain, v: Uncertain, **masking: Any) -> Uncertain:
        """V(o) = sum_j P_j^2 V_vj + sum_j P_j^2 V_sj (v_j - o)^2 + sum_j V_Pj v_j^2, head by head.

        V_s = scale^2 (V_q k^2 + q^2 V_k) and what rounding the scores adds; V_P is the rounding of the weights.
        Centring v by o, which the derivative of softmax does, is what keeps the prediction tight.
        """
        return self.attention_and_lse(q, k, v, **masking)[0]

    def attention_and_lse(
        self, q: Uncertain, k: Uncertain, v: Uncertain, *, scale: float | None = None, **masking: Any
    ) -> tuple[Uncertain, Uncertain]:
        """`attention`, and the logarithm of the softmax's denominator: V(lse) = sum_j P_j^2 V_sj, and float32 noise."""
        (B, H, S, D), K = q.shape, k.shape[1]
        scale = D**-0.5 if scale is None else scale
        kept: dict[str, np.ndarray] = {}

        def keep(name: str, values: np.ndarray) -> np.ndarray:
            kept[name] = values
            return values

        value, lse = ops.attention(q.value, k.value, v.value, tap=keep, return_lse=True, scale=scale, **masking)
        from_v, from_scores, added = (np.empty(value.shape, self.width) for _ in range(3))
        V_s, V_p = (np.empty((B, H, S, k.shape[2]), self.width) for _ in range(2))
        V_lse = np.empty((B, H, S), self.width)
        parts_BH3 = np.zeros((B, H, 3))  # of the scores' variance: handed on by q, by k, added here

        def head(at: tuple[int, int]) -> None:
            (b, h), g = at, at[1] * K // H
            probs = kept["probs"][b, h]
            squared = np.square(probs)
            by_q, by_k, here = self._score_variance(q[b, h], k[b, g], kept["scores"][b, h], probs, scale)
            weights, of_total = self._weight_noise(probs), self._total_noise(probs)
            V_s[b, h] = by_q + by_k + here
            V_p[b, h] = self._probs_variance(probs, V_s[b, h]) + weights + squared * of_total
            parts_BH3[b, h] = [float((squared * part).sum()) for part in (by_q, by_k, here)]
            value_v, o = v.value[b, g], value[b, h]
            V_lse[b, h] = (squared * V_s[b, h]).sum(axis=-1) + self._log_noise(probs, lse[b, h])
            A, square_v = squared * V_s[b, h], np.square(value_v)
            from_v[b, h] = squared @ v.variance[b, g]
            spread = A @ square_v - 2 * o * (A @ value_v) + o**2 * A.sum(axis=-1, keepdims=True)
            from_scores[b, h] = np.maximum(spread, 0)
            added[b, h] = weights @ square_v + o**2 * of_total
            added[b, h] += self._sum_noise(_terms(probs), o, partial(np.matmul, squared, square_v))

        for_each(head, np.ndindex(B, H))
        self.tap("self_attn.scores", self._result(kept["scores"], [], V_s))
        self.tap("self_attn.probs", self._result(kept["probs"], [], V_p))
        parts = sum(parts_BH3.reshape(-1, 3), start=np.zeros(3))
        by_q, by_k, here = parts / max(parts.sum(), np.finfo(float).tiny)
        inherited = [(v, from_v), (q, from_scores * by_q), (k, from_scores * by_k)]
        out = self._result(value, inherited, added + from_scores * here + self._noise(value, "attention"))
        return out, self._result(lse, [], V_lse)

    def _score_variance(
        self, q: Uncertain, k: Uncertain, scores: np.ndarray, probs: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Variance of the scaled scores [S, T]: handed on by q, by k, and added by rounding. probs: their softmax."""
        square_q, square_k = (np.square(x.value).astype(self.width) for x in (q, k))
        product = scores / (scale or 1.0)
        added = self._sum_noise(_terms(q.value), product, lambda: square_q @ square_k.T, "attention.scores")
        added = scale**2 * (
            added + self._noise(product, "attention.scores") + self._query_noise(q.value, square_k, scale)
        )
        # What exp is taken of: the score less the largest one that the row sees.
        largest = np.maximum(probs.max(axis=-1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
        below = np.log(np.where(probs > 0, probs / largest, 1))
        twice = self.dtype != "float32" and "attention.scores" in self.policy.points and np.frexp(scale)[0] == 0.5
        scaled = 0.0 if twice else self._noise(scores, "attention.scaled")  # a power of two moves no digit
        added = added + scaled + self._inside(below)
        added = np.broadcast_to(np.asarray(added, self.width), scores.shape)
        return scale**2 * (q.variance @ square_k.T), scale**2 * (square_q @ k.variance.T), added

    def _query_noise(self, q: np.ndarray, square_k: np.ndarray, scale: float) -> np.ndarray | float:
        """What rounding q times the scale does to q k; nothing where the scale is a power of two."""
        if self.dtype == "float32" or "attention.query" not in self.policy.points or np.frexp(scale)[0] == 0.5:
            return 0.0
        return (self._ulp(q * scale, self.dtype) ** 2 / (12 * scale**2)) @ square_k.T

    def _weight_noise(self, probs: np.ndarray) -> np.ndarray:
        """Noise of rounding the softmax weights. What is 1 is exact, and what is close to it goes no further than 1.

        The weights that are rounded are normalised, or relative to the largest of the row and divided by their sum
        afterwards (`Policy.normalize_first`).
        """
        noise: Any = 0.0
        if self._rounds("attention.weights"):
            largest = 1.0
            if not self.policy.normalize_first:
                largest = np.maximum(probs.max(axis=-1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
            weights = probs / largest
            noise = np.minimum(self._ulp(weights, self.dtype) ** 2 / 12, (1 - weights) ** 2) * np.square(largest)
        return np.broadcast_to(np.asarray(noise + self._inside(probs, 3), self.width), probs.shape)

    def _total_noise(self, probs: np.ndarray) -> np.ndarray | float:
        """Relative variance of the softmax's denominator, which all weights of a row share: float32 only.

        The denominator is 1 / (largest weight), as the largest exponential is 1. Every lane adds its part of the row
        one by one, then the lanes are added; where one key has most of the weight each addition rounds at full size.
        """
        if self.dtype != "float32":
            return 0.0
        total = 1 / np.maximum(probs.max(axis=-1, keepdims=True, initial=0), np.finfo(self.width).tiny)
        additions = probs.shape[-1] / LANES + np.log2(LANES)
        chain = 0.0 if self.order == BLOCKS else probs.shape[-1] / 3 * _ONE_ADDITION
        return additions * (self._ulp(total, "float32") / total) ** 2 / 12 + chain

    def _log_noise(self, probs: np.ndarray, lse: np.ndarray) -> np.ndarray:
        """The noise of log(sum e^below) + largest score in float32, whatever the format: of the sum, of the logarithm,
        of both together. lse [...] of weights [..., T]; 0 where there is no key."""
        weights = probs.max(axis=-1, initial=0)
        denominator = 1 / np.where(weights > 0, weights, 1)
        log = np.log(denominator)
        noise = sum_noise(probs.shape[-1], 1.0, weights)
        noise = noise + (self._ulp(log, "float32") ** 2 + self._ulp(lse - log, "float32") ** 2) / 12
        return np.where(weights > 0, noise + self._ulp(lse, "float32") ** 2 / 12, 0)

    def _probs_variance(self, probs: np.ndarray, V_s: np.ndarray) -> np.ndarray:
        """dP_i = P_i (ds_i - sum_j P_j ds_j)."""
        shared = (np.square(probs) * V_s).sum(axis=-1, keepdims=True)
        return np.asarray(np.square(probs) * np.maximum(V_s * (1 - 2 * probs) + shared, 0), self.width)

    # -------------------------------------------------------------------------------------------------------------- MLP

    def activation(self, x: Uncertain, name: str) -> Uncertain:
        """V(f(x)) = f'(x)^2 V_x."""
        value, slope = self._activated(x.value, name)
        added = self._activation_noise(x.value, value, name) + self._noise(value, "activation")
        handed_on = slope**2 * x.variance + (self._kink(x) if name == "relu2" else 0.0)
        out = self._result(value, [(x, handed_on)], added)
        return replace(out, rounded=self._to_the_bit(partial(ops.activation, name=name), x))

    @staticmethod
    def _kink(x: Uncertain) -> np.ndarray:
        """The second-order part of the variance of max(x, 0)^2. Just below 0 the slope is 0, and yet an error of x may
        carry it over: at 0 itself the square of its square has the mean 1.5 V^2, and farther off such an error is
        rarer."""
        distance = np.square(x.value) / np.maximum(2 * x.variance, np.finfo(np.float32).tiny)
        return np.asarray(1.5 * np.square(x.variance) * np.exp(-np.minimum(distance, 80)), x.variance.dtype)

    def glu(self, gate: Uncertain, up: Uncertain, name: str) -> Uncertain:
        """V(f(g) u) = (f'(g) u)^2 V_g + f(g)^2 V_u."""
        act, slope = self._activated(gate.value, name)
        value = act * up.value
        added = up.value**2 * (
            self._noise(act, "glu.activation") + self._activation_noise(gate.value, act, name)
        ) + self._noise(value, "glu")
        inherited = [(gate, (slope * up.value) ** 2 * gate.variance), (up, act**2 * up.variance)]
        out = self._result(value, inherited, added)
        return replace(out, rounded=self._to_the_bit(partial(ops.glu, name=name), gate, up))

    def _activation_noise(self, x: np.ndarray, act: np.ndarray, name: str) -> Any:
        vanished = np.where(np.abs(act) < VANISHED, np.square(act), 0)
        return vanished + self._inside(act, _activation_steps(name, x))

    @staticmethod
    def _activated(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """f(x), and f'(x) by central differences: exact enough for a variance, and true for every activation."""
        step = 1e-5 * np.maximum(1, np.abs(x))
        slope = (ops.activation(x + step, name) - ops.activation(x - step, name)) / (2 * step)
        return ops.activation(x, name), slope

    # ----------------------------------------------------------------------------------------------------------- tables

    def table(self, float32: np.ndarray) -> Uncertain:
        """A rotary table, made in float32 and rounded at `rope.table`."""
        noise = self._noise(float32, "rope.table") if self.dtype != "float32" else 0.0
        out = self._result(np.asarray(float32, np.float64), [], np.broadcast_to(noise, float32.shape))
        return replace(out, rounded=None if self.dtype == "float32" else self._emulated.round(float32, "rope.table"))
