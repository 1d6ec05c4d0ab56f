"""One small call of an operator in every column: the formula, the definition, the Triton kernel on the interpreter.

The formula and the definition have to agree to float64's last digits; the kernel works in bfloat16, and what it returns
is judged as `refllm check-op` judges: it has to be as near as the predicted error allows. A page where that is not so
is not made.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refllm import kernels, ops
from refllm.accuracy.expected import Expected, expect_values
from refllm.accuracy.judge import judge
from refllm.learn.book import formula
from refllm.learn.book.errors import BookError
from refllm.ops.contracts import CONTRACTS, without_axes
from refllm.precision import Dtype, rounding

DTYPE: Dtype = "bfloat16"
_AGREE = 1e-12


@dataclass(frozen=True)
class Judged:
    """What a kernel returned. errors: per result the largest error in sigma."""

    values: tuple[np.ndarray, ...]
    errors: tuple[float, ...]


class SmallCall:
    """The call of a page. given: its arguments by name, as the page's file has them; steps: its formulas in order;
    results: the names that they give to the results; operator: that of the definition, `rms_norm_backward` too; known:
    names that formulas may use; kept: arguments that the forward pass computed."""

    def __init__(
        self, page: str, operator: str, given: Mapping[str, Any], steps: Sequence[str], results: Sequence[str],
        known: Mapping[str, Any] | None = None, kept: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.page, self.operator, self.steps, self.results = page, operator, tuple(steps), tuple(results)
        forward = CONTRACTS.get(operator.removesuffix("_backward"))
        wide = forward.or_float32 if forward else ()
        self.given = {name: _value(name, value, name in wide) for name, value in given.items()}
        self.given |= kept or {}
        self._known = dict(known or {})

    @cached_property
    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords) for the definition."""
        arguments, keywords = [], {}
        for p in inspect.signature(self.definition).parameters.values():
            name = without_axes(p.name)
            if name not in self.given:
                continue
            if p.kind is p.KEYWORD_ONLY:
                keywords[name] = self.given[name]
            else:
                arguments.append(self.given[name])
        return arguments, keywords

    @property
    def taken(self) -> list[str]:
        """The names of the arguments that the definition takes and that are given."""
        parameters = map(without_axes, inspect.signature(self.definition).parameters)
        return [name for name in parameters if name in self.given]

    @property
    def definition(self) -> Callable[..., Any]:
        """The function of `refllm.ops`."""
        found: Callable[..., Any] = getattr(ops, self.operator)
        return found

    @cached_property
    def exact(self) -> tuple[np.ndarray, ...]:
        """What the definition returns."""
        arguments, keywords = self.arguments
        return _arrays(self.definition(*arguments, **keywords))

    @cached_property
    def assigned(self) -> list[dict[str, Any]]:
        """What each formula gives its names, in order."""
        values, found = {**_sizes(self.operator, self.given), **self._known, **self.given}, []
        for step in self.steps:
            found.append(formula.evaluate(step, values))
            values |= found[-1]
        return found

    @cached_property
    def values(self) -> dict[str, Any]:
        """Every name of the formulas with its last value, and the arguments."""
        values = {**self._known, **self.given}
        for names in self.assigned:
            values |= names
        return values

    @cached_property
    def by_formula(self) -> tuple[np.ndarray, ...]:
        """The results of the formulas. Raises BookError where they are not those of the definition."""
        found = []
        for name, exact in zip(self.results, self.exact, strict=True):
            value = np.asarray(self.values[name], np.float64)
            if value.size != exact.size or not np.allclose(value.reshape(exact.shape), exact, _AGREE, _AGREE):
                raise BookError(f"{self.page}: the formula of {name} gives {value}, {self.operator} gives {exact}")
            found.append(value.reshape(exact.shape))
        return tuple(found)

    @cached_property
    def expected(self) -> tuple[Expected, ...]:
        """What a kernel has to return, with its predicted error."""
        return expect_values(self.operator, *self.arguments, DTYPE, "fused")

    @cached_property
    def by_kernel(self) -> Judged:
        """The results of the Triton kernel, judged. Raises BookError where they do not hold."""
        with kernels.interpreted():
            values = self.run(getattr(kernels, self.operator))
        found = [judge(value, expected) for value, expected in zip(values, self.expected, strict=True)]
        for one in found:
            if not one.holds:
                raise BookError(f"{self.page}: the kernel of {self.operator}: {one.faults[0].text}")
        return Judged(values, tuple(one.sigma for one in found))

    def run(self, function: Callable[..., Any]) -> tuple[np.ndarray, ...]:
        """The results of a function of Torch tensors with the signature of the operator."""
        arguments, keywords = self.arguments
        names = [without_axes(name) for name in inspect.signature(self.definition).parameters]
        tensors = [self._tensor(name, x) for name, x in zip(names, arguments, strict=False)]
        return _arrays(function(*tensors, **{name: self._tensor(name, x) for name, x in keywords.items()}))

    def _tensor(self, name: str, x: Any) -> Any:
        import torch

        if not isinstance(x, np.ndarray):
            return x
        if x.dtype != np.float64:
            return torch.from_numpy(x.copy())
        narrow = name != "dloss" and np.array_equal(rounding(DTYPE)(x.astype(np.float32)), x)
        return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16 if narrow else torch.float32)


def _value(name: str, value: Any, wide: bool) -> Any:
    """An argument as a page's file writes it: lists are arrays, "= ..." is computed, "none" is None. Floats are those
    of the narrow format, or of float32 where the operator takes that."""
    if value == "none":
        return None
    if isinstance(value, str) and value.startswith("="):
        value = eval(value[1:], {"np": np})  # the text is a file of this package
    if not isinstance(value, list | np.ndarray):
        return value
    array = np.asarray(value)
    if array.dtype.kind != "f":
        return array
    narrow = array.astype(np.float32) if wide else rounding(DTYPE)(array.astype(np.float32))
    return narrow.astype(np.float64)


def _sizes(operator: str, given: Mapping[str, Any]) -> dict[str, int]:
    known = CONTRACTS.get(operator.removesuffix("_backward"))
    sizes: dict[str, int] = {}
    for name, axes in (known.arguments if known else {}).items():
        array = given.get(name)
        if isinstance(array, np.ndarray):
            sizes |= dict(zip(reversed(axes), reversed(array.shape), strict=False))
    return {axis: size for axis, size in sizes.items() if axis.isidentifier()}


def _arrays(out: Any) -> tuple[np.ndarray, ...]:
    parts = out if isinstance(out, tuple) else (out,)
    return tuple(
        np.asarray(x.float().numpy() if hasattr(x, "numpy") else x, np.float64) for x in parts if x is not None
    )
