"""One record per backward operator, derived from that of the forward one.

    contract_of("rms_norm_backward").arguments     # dy, and those of rms_norm
    contract_of("rms_norm_backward").outputs       # dx, dweight: the gradients of its tensor arguments

The signature of the definition says what a backward operator takes: the incoming gradients, one per result of the
forward operator, then the forward's arguments, then what the forward pass kept. Its axes, kinds, choices and dtypes are
those of the forward record. What stands here beside that is what the forward record cannot say: where the result is
rounded once, which products there are, and the forward records of the operators that exist backward alone.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from math import prod
from typing import Any

from refllm.ops.backward_programs import PROGRAMS
from refllm.ops.contracts import CONTRACTS, HIDDEN, ROWS, Axes, Contract, without_axes

SUFFIX = "_backward"
_NO_GRADIENT = ("table", "labels", "ids", "lengths", "mask", "target")
"""Kinds of arguments that a loss does not depend on smoothly, or that nobody trains."""
_KEPT: Axes = {"o": ("B", "H", "S", "D"), "lse": ("B", "H", "S")}
"""What the forward pass of attention may have kept. None: it is computed again."""


@dataclass(frozen=True)
class BackwardContract(Contract):
    """A record of a backward operator: `Contract`, with the forward operator that it belongs to.

    forward: its record. incoming: the incoming gradient of each result of the forward operator, by its name, in order.
    gradient_of: each output, and the argument of the forward operator whose gradient it is; it has that one's shape and
        dtype, and is None where that is None.
    kept: arguments that are results of the forward pass, in order; None where they are computed again.
    """

    forward: Contract = field(kw_only=True)
    incoming: tuple[str, ...] = field(kw_only=True)
    gradient_of: dict[str, str] = field(kw_only=True)
    kept: tuple[str, ...] = field(kw_only=True)

    def asked(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[str, ...]:
        """The outputs of a call that are no None, by name."""
        given = self.bound(arguments, keywords)
        return tuple(name for name, of in self.gradient_of.items() if of not in given or given[of] is not None)

    def result_shapes(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> list[tuple[int, ...]]:
        """The shapes of the results of a call that are no None."""
        given = self.bound(arguments, keywords)
        names = self.asked(arguments, keywords)
        return [tuple(given[self.like(name)].shape) for name in names]

    def like(self, output: str) -> str:
        """The argument that has the shape and the dtype of an output: the one whose gradient it is; or the incoming
        gradient, where that is not needed (a rotation, a softmax)."""
        names = (self.gradient_of[output], output, *self.incoming)
        return next(name for name in names if name in self.arguments)


def is_backward(operator: str) -> bool:
    """Whether this is the name of a backward operator."""
    return operator in BACKWARD


def forward_name(operator: str) -> str:
    """The name of an operator without the suffix of backward ones: "rms_norm" for "rms_norm_backward"."""
    return operator.removesuffix(SUFFIX)


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


def _only(
    operator: str, arguments: Axes, outputs: Axes, inputs: str, flops: Callable[..., int], **more: Any
) -> Contract:
    """The forward record of an operator that has a definition and a backward pass, and no kernel of its own."""
    return Contract(operator, arguments, outputs, inputs, program="", flops=flops, witness="torch", **more)


_X: Axes = {"x": (ROWS, "E")}
_FORWARD_ONLY = (
    _only(
        "linear",
        {"x": (ROWS, "E"), "weight": ("F", "E"), "bias": ("F",)},
        {"y": (ROWS, "F")},
        "backward_only:only",
        lambda x, weight, *_: 2 * prod(x.shape) * len(weight),
        product=True,
        kinds={"weight": "matrix", "bias": "bias"},
    ),
    _only(
        "embedding",
        {"ids": (ROWS,), "weight": ("V", "E")},
        {"y": (ROWS, "E")},
        "backward_only:only",
        _no_flops,
        kinds={"ids": "ids"},
    ),
    _only(
        "softmax",
        {"x": (ROWS, "T")},
        {"p": (ROWS, "T")},
        "backward_only:only",
        lambda x: 8 * prod(x.shape),
    ),
    _only(
        "activation",
        _X,
        {"y": (ROWS, "E")},
        "backward_only:only",
        lambda x, *_: 8 * prod(x.shape),
        sums=False,
        elementwise=True,
        kinds={"x": "wide"},
    ),
    _only(
        "glu",
        {"gate": (ROWS, "F"), "up": (ROWS, "F")},
        {"h": (ROWS, "F")},
        "backward_only:only",
        lambda gate, *_: 10 * prod(gate.shape),
        sums=False,
        elementwise=True,
        kinds={"gate": "halves", "up": "halves"},
    ),
    _only(
        "mean_squared_error",
        {"x": (ROWS, "E"), "target": (ROWS, "E")},
        {"loss": ()},
        "backward_only:only",
        lambda x, *_: 3 * prod(x.shape),
        elementwise=True,
        sums=False,
        float32=("loss",),
        kinds={"target": "target"},
    ),
    _only(
        "binary_cross_entropy",
        {"logits": (ROWS, "E"), "target": (ROWS, "E")},
        {"loss": ()},
        "backward_only:only",
        lambda x, *_: 8 * prod(x.shape),
        elementwise=True,
        sums=False,
        float32=("loss",),
        kinds={"target": "target"},
    ),
)
FORWARDS = {known.operator: known for known in (*CONTRACTS.values(), *_FORWARD_ONLY)}
"""The forward record of every operator that has a backward pass."""

_ONCE = {
    "rope": ("dq", "dk"),
    "swiglu": ("dgate", "dup"),
    "glu": ("dgate", "dup"),
    "relu2": ("dx",),
    "activation": ("dx",),
    "softmax": ("ds",),
    "cross_entropy": ("dlogits",),
    "mean_squared_error": ("dx",),
    "binary_cross_entropy": ("dlogits",),
    "rms_norm": ("dx",),
    "layer_norm": ("dx",),
}
"""Outputs that are rounded once under the policy `fused`, at the end, and are no sums over rows."""
_TIMES = {"attention": 2.5, "decode_attention": 2.5}
"""Flops of a backward pass over those of the forward one: each of its products comes back as two, and attention makes
its scores again."""


def _derived(known: Contract) -> BackwardContract:
    """The record of the backward pass of a forward operator."""
    name = known.operator + SUFFIX
    definition = getattr(import_module("refllm.ops"), name)
    parameters = [without_axes(p) for p in inspect.signature(definition).parameters]
    parameters = [p for p in parameters if p not in HIDDEN]
    results = list(known.outputs) if known.operator != "attention" else ["o"]
    incoming = parameters[: len(results)]
    axes: Axes = dict(zip(incoming, (known.outputs[result] for result in results), strict=True))
    axes |= {p: known.arguments[p] for p in parameters[len(results) :] if p in known.arguments}
    kept = tuple(p for p in _KEPT if p in parameters)
    axes |= {p: _KEPT[p] for p in kept}
    if "dlse" in parameters:
        axes["dlse"] = known.outputs["lse"]
    if "p" in parameters:  # of a softmax the weights stand for the scores
        axes["p"] = known.outputs["p"]
    smooth = [x for x in known.arguments if known.kind(x) not in _NO_GRADIENT]
    gradient_of = {"ds" if known.operator == "softmax" else f"d{x}": x for x in smooth}
    heads = {p: "heads" for p in incoming if known.kind("q") == "heads" and len(axes[p]) == 4}
    own: dict[str, Any] = {f.name: getattr(known, f.name) for f in fields(Contract)}
    own |= {
        "operator": name,
        "arguments": {p: axes[p] for p in parameters if p in axes},
        "outputs": {d: known.arguments[x] for d, x in gradient_of.items()},
        "program": PROGRAMS[known.operator],
        "flops": _flops(known, incoming),
        "witness": "torch autograd",
        "float32": (),
        "once": _ONCE.get(known.operator, ()),
        "sums": known.sums or known.operator in ("linear", "embedding"),
        "kinds": heads | {p: kind for p, kind in known.kinds.items() if p in axes},
    }
    return BackwardContract(
        **own,
        forward=known,
        incoming=(*incoming, *(["dlse"] if "dlse" in parameters else [])),
        gradient_of=gradient_of,
        kept=kept,
    )


def _flops(known: Contract, incoming: Sequence[str]) -> Callable[..., int]:
    """Those of the forward pass, twice: of its arguments, of which a rotation has the incoming gradients alone."""
    times, n = _TIMES.get(known.operator, 2.0), len(incoming) if known.operator != "rope" else 0

    def flops(*arguments: Any, **keywords: Any) -> int:
        own = {name: value for name, value in keywords.items() if name != "dlse"}
        given = arguments[n : n + len([p for p in known.parameters.values() if p.kind is not p.KEYWORD_ONLY])]
        return int(times * known.flops(*given, **own))

    return flops


BACKWARD = {f"{known.operator}{SUFFIX}": _derived(known) for known in FORWARDS.values()}
"""The record of every backward operator, by its name; those of the forward ones are `CONTRACTS`."""
