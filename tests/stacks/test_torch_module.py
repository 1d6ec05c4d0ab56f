"""Torch modules that nobody wrote for refllm: recorded by a map of names or by what their weights tell, right ones hold
and planted bugs are named; what does not fit is one sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import LLAMA, Bug, Checks, must_be_named, must_hold
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F
from torch_planting import IDS, returning, rounded_to_int8, setting, weight
from torch_ports import Nano, Scaled, Served, frequencies, nano, read, served

import refllm
from refllm import golden
from refllm.check import compare
from refllm.check.adapters import torch_names
from refllm.check.adapters.torch_guess import guess
from refllm.check.adapters.torch_names import Place, channels
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.storage.weights import Weights

CHECKS = Checks("torch_module", tuple(golden.checkpoints()), ("float32", "bfloat16"))
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


@pytest.mark.parametrize("dtype", CHECKS.dtypes)
@pytest.mark.parametrize("port", PORTS)
def test_right_ports_hold(port: str, dtype: str) -> None:
    (report,) = must_hold(CHECKS, LLAMA, dtype, PORTS[port], port=port, input_ids=IDS)
    assert len(report.taps) == 3 + 3 * 15
    assert report.notes[-1] == {"served": "names: Transformers' names", "nano": "names: found in its weights"}[port]


class Hidden(nn.Module):
    """A model of Transformers whose parts have other paths, and that nothing tells for one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.core = model

    def forward(self, idx: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
                use_cache: bool = False, inputs_embeds: Any = None) -> Any:  # fmt: skip
        return self.core(idx, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache)


def of_transformers(folder: Any, dtype: str, head: str = "CausalLM") -> Hidden:
    import transformers

    auto = getattr(transformers, f"AutoModelFor{head}")
    return Hidden(auto.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_every_family_is_found_in_its_weights(checkpoint: str, dtype: str) -> None:
    model = of_transformers(golden.path(checkpoint), dtype)
    (report,) = must_hold(CHECKS, checkpoint, dtype, model, port="parts of any name", input_ids=IDS)
    config: Any = report.config
    parallel = checkpoint == "stablelm-tiny-parallel"  # norms per head, and three terms that are added at once
    without = (
        "; not found: self_attn.q_layernorm, self_attn.k_layernorm, residual_mid; --names F.json tells where they are"
    )
    assert report.notes[-1] == f"names: found in its weights{without if parallel else ''}"
    of_a_layer = 13 if parallel else 14 if config.model_type == "arcee" else 15
    assert len(report.taps) == 3 + of_a_layer * config.num_hidden_layers


@pytest.mark.filterwarnings("ignore")
def test_what_a_forward_takes_by_name_it_is_given_and_a_cache_too() -> None:
    model = of_transformers(golden.path("helium-tiny"), "float32")
    reports = must_hold(
        CHECKS, "helium-tiny", "float32", model, port="all inputs", input_ids=[IDS[0][:14]], stress=True
    )
    assert len(reports) == 7
    assert not [note for note in reports[0].notes if note.startswith("not run")]


@pytest.mark.filterwarnings("ignore")
def test_a_head_is_shown_where_only_the_last_token_is_returned(tmp_path: Path) -> None:
    model = tiny_model("LlamaForSequenceClassification", vocab_size=640, pad_token_id=0)
    model.save_pretrained(tmp_path, dtype="float32")
    (report,) = compare(tmp_path, of_transformers(tmp_path, "float32", "SequenceClassification"), input_ids=IDS)
    assert (report.verdict, report.taps[-1].name) == ("holds", "score")


@pytest.mark.parametrize(("port", "bug", "dtype"), [
    pytest.param(port, *case.values, id=f"{port}-{case.id}")
    for port, bugs in (("served", SERVED), ("nano", NANO))
    for case in CHECKS.planted(bugs)
])  # fmt: skip
def test_planted_bugs_are_named(port: str, bug: Bug, dtype: str) -> None:
    model = PORTS[port](str(golden.path(bug.checkpoint)), dtype)
    bug.plant(model)
    must_be_named(CHECKS, bug, dtype, model, port=port, input_ids=IDS)


# -- what weights tell -------------------------------------------------------------------------------------------------


def guessed(change: Any, ones: tuple[str, ...] = ()) -> torch_names.Names:
    """What is found in a changed `Nano`. ones: tensors that are ones, in the module and in the checkpoint."""
    reference = refllm.load(golden.path(LLAMA))
    arrays = {name: np.ones_like(a) if name.endswith(ones) else a for name, a in reference.weights.items()}
    weights = Weights(reference.weights.shapes, arrays, tied=reference.weights.tied)
    model = nano(str(golden.path(LLAMA)))
    change(model)
    return guess(model, weights, reference.config, "causal_lm")


def test_rows_tell_the_order_of_channels_and_what_reads_a_value_tells_the_value() -> None:
    names = guessed(lambda model: None)
    q, k = (names.places[f"model.layers.2.self_attn.{letter}_proj"] for letter in "qk")
    assert q.path == k.path == "stack.2.mixer.look"
    assert q.channels is not None
    assert q.channels[:10].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3]  # pairs of neighbours, as halves
    assert names.places["model.layers.2.mlp.act"] == Place("stack.2.thinker.close", "input")
    assert names.places["model.layers.2"] == Place("stack.2")
    assert names.rotations == ("apply_rotation",)
    assert names.notes == []


def test_a_wrong_weight_in_one_layer_is_looked_at_where_the_others_are_and_said() -> None:
    names = guessed(_weight_of_layer_0)
    assert names.places["model.layers.1.mlp.up_proj"] == Place("stack.1.thinker.wide")
    assert names.notes == ["stack.1.thinker.wide: its weight is not mlp.up_proj of layer 1 in the checkpoint"]


def test_what_no_weight_tells_is_found_by_shape_or_name_or_left_out_and_said() -> None:
    def rounded(model: Nano) -> None:
        for cell in model.stack:
            weight("thinker.close", rounded_to_int8)(cell)

    names = guessed(rounded)
    assert names.places["model.layers.1.mlp.down_proj"] == Place("stack.1.thinker.close")
    said = "stack.{i}.thinker.close: its weight is not mlp.down_proj in the checkpoint; taken for it by its shape"
    assert names.notes == [said]

    def plain(model: Nano) -> None:
        for part in model.modules():
            if isinstance(part, Scaled):
                part.g.data.fill_(1)

    names = guessed(plain, ("layernorm.weight", "norm.weight"))
    assert names.places["model.layers.1.post_attention_layernorm"] == Place("stack.1.thinker.open", "input")
    assert names.places["model.norm"] == Place("settle")
    assert "model.layers.1.residual_mid" not in names.places
    assert names.notes == [
        "input_layernorm may be stack.{i}.quiet or stack.{i}.calm",
        "post_attention_layernorm may be stack.{i}.quiet or stack.{i}.calm",
    ]


# -- maps of one's own -------------------------------------------------------------------------------------------------

LAYER_I, CELL_I = "model.layers.{i}", "stack.{i}"


def map_file(folder: Path, **changes: Any) -> Path:
    """A map for `Nano` that has everything that its weights do not tell either: the order of fused q and k."""
    written = {"model.embed_tokens": "words", f"{LAYER_I}.mlp.act": f"input of {CELL_I}.thinker.close"} | changes
    (folder / "names.json").write_text(json.dumps(written))
    return folder / "names.json"


def test_a_map_counts_before_what_the_weights_tell_and_null_shows_nothing(tmp_path: Path) -> None:
    file = map_file(tmp_path, **{"model.norm": None, f"{LAYER_I}.mlp.gate_proj": f"{CELL_I}.thinker.wide"})
    (report,) = compare(golden.path(LLAMA), nano, input_ids=IDS, names=file)
    assert report.first_failure is not None
    assert report.first_failure.name == "model.layers.0.mlp.gate_proj"
    assert "model.norm" not in {tap.name for tap in report.taps}
    assert report.notes[-1] == f"names: {file}"


@pytest.mark.parametrize(("changes", "said"), [
    ({"model.layers.{i}.attn.q": "stack.{i}.mixer.look"},
     r"'model.layers.{i}.attn.q' is no name of a value of this model; did you mean 'model.layers.{i}.self_attn.q_"),
    ({"model.norm": "settled"}, r"model.norm: the module has no part 'settled'; there are 'settle'"),
    ({"model.layers.{i}": "stacks.{i}"}, r"model.layers.0: the module has no part 'stacks.0'; there are 'stack.0'"),
    ({"model.norm": "output of settle"}, r"'output of settle' is no place: expected PATH, 'input of PATH' or 'PATH, q"),
    ({"model.layers.{i}.self_attn.q_proj": "stack.{i}.mixer.look, q of q k"},
     r"stack.0.mixer.look, 'q of q k': the parts of a fused projection are q k v, in any order, or gate and up"),
    ({"rotation": "apply_rotary"}, r"rotation: the module has no part, and its files no function, 'apply_rotary'; the"),
])  # fmt: skip
def test_a_map_that_does_not_fit_is_one_sentence_with_what_is_near(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = map_file(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"^--names {file}: {said}"):
        compare(golden.path(LLAMA), nano, input_ids=IDS, names=file)


def test_a_file_that_is_no_map_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    for text, said in (("[]", "not a JSON object"), ("{", "not valid JSON")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            compare(golden.path(LLAMA), nano, names=file)
    with pytest.raises(InputError, match=r"other\.json"):
        compare(golden.path(LLAMA), nano, names=tmp_path / "other.json")


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("order", ["q k v", "k v q", "gate up"])
def test_the_parts_of_a_fused_projection_are_all_of_it_each_in_its_place(groups: bool, order: str) -> None:
    config = AutoConfig.from_pretrained(golden.path(LLAMA))
    parts = {part: channels(part, tuple(order.split()), groups, config) for part in order.split()}
    everything = torch.cat([torch.from_numpy(part) for part in parts.values()])
    assert sorted(everything.tolist()) == list(range(len(everything)))
    assert (parts[order[0] if order != "gate up" else "gate"][:1] == 0).all()
    if order == "q k v":  # 6 heads of queries, 3 of keys, 16 dims each
        assert parts["k"][:17].tolist() == ([*range(32, 48), 96] if groups else [*range(96, 113)])
    elif order == "gate up":
        assert parts["up"][:2].tolist() == ([1, 3] if groups else [192, 193])


# -- what is no candidate ----------------------------------------------------------------------------------------------


class Mute(nn.Module):
    """Has a parameter, and nothing else."""

    def __init__(self, returned: Any = None) -> None:
        super().__init__()
        self.weight, self.returned = nn.Parameter(torch.ones(3)), returned

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.returned


def test_what_is_no_candidate_is_one_sentence() -> None:
    folder = golden.path(LLAMA)
    bare, compiled = nn.Identity(), nano(str(folder))
    compiled._orig_mod = None  # as `torch.compile` has it
    for module, options, said in (
        (bare, {}, "Identity: its parameters are of none; expected a module in float32, bfloat16, float16"),
        (compiled, {}, "is compiled, and shows no values"),
        (
            nano(str(folder)),
            {"dtype": "bfloat16"},
            r"parameters are float32; hand over module.to\(torch.bfloat16\)",
        ),
    ):
        with pytest.raises(InputError, match=said):
            compare(folder, module, **options)


@pytest.mark.parametrize(("returned", "said"), [
    (None, "it returns nothing (None); expected a tensor of logits, [B, S, vocabulary]"),
    ("logits", "it returns a str; expected a tensor of logits, [B, S, vocabulary]"),
])  # fmt: skip
def test_a_module_that_returns_no_logits_is_a_finding(returned: Any, said: str) -> None:
    (report,) = compare(golden.path(LLAMA), Mute(returned), input_ids=IDS)
    assert report.misbehaviour is not None
    assert report.misbehaviour.text == said
    assert "not found: embed_tokens, input_layernorm, self_attn.q_proj" in report.notes[-1]
    assert report.notes[-1].endswith("; --names F.json tells where they are")
