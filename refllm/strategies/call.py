"""One call of one operator as a recipe: its arguments as `Array`s and numbers, in the order of the contract."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refllm import ops
from refllm.ops.contracts import axis_names, contract_of
from refllm.ops.programs import ATTENTION
from refllm.strategies.arrays import Array, Kept

Argument = Array | float | int | str | None


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
    def dtypes(self) -> dict[str, str]:
        """The dtype of every array by the name of its argument."""
        given = [*zip(self.names, self.arguments, strict=True), *self.keywords]
        return {name: x.dtype for name, x in given if isinstance(x, Array)}

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
        return self._each(lambda x: x.array())

    def tensors(self, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
        """(arguments, keywords) for `refllm.kernels`: new tensors on every call, of which no two share memory."""
        return self._each(lambda x: x.tensor(device))

    def placed(self) -> tuple[list[Any], dict[str, Any]]:
        """The same as NumPy arrays in the same layouts: new ones on every call, of which no two share memory."""
        return self._each(lambda x: x.placed())

    def _each(self, make: Callable[[Array], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Every array made in one way."""
        kept = kept_by_the_forward_pass(self)

        def one(x: Any) -> Any:
            if isinstance(x, Kept):
                x = x.holding(kept[x.result])
            return make(x) if isinstance(x, Array) else x

        return [one(x) for x in self.arguments], {name: one(x) for name, x in self.keywords}

    def code(self, device: str = "cpu", numpy: bool = False) -> list[str]:
        """Python lines that set `arguments` and `keywords` to what `tensors` gives, or `placed` with numpy=True.

        They need numpy as np, and torch; or ml_dtypes for bfloat16.
        """
        lines, given, named, last = [], [], [], []
        for name, x in zip(self.names, self.arguments, strict=True):
            made = x.code(name, device, numpy) if isinstance(x, Array) else [f"{name} = {x!r}"]
            if isinstance(x, Kept):
                last += made
            else:
                lines += made
            given.append(name)
        for name, x in self.keywords:
            lines += x.code(name, device, numpy) if isinstance(x, Array) else []
            named.append(f"{name!r}: {name if isinstance(x, Array) else repr(x)}")
        lines += [*kept_code(self, numpy), *last] if last else []
        return [*lines, f"arguments = [{', '.join(given)}]", f"keywords = {{{', '.join(named)}}}"]

    def __str__(self) -> str:
        parts = [f"{name} {describe(x)}" for name, x in (*zip(self.names, self.arguments, strict=True), *self.keywords)]
        return f"{self.operator} ({self.kind}): {', '.join(parts)}"


def kept_by_the_forward_pass(call: Call) -> dict[str, np.ndarray]:
    """The results of the forward pass of attention that a call of its backward pass is given, exact; {} for none."""
    if not any(isinstance(x, Kept) for x in call.arguments):
        return {}
    given = dict(zip(call.names, call.arguments, strict=True)) | dict(call.keywords)
    made: dict[str, Any] = {
        name: x.array() if isinstance(x, Array) and not isinstance(x, Kept) else x for name, x in given.items()
    }
    q, k, v = (made[name] for name in (("q", "k_cache", "v_cache") if "lengths" in made else ("q", "k", "v")))
    with np.errstate(all="ignore"):
        if "lengths" not in made:
            how = {name: made[name] for name in ("scale", "causal", "key_mask") if name in made}
            o, lse = ops.attention(q, k, v, **how, return_lse=True)
            return {"o": o, "lse": lse}
        o, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
        for b, n in enumerate(made["lengths"].tolist()):
            row, seen = slice(b, b + 1), slice(0, n)
            both = ops.attention(q[row], k[row, :, seen], v[row, :, seen], scale=made.get("scale"), return_lse=True)
            o[row], lse[row] = both
    return {"o": o, "lse": lse}


def kept_code(call: Call, numpy: bool) -> list[str]:
    """Lines that make `kept_o` and `kept_lse` from the arguments that are there, in float64."""
    names = [name for name, _ in call.keywords if name in ("scale", "causal", "key_mask")]
    values = dict(call.keywords)

    def double(name: str) -> str:
        return f"np.array({name}, np.float64)" if numpy else f"{name}.double().cpu().numpy()"

    def whole(name: str) -> str:
        return name if numpy else f"{name}.cpu().numpy()"

    how = ", ".join(f"{n}={whole(n) if isinstance(values[n], Array) else repr(values[n])}" for n in names)
    lines = ["", *ATTENTION.rstrip().splitlines(), ""]
    if "lengths" not in call.names:
        given = ", ".join(double(name) for name in ("q", "k", "v"))
        return [*lines, f"kept_o, kept_lse = attention({given}, return_lse=True{', ' * bool(how)}{how})"]
    caches = ", ".join(f"{double(name)}[b : b + 1, :, :n]" for name in ("k_cache", "v_cache"))
    return [
        *lines,
        "each = [",
        f"    attention({double('q')}[b : b + 1], {caches}, return_lse=True{', ' * bool(how)}{how})",
        f"    for b, n in enumerate({whole('lengths')}.tolist())",
        "]",
        "kept_o, kept_lse = (np.concatenate(part) for part in zip(*each))",
    ]


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
