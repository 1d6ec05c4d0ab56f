"""The contracts as a table: what every operator takes and returns, and which axes of its arguments are the same."""

import inspect
from dataclasses import dataclass

from refllm import ops
from refllm.errors import InputError

ROWS = "*"
"""Any number of axes, of any length: the front of what works row by row."""

_BATCH = ("B", "N", ROWS)
"""First axes whose entries do not know of each other."""

_NORM = {"x": (ROWS, "E"), "weight": ("E",)}
_ADD = {"x": (ROWS, "E"), "residual": (ROWS, "E"), "weight": ("E",)}
_TABLE = {"cos": ("B", "S", "R/2"), "sin": ("B", "S", "R/2")}  # or without B
_HEADS = {"q": ("B", "H", "S", "D"), "k": ("B", "K", "S", "D")}


@dataclass(frozen=True)
class Signature:
    """arguments: their axes by name, for those that are arrays; optional ones included. outputs: the same, in order.

    float32: the outputs whose dtype is float32 whatever that of the arguments is.
    once: under the policy `fused`, the outputs that are rounded once, at the end, and nowhere before.
    """

    operator: str
    arguments: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    float32: tuple[str, ...] = ()
    once: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """How it is called: "rms_norm(x, weight, eps) -> y"."""
        words: list[str] = []
        star = False
        for p in inspect.signature(getattr(ops, self.operator)).parameters.values():
            if p.name in ("ar", "tap", "mask"):
                continue
            if p.kind is p.KEYWORD_ONLY and not star:
                words, star = [*words, "*"], True
            words.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
        return f"{self.operator}({', '.join(words)}) -> {', '.join(self.outputs)}"


_ALL = (
    Signature("rms_norm", _NORM, {"y": (ROWS, "E")}, once=("y",)),
    Signature("add_rms_norm", _ADD, {"y": (ROWS, "E"), "residual + x": (ROWS, "E")}, once=("residual + x",)),
    Signature("layer_norm", {**_NORM, "bias": ("E",)}, {"y": (ROWS, "E")}, once=("y",)),
    Signature(
        "add_layer_norm",
        {**_ADD, "bias": ("E",)},
        {"y": (ROWS, "E"), "residual + x": (ROWS, "E")},
        once=("residual + x",),
    ),
    Signature("rope", {**_HEADS, **_TABLE}, dict(_HEADS), once=("q", "k")),
    Signature("norm_rope", {**_HEADS, "q_weight": ("H", "D"), "k_weight": ("K", "D"), **_TABLE}, dict(_HEADS)),
    Signature(
        "rms_norm_qkv_rope",
        {"x": ("B", "S", "E"), "norm_weight": ("E",), "w_qkv": ("(H+2K)D", "E"), "b_qkv": ("(H+2K)D",), **_TABLE},
        {**_HEADS, "v": ("B", "K", "S", "D")},
    ),
    Signature(
        "attention",
        {"q": ("B", "H", "S", "D"), "k": ("B", "K", "T", "D"), "v": ("B", "K", "T", "D"), "key_mask": ("B", "T")},
        {"o": ("B", "H", "S", "D"), "lse": ("B", "H", "S")},
        float32=("lse",),
    ),
    Signature(
        "decode_attention",
        {
            "q": ("B", "H", "S", "D"),
            "k_cache": ("B", "K", "N", "D"),
            "v_cache": ("B", "K", "N", "D"),
            "lengths": ("B",),
        },
        {"o": ("B", "H", "S", "D")},
    ),
    Signature("swiglu", {"gate": (ROWS, "F"), "up": (ROWS, "F")}, {"y": (ROWS, "F")}, once=("y",)),
    Signature("relu2", {"x": (ROWS, "F")}, {"y": (ROWS, "F")}, once=("y",)),
    Signature("cross_entropy", {"logits": ("N", "V"), "labels": ("N",)}, {"loss": ("N",)}, float32=("loss",)),
    Signature(
        "linear_cross_entropy",
        {"x": ("N", "E"), "weight": ("V", "E"), "labels": ("N",)},
        {"loss": ("N",)},
        float32=("loss",),
    ),
)
SIGNATURES = {signature.operator: signature for signature in _ALL}
"""By operator, in the order in which they are listed."""


def signature(operator: str) -> Signature:
    """The signature of an operator. Raises InputError for another name."""
    if operator not in SIGNATURES:
        raise InputError(
            f"{operator!r} is no operator; there are {', '.join(SIGNATURES)}. Their signatures: refllm check-op --list"
        )
    return SIGNATURES[operator]


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
