"""Scoring: each token once, with the context that was promised, and the figures that follow from it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.commands.score import CHUNK, Score, negative_log_likelihood, score_tokens, windows
from refllm.errors import InputError

VOCAB = 17


class ContextModel:
    """A stand-in whose logits depend on the number of tokens it sees before the position (and on the last one)."""

    def __init__(self, rope_type: str = "default") -> None:
        self.config = SimpleNamespace(rope_parameters={"rope_type": rope_type})
        self.calls: list[int] = []

    def __call__(self, *, input_ids: np.ndarray, past_key_values: int | None, use_cache: bool) -> Any:
        seen, length = past_key_values or 0, input_ids.shape[1]
        self.calls.append(length)
        logits = np.stack([self.logits(seen + i + 1, int(input_ids[0, i])) for i in range(length)])
        return SimpleNamespace(logits=logits[None], past_key_values=seen + length if use_cache else None)

    @staticmethod
    def logits(context: int, last: int) -> np.ndarray:
        return np.sin(np.arange(VOCAB) * (last + 1) + 0.1 * context) * 3


@given(st.integers(2, 400), st.integers(2, 60), st.data())
def test_windows_score_every_token_once_with_enough_context(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored = []
    for start, first, stop in windows(tokens, context, stride):
        assert stop - start <= context
        assert start == 0 or first - start >= context - stride
        scored += range(first, stop)
    assert scored == list(range(1, tokens))


@given(st.integers(2, 80), st.integers(2, 30), st.integers(0, 1000), st.data())
@settings(max_examples=50)
def test_token_is_scored_by_its_window(tokens: int, context: int, seed: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens)
    nll = score_tokens(ContextModel(), ids, context=context, stride=stride)
    assert len(nll) == tokens - 1
    for start, first, stop in windows(tokens, context, stride):
        for token in range(first, stop):
            logits = ContextModel.logits(token - start, int(ids[token - 1]))
            expected = np.log(np.exp(logits).sum()) - logits[ids[token]]
            assert nll[token - 1] == pytest.approx(expected, abs=1e-12)


def test_long_window_runs_in_chunks_unless_its_rotation_depends_on_the_length() -> None:
    ids = np.zeros(3 * CHUNK, dtype=np.int64)
    chunked, whole = ContextModel(), ContextModel("dynamic")
    results = [score_tokens(model, ids, context=3 * CHUNK, stride=CHUNK) for model in (chunked, whole)]
    np.testing.assert_allclose(*results)
    assert chunked.calls == [CHUNK] * 3
    assert whole.calls == [3 * CHUNK]


def test_negative_log_likelihood_survives_huge_logits() -> None:
    logits = np.array([[1e5, 0.0, -1e5], [-1e5, -1e5, -1e5]])
    np.testing.assert_allclose(negative_log_likelihood(logits, np.array([0, 2])), [0.0, np.log(3)])


def test_uniform_model_has_its_vocabulary_as_perplexity() -> None:
    score = Score(np.zeros(9, dtype=np.int64), np.full(8, np.log(32.0)), None, 10)
    assert score.perplexity == pytest.approx(32.0)
    assert score.bits_per_byte == pytest.approx(8 * 5 / 10)
    assert score.log_likelihood == pytest.approx(-8 * np.log(32.0))


@pytest.mark.parametrize(("tokens", "context", "stride"), [(1, 8, 4), (5, 1, 1), (5, 8, 0), (5, 8, 8)])
def test_senseless_settings_are_refused(tokens: int, context: int, stride: int) -> None:
    with pytest.raises(InputError):
        score_tokens(ContextModel(), np.zeros(tokens, dtype=np.int64), context=context, stride=stride)
