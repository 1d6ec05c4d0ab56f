"""The oracle: predicted errors are those of a Monte Carlo run, legitimate runs hold, and defects are named."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from refllm import golden, ops
from refllm.accuracy import propagation as propagating
from refllm.accuracy.measure import measure
from refllm.accuracy.page import rotary_tables
from refllm.accuracy.propagation import Propagation, Uncertain, certain, ulp
from refllm.accuracy.wrong_answers import undetected, wrong_answers
from refllm.check.inputs import Inputs, stressed
from refllm.check.losses import MUTANTS as LOSS_MUTANTS
from refllm.check.losses import compare_loss, correct
from refllm.check.oracle import Report, TapReport, judge
from refllm.check.trace import Trace
from refllm.golden.model_cases import config_of
from refllm.mutants.models import Mutant, catalogue
from refllm.mutants.validation import DTYPES, TOKENS, Pair
from refllm.precision import FUSED, HF_EAGER, HF_SDPA, Policy, arithmetic, round_bfloat16

CHECKPOINTS = {name: Path(path) for name, path in golden.checkpoints().items()}
MUTANTS = {mutant.name: mutant for mutant in catalogue()}

# ------------------------------------------------------------------------------------------------ variance propagation


def uncertain(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Uncertain:
    """Random values with random small variances."""
    value = rng.standard_normal(shape) * scale
    return Uncertain(value, (1e-4 * scale * rng.uniform(0.2, 2, shape)).astype(np.float32) ** 2)


def no_rounding() -> Policy:
    """Nothing is rounded, so that what comes out is what the inputs hand on."""
    return replace(FUSED, name="none", points=frozenset())


def propagation(dtype: str = "bfloat16", policy: Policy | None = None) -> Propagation:
    return Propagation(dtype, policy or no_rounding(), lambda name, x: x, wants=lambda name: True)


def monte_carlo(function: Callable[..., np.ndarray], inputs: list[Uncertain], runs: int = 2000) -> np.ndarray:
    """Variance of function(inputs + noise of their variances)."""
    rng = np.random.default_rng(7)
    outs = [function(*(x.value + rng.standard_normal(x.shape) * x.sigma for x in inputs)) for _ in range(runs)]
    return np.var(outs, axis=0)


W = np.random.default_rng(1).standard_normal
WEIGHT, NORM, BIAS = W((6, 8)), 1 + 0.3 * W(8), 0.3 * W(8)
ANGLES = np.random.default_rng(2).uniform(0, 6, (1, 5, 2))
COS, SIN = certain(np.cos(ANGLES)), certain(np.sin(ANGLES))


def rotated(x: np.ndarray, interleaved: bool) -> np.ndarray:
    return ops.rope(x, x, COS.value, SIN.value, interleaved=interleaved)[0]


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "linear": (lambda op, x: op.linear(x, WEIGHT, None), lambda x: ops.linear(x, WEIGHT), [(1, 5, 8)]),
    "add": (lambda op, x, y: op.add(x, y), lambda x, y: x + y, [(1, 5, 8), (1, 5, 8)]),
    "rms_norm": (lambda op, x: op.rms_norm(x, NORM, 1e-5), lambda x: ops.rms_norm(x, NORM, 1e-5), [(1, 5, 8)]),
    "layer_norm": (
        lambda op, x: op.layer_norm(x, NORM, BIAS, 1e-5),
        lambda x: ops.layer_norm(x, NORM, BIAS, 1e-5),
        [(1, 5, 8)],
    ),
    "rope, half-split": (
        lambda op, x: op.rope(x, x, COS, SIN, interleaved=False)[0],
        lambda x: rotated(x, False),
        [(1, 2, 5, 6)],
    ),
    "rope, interleaved": (
        lambda op, x: op.rope(x, x, COS, SIN, interleaved=True)[0],
        lambda x: rotated(x, True),
        [(1, 2, 5, 6)],
    ),
    "attention": (
        lambda op, q, k, v: op.attention(q, k, v, causal=True),
        lambda q, k, v: ops.attention(q, k, v),
        [(1, 4, 5, 6), (1, 2, 5, 6), (1, 2, 5, 6)],
    ),
    "glu": (lambda op, g, u: op.glu(g, u, "silu"), lambda g, u: ops.glu(g, u, "silu"), [(1, 5, 8), (1, 5, 8)]),
    "relu2": (lambda op, x: op.activation(x, "relu2"), lambda x: ops.relu2(x), [(1, 5, 8)]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_variance_handed_on_is_that_of_a_monte_carlo_run(name: str) -> None:
    predicted, function, shapes = OPERATORS[name]
    rng = np.random.default_rng(3)
    inputs = [uncertain(rng, *shape) for shape in shapes]
    out = predicted(propagation(), *inputs)
    np.testing.assert_allclose(out.value, function(*(x.value for x in inputs)), rtol=1e-12, atol=1e-12)
    measured = monte_carlo(function, inputs)
    assert np.sqrt(measured.mean() / out.variance.mean()) == pytest.approx(1, abs=0.04)
    rows = measured.reshape(-1, measured.shape[-1]).mean(-1) / out.variance.reshape(-1, out.shape[-1]).mean(-1)
    # Heads that share keys see the same errors of k and v, row by row; every row is still predicted.
    assert np.all((rows > 0.8) & (rows < 1.25))


def emulated(function: Callable[..., Any], dtype: str, policy: Policy, inputs: list[np.ndarray]) -> np.ndarray:
    return np.asarray(function(*inputs, ar=arithmetic(dtype, replace(policy, torch_order=False))))


@pytest.mark.parametrize("policy", [HF_EAGER, HF_SDPA, FUSED], ids=lambda policy: policy.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_variance_added_is_that_of_the_rounding_points(policy: Policy, dtype: str) -> None:
    """Each operator alone, on inputs that are exact: its emulation errs as predicted."""
    rng = np.random.default_rng(4)
    onto = round_bfloat16 if dtype == "bfloat16" else (lambda x: x.astype(np.float16).astype(np.float32))

    def exact(*shape: int) -> Uncertain:
        return certain(onto(rng.standard_normal(shape).astype(np.float32)))

    op = propagation(dtype, policy)
    x, y = exact(1, 40, 64), exact(1, 40, 64)
    q, k, v = exact(1, 4, 40, 16), exact(1, 2, 40, 16), exact(1, 2, 40, 16)
    weight, norm = onto(W((48, 64)).astype(np.float32) / 8), onto((1 + 0.3 * W(64)).astype(np.float32))
    cases = {
        "linear": (op.linear(x, weight), lambda a, ar: ops.linear(a, weight, ar=ar), [x]),
        "add": (op.add(x, y), lambda a, b, ar: ops.add(a, b, ar=ar), [x, y]),
        "rms_norm": (op.rms_norm(x, norm, 1e-5), lambda a, ar: ops.rms_norm(a, norm, 1e-5, ar=ar), [x]),
        "glu": (op.glu(x, y, "silu"), lambda a, b, ar: ops.glu(a, b, "silu", ar=ar), [x, y]),
        "attention": (op.attention(q, k, v), lambda a, b, c, ar: ops.attention(a, b, c, ar=ar), [q, k, v]),
    }
    for name, (out, function, inputs) in cases.items():
        found = emulated(function, dtype, policy, [np.float32(a.value) for a in inputs])
        ratio = measure(found[0], out.value[0], out.variance[0]).ratio
        # The first queries see few keys: weights of 1 and 1/2 are not rounded at all.
        assert ratio == pytest.approx(1, abs=0.2 if name == "attention" else 0.05), (name, ratio)
        if out.rounded is not None:
            np.testing.assert_array_equal(found, out.rounded, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_weight_is_multiplied_in_blocks_and_none_is_left_out(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)  # of small integers, whose sums are exact in any order
    x = Uncertain(rng.integers(-3, 4, (1, 5, 8)).astype(float), rng.integers(0, 3, (1, 5, 8)).astype(np.float32))
    weight, bias = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((200, 8), (200,)))
    whole = propagation(dtype).linear(x, weight, bias)
    monkeypatch.setattr(propagating, "_AT_ONCE", 1)
    cut = propagation(dtype).linear(x, weight, bias)
    assert np.array_equal(cut.value, x.value @ weight.T + bias)
    assert np.array_equal(cut.value, whole.value)
    assert np.array_equal(cut.variance, whole.variance)


def test_shares_of_the_variance_sum_to_one() -> None:
    pair = opened("llama-tiny", "bfloat16", "eager")
    report = pair.check(Inputs(pair.tokens(0)))
    assert sum(report.attribution.values()) == pytest.approx(1)
    assert min(report.attribution.values()) >= 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_rotary_tables_are_off_by_is_what_they_are_off_by_in_transformers(name: str) -> None:
    """Beside exact tables the error of a float32 run; beside float32 tables less than one rounding. Near and far."""
    model = opened(name, "float32", "eager").candidate.model
    rotary, op, half = model.model.rotary_emb, propagation("float32", FUSED), config_of(name).rotary_dim // 2
    for first in (0, 1000, 30_000):
        positions = np.arange(first, first + 128)[None]
        theirs = rotary(torch.zeros(1, 128, 1), torch.from_numpy(positions))
        exact, float32 = (rotary_tables(op, config_of(name), positions, exact) for exact in (True, False))
        for i in (0, 1):  # cos, sin
            their = theirs[i].double().numpy()[..., :half]
            assert np.sqrt(np.mean((their - exact[i].value) ** 2) / exact[i].variance.mean()) == pytest.approx(
                1, abs=0.1
            )
            assert not float32[i].variance.any()
            one_rounding = np.square(ulp(float32[i].value, "float32")).mean() / 12
            assert np.mean((their - float32[i].value) ** 2) < one_rounding


# ------------------------------------------------------------------------------------------------------ legitimate runs


@functools.cache
def opened(name: str, dtype: str, attention: str) -> Pair:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Pair(CHECKPOINTS[name], dtype, attention)


def tap(report: Report, name: str) -> TapReport:
    return next(tap for tap in report.taps if tap.name == name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_run_without_defect_holds(name: str, dtype: str, attention: str) -> None:
    pair = opened(name, dtype, attention)
    report = pair.check(Inputs(pair.tokens(seed=5)))
    assert report.verdict == "holds", report.first_failure
    ratios = [t.end_to_end.ratio for t in report.taps if t.end_to_end.rms_sigma > 0]
    assert min(ratios) > 0.5
    assert max(ratios) < 1.8


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stressed_runs_without_defect_hold(name: str) -> None:
    pair = opened(name, "bfloat16", "eager")
    kinds = list(stressed(pair.tokens(seed=6)))
    assert len(kinds) == 6
    for inputs in kinds:
        report = pair.check(inputs)
        assert report.verdict == "holds", (inputs.label, report.first_failure)


# -------------------------------------------------------------------------------------------------------------- defects

NAMED = [
    ("RMSNorm for LayerNorm", "stablelm-tiny-parallel"),
    ("norm computed in the narrow format", "helium-tiny"),
    ("rounded after the norm's weight only", "llama-tiny"),
    ("the other pairing of dims", "helium-tiny"),
    ("all dims rotated", "stablelm-tiny-sequential"),
    ("attention factor missing", "arcee-tiny"),
    ("mask one too wide", "llama-tiny"),
    ("key and value heads tiled instead of repeated", "arcee-tiny"),
    ("online softmax without rescaling", "helium-tiny"),
    ("gate and up swapped", "stablelm-tiny-sequential"),
    ("sigmoid rounded inside silu", "helium-tiny"),
    ("relu without the square", "arcee-tiny"),
    ("partial sums rounded", "llama-tiny"),
    ("residual from the normed value", "llama-tiny"),
    ("weight of the q norm used for k", "stablelm-tiny-parallel"),
    ("tied weight ignored", "llama-tiny"),
]


def check_planted(mutant: Mutant, checkpoint: str, layer: int, inputs: Inputs | None = None) -> Report:
    pair = opened(checkpoint, mutant.dtype, mutant.attention)
    with mutant.planted(pair.candidate.model, layer):
        return pair.check(inputs or Inputs(pair.tokens(seed=0)))


@pytest.mark.parametrize(("name", "checkpoint"), NAMED)
def test_a_defect_is_reported_in_its_layer_and_operator(name: str, checkpoint: str) -> None:
    for layer in (0, 1):
        report = check_planted(MUTANTS[name], checkpoint, layer)
        assert report.verdict == "fails"
        assert report.first_failure is not None
        assert report.first_failure.name in MUTANTS[name].reported_at(layer)


def test_values_before_a_defect_hold() -> None:
    report = check_planted(MUTANTS["gate and up swapped"], "llama-tiny", layer=1)
    names = [t.name for t in report.taps]
    before = report.taps[: names.index("model.layers.1.mlp.act")]
    assert len(before) > 20
    assert all(t.verdict == "holds" for t in before)


def test_values_after_a_defect_are_no_defects() -> None:
    """They are over budget end to end, but each operator is right on what it was given."""
    report = check_planted(MUTANTS["gate and up swapped"], "llama-tiny", layer=1)
    assert [t.name for t in report.taps if t.defect_here] == ["model.layers.1.mlp.act"]
    assert "error end to end" in tap(report, "lm_head").broken


def planted_value(pair: Pair, name: str, change: Callable[[Any], None]) -> Report:
    """A run in which the output of a module is changed in place."""
    module = dict(pair.candidate.model.named_modules())[name]

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        out = out.clone()
        change(out)
        return out

    handle = module.register_forward_hook(hook)
    try:
        return pair.check(Inputs(pair.tokens(seed=0)))
    finally:
        handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_reported_with_its_place(value: float) -> None:
    def plant(out: Any) -> None:
        out[0, 17, 5] = value

    report = planted_value(opened("llama-tiny", "bfloat16", "eager"), "model.layers.1.mlp.up_proj", plant)
    first = report.first_failure
    assert first is not None
    assert first.name == "model.layers.1.mlp.up_proj"
    assert "NaN or infinity" in first.broken
    assert first.isolated is not None
    assert (first.isolated.nonfinite, first.isolated.nonfinite_at) == (1, (0, 17, 5))


# ---------------------------------------------------------------------------------------------------------------- power


@functools.cache
def collected(name: str) -> tuple[tuple[str, np.ndarray, np.ndarray], ...]:
    """(name, exact values, variance) of every value, each operator alone."""
    from refllm.check.oracle import predict

    pair = opened(name, "bfloat16", "eager")
    kept = []

    def at(tap_name: str, x: Uncertain) -> Uncertain:
        by_position = (lambda a: a[0]) if x.value.ndim == 3 else (lambda a: a[0].transpose(1, 0, 2))
        kept.append((tap_name, by_position(x.value), by_position(x.variance)))
        return certain(round_bfloat16(np.float32(x.value)))

    predict(pair.model, Inputs(pair.tokens(0)), "bfloat16", HF_EAGER, at)
    return tuple(kept)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trivial_wrong_answers_are_rejected_everywhere(name: str) -> None:
    assert len(collected(name)) > 20
    for tap_name, exact, variance in collected(name):
        assert undetected(exact, variance, "bfloat16") == [], tap_name
        kinds = {kind for kind, _ in wrong_answers(exact)}
        assert kinds == {"zeros", "rows in another order", "the mean", "times 1.01", "a missing tile"}


def test_a_value_on_which_nothing_shows_is_untested_not_passed() -> None:
    """Equal rows, and a factor of 1.01 below the rounding: the report says so."""
    exact = np.ones((4, 8))
    missed = undetected(exact, np.full(exact.shape, 0.1, np.float32) ** 2, "bfloat16")
    assert "times 1.01" in missed
    report = TapReport("x", measure(exact, exact, exact), measure(exact, exact, exact), untested=missed)
    assert report.verdict == "untested"


def test_a_missing_rounding_is_seen_though_the_error_is_smaller() -> None:
    report = check_planted(MUTANTS["rounded after the norm's weight only"], "arcee-tiny", layer=1)
    first = report.first_failure
    assert first is not None
    assert first.isolated is not None
    assert first.broken == ["rounding points"]
    assert first.isolated.ratio < 1


# --------------------------------------------------------------------------------------------------------------- losses


def logits_and_labels(name: str) -> tuple[Any, Any]:
    pair = opened(name, "bfloat16", "eager")
    ids = pair.tokens(seed=0, batch=2)
    labels = np.where(np.random.default_rng(1).random(ids.shape) < 0.2, -100, ids)
    with torch.inference_mode():
        return pair.candidate.model(torch.from_numpy(ids)).logits.float(), torch.from_numpy(labels)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_losses_are_judged_rightly(name: str) -> None:
    logits, labels = logits_and_labels(name)
    for mutant, loss in {"correct": correct, **LOSS_MUTANTS}.items():
        report = compare_loss(logits.numpy(), labels.numpy(), float(loss(logits, labels)))
        assert report.holds == (mutant == "correct"), (mutant, report)


def test_a_trace_is_judged_the_same_from_a_file(tmp_path: Path) -> None:
    from refllm.check.candidates import record

    pair = opened("helium-tiny", "bfloat16", "eager")
    with MUTANTS["sign of sin"].planted(pair.candidate.model, 1):
        trace = record(pair.candidate, pair.model, Inputs(pair.tokens(0, length=TOKENS)))
    trace.save(tmp_path / "t.safetensors")
    ours, theirs = (judge(pair.model, t, HF_EAGER) for t in (trace, Trace.load(tmp_path / "t.safetensors")))
    assert ours.to_dict()["first_failure"] == theirs.to_dict()["first_failure"] == "model.layers.1.self_attn.q_rope"
