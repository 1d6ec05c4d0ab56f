"""A page run on shapes alone: what is wrong with it is said before a weight is read.

Operators take and return arrays without memory of their own, check that shapes fit, and keep a record of what the page
called, named and read. It is how a page from outside is examined (`refllm.models.own_page`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refllm import ops
from refllm.forward.cache import NoCache

_B, _S = 1, 3


class PageError(ValueError):
    """Something that is wrong with a page: a clause, which stands behind its file and line."""


class _Value(np.ndarray):
    """A value of the model: nothing may be computed of it but by an operator, which is judged."""

    def __array_ufunc__(self, ufunc: np.ufunc, *_: Any, **__: Any) -> Any:
        raise PageError(f"{ufunc.__name__} of a value of the model; every step is an operator of `op`, which is judged")


class _Unnamed(_Value):
    """The result of an operator that has no name yet: what judges it has to see it first."""


def _zeros(*shape: int) -> np.ndarray:
    """Zeros without memory."""
    return np.broadcast_to(np.float32(0), shape)


def _value(*shape: int) -> np.ndarray:
    return _zeros(*shape).view(_Value)


class DryOperators:
    """The operators of a page on shapes. called: operator -> the choices it was called with. names: of its taps."""

    def __init__(self) -> None:
        self.scope = ""
        self.called: dict[str, dict[str, set[Any]]] = {}
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise PageError(f"refllm.ops has no operator {name!r} for pages")

    def within(self, scope: str) -> "DryOperators":
        inner = DryOperators()
        inner.scope, inner.called, inner.names = f"{scope}.", self.called, self.names
        return inner

    def tap(self, name: str, x: Any) -> Any:
        full = self.scope + name
        if not isinstance(x, np.ndarray):
            raise PageError(f"{full} is a {type(x).__name__}; expected the result of an operator")
        if full in self.names:
            raise PageError(f"{full} is named twice")
        self.names.append(full)
        return x.view(_Value)

    def linear(self, x: Any, weight: np.ndarray, bias: np.ndarray | None = None) -> Any:
        self._given("linear", x)
        fits = weight.ndim == 2 and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
        _require(fits, "linear", x=x, weight=weight, bias=bias)
        return _new(*x.shape[:-1], len(weight))

    def rms_norm(self, x: Any, weight: np.ndarray, eps: float) -> Any:
        self._given("rms_norm", x, eps=float(eps))
        return self._normed("rms_norm", x, weight, None)

    def layer_norm(self, x: Any, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> Any:
        self._given("layer_norm", x, eps=float(eps))
        return self._normed("layer_norm", x, weight, bias)

    def add(self, x: Any, y: Any) -> Any:
        self._given("add", x, y)
        _require(x.shape == y.shape, "add", x=x, y=y)
        return _new(*x.shape)

    def glu(self, gate: Any, up: Any, name: str) -> Any:
        self._given("glu", gate, up)
        _require(gate.shape == up.shape, "glu", gate=gate, up=up)
        ops.activation(np.zeros(1), name)  # refuses an unknown one
        return _new(*up.shape)

    def activation(self, x: Any, name: str) -> Any:
        self._given("activation", x)
        ops.activation(np.zeros(1), name)
        return _new(*x.shape)

    def split_heads(self, x: Any, heads: int) -> Any:
        self._given("split_heads", x)
        _require(x.ndim == 3 and x.shape[-1] % heads == 0, f"split_heads into {heads}", x=x)
        return ops.split_heads(_value(*x.shape), heads)

    def merge_heads(self, x: Any) -> Any:
        self._given("merge_heads", x)
        _require(x.ndim == 4, "merge_heads", x=x)
        return ops.merge_heads(_value(*x.shape))

    def rope(self, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
        self._given("rope", q, k, interleaved=bool(interleaved))
        fits = all(x.ndim == 4 and x.shape[-1] >= 2 * cos.shape[-1] for x in (q, k)) and cos.shape == sin.shape
        _require(fits, "rope", q=q, k=k, cos=cos, sin=sin)
        return _new(*q.shape), _new(*k.shape)

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        scale: float | None = None,
        causal: bool = True,
        key_mask: Any = None,
        mask: Any = None,
        window: int | None = None,
    ) -> Any:
        self._given("attention", q, k, v, window=window)
        fits = all(x.ndim == 4 for x in (q, k, v)) and k.shape[:3] == v.shape[:3] and q.shape[-1] == k.shape[-1]
        _require(fits and q.shape[1] % k.shape[1] == 0, "attention", q=q, k=k, v=v)
        if window is not None and window < 1:
            raise PageError(f"attention: window={window} must be at least 1, the query's own key")
        return _new(*q.shape[:3], v.shape[-1])

    def _normed(self, operator: str, x: Any, weight: np.ndarray, bias: np.ndarray | None) -> Any:
        with_all = [a.shape for a in (x, weight, bias) if a is not None]
        fits = weight.shape[-1:] == x.shape[-1:]
        try:
            fits = fits and np.broadcast_shapes(*with_all) == x.shape
        except ValueError:
            fits = False
        _require(fits, operator, x=x, weight=weight, bias=bias)
        return _new(*x.shape)

    def _given(self, operator: str, *inputs: Any, **choices: Any) -> None:
        for x in inputs:
            if isinstance(x, _Unnamed):
                raise PageError(
                    f"{operator} reads a result that has no name; every operator's result needs one: op.tap(name, x)"
                )
            if not isinstance(x, np.ndarray):
                raise PageError(f"{operator} was given a {type(x).__name__}; expected the result of an operator")
        kept = self.called.setdefault(operator, {})
        for name, choice in choices.items():
            kept.setdefault(name, set()).add(choice)


def _new(*shape: int) -> np.ndarray:
    return _zeros(*shape).view(_Unnamed)


def _require(fits: Any, operator: str, **arrays: Any) -> None:
    if not fits:
        shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in arrays.items() if a is not None)
        raise PageError(f"{operator}: the shapes do not fit: {shapes}")


class DryWeights(Mapping[str, np.ndarray]):
    """Tensors of these shapes, and a record of those that were read. prefix: "layers.3." for those of a layer."""

    low_memory = False

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str = "", read: set[str] | None = None) -> None:
        self._prefix, self.read = prefix, set() if read is None else read
        self._all = shapes
        self.shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}

    def layer(self, index: int) -> "DryWeights":
        return DryWeights(self._all, f"layers.{index}.", self.read)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise PageError(f"it reads the tensor {self._prefix + name!r}, which its `tensors` does not list")
        self.read.add(self._prefix + name)
        return _zeros(*self.shapes[name])

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.shapes else default

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def dry_run(
    forward: Callable[..., Any], config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[DryOperators, set[str]]:
    """The operators and the tensors that `forward` of a page uses. Raises PageError for what cannot be right, and
    whatever else the page raises."""
    op, weights = DryOperators(), DryWeights(shapes)
    x_BSE = _value(_B, _S, config.hidden_size)
    table = _value(_B, _S, config.rotary_dim // 2)
    out = forward(op, config, weights, x_BSE, table, table, {"causal": True}, NoCache())
    shape = getattr(out, "shape", None)
    if shape != x_BSE.shape:
        raise PageError(
            f"forward returns {'nothing' if out is None else list(shape or ())}; expected [B, S, hidden_size]"
        )
    if isinstance(out, _Unnamed):
        raise PageError("what forward returns has no name; it is model.norm")
    return op, weights.read


def names_of(page: Any, config: Any) -> list[str]:
    """The names of all values of a page."""
    return dry_run(page.forward, config, page.tensors(config))[0].names
