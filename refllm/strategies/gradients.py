"""Calls of the backward operators: those of the forward ones, with an incoming gradient for each result.

    backward_call(call, "along the input")       # a call of the forward operator, with gradients of that kind

What a gradient is matters more than how large the limits are. Gaussian gradients hide the second term of a norm, which
shrinks as 1 / sqrt(E) beside the first: a gradient along the input does not. Terms of one sign show a sum that is kept
in a narrow format, and a gradient of stride 0, as `.sum().backward()` hands it in, whoever takes it for dense.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refllm import ops
from refllm.ops.backward_contracts import BACKWARD, BackwardContract
from refllm.ops.contracts import without_axes
from refllm.strategies.arrays import Array, Kept
from refllm.strategies.call import Call

_SEED = 40
"""The seed of the first incoming gradient: no other array of a fixed call has it, or those after it."""


def _plain(d: Array, partner: Array | None) -> Array:
    return d


def _along(d: Array, partner: Array | None) -> Array:
    """The very numbers of the argument that it flows to, wherever these lie in memory."""
    if partner is None or partner.shape != d.shape:
        return replace(d, mean=1.0)
    return replace(partner, dtype=d.dtype, layout="dense" if partner.layout != "expanded" else "expanded")


def _laid(layout: str, axes: int) -> Callable[[Array, Array | None], Array]:
    return lambda d, _: replace(d, layout=layout) if len(d.shape) >= axes and 0 not in d.shape else d


def _zero_rows(d: Array, _: Array | None) -> Array:
    return replace(d, planted=(((0,), 0.0),)) if len(d.shape) > 1 and d.shape[0] else d


GRADIENTS: dict[str, Callable[[Array, Array | None], Array]] = {
    "plain": _plain,
    "along the input": _along,
    "of one sign": lambda d, _: replace(d, values="uniform", mean=0.5),
    "zero in a row": _zero_rows,
    "of a sum: one number, stride 0": lambda d, _: replace(
        d, values="ones", layout="constant" if d.shape and 0 not in d.shape else "dense"
    ),
    "repeated over the batch": _laid("expanded", 2),
    "transposed": _laid("transposed", 2),
    "a view of a wider one": _laid("shifted", 1),
    "with gaps": _laid("gaps", 2),
    "every second element": _laid("step", 1),
    "tokens before heads": _laid("heads", 3),
    "small": lambda d, _: replace(d, scale=2.0**-10),
    "large": lambda d, _: replace(d, scale=2.0**6),
    "zero": lambda d, _: replace(d, values="zeros"),
}
"""What an incoming gradient may be: name -> the recipe, made from a plain one and the argument that it flows to."""


def backward_call(call: Call, gradient: str = "plain", kept: bool = True, only: int | None = None) -> Call:
    """The call of the backward operator that belongs to a call of the forward one.

    gradient: of `GRADIENTS`. kept: attention is given what its forward pass kept. only: the number of the incoming
    gradient that is of that kind, the others being plain; all if None.
    """
    known = BACKWARD[f"{call.operator}_backward"]
    given = known.forward.bound(call.arguments, dict(call.keywords))
    shapes = dict(zip(known.forward.outputs, _shapes(known, call), strict=False))
    wide = "loss" in known.forward.outputs
    values: dict[str, Any] = dict(given)
    for i, (name, result) in enumerate(zip(known.incoming, known.forward.outputs, strict=False)):
        if result in shapes:
            dtype = "float32" if wide or result in known.forward.float32 else call.dtype
            d = Array(shapes[result], dtype, "eighths" if wide else "normal", seed=_SEED + i)
            d = replace(d, values="ones", scale=0.75) if not d.shape else d
            kind = gradient if only in (None, i) else "plain"
            values[name] = GRADIENTS[kind](d, _partner(known, given, i)) if not wide else _of_a_loss(d, kind)
    if "p" in known.arguments:
        values["p"] = replace(given["x"], values="softmax", mean=0.0, planted=())
    for name, axes in zip(known.kept, ((0, 1, 2, 3), (0, 1, 2)), strict=False):
        shape = tuple(given["q"].shape[i] for i in axes)
        dtype = "float32" if name == "lse" else call.dtype
        values[name] = Kept(shape, dtype, "zeros", result=name) if kept else None
    parameters = known.parameters.values()
    positional = tuple(values.get(without_axes(p.name)) for p in parameters if p.kind is not p.KEYWORD_ONLY)
    keywords = [(without_axes(p.name), p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    named = tuple((n, values[n]) for n, default in keywords if n in values and (n in _said(call) or n == "dlse"))
    kind = call.kind if gradient == "plain" else f"{call.kind}; gradient {gradient}"
    return Call(known.operator, call.dtype, positional, named, kind)


_NAN_STAYS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "swiglu", "relu2")


def _said(call: Call) -> set[str]:
    return {name for name, _ in call.keywords}


def _shapes(known: BackwardContract, call: Call) -> list[tuple[int, ...]]:
    """The shapes of the results of the forward operator; a loss is one number, or one per row."""
    keywords = dict(call.keywords)
    shapes = known.forward.result_shapes(call.arguments, keywords)
    if "reduction" in known.forward.choices and keywords.get("reduction", "mean") != "none":
        return [()]
    return shapes


def _partner(known: BackwardContract, given: dict[str, Any], i: int) -> Array | None:
    """The argument that the i-th incoming gradient flows to: that of its axes."""
    axes = list(known.forward.outputs.values())[i]
    same = [x for name, x in given.items() if isinstance(x, Array) and known.forward.arguments.get(name) == axes]
    return same[min(i, len(same) - 1)] if same else None


def _of_a_loss(d: Array, gradient: str) -> Array:
    """Numbers of few digits: code whose loss is in the narrow format is handed them in that."""
    if not d.shape:
        return replace(d, values="zeros") if gradient == "zero" else d
    if gradient in ("small", "large", "zero"):
        return GRADIENTS[gradient](d, None)
    if gradient == "zero in a row" and d.shape[0]:
        return replace(d, planted=(((0,), 0.0),))
    if gradient.startswith("of a sum"):
        return GRADIENTS[gradient](d, None)
    return replace(d, layout="step") if gradient == "every second element" else d


def stands(call: Call) -> bool:
    """Whether a gradient is defined at a call of a forward operator: where no NaN and no infinity reaches a result. A
    query without a key has a log-sum-exp of -inf, and a class of probability 0 has a gradient; a NaN in a row of a norm
    is one in all of its gradient, and in an element of an activation one in that."""
    arrays = [x for x in (*call.arguments, *(x for _, x in call.keywords)) if isinstance(x, Array)]
    strange = [value for x in arrays for _, value in x.planted if not np.isfinite(value)]
    if not strange or (call.operator == "cross_entropy" and all(value == -np.inf for value in strange)):
        return True
    if call.operator in _NAN_STAYS and not np.isinf(strange).any():
        return True
    arguments, keywords = call.arrays()
    with np.errstate(all="ignore"):
        out = getattr(ops, call.operator)(*arguments, **keywords)
    first = out[0] if isinstance(out, tuple) else out
    return bool(np.isfinite(first).all())
