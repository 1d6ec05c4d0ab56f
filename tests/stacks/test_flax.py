"""Modules of Flax against the pages, by the intermediates that Flax itself captures: Llama, and StableLM with its
LayerNorm, whose variance Flax computes in one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax_port as port
import numpy as np
import pytest
from harness import Bug, Checks, must_be_named, must_hold

from refllm import golden

LLAMA, SEQUENTIAL = "llama-tiny", "stablelm-tiny-sequential"
CHECKS = Checks("flax", (LLAMA, SEQUENTIAL), ("float32", "bfloat16", "float16"))
IDS = np.random.default_rng(0).integers(0, 600, size=48)
Dense = partial(nn.Dense, use_bias=False)


class Attention(nn.Module):
    config: Any
    parts: Any

    @nn.compact
    def __call__(self, x: Any, seen: Any, positions: Any) -> Any:
        c, (B, S, _) = self.config, x.shape
        D, H, K = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
        q, k, v = (
            Dense(heads * D, dtype=x.dtype, name=f"{name}_proj")(x).reshape(B, S, heads, D).swapaxes(1, 2)
            for name, heads in (("q", H), ("k", K), ("v", K))
        )
        q, k = (self.parts[f"rotate_{name}"](y, positions, c) for name, y in (("q", q), ("k", k)))
        o = self.parts["attend"](q, k, v, seen, D**-0.5)
        for name, value in (("q_rope", q), ("k_rope", k), ("context", o)):
            self.sow("intermediates", name, value)
        return Dense(x.shape[-1], dtype=x.dtype, name="o_proj")(o.swapaxes(1, 2).reshape(B, S, -1))


class Mlp(nn.Module):
    config: Any
    parts: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate, up = (
            Dense(self.config["intermediate_size"], dtype=x.dtype, name=f"{name}_proj")(x) for name in ("gate", "up")
        )
        act = self.parts["swiglu"](gate, up)
        self.sow("intermediates", "act", act)
        return Dense(x.shape[-1], dtype=x.dtype, name="down_proj")(act)


class Layer(nn.Module):
    config: Any
    parts: Any

    @nn.compact
    def __call__(self, x: Any, seen: Any, positions: Any) -> Any:
        norm, parts = partial(self.parts["norm"], self.config), (self.config, self.parts)
        x = x + Attention(*parts, name="self_attn")(norm("input_layernorm", x), seen, positions)
        self.sow("intermediates", "residual_mid", x)
        return x + Mlp(*parts, name="mlp")(norm("post_attention_layernorm", x))


class Model(nn.Module):
    config: Any
    parts: Any
    dtype: str

    @nn.compact
    def __call__(self, ids: Any, mask: Any, positions: Any) -> Any:
        c = self.config
        embed = nn.Embed(c["vocab_size"], c["hidden_size"], dtype=self.dtype, name="embed_tokens")
        x, seen = embed(ids), port.visible(mask, ids.shape[1])
        for i in range(c["num_hidden_layers"]):
            x = Layer(c, self.parts, name=f"layers_{i}")(x, seen, positions)
        x = self.parts["norm"](c, "norm", x)
        if c["tie_word_embeddings"]:
            return embed.attend(x)
        return Dense(c["vocab_size"], dtype=x.dtype, name="lm_head")(x)


def norm(config: Any, name: str, x: Any) -> Any:
    if "layer_norm_eps" in config:
        return nn.LayerNorm(epsilon=config["layer_norm_eps"], dtype=x.dtype, name=name)(x)
    return nn.RMSNorm(epsilon=config["rms_norm_eps"], dtype=x.dtype, name=name)(x)


PARTS: dict[str, Callable[..., Any]] = {"norm": norm} | {
    name: port.PARTS[name] for name in ("rotate_q", "rotate_k", "attend", "swiglu")
}


def parameters(weights: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's tensors as Flax has them: kernels [in, out], scales of norms, layers_0."""
    found: dict[str, Any] = {}
    for name, value in weights.items():
        *path, kind = name.removeprefix("model.").replace("layers.", "layers_").split(".")
        if path[-1] == "embed_tokens":
            kind = "embedding"
        elif kind == "weight":
            kind, value = ("kernel", value.T) if value.ndim == 2 else ("scale", value)
        at = found
        for part in path:
            at = at.setdefault(part, {})
        at[kind] = value
    return {"params": found}


def function_with(parts: dict[str, Any], checkpoint: str) -> Any:
    """What somebody writes: Flax keeps what its modules return, and the function returns that."""
    config = port.config_of(str(golden.path(checkpoint)))

    @jax.jit
    def forward(params: Any, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
        model = Model(config, PARTS | parts, str(params["model.norm.weight"].dtype))
        given = parameters(params), input_ids, attention_mask, position_ids
        logits, kept = model.apply(*given, capture_intermediates=True, mutable=["intermediates"])
        return {"model": kept["intermediates"], "logits": logits}

    return forward


@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(checkpoint: str, dtype: str) -> None:
    reports = must_hold(CHECKS, checkpoint, dtype, function_with({}, checkpoint), input_ids=IDS)
    assert len(reports[0].taps) == {LLAMA: 48, SEQUENTIAL: 33}[checkpoint]  # all of them, of 3 and of 2 layers


def swapped(gate: Any, up: Any) -> Any:
    return port.swiglu(up, gate)


def eps_100(config: Any, name: str, x: Any) -> Any:
    return (
        norm(config | {"rms_norm_eps": 1e-3, "layer_norm_eps": 1e-3}, name, x)
        if "layer_norm_eps" in config
        else (nn.RMSNorm(epsilon=1e-3, dtype=x.dtype, name=name)(x))
    )


def narrow_statistics(config: Any, name: str, x: Any) -> Any:
    return nn.RMSNorm(epsilon=config["rms_norm_eps"], dtype=x.dtype, name=name, force_float32_reductions=False)(x)


def later(x: Any, positions: Any, config: Any) -> Any:
    return port.rotate(x, positions + 1, config)


def unscaled(q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    return port.attend(q, k, v, seen, 1.0)


BUGS = (
    Bug("gate and up swapped", {"swiglu": swapped}, "0.mlp.act"),
    Bug("eps 1e-3", {"norm": eps_100}, "0.input_layernorm"),
    Bug("statistics of the norm in the format", {"norm": narrow_statistics}, "0.input_layernorm", LLAMA, "bfloat16"),
    Bug("positions of k one later", {"rotate_k": later}, "0.self_attn.k_rope"),
    Bug("no scale", {"attend": unscaled}, "0.self_attn.context", SEQUENTIAL),
)


@pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
def test_planted_bugs_are_named(bug: Bug, dtype: str) -> None:
    must_be_named(CHECKS, bug, dtype, function_with(bug.plant, bug.checkpoint), input_ids=IDS)
