"""One call of one operator as a recipe: its arguments as `Array`s and numbers, in the order of the contract."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from refllm import ops
from refllm.ops.contracts import axis_names, contract_of
from refllm.strategies.arrays import Array

Argument = Array | float | int | None


@dataclass(frozen=True)
class Call:
    """operator(*arguments, **keywords), valid for `refllm.ops` (arrays) and `refllm.kernels` (tensors).

    dtype: of the activations. keywords: (name, value) pairs; values may be an `Array` (key_mask).
    kind: which kind of input this is, in one phrase: "masked values hold NaN".
    """

    operator: str
    dtype: str
    arguments: tuple[Argument, ...]
    keywords: tuple[tuple[str, Any], ...] = ()
    kind: str = "plain"

    @property
    def names(self) -> list[str]:
        """The names of its arguments, in order."""
        return argument_names(self.operator)[: len(self.arguments)]

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of its arguments' axes, by the names of the contract."""
        found: dict[str, int] = {}
        axes = contract_of(self.operator).arguments
        for name, x in (*zip(self.names, self.arguments, strict=True), *self.keywords):
            if isinstance(x, Array) and name in axes:
                found |= dict(zip(axis_names(axes[name], len(x.shape)), x.shape, strict=True))
        return found

    def arrays(self) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords) for `refllm.ops`."""
        made = [x.array() if isinstance(x, Array) else x for x in self.arguments]
        return made, {name: x.array() if isinstance(x, Array) else x for name, x in self.keywords}

    def tensors(self, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords) for `refllm.kernels`: new tensors on every call, of which no two share memory."""
        made = [x.tensor(device) if isinstance(x, Array) else x for x in self.arguments]
        return made, {name: x.tensor(device) if isinstance(x, Array) else x for name, x in self.keywords}

    def placed(self) -> tuple[list[Any], dict[str, Any]]:
        """The same as NumPy arrays in the same layouts: new ones on every call, of which no two share memory."""
        made = [x.placed() if isinstance(x, Array) else x for x in self.arguments]
        return made, {name: x.placed() if isinstance(x, Array) else x for name, x in self.keywords}

    def code(self, device: str = "cpu", numpy: bool = False) -> list[str]:
        """Python lines that set `arguments` and `keywords` to what `tensors` gives, or `placed` with numpy=True.

        They need numpy as np, and torch; or ml_dtypes for bfloat16.
        """
        lines, given, named = [], [], []
        for name, x in zip(self.names, self.arguments, strict=True):
            lines += x.code(name, device, numpy) if isinstance(x, Array) else [f"{name} = {x!r}"]
            given.append(name)
        for name, x in self.keywords:
            lines += x.code(name, device, numpy) if isinstance(x, Array) else []
            named.append(f"{name!r}: {name if isinstance(x, Array) else repr(x)}")
        return [*lines, f"arguments = [{', '.join(given)}]", f"keywords = {{{', '.join(named)}}}"]

    def __str__(self) -> str:
        parts = [f"{name} {describe(x)}" for name, x in (*zip(self.names, self.arguments, strict=True), *self.keywords)]
        return f"{self.operator} ({self.kind}): {', '.join(parts)}"


def argument_names(operator: str) -> list[str]:
    """The positional arguments as in the contract, but without shape suffixes: q, k_cache, lengths."""
    return list(_argument_names(operator))


@cache
def _argument_names(operator: str) -> tuple[str, ...]:
    parameters = inspect.signature(getattr(ops, operator)).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return tuple(name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1].isupper() else name for name in names)


def describe(x: Any) -> str:
    """An argument in a few words: [3, 17] bfloat16, gaps, 2 planted; or the number itself."""
    if not isinstance(x, Array):
        return str(x)
    words = [f"{list(x.shape)} {x.dtype}"]
    words += [x.layout] if x.layout != "dense" else []
    words += [f"{len(x.planted)} planted"] if x.planted else []
    return ", ".join(words)
