"""Does a kernel meet its contract? One judgement, used by the tests (interpreted) and on a GPU (compiled).

The contract is the operator of `refllm.ops` with the same name. It is evaluated twice on the values that the kernel
got: exactly (float64), and in the kernel's own precision under the policy `fused`, which is what a good kernel does.
The error of that second evaluation is the unit: a kernel's root-mean-square error may be `rms_limit` times as large.
No single element may be further off than a right implementation's is ever found: its error is predicted where it is
more than a rounding of the result explains.

These are three rules of `refllm.accuracy.judge`, of which `refllm check-op` asks all: for single calls of any size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refllm.accuracy import judge as judging
from refllm.accuracy.expected import Expected, evaluate, expect_values
from refllm.accuracy.limits import ELEMENT_LIMIT, ELEMENTWISE_LIMIT, PRODUCT_LIMIT, rms_limit
from refllm.errors import InputError, RefllmError
from refllm.extras import missing_extra
from refllm.inputs import to_numpy
from refllm.ops.contracts import ROWS, axis_names, contract_of
from refllm.precision import EXACT, FUSED, Arithmetic

try:
    import torch
except ModuleNotFoundError as error:
    raise missing_extra("refllm.kernels.verify", "torch") from error

__all__ = [
    "ELEMENTWISE_LIMIT",
    "PRODUCT_LIMIT",
    "Contract",
    "ContractBrokenError",
    "Verdict",
    "as_array",
    "assert_meets_contract",
    "judge",
]


class ContractBrokenError(RefllmError):
    """A kernel's result is not what its contract says."""


@dataclass(frozen=True)
class Verdict:
    """One output of one call.

    ratio: RMS error over that of the contract in the same precision. limit: what it may be; in float32 more where
    there are few rows (`_expected`). problem: what is wrong, "" if nothing.
    worst: the index of the largest error.
    """

    operator: str
    output: int
    dtype: str
    ratio: float
    limit: float
    worst: tuple[int, ...]
    problem: str

    @property
    def holds(self) -> bool:
        return not self.problem


class Contract:
    """What one call of an operator has to return: the definition, evaluated once, for any number of forms to meet.

    operator: a name in `refllm.ops`. arguments, keywords: as the kernel gets them (tensors, numbers, None). The dtype
    is that of the first tensor.
    """

    def __init__(self, operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
        self.operator = operator
        _must_be_a_call(operator, arguments, keywords)
        self.dtype = str(next(a.dtype for a in arguments if isinstance(a, torch.Tensor))).removeprefix("torch.")
        given, named = [as_array(x) for x in arguments], {name: as_array(x) for name, x in keywords.items()}
        self.exact = evaluate(operator, EXACT, given, named)
        self.same_precision = evaluate(operator, Arithmetic(self.dtype, FUSED), given, named)
        self._given, self._named = given, named

    def judge(self, results: Any, limit: float | None = None) -> list[Verdict]:
        """One verdict per output. results: a tensor or a tuple of tensors, as the kernel returned them.

        limit: another limit than `rms_limit` says. Raises ContractBrokenError for another number of results.
        """
        results = results if isinstance(results, tuple) else (results,)
        if len(self.exact) != len(results):
            raise ContractBrokenError(
                f"{self.operator} returned {len(results)} results; its contract has {len(self.exact)}"
            )
        limit = limit or rms_limit(self.operator)
        verdicts = [
            _judge_output(self.operator, i, got, exact, same, limit)
            for i, (got, exact, same) in enumerate(zip(results, self.exact, self.same_precision, strict=True))
        ]
        return [
            self._element_by_element(found, got, limit / rms_limit(self.operator)) if found.holds else found
            for found, got in zip(verdicts, results, strict=True)
        ]

    def _element_by_element(self, found: Verdict, got: torch.Tensor, more: float) -> Verdict:
        """The verdict, or that of the worst element where that is over its limit. more: how many times that limit."""
        y, exact = np.asarray(as_array(got), np.float64), np.asarray(self.exact[found.output], np.float64)
        error, finite = judging.errors(y, exact)
        own = np.where(finite, judging.rounding_error(np.where(finite, exact, 1.0), found.dtype), np.inf)
        if not error.size or not (error > more * ELEMENT_LIMIT * own).any():
            return found  # a rounding of the result alone explains every element, so that nothing need be predicted
        expected = self._expected[found.output]
        judged = judging.judge(y, expected, ("element",))
        if judged.score <= more:
            return found
        at = judged.worst
        problem = (
            f"{self.operator}, output {found.output}, {found.dtype}: the element at {at} is {judged.value:.6g}, exact "
            f"{judged.exact:.6g}: {judged.sigma:.3g} sigma off (limit {more * ELEMENT_LIMIT:.3g})"
        )
        return Verdict(self.operator, found.output, found.dtype, found.ratio, found.limit, at, problem)

    @cached_property
    def _expected(self) -> tuple[Expected, ...]:
        return expect_values(self.operator, self._given, self._named, self.dtype, "fused")


def judge(operator: str, results: Any, *arguments: Any, limit: float | None = None, **keywords: Any) -> list[Verdict]:
    """`Contract(operator, arguments, keywords).judge(results, limit)`: for one form alone."""
    return Contract(operator, arguments, keywords).judge(results, limit)


def assert_meets_contract(
    operator: str, results: Any, *arguments: Any, limit: float | None = None, **keywords: Any
) -> None:
    """Raises ContractBrokenError if any output fails `judge`, and InputError for what is no call of the operator."""
    for verdict in judge(operator, results, *arguments, limit=limit, **keywords):
        if verdict.problem:
            raise ContractBrokenError(verdict.problem)


def _must_be_a_call(operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
    """Raises InputError for another operator, for missing arguments or too many, and for shapes that do not agree."""
    known = contract_of(operator)
    try:
        inspect.signature(known.definition).bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(f"{operator}: {error}; the contract is {known.text}") from None
    given, lengths = known.bound(arguments, keywords), dict[str, tuple[int, str]]()
    for name, axes in known.arguments.items():
        x = given[name]
        if x is None:
            continue
        if not hasattr(x, "shape"):
            raise InputError(f"{operator}: {name} is a {type(x).__name__}; expected a tensor [{', '.join(axes)}]")
        shape, fewer = tuple(x.shape), axes[0] == "B" and known.kind(name) == "table"
        if (len(shape) not in (len(axes), len(axes) - fewer) and ROWS not in axes) or len(shape) < len(axes) - 1:
            raise InputError(f"{operator}: {name} has the shape {list(shape)}; expected [{', '.join(axes)}]")
        for axis, size in zip(axis_names(axes, len(shape)), shape, strict=True):
            before = lengths.setdefault(axis, (size, name))
            if before[0] != size and not axis.startswith("rows"):
                raise InputError(
                    f"{operator}: {name} has the shape {list(shape)}; expected [{', '.join(axes)}] with {axis} = "
                    f"{before[0]}, as of {before[1]}"
                )
    if not any(isinstance(x, torch.Tensor) for x in arguments):
        raise InputError(f"{operator}: expected tensors; arrays of other libraries are judged by refllm.check.check_op")


def as_array(x: Any) -> Any:
    """A tensor as an array of the same values (bfloat16 and float16 as float32); anything else as it is."""
    return to_numpy(x) if isinstance(x, torch.Tensor) else x


def _judge_output(operator: str, i: int, got: torch.Tensor, exact: Any, contract: Any, limit: float) -> Verdict:
    dtype = str(got.dtype).removeprefix("torch.")
    exact, contract = np.asarray(exact, np.float64), np.asarray(contract, np.float64)
    name = f"{operator}, output {i}, {dtype}"
    if tuple(got.shape) != exact.shape:
        problem = f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
        return Verdict(operator, i, dtype, np.nan, limit, (), problem)
    y = np.asarray(as_array(got), np.float64)
    found = judging.judge(y, _expected(operator, dtype, y, exact, contract), ("not finite", "rms"), limit)
    at, ratio, problem = found.worst, found.ratio, ""
    if any(fault.rule == "not finite" for fault in found.faults):
        ratio, count = np.nan, int(found.wrong.sum())
        problem = f"{name}: {y[at]} at {at}, expected {contract[at]} ({count} such elements)"
    elif not found.holds:
        problem = (
            f"{name}: RMS error {found.size:.3g} is {ratio:.3g} times that of the contract in the same precision "
            f"(limit {found.limit:.3g}); largest at {at}: {y[at]:.6g}, exact {exact[at]:.6g}"
        )
    return Verdict(operator, i, dtype, ratio, found.limit, at, problem)


def _expected(operator: str, dtype: str, y: np.ndarray, exact: np.ndarray, contract: np.ndarray) -> Expected:
    """What `refllm.accuracy.judge` is given: no prediction (0), and how many independent errors there are.

    In the narrow formats nearly all error is the last rounding, which both evaluations share: nothing is granted to
    chance. In float32 the order of additions counts as much, it differs, and its error is common to a row (the sum of a
    norm, of a softmax): there are as many independent errors as rows.
    """
    nothing = np.broadcast_to(np.float64(0), exact.shape)
    finite = np.isfinite(y) & np.isfinite(exact)
    rows = finite.any(axis=-1) if finite.ndim > 1 else finite
    once, independent = dtype != "float32", int(rows.sum())
    return Expected(operator, "", (), dtype, exact, contract, nothing, nothing, once, independent)
