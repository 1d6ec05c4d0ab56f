"""Defects of backward passes, planted in a Transformers model whose forward pass stays right.

`catalogue` has them: a name, the operator, how it is planted in one layer, and the gradients at which the check has to
name it. Most are modules whose backward pass is replaced (`_Backward`): the right gradients are computed, and then
changed as the bug changes them. The others are bugs of a training loop: losses, accumulation, checkpoints, ties.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from refllm.config import ModelConfig
from refllm.config.traits import traits_of
from refllm.ops import IGNORE_INDEX

Grads = list[Any]
Change = Callable[[Grads, Sequence[Any], Sequence[Any]], Grads]
"""(right gradients of all inputs, the inputs, incoming gradients) -> what the bug makes of them."""
Planting = Callable[[Any, int], AbstractContextManager[None]]
"""(a Transformers model, the layer) -> a context in which the bug is there."""


@dataclass(frozen=True)
class GradientMutant:
    """One bug. area: the operator, or what of the loop. expected: names of the gradients, one of which has to be the
    first that fails; "{L}" is the layer. frozen: what the check is told learns nothing. source: where it was seen."""

    name: str
    area: str
    plant: Planting
    expected: tuple[str, ...]
    applies: Callable[[ModelConfig], bool] = lambda config: True
    frozen: tuple[str, ...] = ()
    source: str = ""

    def expected_at(self, layer: int, config: ModelConfig) -> tuple[str, ...]:
        """The names for one layer of a model."""
        before = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
        second = "input_layernorm" if _parallel(config) else "post_attention_layernorm"
        head = "model.norm.weight" if config.tie_word_embeddings else "lm_head.weight"
        words = {
            "L": f"model.layers.{layer}",
            "before": before,
            "second": f"model.layers.{layer}.{second}",
            "head": head,
        }
        return tuple(f"grad:{name.format(**words)}" for name in self.expected)


# --------------------------------------------------------------------------------------------- a module's backward pass


@cache
def _backward_function() -> Any:
    import torch

    class _Backward(torch.autograd.Function):
        """A function whose gradients are computed as they should be, and then changed."""

        @staticmethod
        def forward(ctx: Any, function: Any, change: Change, *inputs: Any) -> Any:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
                out = function(*leaves)
            ctx.kept = leaves, out if isinstance(out, tuple) else (out,), change
            return tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()

        @staticmethod
        def backward(ctx: Any, *incoming: Any) -> Any:
            leaves, outs, change = ctx.kept
            wanted = [x for x in leaves if x.requires_grad]
            found = iter(torch.autograd.grad(outs, wanted, incoming, retain_graph=True, allow_unused=True))
            grads = [next(found) if x.requires_grad else None for x in leaves]
            changed = change(grads, leaves, incoming)
            return None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(changed, leaves, strict=True))

    return _Backward


@contextmanager
def _changed(module: Any, change: Change) -> Iterator[None]:
    """A module with a backward pass of its own: inputs are what it is given, then its parameters."""
    original, names = module.forward, list(module._parameters)
    names = [name for name in names if module._parameters[name] is not None]

    def function(x: Any, *values: Any) -> Any:
        kept = {name: module._parameters[name] for name in names}
        module._parameters.update(zip(names, values, strict=True))
        try:
            return original(x)
        finally:
            module._parameters.update(kept)

    def forward(x: Any) -> Any:
        return _backward_function().apply(function, change, x, *(module._parameters[name] for name in names))

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _in(path: str, change: Change) -> Planting:
    """The change in a module of the layer, by its path; "." stands for one of the model."""

    def plant(model: Any, layer: int) -> AbstractContextManager[None]:
        at = model.get_submodule(path[1:]) if path.startswith(".") else model.model.layers[layer].get_submodule(path)
        return _changed(at, change)

    return plant


def _of(index: int, change: Callable[[Any, Sequence[Any], Any], Any]) -> Change:
    """Changes one of the gradients: (it, inputs, incoming) -> another. None stays None."""

    def changed(grads: Grads, inputs: Sequence[Any], incoming: Sequence[Any]) -> Grads:
        if index < len(grads) and grads[index] is not None:
            grads = [*grads]
            grads[index] = change(grads[index], inputs, incoming[0])
        return grads

    return changed


# --------------------------------------------------------------------------------------------------- norms and products


def _normed(x: Any, centred: bool) -> tuple[Any, Any]:
    """n and 1 / root of a norm, eps aside."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True) if centred else wide
    r = (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return wide * r, r


def _without_correction(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    return _normed(inputs[0], len(inputs) > 2)[1] * dy.float() * inputs[1].float()


def _other_correction(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    return 2 * _without_correction(dx, inputs, dy) - dx.float()


def _without_weight(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    n, r = _normed(inputs[0], len(inputs) > 2)
    g = dy.float() - (dy.float().mean(-1, keepdim=True) if len(inputs) > 2 else 0)
    return r * (g - n * (g * n).mean(-1, keepdim=True))


def _mean_of_rows(d: Any, inputs: Sequence[Any], dy: Any) -> Any:
    return d / (dy.numel() // dy.shape[-1])


def _first_sequence(dw: Any, inputs: Sequence[Any], dy: Any) -> Any:
    """The gradient of a product's weight from the first sequence of the batch alone."""
    return dy[0].T.float() @ inputs[0][0].float()


def _rows_of_one(dw: Any, inputs: Sequence[Any], dy: Any) -> Any:
    n, _ = _normed(inputs[0], len(inputs) > 2)
    return (dy.float() * n)[0].sum(0)


def _overwritten(dw: Any, inputs: Sequence[Any], dy: Any) -> Any:
    x, d = inputs[0].float().clamp(min=0), dy.float()
    return d.reshape(-1, d.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _tile_missing(d: Any, *_: Any) -> Any:
    d = d.clone()
    d[..., -max(1, d.shape[-1] // 8) :] = 0
    return d


def _transposed_weight(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    return dy.float() @ inputs[1].float().T


def _square(module: str) -> Callable[[ModelConfig], bool]:
    def applies(config: Any) -> bool:
        return bool(config.num_attention_heads * config.head_dim == config.hidden_size)

    return applies


def _norms() -> Iterator[GradientMutant]:
    for norm, dx in (("input_layernorm", "{before}"), ("post_attention_layernorm", "{L}.residual_mid")):
        there = (lambda c: True) if norm == "input_layernorm" else (lambda c: not _parallel(c))
        dw = f"{{L}}.{norm}.weight"
        for name, index, change, at, source in (
            ("its correction term is missing", 0, _without_correction, dx, "Dao-AILab/quack#53"),
            ("its correction term has the other sign", 0, _other_correction, dx, ""),
            ("its weight is forgotten", 0, _without_weight, dx, "karpathy/llm.c#763"),
            ("dw is the mean over the rows", 1, _mean_of_rows, dw, ""),
            ("dw is of the first sequence alone", 1, _rows_of_one, dw, "FlagGems#5392"),
        ):
            yield GradientMutant(f"{norm}: {name}", "norm", _in(norm, _of(index, change)), (at,), there, (), source)


def _products() -> Iterator[GradientMutant]:
    reads = {
        "self_attn.q_proj": "{L}.input_layernorm",
        "self_attn.o_proj": "{L}.self_attn.context",
        "mlp.up_proj": "{second}",
        "mlp.down_proj": "{L}.mlp.act",
    }
    of_weight: tuple[tuple[str, Any, str], ...] = (
        ("dW has the other sign", lambda d, *_: -d, ""),
        ("dW has its rows in another order", lambda d, *_: d.roll(1, 0), ""),
        ("a tile of dW is missing", _tile_missing, "Triton-distributed#180"),
        ("dW is of the first sequence alone", _first_sequence, ""),
        ("the saved input was overwritten", _overwritten, "unsloth#5001"),
    )
    of_input: tuple[tuple[str, Any, str], ...] = (
        ("dx has the other sign", lambda d, *_: -d, ""),
        ("dx is off by 1 %", lambda d, *_: d * 1.01, ""),
        ("a tile of dx is missing", _tile_missing, ""),
    )
    for module, x in reads.items():
        for name, change, source in of_weight:
            plant = _in(module, _of(1, change))
            yield GradientMutant(f"{module}: {name}", "linear", plant, (f"{{L}}.{module}.weight",), source=source)
        for name, change, source in of_input:
            yield GradientMutant(f"{module}: {name}", "linear", _in(module, _of(0, change)), (x,), source=source)
    o_proj, square = "self_attn.o_proj", _square("o_proj")
    transposed = _in(o_proj, _of(1, lambda d, *_: d.T))
    yield GradientMutant(f"{o_proj}: dW is transposed", "linear", transposed, (f"{{L}}.{o_proj}.weight",), square)
    yield GradientMutant(
        f"{o_proj}: dx by W for its transposed", "linear", _in(o_proj, _of(0, _transposed_weight)),
        (f"{{L}}.{o_proj[:-7]}.context",), square,
    )  # fmt: skip
    biased = _in("self_attn.v_proj", _of(2, _mean_of_rows))
    yield GradientMutant(
        "self_attn.v_proj: db is the mean over the rows", "linear", biased, ("{L}.self_attn.v_proj.bias",), _qkv_bias
    )


def _parallel(config: Any) -> bool:
    return bool(getattr(config, "use_parallel_residual", False))


def _qkv_bias(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False) or getattr(config, "use_qkv_bias", False))


# ------------------------------------------------------------------------------------------------------------------ MLP


def _half_a_slope(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    """The first term alone of sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    return dy.float() * inputs[0].float().sigmoid()


def _half_of_relu2(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    return dy.float() * inputs[0].float().clamp(min=0)


def _slope_of_gelu(dx: Any, inputs: Sequence[Any], dy: Any) -> Any:
    import torch

    with torch.enable_grad():
        x = inputs[0].detach().float().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.gelu(x), x, dy.float())[0]


def _swapped(grads: Grads, inputs: Sequence[Any], incoming: Sequence[Any]) -> Grads:
    return [grads[1], grads[0]]


def _product_of_mlp(change: Change) -> Planting:
    """The product of the activation and up, of one layer."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        mlp = model.model.layers[layer].mlp

        def forward(x: Any) -> Any:
            act, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
            return mlp.down_proj(_backward_function().apply(lambda a, u: a * u, change, act, up))

        mlp.forward = forward
        try:
            yield
        finally:
            del mlp.forward

    return plant


def _activations() -> Iterator[GradientMutant]:
    gated, plain = (lambda c: traits_of(c).gated), (lambda c: not traits_of(c).gated)
    both = ("{L}.mlp.gate_proj", "{L}.mlp.up_proj")
    act = "mlp.act_fn"
    yield GradientMutant("silu: a term of its slope is missing", "glu", _in(act, _of(0, _half_a_slope)), both, gated)
    yield GradientMutant("relu2: the 2 of its slope is missing", "glu", _in(act, _of(0, _half_of_relu2)), both, plain)
    yield GradientMutant("activation: the slope of gelu", "glu", _in(act, _of(0, _slope_of_gelu)), both)
    yield GradientMutant("activation: the other sign", "glu", _in(act, _of(0, lambda d, *_: -d)), both)
    yield GradientMutant(
        "glu: dgate and dup are exchanged", "glu", _product_of_mlp(_swapped), both, gated, (), "unsloth#3314"
    )


# ------------------------------------------------------------------------------------------------------ RoPE, attention


def _at_layer(attribute: str, make: Callable[[Any, Any], Any]) -> Planting:
    """A function of the model's file, replaced for one layer: make(the original, the model) -> another."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        import sys

        modeling: Any = sys.modules[type(model).__module__]
        original, count = getattr(modeling, attribute), [0]
        other, layers = make(original, model), len(model.model.layers)

        def either(*arguments: Any, **keywords: Any) -> Any:
            count[0] += 1
            return (other if (count[0] - 1) % layers == layer else original)(*arguments, **keywords)

        setattr(modeling, attribute, either)
        try:
            yield
        finally:
            setattr(modeling, attribute, original)

    return plant


def _rotation(change: Callable[[Any, Any, Any], Grads]) -> Planting:
    """change: (the rotation, incoming gradients of q and k) -> their gradients."""

    def make(original: Any, _: Any) -> Any:
        def rotated(q: Any, k: Any, cos: Any, sin: Any, *more: Any, **keywords: Any) -> Any:
            def turn(a: Any, b: Any) -> Any:
                return original(a, b, cos, sin, *more, **keywords)

            def changed(grads: Grads, _: Any, incoming: Sequence[Any]) -> Grads:
                return list(change(turn, incoming[0], incoming[1]))

            return _backward_function().apply(turn, changed, q, k)

        return rotated

    return _at_layer("apply_rotary_pos_emb", make)


def _rotations() -> Iterator[GradientMutant]:
    before = tuple(f"{{L}}.self_attn.{x}_{what}" for x in "qk" for what in ("proj", "layernorm"))
    again = _rotation(lambda turn, dq, dk: turn(dq, dk))
    yield GradientMutant("rope: turned on, not back", "rope", again, before, source="apex#1750")
    still = _rotation(lambda turn, dq, dk: [dq, dk])
    yield GradientMutant("rope: not turned back", "rope", still, before)
    one = _rotation(lambda turn, dq, dk: [turn(dq, dk)[0], dk])
    yield GradientMutant("rope: queries and keys turned otherwise", "rope", one, before)


@dataclass(frozen=True)
class _Eager:
    """What eager attention's backward pass is made of, in float32, heads of keys repeated."""

    q: Any
    k: Any
    v: Any
    p: Any
    do: Any
    scale: float
    groups: int

    def gradients(self, ds: Any) -> tuple[Any, Any, Any]:
        dk, dv = ds.transpose(2, 3) @ self.q, self.p.transpose(2, 3) @ self.do
        return ds @ self.k, self.over_groups(dk), self.over_groups(dv)

    def over_groups(self, d: Any) -> Any:
        B, H, T, D = d.shape
        return d.reshape(B, H // self.groups, self.groups, T, D).sum(2)

    @property
    def dp(self) -> Any:
        return self.do @ self.v.transpose(2, 3)


def _attention(change: Callable[["_Eager", Grads], Sequence[Any]]) -> Planting:
    def make(original: Any, _: Any) -> Any:
        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **keywords: Any) -> Any:
            def function(*inputs: Any) -> Any:
                return original(module, *inputs, mask, scaling, **keywords)[0]

            def changed(grads: Grads, inputs: Sequence[Any], incoming: Sequence[Any]) -> Grads:
                import torch

                g = inputs[0].shape[1] // inputs[1].shape[1]
                q, k, v = (x.float() for x in inputs)
                k, v = (x.repeat_interleave(g, 1) for x in (k, v))
                s = q @ k.transpose(2, 3) * scaling
                p = torch.softmax(s if mask is None else s + mask.float(), -1)
                do = incoming[0].float().transpose(1, 2)
                return list(change(_Eager(q, k, v, p, do, scaling, g), grads))

            return _backward_function().apply(function, changed, q, k, v), None

        return attend

    return _at_layer("eager_attention_forward", make)


def _attentions() -> Iterator[GradientMutant]:
    grouped = lambda c: c.num_key_value_heads < c.num_attention_heads  # noqa: E731
    rotated, values = ("{L}.self_attn.q_rope", "{L}.self_attn.k_rope"), ("{L}.self_attn.v_proj",)

    def first_of_group(e: _Eager, grads: Grads) -> Sequence[Any]:
        ds = e.scale * e.p * (e.dp - (e.p * e.dp).sum(-1, keepdim=True))
        return grads[0], (ds.transpose(2, 3) @ e.q)[:, :: e.groups], grads[2]

    def without_delta(e: _Eager, grads: Grads) -> Sequence[Any]:
        dq, dk, _ = e.gradients(e.scale * e.p * e.dp)
        return dq, dk, grads[2]

    entries: tuple[tuple[str, Any, tuple[str, ...], Any, str], ...] = (
        ("the softmax's correction is missing", without_delta, rotated, None, ""),
        ("dq and dk without the scale", lambda e, g: (g[0] / e.scale, g[1] / e.scale, g[2]), rotated, None,
         "TransformerEngine#3216"),
        ("dk of the first head of a group", first_of_group, rotated, grouped, "levanter#449"),
        ("dv is the mean over the group", lambda e, g: (g[0], g[1], g[2] / e.groups), values, grouped, ""),
        ("dk is off by 1 %", lambda e, g: (g[0], g[1] * 1.01, g[2]), rotated, None, ""),
        ("dv one key too late", lambda e, g: (g[0], g[1], g[2].roll(1, 2)), values, None, "FlagGems#3607"),
        ("dq of another sign", lambda e, g: (-g[0], g[1], g[2]), rotated, None, ""),
        ("the last tile of keys has no gradient", lambda e, g: (g[0], _no_last_keys(g[1]), _no_last_keys(g[2])),
         (*rotated, *values), None, "ffpa-attn#300"),
    )  # fmt: skip
    for name, change, at, applies, source in entries:
        always = applies or (lambda c: True)
        yield GradientMutant(f"attention: {name}", "attention", _attention(change), at, always, (), source)


def _no_last_keys(d: Any) -> Any:
    d = d.clone()
    d[:, :, -(-d.shape[2] // 2) :] = 0
    return d


# ---------------------------------------------------------------------------------------- the embedding, the head, loss


def _last_place(dw: Any, inputs: Sequence[Any], dy: Any) -> Any:
    ids = inputs[0]
    found = dw.new_zeros(dw.shape)
    found[ids.reshape(-1)] = dy.reshape(-1, dy.shape[-1])
    return found


def _mean_of_places(dw: Any, inputs: Sequence[Any], dy: Any) -> Any:
    counts = inputs[0].reshape(-1).bincount(minlength=len(dw)).clamp(min=1)
    return dw / counts[:, None]


@contextmanager
def _one_use(model: Any, layer: int) -> Iterator[None]:
    """The head with a weight that learns nothing from it."""
    import torch

    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight.detach())
    try:
        yield
    finally:
        del model.lm_head.forward


def _loss(make: Callable[..., Any]) -> Planting:
    """make(logits, labels, items) -> a loss; items is None where a batch is whole."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        before = model.__dict__.get("_loss_function")

        def loss(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Any:
            return make(logits.float(), labels, num_items_in_batch)

        model.loss_function = loss
        try:
            yield
        finally:
            model.__dict__.pop("_loss_function", None)
            if before is not None:
                model.loss_function = before

    return plant


def _entropy(logits: Any, labels: Any, items: Any, shift: bool = True, **how: Any) -> Any:
    import torch

    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    sum_of = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum", **how
    )
    return sum_of / (items if items is not None else (labels != IGNORE_INDEX).sum())


def _ends() -> Iterator[GradientMutant]:
    tied, table = (lambda c: bool(c.tie_word_embeddings)), ("model.embed_tokens.weight",)
    embed = ".model.embed_tokens"
    yield GradientMutant(
        "embedding: the last place of a token wins", "embedding", _in(embed, _of(1, _last_place)), table
    )
    yield GradientMutant(
        "embedding: mean over the places of a token", "embedding", _in(embed, _of(1, _mean_of_places)), table
    )
    yield GradientMutant("tied: one of two uses counted", "tied", _one_use, table, tied, (), "entrenar#314")
    of_padding = lambda z, y, n: _entropy(z, y.clamp(min=0), n)  # noqa: E731
    of_all = lambda z, y, n: _entropy(z, y, y.numel() if n is None else 2 * y.numel())  # noqa: E731
    for name, make, source in (
        ("labels that do not count are counted", of_padding, "Liger#1298"),
        ("divided by all positions", of_all, ""),
        ("labels are not shifted", lambda z, y, n: _entropy(z, y, n, shift=False), ""),
        ("labels smoothed by 1 %", lambda z, y, n: _entropy(z, y, n, label_smoothing=0.01), ""),
        ("a mean for every micro-batch", lambda z, y, n: _entropy(z, y, None) / 2, "transformers#34191"),
        ("every micro-batch divided by their number", lambda z, y, n: _entropy(z, y, n) / 2, "Fast-LLM#550"),
    ):
        yield GradientMutant(f"loss: {name}", "loss", _loss(make), ("lm_head",), source=source)


# ------------------------------------------------------------------------------------------------- the loop of training


def _before_each_part(what: Callable[[Any, int], None]) -> Planting:
    """what(model, n): before the n-th forward pass, from 0."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        count = [0]

        def hook(*_: Any) -> None:
            what(model, count[0])
            count[0] += 1

        handle = model.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return plant


def _forgotten(model: Any, number: int) -> None:
    model.zero_grad(set_to_none=True)


def _doubled(model: Any, number: int) -> None:
    for parameter in model.parameters():
        if number and parameter.grad is not None:
            parameter.grad *= 2


def _recomputed(change: Callable[[Any], Any], path: str) -> Planting:
    """Checkpointed, a module of the layer gives something else when it is computed again."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        import torch

        module = model.model.layers[layer].get_submodule(path)
        original, count = module.forward, [0]

        def forward(*arguments: Any, **keywords: Any) -> Any:
            count[0] += 1
            out = original(*arguments, **keywords)
            with torch.no_grad():
                other = change(out.detach())
            return out + (other - out.detach()) if count[0] % 2 == 0 else out

        model.gradient_checkpointing_enable({"use_reentrant": False})
        module.forward = forward
        try:
            yield
        finally:
            del module.forward
            model.gradient_checkpointing_disable()

    return plant


@contextmanager
def _as_it_is(model: Any, layer: int) -> Iterator[None]:
    yield


def _loops() -> Iterator[GradientMutant]:
    yield GradientMutant(
        "accumulation: overwritten",
        "accumulation",
        _before_each_part(_forgotten),
        ("{head}",),
        source="Megatron-LM#6660",
    )
    yield GradientMutant("accumulation: doubled", "accumulation", _before_each_part(_doubled), ("{head}",))
    down = ("{L}.mlp.down_proj.weight",)
    yield GradientMutant(
        "checkpointing: up_proj is another when it is made again", "checkpointing",
        _recomputed(lambda y: y * 1.05, "mlp.up_proj"), down, source="pytorch#190758",
    )  # fmt: skip
    yield GradientMutant(
        "checkpointing: context is another when it is made again", "checkpointing",
        _recomputed(lambda y: y.roll(1, 1), "self_attn.v_proj"), (*down, "{L}.self_attn.o_proj.weight"),
    )  # fmt: skip
    frozen = "model.layers.1.mlp.up_proj.weight"
    yield GradientMutant("a frozen tensor learns", "frozen", _as_it_is, (frozen,), frozen=(frozen,))


@cache
def catalogue() -> tuple[GradientMutant, ...]:
    """All of them."""
    parts = (_norms, _products, _activations, _rotations, _attentions, _ends, _loops)
    return tuple(mutant for part in parts for mutant in part())
