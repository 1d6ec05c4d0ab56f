"""A hand-written Arcee model over ranks, a program of torch.distributed (gloo): what such programs do, and get wrong.

    torchrun --nproc-per-node 2 parallel_arcee.py CHECKPOINT INPUTS OUT VARIANT...

Tensor parallel: heads, channels and vocabulary are cut; context parallel: the sequence is, and attention is merged by
its log-sum-exp. INPUTS: .npz of ids [B, S], cos and sin [S, R/2]. A VARIANT is "DIMENSION/DTYPE/BUG": tp or cp, a name
of torch's, and "right" or one of the bugs below. Each writes a folder of traces, OUT/DIMENSION-DTYPE-BUG.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from refllm.check.rank_trace import RankTrace

TENSOR_BUGS = (
    "right",
    "float32 sums",
    "o_proj's bias on every rank",
    "down_proj's bias on every rank",
    "down_proj's sum is not used",
    "down_proj's part of rank 1 is missing",
    "o_proj's part of rank 1 is missing in one row",
    "down_proj added twice",
    "rank 1 loads the first piece of up_proj",
    "rank 1 loads the first piece of q_proj",
    "rank 1 loads the first piece of down_proj",
    "keys of rank 1 are those of rank 0",
    "values of the first head for all on rank 1",
    "scores scaled by local width",
    "embedding of other ranks is not zeroed",
    "embedding of rank 1 shifted by one",
    "logits in another order",
    "rank 1 has a bias of its own shard twice",
    "rank 1 has an older norm",
    "rank 1 drops out",
    "rank 1 rotates from position one",
    "rank 1 skips the squared activation",
)
CONTEXT_BUGS = (
    "right",
    "lse in base two",
    "parts of equal weight",
    "local positions",
    "later keys are seen",
    "blocks merged in bfloat16",
    "first keys only",
    "mask of the local piece",
    "last piece one token short",
)
MERGED_IN_NARROW = "blocks merged in bfloat16"


class Parallel:
    """One rank of the model. bug: which of the above; all of them in layer 1 where they are in a layer."""

    def __init__(self, folder: Path, inputs: dict, dtype: torch.dtype, mesh, bug: str) -> None:
        self.c = json.loads((folder / "config.json").read_text())
        self.w = {n: x.to(dtype) for f in folder.glob("*.safetensors") for n, x in load_file(f).items()}
        self.ids = torch.from_numpy(inputs["ids"])
        self.tables = [torch.from_numpy(inputs[name]).to(dtype) for name in ("cos", "sin")]
        self.dtype, self.bug, self.rank, self.n = dtype, bug, mesh.get_local_rank(), mesh.size()
        self.trace = RankTrace.of(mesh, source="parallel_arcee", dtype=str(dtype).removeprefix("torch."))

    def has(self, bug: str) -> bool:
        return self.bug == bug

    def on_one(self, bug: str) -> bool:
        return self.bug == bug and self.rank == 1

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.w[f"{name}.weight"]
        if self.on_one("rank 1 has an older norm") and name.endswith("1.input_layernorm"):
            weight = weight * 1.125
        f = x.float()
        f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"])
        return weight * f.to(x.dtype)

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attended(self, q, k, v, visible) -> tuple[torch.Tensor, torch.Tensor]:
        """Context and log-sum-exp of float32 scores."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        width = q.shape[-1] * (self.n if self.has("scores scaled by local width") else 1)
        scores = (q.float() @ k.float().transpose(-1, -2) * width**-0.5).masked_fill(~visible, float("-inf"))
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
        return p @ v.float(), lse

    def save(self, folder: Path) -> None:
        self.trace.save(folder, self.ids)


class TensorParallel(Parallel):
    """Heads, channels of the MLP and the vocabulary are cut over the ranks."""

    def piece(self, name: str, axis: int) -> torch.Tensor:
        first = self.on_one(f"rank 1 loads the first piece of {name.split('.')[-2]}") and ".1." in name
        return self.w[name].chunk(self.n, dim=axis)[0 if first else self.rank]

    def column(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.piece(f"{name}.weight", 0), self.piece(f"{name}.bias", 0))

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in the format of the model (whose order gloo chooses), or in float32."""
        total = part.float() if self.has("float32 sums") else part.clone()
        dist.all_reduce(total)
        return total.to(self.dtype)

    def row(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias, last = self.piece(f"{name}.weight", 1), self.w[f"{name}.bias"], name.rpartition(".")[2]
        part = x.float() @ weight.float().T
        here = ".1." in name
        if here and self.has(f"{last}'s bias on every rank"):
            part = part + bias.float()
        if here and self.on_one(f"{last}'s part of rank 1 is missing"):
            part = torch.zeros_like(part)
        if here and self.on_one(f"{last}'s part of rank 1 is missing in one row"):
            part[0, 5] = 0
        if not self.has("float32 sums"):
            part = part.to(self.dtype)
        if here and self.has(f"{last}'s sum is not used"):
            self.summed(part)
            return part.to(self.dtype) + bias
        if here and self.has(f"{last} added twice"):
            return self.summed(self.summed(part) / 1) + bias
        y = self.summed(part)
        return y if here and self.has(f"{last}'s bias on every rank") else y + bias

    def embedded(self) -> torch.Tensor:
        table = self.w["model.embed_tokens.weight"].chunk(self.n)[self.rank]
        begin = len(table) * self.rank + self.on_one("embedding of rank 1 shifted by one")
        local = self.ids - begin
        mine = (local >= 0) & (local < len(table))
        rows = table[local.clamp(0, len(table) - 1)]
        if not self.has("embedding of other ranks is not zeroed"):
            rows = rows * mine[..., None]
        dist.all_reduce(rows)
        return rows

    def run(self) -> "TensorParallel":
        tap, (cos, sin) = self.trace.tap, self.tables
        if self.on_one("rank 1 rotates from position one"):
            cos, sin = (torch.cat([t[1:], t[-1:]]) for t in (cos, sin))
        x, (B, S), D = self.embedded(), self.ids.shape, self.c["head_dim"]
        tap("model.embed_tokens", x)
        visible = torch.ones(S, S, dtype=torch.bool).tril()
        for i in range(self.c["num_hidden_layers"]):
            layer, here = f"model.layers.{i}", i == 1
            a = self.norm(x, f"{layer}.input_layernorm")
            tap(f"{layer}.input_layernorm", a)
            q, k, v = (self.column(a, f"{layer}.self_attn.{n}_proj") for n in "qkv")
            if here and self.has("keys of rank 1 are those of rank 0"):
                dist.broadcast(k, 0)
            if here and self.on_one("rank 1 has a bias of its own shard twice"):
                q = q + self.piece(f"{layer}.self_attn.q_proj.bias", 0)
            for n, y in zip("qkv", (q, k, v), strict=True):
                tap(f"{layer}.self_attn.{n}_proj", y, tp="Shard(-1)")
            q, k, v = (y.view(B, S, -1, D).transpose(1, 2) for y in (q, k, v))
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            tap(f"{layer}.self_attn.q_rope", q, tp="Shard(1)")
            tap(f"{layer}.self_attn.k_rope", k, tp="Shard(1)")
            o = self.attended(q, k, v, visible)[0].to(self.dtype)
            if here and self.on_one("values of the first head for all on rank 1"):
                o = o[:, :1].expand_as(o)
            tap(f"{layer}.self_attn.context", o, tp="Shard(1)")
            y = self.row(o.transpose(1, 2).reshape(B, S, -1), f"{layer}.self_attn.o_proj")
            tap(f"{layer}.self_attn.o_proj", y)
            x = x + y
            tap(f"{layer}.residual_mid", x)
            b = self.norm(x, f"{layer}.post_attention_layernorm")
            tap(f"{layer}.post_attention_layernorm", b)
            u = self.column(b, f"{layer}.mlp.up_proj")
            tap(f"{layer}.mlp.up_proj", u, tp="Shard(-1)")
            h = torch.relu(u) if here and self.on_one("rank 1 skips the squared activation") else torch.relu(u).square()
            tap(f"{layer}.mlp.act", h, tp="Shard(-1)")
            y = self.row(h, f"{layer}.mlp.down_proj")
            if here and self.on_one("rank 1 drops out"):
                y = y * (torch.arange(y.shape[-1]) % 10 != 3)
            tap(f"{layer}.mlp.down_proj", y)
            x = x + y
            tap(layer, x)
        x = self.norm(x, "model.norm")
        tap("model.norm", x)
        piece = self.w["lm_head.weight"].chunk(self.n)[self.rank]
        if self.has("logits in another order"):
            piece = self.w["lm_head.weight"].chunk(self.n)[self.n - 1 - self.rank]
        tap("lm_head", torch.nn.functional.linear(x, piece), tp="Shard(-1)")
        return self


class ContextParallel(Parallel):
    """The sequence is cut over the ranks; keys and values go round, and the parts are merged by their log-sum-exp."""

    def merged(self, q, k, v, begin: int) -> torch.Tensor:
        each = [[torch.empty_like(x) for _ in range(self.n)] for x in (k, v)]
        for out, x in zip(each, (k, v), strict=True):
            dist.all_gather(out, x.contiguous())
        S, parts, at = q.shape[2], [], torch.arange(q.shape[2]) + begin
        for r in range(self.n):
            keys = torch.arange(S) + r * S
            visible = keys <= at[:, None]
            if self.has("later keys are seen") and r == self.n - 1:
                visible = torch.ones_like(visible)
            if self.has("mask of the local piece"):
                visible = torch.ones(S, S, dtype=torch.bool).tril() if r <= self.rank else torch.zeros_like(visible)
            if self.has("first keys only") and r > 0:
                visible = torch.zeros_like(visible)
            o, lse = self.attended(q, each[0][r], each[1][r], visible)
            if self.has(MERGED_IN_NARROW):
                o, lse = o.bfloat16().float(), lse.bfloat16().float()
            if self.has("last piece one token short") and r == self.n - 1:
                o = torch.cat([o[:, :, :-1], torch.zeros_like(o[:, :, -1:])], dim=2)
            parts.append((o, lse))
        o, lse = (torch.stack(x) for x in zip(*parts, strict=True))
        base = 2.0 if self.has("lse in base two") else torch.e
        weights = torch.softmax(lse * float(np.log(base)), dim=0)
        if self.has("parts of equal weight"):
            seen = (~lse.isinf()).float()
            weights = seen / seen.sum(0)
        return (o * weights[..., None]).sum(0)

    def run(self) -> "ContextParallel":
        def tap(name: str, x: torch.Tensor) -> None:
            self.trace.tap(name, x, cp=f"Shard({1 if x.ndim == 3 else 2})")

        B, S = self.ids.shape
        length, D = S // self.n, self.c["head_dim"]
        begin = 0 if self.has("local positions") else self.rank * length
        cos, sin = (t[begin : begin + length] for t in self.tables)
        self.ids = self.ids[:, self.rank * length : (self.rank + 1) * length]
        x = self.w["model.embed_tokens.weight"][self.ids]
        tap("model.embed_tokens", x)
        linear = torch.nn.functional.linear
        for i in range(self.c["num_hidden_layers"]):
            layer = f"model.layers.{i}"

            def product(a: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
                y = linear(a, self.w[f"{layer}.{name}.weight"], self.w[f"{layer}.{name}.bias"])
                tap(f"{layer}.{name}", y)
                return y

            a = self.norm(x, f"{layer}.input_layernorm")
            tap(f"{layer}.input_layernorm", a)
            q, k, v = (product(a, f"self_attn.{n}_proj").view(B, length, -1, D).transpose(1, 2) for n in "qkv")
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            tap(f"{layer}.self_attn.q_rope", q)
            tap(f"{layer}.self_attn.k_rope", k)
            o = self.merged(q, k, v, self.rank * length).to(self.dtype)
            tap(f"{layer}.self_attn.context", o)
            x = x + product(o.transpose(1, 2).reshape(B, length, -1), "self_attn.o_proj")
            tap(f"{layer}.residual_mid", x)
            b = self.norm(x, f"{layer}.post_attention_layernorm")
            tap(f"{layer}.post_attention_layernorm", b)
            h = torch.relu(product(b, "mlp.up_proj")).square()
            tap(f"{layer}.mlp.act", h)
            x = x + product(h, "mlp.down_proj")
            tap(layer, x)
        x = self.norm(x, "model.norm")
        tap("model.norm", x)
        tap("lm_head", linear(x, self.w["lm_head.weight"]))
        return self

    def save(self, folder: Path) -> None:
        self.trace.save(folder, self.ids, cp="Shard(1)")


def main() -> None:
    checkpoint, inputs, out, *variants = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    given = dict(np.load(inputs))
    for variant in variants:
        dimension, dtype, bug = variant.split("/")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(dimension,))
        kind = {"tp": TensorParallel, "cp": ContextParallel}[dimension]
        with torch.no_grad():
            model = kind(Path(checkpoint), given, getattr(torch, dtype), mesh, bug).run()
        model.save(Path(out) / variant.replace("/", "-"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
