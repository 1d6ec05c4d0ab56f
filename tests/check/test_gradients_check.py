"""`refllm check --backward`: right backward passes hold, planted ones are named, and what was not seen is said."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from refllm.check.adapters.transformers import TransformersCandidate
from refllm.check.asked import Asked
from refllm.check.backward import judge_alone, tables_on_grid
from refllm.check.candidates import record
from refllm.check.inputs import Inputs
from refllm.check.learning import must_show_gradients, with_labels
from refllm.check.oracle import Report, judge
from refllm.check.trace import Trace
from refllm.errors import InputError
from refllm.forward.rotary import RotaryEmbedding
from refllm.mutants.gradient_runs import POLICIES, found_of, inputs_of, pair
from refllm.mutants.gradients import catalogue

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


@pytest.mark.parametrize("answer", ["zeros", "sign", "factor", "rows", "tile"])
def test_trivial_wrong_gradients_fail_at_every_gradient(answer: str) -> None:
    """Power: each gradient of a right run is made wrong, and has to fail there."""
    change = {
        "zeros": np.zeros_like,
        "sign": np.negative,
        "factor": lambda g: g * np.float32(1.02),
        "rows": lambda g: np.roll(g, 1, axis=-2 if g.ndim > 1 else -1),
        "tile": lambda g: np.where(np.arange(g.shape[-1]) < g.shape[-1] * 7 // 8, g, 0).astype(np.float32),
    }[answer]
    ours, trace = small_trace()
    trace.gradients = {name: change(gradient) for name, gradient in trace.gradients.items()}
    tables = RotaryEmbedding(ours.config, exact=False).tables(trace.inputs.positions)
    policy = POLICIES["eager"]
    taps = judge_alone(ours, trace, Asked(policy), tables_on_grid(*tables, "bfloat16", True), policy)
    # A residual sum hands on what it is given: two wrong gradients that are alike belong together.
    alike = ("o_proj", "down_proj", "q_rope", "k_rope")
    held = [tap.name for tap in taps if not tap.broken and not tap.name.endswith(alike)]
    linear = answer in ("zeros", "sign", "factor")  # then what follows from a wrong gradient is wrong alike
    assert len(held) <= (len(taps) if linear else len(taps) // 4), held
    assert taps[0].name == "grad:lm_head"
    assert taps[0].broken


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
