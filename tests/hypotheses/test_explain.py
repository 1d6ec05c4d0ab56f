"""Wrong runs that are explained, and right ones that are not: candidates share no code with the hypotheses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refllm import golden
from refllm.check import compare, explained
from refllm.check.explained import in_words
from refllm.hypotheses.catalogue import catalogue
from refllm.hypotheses.explain import Explanation, explain
from refllm.models.auto import load
from refllm.mutants.explanations import Case, examined, right_run
from refllm.mutants.port import Port
from refllm.mutants.port_bugs import BUGS, Bug
from refllm.parallel import one_blas_thread
from refllm.strategies.small_models import build, model_class, small_config

LLAMA = golden.checkpoints()["llama-tiny"]
BY_NAME = {bug.name: bug for bug in BUGS}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Small products on one thread."""
    with one_blas_thread():
        yield


@pytest.fixture(scope="module")
def llama() -> dict[str, Case]:
    """The embedded checkpoint with stretched positions, in two precisions."""
    ids = np.random.default_rng(17).integers(0, 640, (1, 64))
    models = {dtype: load(LLAMA, head="causal_lm", dtype=dtype) for dtype in ("float32", "bfloat16")}
    return {dtype: Case("llama-tiny", model, ids, dtype) for dtype, model in models.items()}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float32", "RoPE scaling lost"),
        ("bfloat16", "q and k as in GGUF"),
        ("bfloat16", "norms after"),
        ("float32", "heads tiled"),
        ("float32", "merged crosswise"),
    ],
)
def test_a_mistake_is_named_from_the_logits_alone(llama: dict[str, Case], dtype: str, name: str) -> None:
    outcome = examined(llama[dtype], BY_NAME[name])
    assert outcome.result == "right", outcome


@pytest.mark.parametrize("name", ["theta 1234567", "eps 3e-5", "sees 11 keys"])
def test_a_number_is_solved_for(llama: dict[str, Case], name: str) -> None:
    outcome = examined(llama["float32"], BY_NAME[name])
    assert outcome.result == "right", outcome


def test_a_number_that_others_fit_as_well_as_is_not_said_alone() -> None:
    """A theta of 1234567, in bfloat16, of 8 dims that turn: 1e6 is no better known for it than its neighbours."""
    model = load(golden.checkpoints()["stablelm-tiny-parallel"], head="causal_lm", dtype="bfloat16")
    ids = np.random.default_rng(17).integers(0, model.config.vocab_size, (1, 64))
    case = Case("", model, ids, "bfloat16")
    bug = BY_NAME["theta 1234567"]
    (cause,) = _explained(case, bug, hypotheses=[h for h in catalogue(model.config) if h.operator == "rope"]).causes
    assert cause.low is not None
    assert cause.high is not None
    assert cause.low < 1234567 < cause.high
    assert cause.says.endswith("fit as well)")


def test_a_single_layer_is_named(llama: dict[str, Case]) -> None:
    found = _explained(llama["float32"], BY_NAME["gelu in layer 1"])
    assert found.kind == "explained"
    assert found.causes[0].layers == (1,)
    assert "in layer 1 alone" in found.causes[0].says


def test_two_mistakes_at_once(llama: dict[str, Case]) -> None:
    both = Bug("both", lambda c: {"gate": "up", "theta": 1e6}, ())
    found = _explained(llama["float32"], both)
    assert found.kind == "explained"
    assert {"theta 1e+06", "gate and up swapped"} <= {found.causes[0].name[:11], found.causes[0].name[-19:]} | {
        found.causes[0].name[:19],
        found.causes[0].name[-11:],
    }


def _explained(case: Case, bug: Bug, **how: Any) -> Explanation:
    return explain(case.search(case.logits(bug)), case.model.config, **how)


def test_all_that_fit_are_listed(llama: dict[str, Case]) -> None:
    found = _explained(llama["float32"], BY_NAME["act gelu"])
    assert {cause.name for cause in found.causes} == {"activation gelu", "activation gelu_10"}
    words = in_words(found)
    assert words[0].startswith("explained: with gelu instead of silu, or with gelu_10 instead of silu the reference")
    assert words[1] == "logits cannot tell both apart"


def test_an_error_below_the_limit_is_seen_by_its_shape(llama: dict[str, Case]) -> None:
    found = _explained(llama["bfloat16"], BY_NAME["eps 0.001"])
    assert found.kind == "slope"
    assert found.causes[0].name == "norm eps 0.001"
    assert found.before < 2


def test_a_right_run_is_not_explained(llama: dict[str, Case]) -> None:
    assert {dtype: right_run(case, 5).kind for dtype, case in llama.items()} == dict.fromkeys(llama, "none")


@pytest.mark.parametrize("name", ["RoPE scaling lost", "act relu2", "heads tiled"])
def test_without_its_entry_a_mistake_has_no_other_name(llama: dict[str, Case], name: str) -> None:
    bug = BY_NAME[name]
    same = {*bug.right, "rope factor"}  # a factor of 1 is no scaling
    others = [h for h in catalogue(llama["float32"].model.config) if h.name not in same]
    found = _explained(llama["float32"], bug, hypotheses=others)
    assert found.kind in ("none", "nearly"), found.causes


def test_what_is_said_where_nothing_explains_it(llama: dict[str, Case]) -> None:
    case = llama["float32"]
    later = Bug("", lambda c: {"place": lambda p: p * p % 7}, ())
    none = _explained(case, later, hypotheses=[])
    assert any("first token, which sees itself alone, is right" in fact for fact in none.facts)
    first = Bug("", lambda c: {"add_mlp": 0.3}, ())
    assert any("is wrong too" in fact for fact in _explained(case, first, hypotheses=[]).facts)
    head = Bug("", lambda c: {"head": lambda y: y + np.sin(np.arange(y.shape[-1]) * 37) * 0.1}, ())
    assert any("the head is wrong" in fact for fact in _explained(case, head, hypotheses=[]).facts)
    window = Bug("", lambda c: {"sees": lambda t, u: (u <= t) & (t - u < 40)}, ())
    assert any("everything before position 40 is right" in f for f in _explained(case, window, hypotheses=[]).facts)


def test_where_time_is_up_the_report_says_so() -> None:
    found = Explanation("lm_head", "none", (), 5.0, tried=12, of=337, out_of_time=True)
    assert in_words(found) == ["not explained by 12 of 337 hypotheses, tried for 30 s"]
    assert in_words(replace(found, out_of_time=False)) == []


# --------------------------------------------------------------------------------------------------------- whole checks


def _port(**fields: Any) -> Any:
    """A forward pass that shows some values of a port."""

    def forward(checkpoint: str, input_ids: Any, attention_mask: Any, position_ids: Any, tap: Any) -> None:
        model = load(checkpoint, head="causal_lm")
        tap("lm_head", Port(model.weights, model.config, **fields).logits(np.asarray(input_ids)[0])[None])

    return forward


def test_a_report_says_what_explains_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for it: a run that fails is explained."""
    from rich.console import Console

    from refllm.check.html import render
    from refllm.check.report import show_report

    ids = np.random.default_rng(1).integers(0, 640, 64)
    monkeypatch.setattr(explained, "BY_DEFAULT", True)
    (report,) = compare(LLAMA, _port(scaling="none"), dtype="float32", input_ids=ids)
    assert report.verdict == "fails"
    assert report.explanation is not None
    sentence = "explained: with rope_type default instead of llama3 the reference gives your logits to 0."
    console = Console(width=110, no_color=True)
    with console.capture() as captured:
        console.print(show_report(report))
    assert sentence in " ".join(captured.get().replace("│", " ").split())
    assert sentence in render([report])
    cause = report.to_dict()["explanation"]["causes"][0]
    assert cause["name"] == "rope scaling ignored"
    assert 0 < cause["sigma"] < 2
    assert abs(cause["slope"] - 1) < 0.01


def test_a_right_run_of_logits_alone_has_no_explanation() -> None:
    ids = np.random.default_rng(1).integers(0, 640, 64)
    (report,) = compare(LLAMA, _port(), dtype="float32", explain=True, input_ids=ids)
    assert report.verdict != "fails"
    assert report.explanation is None
    assert report.to_dict()["explanation"] is None


def test_a_wrong_value_among_shown_ones_is_explained_where_it_is() -> None:
    """The rotated queries are shown, and blocks: each is explained from the values before it."""
    from refllm.check.candidates import record
    from refllm.check.inputs import Inputs
    from refllm.check.oracle import judge
    from refllm.mutants.in_pages import DEFECTS, planted

    model = build(model_class("llama"), small_config("llama"), 3, "float32")
    inputs = Inputs(np.random.default_rng(2).integers(0, 96, (1, 40)))
    trace = record(planted(model, DEFECTS["the other pairing of dims"], 1), model, inputs)
    report = judge(model, trace, explain=True)
    assert report.explanation is not None
    assert report.explanation.value == "model.layers.1.self_attn.q_rope"
    assert report.explanation.causes[0].name == "the other pairing"
    trace.taps = {name: value for name, value in trace.taps.items() if name.count(".") <= 2}
    blocks = judge(model, trace, explain=True)
    assert blocks.explanation is not None
    assert blocks.explanation.value == "model.layers.1"
    assert "the other pairing" in {cause.name for cause in blocks.explanation.causes}


def test_mlx_that_does_not_read_rope_parameters_is_explained() -> None:
    pytest.importorskip("mlx_lm")
    (report,) = compare(LLAMA, "mlx", dtype="float32", explain=True, isolate=False, input_ids=np.arange(3, 67))
    assert report.explanation is not None
    assert report.explanation.causes[0].name == "rope scaling ignored"
