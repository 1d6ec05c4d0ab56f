"""What `check` is made of: distances in ulp, next tokens, answers that would pass, and the taps before a finding."""

import math
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refllm
from refllm import golden
from refllm.accuracy import limits
from refllm.accuracy import measure as measuring
from refllm.accuracy.judge import broken, broken_isolated
from refllm.accuracy.limits import ROW_FLOOR
from refllm.accuracy.measure import Measure, measure, ulp_histogram
from refllm.accuracy.verdicts import verdict, worst
from refllm.accuracy.wrong_answers import undetected, wrong_answers
from refllm.check import findings, html
from refllm.check.adapters.transformers import quiet_transformers
from refllm.check.candidates import FunctionCandidate, ReferenceCandidate, record
from refllm.check.error_map import error_map
from refllm.check.inputs import Inputs
from refllm.check.losses import LossReport
from refllm.check.next_tokens import compare_tokens
from refllm.check.oracle import Report, TapReport, judge
from refllm.check.run import load
from refllm.check.second_opinion import honest_ratios
from refllm.check.taps import as_array
from refllm.errors import MissingExtraError
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


def test_every_figure_of_a_measure_on_numbers_worked_out_by_hand() -> None:
    exact = np.array([[[1.0, -1.0], [1.0, 1.0]], [[2.0, 0.0], [-1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])  # [3, 2, 2]
    variance = np.full(exact.shape, 0.25)
    variance[2] = [[0.75, 0.25], [0.25, 0.25]]
    candidate = exact.copy()
    candidate[0, 1, 0] += 3
    candidate[1, 0, 0] -= 1
    found = measure(candidate, exact, variance)
    assert (found.elements, found.shape) == (12, (3, 2, 2))
    assert found.errors == pytest.approx(3.5**2 / (11 * 0.0625 + 0.5625))
    assert found.scale == pytest.approx(np.sqrt(14 / 12))
    assert (found.rms_error, found.rms_sigma) == (pytest.approx(np.sqrt(10 / 12)), pytest.approx(np.sqrt(3.5 / 12)))
    assert found.ratio == pytest.approx(np.sqrt(10 / 3.5))
    assert (found.row, found.row_errors, found.row_ratio) == ((0, 1), 2, pytest.approx(np.sqrt(4.5 / 0.25)))
    assert (found.at, found.largest) == ((0, 1, 0), pytest.approx(6))
    assert found.bias == pytest.approx(2 / np.sqrt(3.5))
    assert found.gain == pytest.approx((3 - 2) / 14)
    assert (found.nonfinite, found.nonfinite_at, found.misrounded, found.honest) == (0, (), 0, 0)


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_the_scatter_of_a_ratio_is_what_other_runs_of_the_same_length_have(shared: float) -> None:
    """Also where the errors of a position have most in common."""
    rng, exact, variance = np.random.default_rng(0), np.ones((12, 16)), np.full((12, 16), 1e-6)
    found = []
    for _ in range(200):
        error = shared * rng.normal(size=(12, 1)) + np.sqrt(1 - shared**2) * rng.normal(size=(12, 16))
        found.append(measure(exact + 1e-3 * error, exact, variance))
    spread = float(np.std([each.ratio for each in found]))
    assert np.sqrt(np.mean([each.scatter**2 for each in found])) == pytest.approx(spread, rel=0.2)
    assert measure(exact[:1] + 1e-3, exact[:1], variance[:1]).scatter == 0


def test_what_is_infinite_on_both_sides_is_no_error_and_on_one_side_has_its_place() -> None:
    exact = np.array([[1.0, np.nan, np.inf], [70000.0, -70000.0, 1.0]])
    variance = np.array([[1.0, np.nan, 1.0], [1.0, 1.0, 1.0]])
    same = np.array([[1.0, np.nan, np.inf], [np.inf, -np.inf, 1.0]])
    found = measure(same, exact, variance, overflow=65504.0)
    assert (found.nonfinite, found.nonfinite_at, found.ratio) == (0, (), 0)
    assert measure(same, exact, variance).nonfinite_at == (1, 0)
    wrong = same.copy()
    wrong[0, 2], wrong[1, 1] = -np.inf, np.inf
    found = measure(wrong, exact, variance, overflow=65504.0)
    assert (found.nonfinite, found.nonfinite_at) == (2, (0, 2))


def test_a_row_that_is_predicted_without_error_is_judged_by_a_part_of_the_whole() -> None:
    exact, variance = np.ones((2, 4)), np.array([[1.0] * 4, [0.0] * 4])
    candidate = exact.copy()
    candidate[1] += 0.1
    found = measure(candidate, exact, variance)
    assert (found.row, found.row_ratio) == ((1,), pytest.approx(0.1 / np.sqrt(ROW_FLOOR * 0.5)))
    assert found.row_errors == 4
    assert measure(candidate, exact, np.zeros((2, 4))).ratio == np.inf
    assert measure(exact, exact, np.zeros((2, 4))).ratio == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_limits_grow_with_chance_alone(dtype: str) -> None:
    """Five standard deviations of the rms of so many errors, each 1 / sqrt(2 n)."""
    some = measured(np.zeros((4, 16)))
    assert limits.isolated_limit(some, dtype) == pytest.approx(limits.ISOLATED[dtype] + 5 / np.sqrt(128))
    assert limits.row_limit(some, dtype) == pytest.approx(limits.ROW[dtype] + 5 / np.sqrt(32))
    assert limits.end_to_end_limit(some) == pytest.approx(2 + 5 / np.sqrt(128))
    assert limits.end_to_end_limit(replace(some, honest=0.5)) == limits.end_to_end_limit(some)
    assert limits.end_to_end_limit(replace(some, honest=3)) == pytest.approx(6 + 5 / np.sqrt(128))
    honest = replace(some, honest=3)  # what an honest run has multiplies the rest as well: a golden's inputs are fixed
    assert limits.isolated_limit(honest, dtype) == pytest.approx(3 * limits.ISOLATED[dtype] + 5 / np.sqrt(128))
    assert limits.row_limit(honest, dtype) == pytest.approx(3 * limits.ROW[dtype] + 5 / np.sqrt(32))
    assert limits.golden_element_limit(honest) == 3 * limits.golden_element_limit(some)
    assert limits.misrounded_limit(some.elements) == pytest.approx(0.01 + 2 / 64)
    for field, rule in (("ratio", "error"), ("row_ratio", "one row"), ("misrounded", "rounding points")):
        assert broken_isolated(replace(some, **{field: 50.0}), dtype) == [rule]
    assert broken_isolated(some, dtype) == []
    assert broken(replace(some, nonfinite=1), None, dtype) == ["NaN or infinity"]
    assert broken(replace(some, nonfinite=1), replace(some, nonfinite=1), dtype) == ["NaN or infinity"]
    assert broken(replace(some, ratio=9.0), some, dtype) == ["error end to end"]


def test_distances_in_ulp_are_counted_where_they_are_finite() -> None:
    one = np.array([1.0, 1.0])
    assert ulp_histogram(np.array([np.inf, 1.0]), one, "float32") == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert ulp_histogram(np.array([np.nan, np.nan]), one, "float32") == [0] * 9


def test_each_distance_in_ulp_is_counted_in_its_bin() -> None:
    """A distance at an edge belongs to the bin below: what is 1 ulp off is not over 1 ulp."""
    distances = [0, 0.25, 0.75, 1.25, 2, 4, 8, 16, 100]
    edges = 1 + np.array([0.5, 1, 1.5, 2.5, 4.5, 8.5, 16.5]) * 2.0**-7
    assert ulp_histogram(edges, np.ones(7), "bfloat16") == [0, *[1] * 7, 0]
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
    assert undetected(exact, variance, "float32") == WRONG


def test_of_many_values_64_positions_are_asked() -> None:
    exact, variance = every_so_many(3, 130, (1 << 20) // 130 + 1)
    assert undetected(exact, variance, "float32") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_answer_is_rejected_by_its_size_only_if_the_rules_reject_it(dtype: str) -> None:
    """Of values with few independent errors, where chance allows the most, and errors of every size."""
    draw, told = np.random.default_rng(0), list[str]()
    for _ in range(200):
        exact = draw.normal(size=draw.integers(1, [4, 9]))
        variance = np.exp(draw.normal(draw.uniform(-9, 3), draw.choice([0, 3]), exact.shape))
        variance[draw.random(exact.shape) < 0.1] = draw.choice([0.0, np.inf])
        passed = [
            name
            for name, wrong in wrong_answers(exact)
            if not np.array_equal(wrong, exact) and not broken_isolated(measure(wrong, exact, variance), dtype)
        ]
        assert undetected(exact, variance, dtype) == passed
        told += passed
    assert {told.count(name) > 10 for name in WRONG} == {True}


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


# -- padding -----------------------------------------------------------------------------------------------------------


def test_what_stands_at_padding_is_not_judged() -> None:
    """Scores against keys of padding neither: nobody attends to them. And what stands elsewhere is."""
    exact = refllm.load(golden.path("llama-tiny"), dtype="bfloat16")
    model = refllm.load(golden.path("llama-tiny"), dtype="bfloat16", policy="hf-eager")
    ids = np.random.default_rng(1).integers(5, exact.config.vocab_size, (2, 8))
    mask = np.array([[1] * 8, [0] * 3 + [1] * 5])
    trace = record(ReferenceCandidate(model), exact, Inputs(ids, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)))
    scores = [name for name in trace.taps if name.endswith(".scores")]
    assert scores
    for name, value in trace.taps.items():
        at = (1, slice(None), slice(3)) if value.ndim == 4 else (1, slice(3))
        value[at] = 1e4
        if name in scores:
            value[1, ..., :3] = 1e4
    assert {tap.verdict for tap in judge(exact, trace, HF_EAGER).taps} <= {"holds", "untested"}
    trace.taps[scores[0]][1, 0, 7, 4] = 1e4
    assert [tap.name for tap in judge(exact, trace, HF_EAGER).taps if tap.defect_here] == [scores[0]]


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


def measured(error: np.ndarray, **changed: Any) -> Measure:
    """Of an error, over values of size 1 and a predicted sigma of 1."""
    exact = np.sign(np.random.default_rng(3).normal(size=error.shape))
    places = {"row": (0, 0), "at": (0, 0, 0)}  # with the batch row, as the judge tells them
    return replace(measure(exact + error, exact, np.ones(error.shape)), **(places | changed))


def tap_of(isolated: Measure | None, name: str = "model.layers.0.mlp.act", **end_to_end: Any) -> TapReport:
    calm = measured(np.zeros((4, 16)))
    return TapReport(name, replace(calm, **end_to_end), isolated=isolated, dtype="bfloat16")


def test_every_broken_rule_has_its_sentence_with_figure_and_limit() -> None:
    calm = measured(np.zeros((4, 16)))
    cases = {
        "3 of 64 elements are NaN or infinite on one side only, first at position 2, channel 5": tap_of(
            replace(calm, nonfinite=3, nonfinite_at=(0, 2, 5))
        ),
        "1 of 64 elements is NaN or infinite on one side only, first at sequence 1, position 2, channel 5": tap_of(
            None, nonfinite=1, nonfinite_at=(1, 2, 5)
        ),
        "on its own inputs the error is 370 sigma (limit 1.69)": tap_of(replace(calm, ratio=370.0)),
        "worst row on its own inputs: position 3, head 1, 9.10 sigma (limit 3.88)": tap_of(
            replace(calm, row_ratio=9.1, row=(0, 3, 1))
        ),
        "20% of its elements are not what the policy's rounding points give (limit 4.1%): a rounding too many, or one "
        "that is missing": tap_of(replace(calm, misrounded=0.2)),
        "end to end the error is 5.00 sigma (limit 2.44)": tap_of(None, ratio=5.0),
        "end to end the error is 7.00 sigma (limit 6.44; an honest run has 3.00)": tap_of(None, ratio=7.0, honest=3.0),
    }
    for sentence, tap in cases.items():
        assert findings.broken_in_words(tap) == [sentence]
        assert tap.verdict == "fails"
    assert findings.broken_in_words(tap_of(calm)) == []


def test_only_what_is_wrong_on_its_own_inputs_has_a_peculiarity_told() -> None:
    wrong = measured(np.ones((4, 16)), ratio=9.0, largest=5.0, at=(0, 2, 3))
    assert findings.hints(tap_of(wrong))[0] == "largest single error: position 2, channel 3, 5.00 sigma"
    for tap in (tap_of(None, ratio=9.0), tap_of(measured(np.zeros((4, 16)), misrounded=0.2))):
        assert tap.verdict == "fails"
        assert findings.hints(tap) == []


def test_severity_is_error_over_limit_of_the_worst_rule() -> None:
    calm = measured(np.zeros((4, 16)))
    assert findings.isolated_severity(tap_of(None)) == 0
    assert findings.isolated_severity(tap_of(replace(calm, nonfinite=1))) == math.inf
    assert findings.end_to_end_severity(tap_of(None, nonfinite=1)) == math.inf
    for name, limit in (
        ("ratio", limits.isolated_limit(calm, "bfloat16")),
        ("row_ratio", limits.row_limit(calm, "bfloat16")),
        ("misrounded", limits.misrounded_limit(calm.elements)),
    ):
        assert findings.isolated_severity(tap_of(replace(calm, **{name: 3 * limit}))) == pytest.approx(3)
    assert findings.end_to_end_severity(tap_of(None, ratio=5.0)) == pytest.approx(5 / limits.end_to_end_limit(calm))
    wrong, late = tap_of(replace(calm, ratio=2.0)), tap_of(None, ratio=1e6)
    assert max([late, wrong, tap_of(calm)], key=findings.severity) is wrong
    assert max([late, tap_of(calm)], key=findings.severity) is late


def test_the_character_of_an_error_is_a_factor_a_sign_or_nothing() -> None:
    exact = np.sign(np.random.default_rng(3).normal(size=(40, 100)))
    noise = 3 * np.random.default_rng(4).normal(size=exact.shape)
    assert findings._character(measured(-exact)) == ["it is zero, or nearly"]
    (said,) = findings._character(measured(np.roll(exact, 1, axis=0) - exact + noise / 10, gain=-0.95))
    assert said.startswith("it has next to nothing in common")
    (said,) = findings._character(measured(0.5 * exact + noise / 100))
    assert said == "a common factor of 1.5 explains 100% of the squared error"
    (said,) = findings._character(measured(noise / 10 + 0.2))
    assert said.startswith("the error has a sign: its mean is 1")
    assert findings._character(measured(noise)) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0], " 0 of 16"),
        ([3], " 3 of 16"),
        ([0, 1, 2], "s 0-2 of 16"),
        ([0, 2, 3], "s 0 and 2-3 of 16"),
        ([0, 2, 4], "s 0 and 2 and 4 of 16"),
        ([0, 2, 4, 15], "s 0 and 2 and 2 more ranges of 16"),
    ],
)
def test_ranges_in_words(bad: list[int], words: str) -> None:
    where = np.zeros(16, bool)
    where[bad] = True
    assert findings._ranges(np.arange(17), where) == words


def test_small_words() -> None:
    assert [findings.percent(x) for x in (0, 0.001, 0.0099, 0.01, 0.204, 1)] == [
        "0%",
        "<1%",
        "<1%",
        "1%",
        "20%",
        "100%",
    ]
    assert [findings.count(n, "flip") for n in (0, 1, 2, 1234)] == ["0 flips", "1 flip", "2 flips", "1,234 flips"]
    assert findings.place("lm_head", (0, 4, 5)) == "position 4, token id 5"
    assert findings.place("model.layers.0.self_attn.probs", (2, 4, 1, 5)) == "sequence 2, position 4, head 1, key 5"
    assert findings.place("lm_head", ()) == "nowhere"


def test_what_is_wrong_outweighs_what_was_not_looked_at() -> None:
    assert [verdict(*given) for given in ((True, True), (True,), (0, [3]), ("", []))] == [
        "fails",
        "fails",
        "incomplete",
        "holds",
    ]
    assert worst(["holds", "untested", "fails"]) == "fails"
    assert worst(["holds", "untested", "holds"]) == "untested"
    assert worst(["incomplete", "holds"]) == "incomplete"
    assert worst([]) == worst(["holds"]) == "holds"


def test_the_page_says_what_was_measured_and_leaves_out_what_was_not() -> None:
    calm = measured(np.zeros((4, 16)))
    own = replace(calm, ratio=1.5, row_ratio=2.25, row=(0, 3), largest=7.0, at=(0, 3, 5), bias=-1.5, gain=0.25)
    tap = tap_of(replace(own, misrounded=0.2, nonfinite=2, nonfinite_at=(0, 1, 4)), ratio=3.0, honest=1.25)
    rows = {name: (alone, after) for name, alone, after in html._figures(tap)}
    assert rows["rms error / rms sigma"] == ("1.50", "3.00")
    assert rows["the same in an honest run"] == ("", "1.25")
    assert rows["worst row"] == ("2.25 (position 3)", "0 (position 0)")
    assert rows["largest element"] == ("7.00 (position 3, channel 5)", "0 (position 0, channel 0)")
    assert (rows["rms error"], rows["rms sigma"], rows["rms of the value"]) == (("0", "0"), ("1", "1"), ("1", "1"))
    assert rows["bias, in standard errors"] == ("-1.50", "0")
    assert rows["gain (best common factor - 1)"] == ("+2.50e-01", "+0.00e+00")
    assert rows["not as the policy rounds"] == ("20%", "")
    assert rows["NaN or infinity"] == ("2 (first: position 1, channel 4)", "0")
    assert rows["elements"] == ("64", "64")
    alone = {name: own for name, own, _ in html._figures(tap_of(calm))}
    assert alone["not as the policy rounds"] == ""
    assert {own for _, own, _ in html._figures(tap_of(None))} == {"-"}


def test_distances_in_ulp_are_shown_with_their_edges() -> None:
    shown = html._ulps([4, 0, 8, 0, 0, 0, 0, 0, 2])
    assert [label for label, _, _ in shown] == [
        "exact", "to 0.5", "to 1", "to 1.5", "to 2.5", "to 4.5", "to 8.5", "to 16.5", "over 16.5",
    ]  # fmt: skip
    assert [(n, share) for _, n, share in shown if n] == [(4, 0.5), (8, 1.0), (2, 0.25)]
    assert {share for _, _, share in html._ulps([0] * 9)} == {0}


# ----------------------------------------------------------------------------------------------------- what it may cost


def many_numbers(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate, exact values and variances, with some that are no numbers."""
    rng = np.random.default_rng(7)
    exact = rng.standard_normal((rows, columns))
    candidate = (exact + 0.01 * rng.standard_normal(exact.shape)).astype(np.float32)
    candidate[rows // 2, 3], candidate[1, columns // 2], exact[rows - 1, 1] = np.nan, np.inf, 1e6
    return candidate, exact, rng.uniform(0, 2e-4, exact.shape).astype(np.float32)


@pytest.mark.parametrize("at_once", [1, 64, 1000])
def test_how_much_is_computed_at_once_changes_no_digit(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    def everything() -> list[str]:
        candidate, exact, variance = many_numbers(23, 40)
        places = np.argwhere(np.ones((1, 23), bool))
        found = (
            measure(candidate, exact, variance, overflow=65504.0),
            ulp_histogram(candidate, exact, "bfloat16"),
            compare_tokens(exact, variance, candidate, places),
            error_map(candidate, exact, variance, overflow=65504.0),
        )
        return [repr(each) for each in found]

    whole = everything()
    monkeypatch.setattr(measuring, "_AT_ONCE", at_once)
    assert everything() == whole


def test_measuring_takes_little_more_memory_than_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_AT_ONCE", 1 << 12)
    candidate, exact, variance = many_numbers(128, 2048)
    tracemalloc.start()
    measure(candidate, exact, variance)
    ulp_histogram(candidate, exact, "bfloat16")
    compare_tokens(exact, variance, candidate, np.argwhere(np.ones((1, 128), bool)))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < exact.nbytes / 2


def test_a_function_is_called_by_its_own_name_unless_it_is_given_one() -> None:
    class Port:
        def __call__(self, *_: Any) -> None: ...

    def forward(*_: Any) -> None: ...

    for function, given, name in (
        (forward, None, "forward"),
        (Port(), None, "Port"),
        (forward, "port.py:f", "port.py:f"),
    ):
        assert FunctionCandidate(function, Path(), head="base", dtype="fp32", name=given).name == name


def test_a_loss_is_told_by_how_many_sigmas_it_is_off() -> None:
    assert [LossReport(loss, 1.0, 0.5).sigmas for loss in (3.5, 1.0, -0.5)] == [5.0, 0.0, 3.0]


def test_a_check_keeps_no_weights() -> None:
    folder = Path(golden.checkpoints()["helium-tiny"])
    model = load(folder, "bfloat16")
    kept = refllm.load(folder, dtype="bfloat16").weights
    assert model.weights.low_memory
    assert all(np.array_equal(model.weights[name], kept[name]) for name in kept)


def test_embeddings_are_those_of_the_table_times_their_scale() -> None:
    model = refllm.load(Path(golden.path("llama-tiny")), dtype="float32")
    ids, seen = np.array([[7, 300, 4]]), dict[str, np.ndarray]()
    ReferenceCandidate(model).run(Inputs(ids, embeds_scale=0.3), lambda name, value: seen.__setitem__(name, value))
    table = np.asarray(model.weights["embed_tokens.weight"], np.float32)
    np.testing.assert_array_equal(seen["model.embed_tokens"], table[ids] * np.float32(0.3))


def test_what_was_not_rounded_is_not_misrounded() -> None:
    assert measured(np.ones((4, 16))).misrounded == 0.0


def test_transformers_that_is_not_there_or_broken_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match="a candidate of Transformers needs transformers, which is not installed"
    ):
        quiet_transformers()
    monkeypatch.delitem(sys.modules, "transformers")
    (tmp_path / "transformers.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MissingExtraError, match=r"transformers cannot be imported \(No module named 'no_such_module'\)"
    ):
        quiet_transformers()
