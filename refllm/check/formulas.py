"""What every tap is: its formula, the operator that defines it, and exactly which value of the forward pass it names.

Symbols: x the residual stream, E the embedding table, W a weight, n a norm, D head_dim, R rotary dims, T keys.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from refllm import ops
from refllm.check.gradient_formulas import GRADIENT, definition, is_gradient, of_tensor
from refllm.config import ModelConfig
from refllm.config.traits import traits_of
from refllm.precision import HF_EAGER, HF_SDPA, POLICIES

_LAYER = re.compile(r"^model\.layers\.(\d+)(?:\.(.*))?$")
_HEADS = ("lm_head", "score", "qa_outputs")

LAYER_OUTPUT = "layer"
"""The suffix of `model.layers.{i}` itself."""

_POINTS = {
    "linear": ("linear",),
    "rms_norm": ("rms_norm.normalized", "rms_norm"),
    "layer_norm": ("layer_norm",),
    "rope": ("rope.table", "rope.product", "rope"),
    "attention": ("attention.scores", "attention.scaled", "attention.weights", "attention"),
    "scores": ("attention.scores", "attention.scaled"),
    "probs": ("attention.scores", "attention.scaled", "attention.weights"),
    "add": ("add",),
    "activation": ("activation",),
    "glu": ("glu.activation", "glu"),
    "embedding": (),
}


def listed(names: tuple[str, ...]) -> str:
    """Values in one line: "q_rope, k_rope, context"; "embed_tokens, layers 0 to 2, norm" where they are of several."""
    layers = [layer for layer, _ in map(split, names) if layer is not None]
    if len(set(layers)) < 2:
        return ", ".join(map(short, names))
    span = f"layers {min(layers)} to {max(layers)}"
    return ", ".join(dict.fromkeys(short(name) if split(name)[0] is None else span for name in names))


@dataclass(frozen=True)
class Formula:
    """A tap's definition. text: one line. operator: its name in `refllm.ops`. convention: which value exactly it is."""

    text: str
    operator: str
    convention: str
    points: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where the operator is defined: "refllm/ops/linear.py:8"."""
        return _source(self.operator)

    def rounds_at(self, policy: str, config: ModelConfig | None = None) -> tuple[str, ...]:
        """The rounding points of this value at which the policy rounds; all of them for a policy without a name."""
        known = POLICIES.get(policy)
        if known is None:
            return self.points
        kept = known if config is None else known.without(_page(config).NOT_ROUNDED)
        return tuple(point for point in self.points if point in kept.points)


@cache
def _source(operator: str) -> str:
    function: Callable[..., Any] = getattr(ops, operator)
    file = Path(inspect.getsourcefile(function) or "").resolve()
    root = Path(ops.__file__).resolve().parent.parent.parent
    return f"{file.relative_to(root).as_posix()}:{inspect.getsourcelines(function)[1]}"


def _page(config: ModelConfig) -> Any:
    from refllm.models.families import of_config

    return next(iter(of_config(config).values())).page


@lru_cache(maxsize=1 << 14)
def split(name: str) -> tuple[int | None, str]:
    """Layer and suffix: "model.layers.3.mlp.act" -> (3, "mlp.act"), "model.norm" -> (None, "norm"); a gradient's are
    those of what it is the gradient of."""
    name = name.removeprefix(GRADIENT)
    match = _LAYER.match(name)
    return (int(match[1]), match[2] or LAYER_OUTPUT) if match else (None, name.removeprefix("model."))


@lru_cache(maxsize=1 << 14)
def short(name: str) -> str:
    """The name of a tap within its layer: "q_proj", "act", "output"; "d q_proj", "d up_proj.weight" of gradients."""
    suffix = split(name)[1]
    path, _, last = suffix.rpartition(".")
    last = f"{path.rpartition('.')[2]}.{last}" if of_tensor(name) else last
    return "d " * is_gradient(name) + ("output" if suffix == LAYER_OUTPUT else last)


def spoken(name: str) -> str:
    """ "layer 3 act", "layer 3 output", "norm"."""
    layer = split(name)[0]
    return short(name) if layer is None else f"layer {layer} {short(name)}"


@dataclass(frozen=True)
class _Family:
    """What of a config shows in a formula; the defaults serve where there is no config."""

    layer_norm: bool = False
    interleaved: bool | None = None
    gated: bool = True
    act: str = "act"
    eps: str = "eps"
    parallel: bool = False
    tied: bool = False
    biases: frozenset[str] = frozenset()
    rotary: str = "R"
    head_dim: str = "D"
    window: int | None = None

    @classmethod
    def of(cls, config: ModelConfig | None, layer: int | None) -> "_Family":
        if config is None:
            return cls()
        c: Any = config
        traits = traits_of(config)
        return cls(
            layer_norm=traits.layer_norm,
            interleaved=traits.interleaved,
            gated=traits.gated,
            act=c.hidden_act,
            eps=f"{c.layer_norm_eps if traits.layer_norm else c.rms_norm_eps:g}",
            parallel=bool(getattr(c, "use_parallel_residual", False)),
            tied=bool(c.tie_word_embeddings),
            biases=frozenset(
                match[1] for name in _page(c).tensors(c) if (match := re.search(r"(\w+_proj)\.bias$", name))
            ),
            rotary=str(c.rotary_dim),
            head_dim=str(c.head_dim),
            window=None if layer is None else c.window(layer),
        )

    @property
    def seen(self) -> str:
        """What the mask says beside causality."""
        return "" if self.window is None else f"; a query sees the last {self.window} keys, its own included"

    @property
    def norm_operator(self) -> str:
        return "layer_norm" if self.layer_norm else "rms_norm"

    def norm(self, x: str) -> str:
        """y = n(x) with x put in."""
        if self.layer_norm:
            return f"y = w * ({x} - mean({x})) / sqrt(var({x}) + {self.eps}) + b"
        return f"y = w * {x} / sqrt(mean({x}^2) + {self.eps})"

    def linear(self, y: str, x: str, weight: str, module: str = "") -> str:
        """y = x W^T, with the bias where this model has one."""
        return f"{y} = {x} W_{weight}^T" + (f" + b_{weight}" if module in self.biases else "")

    def activated(self, x: str) -> str:
        """act(x) spelled out for the usual names."""
        known = {"silu": "{x} / (1 + e^-{x})", "relu2": "max({x}, 0)^2", "relu": "max({x}, 0)"}
        return known.get(self.act, f"{self.act}({{x}})").format(x=x)


def formula(name: str, config: ModelConfig | None = None) -> Formula:
    """The definition of a tap by its name, as this model has it. A name that only a page from outside has is what its
    ending says; without a config an unknown name raises KeyError."""
    family = _Family.of(config, split(name)[0])
    suffix = split(name)[1]
    if is_gradient(name):
        text, operator, convention = definition(suffix, family.norm_operator, family.gated)
        return Formula(text, operator, convention, _backward_points(operator))
    for group in (_norms, _projections, _attention, _mlp, _residuals, _ends, *([_others] if config else [])):
        found = group(suffix, family)
        if found is not None:
            text, operator, points, convention = found
            return Formula(text, operator, convention, _POINTS[points])
    raise KeyError(name)


def operator(name: str, config: ModelConfig | None = None) -> str:
    """The kind of a tap: the name of its operator in `refllm.ops`."""
    return formula(name, config).operator


def _backward_points(operator: str) -> tuple[str, ...]:
    kind = "loss" if operator.endswith("error_backward") else operator.removesuffix("_backward")
    return tuple(sorted(p for p in HF_EAGER.points | HF_SDPA.points if p.startswith(f"{kind}.grad")))


_Definition = tuple[str, str, str, str] | None
"""text, operator, key of _POINTS, convention."""


def _norms(suffix: str, f: _Family) -> _Definition:
    mlp, aside = "gate_proj and up_proj" if f.gated else "up_proj", "; no part of the residual stream"
    found = {
        "input_layernorm": ("x", "q_proj, k_proj, v_proj" + f", {mlp}" * f.parallel, aside),
        "post_attention_layernorm": ("x_mid", mlp, aside),
        "norm": ("x", "the head", "; the last entry of Transformers' hidden_states"),
    }.get(suffix)
    if found is None:
        return None
    x, readers, more = found
    applied = "weight and bias" if f.layer_norm else "weight"
    convention = f"the norm's result with its {applied} applied, the input of {readers}{more}"
    return f.norm(x), f.norm_operator, f.norm_operator, convention


def _projections(suffix: str, f: _Family) -> _Definition:
    match = re.fullmatch(r"self_attn\.([qkv])_(proj|layernorm|rope)", suffix)
    if match is None:
        return None
    letter, what = match.groups()
    heads = "heads * D" if letter == "q" else "key/value heads * D"
    if what == "proj":
        bias = "bias included, " if f"{letter}_proj" in f.biases else ""
        convention = f"{bias}not yet split into heads: [B, S, {heads}], head h is columns h D .. h D + D-1"
        return f.linear(letter, "n(x)", letter, f"{letter}_proj"), "linear", "linear", convention
    if what == "layernorm":
        text = f"{letter} = w_h * ({letter} - mean({letter})) / sqrt(var({letter}) + {f.eps})"
        return text, "layer_norm", "layer_norm", "normed head by head, head h by its own weight w_h; before RoPE"
    half = {True: "dims (2i, 2i+1)", False: "dims (i, i + R/2)", None: "a pair of dims"}[f.interleaved]
    text = "(a, b) -> (a cos_i - b sin_i, b cos_i + a sin_i), (a, b): " + half
    rest = "every dim is rotated" if f.rotary == f.head_dim else "dims from R on pass through unchanged"
    convention = f"[B, heads, S, D] after the rotation, R = {f.rotary} of D = {f.head_dim}: {rest}"
    if letter == "q":
        convention += "; not yet scaled, the factor D^-1/2 is in the scores"
    return text, "rope", "rope", convention


def _attention(suffix: str, f: _Family) -> _Definition:
    return {
        "self_attn.scores": (
            "s = D^-1/2 q k^T",
            "attention",
            "scores",
            "scaled, before the mask; query head h with key/value head h // (H / K)",
        ),
        "self_attn.probs": (
            "p = softmax(s + mask)",
            "attention",
            "probs",
            "normalised: each row sums to 1, also where a kernel divides by the sum only after the product with v"
            + f.seen,
        ),
        "self_attn.context": (
            "o = softmax(D^-1/2 q k^T + mask) v",
            "attention",
            "attention",
            "weights times values, [B, H, S, D], before the heads are merged and before o_proj; alone it is judged on "
            f"the candidate's q_rope, k_rope and v_proj{f.seen}",
        ),
        "self_attn.o_proj": (
            f.linear("y", "o", "o", "o_proj"),
            "linear",
            "linear",
            "attention's contribution to the residual stream, before it is added",
        ),
    }.get(suffix)


def _mlp(suffix: str, f: _Family) -> _Definition:
    norm = "n(x)" if f.parallel else "n(x_mid)"
    activation = f"h = {f.activated('g')} * u" if f.gated else f"h = {f.activated('u')}"
    kind = "glu" if f.gated else "activation"
    return {
        "mlp.gate_proj": (
            f.linear("g", norm, "g", "gate_proj"),
            "linear",
            "linear",
            "the gate before its activation",
        ),
        "mlp.up_proj": (
            f.linear("u", norm, "u", "up_proj"),
            "linear",
            "linear",
            "the other factor of the gated unit" if f.gated else "before the activation",
        ),
        "mlp.act": (activation, kind, kind, "what down_proj receives" + (": gate and up multiplied" * f.gated)),
        "mlp.down_proj": (
            f.linear("y", "h", "d", "down_proj"),
            "linear",
            "linear",
            "the MLP's contribution to the residual stream, before it is added",
        ),
    }.get(suffix)


def _residuals(suffix: str, f: _Family) -> _Definition:
    return {
        "embed_tokens": (
            "x = E[ids]",
            "embedding",
            "embedding",
            "the first value of the residual stream, as layer 0 receives it: rows of the table, before any norm",
        ),
        "residual_mid": (
            "x_mid = x + o_proj",
            "add",
            "add",
            "the residual stream after attention's contribution, before the norm of the MLP"
            + (" (a parallel residual: the MLP does not read it)" * f.parallel),
        ),
        LAYER_OUTPUT: (
            "x = x_mid + down_proj",
            "add",
            "add",
            "the residual stream after the layer, before any norm: what the next layer, or the final norm, receives",
        ),
    }.get(suffix)


def _others(suffix: str, f: _Family) -> _Definition:
    """Names that none of the families here has: what a page from outside computes there."""
    words = f"{suffix}, as the page of this family has it"
    if suffix.endswith("_proj"):
        return f.linear("y", "x", suffix.rpartition(".")[2], suffix.rpartition(".")[2]), "linear", "linear", words
    if suffix.endswith("norm"):
        return f.norm("x"), f.norm_operator, f.norm_operator, words
    return suffix, "add", "add", words


def _ends(suffix: str, f: _Family) -> _Definition:
    if suffix not in _HEADS:
        return None
    what = {"lm_head": "logits", "score": "class scores", "qa_outputs": "start and end scores"}[suffix]
    weight = "E" if f.tied and suffix == "lm_head" else f"W_{suffix}"
    bias = " (+ b)" if suffix != "lm_head" else ""
    tied = "; the weight is the embedding table" if weight == "E" else ""
    return f"y = n(x) {weight}^T{bias}", "linear", "linear", f"{what} of every position, before any softmax{tied}"
