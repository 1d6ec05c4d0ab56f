"""Two ports of Llama to Torch as people write them, in one file each with no code of refllm in it.

`Served` is laid out as serving engines are: flattened tokens, fused projections, residual streams that are added in the
next norm. `Nano` is a small one with names of its own: interleaved pairs on permuted rows, queries and keys in one
table, strange words. `plant(model, name)` puts a bug in layer 1.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


def read(folder: str) -> tuple[Any, dict[str, torch.Tensor]]:
    return json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")


def frequencies(c: Any) -> torch.Tensor:
    """[D/2] float32, with the scaling of Llama 3."""
    D, rope = c["head_dim"], c["rope_parameters"]
    inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, D, 2).float() / D)
    if rope["rope_type"] == "default":
        return inverse
    old, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    waves = 2 * math.pi / inverse
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    return inverse / rope["factor"] * (1 - smooth) + inverse * smooth


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


# ---------------------------------------------------------------------------------------------------- serving engines


class AddingNorm(nn.Module):
    """Adds the hidden state to the residual stream, and returns the norm of the sum, and the sum."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        residual = x if residual is None else x + residual
        return norm(residual, self.weight, self.eps), residual


class Linear(nn.Linear):
    """Returns its result and a bias that it did not add: none."""

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), None


class Rotary(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.D, self.shift = c["head_dim"], 0
        self.inverse = frequencies(c)  # no buffer, which `module.to(torch.bfloat16)` would round

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        angles = (positions + self.shift)[:, None].float() * self.inverse
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turned(x: torch.Tensor) -> torch.Tensor:
            heads = x.view(len(x), -1, self.D)
            a, b = heads.float().chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(1).to(x.dtype)

        return turned(q), turned(k)


class ServedAttention(nn.Module):
    def __init__(self, c: Any, rotary: Rotary) -> None:
        super().__init__()
        self.H, self.K, self.D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.qkv_proj = Linear(c["hidden_size"], (self.H + 2 * self.K) * self.D, bias=False)
        self.o_proj = Linear(self.H * self.D, c["hidden_size"], bias=False)
        self.rotary_emb, self.scale, self.mask = rotary, self.D**-0.5, 0
        self.order, self.tiled = "qkv", False

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        widths = [heads * self.D for heads in (self.H, self.K, self.K)]
        parts = dict(zip(self.order, self.qkv_proj(x)[0].split(widths, -1), strict=True))
        q, k, v = (parts[name] for name in "qkv")
        q, k = self.rotary_emb(positions, q, k)
        q, k, v = (y.view(len(y), -1, self.D).transpose(0, 1) for y in (q, k, v))
        many = self.H // self.K
        k, v = (y.repeat(many, 1, 1) if self.tiled else y.repeat_interleave(many, 0) for y in (k, v))
        scores = (q @ k.transpose(1, 2)).float() * self.scale
        seen = torch.ones_like(scores, dtype=torch.bool).tril(self.mask)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
        return self.o_proj((weights @ v).transpose(0, 1).flatten(1))[0]


class ServedMLP(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.gate_up_proj = Linear(c["hidden_size"], 2 * c["intermediate_size"], bias=False)
        self.down_proj = Linear(c["intermediate_size"], c["hidden_size"], bias=False)
        self.activation, self.swapped = F.silu, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        gate, up = (up, gate) if self.swapped else (gate, up)
        return self.down_proj(self.activation(gate) * up)[0]


class ServedLayer(nn.Module):
    def __init__(self, c: Any, rotary: Rotary) -> None:
        super().__init__()
        self.self_attn, self.mlp = ServedAttention(c, rotary), ServedMLP(c)
        self.input_layernorm = AddingNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = AddingNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x), residual)
        return self.mlp(x), residual


class ServedModel(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(ServedLayer(c, Rotary(c)) for _ in range(c["num_hidden_layers"]))
        self.norm = AddingNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]


class Served(nn.Module):
    """input_ids, positions [tokens] -> logits [tokens, padded vocabulary]."""

    def __init__(self, c: Any, padding: int = 64) -> None:
        super().__init__()
        self.model = ServedModel(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"] + padding, bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(input_ids, positions))


def served(checkpoint: str, dtype: str = "float32") -> Served:
    c, tensors = read(checkpoint)
    fused: dict[str, torch.Tensor] = {}
    for name in tensors:
        for parts, whole in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
            if parts[0] in name:
                fused[name.replace(parts[0], whole)] = torch.cat([tensors[name.replace(parts[0], p)] for p in parts])
    kept = {n: t for n, t in tensors.items() if not any(f"{p}_proj" in n for p in ("q", "k", "v", "gate", "up"))}
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    model = Served(c)
    padding = torch.zeros(len(model.lm_head.weight) - len(head), head.shape[1], dtype=head.dtype)
    model.load_state_dict(kept | fused | {"lm_head.weight": torch.cat((head, padding))})
    return model.to(getattr(torch, dtype))


# --------------------------------------------------------------------------------------------------- names of one's own


def apply_rotation(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours [B, S, heads, D], as complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[None, :, None]).flatten(3).type_as(x)


class Scaled(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.g, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm(x, self.g, self.eps)


class Mixer(nn.Module):
    """Queries and keys in one table, values apart."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.H, self.K, self.D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.look = nn.Linear(c["hidden_size"], (self.H + self.K) * self.D, bias=False)
        self.carry = nn.Linear(c["hidden_size"], self.K * self.D, bias=False)
        self.merge = nn.Linear(self.H * self.D, c["hidden_size"], bias=False)
        self.scale, self.keys_turned, self.last_key_seen = self.D**-0.5, True, True

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        B, S, _ = x.shape
        look = self.look(x).view(B, S, self.H + self.K, self.D)
        q, k = look[:, :, : self.H], look[:, :, self.H :]
        v = self.carry(x).view(B, S, self.K, self.D)
        q, k = apply_rotation(q, turn), apply_rotation(k, turn if self.keys_turned else torch.ones_like(turn))
        k, v = (y.repeat_interleave(self.H // self.K, 2).transpose(1, 2) for y in (k, v))
        seen = torch.ones(S, S, dtype=torch.bool).tril()
        if not self.last_key_seen:
            seen[5:, 2] = False
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, scale=self.scale)
        return self.merge(y.transpose(1, 2).reshape(B, S, -1))


class Thinker(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.open = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.wide = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.close = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)
        self.activation = F.silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.close(self.activation(self.open(x)) * self.wide(x))


class Cell(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.quiet, self.calm = (Scaled(c["hidden_size"], c["rms_norm_eps"]) for _ in range(2))
        self.mixer, self.thinker = Mixer(c), Thinker(c)
        self.factor, self.parallel = 1.0, False

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        y = x + self.mixer(self.quiet(x), turn) * self.factor
        return y + self.thinker(self.calm(x if self.parallel else y))


class Nano(nn.Module):
    """idx, targets -> (logits, loss). All logits come with targets only, the last ones without."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.stack = nn.ModuleList(Cell(c) for _ in range(c["num_hidden_layers"]))
        self.settle = Scaled(c["hidden_size"], c["rms_norm_eps"])
        self.speak = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.inverse = frequencies(c)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        x = self.words(idx)
        angles = torch.arange(idx.shape[1])[:, None] * self.inverse
        turn = torch.polar(torch.ones_like(angles), angles)
        for cell in self.stack:
            x = cell(x, turn)
        x = self.settle(x)
        if targets is None:
            return self.speak(x[:, [-1]]), None
        logits = self.speak(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def nano(checkpoint: str, dtype: str = "float32") -> Nano:
    c, tensors = read(checkpoint)
    D = c["head_dim"]

    def neighbours(table: torch.Tensor) -> torch.Tensor:
        """The rows of every head with i and i + D/2 side by side."""
        return table.view(-1, 2, D // 2, table.shape[1]).transpose(1, 2).reshape(table.shape)

    words = {"self_attn.v_proj": "mixer.carry", "self_attn.o_proj": "mixer.merge", "mlp.gate_proj": "thinker.open"}
    words |= {"mlp.up_proj": "thinker.wide", "mlp.down_proj": "thinker.close"}
    norms = {"input_layernorm": "quiet", "post_attention_layernorm": "calm"}
    found = {"words.weight": tensors["model.embed_tokens.weight"], "settle.g": tensors["model.norm.weight"]}
    found["speak.weight"] = tensors.get("lm_head.weight", found["words.weight"])
    for i in range(c["num_hidden_layers"]):
        layer, cell = f"model.layers.{i}.", f"stack.{i}."
        found |= {f"{cell}{mine}.weight": tensors[f"{layer}{theirs}.weight"] for theirs, mine in words.items()}
        found |= {f"{cell}{mine}.g": tensors[f"{layer}{theirs}.weight"] for theirs, mine in norms.items()}
        look = [neighbours(tensors[f"{layer}self_attn.{name}_proj.weight"]) for name in "qk"]
        found[f"{cell}mixer.look.weight"] = torch.cat(look)
    model = Nano(c)
    model.load_state_dict(found)
    return model.to(getattr(torch, dtype))
