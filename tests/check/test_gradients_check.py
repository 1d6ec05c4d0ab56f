"""`refllm check --backward`: right backward passes hold, planted ones are named, and what was not seen is said."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from witness import to_torch

from refllm import golden
from refllm.check.adapters.transformers import TransformersCandidate
from refllm.check.api import compare
from refllm.check.asked import Asked
from refllm.check.backward import judge_alone, tables_on_grid
from refllm.check.candidates import record
from refllm.check.html import render
from refllm.check.inputs import Inputs
from refllm.check.learning import must_show_gradients, with_labels
from refllm.check.oracle import Report, judge
from refllm.check.trace import Trace
from refllm.commands import cli
from refllm.errors import InputError
from refllm.forward.rotary import RotaryEmbedding
from refllm.mutants.gradient_runs import POLICIES, found_of, inputs_of, pair
from refllm.mutants.gradients import catalogue
from refllm.strategies.small_models import build, model_class, small_config

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checked(model: str, dtype: str, attention: str, micro_batches: bool = True, **asked: Any) -> Report:
    """The report on a right backward pass of Transformers."""
    ours, theirs = pair(model, 2, dtype, attention)
    candidate = TransformersCandidate(theirs, attention)
    inputs = inputs_of(ours, candidate, 1, micro_batches)
    trace = record(candidate, ours, inputs)
    return judge(ours, trace, asked.get("asked", Asked(POLICIES[attention])))


@pytest.mark.parametrize(
    ("model", "dtype", "attention"),
    [
        ("llama", "bfloat16", "eager"),
        ("helium", "float16", "sdpa"),
        ("stablelm parallel", "bfloat16", "sdpa"),
        ("arcee", "float32", "eager"),
    ],
)
def test_a_right_backward_pass_holds_and_its_errors_are_those_that_are_predicted(
    model: str, dtype: str, attention: str
) -> None:
    """A padded batch in two micro-batches: the padding, labels that do not count, accumulation, tied weights."""
    report = checked(model, dtype, attention)
    assert report.verdict == "holds", (report.first_failure, report.unseen, report.unsaid)
    gradients = [tap for tap in report.taps if tap.name.startswith("grad:")]
    parameters = [tap for tap in gradients if tap.name.endswith((".weight", ".bias"))]
    ours, _ = pair(model, 2, dtype, attention)
    assert len(parameters) == len(ours.weights.shapes)
    assert len(gradients) - len(parameters) == sum(  # all values but scores and weights, which are inside
        not tap.name.startswith("grad:") and not tap.name.endswith((".probs", ".scores")) for tap in report.taps
    )
    pooled = np.sqrt(np.mean([tap.end_to_end.ratio**2 for tap in parameters]))
    assert 0.8 < pooled < 1.2
    assert all(tap.isolated is not None and tap.isolated.ratio < 1.8 for tap in gradients)


def test_gradients_of_whole_models_are_the_same_bits_but_for_the_order_of_sums() -> None:
    """The definitions in bfloat16, given what Transformers has, give what it gives."""
    report = checked("llama", "bfloat16", "eager", micro_batches=False)
    off = [tap.isolated.misrounded for tap in report.taps if tap.isolated is not None]
    assert max(off) < 0.01
    assert np.mean(off) < 1e-3


BUGS = [
    "input_layernorm: its correction term is missing",
    "mlp.down_proj: the saved input was overwritten",
    "self_attn.o_proj: dx is off by 1 %",
    "silu: a term of its slope is missing",
    "rope: turned on, not back",
    "attention: the softmax's correction is missing",
    "attention: dk of the first head of a group",
    "embedding: the last place of a token wins",
    "tied: one of two uses counted",
    "loss: labels that do not count are counted",
    "loss: a mean for every micro-batch",
    "accumulation: overwritten",
    "checkpointing: up_proj is another when it is made again",
    "a frozen tensor learns",
]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_named_at_its_operator(bug: str) -> None:
    mutant = next(mutant for mutant in catalogue() if mutant.name == bug)
    ours, theirs = pair("helium", 2, "bfloat16", "eager")
    candidate = TransformersCandidate(theirs, "eager")
    inputs = inputs_of(ours, candidate, 0, micro_batches=True)
    found = found_of(mutant, ours, candidate, inputs, None)
    assert found.right, found.reported


def small_trace(model: str = "llama") -> tuple[Any, Trace]:
    ours, theirs = pair(model, 2, "bfloat16", "eager")
    candidate = TransformersCandidate(theirs, "eager")
    return ours, record(candidate, ours, inputs_of(ours, candidate, 1, micro_batches=False))


def test_what_was_not_shown_is_said_and_is_no_pass() -> None:
    ours, trace = small_trace()
    del trace.gradients["grad:model.layers.0.mlp.up_proj.weight"]
    report = judge(ours, trace, Asked(POLICIES["eager"]))
    assert report.verdict == "incomplete"
    assert any("up_proj.weight: never shown" in said for said in report.unseen)


def test_of_tensors_alone_no_operator_is_judged_alone() -> None:
    """End to end a factor of 1.01 is within the errors of bfloat16, and the verdict says that it would hold."""
    ours, trace = small_trace()
    trace.gradients = {n: g for n, g in trace.gradients.items() if n.endswith((".weight", ".bias"))}
    report = judge(ours, trace, Asked(POLICIES["eager"]))
    assert report.verdict == "incomplete"
    assert any("no operator was judged alone" in said for said in report.unseen)
    scaled = {n: g * np.float32(3) for n, g in trace.gradients.items()}
    trace.gradients = scaled
    assert judge(ours, trace, Asked(POLICIES["eager"])).verdict == "fails"


ANSWERS = {
    "zeros": np.zeros_like,
    "another sign": np.negative,
    "times 1.01": lambda g: g * np.float32(1.01),
    "rows": lambda g: np.roll(g, 1, axis=-2 if g.ndim > 1 else -1),
    "a tile": lambda g: np.where(np.arange(g.shape[-1]) < g.shape[-1] * 7 // 8, g, 0).astype(np.float32),
}
APART = (
    (".weight", ".bias"),
    ("lm_head", ".act", ".context", ".input_layernorm", ".post_attention_layernorm", "model.layers.0"),
    ("model.norm", "_rope", ".v_proj", "gate_proj", "up_proj", "residual_mid", "embed_tokens"),
)
"""Gradients that do not follow from each other: each is judged on what is right."""


@pytest.mark.parametrize("answer", ANSWERS)
def test_trivial_wrong_gradients_fail_at_every_gradient(answer: str) -> None:
    ours, right = small_trace()
    tables = RotaryEmbedding(ours.config, exact=False).tables(right.inputs.positions)
    policy = POLICIES["eager"]
    for ends in APART:
        wrong = {name for name in right.gradients if name.endswith(ends)}
        changed = {n: ANSWERS[answer](g) if n in wrong else g for n, g in right.gradients.items()}
        trace = replace(right, gradients=changed)
        taps = judge_alone(ours, trace, Asked(policy), tables_on_grid(*tables, "bfloat16", True), policy)
        assert wrong - {tap.name for tap in taps if tap.defect_here} == set()


def test_rows_without_a_key_learn_as_the_eager_forward_pass_has_them() -> None:
    """A label that padding predicts: eager attention averages all values there, and its gradient goes through that."""
    for attention in ("eager", "sdpa"):
        ours, theirs = pair("llama", 2, "float32", attention)
        candidate = TransformersCandidate(theirs, attention)
        inputs = inputs_of(ours, candidate, 0, micro_batches=True)
        ids = np.where(inputs.mask == 1, inputs.input_ids, -100)
        learning = inputs.learning
        assert learning is not None
        inputs = replace(inputs, learning=replace(learning, labels=ids, micro_batches=1))
        report = judge(ours, record(candidate, ours, inputs), Asked(POLICIES[attention]))
        assert report.verdict == "holds", (attention, report.first_failure)


def test_candidates_without_a_backward_pass_are_refused_in_a_sentence() -> None:
    class Forward:
        name, dtype, details, takes = "port", "float32", {}, ("batch",)

        def run(self, inputs: Inputs, sink: Any) -> None: ...

    with pytest.raises(InputError, match="it shows no gradients; --backward takes Transformers' models"):
        must_show_gradients(Forward())
    ours, _ = pair("llama", 2, "float32", "eager")
    with pytest.raises(InputError, match="--frozen nothing is the name of no tensor"):
        with_labels(Inputs(np.ones((1, 4), int)), ours, Forward(), ["nothing"])


class Port(torch.nn.Module):
    """A module of somebody's own, whose values are found by the names of its parts."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return self.inner(input_ids, attention_mask, position_ids, use_cache=False).logits


def embedded(dtype: str) -> tuple[str, Any]:
    import transformers

    folder = golden.checkpoints()["llama-tiny"]
    how = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder, **how)


def test_a_torch_module_shows_its_gradients_and_a_wrong_one_is_named() -> None:
    folder, inner = embedded("bfloat16")
    ids = np.arange(5, 29)[None]
    reports = compare(folder, Port(inner), input_ids=ids, dtype="bfloat16", backward=True, isolate=False)
    assert [report.verdict for report in reports] == ["holds", "holds"]
    assert any("backward (" in str(habit) for habit in reports[0].habits)
    mutant = next(m for m in catalogue() if m.name == "mlp.up_proj: a tile of dW is missing")
    with mutant.plant(inner, 1):
        wrong = compare(folder, Port(inner), input_ids=ids, dtype="bfloat16", backward=True, isolate=False)[0]
    assert wrong.first_failure is not None
    assert wrong.first_failure.name == "grad:model.layers.1.mlp.up_proj.weight"
    json.dumps(wrong.to_dict())
    html = render([wrong])
    assert "dW = dy^T x" in html


def test_a_function_returns_gradients() -> None:
    """Of tensors alone, in float32: nothing is judged alone, a wrong one fails end to end, and it is said."""
    folder = golden.checkpoints()["arcee-tiny"]

    def own(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any, *, labels: Any = None) -> Any:
        import refllm

        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        model = refllm.load(checkpoint)
        if labels is None:
            return tap("model.embed_tokens", model.weights.rows("embed_tokens.weight", ids))
        gradients = model.gradients(**given, labels=labels).gradients
        return model(**given).logits, gradients | {"model.norm.weight": factor * gradients["model.norm.weight"]}

    found = []
    for factor in (1.0, 1.2):  # noqa: B007
        report = compare(folder, own, input_ids=np.arange(5, 17)[None], backward=True, dtype="float32")[0]
        found.append((report.verdict, report.first_failure and report.first_failure.name))
        assert any("no operator was judged alone" in said for said in report.unseen)
    assert found == [("incomplete", None), ("fails", "grad:model.norm.weight")]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["refllm", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(str(ended.value.code))


def test_the_command_judges_gradients_and_refuses_what_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The reference itself, in float16: every value and tensor, in a JSON that is as its schema says."""
    folder, ids = golden.checkpoints()["helium-tiny"], ["--ids", ",".join(map(str, range(5, 21)))]
    file = tmp_path / "found.json"
    how = ["--candidate", "numpy", "--dtype", "float16", "--backward", "--json", str(file)]
    assert command(monkeypatch, folder, *how, *ids) in (0, 1)
    found = json.loads(file.read_text())
    jsonschema.validate(found, json.loads((ROOT / "docs" / "schema" / "check.json").read_text()))
    assert "fails" not in {report["verdict"] for report in found["reports"]}
    names = [tap["name"] for tap in found["reports"][0]["taps"]]
    assert names.index("lm_head") < names.index("grad:lm_head") < names.index("grad:model.layers.0.mlp.act")
    capsys.readouterr()
    assert command(monkeypatch, folder, "--candidate", "torch", "--backward", *ids) == 2
    assert "are not checked so yet" in capsys.readouterr().err
    assert command(monkeypatch, folder, "--frozen", "lm_head.weight", *ids) == 2
    assert "use it with --backward" in capsys.readouterr().err


def test_heads_learn_too_and_a_loss_in_the_format_itself_is_refused() -> None:
    for head, labels in (("token_classification", 5), ("question_answering", 2)):
        flags = {"num_labels": labels, "pad_token_id": 3}
        ours = build(model_class("arcee", head), small_config("arcee", **flags), 7, dtype="float32")
        candidate = TransformersCandidate(to_torch(ours, dtype="float32", attention="eager"), "eager")
        inputs = inputs_of(ours, candidate, 0, micro_batches=True)
        assert judge(ours, record(candidate, ours, inputs), Asked(POLICIES["eager"])).verdict == "holds"
    candidate.dtype = "bfloat16"
    with pytest.raises(InputError, match="the loss of question_answering is computed in bfloat16 itself"):
        with_labels(Inputs(np.ones((1, 4), int)), ours, candidate)
