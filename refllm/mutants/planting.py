"""Tools that plant a defect in one layer of a Transformers model and take it out again.

Nothing of the model's tensors is written to. A module's `forward`, a function of its modeling file or the arguments of
a call are replaced while a `with` block is open, and put back at its end, whatever happens inside.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Plant = Callable[[Any, int], AbstractContextManager[None]]
"""plant(model, layer): the defect is in the model while the context is open."""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` while open; afterwards it is as it was, also if it was inherited from the class."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def layer_of(model: Any, layer: int) -> Any:
    """The decoder layer of a model with or without a head."""
    return getattr(model, "model", model).layers[layer]


def module_at(model: Any, layer: int, path: str) -> Any:
    """layer_of(model, layer) and then along `path`, such as "self_attn.q_proj"; from the model itself for layer -1."""
    found = model if layer < 0 else layer_of(model, layer)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def forward_of(path: str, make: Callable[[Any], Callable[..., Any]]) -> Plant:
    """The module at `path` of the layer runs `make(module)` in place of its forward."""

    def plant(model: Any, layer: int) -> AbstractContextManager[None]:
        module = module_at(model, layer, path)
        return replaced(module, "forward", make(module))

    return plant


def forward_of_model(path: str, make: Callable[[Any], Callable[..., Any]]) -> Plant:
    """The same for a module outside the layers, such as "model.norm"."""
    return lambda model, layer: forward_of(path, make)(model, -1)


def forward_of_block(make: Callable[[Any], Callable[..., Any]]) -> Plant:
    """The same for the whole layer."""

    def plant(model: Any, layer: int) -> AbstractContextManager[None]:
        block = layer_of(model, layer)
        return replaced(block, "forward", make(block))

    return plant


# ----------------------------------------------------------------------------------------------------------- attention

Attention = Callable[..., tuple[Any, Any]]
"""attention(module, query, key, value, additive mask [B, 1, S, T], scale) -> context [B, S, H, D], weights."""


def attention_is(function: Attention) -> Plant:
    """The layer's attention is `function`; the model must run its eager attention."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        modeling, target = sys.modules[type(model).__module__], layer_of(model, layer).self_attn
        original = modeling.eager_attention_forward

        def chosen(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any) -> Any:
            if module is not target:
                return original(module, query, key, value, mask, scaling, **options)
            return function(module, query, key, value, mask, scaling)

        with replaced(modeling, "eager_attention_forward", chosen):
            yield

    return plant


def fused_attention_is(function: Attention) -> Plant:
    """The same for a model that runs its sdpa attention, which may have no mask or a boolean one."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        import torch

        modeling, target = sys.modules[type(model).__module__], layer_of(model, layer).self_attn
        interfaces = modeling.ALL_ATTENTION_FUNCTIONS
        original = interfaces["sdpa"]

        def chosen(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
            if module is not target:
                return original(module, query, key, value, mask, **options)
            S, T = query.shape[2], key.shape[2]
            if mask is None:
                mask = torch.ones(1, 1, S, T, dtype=torch.bool).tril(T - S)
            added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            return function(module, query, key, value, added, options["scaling"])

        interfaces["sdpa"] = chosen
        try:
            yield
        finally:
            interfaces["sdpa"] = original

    return plant


def repeated(module: Any, key: Any) -> Any:
    """[B, K, T, D] -> [B, H, T, D]: query head h reads head h // (H / K)."""
    return key.repeat_interleave(module.num_key_value_groups, dim=1)


def attend(query: Any, key: Any, value: Any, mask: Any, scale: float) -> tuple[Any, Any]:
    """Eager attention, with the heads already repeated: every step is rounded, softmax runs in float32."""
    import torch

    scores = query @ key.transpose(2, 3) * scale
    scores = scores if mask is None else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def visible(mask: Any, query: Any, key: Any) -> Any:
    """bool [B or 1, 1, S, T]: what an additive mask lets a query see."""
    import torch

    if mask is None:
        return torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    return mask == 0


def hidden(seen: Any, dtype: Any) -> Any:
    """The additive mask that shows `seen`; a query that would see nothing sees everything, so that no NaN arises."""
    import torch

    seen = seen | ~seen.any(dim=-1, keepdim=True)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


# ---------------------------------------------------------------------------------------------------------------- RoPE

Tables = Callable[[Any, Any, Any], tuple[Any, Any]]
"""tables(rotary module, positions [B, S], dtype) -> cos, sin [B, S, R]."""


def rotary_tables(inv_freq: Any, factor: float, positions: Any, dtype: Any) -> tuple[Any, Any]:
    """cos and sin [B, S, R] as the models make them: in float32, both halves alike, rounded to `dtype` at the end."""
    import torch

    angles = positions[..., None].float() * inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def tables_are(function: Tables) -> Plant:
    """The layer's attention receives other rotary tables."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        rotary = getattr(model, "model", model).rotary_emb

        def exchange(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            cos, _ = kwargs["position_embeddings"]
            tables = function(rotary, kwargs["position_ids"], cos.dtype)
            return args, {**kwargs, "position_embeddings": tables}

        handle = layer_of(model, layer).self_attn.register_forward_pre_hook(exchange, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    return plant


Rotation = Callable[..., tuple[Any, Any]]
"""rotation(rotary module, original, q, k, cos, sin) -> rotated q and k; original is the model's own function."""


def rotation_is(function: Rotation) -> Plant:
    """The layer rotates its queries and keys by `function`."""

    @contextmanager
    def plant(model: Any, layer: int) -> Iterator[None]:
        modeling, target = sys.modules[type(model).__module__], layer_of(model, layer).self_attn
        original = modeling.apply_rotary_pos_emb
        rotary, running = getattr(model, "model", model).rotary_emb, False

        def set_running(value: bool) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                nonlocal running
                running = value

            return hook

        def chosen(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            if not running:
                return original(q, k, cos, sin, *args, **kwargs)
            return function(rotary, original, q, k, cos, sin)

        handles = [
            target.register_forward_pre_hook(set_running(True)),
            target.register_forward_hook(set_running(False)),
        ]
        try:
            with replaced(modeling, "apply_rotary_pos_emb", chosen):
                yield
        finally:
            for handle in handles:
                handle.remove()

    return plant


def rotate(x: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    """x [B, H, S, R] with tables [B, S, R] whose halves are alike, by either pairing of dims; rounded as eager code."""
    import torch

    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    if interleaved:
        cos, sin = (t[..., :half].repeat_interleave(2, dim=-1) for t in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
