"""What a call has to return: exact, in the same precision, and how far a right implementation may be from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from refllm import ops
from refllm.accuracy.backward_operator import expect_backward
from refllm.accuracy.limits import CHAIN, INNER
from refllm.accuracy.operator import predict
from refllm.accuracy.propagation import ulp
from refllm.errors import InputError
from refllm.ops.backward_contracts import forward_name, is_backward
from refllm.ops.contracts import contract_of
from refllm.precision import EXACT, FUSED, HF_EAGER, NATIVE, Arithmetic, Policy, rounding
from refllm.precision.dtype_names import dtype_name

POLICIES = {"fused": FUSED, "hf-eager": replace(HF_EAGER, torch_order=False)}
"""Where a candidate is expected to round. The order in which Torch adds is none of its business."""
DTYPES = ("bfloat16", "float16", "float32")
_FLOAT32_ROUNDING, _FLOAT64_ROUNDING = 2.0**-24, 2.0**-53


class Call(Protocol):
    """One call of one operator, as `refllm.strategies.Call` is: hashable, and able to make its arguments."""

    @property
    def operator(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def dtypes(self) -> Mapping[str, str]: ...

    def arrays(self) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords) for `refllm.ops`."""
        ...


@dataclass(frozen=True)
class Expected:
    """One output of one call.

    name, axes: of `refllm.ops.contracts`. dtype: that it must have. exact: float64. contract: the definition
    evaluated in the same precision. variance: predicted, of a right implementation's rounding error. inner: the error
    that float32 arithmetic inside may cause, same shape. once: whether nothing but the result is rounded; never in
    float32, where the arithmetic inside rounds as coarsely. independent: how many independent errors of one size there
    are, where variance does not say it (`refllm.kernels.verify` predicts none). gate: of an activation with a sigmoid
    in it, what that is of (`refllm.accuracy.cancellation`).
    """

    operator: str
    name: str
    axes: tuple[str, ...]
    dtype: str
    exact: np.ndarray
    contract: np.ndarray
    variance: np.ndarray
    inner: np.ndarray
    once: bool
    independent: int | None = None
    gate: np.ndarray | None = None


def expect(call: Call, policy: str = "fused", convention: str = "") -> tuple[Expected, ...]:
    """One `Expected` per output of a call. Raises InputError for a call that the contract does not allow.

    convention: "torch" for masks that are causal from the top where there are fewer queries than keys.
    """
    arguments, keywords = by_convention(call, convention)
    return expect_values(call.operator, arguments, keywords, call.dtype, policy, call.dtypes)


@lru_cache(maxsize=256)
def remembered(call: Call, policy: str, convention: str = "") -> tuple[Expected, ...]:
    """`expect`, kept for the calls that one candidate after the other is given."""
    return expect(call, policy, convention)


def by_convention(call: Call, convention: str) -> tuple[list[Any], dict[str, Any]]:
    """The arguments and keywords that the definition is given for what a convention makes of a call.

    "torch": query s sees keys 0..s, as is_causal has it, so there are no other keys; their gradients are 0.
    """
    arguments, keywords = call.arrays()
    attention = forward_name(call.operator) == "attention"
    if convention != "torch" or not attention or not keywords.get("causal", True):
        return arguments, keywords
    if is_backward(call.operator):
        _, q, k, *_ = arguments
        return arguments, keywords | {"causal": False, "mask": np.tri(q.shape[2], k.shape[2], dtype=bool)[None, None]}
    q, *cached = arguments
    S = q.shape[2]
    mask = keywords.get("key_mask")
    cut = {} if mask is None else {"key_mask": mask[:, :S]}
    return [q, *(x[:, :, :S] for x in cached)], keywords | cut


def narrow_loss(expected: Expected, arguments: Sequence[Any], keywords: dict[str, Any], dtype: str) -> Expected:
    """A loss that is returned in the dtype of the logits, as torch does: each row's is rounded, and then their mean."""
    (rows,) = evaluate(expected.operator, EXACT, arguments, keywords | {"reduction": "none"})
    each = np.square(ulp(np.where(np.isfinite(rows), rows, 0.0), dtype, np.float64)) / 12
    own = np.square(ulp(np.where(np.isfinite(expected.exact), expected.exact, 0.0), dtype, np.float64)) / 12
    reduction = keywords.get("reduction", "mean")
    if reduction == "none":
        inside = each
    else:
        counted = max(1, int((arguments[-1] != keywords.get("ignore_index", ops.IGNORE_INDEX)).sum()))
        inside = each.sum() / (counted**2 if reduction == "mean" else 1) + own  # their sum is rounded as well
    with np.errstate(over="ignore"):
        rounded = rounding(dtype)(np.asarray(expected.exact, np.float32)).astype(np.float64)
    return replace(expected, dtype=dtype, contract=rounded, variance=expected.variance + inside + own)


def expect_values(
    operator: str,
    arguments: Sequence[Any],
    keywords: dict[str, Any],
    dtype: str,
    policy: str | Policy,
    dtypes: Mapping[str, str] | None = None,
) -> tuple[Expected, ...]:
    """One `Expected` per output that is no None, for arrays that lie on the grid of `dtype`.

    policy: its name, or for gradients one of your own. dtypes: of the arguments by name; a gradient has its tensor's.
    """
    rules, known = find_policy(policy), contract_of(operator)
    if is_backward(operator):
        found = expect_backward(operator, arguments, keywords, dtype, rules, dtypes, fused=policy == "fused")
        return tuple(Expected(**fields) for fields in found)
    predicted = predict(operator, arguments, keywords, dtype=dtype, policy=rules)
    contract = evaluate(operator, Arithmetic(dtype, rules), arguments, keywords)
    inner = _inner(operator, arguments, keywords, [p.exact for p in predicted])
    if dtype != "float32" and known.once and policy == "fused":
        inside = predict(operator, arguments, keywords, dtype="float32", policy=rules)
        inner = [np.hypot(own, INNER * p.sigma) for own, p in zip(inner, inside, strict=True)]
    return tuple(
        Expected(
            operator,
            name,
            axes if p.exact.ndim else (),
            "float32" if name in known.float32 else dtype,
            p.exact,
            np.asarray(c, np.float64),
            p.variance,
            own,
            name in known.once and policy == "fused" and dtype != "float32",
            gate=np.asarray(arguments[0], np.float64) if operator == "swiglu" else None,
        )
        for (name, axes), p, c, own in zip(known.outputs.items(), predicted, contract, inner, strict=False)
    )


def find_policy(policy: str | Policy) -> Policy:
    """The policy of that name. Raises InputError for another name."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise InputError(f"--policy {policy} is not known; use {' or '.join(POLICIES)}")
    return POLICIES[policy]


def find_dtype(dtype: Any) -> str:
    """The name of a dtype, given in any of the ways of `dtype_name`. Raises InputError if no kernel works in it."""
    name = dtype_name(dtype)
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"--dtype {dtype} is not known; use {', '.join(DTYPES)}")
    return name


def evaluate(
    operator: str, ar: Arithmetic, arguments: Sequence[Any], keywords: dict[str, Any]
) -> tuple[np.ndarray, ...]:
    """The definition, evaluated in `ar`: a tuple, also of one output."""
    with np.errstate(all="ignore"):
        out = getattr(ops, operator)(*arguments, **keywords, ar=ar)
    return out if isinstance(out, tuple) else (out,)


def _inner(
    operator: str, arguments: Sequence[Any], keywords: dict[str, Any], exact: list[np.ndarray]
) -> list[np.ndarray]:
    """How much float32 arithmetic inside may move each element.

    A stable implementation returns the exact result of inputs moved by a few float32 roundings: so they are moved, and
    the results compared, row by row (which is where a norm's or softmax's errors are alike). The definition itself in
    float32 is one such implementation, and its error counts twice. A sum may be one chain of additions, whose roundings
    are random (`limits.CHAIN`), except where a large number comes first and swallows the rest: so the definition is
    evaluated with such sums as well. A loss is the difference of two float32 numbers, of which each is rounded.
    """
    rng = np.random.default_rng(0x5EED)  # not that of any input
    moved = [_moved(x, rng) for x in arguments]
    near = evaluate(operator, EXACT, moved, keywords)
    plain = evaluate(operator, Arithmetic("float32", NATIVE), arguments, keywords)
    lost = evaluate(operator, _OneChain("float32", NATIVE), arguments, keywords)
    terms = max((x.shape[-1] for x in arguments if isinstance(x, np.ndarray) and x.ndim), default=1)
    chain = CHAIN * _FLOAT32_ROUNDING * np.sqrt(terms / 3)
    if contract_of(operator).elementwise:
        return [_own_error(operator, arguments, keywords, plain[0], exact[0])]
    inner = [
        np.hypot(
            INNER * np.maximum(_row_error(n, e), _FLOAT32_ROUNDING * _size(e)),
            2 * np.maximum(_row_error(p, e), _row_error(c, e)),
        )
        for n, p, c, e in zip(near, plain, lost, exact, strict=True)
    ]
    if contract_of(operator).sums:
        inner = [
            np.hypot(i, INNER * chain * _row_error(e, np.zeros_like(e))) for i, e in zip(inner, exact, strict=True)
        ]
    if "labels" in contract_of(operator).arguments:
        inner = [np.hypot(inner[0], INNER * _of_the_terms(operator, arguments, keywords))]
    return inner


def _own_error(
    operator: str, arguments: Sequence[Any], keywords: dict[str, Any], plain: np.ndarray, exact: np.ndarray
) -> np.ndarray:
    """`_inner` where an element depends on one element of each argument: nothing of its row's is granted to it.

    Each argument is moved by one float32 rounding alone, so that no luck makes two of them cancel. A gate between 0 and
    1 may be the difference of two float64 numbers, as 1 + tanh x is.
    """
    squares = np.square(_FLOAT32_ROUNDING * _size(exact))
    if len(arguments) > 1:
        squares = squares + np.square(_FLOAT64_ROUNDING * _size(np.prod(np.asarray(arguments, np.float64), axis=0)))
    for i, x in enumerate(arguments):
        if isinstance(x, np.ndarray):
            moved = x.astype(np.float64) * (1 + _FLOAT32_ROUNDING)
            near = evaluate(operator, EXACT, [*arguments[:i], moved, *arguments[i + 1 :]], keywords)[0]
            squares = squares + np.square(_error(near, exact))
    return np.hypot(INNER * np.sqrt(squares), 2 * _error(plain, exact))


class _OneChain(Arithmetic):
    """Float32, with the sum of a row added up number after number."""

    def mean(self, x: np.ndarray) -> np.ndarray:
        return self.softmax_sum(x) / np.float32(max(1, x.shape[-1]))

    def softmax_sum(self, e: np.ndarray) -> np.ndarray:
        return np.cumsum(e, axis=-1, dtype=np.float32)[..., -1:] if e.shape[-1] else e.sum(axis=-1, keepdims=True)

    def standardize(self, x: np.ndarray, eps: float) -> np.ndarray:
        centred = x - self.mean(x)
        return centred * (1 / np.sqrt(self.mean(centred * centred) + np.float32(eps)))


def _of_the_terms(operator: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> np.ndarray:
    """The float32 rounding of log-sum-exp and logit, whose difference a loss is: of the size of the largest logit."""
    first, *_, labels = arguments
    logits = np.asarray(first, np.float64)
    if "weight" in contract_of(operator).arguments:
        logits = np.where(np.isfinite(logits), logits, 0) @ np.asarray(arguments[1], np.float64).T
    top = np.abs(logits.max(axis=-1, initial=-np.inf))
    counted = (labels != keywords.get("ignore_index", ops.IGNORE_INDEX)) & np.isfinite(top)
    each = np.where(counted, _FLOAT32_ROUNDING * top, 0.0)
    reduction = keywords.get("reduction", "mean")
    if reduction == "none":
        return each
    together = np.sqrt(np.square(each).sum())
    return np.asarray(together / max(1, counted.sum()) if reduction == "mean" else together)


def _moved(x: Any, rng: np.random.Generator) -> Any:
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    # Of a subnormal number the rounding is that of the smallest one.
    size = np.maximum(np.abs(np.where(np.isfinite(x), x, 0.0).astype(np.float64)), np.finfo(np.float32).tiny)
    return x + np.where(x == 0, 0.0, _FLOAT32_ROUNDING * size * rng.standard_normal(x.shape))


def _row_error(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The error of an element, or the root mean square of its row's if that is more: its own may be small by luck."""
    error = _error(value, exact)
    if not error.ndim or not error.size:
        return error
    return np.maximum(np.sqrt(np.mean(np.square(error), axis=-1, keepdims=True)), error)


def _error(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|value - exact|, 0 where that is not finite."""
    with np.errstate(invalid="ignore"):
        error = np.abs(np.asarray(value, np.float64) - exact)
    return np.where(np.isfinite(error), error, 0.0)


def _size(exact: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(exact), np.abs(exact), 0.0)
