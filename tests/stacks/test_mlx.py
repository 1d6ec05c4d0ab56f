"""mlx-lm against the pages: its own models of the families that it has, and bugs planted in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from harness import Bug, Checks, must_be_named, must_hold
from mlx_lm import utils
from mlx_lm.models import llama, stablelm
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention as attention

from refllm import golden
from refllm.check import compare
from refllm.check.candidates import record
from refllm.check.inputs import Inputs, stressed
from refllm.check.misbehaviour import MisbehavesError, floats
from refllm.check.oracle import judge
from refllm.check.run import load
from refllm.check.stacks import Opening, wrap
from refllm.errors import InputError

HELIUM, LLAMA, PARALLEL, SEQUENTIAL = "helium-tiny", "llama-tiny", "stablelm-tiny-parallel", "stablelm-tiny-sequential"
CHECKS = Checks("mlx", (HELIUM, LLAMA, PARALLEL, SEQUENTIAL), ("float32", "bfloat16", "float16"))
IDS = np.random.default_rng(0).integers(0, 600, size=48)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint -> a folder of it whose rotary settings have the older keys, the only ones that mlx-lm reads."""
    root = tmp_path_factory.mktemp("older")

    def folder(checkpoint: str) -> Path:
        made = root / checkpoint
        if not made.exists():
            shutil.copytree(golden.path(checkpoint), made)
            config = json.loads((made / "config.json").read_text())
            rope = config.pop("rope_parameters")
            config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
            config |= {} if rope["rope_type"] == "default" else {"rope_scaling": rope}
            (made / "config.json").write_text(json.dumps(config))
        return made

    return folder


@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(checkpoint: str, dtype: str, older: Callable[[str], Path]) -> None:
    must_hold(CHECKS, checkpoint, dtype, "mlx", folder=older(checkpoint), input_ids=IDS, isolate=False)


# ---------------------------------------------------------------------------------------------------------------- bugs

Patch = pytest.MonkeyPatch


def in_layer(change: Callable[[Any], Any]) -> Callable[[Any, Patch], None]:
    """A bug of layer 1 alone: what the function does to it."""

    def plant(model: Any, patch: Patch) -> None:
        change(model.layers[1])

    return plant


def as_activation(function: Callable[[Any, Any], Any]) -> Callable[[Any, Patch], None]:
    """A bug of every MLP of Llama."""

    def plant(model: Any, patch: Patch) -> None:
        patch.setattr(llama, "swiglu", function)

    return plant


def as_attention(function: Callable[..., Any]) -> Callable[[Any, Patch], None]:
    """A bug of every attention of Llama: a function of queries, keys, values, scale and mask."""

    def plant(model: Any, patch: Patch) -> None:
        def planted(q: Any, k: Any, v: Any, *, cache: Any, scale: float, mask: Any) -> Any:
            return function(q, k, v, scale, mask)

        patch.setattr(llama, "scaled_dot_product_attention", planted)

    return plant


def with_rope(turn: Callable[[Any, Any, int], Any]) -> Callable[[Any, Patch], None]:
    """A bug of layer 1: instead of its rotation, turn(rotation, x, offset)."""

    def change(layer: Any) -> None:
        right = layer.self_attn.rope
        layer.self_attn.rope = lambda x, offset=0: turn(right, x, offset)

    return in_layer(change)


def window(q: Any, k: Any, v: Any, scale: float, mask: Any) -> Any:
    far = mx.arange(q.shape[2])[:, None] - mx.arange(k.shape[2])
    return attention(q, k, v, cache=None, scale=scale, mask=(far >= 0) & (far < 16))


def softmax_in_the_format(q: Any, k: Any, v: Any, scale: float, mask: Any) -> Any:
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    seen = mx.arange(q.shape[2])[:, None] >= mx.arange(k.shape[2])
    scores = mx.where(seen, (q @ k.swapaxes(-1, -2)) * scale, mx.array(-mx.inf, q.dtype))
    return mx.softmax(scores, axis=-1) @ v


class NarrowNorm(nn.RMSNorm):
    """Everything in the format of the input, as a port without a cast."""

    def __call__(self, x: Any) -> Any:
        return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weight


def narrow_norm(layer: Any) -> None:
    right = layer.input_layernorm
    layer.input_layernorm = NarrowNorm(right.weight.shape[0], right.eps)
    layer.input_layernorm.weight = right.weight


def project_v_as_k(layer: Any) -> None:
    layer.self_attn.v_proj = layer.self_attn.k_proj


def residual_of_the_input(model: Any, patch: Patch) -> None:
    def block(self: Any, x: Any, mask: Any = None, cache: Any = None) -> Any:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(h))

    patch.setattr(llama.TransformerBlock, "__call__", block)


def head_of_its_own(model: Any, patch: Patch) -> None:
    """What is tied to the embedding has numbers of its own."""
    rows = model.model.embed_tokens.weight
    model.args.tie_word_embeddings = False
    model.lm_head = nn.Linear(*rows.shape[::-1], bias=False)
    model.lm_head.weight = mx.roll(rows, 1, axis=0)


def no_scaling(model: Any, patch: Patch) -> None:
    for layer in model.layers:
        layer.self_attn.rope = nn.RoPE(layer.self_attn.head_dim, base=10000)


def mlp_after_attention(model: Any, patch: Patch) -> None:
    """Of a block whose two halves read the same norm, the second reads that of the sum."""

    def block(self: Any, x: Any, mask: Any, cache: Any) -> Any:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.input_layernorm(h))

    patch.setattr(stablelm.DecoderLayer, "__call__", block)


def set_(path: str, value: Callable[[Any], Any]) -> Callable[[Any, Patch], None]:
    """A bug of layer 1: the attribute at a path has another value, a function of the right one."""
    *owners, name = path.split(".")

    def change(layer: Any) -> None:
        for owner in owners:
            layer = getattr(layer, owner)
        setattr(layer, name, value(getattr(layer, name)))

    return in_layer(change)


BUGS = (
    Bug(
        "eps of a norm times 1000",
        set_("post_attention_layernorm.eps", lambda e: e * 1000),
        "1.post_attention_layernorm",
    ),
    Bug("norm weight plus 1", set_("input_layernorm.weight", lambda w: w + 1), "1.input_layernorm", HELIUM),
    Bug("norm in the format", in_layer(narrow_norm), "1.input_layernorm", HELIUM, "bfloat16"),
    Bug("norm without its bias", set_("input_layernorm.bias", mx.zeros_like), "1.input_layernorm", SEQUENTIAL),
    Bug("bias of q dropped", set_("self_attn.q_proj.bias", mx.zeros_like), "1.self_attn.q_proj", HELIUM),
    Bug("v projected as k", in_layer(project_v_as_k), "1.self_attn.v_proj"),
    Bug(
        "norms of heads in reverse",
        set_("self_attn.q_layernorm.norms", lambda n: n[::-1]),
        "1.self_attn.q_layernorm",
        PARALLEL,
    ),
    Bug("pairs side by side", set_("self_attn.rope.traditional", lambda t: True), "1.self_attn.q_rope"),
    Bug("halves for pairs", set_("self_attn.rope.traditional", lambda t: False), "1.self_attn.q_rope", HELIUM),
    Bug("base times 10", set_("self_attn.rope.base", lambda b: b * 10), "1.self_attn.q_rope", SEQUENTIAL),
    Bug("twice as many dims turned", set_("self_attn.rope.dims", lambda d: 2 * d), "1.self_attn.q_rope", PARALLEL),
    Bug("positions from 1", with_rope(lambda rope, x, offset: rope(x, offset=offset + 1)), "1.self_attn.q_rope"),
    Bug(
        "keys not turned",
        with_rope(lambda rope, x, offset: x if x.shape[1] == 2 else rope(x)),
        "1.self_attn.k_rope",
        HELIUM,
    ),
    Bug("rotary scaling left out", no_scaling, "0.self_attn.q_rope"),
    Bug("scale of the hidden size", set_("self_attn.scale", lambda s: s * 0.9), "1.self_attn.context"),
    Bug("no mask", as_attention(lambda q, k, v, s, m: attention(q, k, v, None, s, None)), "0.self_attn.context"),
    Bug("a window of 16", as_attention(window), "0.self_attn.context"),
    Bug(
        "heads of k swapped",
        as_attention(lambda q, k, v, s, m: attention(q, k[:, ::-1], v, None, s, m)),
        "0.self_attn.context",
    ),
    Bug("softmax in the format", as_attention(softmax_in_the_format), "0.self_attn.context", dtype="bfloat16"),
    Bug(
        "o_proj of 8 bits",
        set_("self_attn.o_proj", lambda p: nn.QuantizedLinear.from_linear(p, 32, 8)),
        "1.self_attn.o_proj",
    ),
    Bug("gate and up swapped", as_activation(lambda gate, up: swiglu(up, gate)), "0.mlp.act"),
    Bug("gelu for silu", as_activation(lambda gate, up: nn.gelu(gate) * up), "0.mlp.act"),
    Bug("residual of the input", residual_of_the_input, "layers.0"),
    Bug(
        "halves of a block in line",
        mlp_after_attention,
        ("0.mlp.gate_proj", "0.mlp.up_proj", "0.input_layernorm"),
        PARALLEL,
    ),
    Bug("head not tied", head_of_its_own, "lm_head"),
)


@pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
def test_planted_bugs_are_named(bug: Bug, dtype: str, older: Callable[[str], Path], monkeypatch: Patch) -> None:
    model, _ = utils.load_model(older(bug.checkpoint))
    model.set_dtype(getattr(mx, dtype))
    bug.plant(model, monkeypatch)
    must_be_named(CHECKS, bug, dtype, model, folder=older(bug.checkpoint), input_ids=IDS)


# -------------------------------------------------------------------------------------------- what is said of the rest


def test_everything_that_can_be_stressed_holds(older: Callable[[str], Path]) -> None:
    """Batches that are padded and far positions too, by the cache that mlx-lm has for batches."""
    more = {"folder": older(LLAMA), "input_ids": IDS[:32], "isolate": False, "stress": True}
    reports = must_hold(CHECKS, LLAMA, "bfloat16", "mlx", **more)
    assert [report.inputs for report in reports[1:]] == [
        *(inputs.label for inputs in stressed(IDS[None])),
        "a small stream at every norm",
    ]
    assert not any("not run" in note for report in reports for note in report.notes)


def test_positions_that_ignore_the_cache_are_found(older: Callable[[str], Path], monkeypatch: Patch) -> None:
    model, _ = utils.load_model(older(LLAMA))
    model.set_dtype(mx.float32)
    with_rope(lambda rope, x, offset: rope(x))(model, monkeypatch)
    reference = load(older(LLAMA), "float32")
    candidate = wrap(model, Opening("", older(LLAMA)))
    assert candidate is not None
    plain, pieces = (Inputs(IDS[None], chunks=chunks) for chunks in ((), (24, 1, 23)))
    assert judge(reference, record(candidate, reference, plain), None).verdict == "holds"
    first = judge(reference, record(candidate, reference, pieces), None).first_failure
    assert first is not None
    assert first.name == "model.layers.1.self_attn.q_rope"


def test_rotary_settings_that_mlx_lm_does_not_read_are_a_finding(older: Callable[[str], Path]) -> None:
    (report,) = compare(golden.path(LLAMA), "mlx", dtype="float32", input_ids=IDS, isolate=False)
    assert report.first_failure is not None
    assert report.first_failure.name == "model.layers.0.self_attn.q_rope"
    assert any("does not read rope_parameters" in note for note in report.notes), report.notes
    with pytest.raises(
        MisbehavesError, match=r"'partial_rotary_factor' .*does not read rope_parameters of config.json"
    ):
        compare(golden.path(PARALLEL), "mlx", isolate=False)


def test_what_mlx_lm_has_not_is_one_sentence(older: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"mlx-lm \S+ has no model of model_type arcee$"):
        compare(golden.path("arcee-tiny"), "mlx", isolate=False)
    with pytest.raises(InputError, match=r"--candidate mlx:x\.py: there is no x\.py/config\.json; expected a model"):
        compare(older(LLAMA), "mlx:x.py", isolate=False)
    with pytest.raises(InputError, match="--candidate mlx needs what it reads: --candidate mlx:FOLDER"):
        compare(older(LLAMA), "mlx:", isolate=False)
    with pytest.raises(InputError, match="a ReLU of MLX is no language model"):
        compare(older(LLAMA), nn.ReLU())
    model, _ = utils.load_model(older(LLAMA))
    holes = np.where(np.arange(48) == 20, 0, 1)
    with pytest.raises(InputError, match="has padding on the left or the right of a row"):
        compare(older(LLAMA), model, input_ids=IDS, attention_mask=holes)


def test_a_run_leaves_the_model_as_it_was(older: Callable[[str], Path]) -> None:
    model, _ = utils.load_model(older(LLAMA))
    kinds = [type(module) for _, module in model.named_modules()]
    function = llama.scaled_dot_product_attention
    compare(older(LLAMA), model, input_ids=IDS)
    assert [type(module) for _, module in model.named_modules()] == kinds
    assert llama.scaled_dot_product_attention is function


# ----------------------------------------------------------------------------------------------------- quantised models


@pytest.fixture(scope="module")
def of_4_bits(older: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `mlx_lm.convert` writes one."""
    folder = tmp_path_factory.mktemp("4 bits")
    model, config = utils.load_model(older(LLAMA))
    model.set_dtype(mx.float32)
    model, config = utils.quantize_model(model, config, 32, 4)
    utils.save_model(folder, model)
    utils.save_config(config, folder / "config.json")
    return folder


def test_a_quantised_model_holds_with_the_weights_that_it_has(older: Callable[[str], Path], of_4_bits: Path) -> None:
    (report,) = compare(older(LLAMA), f"mlx:{of_4_bits}", dtype="float32", input_ids=IDS, isolate=False)
    assert report.verdict == "holds", report.first_failure
    found = report.format_error
    assert found is not None
    assert 0.02 < found.worst[0].relative < 0.2
    assert (found.given, found.source) == (22, report.candidate)  # 7 of each of 3 layers, and the embedding


def test_bugs_in_quantised_models_are_named(older: Callable[[str], Path], of_4_bits: Path, monkeypatch: Patch) -> None:
    model, _ = utils.load_model(of_4_bits)
    model.set_dtype(mx.float32)
    mlp = model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    report = compare(older(LLAMA), model, input_ids=IDS)[0]
    said = [note for note in report.notes if "is not the checkpoint's" in note]
    assert any("gate_proj.weight of mlx-lm" in note for note in said)
    assert report.first_failure is not None
    assert report.first_failure.name == "model.layers.1.mlp.gate_proj"
    model, _ = utils.load_model(of_4_bits)
    model.set_dtype(mx.float32)
    as_activation(lambda gate, up: nn.gelu(gate) * up)(model, monkeypatch)
    first = compare(older(LLAMA), model, input_ids=IDS)[0].first_failure
    assert first is not None
    assert first.name == "model.layers.0.mlp.act"


def test_mlx_adds_up_quantised_products_in_the_format(older: Callable[[str], Path], of_4_bits: Path) -> None:
    """On a CPU. If this fails, it no longer does, and quantised models can be checked in bfloat16 too."""
    (report,) = compare(older(LLAMA), f"mlx:{of_4_bits}", dtype="bfloat16", input_ids=IDS, isolate=False)
    assert report.verdict == "fails"
    assert report.first_failure is not None
    assert report.first_failure.name == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_arrays_of_mlx_are_taken_of_a_function(dtype: Any) -> None:
    """bfloat16 too, for which its buffers have no letter."""
    value = mx.array(IDS[:6] / 7).reshape(2, 3).astype(dtype)
    assert np.array_equal(floats("lm_head", value), np.array(value.astype(mx.float32)))
