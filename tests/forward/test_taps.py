"""The names and shapes of the intermediate values, and that shape suffixes in the code say what is there."""

import importlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suffixes import Suffixes
from witness import numpy_of, to_torch

import refllm
from refllm import ops
from refllm.models import arcee, stablelm
from refllm.strategies.small_models import EVERY_FLAG, FAMILIES, build, model_class, small_config

ROOT = Path(refllm.__file__).resolve().parent
LAYERS = [(family, flags) for family in FAMILIES for flags in ({}, *EVERY_FLAG[family])]
every_layer = pytest.mark.parametrize(("family", "flags"), LAYERS, ids=lambda x: x if isinstance(x, str) else len(x))

LAYER_TAPS = {
    "input_layernorm": "B S E",
    "self_attn.q_proj": "B S HD",
    "self_attn.k_proj": "B S KD",
    "self_attn.v_proj": "B S KD",
    "self_attn.q_layernorm": "B H S D",
    "self_attn.k_layernorm": "B K S D",
    "self_attn.q_rope": "B H S D",
    "self_attn.k_rope": "B K S D",
    "self_attn.scores": "B H S T",
    "self_attn.probs": "B H S T",
    "self_attn.context": "B H S D",
    "self_attn.o_proj": "B S E",
    "residual_mid": "B S E",
    "post_attention_layernorm": "B S E",
    "mlp.gate_proj": "B S F",
    "mlp.up_proj": "B S F",
    "mlp.act": "B S F",
    "mlp.down_proj": "B S E",
    "": "B S E",
}
"""Tap of a layer -> its axes, in the order of computation; two letters are a product. "" is the layer's output."""


class Recorder:
    """Keeps every value that it wants."""

    def __init__(self, wanted: str = "") -> None:
        self.wanted = wanted
        self.values: dict[str, np.ndarray] = {}

    def wants(self, name: str) -> bool:
        return self.wanted in name

    def record(self, name: str, value: np.ndarray) -> None:
        assert name not in self.values, f"{name} is recorded twice"
        self.values[name] = value.copy()


def expected_taps(family: str, config: Any) -> dict[str, str]:
    absent = set()
    if family == "arcee":
        absent |= {"mlp.gate_proj"}
    if not getattr(config, "qk_layernorm", False):
        absent |= {"self_attn.q_layernorm", "self_attn.k_layernorm"}
    if getattr(config, "use_parallel_residual", False):
        absent |= {"post_attention_layernorm"}
    taps = {"model.embed_tokens": "B S E"}
    for i in range(config.num_hidden_layers):
        taps |= {f"model.layers.{i}.{tap}".rstrip("."): axes for tap, axes in LAYER_TAPS.items() if tap not in absent}
    return taps | {"model.norm": "B S E", "lm_head": "B S V"}


def sizes_of(config: Any, batch: int, queries: int, keys: int) -> dict[str, int]:
    return {
        "B": batch,
        "S": queries,
        "T": keys,
        "E": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "D": config.head_dim,
        "V": config.vocab_size,
        "C": config.num_labels,
    }


@every_layer
def test_every_tap_is_recorded_once_in_order_with_its_shape(family: str, flags: dict[str, Any]) -> None:
    config = small_config(family, **flags)
    model = build(model_class(family), config, 0)
    cache, taps = model.new_cache(), expected_taps(family, config)
    for cached, queries in ((0, 7), (7, 5)):
        recorder = Recorder()
        model(np.ones((3, queries), np.int64), past_key_values=cache, recorder=recorder)
        sizes = sizes_of(config, 3, queries, cached + queries)
        shapes = {
            name: tuple(int(np.prod([sizes[x] for x in axis])) for axis in axes.split()) for name, axes in taps.items()
        }
        assert {name: value.shape for name, value in recorder.values.items()} == shapes
        assert list(recorder.values) == list(shapes)


@pytest.mark.parametrize(
    ("head", "tap", "axes"),
    [
        ("sequence_classification", "score", (3, 7, 2)),
        ("token_classification", "score", (3, 7, 2)),
        ("question_answering", "qa_outputs", (3, 7, 2)),
    ],
)
def test_heads_are_recorded(head: str, tap: str, axes: tuple[int, ...]) -> None:
    recorder = Recorder()
    build(model_class("arcee", head), small_config("arcee", pad_token_id=0), 0)(
        np.ones((3, 7), np.int64), recorder=recorder
    )
    assert recorder.values[tap].shape == axes


@every_layer
def test_taps_are_the_outputs_of_the_modules_of_the_same_name(family: str, flags: dict[str, Any]) -> None:
    """... in Transformers: whoever knows a module path knows the tap."""
    config = small_config(family, **flags)
    ours = build(model_class(family), config, 0)
    theirs = to_torch(ours, dtype="float64", attention="eager", widened=True)
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            outputs[name] = numpy_of(output[0] if isinstance(output, tuple) else output)

        return hook

    recorder = Recorder()
    for name, module in theirs.named_modules():
        if name in expected_taps(family, config):
            module.register_forward_hook(keep(name))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    with torch.no_grad():
        theirs(torch.from_numpy(ids))
    ours(ids, recorder=recorder)
    not_modules = {"residual_mid", "act", "q_rope", "k_rope", "scores", "probs", "context"}
    assert set(outputs) == {name for name in recorder.values if name.split(".")[-1] not in not_modules}
    for name, value in outputs.items():
        np.testing.assert_allclose(recorder.values[name], value, rtol=0, atol=1e-11, err_msg=name)


def test_an_unwanted_value_is_not_recorded() -> None:
    model = build(model_class("llama"), small_config("llama"), 0)
    recorder = Recorder("layers.1.self_attn.probs")
    model(np.ones((1, 5), np.int64), recorder=recorder)
    assert list(recorder.values) == ["model.layers.1.self_attn.probs"]
    np.testing.assert_allclose(recorder.values["model.layers.1.self_attn.probs"].sum(-1), 1, rtol=1e-14)


def test_recording_changes_nothing() -> None:
    for dtype in ("float64", "bfloat16"):
        model = build(model_class("stablelm"), small_config("stablelm", **EVERY_FLAG["stablelm"][1]), 0, dtype)
        ids = np.arange(24).reshape(2, 12)
        np.testing.assert_array_equal(model(ids, recorder=Recorder()).logits, model(ids).logits)


# ----------------------------------------------------------------------------------------------------- shape suffixes

B, P, S = 3, 7, 5


def watch(model: Any, config: Any, **call: Any) -> Suffixes:
    """Two calls with a cache, the second one watched."""
    cache = model.new_cache()
    model(np.ones((B, P), np.int64), past_key_values=cache)
    suffixes = Suffixes({ROOT / "models": sizes_of(config, B, S, P + S), ROOT / "ops": {}})
    with suffixes:
        model(np.ones((B, S), np.int64), past_key_values=cache, **call)
    return suffixes


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@every_layer
def test_suffixes_hold_in_pages_and_operators(family: str, flags: dict[str, Any], dtype: str) -> None:
    config = small_config(family, **flags)
    mask = np.ones((B, P + S), np.int64)
    mask[0, :2] = 0
    suffixes = watch(
        build(model_class(family), config, 0, dtype), config, labels=np.ones((B, S), np.int64), attention_mask=mask
    )
    assert not suffixes.problems
    expected = {f"{family}.py: block", f"{family}.py: forward", "attention.py: attention", "heads.py: causal_lm_loss"}
    assert expected <= suffixes.seen


@pytest.mark.parametrize("head", ["sequence_classification", "token_classification", "question_answering"])
def test_suffixes_hold_in_heads(head: str) -> None:
    config = small_config("arcee", num_labels=4, pad_token_id=0)
    asked = {"start_positions": np.ones(B, np.int64), "end_positions": np.ones(B, np.int64)}
    labels = np.ones(B if head == "sequence_classification" else (B, S), np.int64)
    suffixes = watch(
        build(model_class("arcee", head), config, 0),
        config,
        **(asked if head == "question_answering" else {"labels": labels}),
    )
    assert not suffixes.problems
    assert any(where.startswith("heads.py") for where in suffixes.seen)


def test_suffixes_hold_in_the_fused_operators() -> None:
    rng = np.random.default_rng(0)
    H, K, D, T, E, V, R = 6, 2, 8, 11, 20, 30, 6
    q, k, v = (rng.standard_normal((B, heads, length, D)) for heads, length in ((H, S), (K, T), (K, T)))
    cos, sin = (rng.standard_normal((B, S, R // 2)) for _ in range(2))
    suffixes = Suffixes({ROOT / "ops": {}})
    with suffixes:
        ops.attention(q, k, v, return_lse=True)
        ops.decode_attention(q, k, v, np.array([T, 5, 7]))
        ops.norm_rope(q, k[:, :, :S], np.ones((H, D)), np.ones((K, D)), cos, sin, 1e-5, norm="rms", interleaved=False)
        x, w = rng.standard_normal((B, S, E)), rng.standard_normal(((H + 2 * K) * D, E))
        ops.rms_norm_qkv_rope(x, np.ones(E), w, None, cos, sin, 1e-5, num_heads=H, num_kv_heads=K, interleaved=True)
        ops.linear_cross_entropy(x.reshape(-1, E), rng.standard_normal((V, E)), np.ones(B * S, np.int64))
    assert not suffixes.problems
    assert len(suffixes.seen) >= 8


def altered(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """The module with a variable renamed, under the same file name."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert old in source
    copy = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), copy.__dict__)
    return copy


@pytest.mark.parametrize(
    ("page", "old", "new"),
    [
        (arcee, "up_BSF", "up_BSE"),  # another size
        (arcee, "h_BSF", "h_BF"),  # an axis too few
        (arcee, "o_BHSD", "o_BSHD"),  # the axes in another order
        (arcee, "k_BKTD", "k_BKSD"),  # keys of this call for all keys
        (arcee, "a_BSE", "a_BSX"),  # no axis of that name
        (stablelm, "x_BNSD", "x_BHSD"),  # right for queries, wrong for keys
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_suffix_in_a_page_is_found(page: types.ModuleType, old: str, new: str) -> None:
    family = page.__name__.split(".")[-1]
    config = small_config(family, **EVERY_FLAG[family][-1])
    model = build(model_class(family), config, 0)
    type_with_page = type("Altered", (type(model),), {"page": altered(page, old, new)})
    model.__class__ = type_with_page
    assert any(new in problem for problem in watch(model, config).problems)


def test_a_wrong_suffix_in_an_operator_is_found() -> None:
    suffixes = Suffixes({ROOT / "ops": {}})
    with suffixes:
        altered(importlib.import_module("refllm.ops.linear"), "x_BHSD", "x_BSHD").merge_heads(np.zeros((2, 3, 4, 5)))
    assert suffixes.problems
