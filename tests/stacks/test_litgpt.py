"""litgpt: its GPT with the weights of a checkpoint, by its own converter. Run by `make test-stacks STACK=litgpt`."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litgpt.model
import pytest
import torch
from harness import LLAMA, Bug, Checks, must_be_named, must_hold
from tiny import tiny_model
from torch.nn import functional as F
from torch_planting import IDS, returning, rounded_to_int8, setting, weight

from refllm import golden
from refllm.check import compare
from refllm.check.adapters.litgpt import open_candidate
from refllm.check.stacks import Opening
from refllm.errors import InputError

STABLELM = "stablelm-tiny-sequential"
CHECKS = Checks("litgpt", (LLAMA, STABLELM), ("float32", "bfloat16", "float16"))
BLOCK = "transformer.h.1"
Attend = Callable[..., torch.Tensor]


def gpt(checkpoint: str, dtype: str) -> litgpt.model.GPT:
    return open_candidate(Opening("litgpt", Path(golden.path(checkpoint)), dtype=dtype)).module


def own_config(part: str, **values: Any) -> Callable[[Any], None]:
    """A config of its own for a part, which shares that of the model."""

    def plant(model: Any) -> None:
        of = model.get_submodule(part)
        of.config = copy.copy(of.config)
        vars(of.config).update(values)

    return plant


def attending(change: Callable[[Attend, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """change(attention, q, k, v [B, H, S, D]) -> [B, S, H, D], in layer 1."""

    def plant(model: Any) -> None:
        attn = model.transformer.h[1].attn
        original = attn.scaled_dot_product_attention
        attn.scaled_dot_product_attention = lambda q, k, v, mask=None: change(original, q, k, v)

    return plant


def _tiled(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k[:, ::2].repeat(1, 2, 1, 1), v[:, ::2].repeat(1, 2, 1, 1))


def _everything_seen(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _rotary(**changes: Any) -> Any:
    """Tables of another config, in all layers."""

    def plant(model: Any) -> None:
        model.config = copy.copy(model.config)
        vars(model.config).update(changes)
        model.cos, model.sin = model.rope_cache()

    return plant


def _positions_from_1(model: Any) -> None:
    model.cos, model.sin = model.cos.roll(-1, 0), model.sin.roll(-1, 0)


def _swapped(model: Any) -> None:
    mlp = model.transformer.h[1].mlp
    mlp.fc_1, mlp.fc_2 = mlp.fc_2, mlp.fc_1


def _without_bias(model: Any) -> None:
    model.transformer.h[1].norm_1.bias.data.zero_()


def _gelu(model: Any) -> None:
    mlp = model.transformer.h[1].mlp
    mlp.forward = lambda x: mlp.proj(F.gelu(mlp.fc_1(x)) * mlp.fc_2(x))


BUGS = (
    Bug("gate and up swapped", _swapped, "layers.1.mlp.gate_proj"),
    Bug("gelu for silu", _gelu, "layers.1.mlp.act"),
    Bug("scale of hidden_size", own_config(f"{BLOCK}.attn", attention_scores_scalar=96), "layers.1.self_attn.context"),
    Bug("key/value heads tiled", attending(_tiled), "layers.1.self_attn.context"),
    Bug("no mask", attending(_everything_seen), "layers.1.self_attn.context"),
    Bug("positions from 1", _positions_from_1, "layers.0.self_attn.q_rope"),
    Bug("base times 10", _rotary(rope_base=100000), "layers.0.self_attn.q_rope"),
    Bug("frequencies not scaled", _rotary(rope_adjustments=None), "layers.0.self_attn.q_rope"),
    Bug("eps times 10", setting(f"{BLOCK}.norm_1", eps=1e-4), "layers.1.input_layernorm", dtype="float32"),
    Bug("norm plus 1", setting(f"{BLOCK}.norm_2", add_unit_offset=True), "layers.1.post_attention_layernorm"),
    Bug("the MLP beside attention", own_config(BLOCK, parallel_residual=True), "layers.1.residual_mid"),
    Bug("heads of q in another order", weight(f"{BLOCK}.attn.qkv", lambda w: torch.cat((w[:96].roll(16, 0), w[96:]))),
        "layers.1.self_attn.q_proj"),
    Bug("k and v in the other order", weight(f"{BLOCK}.attn.qkv", lambda w: torch.cat((w[:96], w[144:], w[96:144]))),
        "layers.1.self_attn.k_proj"),
    Bug("int8 weight", weight(f"{BLOCK}.attn.proj", rounded_to_int8), "layers.1.self_attn.o_proj"),
    Bug("an unscaled attention output", returning(f"{BLOCK}.attn", lambda y, *_: y * 0.5), "layers.1.residual_mid"),
    Bug("partial rotation of all dims", _rotary(rope_condense_ratio=2), "layers.0.self_attn.q_rope", STABLELM),
    Bug("no bias in a norm", _without_bias, "layers.1.input_layernorm", STABLELM),
    Bug("head of other rows", weight("lm_head", lambda w: w.roll(1, 0)), "lm_head"),
)  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(checkpoint: str, dtype: str) -> None:
    (report,) = must_hold(CHECKS, checkpoint, dtype, "litgpt", isolate=False, input_ids=IDS)
    assert len(report.taps) == 3 + 15 * report.config.num_hidden_layers  # type: ignore[union-attr]
    assert report.notes[0] == "names: litgpt's names"


def test_a_parallel_residual_holds(tmp_path: Path) -> None:
    options = {"qk_layernorm": False, "use_parallel_residual": True, "use_qkv_bias": False}
    tiny_model("StableLmForCausalLM", vocab_size=640, **options).save_pretrained(tmp_path, dtype="float32")
    assert [report.verdict for report in compare(tmp_path, "litgpt", isolate=False, input_ids=IDS)] == ["holds"]


@pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
def test_planted_bugs_are_named(bug: Bug, dtype: str) -> None:
    model = gpt(bug.checkpoint, dtype)
    bug.plant(model)
    must_be_named(CHECKS, bug, dtype, model, input_ids=IDS)


@pytest.mark.parametrize(("checkpoint", "said"), [
    ("helium-tiny", "has no model_type helium: it has llama and stablelm"),
    ("arcee-tiny", "has no model_type arcee"),
    ("stablelm-tiny-parallel", "has no qk_layernorm: its norm has one weight for all heads"),
])  # fmt: skip
def test_what_litgpt_has_not_is_one_sentence(checkpoint: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^--candidate litgpt {said}"):
        compare(golden.path(checkpoint), "litgpt", isolate=False)


def test_a_tensor_that_its_converter_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM", vocab_size=640).save_pretrained(tmp_path, dtype="float32")
    with pytest.raises(InputError, match=r"has no model.layers.{}.*bias: its converter does not know it"):
        compare(tmp_path, "litgpt", isolate=False)
