"""Where a candidate's gradients may round: as the contract has it, or as torch's autograd of honest code does.

Backward code is seldom written by hand in a model: it is what autograd makes of the forward formulas, which rounds at
every step in the format of the activations, or a kernel that rounds once. Both are right, and so is everything between
them. So a gradient that does not hold under the contract is judged by the predicted error of code that rounds at each
of those places, operator by operator (`refllm.precision`: the points whose name has `.grad` in it).

Some libraries keep a sum over rows in the narrow format, or the mean of a row, or a logarithm of a probability. Over a
few rows, or where means are small, that is a rounding like any other; elsewhere nothing is left of the result, which is
what `many_rows` and `large_means` look for, so there it takes the convention "torch".
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.backward_operator import LOG_PROBABILITIES
from refllm.accuracy.expected import Expected, expect_values
from refllm.accuracy.judge import Judgement, errors, judge, rms
from refllm.opcheck.observe import Result
from refllm.ops.backward_contracts import forward_name
from refllm.ops.contracts import contract_of
from refllm.precision import HF_EAGER, HF_SDPA, Policy
from refllm.strategies.call import Call
from refllm.strategies.levels import families_of, level_of

RULES = ("not finite", "rms", "row", "element")
_ROW_BY_ROW = frozenset({"layer_norm.grad.sum", "embedding.grad.sum"})
_EAGER = replace(HF_EAGER, torch_order=False, points=HF_EAGER.points)
_STEPS = replace(_EAGER, name="at every step", points=_EAGER.points - _ROW_BY_ROW)
_KEPT = "layer_norm.grad.statistics"
_FLOAT32_STATISTICS = replace(_STEPS, points=_STEPS.points - {_KEPT})
_ROWS = replace(_EAGER, name="at every step, sums over rows after every row")
_TWICE = frozenset({"rms_norm.grad.parts", "layer_norm.grad.parts"})
_READ_TWICE = replace(_STEPS, name="at every step, of an x that is read twice", points=_STEPS.points | _TWICE)
_TERMS = replace(_STEPS, name="at every step of a formula", points=_STEPS.points | {"activation.grad.terms"})
_KERNEL = replace(HF_SDPA, name="torch's attention kernel: sums over queries in blocks", torch_order=False)
_LOGITS = replace(_EAGER, name="log-probabilities too", points=_EAGER.points | {LOG_PROBABILITIES})


def profiles(call: Call, convention: str) -> tuple[Policy, ...]:
    """The policies under which gradients of a call may be right beside the contract's."""
    name = forward_name(call.operator)
    if name == "attention":
        return _STEPS, _KERNEL
    if name in ("activation", "glu", "swiglu"):
        return _STEPS, _TERMS
    torch = convention == "torch"
    if name in ("layer_norm", "add_layer_norm", "norm_rope", "embedding"):
        families = () if torch else families_of(call)
        steps = _FLOAT32_STATISTICS if "large_means" in families else _STEPS
        twice = replace(steps, name=_READ_TWICE.name, points=steps.points | _TWICE)
        return (steps, twice) if "many_rows" in families or steps is not _STEPS else (steps, twice, _ROWS)
    if name in ("cross_entropy", "linear_cross_entropy"):
        return (_STEPS, _LOGITS) if torch or level_of(call) == "basic" else (_STEPS,)
    return (_STEPS, _READ_TWICE) if "norm" in name else (_STEPS,)


class GradientRoundings:
    """Where the gradients of one candidate round: as `refllm.opcheck.roundings.Roundings`."""

    def __init__(self, policy: str, convention: str) -> None:
        self.policy, self.convention = policy, convention
        self.once, self.more, self._used = 0, 0, dict[str, int]()

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
        """The judgements under the contract, or under the first other policy in which every gradient holds; those that
        hold under the contract stay."""
        if all(j.holds for j in judged):
            self.once += 1
            return judged
        if any(f.property != "value" for j in judged for f in j.faults):
            return judged
        best, alike = judged, limits.ALIKE_STEPS if contract_of(call.operator).product else 1.0
        for policy in profiles(call, self.convention):
            other = expect_values(call.operator, arguments, keywords, call.dtype, policy, call.dtypes)
            found = [
                j if j.holds else judge(r.value, _as_predicted(o, e, alike), RULES)
                for j, r, o, e in zip(judged, results, other, expected, strict=True)
            ]
            if all(j.holds for j in found):
                self._used[policy.name] = self._used.get(policy.name, 0) + 1
                return found
            best = [b if b.score <= f.score else f for b, f in zip(best, found, strict=True)]
        return best

    @property
    def words(self) -> str:
        """Where the candidate rounds, in words."""
        if not self._used:
            return "once, at the end" if self.once else ""
        return max(self._used, key=lambda name: self._used[name])


def _as_predicted(other: Expected, contract: Expected, alike: float) -> Expected:
    """What is expected under another policy: the exact values of the contract, with an error in the format as large as
    the definition has under it, or as predicted if that is more: not every place at which code rounds is one of the
    definition, and what a row shares may be rounded by more than on average."""
    variance = other.variance * alike
    error, finite = errors(other.contract, contract.exact)
    own, predicted = rms(error[finite]), rms(np.sqrt(variance[finite]))
    size = np.sqrt(variance) * max(1.0, own / predicted if predicted else 1.0)
    near = np.where(np.isfinite(other.contract), contract.exact + size, other.contract)
    return replace(other, exact=contract.exact, variance=variance, contract=near)
