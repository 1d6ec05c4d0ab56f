"""Text generation against Transformers: the same model on both sides, the same tokens out."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from generation_adapter import CacheAdapter, TorchAdapter, both, tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refllm.errors import InputError
from refllm.generation import stopping
from refllm.generation.beam_search import draw_without_replacement
from refllm.generation.config import GenerationConfig
from refllm.generation.decoding import GenerateOutput, draw
from refllm.generation.generate import generate
from refllm.generation.logits_process import softmax

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

VOCAB = 41  # more than any number of candidates that beams look at, so that no dropped token must be chosen


def check_same(own: GenerateOutput, witness: Any, beams: bool = False) -> None:
    """The same tokens; the same raw logits; processed scores to float32 rounding."""
    np.testing.assert_array_equal(own.sequences, witness.sequences.numpy())
    assert own.logits is not None
    assert own.scores is not None
    assert len(own.scores) == len(witness.scores) == len(own.logits)
    for found, expected in zip(own.logits, witness.logits, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)
    for found, expected in zip(own.scores, witness.scores, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4 if beams else 1e-5, atol=1e-5)
    if beams:
        assert own.sequences_scores is not None
        np.testing.assert_allclose(own.sequences_scores, witness.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(own.beam_indices, witness.beam_indices.numpy())


# ------------------------------------------------------------------------------------------ drawn prompts and settings


@st.composite
def prompts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids [B, S] and a mask with padding on the left, or None."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    ids = random.integers(0, VOCAB, size=(batch, length))
    if draw(st.booleans()):
        return ids, None
    return ids, (np.arange(length) >= random.integers(0, length, size=(batch, 1))).astype(np.int64)


PROCESSORS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.7, 1.7]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "encoder_repetition_penalty": st.sampled_from([0.7, 1.3]),
    "bad_words_ids": st.just([[3], [4, 6], [2]]),
    "sequence_bias": st.just({(8,): 2.0, (3, 4): -3.0, (9, 9): 4.0}),
    "min_new_tokens": st.integers(1, 6),
    "min_length": st.integers(1, 9),
    "forced_eos_token_id": st.sampled_from([5, [5]]),
    "suppress_tokens": st.just([1, 6]),
    "begin_suppress_tokens": st.just([2, 8]),
    "exponential_decay_length_penalty": st.just((2, 1.3)),
    "renormalize_logits": st.just(True),
    "remove_invalid_values": st.just(True),
    "guidance_scale": st.sampled_from([0.5, 1.4]),
    "watermarking_config": st.just({"bias": 3.0}),
}
WARPERS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.5, 2.0]),
    "top_k": st.sampled_from([0, 3, 20]),
    "top_p": st.sampled_from([0.3, 0.8]),
    "top_h": st.just(0.6),
    "min_p": st.sampled_from([0.05, 0.3]),
    "typical_p": st.sampled_from([0.4, 0.9]),
    "epsilon_cutoff": st.just(0.02),
    "eta_cutoff": st.just(0.1),
}


@st.composite
def chosen(draw: st.DrawFn, table: dict[str, st.SearchStrategy[Any]], most: int) -> dict[str, Any]:
    """Some of the settings of a table."""
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=most, unique=True))
    return {name: draw(table[name]) for name in names}


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    """Length, special tokens, processors, and how the model is run."""
    values: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 12))}
    eos = draw(st.sampled_from([None, 2, [2, 5], [2, 5, 7]]))
    values |= draw(chosen(PROCESSORS, 3))
    if eos is None:
        values.pop("exponential_decay_length_penalty", None)
    else:
        values["eos_token_id"] = eos
    if (pad := draw(st.sampled_from([None, 0, 3, 2]))) is not None:
        values["pad_token_id"] = pad
    if {"guidance_scale", "remove_invalid_values"} <= set(values):
        del values["guidance_scale"]  # the smallest float times the scale overflows
    run = draw(st.sampled_from(["plain", "plain", "chunks", "no cache"]))
    return values | {"plain": {}, "chunks": {"prefill_chunk_size": 2}, "no cache": {"use_cache": False}}[run]


@settings(max_examples=examples(60, 100))
@given(prompts(), common(), st.integers(0, 2))
def test_greedy_decoding_equals_transformers(
    prompt: tuple[np.ndarray, np.ndarray | None], values: dict[str, Any], seed: int
) -> None:
    check_same(*both(tiny_model(VOCAB, seed), *prompt, **values))


beam_settings = st.fixed_dictionaries(
    {
        "num_beams": st.integers(2, 5),
        "length_penalty": st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
    }
)


@settings(max_examples=examples(80, 250))
@given(prompts(), common(), beam_settings, st.data(), st.integers(0, 2))
def test_beam_search_equals_transformers(
    prompt: tuple[np.ndarray, np.ndarray | None],
    values: dict[str, Any],
    beams: dict[str, Any],
    data: st.DataObject,
    seed: int,
) -> None:
    returned = data.draw(st.integers(1, beams["num_beams"]))
    own, witness = both(tiny_model(VOCAB, seed), *prompt, **values, **beams, num_return_sequences=returned)
    assume(bool((witness.sequences_scores > -1e6).all()))  # an empty slot: what stands in it is open
    check_same(own, witness, beams=True)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 1.0, 3.0])
def test_beams_of_rows_that_end_at_different_times_equal_transformers(
    early_stopping: bool | str, length_penalty: float
) -> None:
    """Many end-of-sequence ids: rows fill their slots early, cannot improve, and wait for the others."""
    for seed in range(8):
        ids = np.random.default_rng(seed).integers(0, VOCAB, size=(4, 3))
        values = {
            "num_beams": 3,
            "num_return_sequences": 3,
            "max_new_tokens": 15,
            "eos_token_id": [2, 5, 7, 11, 13, 17],
        }
        values |= {"early_stopping": early_stopping, "length_penalty": length_penalty}
        check_same(*both(tiny_model(VOCAB, seed % 3), ids, **values), beams=True)


# ------------------------------------------------------------------------------------------------------------ sampling


DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def both_sampling(prompt: tuple[np.ndarray, np.ndarray | None], seed: int, **values: Any) -> tuple[Any, Any]:
    """Both outputs, where Transformers draws by the rules and with the random numbers of this package."""
    source = np.random.default_rng(seed)

    def multinomial(p: torch.Tensor, num_samples: int) -> torch.Tensor:
        scores = np.log(p.numpy(), where=p.numpy() > 0, out=np.full(p.shape, -np.inf, np.float32))
        if num_samples == 1:
            return torch.tensor(draw(scores, source))[:, None]
        return torch.tensor(draw_without_replacement(scores, num_samples, source))

    model = tiny_model(VOCAB)
    ids, mask = (None if array is None else torch.tensor(array) for array in prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        witness = model.generate(ids, attention_mask=mask, do_sample=True, **values, **DICT)
    return generate(TorchAdapter(model), *prompt, seed=seed, do_sample=True, **values, **DICT), witness


@settings(max_examples=examples(40, 80))
@given(prompts(), common(), chosen(WARPERS, 3), st.integers(1, 3), st.integers(0, 1000))
def test_sampling_equals_transformers_given_the_same_random_numbers(
    prompt: tuple[np.ndarray, np.ndarray | None],
    values: dict[str, Any],
    warpers: dict[str, Any],
    returned: int,
    seed: int,
) -> None:
    own, witness = both_sampling(prompt, seed, **values, **warpers, num_return_sequences=returned)
    check_same(own, witness)


@settings(max_examples=examples(30, 60))
@given(
    prompts(), common(), beam_settings, st.sampled_from([{}, {"temperature": 0.7}, {"top_k": 30}]), st.integers(0, 99)
)
def test_beam_sampling_equals_transformers_given_the_same_random_numbers(
    prompt: tuple[np.ndarray, np.ndarray | None],
    values: dict[str, Any],
    beams: dict[str, Any],
    warpers: dict[str, Any],
    seed: int,
) -> None:
    own, witness = both_sampling(prompt, seed, **{"top_k": 0} | values | beams | warpers)
    assume(bool((witness.sequences_scores > -1e6).all()))
    check_same(own, witness, beams=True)


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom: about 1 for draws from p."""
    expected = p * counts.sum()
    return float((((counts - expected) ** 2)[p > 0] / expected[p > 0]).sum() / ((p > 0).sum() - 1))


def test_draws_follow_the_softmax_and_never_pick_a_dropped_token() -> None:
    scores = np.random.default_rng(3).normal(size=(1, 30)).astype(np.float32)
    scores[0, ::4] = -np.inf
    draws = draw(np.repeat(scores, 40_000, axis=0), np.random.default_rng(0))
    counts = np.bincount(draws, minlength=30)
    p = softmax(scores)[0]
    assert counts[p == 0].sum() == 0
    assert 0.4 < chi_square(counts, p) < 2.0
    assert chi_square(counts, np.roll(p, 1)) > 100 or counts[np.roll(p, 1) == 0].any()


def test_the_smallest_random_number_picks_no_dropped_token() -> None:
    class Zeros:
        def random(self, shape: tuple[int, ...]) -> np.ndarray:
            return np.zeros(shape)

    scores = np.array([[-np.inf, 0.0, 1.0]], np.float32)
    assert draw(scores, Zeros()).tolist() == [1]  # type: ignore[arg-type]


def test_draws_without_replacement_follow_the_probabilities_of_their_order() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    scores = np.repeat(np.log(p)[None].astype(np.float32), 40_000, axis=0)
    found = Counter(map(tuple, draw_without_replacement(scores, 2, np.random.default_rng(0)).tolist()))
    pairs = list(permutations(range(4), 2))
    expected = np.array([p[a] * p[b] / (1 - p[a]) for a, b in pairs])
    assert 0.2 < chi_square(np.array([found[pair] for pair in pairs]), expected) < 2.5


def test_impossible_tokens_are_drawn_last() -> None:
    scores = np.array([[-np.inf, 0.0, -1e9, 1.0]], np.float32)
    for seed in range(50):
        drawn = draw_without_replacement(scores, 4, np.random.default_rng(seed))[0].tolist()
        assert set(drawn[:2]) == {1, 3}
        assert drawn[2:] == [2, 0]


def test_sampled_tokens_follow_the_processed_distribution() -> None:
    model = TorchAdapter(tiny_model(VOCAB))
    values = {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "max_new_tokens": 1, "do_sample": True}
    out = generate(
        model, [[5, 6]], num_return_sequences=5000, seed=1, return_dict_in_generate=True, output_scores=True, **values
    )
    assert isinstance(out, GenerateOutput)
    assert out.scores is not None
    p = softmax(out.scores[0])[0]
    counts = np.bincount(out.sequences[:, -1], minlength=VOCAB)
    assert 1 < (p > 0).sum() <= 12
    assert counts[p == 0].sum() == 0
    assert 0.1 < chi_square(counts, p) < 3.0


def test_a_seed_repeats_the_draws_and_another_changes_them() -> None:
    model = TorchAdapter(tiny_model(VOCAB))
    values = {"do_sample": True, "max_new_tokens": 20, "temperature": 2.0, "top_k": 0}
    first, again, other = (generate(model, [[5, 6]], seed=seed, **values) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    generator = np.random.default_rng(1)
    np.testing.assert_array_equal(generate(model, [[5, 6]], seed=generator, **values), first)
    assert not np.array_equal(generate(model, [[5, 6]], seed=generator, **values), first)


# --------------------------------------------------------------------------------------- mask, positions, cache, chunks


def test_left_padding_changes_nothing() -> None:
    model = TorchAdapter(tiny_model(VOCAB))
    alone = generate(model, [[5, 6, 7]], max_new_tokens=8)
    padded = np.array([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4]])
    mask = np.array([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    together = generate(model, padded, mask, max_new_tokens=8)
    np.testing.assert_array_equal(together[0, 3:], alone[0])
    wrong = generate(model, padded, np.ones_like(mask), max_new_tokens=8)
    assert not np.array_equal(wrong[0, 3:], alone[0])


@pytest.mark.parametrize(
    ("pad", "eos", "masked"),
    [(0, None, True), (0, 2, True), (0, [2, 0], False), (None, 0, False), (None, None, False), (40, None, False)],
)
def test_mask_is_inferred_from_padding_as_in_transformers(pad: int | None, eos: Any, masked: bool) -> None:
    ids = np.array([[0, 0, 5, 6], [9, 8, 7, 6]])
    values = {name: v for name, v in {"pad_token_id": pad, "eos_token_id": eos}.items() if v is not None}
    own, witness = both(tiny_model(VOCAB), ids, max_new_tokens=6, **values)
    check_same(own, witness)
    explicit, _ = both(tiny_model(VOCAB), ids, (ids != 0).astype(int), max_new_tokens=6, **values)
    assert np.array_equal(own.logits[0], explicit.logits[0]) == masked  # type: ignore[index]


def test_mask_of_any_type_counts_as_zero_or_not() -> None:
    model, ids = TorchAdapter(tiny_model(VOCAB)), np.array([[0, 5, 6], [9, 8, 7]])
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    expected = generate(model, ids, mask, max_new_tokens=5)
    for other in (mask.astype(bool), mask * 3.0, mask * -1, mask.tolist()):
        np.testing.assert_array_equal(generate(model, ids, other, max_new_tokens=5), expected)


def test_right_padding_equals_transformers_and_warns() -> None:
    ids, mask = np.array([[5, 6, 0], [9, 8, 7]]), np.array([[1, 1, 0], [1, 1, 1]])
    check_same(*both(tiny_model(VOCAB), ids, mask, max_new_tokens=6, pad_token_id=0, eos_token_id=2))
    with pytest.warns(UserWarning, match="pad on the left"):
        generate(TorchAdapter(tiny_model(VOCAB)), ids, mask, max_new_tokens=1, pad_token_id=0)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 100])
def test_chunked_prefill_changes_nothing(size: int, num_beams: int) -> None:
    ids, mask = np.arange(14).reshape(2, 7), np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    model = TorchAdapter(tiny_model(VOCAB))
    whole = generate(model, ids, mask, max_new_tokens=5, num_beams=num_beams)
    model.calls.clear()
    chunked = generate(model, ids, mask, max_new_tokens=5, num_beams=num_beams, prefill_chunk_size=size)
    np.testing.assert_array_equal(whole, chunked)
    assert model.calls[: -(-7 // size)] == [min(size, 7 - start) for start in range(0, 7, size)]


def test_without_a_cache_everything_is_run_again_with_the_same_result() -> None:
    model = TorchAdapter(tiny_model(VOCAB))
    expected = generate(model, [[5, 6, 7]], max_new_tokens=4)
    assert model.calls == [3, 1, 1, 1]
    model.calls.clear()
    np.testing.assert_array_equal(generate(model, [[5, 6, 7]], max_new_tokens=4, use_cache=False), expected)
    assert model.calls == [3, 4, 5, 6]


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("all_ids", [True, False])
def test_a_filled_cache_is_continued_as_in_transformers(all_ids: bool, chunk: int | None) -> None:
    from transformers import DynamicCache

    model = tiny_model(VOCAB)
    text = np.array([[0, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7]])
    mask = np.array([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    expected = generate(TorchAdapter(model), text, mask, max_new_tokens=5)[:, 7:]

    def filled() -> Any:
        cache = DynamicCache(config=model.config)
        positions = torch.tensor([[0, 0, 1], [0, 1, 2]])
        with torch.no_grad():
            model(
                torch.tensor(text[:, :3]),
                attention_mask=torch.tensor(mask[:, :3]),
                position_ids=positions,
                past_key_values=cache,
            )
        return cache

    ids = text if all_ids else text[:, 3:]
    values = {"max_new_tokens": 5, **({"prefill_chunk_size": chunk} if chunk else {})}
    adapter = TorchAdapter(model)
    own = generate(adapter, ids, mask, past_key_values=CacheAdapter(filled()), **values)
    witness = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), past_key_values=filled(), **values)
    np.testing.assert_array_equal(own, witness.numpy())
    np.testing.assert_array_equal(own[:, ids.shape[1] :], expected)
    assert sum(adapter.calls[: 1 if chunk is None else 2]) == 4


def test_the_returned_cache_continues_the_text() -> None:
    model = TorchAdapter(tiny_model(VOCAB))
    expected = generate(model, [[5, 6, 7]], max_new_tokens=9)
    first = generate(model, [[5, 6, 7]], max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(first, GenerateOutput)
    assert first.past_key_values.get_seq_length() == 6
    rest = generate(model, first.sequences, max_new_tokens=5, past_key_values=first.past_key_values)
    np.testing.assert_array_equal(rest, expected)


def test_given_positions_are_used_as_in_transformers() -> None:
    positions = np.array([[3, 4, 5], [0, 1, 2]])
    ids, mask = np.array([[5, 6, 7], [8, 9, 1]]), np.array([[0, 1, 1], [1, 1, 1]])
    check_same(*both(tiny_model(VOCAB), ids, mask, max_new_tokens=4, position_ids=positions))
    own, _ = both(tiny_model(VOCAB), ids, mask, max_new_tokens=4)
    other, _ = both(tiny_model(VOCAB), ids, mask, max_new_tokens=4, position_ids=positions * 4)
    assert not np.allclose(own.logits[0], other.logits[0])  # type: ignore[index]


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 5},
        {},
        {"max_length": 9},
        {"max_length": 9, "min_length": 8, "eos_token_id": 2},
        {"max_new_tokens": 5, "num_beams": 3},
        {"max_new_tokens": 5, "repetition_penalty": 1.5},
        {"max_new_tokens": 5, "min_new_tokens": 3, "eos_token_id": [2, 5]},
    ],
)
def test_prompt_of_embeddings_equals_transformers(values: dict[str, Any], with_ids: bool) -> None:
    model, ids = tiny_model(VOCAB), np.array([[5, 6, 7], [8, 9, 1]])
    embeds = model.model.embed_tokens(torch.tensor(ids)).detach().numpy()
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    own, witness = both(model, ids if with_ids else None, mask, inputs_embeds=embeds, **values)
    check_same(own, witness, beams="num_beams" in values)
    chunked = generate(
        TorchAdapter(model), ids if with_ids else None, mask, inputs_embeds=embeds, prefill_chunk_size=2, **values
    )
    np.testing.assert_array_equal(chunked, own.sequences)


def test_hidden_states_and_attentions_are_collected_per_step() -> None:
    model = tiny_model(VOCAB, attention="eager")
    asked = {"output_hidden_states": True, "output_attentions": True, "max_new_tokens": 3}
    for num_beams in (1, 2):
        own, witness = both(model, np.array([[5, 6, 7]]), num_beams=num_beams, **asked)
        for name in ("hidden_states", "attentions"):
            for found, expected in zip(getattr(own, name), getattr(witness, name), strict=True):
                for a, b in zip(found, expected, strict=True):
                    np.testing.assert_allclose(a, b.numpy(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- lengths

LENGTHS = [
    {},
    {"max_length": 7},
    {"max_length": 4},
    {"max_new_tokens": 3},
    {"max_new_tokens": 3, "max_length": 20},
    {"max_new_tokens": 1},
    {"max_new_tokens": 10, "min_length": 9, "eos_token_id": list(range(0, 41, 2))},
    {"max_new_tokens": 10, "min_new_tokens": 4, "eos_token_id": list(range(0, 41, 2))},
    {"max_new_tokens": 10, "min_new_tokens": 2, "min_length": 12, "eos_token_id": list(range(0, 41, 2))},
    {"max_new_tokens": 3, "min_new_tokens": 9, "eos_token_id": list(range(0, 41, 2))},
]


@pytest.mark.parametrize("values", LENGTHS)
@pytest.mark.parametrize("source", ["call", "passed", "model"])
def test_lengths_equal_transformers(values: dict[str, Any], source: str) -> None:
    from transformers import GenerationConfig as Witness

    model, ids = tiny_model(VOCAB), np.array([[5, 6, 7]])
    if source == "call":
        own, witness = both(model, ids, **values)
        check_same(own, witness)
        return
    if source == "passed":
        found = generate(TorchAdapter(model), ids, generation_config=GenerationConfig(**values))
        expected = model.generate(torch.tensor(ids), generation_config=Witness(**values))
    else:
        found = generate(TorchAdapter(model, GenerationConfig(**values)), ids)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "generation_config", Witness(**values))
            expected = model.generate(torch.tensor(ids))
    np.testing.assert_array_equal(found, expected.numpy())


def test_default_length_is_20_new_tokens_within_the_models_positions() -> None:
    model = TorchAdapter(tiny_model(VOCAB))  # 64 positions
    assert generate(model, [[5] * 10]).shape == (1, 30)
    assert generate(model, [[5] * 50]).shape == (1, 64)
    check_same(*both(tiny_model(VOCAB), np.full((1, 50), 5)))
    with pytest.warns(UserWarning, match="max_position_embeddings=64"):
        assert generate(model, [[5] * 60], max_new_tokens=10).shape == (1, 70)


# ------------------------------------------------------------------------------------------------------------- stopping


def test_rows_end_at_any_eos_id_and_are_padded() -> None:
    model = tiny_model(VOCAB)
    ids = np.array([[5, 6, 7], [8, 9, 1], [3, 3, 3]])
    free = generate(TorchAdapter(model), ids, max_new_tokens=10)
    eos = [int(free[0, 4]), int(free[1, 7])]
    own, witness = both(model, ids, max_new_tokens=10, eos_token_id=eos, pad_token_id=40)
    check_same(own, witness)
    assert (own.sequences[0, 5:] == 40).all()
    own, _ = both(model, ids, max_new_tokens=10, eos_token_id=eos)
    assert (own.sequences[0, 5:] == eos[0]).all()  # no padding id: the first end-of-sequence id


def test_without_an_eos_id_stopped_rows_go_on_as_in_transformers() -> None:
    class StopFirst:
        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
            done = [row == 0 or ids.shape[1] >= 8 for row in range(ids.shape[0])]
            return torch.tensor(done) if isinstance(ids, torch.Tensor) else np.array(done)

    ids = np.array([[5, 6, 7], [8, 9, 1]])
    own, witness = both(tiny_model(VOCAB), ids, max_new_tokens=10, stopping_criteria=[StopFirst()], pad_token_id=0)
    check_same(own, witness)
    assert own.sequences.shape == (2, 8)
    assert (own.sequences[0, 4:] != 0).any()


def test_own_criterion_sees_the_scores_and_may_answer_for_all_rows() -> None:
    seen: list[Any] = []

    def stop(ids: np.ndarray, scores: Any) -> bool:
        seen.append(None if scores is None else len(scores))
        return ids.shape[1] >= 6

    model = TorchAdapter(tiny_model(VOCAB))
    assert generate(model, [[5, 6], [7, 8]], stopping_criteria=[stop]).shape == (2, 6)
    assert seen == [None] * 4
    generate(model, [[5, 6]], stopping_criteria=[stop], return_dict_in_generate=True, output_scores=True)
    assert seen[4:] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="stopping_criteria"):
        generate(model, [[5, 6]], stopping_criteria=[lambda ids, scores: np.zeros(3)])


def test_max_time_ends_generation_after_a_step() -> None:
    model = TorchAdapter(tiny_model(VOCAB))
    assert generate(model, [[5, 6]], max_new_tokens=30, max_time=0.0).shape == (1, 3)
    assert generate(model, [[5, 6]], max_new_tokens=3, max_time=100.0).shape == (1, 5)


def test_max_time_counts_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1000.5, 1002.0, 1002.1])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    rule = stopping.MaxTimeCriteria(2.0)
    assert [rule(np.zeros((1, 1)), None) for _ in range(3)] == [False, False, True]


def test_own_processor_acts_after_the_standard_ones() -> None:
    def only_nine(ids: Any, scores: Any) -> Any:
        result = scores.copy() if isinstance(scores, np.ndarray) else scores.clone()
        result[:] = -100.0
        result[:, 9] = 0.0
        return result

    values = {"max_new_tokens": 3, "suppress_tokens": [9], "logits_processor": [only_nine]}
    own, witness = both(tiny_model(VOCAB), np.array([[5, 6]]), **values)
    np.testing.assert_array_equal(own.sequences, witness.sequences.numpy())
    assert (own.sequences[:, 2:] == 9).all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_allowed_prefixes_equal_transformers(num_beams: int) -> None:
    def allowed(row: int, ids: Any) -> list[int]:
        return [(int(ids[-1]) + row + shift) % VOCAB for shift in range(1, 9)]

    ids = np.array([[5, 6], [7, 8]])
    values = {"prefix_allowed_tokens_fn": allowed, "num_beams": num_beams, "max_new_tokens": 6, "eos_token_id": 2}
    check_same(*both(tiny_model(VOCAB), ids, **values), beams=num_beams > 1)


def test_forced_first_token_needs_a_prompt_of_one() -> None:
    own, witness = both(
        tiny_model(VOCAB), np.array([[5]]), max_new_tokens=3, forced_bos_token_id=7, begin_suppress_tokens=[7]
    )
    check_same(own, witness)
    assert own.sequences[0, 1] == 7
    own, witness = both(tiny_model(VOCAB), np.array([[5, 6]]), max_new_tokens=3, forced_bos_token_id=7)
    check_same(own, witness)


def test_without_ids_the_text_starts_with_the_bos_id() -> None:
    own, witness = both(tiny_model(VOCAB), None, max_new_tokens=3, bos_token_id=4)
    check_same(own, witness)
    assert own.sequences[0, 0] == 4


@pytest.mark.parametrize("num_beams", [1, 2])
def test_guidance_with_a_negative_prompt_equals_transformers(num_beams: int) -> None:
    values = {"guidance_scale": 1.7, "negative_prompt_ids": np.array([[9, 8, 7, 6]]), "max_new_tokens": 5}
    values["negative_prompt_attention_mask"] = np.array([[0, 1, 1, 1]])
    if num_beams == 1:
        for use_cache in (True, False):
            check_same(*both(tiny_model(VOCAB), np.array([[5, 6]]), use_cache=use_cache, **values))
    else:  # Transformers does not repeat the negative prompt for beams
        assert generate(TorchAdapter(tiny_model(VOCAB)), [[5, 6]], num_beams=2, **values).shape == (1, 7)
