"""A port of the four families to plain NumPy, as somebody writes one who has the paper and the checkpoint.

It shares no code with the pages, the operators or the hypotheses, so that a mistake planted here is a mistake and not a
hypothesis run backwards. It shows its logits alone. What may be wrong in it is a field of `Port`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (np.exp(-x) + 1),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "tanh gelu": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: (x * (x > 0)) ** 2,
    "square": lambda x: x**2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "none": lambda x: x,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}


@dataclass(frozen=True)
class Port:
    """tensors: by the names of the pages. config: their settings. Every other field is a mistake; as it stands there is
    none. half: rounds to the narrow format after every step."""

    tensors: Mapping[str, Array]
    config: Any
    half: Callable[[Array], Array] = lambda x: x
    theta: float | None = None
    scaling: str = "own"
    rope: dict[str, Any] | None = None
    interleaved: bool | None = None
    turn: str = "qk"
    sign: float = 1.0
    dims: int | None = None
    twice: bool = False
    place: Callable[[Array], Array] = lambda p: p
    shift_q: int = 0
    cut_angles: bool = False
    factor: float | None = None
    eps: float | None = None
    eps_outside: bool = False
    plus: float = 0.0
    weightless: bool = False
    centred: bool | None = None
    biasless_norm: bool = False
    unfinished: bool = False
    finish_twice: bool = False
    headless: str = ""
    post_norm: bool = False
    scale: Callable[[Any], float] | None = None
    sees: Callable[[Array, Array], Array] = lambda t, u: u <= t
    groups: Callable[[int, int, int], int] | None = None
    swap_kv: bool = False
    k_for_v: bool = False
    cap_scores: float = 0.0
    sink: bool = False
    merge: str = ""
    cache: Callable[[Array], Array] = lambda x: x
    act: str = ""
    gate: str = "gate"
    tail: int = 0
    parallel: str = ""
    keep: float = 1.0
    add_attention: float = 1.0
    add_mlp: float = 1.0
    drop: tuple[str, ...] = ()
    change: Mapping[str, Callable[[Array], Array]] | None = None
    renamed: Mapping[str, str] | None = None
    layers: Callable[[list[int]], list[int]] = lambda order: order
    embed: float = 1.0
    roll: int = 0
    head: Callable[[Array], Array] = lambda y: y
    untie: str = ""
    only_layer: int | None = None

    # ------------------------------------------------------------------------------------------------------ what it has

    def tensor(self, name: str, layer: int | None = None) -> Array | None:
        """A tensor, with the mistakes of a loader."""
        short = (self.renamed or {}).get(name, name)
        full = short if layer is None else f"layers.{layer}.{short}"
        if full == "lm_head.weight" and (full not in self.tensors or self.untie):
            full = "embed_tokens.weight"
        if full not in self.tensors or any(name.endswith(end) for end in self.drop):
            return None
        found = np.asarray(self.tensors[full], np.float32)
        for ending, change in (self.change or {}).items():
            if name.endswith(ending) and (self.only_layer in (None, layer)):
                found = change(found)
        return found

    def needed(self, name: str, layer: int | None = None) -> Array:
        """A tensor that must be there."""
        found = self.tensor(name, layer)
        assert found is not None
        return found

    # --------------------------------------------------------------------------------------------------------- forward

    def logits(self, ids: Array) -> Array:
        """[S] -> [S, V]."""
        table = np.roll(self.needed("embed_tokens.weight"), self.roll, axis=0)
        x = self.half(table[ids] * np.float32(self.embed))
        for layer in self.layers(list(range(self.config.num_hidden_layers))):
            x = self.block(x, layer)
        if not self.unfinished:
            x = self.norm(x, "norm", None)
        if self.finish_twice:
            x = self.norm(x, "norm", None)
        return np.asarray(self.head(self.half(x @ self.needed("lm_head.weight").T)))

    def block(self, x: Array, layer: int) -> Array:
        """One layer, [S, E] -> [S, E]."""
        right = self.only_layer is not None and self.only_layer != layer
        port = Port(self.tensors, self.config, self.half) if right else self
        return port._block(x, layer)

    def _block(self, x: Array, layer: int) -> Array:
        own = bool(getattr(self.config, "use_parallel_residual", False))
        normed = x if self.post_norm else self.norm(x, "input_layernorm", layer)
        mixed = np.float32(self.add_attention) * self.attention(normed, layer)
        if own and self.parallel != "sequential":
            return self.half(self.half(self.keep * x + mixed) + self.mlp(normed, layer))
        y = self.half(np.float32(self.keep) * x + mixed)
        y = self.norm(y, "input_layernorm", layer) if self.post_norm else y
        name = "input_layernorm" if own else "post_attention_layernorm"
        if self.parallel == "same norm":
            read = normed
        elif self.post_norm:
            read = y
        else:
            read = self.norm(x if self.parallel == "own norm" else y, name, layer)
        out = self.half(np.float32(self.keep) * y + np.float32(self.add_mlp) * self.mlp(read, layer))
        return self.norm(out, name, layer) if self.post_norm else out

    def norm(self, x: Array, name: str, layer: int | None) -> Array:
        """RMSNorm or LayerNorm over the last axis."""
        weight, bias = self.needed(f"{name}.weight", layer), self.tensor(f"{name}.bias", layer)
        return self._normed(x, weight, None if self.biasless_norm else bias)

    def _normed(self, x: Array, weight: Array, bias: Array | None) -> Array:
        layer_norm = hasattr(self.config, "layer_norm_eps")
        eps = np.float32((self.config.layer_norm_eps if layer_norm else self.config.rms_norm_eps) if self.eps is None
                         else self.eps)  # fmt: skip
        x = x - x.mean(-1, keepdims=True) if (layer_norm if self.centred is None else self.centred) else x
        mean = (x * x).mean(-1, keepdims=True)
        y = x / (np.sqrt(mean) + eps) if self.eps_outside else x / np.sqrt(mean + eps)
        y = self.half(y) * (1 if self.weightless else weight + np.float32(self.plus))
        return self.half(y if bias is None else y + bias)

    def product(self, x: Array, name: str, layer: int) -> Array:
        """x W^T + b."""
        bias = self.tensor(f"{name}.bias", layer)
        y = x @ self.needed(f"{name}.weight", layer).T
        return self.half(y if bias is None else y + bias)

    def attention(self, x: Array, layer: int) -> Array:
        """Causal attention, head by head: [S, E] -> [S, E]."""
        c, S = self.config, len(x)
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, k, v = (self.product(x, f"self_attn.{n}_proj", layer).reshape(S, -1, D) for n in "qkv")
        if self.swap_kv:
            k, v = v, k
        if getattr(c, "qk_layernorm", False):
            q, k = self.head_norm(q, "q", layer), self.head_norm(k, "k", layer)
        positions = self.place(np.arange(S))
        q = self.turned(q, np.maximum(positions - self.shift_q, 0)) if "q" in self.turn else q
        k = self.turned(k, positions) if "k" in self.turn else k
        v = self.turned(v, positions) if "v" in self.turn else v
        k, v = self.cache(k), self.cache(k if self.k_for_v else v)
        seen = self.sees(np.arange(S)[:, None], np.arange(S)[None])
        out = np.zeros((S, H, D), np.float32)
        for h in range(H):
            g = h // (H // K) if self.groups is None else self.groups(h, H, K)
            out[:, h] = self.mix(q[:, h], k[:, g], v[:, g], seen)
        merged = out.transpose(1, 0, 2) if self.merge == "crosswise" else out
        return self.product(np.ascontiguousarray(merged).reshape(S, H * D), "self_attn.o_proj", layer)

    def mix(self, q: Array, k: Array, v: Array, seen: Array) -> Array:
        """softmax(q k^T) v of one head."""
        scale = self.config.head_dim**-0.5 if self.scale is None else self.scale(self.config)
        s = self.half(self.half(q @ k.T) * np.float32(scale))
        if self.cap_scores:
            s = np.tanh(s / np.float32(self.cap_scores)) * np.float32(self.cap_scores)
        s = np.where(seen, s, np.float32(-1e30))
        top = s.max(-1, keepdims=True)
        e = np.exp(s - top)
        total = e.sum(-1, keepdims=True) + (np.exp(-top) if self.sink else 0)
        return self.half(self.half((e / total).astype(np.float32)) @ v)

    def head_norm(self, x: Array, which: str, layer: int) -> Array:
        """StableLM's norm of every head with weights of its own."""
        if which in self.headless:
            return x
        name = f"self_attn.{which}_layernorm.norms"
        return np.stack(
            [self._normed(x[:, j], self.needed(f"{name}.{j}.weight", layer), None) for j in range(x.shape[1])], axis=1
        )

    # ------------------------------------------------------------------------------------------------------------- RoPE

    def turned(self, x: Array, positions: Array) -> Array:
        """[S, heads, D], of which the first dims are rotated."""
        p = dict(self.rope or self.config.rope_parameters)
        own = self.config.model_type == "helium"
        D = x.shape[-1]
        R = self.dims or (int(D * p.get("partial_rotary_factor", 1.0)) if self.config.model_type == "stablelm" else D)
        speeds, factor = self.speeds(p, R)
        factor = factor if self.factor is None else self.factor
        angle = positions[:, None].astype(np.float32) * speeds.astype(np.float32)
        if self.cut_angles:
            angle = (angle.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        cos, sin = (self.half((f(angle) * factor).astype(np.float32))[:, None] for f in (np.cos, np.sin))
        for _ in range(1 + self.twice):
            x = self.rotated(x, R, cos, self.sign * sin, own if self.interleaved is None else self.interleaved)
        return x

    def rotated(self, x: Array, R: int, cos: Array, sin: Array, interleaved: bool) -> Array:
        """Pairs (a, b) -> (a cos - b sin, b cos + a sin)."""
        y, half = x.copy(), R // 2
        first = slice(0, R, 2) if interleaved else slice(0, half)
        second = slice(1, R, 2) if interleaved else slice(half, R)
        a, b = x[..., first], x[..., second]
        y[..., first] = self.half(self.half(a * cos) - self.half(b * sin))
        y[..., second] = self.half(self.half(b * cos) + self.half(a * sin))
        return y

    def speeds(self, p: dict[str, Any], R: int) -> tuple[Array, float]:
        """Angle per position of every pair, and what cos and sin are multiplied by."""
        theta, kind = self.theta or p["rope_theta"], p.get("rope_type", "default")
        speeds = theta ** -(np.arange(0, R, 2) / R)
        if kind == "default" or self.scaling == "none":
            return speeds, 1.0
        if kind == "linear" or self.scaling == "linear":
            return speeds / p["factor"], 1.0
        if kind == "llama3":
            turns = p["original_max_position_embeddings"] * speeds / (2 * math.pi)
            low, high = p["low_freq_factor"], p["high_freq_factor"]
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            return speeds * (smooth + (1 - smooth) / p["factor"]), 1.0
        if kind == "yarn":
            return self.yarn(p, speeds, R, theta)
        raise NotImplementedError(kind)

    @staticmethod
    def yarn(p: dict[str, Any], speeds: Array, R: int, theta: float) -> tuple[Array, float]:
        """Only slow pairs are stretched."""
        length, factor = p["original_max_position_embeddings"], p["factor"]
        at = [R * math.log(length / (t * 2 * math.pi)) / (2 * math.log(theta))
              for t in (p.get("beta_fast") or 32, p.get("beta_slow") or 1)]  # fmt: skip
        if p.get("truncate", True):
            at = [math.floor(at[0]), math.ceil(at[1])]
        low, high = max(at[0], 0), min(at[1], R - 1)
        ramp = np.clip((np.arange(R // 2) - low) / max(high - low, 1e-3), 0, 1)
        grow = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
        given, one, all_dims = p.get("attention_factor"), p.get("mscale"), p.get("mscale_all_dim")
        if given is None:
            given = grow(one) / grow(all_dims) if one and all_dims else grow(1)
        return speeds * ((1 - ramp) + ramp / factor), float(given)

    # -------------------------------------------------------------------------------------------------------------- MLP

    def mlp(self, x: Array, layer: int) -> Array:
        """Gated, or not."""
        kind = self.act or {"gelu_pytorch_tanh": "tanh gelu"}.get(self.config.hidden_act, self.config.hidden_act)
        act = ACTIVATIONS[kind]
        up = self.product(x, "mlp.up_proj", layer)
        if self.tensor("mlp.gate_proj.weight", layer) is None:
            h = self.half(act(up))
        else:
            gate = self.product(x, "mlp.gate_proj", layer)
            h = {
                "gate": lambda: self.half(self.half(act(gate)) * up),
                "up": lambda: self.half(self.half(act(up)) * gate),
                "alone": lambda: self.half(act(gate)),
                "unused": lambda: self.half(act(up)),
                "sum": lambda: self.half(self.half(act(gate)) + up),
            }[self.gate]()
        if self.tail:
            h = h * (np.arange(h.shape[-1]) < h.shape[-1] - self.tail)
        return self.product(h.astype(np.float32), "mlp.down_proj", layer)
