"""Defects planted in a page itself: in the operators that one of its layers is given.

They need no other library, so that any page can be asked whether its own check would name them, also one from outside
(`refllm.models.own_page`):

    for name, defect in possible(model).items():
        report = judge(model, record(planted(model, defect, layer=1), model, inputs))
        report.first_failure.name in defect.reported_at(1)
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.check.candidates import ReferenceCandidate
from refllm.config.traits import Traits, traits_of
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.forward.operators import Operators, Recorder

Wrong = Callable[..., Any]
"""wrong(op, name, *arguments of the operator, **its choices): op has the right operators; name is the weight's, without
".weight", of a product."""


@dataclass(frozen=True)
class Defect:
    """operator: the one that is wrong. taps: the values in a layer of which one must be reported first. applies: to a
    model, whether it changes anything there. at: the product that is wrong; "" for operators that have no weight."""

    operator: str
    taps: tuple[str, ...]
    wrong: Wrong
    applies: Callable[[Model], bool] = lambda model: True
    at: str = ""

    def reported_at(self, layer: int) -> tuple[str, ...]:
        """Full names."""
        return tuple(f"model.layers.{layer}.{tap}".rstrip(".") for tap in self.taps)


def planted(model: Model, defect: Defect, layer: int) -> ReferenceCandidate:
    """The page of a model, of which one layer has a defect, as a candidate. Raises InputError for a model whose weights
    are not kept in memory."""
    if model.weights.low_memory:
        raise InputError("a defect is planted in a model whose weights are kept in memory; load it without low_memory")
    wrong, right = copy(model), model._operators

    def operators(recorder: Recorder | None) -> Any:
        return _Planted(right(recorder), model, defect, layer)

    wrong._operators = operators  # type: ignore[method-assign]
    return ReferenceCandidate(wrong, f"{model.config.model_type} with a defect in layer {layer}")


class _Planted:
    """The operators of a whole page; those within one layer are wrong."""

    def __init__(self, op: Operators, model: Model, defect: Defect, layer: int) -> None:
        self._op, self._model, self._defect, self._layer = op, model, defect, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def within(self, scope: str) -> Any:
        inner = self._op.within(scope)
        if scope != f"model.layers.{self._layer}":
            return inner
        right, names = copy(inner), self._names()

        def wrong(x: Any, *arguments: Any, **choices: Any) -> Any:
            of_weight = names.get(id(arguments[0]), "") if arguments else ""
            if self._defect.at not in ("", of_weight):
                return getattr(right, self._defect.operator)(x, *arguments, **choices)
            return self._defect.wrong(_Call(right, self._model, self._layer), x, *arguments, **choices)

        inner.__dict__[self._defect.operator] = wrong
        return inner

    def _names(self) -> dict[int, str]:
        tensors = self._model.weights.layer(self._layer)
        return {id(value): name.removesuffix(".weight") for name, value in tensors.items()}


@dataclass(frozen=True)
class _Call:
    """What a wrong operator may use: the right ones, and the tensors of its layer."""

    op: Operators
    model: Model
    layer: int

    def tensor(self, name: str) -> np.ndarray:
        return self.model.weights.layer(self.layer)[name]


def possible(model: Model) -> dict[str, Defect]:
    """The defects that change anything in a model, by name."""
    return {name: defect for name, defect in DEFECTS.items() if defect.applies(model)}


# ------------------------------------------------------------------------------------------------------- the catalogue


def _has(name: str) -> Callable[[Model], bool]:
    """Whether layers have a tensor."""
    return lambda model: f"layers.0.{name}" in model.weights.shapes


def _windowed(model: Model) -> bool:
    return any(model.config.window(layer) is not None for layer in range(model.config.num_hidden_layers))


def _another_window(change: Callable[[int], int | None]) -> Wrong:
    def wrong(call: _Call, q: Any, k: Any, v: Any, *, window: int | None = None, **masking: Any) -> Any:
        window = None if window is None else change(window)
        return call.op.attention(q, k, v, window=window, **masking)

    return wrong


def _scaled(call: _Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
    return call.op.attention(q, k, v, scale=1.01 * q.shape[-1] ** -0.5, **masking)


def _sees_all(call: _Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
    return call.op.attention(q, k, v, **masking | {"causal": False})


def _tiled(call: _Call, q: Any, k: Any, v: Any, **masking: Any) -> Any:
    g = q.shape[1] // k.shape[1]
    return call.op.attention(q, np.tile(k, (1, g, 1, 1)), np.tile(v, (1, g, 1, 1)), **masking)


def _other_pairs(call: _Call, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    return call.op.rope(q, k, cos, sin, interleaved=not interleaved)


def _backwards(call: _Call, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    return call.op.rope(q, k, cos, -sin, interleaved=interleaved)


def _keys_only_half(call: _Call, q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    cos, sin = cos.copy(), sin.copy()
    cos[..., cos.shape[-1] // 2 :], sin[..., sin.shape[-1] // 2 :] = 1, 0
    return call.op.rope(q, k, cos, sin, interleaved=interleaved)


def _without_bias(call: _Call, x: Any, weight: Any, bias: Any = None) -> Any:
    return call.op.linear(x, weight)


def _biased_by_k(call: _Call, x: Any, weight: Any, bias: Any = None) -> Any:
    return call.op.linear(x, weight, call.tensor("self_attn.k_proj.bias"))


def _short_product(call: _Call, x: Any, weight: Any, bias: Any = None) -> Any:
    x = x.copy()
    x[..., -8:] = 0
    return call.op.linear(x, weight, bias)


def _eps_inside(norm: str) -> Wrong:
    def wrong(call: _Call, x: Any, weight: Any, *more: Any) -> Any:
        return getattr(call.op, norm)(x, weight, *more[:-1], 1e-2)

    return wrong


def _plus_one(norm: str) -> Wrong:
    return lambda call, x, weight, *more: getattr(call.op, norm)(x, weight + 1, *more)


_CONTEXT = ("self_attn.scores", "self_attn.probs", "self_attn.context")
_ROPE = ("self_attn.q_rope", "self_attn.k_rope")
_NORM = ("input_layernorm", "self_attn.q_norm")  # the first one of a layer


def _calls(operator: str) -> Callable[[Model], bool]:
    """Whether the layers of a model have that kind of norm."""
    return lambda model: _traits(model).layer_norm == (operator == "layer_norm")


def _traits(model: Model) -> Traits:
    return traits_of(model.config)


DEFECTS: dict[str, Defect] = {
    **{
        f"{words} ({norm})": Defect(norm, _NORM, make(norm), _calls(norm))
        for norm in ("rms_norm", "layer_norm")
        for words, make in (("wrong eps", _eps_inside), ("norm weight plus one", _plus_one))
    },
    "the other pairing of dims": Defect("rope", _ROPE, _other_pairs),
    "sign of sin": Defect("rope", _ROPE, _backwards),
    "half of the dims rotated": Defect("rope", _ROPE, _keys_only_half),
    "scale off by 1 %": Defect("attention", _CONTEXT, _scaled),
    "every key seen": Defect("attention", _CONTEXT, _sees_all),
    "key and value heads tiled instead of repeated": Defect(
        "attention", _CONTEXT, _tiled, lambda m: 1 < m.config.num_key_value_heads < m.config.num_attention_heads
    ),
    "window one too wide": Defect("attention", _CONTEXT, _another_window(lambda w: w + 1), _windowed),
    "window one too narrow": Defect("attention", _CONTEXT, _another_window(lambda w: w - 1), _windowed),
    "window ignored": Defect("attention", _CONTEXT, _another_window(lambda w: None), _windowed),
    **{
        f"{name} bias dropped": Defect(
            "linear", (f"self_attn.{name}",), _without_bias, _has(f"self_attn.{name}.bias"), f"self_attn.{name}"
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    },
    "k_proj bias used for v": Defect(
        "linear", ("self_attn.v_proj",), _biased_by_k, _has("self_attn.v_proj.bias"), "self_attn.v_proj"
    ),
    "last columns of down_proj dropped": Defect("linear", ("mlp.down_proj",), _short_product, at="mlp.down_proj"),
    "gate and up swapped": Defect(
        "glu", ("mlp.act",), lambda call, gate, up, name: call.op.glu(up, gate, name), lambda m: _traits(m).gated
    ),
    "gelu for silu": Defect(
        "glu", ("mlp.act",), lambda call, gate, up, name: call.op.glu(gate, up, "gelu"), lambda m: _traits(m).gated
    ),
    "half of what a layer adds": Defect("add", ("residual_mid", ""), lambda call, x, y: call.op.add(x, y / 2)),
}
"""Name -> defect. Those of norms, rotations, attention, products, the MLP and the residual stream."""
