"""The operators as a model page sees them: `refllm.ops` with the arithmetic filled in, and `tap` to name values.

A page calls `op.rms_norm(x, weight, eps)` and does not know whether that is exact, emulates bfloat16, or is being
recorded.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from refllm import ops
from refllm.parallel import for_each, one_blas_thread, threads
from refllm.precision import EXACT, Arithmetic
from refllm.storage.stacks import stack_of

_BOUND = [name for name in ops.__all__ if callable(getattr(ops, name))]
_OWN = ("linear", "attention")
_ROW_BY_ROW = ("add", "glu", "activation", "rms_norm", "layer_norm")
_NUMBERS_PER_PIECE = 1 << 16  # pieces of 256 KiB of float32: they stay in cache between the passes of one operator

_WORTH_READING_TOGETHER = 1 << 20  # numbers in a weight
_WORTH_COMPUTING_TOGETHER = 1 << 24  # multiplications
_NOTHING: tuple[np.ndarray | None, np.ndarray | None, np.ndarray] = (None, None, np.empty(0))


class Recorder(Protocol):
    """Who wants named values of a forward pass. Names are module paths such as "model.layers.3.mlp.up_proj"."""

    def wants(self, name: str) -> bool:
        """Whether `record` should be called for this name; an unwanted value may never be computed as such."""
        ...

    def record(self, name: str, value: np.ndarray) -> None:
        """Called once per name, in the order of computation. The array must not be modified; copy it to keep it."""
        ...


class Taps:
    """Shows values to a recorder under their names. scope: what is put before a name, such as "model.layers.3."."""

    recorder: Recorder | None
    scope: str

    def tap(self, name: str, value: Any) -> Any:
        """`value`, shown to the recorder under its name."""
        if self.recorder is not None and self.recorder.wants(self.scope + name):
            self.recorder.record(self.scope + name, value)
        return value

    def wanted(self, *names: str) -> bool:
        """Whether there is a recorder who wants one of these values."""
        return self.recorder is not None and any(self.recorder.wants(self.scope + name) for name in names)


class Operators(Taps):
    """Every function of `refllm.ops`, bound to one `Arithmetic`, and `tap`.

    scope: what `tap` puts before a name, such as "model.layers.3.".
    """

    def __init__(self, ar: Arithmetic = EXACT, recorder: Recorder | None = None, scope: str = "") -> None:
        self.ar = ar
        self.recorder = recorder
        self.scope = scope
        # The bits of what is emulated are those of separate products.
        self._native = ar.dtype == "float32" and not ar.policy.points
        self._shared = _NOTHING
        bound: dict[str, Callable[..., Any]] = {name: partial(getattr(ops, name), ar=ar) for name in _BOUND}
        # A torch kernel treats the end of an array unlike its middle; pieces would move the end.
        if not ar.emulates_torch:
            for name in _ROW_BY_ROW:
                bound[name] = partial(_in_pieces, bound[name])
        self.__dict__ |= {name: function for name, function in bound.items() if name not in _OWN}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"refllm.ops has no operator {name!r}")

    def within(self, scope: str) -> "Operators":
        """The same operators, whose taps are named `scope` + "." + name."""
        within = Operators.__new__(Operators)
        within.__dict__ |= self.__dict__  # what is bound, it shares
        within.scope = f"{scope}."
        return within

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """`ops.linear`; where nothing is rounded, one product for all projections of x whose weights lie together."""
        if not self._native:
            return ops.linear(x, weight, bias, ar=self.ar)
        whole, rows = stack_of(weight) or (weight, slice(0, len(weight)))
        of_x, of_whole, y = self._shared
        if of_x is not x or of_whole is not whole:
            y = _product(x, whole, self.ar)
        self._shared = _NOTHING if rows.stop == len(whole) else (x, whole, y)  # not kept longer than it is used
        y = y[..., rows]
        return y if bias is None else y + bias

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **masking: Any) -> np.ndarray:
        """`ops.attention`; scores and weights are kept as whole arrays only for a recorder who wants them."""
        wanted = self.wanted("self_attn.scores", "self_attn.probs")
        tap = (lambda name, value: self.tap(f"self_attn.{name}", value)) if wanted else None
        o_BHSD = ops.attention(q, k, v, tap=tap, ar=self.ar, **masking)
        assert isinstance(o_BHSD, np.ndarray)
        return o_BHSD


def _product(x: np.ndarray, weight: np.ndarray, ar: Arithmetic) -> np.ndarray:
    """`ops.linear` without bias: cut along the outputs for several threads, or on one thread if it is small.

    One row with much to read is left to the threads of BLAS, which are sooner awake.
    """
    rows, large = x.size // x.shape[-1], weight.size >= _WORTH_READING_TOGETHER
    if ar.product is not None or weight.dtype != ar.work or (rows == 1 and large):
        return ops.linear(x, weight, ar=ar)
    if threads() == 1 or not (large or rows * weight.size >= _WORTH_COMPUTING_TOGETHER):
        with one_blas_thread():
            return ops.linear(x, weight, ar=ar)
    x_NI, y_NO = x.reshape(rows, -1), np.empty((rows, len(weight)), ar.work)

    def columns(part: slice) -> None:
        np.matmul(x_NI, weight[part].T, out=y_NO[:, part])

    cuts = np.linspace(0, len(weight), threads() + 1).astype(int)
    for_each(columns, [slice(start, stop) for start, stop in pairwise(cuts.tolist())])
    return y_NO.reshape(*x.shape[:-1], len(weight))


def _in_pieces(function: Callable[..., np.ndarray], x: np.ndarray, *others: Any) -> np.ndarray:
    """function(x, *others) of operators that treat every row [.., E] alone, over pieces of rows, on several threads.

    x: [B, S, E]. Those of `others` that have its number of rows are cut along; weights and numbers are not.
    """
    if x.ndim != 3 or x.size < 2 * _NUMBERS_PER_PIECE:
        return function(x, *others)
    B, S, E = x.shape
    out = np.empty((B, S, E), x.dtype)
    step = max(1, _NUMBERS_PER_PIECE // E)

    def piece(at: tuple[int, slice]) -> None:
        out[at] = function(x[at], *(o[at] if isinstance(o, np.ndarray) and o.ndim == 3 else o for o in others))

    for_each(piece, [(b, slice(s, s + step)) for b in range(B) for s in range(0, S, step)])
    return out
