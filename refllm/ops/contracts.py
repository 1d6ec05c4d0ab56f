"""One record per operator: everything that is known of it beside its definition and its kernels.

    contract_of("rms_norm").outputs             # {"y": ("*", "E")}
    for known in CONTRACTS.values(): ...     # in the order in which they are listed everywhere

What the tests, the search for counterexamples, the benchmarks, the goldens and the kernels know of an operator follows
from its record. What needs Torch, Triton or Hypothesis stands there by name, so that nothing of it is imported here.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from refllm.errors import InputError
from refllm.ops import traffic
from refllm.ops.programs import PROGRAMS

ROWS = "*"
"""Any number of axes, of any length: the front of what works row by row."""

_AXES = re.compile(r"_[A-Z]+$")
_OURS = ("ar", "tap", "mask")  # parameters of a definition that no kernel has

_BATCH = ("B", "N", ROWS)
"""First axes whose entries do not know of each other."""


@dataclass(frozen=True)
class Contract:
    """What an operator takes and returns, where it rounds, and where the rest of its knowledge is found.

    arguments: their axes by name, for those that are arrays; optional ones included. outputs: the same, in order.
    inputs: its strategy, a function of a module in `refllm.strategies`, "norms:norm".
    traffic: bytes and flops of one call, from its arguments (`refllm.ops.traffic`).
    float32: the outputs whose dtype is float32 whatever that of the arguments is.
    once: under the policy `fused`, the outputs that are rounded once, at the end, and nowhere before.
    product: it rounds inside a matrix product too (softmax weights, the normed row), at a place of its choosing.
    sums: it has sums over a row, whose error the elements of that row share.
    kinds: what the values of an argument are, where they are not just numbers (normal, of size 1): "matrix" (rows of
        length 1), "wide" (of a few units), "logits", "bias" (may be None), "heads" (stored [B, S, heads, D]), "halves"
        (of one tensor), "table" (cos and sin), "labels", "lengths", "mask".
    """

    operator: str
    arguments: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    inputs: str
    traffic: Callable[..., traffic.Traffic]
    float32: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    product: bool = False
    sums: bool = True
    kinds: dict[str, str] = field(default_factory=dict)

    def kind(self, argument: str) -> str:
        """What the values of an array argument are; "values" where nothing is special."""
        return self.kinds.get(argument, "values")

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of its signature, without the suffixes that name axes."""
        every = inspect.signature(self.definition).parameters.values()
        return {_AXES.sub("", p.name): p for p in every if p.name not in _OURS}

    @property
    def definition(self) -> Callable[..., Any]:
        """The function of `refllm.ops`."""
        found: Callable[..., Any] = getattr(import_module("refllm.ops"), self.operator)
        return found

    @property
    def program(self) -> str:
        """Source of `definition(...)` in float64 NumPy, which runs without refllm."""
        return PROGRAMS[self.operator]

    @property
    def text(self) -> str:
        """How it is called: "rms_norm(x, weight, eps) -> y"."""
        words: list[str] = []
        star = False
        for p in self.parameters.values():
            if p.kind is p.KEYWORD_ONLY and not star:
                words, star = [*words, "*"], True
            words.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
        return f"{self.operator}({', '.join(words)}) -> {', '.join(self.outputs)}"


Axes = dict[str, tuple[str, ...]]

_X: Axes = {"x": (ROWS, "E")}
_RESIDUAL: Axes = {"residual": (ROWS, "E")}
_WEIGHT: Axes = {"weight": ("E",)}
_BIAS: Axes = {"bias": ("E",)}
_TABLE: Axes = {"cos": ("B", "S", "R/2"), "sin": ("B", "S", "R/2")}  # or without B
_HEADS: Axes = {"q": ("B", "H", "S", "D"), "k": ("B", "K", "S", "D")}
_Y: Axes = {"y": (ROWS, "E")}
_Y_AND_SUM: Axes = {"y": (ROWS, "E"), "residual + x": (ROWS, "E")}

_BIAS_KIND = {"bias": "bias"}
_HEADS_KIND = {"q": "heads", "k": "heads"}
_TABLE_KIND = {"cos": "table", "sin": "table"}

_ALL = (
    Contract(
        "rms_norm",
        _X | _WEIGHT,
        _Y,
        inputs="norms:norm",
        traffic=traffic.norm(flops=5, copies=2),
        once=("y",),
    ),
    Contract(
        "add_rms_norm",
        _X | _RESIDUAL | _WEIGHT,
        _Y_AND_SUM,
        inputs="norms:norm",
        traffic=traffic.norm(flops=6, copies=4),
        once=("residual + x",),
    ),
    Contract(
        "layer_norm",
        _X | _WEIGHT | _BIAS,
        _Y,
        inputs="norms:norm",
        traffic=traffic.norm(flops=9, copies=2),
        once=("y",),
        kinds=_BIAS_KIND,
    ),
    Contract(
        "add_layer_norm",
        _X | _RESIDUAL | _WEIGHT | _BIAS,
        _Y_AND_SUM,
        inputs="norms:norm",
        traffic=traffic.norm(flops=10, copies=4),
        once=("residual + x",),
        kinds=_BIAS_KIND,
    ),
    Contract(
        "rope",
        _HEADS | _TABLE,
        dict(_HEADS),
        inputs="rotations:rope",
        traffic=traffic.rope,
        once=("q", "k"),
        sums=False,
        kinds=_HEADS_KIND | _TABLE_KIND,
    ),
    Contract(
        "norm_rope",
        {**_HEADS, "q_weight": ("H", "D"), "k_weight": ("K", "D"), **_TABLE},
        dict(_HEADS),
        inputs="rotations:rope",
        traffic=traffic.norm_rope,
        kinds=_HEADS_KIND | _TABLE_KIND,
    ),
    Contract(
        "rms_norm_qkv_rope",
        {"x": ("B", "S", "E"), "norm_weight": ("E",), "w_qkv": ("(H+2K)D", "E"), "b_qkv": ("(H+2K)D",), **_TABLE},
        {**_HEADS, "v": ("B", "K", "S", "D")},
        inputs="rotations:projected",
        traffic=traffic.qkv,
        product=True,
        kinds={"w_qkv": "matrix", "b_qkv": "bias"} | _TABLE_KIND,
    ),
    Contract(
        "attention",
        {"q": ("B", "H", "S", "D"), "k": ("B", "K", "T", "D"), "v": ("B", "K", "T", "D"), "key_mask": ("B", "T")},
        {"o": ("B", "H", "S", "D"), "lse": ("B", "H", "S")},
        inputs="attentions:attention",
        traffic=traffic.attention,
        float32=("lse",),
        product=True,
        kinds={"q": "heads", "key_mask": "mask"},
    ),
    Contract(
        "decode_attention",
        {
            "q": ("B", "H", "S", "D"),
            "k_cache": ("B", "K", "N", "D"),
            "v_cache": ("B", "K", "N", "D"),
            "lengths": ("B",),
        },
        {"o": ("B", "H", "S", "D")},
        inputs="attentions:decode",
        traffic=traffic.decode_attention,
        product=True,
        kinds={"q": "heads", "lengths": "lengths"},
    ),
    Contract(
        "swiglu",
        {"gate": (ROWS, "F"), "up": (ROWS, "F")},
        {"y": (ROWS, "F")},
        inputs="activations:swiglu",
        traffic=traffic.swiglu,
        once=("y",),
        sums=False,
        kinds={"gate": "halves", "up": "halves"},
    ),
    Contract(
        "relu2",
        {"x": (ROWS, "F")},
        {"y": (ROWS, "F")},
        inputs="activations:relu2",
        traffic=traffic.relu2,
        once=("y",),
        sums=False,
        kinds={"x": "wide"},
    ),
    Contract(
        "cross_entropy",
        {"logits": ("N", "V"), "labels": ("N",)},
        {"loss": ("N",)},
        inputs="losses:cross_entropy",
        traffic=traffic.cross_entropy,
        float32=("loss",),
        kinds={"logits": "logits", "labels": "labels"},
    ),
    Contract(
        "linear_cross_entropy",
        {"x": ("N", "E"), "weight": ("V", "E"), "labels": ("N",)},
        {"loss": ("N",)},
        inputs="losses:linear_cross_entropy",
        traffic=traffic.linear_cross_entropy,
        float32=("loss",),
        product=True,
        kinds={"weight": "matrix", "labels": "labels"},
    ),
)
CONTRACTS = {known.operator: known for known in _ALL}
"""The record of every operator, in the order in which they are listed."""

OPERATORS = tuple(CONTRACTS)
"""The names: operators that exist as NumPy definition, as plain Torch and as Triton kernel."""


def contract_of(operator: str) -> Contract:
    """The record of an operator. Raises InputError for another name."""
    if operator not in CONTRACTS:
        raise InputError(
            f"{operator!r} is no operator; there are {', '.join(CONTRACTS)}. Their signatures: refllm check-op --list"
        )
    return CONTRACTS[operator]


def is_batched(axes: tuple[str, ...], ndim: int) -> bool:
    """Whether the first axis of an array with `ndim` axes is one of rows that do not know of each other."""
    return axes[0] in _BATCH and (ndim > 1 if ROWS in axes else ndim == len(axes))


def axis_names(axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """One name per axis of an array with `ndim` axes: ROWS stretches, and a table may lack its batch axis."""
    if ROWS in axes:
        front = ndim - (len(axes) - 1)
        rows = tuple(f"rows{i}" for i in range(front)) if front > 1 else ("rows",) * front
        return (*rows, *axes[1:])
    return axes[len(axes) - ndim :]
