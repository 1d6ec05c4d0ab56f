"""Torch modules that nobody wrote for refllm: recorded by a map of names or by what their weights tell, right ones hold
and planted bugs are named; what does not fit is one sentence."""

import pytest
import torch
from harness import LLAMA, Bug, Checks, must_be_named, must_hold
from torch.nn import functional as F
from torch_planting import IDS, returning, rounded_to_int8, setting, weight
from torch_ports import Nano, Served, frequencies, nano, read, served

from refllm import golden

CHECKS = Checks("torch_module", (LLAMA,), ("float32", "bfloat16"))
PORTS = {"served": served, "nano": nano}


def _unscaled(model: Served) -> None:
    c, _ = read(str(golden.path(LLAMA)))
    c["rope_parameters"]["rope_type"] = "default"
    model.model.layers[1].self_attn.rotary_emb.inverse = frequencies(c)


def _weight_of_layer_0(model: Nano) -> None:
    model.stack[1].thinker.wide.weight.data = model.stack[0].thinker.wide.weight.data.clone()


LAYER, CELL = "model.layers.1", "stack.1"
SERVED = (
    Bug("gate and up swapped", setting(f"{LAYER}.mlp", swapped=True), "layers.1.mlp.act"),
    Bug("k and v taken in the other order", setting(f"{LAYER}.self_attn", order="qvk"), "layers.1.self_attn.k_rope"),
    Bug("key/value heads tiled", setting(f"{LAYER}.self_attn", tiled=True), "layers.1.self_attn.context"),
    Bug("scale of hidden_size", setting(f"{LAYER}.self_attn", scale=96**-0.5), "layers.1.self_attn.context"),
    Bug("mask one too wide", setting(f"{LAYER}.self_attn", mask=1), "layers.1.self_attn.context"),
    Bug("positions from 1", setting(f"{LAYER}.self_attn.rotary_emb", shift=1), "layers.1.self_attn.q_rope"),
    Bug("frequencies not scaled", _unscaled, "layers.1.self_attn.q_rope"),
    Bug("eps times 10", setting(f"{LAYER}.input_layernorm", eps=1e-4), "layers.1.input_layernorm", dtype="float32"),
    Bug("gelu for silu", setting(f"{LAYER}.mlp", activation=F.gelu), "layers.1.mlp.act"),
    Bug("norm of other weights", weight(f"{LAYER}.post_attention_layernorm", torch.ones_like),
        "layers.1.post_attention_layernorm"),
    Bug("the stream halved", returning(f"{LAYER}.post_attention_layernorm", lambda out, *_: (out[0], out[1] / 2)),
        "layers.1.residual_mid"),
    Bug("o_proj by 1.02", weight(f"{LAYER}.self_attn.o_proj", lambda w: w * 1.02), "layers.1.self_attn.o_proj"),
    Bug("one row of the embedding", weight("model.embed_tokens", lambda w: w.roll(1, 0)), "model.embed_tokens"),
)  # fmt: skip
NANO = (
    Bug("keys not rotated", setting(f"{CELL}.mixer", keys_turned=False), "layers.1.self_attn.k_rope"),
    Bug("scale missing", setting(f"{CELL}.mixer", scale=1.0), "layers.1.self_attn.context"),
    Bug("one key hidden", setting(f"{CELL}.mixer", last_key_seen=False), "layers.1.self_attn.context"),
    Bug("relu for silu", setting(f"{CELL}.thinker", activation=F.relu), "layers.1.mlp.act"),
    Bug("the MLP beside attention", setting(CELL, parallel=True), "layers.1.residual_mid"),
    Bug("attention halved", setting(CELL, factor=0.5), "layers.1.residual_mid"),
    Bug("eps times 100", setting(f"{CELL}.quiet", eps=1e-3), "layers.1.input_layernorm", dtype="float32"),
    Bug("heads of q in another order", weight(f"{CELL}.mixer.look", lambda w: torch.cat((w[:96].roll(16, 0), w[96:]))),
        "layers.1.self_attn.q_proj"),
    Bug("the weight of layer 0", _weight_of_layer_0, "layers.1.mlp.up_proj"),
    Bug("int8 weight", weight(f"{CELL}.thinker.close", rounded_to_int8), "layers.1.mlp.down_proj"),
    Bug("the last norm left out", returning("settle", lambda out, x: x), "model.norm"),
    Bug("logits capped", returning("speak", lambda out, x: 30 * (out / 30).tanh()), "lm_head"),
)  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
@pytest.mark.parametrize("port", PORTS)
def test_right_modules_hold(port: str, checkpoint: str, dtype: str) -> None:
    (report,) = must_hold(CHECKS, checkpoint, dtype, PORTS[port], input_ids=IDS)
    assert len(report.taps) == 3 + 3 * 15
    assert report.notes[0] == {"served": "names: Transformers' names", "nano": "names: found in its weights"}[port]


@pytest.mark.parametrize(("port", "bug", "dtype"), [
    pytest.param(port, *case.values, id=f"{port}-{case.id}")
    for port, bugs in (("served", SERVED), ("nano", NANO))
    for case in CHECKS.planted(bugs)
])  # fmt: skip
def test_planted_bugs_are_named(port: str, bug: Bug, dtype: str) -> None:
    model = PORTS[port](str(golden.path(bug.checkpoint)), dtype)
    bug.plant(model)
    must_be_named(CHECKS, bug, dtype, model, input_ids=IDS)
