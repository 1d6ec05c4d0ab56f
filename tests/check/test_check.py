"""Whole runs of the check: right implementations hold, planted defects are named where they are, by every way in."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm import golden
from refllm.check import assert_matches, compare
from refllm.check.adapters.transformers import TransformersCandidate, quiet_transformers
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.difference import diff
from refllm.check.inputs import Inputs, stressed
from refllm.check.oracle import Report, judge
from refllm.check.run import Settings, check_all, folders_to_check, trace_candidate
from refllm.check.trace import Trace
from refllm.errors import InputError, MissingExtraError
from refllm.forward.model import Model
from refllm.precision import FUSED, HF_EAGER, HF_SDPA
from refllm.storage.json_text import json_text

NAMES = ["arcee-tiny", "helium-tiny", "llama-tiny", "stablelm-tiny-parallel", "stablelm-tiny-sequential"]
LAYER = 1


@cache
def reference(name: str, dtype: str) -> Model:
    import refllm

    return refllm.load(golden.path(name), dtype=dtype)


def token_ids(model: Model, length: int = 48, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, model.config.vocab_size, (1, length))


def check(
    name: str, dtype: str, *, plant: Callable[[Any], None] | None = None, attention: str = "eager", inputs: Any = None
) -> Report:
    """The report on Transformers, whose model `plant` may break first."""
    model = reference(name, dtype)
    candidate = TransformersCandidate.load(golden.path(name), head=model.head, dtype=dtype, attention=attention)
    if plant is not None:
        plant(candidate.model)
    policy = HF_EAGER if attention == "eager" else HF_SDPA
    return judge(model, record(candidate, model, inputs or Inputs(token_ids(model))), policy)


def told(report: Report) -> str:
    return "\n".join(f"{tap.name} {tap.verdict} {tap.broken} {tap.untested}" for tap in report.taps)


def test_every_embedded_checkpoint_is_checked() -> None:
    assert [folder.name for folder in folders_to_check(None)] == NAMES


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_holds(name: str, dtype: str, attention: str) -> None:
    report = check(name, dtype, attention=attention)
    assert report.verdict == "holds", told(report)
    assert report.next_tokens is not None
    assert not report.next_tokens.defects
    assert sum(report.attribution.values()) == pytest.approx(1)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(("name", "dtype"), [("helium-tiny", "bfloat16"), ("stablelm-tiny-parallel", "float16")])
def test_transformers_holds_on_stressed_inputs(name: str, dtype: str, number: int) -> None:
    inputs = stressed(token_ids(reference(name, dtype), 24))[number]
    report = check(name, dtype, inputs=inputs)
    assert report.verdict == "holds", f"{inputs.label}\n{told(report)}"


@pytest.mark.parametrize("policy", [HF_EAGER, HF_SDPA, FUSED])
@pytest.mark.parametrize("name", NAMES)
def test_reference_holds_under_its_own_policy(name: str, policy: Any) -> None:
    import refllm

    model = reference(name, "bfloat16")
    emulated = refllm.load(golden.path(name), dtype="bfloat16", policy=policy)
    report = judge(model, record(ReferenceCandidate(emulated), model, Inputs(token_ids(model))), policy)
    assert report.verdict == "holds", told(report)


# ------------------------------------------------------------------------------------------------------ planted defects


def layer(model: Any) -> Any:
    return model.model.layers[LAYER]


def scale_attention(model: Any) -> None:
    layer(model).self_attn.scaling *= 1.1


def forget_norm_weight(model: Any) -> None:
    layer(model).input_layernorm.weight.data.fill_(1.0)


def exchange_heads(model: Any) -> None:
    weight = layer(model).self_attn.q_proj.weight.data
    weight.copy_(weight.roll(weight.shape[0] // 2, 0))


def lose_a_tile(model: Any) -> None:
    layer(model).mlp.down_proj.weight.data[:16] = 0.0


def skip_mlp(model: Any) -> None:
    mlp = layer(model).mlp
    forward = mlp.forward
    mlp.forward = lambda x: 0 * forward(x)


def see_the_future(model: Any) -> None:
    attention = layer(model).self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"attention_mask": None})


def shift_positions(model: Any) -> None:
    """Rotates in one layer as if the text began one position earlier: relative positions do not notice."""
    attention = layer(model).self_attn
    forward = attention.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return forward(*args, **kwargs | {"position_embeddings": (cos.roll(1, 1), sin.roll(1, 1))})

    attention.forward = wrong


DEFECTS: dict[str, tuple[Callable[[Any], None], set[str]]] = {
    "scale": (scale_attention, {"self_attn.probs", "self_attn.context"}),
    "norm weight": (forget_norm_weight, {"input_layernorm"}),
    "heads exchanged": (exchange_heads, {"self_attn.q_proj"}),
    "a tile lost": (lose_a_tile, {"mlp.down_proj"}),
    "mlp skipped": (skip_mlp, {""}),
    "mask": (see_the_future, {"self_attn.probs", "self_attn.context"}),
    "positions": (shift_positions, {"self_attn.q_rope", "self_attn.k_rope"}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_named_by_layer_and_operator(defect: str, name: str) -> None:
    plant, places = DEFECTS[defect]
    report = check(name, "bfloat16", plant=plant)
    assert report.verdict == "fails"
    found = report.first_failure
    assert found is not None
    assert found.name in {f"model.layers.{LAYER}" + (f".{place}" if place else "") for place in places}, told(report)
    before = report.taps[: report.taps.index(found)]
    assert {tap.verdict for tap in before} <= {"holds", "untested"}


def test_nan_is_reported_at_its_position() -> None:
    def poison(model: Any) -> None:
        mlp = layer(model).mlp
        forward = mlp.up_proj.forward

        def wrong(x: Any) -> Any:
            out = forward(x).clone()
            out[0, 7, 5] = float("nan")
            return out

        mlp.up_proj.forward = wrong

    found = check("helium-tiny", "bfloat16", plant=poison).first_failure
    assert found is not None
    assert found.name == f"model.layers.{LAYER}.mlp.up_proj"
    assert found.isolated is not None
    assert found.isolated.nonfinite_at == (0, 7, 5)


# ------------------------------------------------------------------------------------------- a forward pass of your own


def port(scale: float = 1.0, taps: bool = True, dtype: str = "float32") -> Callable[..., Any]:
    """Somebody's port: their own code (here Transformers), which names the residual stream and returns logits."""

    def forward(checkpoint: str, input_ids: Any, attention_mask: Any, position_ids: Any, tap: Any) -> Any:
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        layer(model).self_attn.o_proj.weight.data *= scale
        with torch.no_grad():
            out = model(torch.from_numpy(input_ids), output_hidden_states=True)
        if taps:
            tap("model.embed_tokens", out.hidden_states[0])
            for i, hidden in enumerate(out.hidden_states[1:-1]):
                tap(f"model.layers.{i}", hidden)
        return out.logits

    return forward


def test_port_that_is_right_passes_in_one_line() -> None:
    assert_matches(golden.path("llama-tiny"), port(), dtype="float32")


def test_values_that_prove_nothing_are_no_pass() -> None:
    with pytest.raises(AssertionError, match=r"incomplete(.|\n)*untested .*times 1.01 would hold"):
        assert_matches(golden.path("llama-tiny"), port(dtype="bfloat16"), dtype="bfloat16", policy="hf-sdpa")


@pytest.mark.parametrize("taps", [True, False])
def test_port_that_is_wrong_fails_with_the_report(taps: bool) -> None:
    with pytest.raises(AssertionError) as failure:
        assert_matches(golden.path("llama-tiny"), port(1.02, taps), dtype="float32")
    assert ("model.layers.1" if taps else "lm_head") in str(failure.value)


def test_a_transformers_that_is_broken_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("from torch import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(
        MissingExtraError, match=r"cannot be imported \(cannot import name 'no_such_name'.*install again"
    ):
        quiet_transformers()


def test_transformers_model_object_is_taken_as_it_is() -> None:
    import torch
    import transformers

    folder = golden.path("stablelm-tiny-parallel")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    reports = compare(folder, model, input_ids=list(range(5, 60)), stress=True)
    assert {report.verdict for report in reports} == {"holds"}
    assert reports[-1].inputs == "embeddings with a large mean"
    assert len(reports) == 8


def test_unknown_tap_names_and_shapes_are_refused_by_name() -> None:
    def foreign(checkpoint: str, ids: np.ndarray, mask: Any, positions: Any, tap: Any) -> None:
        tap("model.layers.0.nonsense", np.zeros((1, ids.shape[1], 4), np.float32))

    def misshapen(checkpoint: str, ids: np.ndarray, mask: Any, positions: Any, tap: Any) -> None:
        tap("model.layers.0", np.zeros((1, ids.shape[1], 4), np.float32))

    for function, words in (
        (foreign, "model.layers.0.nonsense"),
        (misshapen, r"model.layers.0 has shape \[1, 48, 4\]"),
    ):
        with pytest.raises(InputError, match=words):
            compare(golden.path("llama-tiny"), function, dtype="float32", input_ids=range(48))


@pytest.mark.parametrize("reference_", ["nowhere:forward", "json:no_such_function", "/no/such/file.py:forward"])
def test_function_that_is_not_there_is_one_sentence(reference_: str) -> None:
    with pytest.raises(InputError, match=r"cannot be imported|has no function"):
        compare(golden.path("llama-tiny"), reference_)


# -------------------------------------------------------------------------------------------------- other heads, traces


@pytest.mark.parametrize(
    ("head", "last"),
    [
        ("ForSequenceClassification", "score"),
        ("ForTokenClassification", "score"),
        ("ForQuestionAnswering", "qa_outputs"),
        ("Model", "model.norm"),
    ],
)
def test_other_heads_are_checked_too(head: str, last: str, tmp_path: Path) -> None:
    import refllm

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = refllm.LlamaConfig(
        **sizes, num_attention_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=1, initializer_range=0.2
    )
    getattr(refllm, f"Llama{head}").from_config(config, seed=1).save_pretrained(tmp_path, dtype="float32")
    reports = list(check_all([tmp_path], Settings(isolate=False)))
    assert {report.dtype for report in reports} == {"float32", "bfloat16"}
    for report in reports:
        assert report.verdict == "holds", told(report)
        assert report.taps[-1].name == last


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtypes": ("float32", "int8")}, "--dtype int8 cannot be checked"),
        ({"attention": "flash"}, "--attn flash is not known"),
        ({"policy": "none"}, "none"),
    ],
)
def test_settings_that_are_not_known_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Settings(**settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_trace_file_holds_what_was_recorded(dtype: str, tmp_path: Path) -> None:
    trace = trace_candidate(golden.path("arcee-tiny"), Settings(dtypes=(dtype,), isolate=False))
    trace.save(tmp_path / "a.safetensors")
    again = Trace.load(tmp_path / "a.safetensors")
    assert list(again.taps) == list(trace.taps)
    assert all(np.array_equal(again.taps[name], value) for name, value in trace.taps.items())
    assert (again.source, again.dtype, again.config_hash) == (trace.source, trace.dtype, trace.config_hash)
    assert np.array_equal(again.inputs.input_ids, trace.inputs.input_ids)
    assert diff(trace, again).identical


def test_diff_names_the_first_value_that_differs(tmp_path: Path) -> None:
    trace = trace_candidate(golden.path("llama-tiny"), Settings(dtypes=("bfloat16",), isolate=False))
    other = Trace(**{**vars(trace), "taps": {name: value.copy() for name, value in trace.taps.items()}})
    other.taps["model.layers.1.mlp.act"][0, 3, 4] += 1
    found = diff(trace, other)
    assert found.first_difference is not None
    assert (found.first_difference.name, found.first_difference.at) == ("model.layers.1.mlp.act", (3, 4))
    assert sum(tap.differing for tap in found.taps) == 1


def test_traces_that_do_not_belong_together_are_refused() -> None:
    model = reference("llama-tiny", "float32")
    one, other = (record(ReferenceCandidate(model), model, Inputs(token_ids(model, 16, seed))) for seed in (1, 2))
    shorter = record(ReferenceCandidate(model), model, Inputs(token_ids(model, 12)))
    foreign = Trace(**{**vars(one), "config_hash": "0" * 16})
    nameless = Trace(**{**vars(one), "taps": {"h.0": one.taps["model.layers.0"]}})
    for second, words in (
        (other, "different tokens"),
        (shorter, "different lengths"),
        (foreign, "different models"),
        (nameless, "no name in common"),
    ):
        with pytest.raises(InputError, match=words):
            diff(one, second)
    with pytest.raises(InputError, match="trace the same checkpoint"):
        judge(model, foreign, HF_EAGER)


@pytest.mark.parametrize("damage", ["missing", "truncated", "not a trace", "empty"])
def test_damaged_trace_file_is_one_sentence(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    model = reference("llama-tiny", "float32")
    if damage == "truncated":
        record(ReferenceCandidate(model), model, Inputs(token_ids(model, 4))).save(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not a trace":
        path = golden.path("llama-tiny") / "model.safetensors"
    elif damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(InputError, match="trace"):
        Trace.load(path)


def test_report_is_plain_json() -> None:
    for plant in (None, skip_mlp):
        values = check("llama-tiny", "bfloat16", plant=plant).to_dict()
        again = json.loads(json_text(values), parse_constant=pytest.fail)
        assert again["verdict"] == ("holds" if plant is None else "fails")
        assert {"end_to_end", "isolated", "verdict", "name", "broken", "untested", "ulps"} <= set(again["taps"][0])
