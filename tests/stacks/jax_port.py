"""The four families in JAX as somebody writes them: a pure function that returns its values by their names.

`PARTS` are its operators, which a test replaces by wrong ones; `forward` and `compiled` are what a user has in a file.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

Array = Any
Config = dict[str, Any]


def rms_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """In float32, rounded before the weight."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """In float32 to the end, with a variance in two passes."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * scale * weight
    return (y if bias is None else y + bias).astype(x.dtype)


def frequencies(config: Config) -> np.ndarray:
    """[R/2] in float32, and stretched where the config says so; what cos and sin are multiplied by stands beside."""
    rope, theta = config["rope_parameters"], config["rope_parameters"]["rope_theta"]
    R = int(config["head_dim"] * rope.get("partial_rotary_factor", 1))
    found = theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
    if rope["rope_type"] == "default":
        return found.astype(np.float32)
    length = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = np.clip((length * found / (2 * np.pi) - low) / (high - low), 0, 1)
    else:  # yarn
        first, last = (
            R * np.log(length / (2 * np.pi * rope[name])) / (2 * np.log(theta)) for name in ("beta_fast", "beta_slow")
        )
        first, last = max(np.floor(first), 0), min(np.ceil(last), R - 1)
        share = 1 - np.clip((np.arange(R // 2) - first) / max(last - first, 0.001), 0, 1)
    return ((1 - share) * found / rope["factor"] + share * found).astype(np.float32)


def stretch(config: Config) -> float:
    """What cos and sin are multiplied by."""
    rope = config["rope_parameters"]
    return 0.1 * rope["mscale"] * float(np.log(rope["factor"])) + 1 if rope["rope_type"] == "yarn" else 1.0


def turned(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """The first dims of x [B, heads, S, D], as many as cos and sin have twice."""
    R = 2 * cos.shape[-1]
    part, rest = x[..., :R].astype(jnp.float32), x[..., R:]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else jnp.split(part, 2, axis=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    both = jnp.stack(pair, axis=-1).reshape(part.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([both.astype(x.dtype), rest], axis=-1)


def rotate(x: Array, positions: Array, config: Config) -> Array:
    """In float32, by angles in float32."""
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies(config)
    cos, sin = (f(angles) * stretch(config) for f in (jnp.cos, jnp.sin))
    return turned(x, cos, sin, config["model_type"] == "helium")


def attend(q: Array, k: Array, v: Array, seen: Array, scale: float) -> Array:
    """q [B, H, S, D], k and v [B, K, T, D], seen [B, 1, S, T]; the softmax in float32."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bhsd,bhtd->bhst", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhst,bhtd->bhsd", weights.astype(v.dtype), v)


def visible(mask: Array, queries: int) -> Array:
    """[B, 1, S, T] of a mask [B, T]: the keys up to each query that are no padding."""
    T = mask.shape[1]
    causal = jnp.arange(T) <= jnp.arange(T - queries, T)[:, None]
    return causal[None, None] & (mask[:, None, None, :] != 0)


def swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def relu2(up: Array) -> Array:
    return jnp.square(jax.nn.relu(up))


def linear(x: Array, weight: Array, bias: Array) -> Array:
    y = x @ weight.T
    return y if bias is None else y + bias


def add(x: Array, y: Array) -> Array:
    return x + y


PARTS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rotate_q": rotate,
    "rotate_k": rotate,
    "attend": attend,
    "visible": visible,
    "swiglu": swiglu,
    "relu2": relu2,
    "linear": linear,
    "head": linear,
    "add": add,
}


def model(
    config: Config,
    parts: dict[str, Callable[..., Any]],
    params: dict[str, Array],
    input_ids: Array,
    attention_mask: Array,
    position_ids: Array,
    cache: Any = None,
    inputs_embeds: Array = None,
) -> tuple[dict[str, Array], Any]:
    """The values of all names, and the keys and values of every layer."""
    values: dict[str, Array] = {}
    B, S = input_ids.shape
    D, kind = config["head_dim"], "layer_norm" if "layer_norm_eps" in config else "rms_norm"
    eps = config.get("layer_norm_eps", config.get("rms_norm_eps"))

    def show(name: str, value: Array) -> Array:
        values[name] = value
        return value

    def project(name: str, x: Array) -> Array:
        return show(name, parts["linear"](x, params[f"{name}.weight"], params.get(f"{name}.bias")))

    def norm(name: str, x: Array) -> Array:
        return show(name, parts[kind](x, params[f"{name}.weight"], params.get(f"{name}.bias"), eps))

    def norm_of_heads(name: str, x: Array) -> Array:
        if f"{name}.norms.0.weight" not in params:
            return x
        weight = jnp.stack([params[f"{name}.norms.{head}.weight"] for head in range(x.shape[1])])
        return show(name, parts["layer_norm"](x, weight[:, None, :], None, eps))

    def heads(x: Array) -> Array:
        return x.reshape(B, S, -1, D).transpose(0, 2, 1, 3)

    def attention(layer: str, h: Array, past: Any) -> Array:
        at = f"{layer}.self_attn"
        q, k, v = (heads(project(f"{at}.{name}_proj", h)) for name in "qkv")
        q, k = (norm_of_heads(f"{at}.{name}_layernorm", x) for name, x in (("q", q), ("k", k)))
        q = show(f"{at}.q_rope", parts["rotate_q"](q, position_ids, config))
        k = show(f"{at}.k_rope", parts["rotate_k"](k, position_ids, config))
        if past is not None:
            k, v = (jnp.concatenate(pair, axis=2) for pair in zip(past, (k, v), strict=True))
        kept.append((k, v))
        o = show(f"{at}.context", parts["attend"](q, k, v, parts["visible"](attention_mask, S), D**-0.5))
        return project(f"{at}.o_proj", o.transpose(0, 2, 1, 3).reshape(B, S, -1))

    def mlp(layer: str, h: Array) -> Array:
        at = f"{layer}.mlp"
        gated = f"{at}.gate_proj.weight" in params
        both = [project(f"{at}.{name}_proj", h) for name in (("gate", "up") if gated else ("up",))]
        return project(f"{at}.down_proj", show(f"{at}.act", parts["swiglu" if gated else "relu2"](*both)))

    embedded = params["model.embed_tokens.weight"][input_ids] if inputs_embeds is None else inputs_embeds
    x, kept = show("model.embed_tokens", embedded), list[tuple[Array, Array]]()
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(f"{layer}.input_layernorm", x)
        o = attention(layer, h, None if cache is None else cache[i])
        if config.get("use_parallel_residual"):
            x = show(layer, parts["add"](parts["add"](x, o), mlp(layer, h)))
        else:
            x = show(f"{layer}.residual_mid", parts["add"](x, o))
            x = show(layer, parts["add"](x, mlp(layer, norm(f"{layer}.post_attention_layernorm", x))))
    x = norm("model.norm", x)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    show("lm_head", parts["head"](x, params[f"{head}.weight"], None))
    return values, kept


def config_of(checkpoint: str) -> Config:
    found: Config = json.loads((Path(checkpoint) / "config.json").read_text())
    return {"head_dim": found["hidden_size"] // found["num_attention_heads"]} | found


@cache
def weights_of(checkpoint: str, dtype: str) -> dict[str, Array]:
    stored = [load_file(file) for file in Path(checkpoint).glob("*.safetensors")]
    return {name: jnp.asarray(value).astype(dtype) for part in stored for name, value in part.items()}


def forward(
    checkpoint: str,
    input_ids: Array,
    attention_mask: Array,
    position_ids: Array,
    dtype: str,
    cache: Any = None,
    inputs_embeds: Array = None,
) -> tuple[dict[str, Array], Any]:
    """Operator by operator."""
    config, params = config_of(checkpoint), weights_of(checkpoint, dtype)
    return model(config, PARTS, params, input_ids, attention_mask, position_ids, cache, inputs_embeds)


def compiled(
    checkpoint: str,
    input_ids: Array,
    attention_mask: Array,
    position_ids: Array,
    dtype: str,
    cache: Any = None,
    inputs_embeds: Array = None,
) -> tuple[dict[str, Array], Any]:
    """The same as one program."""
    run = jax.jit(partial(model, config_of(checkpoint), PARTS))
    return run(weights_of(checkpoint, dtype), input_ids, attention_mask, position_ids, cache, inputs_embeds)
