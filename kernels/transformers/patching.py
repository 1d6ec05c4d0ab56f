"""`patch`: one Transformers model, its modules' forward passes swapped for our operators; and the way back.

Only instances are touched: the attribute `forward` of single modules, the loss function of the model, and the config
that its modules hold, which is replaced by a copy that names our attention. Other models stay as they are, those of the
same class and those made with the same config object too.
"""

import copy
import importlib
import re
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from refllm.config.traits import TRAITS, Traits, traits_of
from refllm.errors import InputError
from refllm.kernels.arguments import FLOATS
from refllm.kernels.transformers.attention import NAMES
from refllm.kernels.transformers.modules import (
    Attention,
    CausalLoss,
    FusedQkv,
    Layer,
    LayerNorm,
    Relu2,
    RmsNorm,
    Swapped,
    Swiglu,
)
from refllm.kernels.transformers.operators import BACKENDS

_MARK = "_refllm_patch"
_SILU, _RELU2 = (type(ACT2FN["silu"]), type(ACT2FN["swish"])), (type(ACT2FN["relu2"]),)


class Patch:
    """What `patch` did to one model, and how to undo it. A context manager: leaving it undoes the patch.

    model: the patched model. backend, fuse_qkv: as given to `patch`.
    """

    def __init__(self, model: PreTrainedModel, backend: str | None, fuse_qkv: bool) -> None:
        self.model, self.backend, self.fuse_qkv = model, backend, fuse_qkv
        self._swapped: Counter[tuple[str, str]] = Counter()
        self._left: dict[str, str] = {}
        # (module, attribute, whether it was there, what it was): the way back, in reverse.
        self._before: list[tuple[Any, str, bool, Any]] = []
        self._fused: list[FusedQkv] = []
        try:
            self._apply()
        except BaseException:
            self.undo()
            raise

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Makes the model what it was, to the bit. Does nothing if that has happened already."""
        for module, name, was_there, value in reversed(self._before):
            if was_there:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)
        for fused in self._fused:
            fused.split()
        self._before, self._fused = [], []

    def report(self) -> str:
        """What was swapped for which operators, how many times, and what was left as it is and why."""
        where = {None: "Triton on a GPU, plain Torch elsewhere", "triton": "Triton", "torch": "plain Torch"}
        width = max(len(what) for what, _ in self._swapped)
        swapped = [f"  {n:3d} x {what:{width}}  {operators}" for (what, operators), n in self._swapped.items()]
        left = [f"  {what}: {why}" for what, why in self._left.items()]
        title = f"{type(self.model).__name__} on refllm.kernels ({where[self.backend]})"
        return "\n".join([title, "swapped", *swapped, "left as it is", *left])

    def _apply(self) -> None:
        base = self.model.base_model
        for module in {id(m): m for m in (self.model, base)}.values():
            self._set(module, _MARK, self)
        norm_class = LayerNorm if traits_of(base.config).layer_norm else RmsNorm
        for layer in base.layers:
            self._swap_layer(layer, norm_class)
        self._swap(base.norm, norm_class(base.norm, self.backend), "norm", norm_class.operator)
        self._swap_loss()
        self._use_own_config()
        self._left |= {
            "linear layers and embeddings": "they are Torch's own matrix products and lookups",
            "rotary_emb": "its tables are computed once per call, for all layers",
            "sum after the MLP": "the norm that it could be fused with belongs to the next layer",
        }

    def _swap_layer(self, layer: Any, norm_class: Any) -> None:
        attention, first, second = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
        fused = FusedQkv(attention, first) if self.fuse_qkv and self._can_fuse(attention, norm_class) else None
        if fused is not None:
            self._fused.append(fused)
        else:
            self._swap(first, norm_class(first, self.backend), "input_layernorm", norm_class.operator)
        interleaved = traits_of(layer.self_attn.config).interleaved
        rotation = "norm_rope" if getattr(attention, "qk_layernorm", False) else "rope"
        operators = f"{'rms_norm_qkv_rope' if fused else rotation}, attention, decode_attention"
        what = "input_layernorm, self_attn" if fused else "self_attn"
        stand_in = Attention(attention, self.backend, interleaved=interleaved, fused=fused)
        self._swap(attention, stand_in, what, operators)
        self._swap_mlp(layer.mlp)
        if second is None:
            self._left["sums of parallel layers"] = "no norm follows them directly"
            return
        norm = norm_class(second, self.backend)
        self._set(second, "forward", norm.forward)
        whole = Layer(layer, self.backend, norm, fused=fused is not None)
        self._swap(layer, whole, "sum, post_attention_layernorm", f"add_{norm_class.operator}")

    def _can_fuse(self, attention: Any, norm_class: Any) -> bool:
        what = "q, k, v projections"
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        if norm_class is LayerNorm:
            self._left[what] = "fuse_qkv: there is an operator for RMSNorm before them, not for LayerNorm"
        elif any(type(linear) is not torch.nn.Linear for linear in linears):
            self._left[what] = "fuse_qkv: they are not all torch.nn.Linear (quantised, or with an adapter)"
        elif len({(linear.weight.dtype, linear.weight.device, linear.bias is None) for linear in linears}) > 1:
            self._left[what] = "fuse_qkv: they differ in dtype, device or bias"
        else:
            return True
        return False

    def _swap_mlp(self, mlp: Any) -> None:
        gated = hasattr(mlp, "gate_proj")
        if gated and isinstance(mlp.act_fn, _SILU):
            self._swap(mlp, Swiglu(mlp, self.backend), "mlp", "swiglu")
        elif not gated and isinstance(mlp.act_fn, _RELU2):
            self._swap(mlp, Relu2(mlp, self.backend), "mlp", "relu2")
        else:
            known = "silu" if gated else "relu2"
            self._left["mlp"] = f"its activation is {type(mlp.act_fn).__name__}; there is an operator for {known}"

    def _swap_loss(self) -> None:
        kind = getattr(self.model, "loss_type", None)
        if kind != "ForCausalLM" or self.model is self.model.base_model:
            self._left["loss"] = "there is an operator for that of causal language models"
        elif "_loss_function" in self.model.__dict__:
            self._left["loss"] = "the model has been given a loss function of its own"
        else:
            self._set(self.model, "_loss_function", CausalLoss(self.backend))
            self._swapped["loss", "cross_entropy"] += 1

    def _use_own_config(self) -> None:
        shared = self.model.config
        own = copy.copy(shared)
        own._attn_implementation_internal = NAMES[self.backend]
        for module in self.model.modules():
            if module.__dict__.get("config") is shared:
                self._set(module, "config", own)

    def _swap(self, module: Any, stand_in: Swapped, what: str, operators: str) -> None:
        self._set(module, "forward", stand_in.forward)
        self._swapped[what, operators] += 1

    def _set(self, module: Any, name: str, value: Any) -> None:
        self._before.append((module, name, name in module.__dict__, module.__dict__.get(name)))
        module.__dict__[name] = value


def patch(model: Any, *, backend: str | None = None, fuse_qkv: bool = False) -> Patch:
    """Swaps the norms, rotation, attention, activation and loss of one Transformers model for our operators.

    model: Helium, Llama, StableLM or Arcee, with any head. backend: "triton", "torch" (plain), or None: Triton on a GPU
    and inside `refllm.kernels.interpreted()`, else plain. fuse_qkv: norm, projections and rotation as one operator; the
    three weights become views of one matrix, and hooks on those modules no longer see anything.

    Caches, `generate`, padding, hooks, `output_hidden_states` and `output_attentions` go on working, and so does
    training, with gradient checkpointing too. Raises InputError for a model that cannot be patched; it is then as it
    was.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"patch: backend={backend!r} is not known; use {', '.join(map(repr, BACKENDS))} or None")
    _check(model)
    return Patch(model, backend, fuse_qkv)


def unpatch(model: Any) -> None:
    """Undoes the patch of a model. Raises InputError if it has none."""
    found = getattr(model, "__dict__", {}).get(_MARK)
    if found is None:
        raise InputError(f"unpatch: this {type(model).__name__} is not patched")
    found.undo()


def _check(model: Any) -> None:
    """Raises InputError, with the reason, for what `patch` does not take."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"patch: model is a {name}; expected a Transformers model (wrappers, such as that of torch.compile or of "
            "PEFT, go around it after it was patched)"
        )
    family = TRAITS.get(getattr(model.config, "model_type", ""))
    expected = _classes(family) if family else {}
    backbone: type = type(model.base_model)
    if not family or backbone is not expected["Model"]:
        raise InputError(
            f"patch: {name} (model_type {model.config.model_type!r}) is not known; known are {', '.join(TRAITS)}. "
            'For attention alone, load it with attn_implementation="refllm"'
        )
    if any(_MARK in module.__dict__ for module in model.modules()):
        raise InputError(f"patch: this {name} is patched already; refllm.kernels.unpatch(model) undoes that")
    if any(p.is_meta for p in model.parameters()):
        raise InputError(f"patch: this {name} has weights on the meta device, that is, none; load them first")
    if model.dtype not in FLOATS:
        raise InputError(f"patch: this {name} is {model.dtype}; the operators take float32, float16 and bfloat16")
    for path, module in model.base_model.named_modules():
        _check_module(name, path, module, expected)


def _check_module(model: str, path: str, module: Any, expected: dict[str, type]) -> None:
    """The modules to be swapped are of Transformers' own classes, with their own forward."""
    place = re.fullmatch(r"layers\.\d+(?:\.(\w+))?|(norm)", path)
    role = _ROLES.get(place[1] or place[2] or "layer") if place else None
    if role is None:
        return
    if type(module) is not expected[role]:
        raise InputError(f"patch: {path} of this {model} is a {type(module).__name__}, not {expected[role].__name__}")
    if "forward" in module.__dict__:
        raise InputError(
            f"patch: {path} of this {model} has a forward of its own (of accelerate, with a device map, or of another "
            "patch); undo that first"
        )


_ROLES = {
    "layer": "DecoderLayer",
    "self_attn": "Attention",
    "mlp": "MLP",
    "input_layernorm": "Norm",
    "post_attention_layernorm": "Norm",
    "norm": "Norm",
}


def _classes(family: Traits) -> dict[str, type]:
    """The classes of a family in Transformers, by their role."""
    modeling = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    classes = {
        role: getattr(modeling, family.class_prefix + role) for role in ("Model", "DecoderLayer", "Attention", "MLP")
    }
    norm = torch.nn.LayerNorm if family.layer_norm else getattr(modeling, f"{family.class_prefix}RMSNorm")
    return classes | {"Norm": norm}
