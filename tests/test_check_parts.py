"""What `check` is made of: distances in ulp, next tokens, answers that would pass, and the taps before a finding."""

from pathlib import Path

import numpy as np
import pytest

import refllm
from refllm import golden
from refllm.check import findings, limits
from refllm.check.candidates import ReferenceCandidate, record
from refllm.check.inputs import Inputs
from refllm.check.measure import ulp_histogram
from refllm.check.next_tokens import compare_tokens
from refllm.check.oracle import Report, judge
from refllm.check.second_opinion import honest_ratios
from refllm.check.taps import as_array
from refllm.precision import HF_EAGER

# -- next tokens -------------------------------------------------------------------------------------------------------


def tokens(exact: list[list[float]], candidate: list[list[float]], variance: float = 0.01) -> object:
    exact_NV, candidate_NV = np.array(exact), np.array(candidate, np.float32)
    at_N2 = np.stack([np.zeros(len(exact), int), np.arange(len(exact))], axis=1)
    return compare_tokens(exact_NV, np.full(exact_NV.shape, variance), candidate_NV, at_N2)


def test_the_divergence_told_is_that_of_the_two_distributions() -> None:
    """Of logits [0, 1] and [1, 0]: p log(p / q) with p = 1 / (1 + e) and its complement is tanh(1/2)."""
    found = tokens([[0.0, 1.0]], [[1.0, 0.0]])
    assert found.kl == pytest.approx(np.tanh(0.5), rel=1e-12)  # 0.4621
    assert found.kl_error == 0
    two = tokens([[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    assert two.kl == pytest.approx(np.tanh(0.5) / 2, rel=1e-12)
    assert two.kl_error == pytest.approx(np.tanh(0.5) / 2, rel=1e-12)  # std([k, 0], ddof 1) / sqrt(2)


def test_the_divergence_of_the_same_logits_is_zero_also_where_a_token_is_impossible() -> None:
    logits = [[0.0, 1.0, -np.inf], [3.0, 2.0, 1.0]]
    assert tokens(logits, logits).kl == 0


def test_the_divergence_predicted_is_half_the_variance_of_the_logits_that_count() -> None:
    """Second order: sum p v - sum p^2 v, halved; one logit more or less for all moves no distribution."""
    p = np.array([1, np.e]) / (1 + np.e)
    assert tokens([[0.0, 1.0]], [[0.0, 1.0]]).kl_predicted == pytest.approx(0.01 * (1 - (p**2).sum()) / 2)


def test_a_flip_is_told_with_its_margin_in_sigmas_of_the_two_logits() -> None:
    found = tokens([[0.0, 1.0], [0.0, 1.0], [5.0, 0.0]], [[0.0, 1.0], [1.0, 0.0], [4.0, 0.0]])
    (flip,) = found.flips
    assert (flip.row, flip.position, flip.exact, flip.candidate, flip.margin) == (0, 1, 1, 0, 1.0)
    assert flip.sigmas == pytest.approx(1 / np.sqrt(0.02))
    assert found.defects == [flip]


# -- measures ----------------------------------------------------------------------------------------------------------


def test_distances_in_ulp_are_counted_where_they_are_finite() -> None:
    one = np.array([1.0, 1.0])
    assert ulp_histogram(np.array([np.inf, 1.0]), one, "float32") == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert ulp_histogram(np.array([np.nan, np.nan]), one, "float32") == [0] * 9


def test_each_distance_in_ulp_is_counted_in_its_bin() -> None:
    """A distance at an edge belongs to the bin above, but for what is farthest."""
    distances = [0, 0.25, 0.75, 1.25, 2, 4, 8, 16, 100]
    candidate = 1 + np.array(distances) * 2.0**-23
    assert ulp_histogram(candidate, np.ones(9), "float32") == [1] * 9
    assert ulp_histogram(1 + np.array(distances) * 2.0**-7, np.ones(9), "bfloat16") == [1] * 9


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16"])
def test_a_value_is_copied_and_held_in_float32_at_least(dtype: str) -> None:
    value = np.arange(3).astype(dtype)
    held = as_array(value)
    assert held.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert held.tolist() == [0, 1, 2]
    held[0] = 7
    assert value[0] == 0


# -- answers that would pass -------------------------------------------------------------------------------------------

WRONG = ["zeros", "rows in another order", "the mean", "times 1.01", "a missing tile"]


def every_so_many(step: int, positions: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that are 0 at every multiple of `step`, and a predicted error so large that no wrong answer shows."""
    exact = np.random.default_rng(0).normal(size=(positions, width))
    exact[::step] = 0
    return exact, np.full(exact.shape, 1e6)


def test_of_few_values_every_position_is_asked() -> None:
    exact, variance = every_so_many(2, 128, 8)
    assert limits.undetected(exact, variance, "float32") == WRONG


def test_of_many_values_64_positions_are_asked() -> None:
    exact, variance = every_so_many(3, 130, (1 << 20) // 130 + 1)
    assert limits.undetected(exact, variance, "float32") == []


# -- an honest run -----------------------------------------------------------------------------------------------------


def test_an_honest_run_has_the_error_that_is_predicted(report: Report) -> None:
    """Its error over the prediction is about 1 in every value, not 0; and only for the values that are asked for."""
    model = refllm.load(golden.path("llama-tiny"), dtype="bfloat16")
    inputs = Inputs(np.random.default_rng(1).integers(5, model.config.vocab_size, (1, 8)))
    asked = {tap.name: tap.end_to_end for tap in report.taps if tap.end_to_end.rms_sigma}
    found = honest_ratios(model, inputs, "bfloat16", HF_EAGER, asked)
    assert found.keys() == asked.keys()
    assert all(0.3 < ratio < 2 for ratio in found.values()), found
    assert np.median(list(found.values())) == pytest.approx(1, abs=0.2)
    last = {"lm_head": asked["lm_head"]}
    assert honest_ratios(model, inputs, "bfloat16", HF_EAGER, last).keys() == last.keys()


# -- sentences ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> Report:
    model = refllm.load(Path(golden.path("llama-tiny")), dtype="bfloat16", policy="hf-eager")
    exact = refllm.load(Path(golden.path("llama-tiny")), dtype="bfloat16")
    ids = np.random.default_rng(1).integers(5, model.config.vocab_size, (1, 8))
    return judge(exact, record(ReferenceCandidate(model), exact, Inputs(ids)), HF_EAGER)


def test_what_comes_before_a_value_is_its_layer_up_to_it_or_the_layer_before(report: Report) -> None:
    """Never the value itself: it is said to be innocent."""
    last: list[str] = []
    groups = findings.groups(report)
    assert len(groups) > 3
    for group in groups:
        names = [tap.name for tap in group.taps]
        for i, tap in enumerate(group.taps):
            assert [other.name for other in findings.before(report, tap)] == (names[:i] or last)
        last = names
