"""Predicted rounding error of an implementation that rounds where its profile says: a page run under profiles.

`Propagation` knows where a policy rounds before it starts. Here that is decided at every named value, by a function
that may look at what a candidate has there: operators return what they were asked for (`Made`), and it is worked out
when the page gives it a name. Beside every value stands the same one before its last rounding, which is what a fused
kernel may hand on though it shows the rounded one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refllm.accuracy.forms import FORMS, OUT, Stores, on_grid
from refllm.accuracy.measure import row_blocks
from refllm.accuracy.parts import WHOLE, summed
from refllm.accuracy.profiles import Profile
from refllm.accuracy.propagation import BLOCKS, CHAIN, LANES, Propagation, Substitute, Uncertain, ulp
from refllm.accuracy.readings import SOMEHOW, as_read, variance_of
from refllm.accuracy.recognise import Made, known, noise, stores_of
from refllm.precision import Dtype, Policy

Choice = Callable[[str, Made, "Profiled"], Uncertain]
"""(name, what was made, these operators) -> its value, which `Profiled.under` works out under a profile."""

_TO_THE_BIT = ("rms_norm", "layer_norm", "rope", "glu", "activation", "add")
"""Operators whose float32 arithmetic is too exact to matter in a narrow format."""

_ATTENTION_POINTS = {
    "raw scores": "attention.scores",
    "scores": "attention.scaled",
    "less the largest": "attention.scaled",  # which is about as large
    "scaled q": "attention.query",
    "probs": "attention.weights",
}


class Profiled(Propagation):
    """The operators of a page, each under the profile that `choose` says. bits: whether to predict to the bit as well,
    where the inputs are known. policy: of what no profile says (which softmax weights float32 code rounds)."""

    def __init__(
        self,
        dtype: Dtype,
        policy: Policy,
        at_tap: Substitute,
        wants: Callable[[str], bool],
        choose: Choice,
        bits: bool,
        scope: str = "",
    ) -> None:
        super().__init__(dtype, policy, at_tap, wants, scope)
        self.choose, self.bits = choose, bits

    def within(self, scope: str) -> "Profiled":
        return Profiled(self.dtype, self.policy, self.at_tap, self.wants, self.choose, self.bits, f"{scope}.")

    def tap(self, name: str, x: Any) -> Uncertain:
        if isinstance(x, Made):
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is judged, and told
                x = self.choose(self.scope + name, x, self)
        if x.before is not None:
            x = replace(x, before=x.before.named(self.scope + name))
        return super().tap(name, x)

    # Of the page's names. Nothing is worked out.

    def linear(self, x: Any, weight: np.ndarray, bias: np.ndarray | None = None) -> Any:
        return Made("linear", (x,), {"weight": weight, "bias": bias})

    def add(self, x: Any, y: Any) -> Any:
        return Made("add", (x, y), {})

    def rms_norm(self, x: Any, weight: np.ndarray, eps: float) -> Any:
        return Made("rms_norm", (x,), {"weight": weight, "eps": eps})

    def layer_norm(self, x: Any, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Any:
        return Made("layer_norm", (x,), {"weight": weight, "bias": bias, "eps": eps})

    def rope(self, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
        return tuple(Made("rope", (x, cos, sin), {"interleaved": interleaved}) for x in (q, k))

    def attention(self, q: Any, k: Any, v: Any, **masking: Any) -> Any:
        return Made("attention", (q, k, v), masking)

    def glu(self, gate: Any, up: Any, name: str) -> Any:
        return Made("glu", (gate, up), {"name": name})

    def activation(self, x: Any, name: str) -> Any:
        return Made("activation", (x,), {"name": name})

    # ------------------------------------------------------------------------------------------- under a profile

    def under(self, made: Made, profile: Profile, certain_inputs: bool = False) -> Uncertain:
        """The value, its variance, what it is to the bit if that is known, and the same before its last rounding.

        certain_inputs: that the profile fits has shown what the inputs are, also those that nobody showed.
        """
        if self.dtype == "float32":
            return self._in_float32(made, profile)
        inputs = made.read(profile)
        if certain_inputs and made.operator != "rope":
            inputs = tuple(_settled(i) for i in inputs)
        x = self._plain(made, profile, inputs, self._attention_policy(profile))
        exact = self._arrays(made, tuple(i.value for i in inputs))
        added = self._added(made, profile, exact, inputs)
        variance = x.variance if isinstance(added, float) else x.variance + np.asarray(added, self.width)
        unrounded, rounded = self._to_bits(made, profile, inputs, x)
        before = replace(x, variance=variance, rounded=unrounded)
        if profile.stored:
            variance = variance + np.asarray(self._of_the_result(made, profile, x.value, inputs), self.width)
        x = replace(x, rounded=rounded, before=before, sum_of=self._terms(made, profile))
        return self._with_shares(x, variance)

    def held_in_float32(self, made: Made, profile: Profile, order: str) -> Uncertain:
        """A result that is not put on the grid of the format, under a profile that was recognised: what it rounds
        inside, and float32 arithmetic with sums in that order."""
        inside = self.under(made, profile, certain_inputs=True)
        wide = Profiled("float32", self.policy, self.at_tap, self.wants, self.choose, False)
        read = tuple(_settled(x) for x in made.read(profile))
        x = wide.under(Made(made.operator, read, made.how), Profile(order=order))
        exact = _exact_share(read[0].value, made.how["weight"]) if made.operator == "linear" else 0.0
        return self._with_shares(inside, inside.variance + x.variance * self.width(1 - exact))

    @staticmethod
    def _terms(made: Made, profile: Profile) -> tuple[Uncertain, Uncertain] | None:
        """The terms of a sum, without their own: a chain of them would keep all layers."""
        if made.operator != "add":
            return None
        first, second = (replace(t, sum_of=None) for t in made.read(replace(profile, together=False))[:2])
        return first, second

    def _in_float32(self, made: Made, profile: Profile) -> Uncertain:
        if profile.inputs:
            made = replace(made, inputs=(self._as_read(made.inputs[0], profile.inputs),))
        if not profile.tf32:
            return self._plain(made, profile, made.inputs, self.policy)
        inputs = tuple(replace(i, variance=i.variance + self._tf32_noise(i.value)) for i in made.inputs)
        x = self._plain(made, profile, inputs, self.policy)
        if made.operator != "linear":
            return x
        of_weight = np.square(inputs[0].value, dtype=self.width) @ self._tf32_noise(made.how["weight"]).T
        return self._with_shares(x, x.variance + of_weight)

    def _as_read(self, x: Uncertain, reading: str) -> Uncertain:
        """What a product reads in place of x: its very numbers where x is known, else x with a larger error."""
        if self.bits and reading != SOMEHOW and not x.variance.any():
            return replace(x, value=as_read(x.value, reading))
        return self._with_shares(x, x.variance + variance_of(x.value, reading).astype(self.width))

    def with_float32_noise(self, made: Made, profile: Profile, x: Uncertain) -> Uncertain:
        """x, a result that is never put on the grid of the format, with the error of the float32 arithmetic that made
        it: small, but where nothing was rounded before, it is all there is."""
        wide = Profiled("float32", self.policy, self.at_tap, self.wants, self.choose, False)
        certain = tuple(replace(i, variance=np.zeros_like(i.variance), shares={}) for i in made.read(profile))
        noise = wide.under(Made(made.operator, certain, made.how), Profile()).variance
        return self._with_shares(x, x.variance + noise.astype(self.width))

    def _tf32_noise(self, x: np.ndarray) -> np.ndarray:
        """Variance of rounding to the 11 bits that a tensor core keeps of a float32 factor; so does float16."""
        return np.asarray((self._ulp(x, "float32") * 2.0**13) ** 2 / 12)

    def _plain(self, made: Made, profile: Profile, inputs: tuple[Uncertain, ...], policy: Policy) -> Uncertain:
        """The operator with float32 inside and nothing rounded: what its inputs hand on, and float32 noise."""
        inner = _Plain(self.dtype, policy, self.at_tap, self.wants, self.scope)
        inner.order = profile.order or inner.order
        how = dict(made.how)
        if made.operator == "rope":
            x, cos, sin = inputs
            if "tables" in profile.points:
                cos, sin = (replace(t, variance=t.variance + self._of_a_table(t)) for t in (cos, sin))
            return inner.rope(x, x[:, :1], cos, sin, **how)[0]
        if made.operator == "add" and len(inputs) == 3:
            return inner.add(inputs[0], inner.add(inputs[1], inputs[2]))
        if made.operator == "attention" and profile.points & {"scale", "root of the scale"}:
            how["scale"] = self._rounded_scale(profile, inputs[0].shape[-1], how.get("scale"))
        out = getattr(inner, made.operator)(*inputs, **how)
        return replace(out, rounded=None)

    def _of_a_table(self, table: Uncertain) -> np.ndarray:
        """The square of what rounding a table does, which is known where the table is; near position 0 it is little."""
        step = np.asarray(self._ulp(table.value, self.dtype))
        error = on_grid(table.value, self.dtype) - table.value
        return np.where(table.variance < np.square(step / 8), np.square(error), np.square(step) / 12)

    def _rounded_scale(self, profile: Profile, head_dim: int, scale: float | None) -> float:
        given = np.asarray(head_dim**-0.5 if scale is None else scale)
        if "scale" in profile.points:
            given = on_grid(given, self.dtype)
        if "root of the scale" in profile.points:
            given = np.square(on_grid(np.sqrt(given), self.dtype))
        return float(given)

    def _attention_policy(self, profile: Profile) -> Policy:
        """The policy that has those points of a profile that have a name in one."""
        points = {_ATTENTION_POINTS[p] for p in profile.points if p in _ATTENTION_POINTS}
        exp = any(p.startswith("exp") for p in profile.points) and "probs" not in profile.points
        named = frozenset(points | ({"attention.weights"} if exp else set()))
        return replace(self.policy, name="", points=named, normalize_first=not exp)

    def _added(self, made: Made, profile: Profile, exact: tuple[np.ndarray, ...], inputs: tuple[Uncertain, ...]) -> Any:
        """The variance of the roundings inside."""
        if made.operator == "linear":
            return self._of_parts(made, profile, exact[0])
        if made.operator == "attention" and {"exp", "probs"} <= profile.points:  # the weights are rounded twice
            one = replace(profile, points=profile.points - {"probs"})
            none = replace(one, points=one.points - {"exp"})
            two = (self._plain(made, p, inputs, self._attention_policy(p)).variance for p in (one, none))
            return np.subtract(*two)
        if made.operator == "attention" or (made.operator == "add" and not profile.points) or not profile.points:
            return 0.0
        return noise(made.operator, tuple(a.astype(np.float32) for a in exact), made.how, profile, self.dtype)

    def _of_parts(self, made: Made, profile: Profile, x: np.ndarray) -> Any:
        """The variance that a product adds before its bias, and with its parts."""
        weight, bias = made.how["weight"], made.how["bias"]
        added: Any = 0.0
        if "product" in profile.points and bias is not None and not profile.parts.biased:
            added = self._ulp(x @ np.asarray(weight, np.float64).T, self.dtype) ** 2 / 12
        if profile.parts != WHOLE:
            counted = _Counted({"part", *profile.points}, self.dtype)
            summed(x, np.asarray(weight, np.float64), profile.parts, bias, counted)
            added = added + counted.variance
        return added

    def _of_the_result(self, made: Made, profile: Profile, value: np.ndarray, inputs: tuple[Uncertain, ...]) -> Any:
        one = self._of_one_rounding(value)
        if made.operator == "rope":  # what is hardly turned is hardly off the grid
            return np.minimum(one, np.square(value - inputs[0].value, dtype=self.width))
        if made.operator != "add" or profile.unrounded or profile.together:
            return one
        return self._sum_rounding(value, inputs[0].value, inputs[1].value)

    def _of_one_rounding(self, value: np.ndarray) -> np.ndarray:
        """The variance of rounding every element, a block of rows at a time: logits are many."""
        if not value.flags.c_contiguous:  # heads of a context, which are small
            return np.asarray(self._ulp(value, self.dtype) ** 2 / 12, self.width)
        out = np.empty(value.shape, self.width)
        flat, rows = (a.reshape(-1, a.shape[-1]) for a in (value, out))
        for block in row_blocks(flat):
            rows[block] = self._ulp(flat[block], self.dtype) ** 2 / 12
        return out

    def _to_bits(
        self, made: Made, profile: Profile, inputs: tuple[Uncertain, ...], x: Uncertain
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What a candidate has before and after the last rounding."""
        if not self.bits:
            return None, None
        arrays = [known(i) for i in (inputs[:1] if made.operator == "rope" else inputs)]
        if any(a is None for a in arrays):
            return None, None
        if made.operator == "linear" and "product" in profile.points:
            stores = Stores(profile.points, self.dtype)
            return FORMS["linear"](
                stores, (np.asarray(arrays[0], np.float64),), made.how | {"parts": profile.parts}
            ), None
        if made.operator not in _TO_THE_BIT:
            return x.value, None
        values = tuple(a for a in arrays if a is not None)
        if made.operator == "rope":
            values += tuple(i.value for i in inputs[1:])
        with np.errstate(all="ignore"):
            points = stores_of(profile) - {OUT}
            unrounded = FORMS[made.operator](Stores(points, self.dtype), self._arrays(made, values), made.how)
        return unrounded, on_grid(unrounded, self.dtype) if profile.stored else None

    @staticmethod
    def _arrays(made: Made, values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """The inputs as the form takes them: one table for all heads."""
        if made.operator != "rope":
            return values
        return (values[0], *(t[..., None, :, :] for t in values[1:]))

    def _with_shares(self, x: Uncertain, variance: np.ndarray) -> Uncertain:
        """x with more variance, which was added here."""
        before, total = float(x.variance.mean(dtype=np.float64)), float(variance.mean(dtype=np.float64))
        if not total > 0 or not np.isfinite(total):
            return replace(x, variance=variance)
        shares = {name: share * before / total for name, share in x.shares.items()}
        shares[""] = shares.get("", 0.0) + max(0.0, 1.0 - sum(shares.values()))
        return replace(x, variance=variance, shares=shares)


def _exact_share(x: np.ndarray, weight: np.ndarray) -> float:
    """The part of the float32 noise of x W^T that is not there, where both factors have few bits: their products have
    so many zeros at the end that most additions are exact. Some rows and columns are added to see it."""
    rows = x.reshape(-1, x.shape[-1])
    some, columns = (a[np.unique(np.linspace(0, len(a) - 1, 64).astype(int)), :CHAIN] for a in (rows, weight))
    total = np.zeros((len(some), len(columns)))
    lost, steps = 0.0, np.finfo(float).tiny
    for x_N, w_O in zip(some.T, np.asarray(columns, np.float64).T, strict=True):
        exact = total + x_N[:, None] * w_O
        total = exact.astype(np.float32).astype(np.float64)
        lost += float(np.square(total - exact).sum())
        steps += float(np.square(ulp(exact, "float32", np.float64)).sum()) / 12
    return float(np.clip(1 - lost / steps, 0, 1))


def _settled(x: Uncertain) -> Uncertain:
    """x, known to the bit if it is."""
    if x.rounded is None or not x.variance.any():
        return x
    return replace(x, value=np.asarray(x.rounded, np.float64), variance=np.zeros(x.shape, x.variance.dtype), shares={})


class _Plain(Propagation):
    """Operators that round at the points of a policy only: float32 noise is nothing beside a narrow format. And what
    rounds nothing for the numbers at hand does not count: in a short run it is a good part."""

    def _noise(self, value: np.ndarray, point: str) -> np.ndarray | float:
        return super()._noise(value, point) if self._rounds(point) else 0.0

    def _turning_noise(self, *products: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Times 1 or 0, as at position 0, is exact; and a sum is never off by more than its smaller term."""
        noise: Any = 0.0
        for product, table in products:
            noise = noise + np.where(np.abs(table) % 1 == 0, 0, self._noise(product, "rope.product"))
        one, two = (product for product, _ in products)
        smaller = np.minimum(np.abs(one), np.abs(two))
        return np.asarray(noise + np.minimum(self._noise(one + two, "rope"), np.square(smaller, dtype=self.width)))

    def _weight_noise(self, probs: np.ndarray) -> np.ndarray:
        """The weight of a key that is alone is 1."""
        noise = super()._weight_noise(probs)
        return noise * (_keys(probs) > 1) if self.order == BLOCKS else noise

    def _total_noise(self, probs: np.ndarray) -> np.ndarray | float:
        """The same of the keys that a row sees."""
        if self.order != BLOCKS or self.dtype != "float32":
            return super()._total_noise(probs)
        keys, total = _keys(probs), 1 / np.maximum(probs.max(axis=-1, keepdims=True), np.finfo(self.width).tiny)
        additions = np.where(keys > 1, keys / LANES + np.log2(np.minimum(keys, LANES)), 0)
        return np.asarray(additions * (self._ulp(total, "float32") / total) ** 2 / 12)


def _keys(probs: np.ndarray) -> np.ndarray:
    """How many keys a row attends to, at least 1: [..., T] -> [..., 1]."""
    return np.maximum(np.count_nonzero(probs, axis=-1, keepdims=True), 1)


class _Counted(Stores):
    """Rounds nothing and adds up the variance of what would be rounded."""

    variance: Any = 0.0

    def _put(self, x: np.ndarray) -> np.ndarray:
        self.variance = self.variance + ulp(x, self.dtype, np.float64) ** 2 / 12
        return x
