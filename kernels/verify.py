"""Does a kernel meet its contract? One judgement, used by the tests (interpreted) and on a GPU (compiled).

The contract is the operator of `refllm.ops` with the same name. It is evaluated twice on the values that the kernel
got: exactly (float64), and in the kernel's own precision under the policy `fused`, which is what a good kernel does.
The error of that second evaluation is the unit: a kernel's root-mean-square error may be `rms_limit` times as large.

These are two rules of `refllm.accuracy.judge`, which `refllm check-op` asks more of: for single calls of any size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm import ops
from refllm.accuracy.judge import errors, kind, rms, rounding_error
from refllm.accuracy.operator_limits import ELEMENTWISE_LIMIT, PRODUCT_LIMIT, chance, rms_limit
from refllm.errors import RefllmError
from refllm.extras import missing_extra
from refllm.inputs import to_numpy
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
    there are few rows (`_chance`). problem: what is wrong, "" if nothing.
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
        dtype = str(next(a.dtype for a in arguments if isinstance(a, torch.Tensor))).removeprefix("torch.")
        self.exact = _evaluate(operator, EXACT, arguments, keywords)
        self.same_precision = _evaluate(operator, Arithmetic(dtype, FUSED), arguments, keywords)

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
        return [
            _judge_output(self.operator, i, got, exact, same, limit)
            for i, (got, exact, same) in enumerate(zip(results, self.exact, self.same_precision, strict=True))
        ]


def judge(operator: str, results: Any, *arguments: Any, limit: float | None = None, **keywords: Any) -> list[Verdict]:
    """`Contract(operator, arguments, keywords).judge(results, limit)`: for one form alone."""
    return Contract(operator, arguments, keywords).judge(results, limit)


def assert_meets_contract(
    operator: str, results: Any, *arguments: Any, limit: float | None = None, **keywords: Any
) -> None:
    """Raises ContractBrokenError if any output fails `judge`."""
    for verdict in judge(operator, results, *arguments, limit=limit, **keywords):
        if verdict.problem:
            raise ContractBrokenError(verdict.problem)


def as_array(x: Any) -> Any:
    """A tensor as an array of the same values (bfloat16 and float16 as float32); anything else as it is."""
    return to_numpy(x) if isinstance(x, torch.Tensor) else x


def _evaluate(operator: str, ar: Arithmetic, arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[Any, ...]:
    function: Callable[..., Any] = getattr(ops, operator)
    with np.errstate(all="ignore"):
        out = function(*map(as_array, arguments), **{k: as_array(v) for k, v in keywords.items()}, ar=ar)
    return out if isinstance(out, tuple) else (out,)


def _judge_output(operator: str, i: int, got: torch.Tensor, exact: Any, contract: Any, limit: float) -> Verdict:
    dtype = str(got.dtype).removeprefix("torch.")
    exact, contract = np.asarray(exact, np.float64), np.asarray(contract, np.float64)
    name = f"{operator}, output {i}, {dtype}"

    def verdict(problem: str, ratio: float = np.nan, worst: tuple[int, ...] = ()) -> Verdict:
        return Verdict(operator, i, dtype, ratio, limit, worst, f"{name}: {problem}" if problem else "")

    if tuple(got.shape) != exact.shape:
        return verdict(f"shape {list(got.shape)}, expected {list(exact.shape)}")
    y = np.asarray(as_array(got), np.float64)
    # Where the format overflows is part of the format: compared with the contract in the same precision.
    strange = kind(y) != kind(contract)
    if strange.any():
        at = tuple(int(k) for k in np.argwhere(strange)[0])
        return verdict(f"{y[at]} at {at}, expected {contract[at]} ({int(strange.sum())} such elements)", worst=at)
    error, finite = errors(y, exact)
    if not finite.any():
        return verdict("", 0.0)
    worst = tuple(int(k) for k in np.unravel_index(error.argmax(), error.shape)) if error.ndim else ()
    unit = max(rms(contract[finite] - exact[finite]), rms(rounding_error(exact[finite], dtype)))
    size = rms(error[finite])
    ratio = size / unit if unit else (0.0 if size == 0 else np.inf)
    limit = limit * _chance(finite, dtype)
    if ratio <= limit:
        return verdict("", ratio, worst)
    return verdict(
        f"RMS error {size:.3g} is {ratio:.3g} times that of the contract in the same precision (limit {limit:.3g}); "
        f"largest at {worst}: {y[worst]:.6g}, exact {exact[worst]:.6g}",
        ratio,
        worst,
    )


def _chance(finite: np.ndarray, dtype: str) -> float:
    """How much larger one of two equal RMS errors may come out by chance (`refllm.accuracy.operator_limits.chance`).

    In the narrow formats nearly all error is the last rounding, which both evaluations share: nothing is granted. In
    float32 the order of additions counts as much, it differs, and its error is common to a row (the sum of a norm, of a
    softmax): there are as many independent errors as rows.
    """
    if dtype != "float32":
        return 1.0
    rows = finite.reshape(-1, finite.shape[-1]).any(axis=-1) if finite.ndim > 1 else finite
    return chance(int(rows.sum()))
