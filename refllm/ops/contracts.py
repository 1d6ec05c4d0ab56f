"""One record per operator: everything that is known of it beside its definition and its kernels.

    contract_of("rms_norm").outputs             # {"y": ("*", "E")}
    for known in CONTRACTS.values(): ...     # in the order in which they are listed everywhere

What the tests, the search for counterexamples, the benchmarks, the goldens and the kernels know of an operator follows
from its record, so there is no other table of operators. What needs Torch, Triton or Hypothesis stands here by name, or
is found by the name of the operator, so that nothing of it is imported here.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

from refllm.errors import InputError
from refllm.ops import programs

ROWS = "*"
"""Any number of axes, of any length: the front of what works row by row."""

_AXES = re.compile(r"_[A-Z]+$")
HIDDEN = ("ar", "tap", "mask", "window", "needed")
"""Parameters of a definition that no kernel has."""

_BATCH = ("B", "N", ROWS)
"""First axes whose entries do not know of each other."""


@dataclass(frozen=True)
class Contract:
    """What an operator takes and returns, where it rounds, and where the rest of its knowledge is found.

    arguments: their axes by name, for those that are arrays; optional ones included. outputs: the same, in order.
    inputs: its strategy, a function of a module in `refllm.strategies`, "norms:norm".
    program: source of `definition(...)` in float64 NumPy, which runs without refllm: for reproductions. It takes the
        arguments in order and returns a tuple of outputs.
    flops: floating-point operations of one call, those of the formula at the top of its kernel file, from its arguments
        as tensors. A product of [N, I] and [I, O] has 2 N I O.
    witness: who confirms its goldens, in words (`refllm.golden.witness`).
    or_float32: the arguments that may be float32 beside narrower others.
    choices: the words that an argument may be.
    float32: the outputs whose dtype is float32 whatever that of the arguments is.
    once: under the policy `fused`, the outputs that are rounded once, at the end, and nowhere before.
    product: it rounds inside a matrix product too (softmax weights, the normed row), at a place of its choosing.
    sums: it has sums over a row, whose error the elements of that row share.
    elementwise: an element of the result is a function of one element of each argument, and of nothing else in its row.
    kinds: what the values of an argument are, where they are not just numbers (normal, of size 1): "matrix" (rows of
        length 1), "wide" (of a few units), "logits", "bias" (may be None), "heads" (stored [B, S, heads, D]), "halves"
        (of one tensor), "table" (cos and sin), "labels", "lengths", "mask".
    """

    operator: str
    arguments: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    inputs: str
    program: str
    flops: Callable[..., int]
    witness: str
    or_float32: tuple[str, ...] = ()
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    product: bool = False
    sums: bool = True
    elementwise: bool = False
    kinds: dict[str, str] = field(default_factory=dict)

    def kind(self, argument: str) -> str:
        """What the values of an array argument are; "values" where nothing is special."""
        return self.kinds.get(argument, "values")

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of its signature, without the suffixes that name axes."""
        return dict(_parameters(self.definition))

    @property
    def definition(self) -> Callable[..., Any]:
        """The function of `refllm.ops`."""
        found: Callable[..., Any] = getattr(import_module("refllm.ops"), self.operator)
        return found

    def bound(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
        """Every argument of a call by its name, those that are left out with their defaults."""
        given = dict(zip(self.parameters, arguments, strict=False)) | keywords
        return {name: given.get(name, p.default) for name, p in self.parameters.items()}

    def result_shapes(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> list[tuple[int, ...]]:
        """The shapes of the results of a call, by the names of their axes; a loss is one number per row."""
        given = self.bound(arguments, keywords)
        sizes: dict[str, tuple[int, ...]] = {}
        for name, axes in self.arguments.items():
            if given[name] is not None:
                shape = tuple(given[name].shape)
                named = axes[1:] if ROWS in axes else axes[len(axes) - len(shape) :]
                front = len(shape) - len(named)
                sizes |= {axis: (size,) for axis, size in zip(named, shape[front:], strict=True)}
                if ROWS in axes:
                    sizes[ROWS] = shape[:front]
        if "(H+2K)D" in sizes:
            H, K = given["num_heads"], given["num_kv_heads"]
            sizes |= {"H": (H,), "K": (K,), "D": (sizes["(H+2K)D"][0] // (H + 2 * K),)}
        asked = [axes for name, axes in self.outputs.items() if name != "lse" or given["return_lse"]]
        return [sum((sizes[axis] for axis in axes), ()) for axes in asked]

    @property
    def text(self) -> str:
        """How it is called: "rms_norm(x, weight, eps) -> y"."""
        words: list[str] = []
        star = False
        for p in self.parameters.values():
            if p.kind is p.KEYWORD_ONLY and not star:
                words, star = [*words, "*"], True
            name = without_axes(p.name) if p.kind is p.KEYWORD_ONLY else p.name
            words.append(name if p.default is p.empty else f"{name}={p.default!r}")
        return f"{self.operator}({', '.join(words)}) -> {', '.join(self.outputs)}"


@cache
def _parameters(definition: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    every = inspect.signature(definition).parameters.values()
    return {without_axes(p.name): p for p in every if p.name not in HIDDEN}


Axes = dict[str, tuple[str, ...]]

_X: Axes = {"x": (ROWS, "E")}
_RESIDUAL: Axes = {"residual": (ROWS, "E")}
_WEIGHT: Axes = {"weight": ("E",)}
_BIAS: Axes = {"bias": ("E",)}
_TABLE: Axes = {"cos": ("B", "S", "R/2"), "sin": ("B", "S", "R/2")}  # or without B
_HEADS: Axes = {"q": ("B", "H", "S", "D"), "k": ("B", "K", "S", "D")}
_Y: Axes = {"y": (ROWS, "E")}
_Y_AND_SUM: Axes = {"y": (ROWS, "E"), "residual + x": (ROWS, "E")}


def _elements(each: int) -> Callable[..., int]:
    """`each` flops per number of the first argument."""
    return lambda x, *_: each * prod(x.shape)


def _heads(q: Any, k: Any) -> int:
    return prod(q.shape[:3]) + prod(k.shape[:3])


def _projected(x: Any, norm_weight: Any, w_qkv: Any, *_: Any, **__: Any) -> int:
    """2 N E C of the product, with C = (H + 2K) D, and 5 N E of the norm."""
    return 2 * prod(x.shape) * len(w_qkv) + 5 * prod(x.shape)


def _attended(q: Any, k: Any, v: Any, *, causal: bool = True, **_: Any) -> int:
    """4 D per pair of a query and a key it sees. Causal, aligned at the end: query s sees keys 0 .. T - S + s."""
    (B, H, S, D), T = q.shape, k.shape[2]
    return 4 * B * H * D * (sum(max(0, T - S + s + 1) for s in range(S)) if causal else S * T)


def _decoded(q: Any, k_cache: Any, v_cache: Any, lengths: Any, **_: Any) -> int:
    """4 D per pair of a query head and a slot it sees."""
    _B, H, S, D = q.shape
    return 4 * H * D * sum(max(0, n - S + s + 1) for n in map(int, lengths.tolist()) for s in range(S))


_BIAS_KIND = {"bias": "bias"}
_HEADS_KIND = {"q": "heads", "k": "heads"}
_TABLE_KIND = {"cos": "table", "sin": "table"}
_TABLES = ("cos", "sin")
_REDUCTION: dict[str, tuple[str, ...]] = {"reduction": ("mean", "sum", "none")}

_ALL = (
    Contract(
        "rms_norm",
        _X | _WEIGHT,
        _Y,
        inputs="norms:norm",
        program=programs.RMS_NORM
        + """
def definition(x, weight, eps):
    return (rms_norm(x, weight, eps),)""",
        flops=_elements(5),
        witness="torch rms_norm",
        or_float32=("weight",),
        once=("y",),
    ),
    Contract(
        "add_rms_norm",
        _X | _RESIDUAL | _WEIGHT,
        _Y_AND_SUM,
        inputs="norms:norm",
        program=programs.RMS_NORM
        + """
def definition(x, residual, weight, eps):
    return rms_norm(residual + x, weight, eps), residual + x""",
        flops=_elements(6),
        witness="torch rms_norm",
        or_float32=("weight",),
        once=("residual + x",),
    ),
    Contract(
        "layer_norm",
        _X | _WEIGHT | _BIAS,
        _Y,
        inputs="norms:norm",
        program=programs.LAYER_NORM
        + """
def definition(x, weight, bias, eps):
    return (layer_norm(x, weight, bias, eps),)""",
        flops=_elements(9),
        witness="torch layer_norm",
        or_float32=("weight", "bias"),
        once=("y",),
        kinds=_BIAS_KIND,
    ),
    Contract(
        "add_layer_norm",
        _X | _RESIDUAL | _WEIGHT | _BIAS,
        _Y_AND_SUM,
        inputs="norms:norm",
        program=programs.LAYER_NORM
        + """
def definition(x, residual, weight, bias, eps):
    return layer_norm(residual + x, weight, bias, eps), residual + x""",
        flops=_elements(10),
        witness="torch layer_norm",
        or_float32=("weight", "bias"),
        once=("residual + x",),
        kinds=_BIAS_KIND,
    ),
    Contract(
        "rope",
        _HEADS | _TABLE,
        dict(_HEADS),
        inputs="rotations:rope",
        program=programs.ROTATE
        + """
def definition(q, k, cos, sin, interleaved):
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)""",
        flops=lambda q, k, cos, sin, **_: 6 * cos.shape[-1] * _heads(q, k),
        witness="Transformers apply_rotary_pos_emb",
        or_float32=_TABLES,
        once=("q", "k"),
        sums=False,
        kinds=_HEADS_KIND | _TABLE_KIND,
    ),
    Contract(
        "norm_rope",
        {**_HEADS, "q_weight": ("H", "D"), "k_weight": ("K", "D"), **_TABLE},
        dict(_HEADS),
        inputs="rotations:rope",
        program=programs.ROTATE
        + """
def definition(q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    def one(x, weight):
        x = x - x.mean(axis=-1, keepdims=True) if norm == "layer" else x
        y = weight[:, None] * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        return rotate(y, cos, sin, interleaved)

    return one(q, q_weight), one(k, k_weight)""",
        flops=lambda q, k, *_, **__: 10 * q.shape[-1] * _heads(q, k),
        witness="torch norms and Transformers apply_rotary_pos_emb",
        or_float32=("q_weight", "k_weight", *_TABLES),
        choices={"norm": ("rms", "layer")},
        kinds=_HEADS_KIND | _TABLE_KIND,
    ),
    Contract(
        "rms_norm_qkv_rope",
        {"x": ("B", "S", "E"), "norm_weight": ("E",), "w_qkv": ("(H+2K)D", "E"), "b_qkv": ("(H+2K)D",), **_TABLE},
        {**_HEADS, "v": ("B", "K", "S", "D")},
        inputs="rotations:projected",
        program=programs.ROTATE
        + """
def definition(x, weight, w_qkv, b_qkv, cos, sin, eps, num_heads, num_kv_heads, interleaved):
    y = weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) @ w_qkv.T
    y = y if b_qkv is None else y + b_qkv
    y = y.reshape(*x.shape[:2], num_heads + 2 * num_kv_heads, -1).swapaxes(1, 2)
    q, k, v = np.split(y, [num_heads, num_heads + num_kv_heads], axis=1)
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved), v""",
        flops=_projected,
        witness="torch rms_norm, linear and Transformers apply_rotary_pos_emb",
        or_float32=("norm_weight", *_TABLES),
        product=True,
        kinds={"w_qkv": "matrix", "b_qkv": "bias"} | _TABLE_KIND,
    ),
    Contract(
        "attention",
        {"q": ("B", "H", "S", "D"), "k": ("B", "K", "T", "D"), "v": ("B", "K", "T", "D"), "key_mask": ("B", "T")},
        {"o": ("B", "H", "S", "D"), "lse": ("B", "H", "S")},
        inputs="attentions:attention",
        program=programs.ATTENTION.replace("def attention", "def definition").rstrip(),
        flops=_attended,
        witness="torch scaled_dot_product_attention",
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
        program=programs.ATTENTION
        + """
def definition(q, k, v, lengths, scale=None):
    rows = [(slice(b, b + 1), int(n)) for b, n in enumerate(lengths)]
    return (np.concatenate([attention(q[b], k[b, :, :n], v[b, :, :n], scale)[0] for b, n in rows]),)""",
        flops=_decoded,
        witness="torch scaled_dot_product_attention",
        product=True,
        kinds={"q": "heads", "lengths": "lengths"},
    ),
    Contract(
        "swiglu",
        {"gate": (ROWS, "F"), "up": (ROWS, "F")},
        {"y": (ROWS, "F")},
        inputs="activations:swiglu",
        program="""def definition(gate, up):
    return (gate / (1 + np.exp(-gate)) * up,)""",
        flops=_elements(10),
        witness="torch silu",
        once=("y",),
        sums=False,
        elementwise=True,
        kinds={"gate": "halves", "up": "halves"},
    ),
    Contract(
        "relu2",
        {"x": (ROWS, "F")},
        {"y": (ROWS, "F")},
        inputs="activations:relu2",
        program="""def definition(x):
    return (np.maximum(x, 0) ** 2,)""",
        flops=_elements(2),
        witness="torch relu",
        once=("y",),
        sums=False,
        elementwise=True,
        kinds={"x": "wide"},
    ),
    Contract(
        "cross_entropy",
        {"logits": ("N", "V"), "labels": ("N",)},
        {"loss": ("N",)},
        inputs="losses:cross_entropy",
        program=programs.LOSS.replace("def cross_entropy", "def definition").rstrip(),
        flops=lambda logits, *_, **__: 8 * prod(logits.shape),
        witness="torch cross_entropy",
        choices=_REDUCTION,
        float32=("loss",),
        kinds={"logits": "logits", "labels": "labels"},
    ),
    Contract(
        "linear_cross_entropy",
        {"x": ("N", "E"), "weight": ("V", "E"), "labels": ("N",)},
        {"loss": ("N",)},
        inputs="losses:linear_cross_entropy",
        program=programs.LOSS
        + """
def definition(x, weight, labels, ignore_index=-100, reduction="mean"):
    return cross_entropy(x @ weight.T, labels, ignore_index, reduction)""",
        flops=lambda x, weight, *_, **__: len(x) * len(weight) * (2 * x.shape[-1] + 8),
        witness="torch linear and cross_entropy",
        choices=_REDUCTION,
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
    """The record of an operator, forward or backward. Raises InputError for another name."""
    if operator in CONTRACTS:
        return CONTRACTS[operator]
    from refllm.ops.backward_contracts import BACKWARD  # which is made of these records

    if operator not in BACKWARD:
        raise InputError(
            f"{operator!r} is no operator; there are {', '.join(CONTRACTS)}, and of their gradients "
            f"{', '.join(BACKWARD)}. Their signatures: refllm check-op --list"
        )
    return BACKWARD[operator]


def without_axes(name: str) -> str:
    """The name of an argument without the suffix that names its axes: q_BHSD is q."""
    return _AXES.sub("", name)


def is_batched(axes: tuple[str, ...], ndim: int) -> bool:
    """Whether the first axis of an array with `ndim` axes is one of rows that do not know of each other."""
    return bool(axes) and axes[0] in _BATCH and (ndim >= len(axes) if ROWS in axes else ndim == len(axes))


def axis_names(axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """One name per axis of an array with `ndim` axes: ROWS stretches, and a table may lack its batch axis."""
    if ROWS in axes:
        front = ndim - (len(axes) - 1)
        rows = tuple(f"rows{i}" for i in range(front)) if front > 1 else ("rows",) * front
        return (*rows, *axes[1:])
    return axes[len(axes) - ndim :]
