"""Margins of multiple choices in sigma of rounding."""

import math
from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm import golden
from refllm.commands.score import score_tokens
from refllm.evaluation.margins import Choice, margins, predicted_variance

LLAMA = "llama-tiny"


def choice(log_likelihood: float, characters: int = 10) -> Choice:
    return Choice((1, 2, 3), 2, log_likelihood, characters)


def test_a_margin_is_that_of_the_rival_which_rounding_reaches_first() -> None:
    """The second best may be known so well that the third is the nearer one."""
    choices = [choice(-1.0), choice(-2.0), choice(-3.0)]
    variances = dict(zip(choices, (0.0, 0.01, 1.0), strict=True))
    acc, acc_norm = margins("task", 7, choices, variances.__getitem__)
    assert (acc.metric, acc.question, acc.best, acc.next) == ("acc", 7, 0, 2)
    assert math.isclose(acc.margin, 2.0)
    assert math.isclose(acc.sigmas, 2.0)
    assert acc.hangs
    assert "choice 0 is 2 nats (2.0 sigma of rounding) before choice 2" in acc.text
    assert math.isclose(acc_norm.sigmas, acc.sigmas)  # all are of one length


def test_per_character_another_choice_may_win() -> None:
    choices = [choice(-4.0, 4), choice(-5.0, 50)]
    acc, acc_norm = margins("task", 0, choices, lambda _: 0.01)
    assert (acc.best, acc_norm.best) == (0, 1)
    assert math.isclose(acc_norm.margin, 1.0 - 0.1)
    assert math.isclose(acc_norm.sigmas, 0.9 / math.hypot(0.1 / 4, 0.1 / 50))


def test_what_cannot_be_chosen_or_divided_has_no_margin() -> None:
    assert margins("task", 0, [choice(-1.0)], lambda _: 1.0) == []
    found = margins("task", 0, [choice(-1.0), choice(-1.0, 0)], lambda _: 0.0)
    assert [m.metric for m in found] == ["acc"]
    assert found[0].sigmas == 0  # a tie
    assert margins("task", 0, [choice(-1.0), choice(-2.0)], lambda _: 0.0)[0].sigmas == math.inf


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_predicted_error_is_that_of_a_rounded_run(dtype: str) -> None:
    """Log-likelihoods of the page in a format, beside those of float64 on the same weights."""
    folder = golden.path(LLAMA)
    variance = predicted_variance(folder, dtype)
    rng, ratios = np.random.default_rng(3), []
    rounded = refllm.load(folder, head="causal_lm", dtype=dtype)
    exact = refllm.load(folder, head="causal_lm", dtype="float64")  # its weights are stored in bfloat16
    for _ in range(12):
        ids = rng.integers(0, 512, 20)
        one = Choice(tuple(map(int, ids)), 6, 0.0, 6)
        errors = [score_tokens(model, ids, context=64, stride=32)[-6:].sum() for model in (rounded, exact)]
        ratios.append((errors[0] - errors[1]) / math.sqrt(variance(one)))
    assert 0.5 < math.sqrt(np.mean(np.square(ratios))) < 1.5
    assert max(map(abs, ratios)) < 5


def test_the_longer_continuation_has_the_larger_error() -> None:
    variance = predicted_variance(golden.path(LLAMA), "bfloat16")
    one = Choice(tuple(range(1, 13)), 2, 0.0, 1)
    assert variance(replace(one, scored=8)) > variance(one) > 0
