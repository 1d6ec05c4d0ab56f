"""Named values of a Transformers model, recorded by hooks: nothing of its computation is changed.

The vocabulary is that of `refllm.forward.taps`. What is not the output of a module is the input of one: the context is
what o_proj receives, the activation what down_proj receives, the residual stream between attention and MLP what the
second norm receives. Rotated queries and keys are seen where the model's module calls `apply_rotary_pos_emb`. Fused
projections (qkv_proj, gate_up_proj) are split into the values that the others name.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

_BACKBONE = re.compile(r"^(?:model\.|transformer\.)?(?=(?:embed_tokens|layers|norm)\b)")
_OUTPUTS = {
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_layernorm",
    "self_attn.k_layernorm",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
_HEADS = ("lm_head", "score", "qa_outputs")

Sink = Callable[[str, Any], None]
View = Callable[[Any], Any]


@contextmanager
def hooks(model: Any, sink: Sink) -> Iterator[None]:
    """A context in which sink(name, tensor) is called for every named value of `model`'s forward passes, in order."""
    with following(model, lambda name, tensor, view: sink(name, view(tensor))):
        yield


@contextmanager
def following(model: Any, show: Callable[[str, Any, View], None]) -> Iterator[None]:
    """The same with show(name, tensor, view): the value is view(tensor), and its gradient view(that of the tensor)."""
    with ExitStack() as stack:
        recorder = _Hooks(model, show)
        for path, module in model.named_modules():
            for handle in recorder.attach(tap_path(path), module):
                stack.callback(handle.remove)
        stack.enter_context(recorder.rotations())
        yield


def tap_path(path: str) -> str:
    """A module's path with the prefix of the vocabulary: "transformer.layers.0" and "layers.0" are "model.layers.0"."""
    return _BACKBONE.sub("model.", path)


class ShownOnce:
    """Shows a value when it is first computed, and its gradient when it arrives. (Values that are computed without a
    graph at first, and again with one, have their gradient there.)"""

    def __init__(self, sink: Sink) -> None:
        self.sink, self._values, self._followed = sink, set[str](), set[str]()

    def __call__(self, name: str, tensor: Any, view: View) -> None:
        if name not in self._values:
            self._values.add(name)
            self.sink(name, view(tensor.detach()))
        if tensor.requires_grad and name not in self._followed:
            self._followed.add(name)
            tensor.register_hook(lambda gradient: self._arrived(name, view(gradient)))

    def _arrived(self, name: str, gradient: Any) -> None:
        self.sink(f"grad:{name}", gradient.detach().clone())


class _Hooks:
    def __init__(self, model: Any, show: Callable[[str, Any, View], None]) -> None:
        self.config, self._show, self.layer = model.config, show, ""
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.modeling = sys.modules[type(model).__module__]
        self.second_norm = _second_norm({_split(tap_path(path))[2] for path, _ in model.named_modules()})

    def attach(self, path: str, module: Any) -> Iterator[Any]:
        layer, _, inner = _split(path)
        if path in ("model.embed_tokens", "model.norm", *_HEADS) or inner in _OUTPUTS:
            yield module.register_forward_hook(lambda _m, _i, out: self.sink(path, out))
        elif layer and not inner:
            yield module.register_forward_hook(lambda _m, _i, out: self.sink(path, _first(out)))
        elif inner in ("self_attn.q_norm", "self_attn.k_norm"):  # of heads, or of whole rows
            yield module.register_forward_hook(lambda _m, _i, out: self._show(path, out, _heads_first))
        if inner == "self_attn":
            yield module.register_forward_pre_hook(lambda *_: setattr(self, "layer", layer))
            yield module.register_forward_hook(lambda _m, _i, out: self._probs(layer, out))
            yield from self._watch_patched(layer, module)
        elif inner == "self_attn.o_proj":
            yield module.register_forward_pre_hook(lambda _m, args: self._context(layer, args[0]))
        elif inner == "mlp.down_proj":
            yield module.register_forward_pre_hook(lambda _m, args: self.sink(f"{layer}.mlp.act", args[0]))
        elif inner and inner == self.second_norm:
            yield module.register_forward_pre_hook(lambda _m, args: self.sink(f"{layer}.residual_mid", args[0]))
        elif inner == "self_attn.qkv_proj":
            yield module.register_forward_hook(lambda _m, _i, out: self._split_qkv(layer, out))
        elif inner == "mlp.gate_up_proj":
            yield module.register_forward_hook(lambda _m, _i, out: self._split_gate_up(layer, out))

    def _probs(self, layer: str, out: Any) -> None:
        if isinstance(out, tuple) and len(out) > 1 and out[1] is not None:
            self.sink(f"{layer}.self_attn.probs", out[1])

    def _watch_patched(self, layer: str, module: Any) -> Iterator[Any]:
        """What only the stand-in of `refllm.kernels.patch` can show; nothing for a module that is not patched."""
        stand_in: Any = getattr(module.__dict__.get("forward"), "__self__", None)
        if not hasattr(stand_in, "watchers"):
            return

        def seen(q: Any, k: Any, v: Any) -> None:
            self.sink(f"{layer}.self_attn.q_rope", q)
            self.sink(f"{layer}.self_attn.k_rope", k)
            if stand_in.fused:
                self.sink(f"{layer}.self_attn.v_proj", v.transpose(1, 2).flatten(2))

        stand_in.watchers.append(seen)
        yield SimpleNamespace(remove=lambda: stand_in.watchers.remove(seen))

    def sink(self, name: str, tensor: Any) -> None:
        self._show(name, tensor, _as_it_is)

    def _context(self, layer: str, merged: Any) -> None:
        heads = lambda x: x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)  # noqa: E731
        self._show(f"{layer}.self_attn.context", merged, heads)

    def _split_qkv(self, layer: str, out: Any) -> None:
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        for i, name in enumerate("qkv"):
            self._show(f"{layer}.self_attn.{name}_proj", out, partial(_part, sizes=sizes, index=i))

    def _split_gate_up(self, layer: str, out: Any) -> None:
        for i, name in enumerate(("gate", "up")):
            self._show(f"{layer}.mlp.{name}_proj", out, partial(_part, sizes=[out.shape[-1] // 2] * 2, index=i))

    @contextmanager
    def rotations(self) -> Iterator[None]:
        """Sees the rotated queries and keys. A partial rotation is given only the rotated dims, and so are we."""
        original = getattr(self.modeling, "apply_rotary_pos_emb", None)
        if original is None:
            yield
            return

        def seen(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
            rotated = original(q, k, *args, **kwargs)
            for name, value in zip("qk", rotated, strict=True):
                self.sink(f"{self.layer}.self_attn.{name}_rope", value)
            return rotated

        self.modeling.apply_rotary_pos_emb = seen  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.modeling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]


def _split(path: str) -> tuple[str, str, str]:
    """ "model.layers.3.mlp.up_proj" -> ("model.layers.3", ".", "mlp.up_proj"); other paths have no layer."""
    match = re.match(r"(model\.layers\.\d+)(?:(\.)(.*))?$", path)
    return (match[1], match[2] or "", match[3] or "") if match else ("", "", path)


def _second_norm(inner: set[str]) -> str:
    """The norm that reads the residual stream between attention and MLP; "" where none does, since both are normed
    after they ran."""
    if "pre_feedforward_layernorm" in inner:
        return "pre_feedforward_layernorm"
    return "post_attention_layernorm" if "input_layernorm" in inner else ""


def _as_it_is(x: Any) -> Any:
    return x


def _part(x: Any, sizes: list[int], index: int) -> Any:
    return x.split(sizes, dim=-1)[index]


def _heads_first(x: Any) -> Any:
    """[B, S, H, D] -> [B, H, S, D]; whole rows [B, S, H D] as they are."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
