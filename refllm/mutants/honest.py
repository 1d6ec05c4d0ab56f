"""One decoder in Torch that shares no code with the project, with a switch wherever stacks differ.

Every combination of the switches is right: they say where values are rounded, in which order sums are added, and how
the rotary tables are made. `Honest.in_dtype` is a candidate for `compare`; `plant` puts a mistake on top of it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Tensor = Any
Plant = Callable[[str, int, dict[str, Any]], None]
"""(operator, layer, its arguments): a mistake changes the arguments in place."""


@dataclass(frozen=True)
class Honest:
    """norm: "twice" rounds before the weight too. act: "twice" rounds the activation. rotation: "narrow" rounds tables
    and products. tables: "torch" (float32 angles), "exact", "exp2" or "products". attention: "eager", "float32",
    "scale in q", "scale rounded", "sdpa". stream: "narrow"; "float32" (shown rounded); "read unrounded" (the sum is
    shown rounded and normed as it was before); "together" (attention and MLP are added first). head: "float32" rounds
    no logits. sums: "chain" adds the float32 sums of norms and products one after another. splits: parts of the
    products with o_proj and down_proj, of whole multiples of tile. biased: a bias is added to the first of them. names:
    what is shown; None is everything. embeds_scale: what the embeddings are multiplied by before they are rounded.
    embeds: what to take instead, float32 [B, S, hidden_size]."""

    norm: str = "twice"
    act: str = "twice"
    rotation: str = "narrow"
    tables: str = "torch"
    attention: str = "eager"
    stream: str = "narrow"
    head: str = "narrow"
    sums: str = "blocks"
    splits: int = 1
    tile: int = 1
    biased: bool = False
    tf32: bool = False
    names: tuple[str, ...] | None = None
    embeds_scale: float = 1.0
    embeds: Any = None
    plant: Plant | None = None

    def in_dtype(self, dtype: str) -> Callable[..., Tensor]:
        """A candidate in that precision."""

        import torch

        def candidate(checkpoint: str, input_ids: Any, attention_mask: Any, position_ids: Any, tap: Any) -> Tensor:
            with torch.inference_mode():
                run = _Run(self, checkpoint, getattr(torch, dtype), tap)
                return run.forward(*(torch.from_numpy(np.array(a)) for a in (input_ids, attention_mask, position_ids)))

        return candidate

    def but(self, **changes: Any) -> "Honest":
        """The same with other switches."""
        return replace(self, **changes)


HF = Honest()
"""Rounded as in Transformers' eager code."""
FUSED = Honest(norm="once", act="once", rotation="float32", attention="float32")
"""Everything in float32 inside an operator."""


@lru_cache(maxsize=8)
def _loaded(checkpoint: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    folder = Path(checkpoint)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def chained(x: Tensor) -> Tensor:
    """Sum over the last axis, one after another, kept. float32."""
    import torch

    return x.cumsum(-1, dtype=torch.float32)[..., -1:] if x.dtype == torch.float32 else x.sum(-1, keepdim=True)


class _Run:
    def __init__(self, how: Honest, checkpoint: str, dtype: Any, tap: Any) -> None:
        self.how, self.dtype, self._tap = how, dtype, tap
        self.c, tensors = _loaded(str(checkpoint))
        self.w = {n.removeprefix("model."): t.to(dtype) for n, t in tensors.items()}
        c = self.c
        self.H, self.K = c["num_attention_heads"], c["num_key_value_heads"]
        self.D = c.get("head_dim") or c["hidden_size"] // self.H
        self.layer_norm = c["model_type"] == "stablelm"
        self.eps = c.get("layer_norm_eps" if self.layer_norm else "rms_norm_eps", 1e-5)
        self.R = int(
            self.D * (c.get("rope_parameters") or {}).get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
        )

    def show(self, name: str, value: Tensor) -> None:
        if self.how.names is None or any(name.endswith(n) for n in self.how.names):
            self._tap(name, value)

    def planted(self, operator: str, layer: int, **arguments: Any) -> dict[str, Any]:
        if self.how.plant is not None:
            self.how.plant(operator, layer, arguments)
        return arguments

    # -- operators

    def linear(self, name: str, layer: int, x: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        w, b = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        a = self.planted(name.rpartition(".")[2], layer, x=x, w=w, b=b)
        x, w, b = a["x"], a["w"], a["b"]
        if self.how.tf32 and self.dtype == torch.float32:
            x, w = (_tf32(t) for t in (x, w))
        if self.how.splits > 1 and name.endswith(("o_proj", "down_proj")):
            size = -(-x.shape[-1] // self.how.splits // self.how.tile) * self.how.tile
            parts = [F.linear(p, q) for p, q in zip(x.split(size, -1), w.split(size, -1), strict=True)]
            y = parts[0]
            if self.how.biased and b is not None:
                y, b = F.linear(x[..., :size], w[:, :size], b), None
            for part in parts[1:]:
                y = y + part
            return y if b is None else y + b
        if self.how.sums == "chain" and self.dtype == torch.float32:
            y = torch.zeros(*x.shape[:-1], len(w))
            for k in range(x.shape[-1]):
                y = torch.addcmul(y, x[..., k, None].expand_as(y), w[:, k].expand_as(y))
            return y if b is None else y + b
        return F.linear(x.float(), w.float(), None if b is None else b.float()).to(self.dtype)

    def mean(self, x: Tensor) -> Tensor:
        return chained(x) / x.shape[-1] if self.how.sums == "chain" else x.mean(-1, keepdim=True)

    def norm(self, name: str, layer: int, x: Tensor, weight: Tensor | None = None) -> Tensor:
        import torch

        w = self.w[f"{name}.weight"] if weight is None else weight
        b = self.w.get(f"{name}.bias") if weight is None else None
        a = self.planted(
            name.rpartition(".")[2], layer, x=x, w=w, b=b, eps=self.eps, mean=self.mean, narrow=lambda t: t
        )
        x32, w, b, eps = a["x"].float(), a["w"], a["b"], a["eps"]
        if self.layer_norm:
            x32 = x32 - a["mean"](x32)
        y = x32 * a["narrow"](torch.rsqrt(a["mean"](x32 * x32) + eps))
        if self.how.norm == "twice" and not self.layer_norm and self.c["model_type"] != "helium":
            return (w * y.to(self.dtype)).to(self.dtype)
        y = y * w.float()
        return (y if b is None else y + b.float()).to(self.dtype)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor, float]:
        import torch

        p = dict(self.c.get("rope_parameters") or {"rope_type": "default", "rope_theta": self.c.get("rope_theta", 1e4)})
        inv64, factor = _frequencies(p, self.R, self.c["max_position_embeddings"])
        if self.how.tables == "torch":
            config = _transformers_config(self.c)
            inv, factor = config
            angles = (positions[..., None].float() * inv.float()).float()
            return angles.cos() * factor, angles.sin() * factor, factor
        if self.how.tables == "exact":
            angles = positions[..., None].double() * inv64
            return (angles.cos() * factor).float(), (angles.sin() * factor).float(), factor
        steps = inv64.float()
        if self.how.tables == "exp2":
            steps = torch.exp2(torch.log2(inv64.float()))
        if self.how.tables == "products":
            ratio = (inv64[1:] / inv64[:-1]).float()
            steps = torch.cat([inv64[:1].float(), inv64[:1].float() * ratio.cumprod(0)])
        angles = (positions[..., None].float() * steps).float()
        return angles.cos() * factor, angles.sin() * factor, factor

    def rotate(self, letter: str, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        import torch

        a = self.planted(f"{letter}_rope", layer, x=x, cos=cos, sin=sin)
        x, cos, sin = a["x"], a["cos"][:, None], a["sin"][:, None]
        narrow = self.how.rotation == "narrow"
        t = (lambda v: v.to(self.dtype)) if narrow else (lambda v: v.float())
        rot, rest = t(x[..., : self.R]), x[..., self.R :]
        if self.c["model_type"] == "helium":
            u, v = rot[..., 0::2], rot[..., 1::2]
        else:
            u, v = rot.chunk(2, -1)
        cos, sin = t(cos), t(sin)
        one, two = u * cos + (-v) * sin, v * cos + u * sin
        y = torch.stack([one, two], -1).flatten(-2) if self.c["model_type"] == "helium" else torch.cat([one, two], -1)
        return torch.cat([y.to(self.dtype), rest], -1)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        scale = self.D**-0.5
        a = self.planted("attention", layer, q=q, k=k, v=v, scale=scale, mask=mask)
        q, k, v, scale, mask = (a[n] for n in ("q", "k", "v", "scale", "mask"))
        k, v = (t.repeat_interleave(self.H // self.K, 1) for t in (k, v))
        kind, dtype = self.how.attention, self.dtype
        if kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if kind == "eager":
            s = (q @ k.mT) * scale
            return F.softmax(s.float().masked_fill(~mask, -torch.inf), -1).to(dtype) @ v
        if kind == "scale in q":
            s = (q * scale).to(dtype).float() @ k.float().mT
        elif kind == "scale rounded":
            s = (q.float() @ k.float().mT) * torch.tensor(scale).to(dtype).float()
        else:
            s = (q.float() * scale) @ k.float().mT
        return (F.softmax(s.masked_fill(~mask, -torch.inf), -1) @ v.float()).to(dtype)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        at = f"layers.{layer}.mlp."
        up = self.linear(f"{at}up_proj", layer, x)
        if f"{at}gate_proj.weight" in self.w:
            gate = self.linear(f"{at}gate_proj", layer, x)
            self.show(f"model.{at}gate_proj", gate)
            self.show(f"model.{at}up_proj", up)
            a = self.planted("act", layer, gate=gate, up=up, kind=self.how.act)
            gate, up = a["gate"], a["up"]
            if a["kind"] == "twice":
                h = F.silu(gate.float()).to(self.dtype) * up
            else:
                h = (F.silu(gate.float()) * up.float()).to(self.dtype)
        else:
            self.show(f"model.{at}up_proj", up)
            h = F.relu(self.planted("act", layer, up=up)["up"]).square()
        self.show(f"model.{at}act", h)
        y = self.linear(f"{at}down_proj", layer, h)
        self.show(f"model.{at}down_proj", y)
        return y

    # -- the model

    def forward(self, ids: Tensor, mask_BS: Tensor, positions: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        S = ids.shape[1]
        mask = torch.ones(S, S, dtype=torch.bool).tril() & (mask_BS[:, None, None, :] != 0)
        mask = mask | torch.eye(S, dtype=torch.bool)
        x = F.embedding(ids, self.w["embed_tokens.weight"])
        if self.how.embeds is not None:
            x = torch.from_numpy(self.how.embeds).to(self.dtype)
        elif self.how.embeds_scale != 1:
            x = (x.float() * self.how.embeds_scale).to(self.dtype)
        else:
            self.show("model.embed_tokens", x)
        cos, sin, _ = self.tables(positions)
        for i in range(self.c["num_hidden_layers"]):
            x = self.block(i, x, cos, sin, mask)
        y = self.norm("norm", -1, x)
        self.show("model.norm", y)
        head = self.w.get("lm_head.weight", self.w["embed_tokens.weight"])
        a = self.planted("lm_head", -1, x=y, w=head)
        logits = F.linear(a["x"].float(), a["w"].float())
        return logits if self.how.head == "float32" else logits.to(self.dtype)

    def heads(self, x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, -1)).transpose(1, 2)

    def block(self, i: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        import torch

        at, how = f"layers.{i}.", self.how
        shown = lambda v: v.to(self.dtype)  # noqa: E731
        a = self.norm(f"{at}input_layernorm", i, x)
        self.show(f"model.{at}input_layernorm", a)
        q, k, v = (self.linear(f"{at}self_attn.{n}_proj", i, a) for n in "qkv")
        for n, t in zip("qkv", (q, k, v), strict=True):
            self.show(f"model.{at}self_attn.{n}_proj", t)
        q, k, v = self.heads(q, self.H), self.heads(k, self.K), self.heads(v, self.K)
        if self.c.get("qk_layernorm"):
            weights = [torch.stack([self.w[f"{at}self_attn.{n}_layernorm.norms.{j}.weight"] for j in range(m)])
                       for n, m in (("q", self.H), ("k", self.K))]  # fmt: skip
            q, k = (self.norm("", i, t, w[:, None]) for t, w in zip((q, k), weights, strict=True))
            self.show(f"model.{at}self_attn.q_layernorm", q)
            self.show(f"model.{at}self_attn.k_layernorm", k)
        q, k = self.rotate("q", i, q, cos, sin), self.rotate("k", i, k, cos, sin)
        self.show(f"model.{at}self_attn.q_rope", q)
        self.show(f"model.{at}self_attn.k_rope", k)
        o = self.attention(i, q, k, v, mask)
        self.show(f"model.{at}self_attn.context", o)
        o = self.linear(f"{at}self_attn.o_proj", i, o.transpose(1, 2).flatten(-2))
        self.show(f"model.{at}self_attn.o_proj", o)
        if self.c.get("use_parallel_residual"):
            m = self.mlp(i, a)
            if how.stream == "together":
                out = x + (o + m)
            elif how.stream == "float32":
                out = x.float() + o.float() + m.float()
            else:
                out = (x + o) + m
                self.show(f"model.{at}residual_mid", x + o)
            out = self.planted("output", i, y=out)["y"]
            self.show(f"model.{at[:-1]}", shown(out))
            return out
        mid = x.float() + o.float()
        self.show(f"model.{at}residual_mid", shown(mid))
        normed = mid if how.stream in ("float32", "read unrounded") else shown(mid)
        b = self.norm(f"{at}post_attention_layernorm", i, normed)
        self.show(f"model.{at}post_attention_layernorm", b)
        kept = mid if how.stream == "float32" else shown(mid)
        out = kept.float() + self.mlp(i, b).float()
        out = self.planted("output", i, y=out)["y"]
        self.show(f"model.{at[:-1]}", shown(out))
        return out if how.stream == "float32" else shown(out)


def _tf32(x: Tensor) -> Tensor:
    import torch

    bits = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return bits.view(torch.float32)


def _transformers_config(c: dict[str, Any]) -> tuple[Tensor, float]:
    import transformers

    config = transformers.AutoConfig.for_model(**c)
    modeling = __import__(f"transformers.models.{c['model_type']}.modeling_{c['model_type']}", fromlist=["x"])
    rotary = next(v for n, v in vars(modeling).items() if n.endswith("RotaryEmbedding"))(config)
    return rotary.inv_freq, rotary.attention_scaling


def _frequencies(p: dict[str, Any], R: int, longest: int) -> tuple[Tensor, float]:
    """The frequencies and the factor in float64, from the papers: default, llama3 and yarn."""
    import torch

    theta, kind = p.get("rope_theta", 1e4), p.get("rope_type", "default")
    f = torch.tensor([theta ** (-2 * i / R) for i in range(R // 2)], dtype=torch.float64)
    if kind == "llama3":
        L, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
        wave = 2 * math.pi / f
        t = (L / wave - low) / (high - low)
        between = (1 - t) * f / p["factor"] + t * f
        return torch.where(wave > L / low, f / p["factor"], torch.where(wave < L / high, f, between)), 1.0
    if kind == "yarn":
        L, s = p["original_max_position_embeddings"], p["factor"]

        def turn(n: float) -> float:
            return R * math.log(L / (n * 2 * math.pi)) / (2 * math.log(theta))

        lo, hi = (
            max(math.floor(turn(p.get("beta_fast") or 32)), 0),
            min(math.ceil(turn(p.get("beta_slow") or 1)), R - 1),
        )
        ramp = ((torch.arange(R // 2, dtype=torch.float64) - lo) / ((hi - lo) or 0.001)).clamp(0, 1)
        g = lambda m: 0.1 * m * math.log(s) + 1  # noqa: E731
        both = p.get("mscale") and p.get("mscale_all_dim")
        return f / s * ramp + f * (1 - ramp), g(p["mscale"]) / g(p["mscale_all_dim"]) if both else g(1)
    assert kind == "default", kind
    return f, 1.0
