"""Every logits processor against the class of the same name in Transformers, on drawn scores and parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from refllm.errors import InputError
from refllm.generation import logits_process as ours
from refllm.generation import logits_warpers as warpers
from refllm.generation.config import GenerationConfig
from refllm.generation.processor_order import ProcessorInputs, make_processors
from refllm.generation.watermark import WatermarkingConfig, WatermarkLogitsProcessor, permutation_head

EXAMPLES = settings(max_examples=examples(30, 60))


@st.composite
def cases(draw: st.DrawFn, max_vocab: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] and float32 scores [B, V], log-probabilities or logits, some dropped already."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, vocab, length = draw(st.integers(1, 4)), draw(st.integers(4, max_vocab)), draw(st.integers(1, 12))
    # Few different ids, so that n-grams and prefixes repeat.
    ids = random.integers(0, min(vocab, draw(st.sampled_from([2, 5, 1000]))), size=(batch, length))
    scores = (random.normal(size=(batch, vocab)) * draw(st.sampled_from([0.1, 1.0, 5.0, 20.0]))).astype(np.float32)
    if draw(st.booleans()):
        dropped = random.random(scores.shape) < draw(st.sampled_from([0.1, 0.8]))
        dropped[:, 1] = False
        scores[dropped] = -np.inf
    if draw(st.booleans()):
        scores = ours.log_softmax(scores)
    return ids, scores


def check_same(own: Any, witness: Any, case: tuple[np.ndarray, np.ndarray], atol: float = 1e-6) -> None:
    """Both processors give the same scores: -inf at the same places, equal to 1e-6 elsewhere; and spare their input."""
    ids, scores = case
    before = ids.copy(), scores.copy()
    with torch.no_grad():
        expected = witness(torch.tensor(ids), torch.tensor(scores)).numpy()
    found = own(ids, scores)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=atol)
    np.testing.assert_array_equal(ids, before[0])
    np.testing.assert_array_equal(scores, before[1])


floats = st.floats(0.05, 3.0)
inside = st.floats(0.01, 0.99)
keeps = st.integers(1, 4)


@EXAMPLES
@given(cases(), floats)
def test_temperature_equals_transformers(case: tuple[np.ndarray, np.ndarray], t: float) -> None:
    check_same(warpers.TemperatureLogitsWarper(t), hf.TemperatureLogitsWarper(t), case)


@EXAMPLES
@given(cases(), st.integers(1, 200), keeps)
def test_top_k_equals_transformers(case: tuple[np.ndarray, np.ndarray], k: int, keep: int) -> None:
    case[1][:, ::3] = np.round(case[1][:, ::3])  # ties, which all stay
    check_same(warpers.TopKLogitsWarper(k, keep), hf.TopKLogitsWarper(k, min_tokens_to_keep=keep), case)


@EXAMPLES
@given(cases(), st.one_of(inside, st.sampled_from([0.0, 1.0])), keeps)
def test_top_p_equals_transformers(case: tuple[np.ndarray, np.ndarray], p: float, keep: int) -> None:
    case[1][np.isneginf(case[1])] = -50.0  # p = 1 decides by the order of equal scores otherwise
    case[1][:] += np.random.default_rng(0).normal(size=case[1].shape)
    check_same(warpers.TopPLogitsWarper(p, keep), hf.TopPLogitsWarper(p, min_tokens_to_keep=keep), case)


@EXAMPLES
@given(cases(), inside, keeps)
def test_top_p_after_top_k_equals_transformers(case: tuple[np.ndarray, np.ndarray], p: float, keep: int) -> None:
    check_same(warpers.TopPLogitsWarper(p, 1), hf.TopPLogitsWarper(p), case)


@EXAMPLES
@given(cases(), st.one_of(inside, st.sampled_from([0.0, 1.0])), keeps)
def test_min_p_equals_transformers(case: tuple[np.ndarray, np.ndarray], p: float, keep: int) -> None:
    keep = min(keep, int(np.isfinite(case[1]).sum(axis=1).min()))  # which of many dropped tokens is kept is open
    check_same(warpers.MinPLogitsWarper(p, keep), hf.MinPLogitsWarper(p, min_tokens_to_keep=keep), case)


@EXAMPLES
@given(cases(), inside, keeps)
def test_typical_equals_transformers(case: tuple[np.ndarray, np.ndarray], mass: float, keep: int) -> None:
    keep = min(keep, int(np.isfinite(case[1]).sum(axis=1).min()))
    check_same(warpers.TypicalLogitsWarper(mass, keep), hf.TypicalLogitsWarper(mass, min_tokens_to_keep=keep), case)


@EXAMPLES
@given(cases(), st.floats(1e-5, 0.5), keeps)
def test_epsilon_equals_transformers(case: tuple[np.ndarray, np.ndarray], epsilon: float, keep: int) -> None:
    check_same(
        warpers.EpsilonLogitsWarper(epsilon, keep), hf.EpsilonLogitsWarper(epsilon, min_tokens_to_keep=keep), case
    )


@EXAMPLES
@given(cases(), st.floats(1e-5, 0.9), keeps)
def test_eta_equals_transformers(case: tuple[np.ndarray, np.ndarray], epsilon: float, keep: int) -> None:
    check_same(warpers.EtaLogitsWarper(epsilon, keep), hf.EtaLogitsWarper(epsilon, min_tokens_to_keep=keep), case)


@EXAMPLES
@given(cases(), inside)
def test_top_h_equals_transformers(case: tuple[np.ndarray, np.ndarray], h: float) -> None:
    lp = ours.log_softmax(case[1].astype(np.float64))
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(lp * np.exp(lp), axis=-1)
    assume(entropy.min() > 0.01)  # below, the float32 rounding of the largest p decides in Transformers
    check_same(warpers.TopHLogitsWarper(h), hf.TopHLogitsWarper(h), case)


@pytest.mark.parametrize("h", [0.3, 0.6, 0.9])
def test_top_h_looks_at_as_many_tokens_as_transformers(h: float) -> None:
    scores = (np.random.default_rng(0).normal(size=(8, 300)) * 0.1).astype(np.float32)
    case = np.zeros((8, 1), np.int64), scores
    check_same(warpers.TopHLogitsWarper(h), hf.TopHLogitsWarper(h), case)


@EXAMPLES
@given(cases(), floats)
def test_repetition_penalty_equals_transformers(case: tuple[np.ndarray, np.ndarray], penalty: float) -> None:
    check_same(ours.RepetitionPenaltyLogitsProcessor(penalty), hf.RepetitionPenaltyLogitsProcessor(penalty), case)


@EXAMPLES
@given(cases(), floats, st.data())
def test_repetition_penalty_leaves_out_padding_like_transformers(
    case: tuple[np.ndarray, np.ndarray], penalty: float, data: st.DataObject
) -> None:
    batch, length = case[0].shape
    ignore = np.array(data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))
    witness = hf.RepetitionPenaltyLogitsProcessor(penalty, torch.tensor(ignore))
    check_same(ours.RepetitionPenaltyLogitsProcessor(penalty, ignore), witness, case)
    single = int(ignore[0])
    witness = hf.RepetitionPenaltyLogitsProcessor(penalty, single)
    check_same(ours.RepetitionPenaltyLogitsProcessor(penalty, single), witness, case)


@EXAMPLES
@given(cases(), floats, st.booleans())
def test_encoder_repetition_penalty_equals_transformers(
    case: tuple[np.ndarray, np.ndarray], penalty: float, beams: bool
) -> None:
    prompt = case[0][:1, :3] if beams else case[0][:, :3]  # one prompt for all rows, as with beams
    witness = hf.EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor(prompt))
    check_same(ours.EncoderRepetitionPenaltyLogitsProcessor(penalty, prompt), witness, case)


@EXAMPLES
@given(cases(), st.integers(1, 5))
def test_no_repeat_ngram_equals_transformers(case: tuple[np.ndarray, np.ndarray], n: int) -> None:
    check_same(ours.NoRepeatNGramLogitsProcessor(n), hf.NoRepeatNGramLogitsProcessor(n), case)


@EXAMPLES
@given(cases(), st.integers(1, 4), st.booleans())
def test_encoder_no_repeat_ngram_equals_transformers(case: tuple[np.ndarray, np.ndarray], n: int, beams: bool) -> None:
    prompt = case[0][:1, ::-1].copy() if beams else case[0][:, ::-1].copy()
    witness = hf.EncoderNoRepeatNGramLogitsProcessor(n, torch.tensor(prompt))
    assume(case[0].shape[1] >= n - 1)
    check_same(ours.EncoderNoRepeatNGramLogitsProcessor(n, prompt), witness, case)


words = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=8)


@EXAMPLES
@given(cases(), words, st.data())
def test_sequence_bias_equals_transformers(
    case: tuple[np.ndarray, np.ndarray], sequences: list[list[int]], data: st.DataObject
) -> None:
    biases = {tuple(s): data.draw(st.sampled_from([-3.5, 0.25, 10.0, -float("inf")])) for s in sequences}
    check_same(ours.SequenceBiasLogitsProcessor(biases), hf.SequenceBiasLogitsProcessor(biases), case)


@EXAMPLES
@given(cases(), words, st.lists(st.integers(0, 3), max_size=2))
def test_bad_words_equal_transformers(
    case: tuple[np.ndarray, np.ndarray], bad: list[list[int]], eos: list[int]
) -> None:
    own = ours.NoBadWordsLogitsProcessor(bad, eos)
    if own.sequence_bias:  # Transformers refuses a list of nothing but end-of-sequence ids
        check_same(own, hf.NoBadWordsLogitsProcessor(bad, eos or None), case)
    else:
        np.testing.assert_array_equal(own(*case), case[1])


@EXAMPLES
@given(cases(), st.integers(0, 14), st.lists(st.integers(0, 200), min_size=1, max_size=3), st.integers(0, 6))
def test_minimum_lengths_equal_transformers(
    case: tuple[np.ndarray, np.ndarray], minimum: int, eos: list[int], prompt: int
) -> None:
    check_same(ours.MinLengthLogitsProcessor(minimum, eos), hf.MinLengthLogitsProcessor(minimum, eos), case)
    own = ours.MinNewTokensLengthLogitsProcessor(prompt, minimum, eos)
    check_same(own, hf.MinNewTokensLengthLogitsProcessor(prompt, minimum, eos), case)


@EXAMPLES
@given(cases(), st.integers(1, 2), st.integers(0, 3), st.booleans())
def test_allowed_prefixes_equal_transformers(
    case: tuple[np.ndarray, np.ndarray], beams: int, shift: int, hopeless: bool
) -> None:
    ids, scores = case[0], case[1].copy()
    if ids.shape[0] % beams:
        beams = 1
    if hopeless:  # every allowed token is dropped already: the constraint still holds
        scores[:, :4] = -np.inf

    def allowed(row: int, tokens: Any) -> list[int]:
        return [(row + shift) % 4, (int(tokens[-1]) + shift) % 4]

    own, witness = (
        ours.PrefixConstrainedLogitsProcessor(allowed, beams),
        hf.PrefixConstrainedLogitsProcessor(allowed, beams),
    )
    check_same(own, witness, (ids, scores))


@EXAMPLES
@given(cases(), st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=2), st.integers(1, 13))
def test_forced_tokens_equal_transformers(
    case: tuple[np.ndarray, np.ndarray], bos: int, eos: list[int], max_length: int
) -> None:
    check_same(ours.ForcedBOSTokenLogitsProcessor(bos), hf.ForcedBOSTokenLogitsProcessor(bos), case)
    own, witness = (
        ours.ForcedEOSTokenLogitsProcessor(max_length, eos),
        hf.ForcedEOSTokenLogitsProcessor(max_length, eos),
    )
    check_same(own, witness, case)


@EXAMPLES
@given(
    cases(), st.integers(-2, 8), st.floats(0.5, 2.0), st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True)
)
def test_exponential_decay_equals_transformers(
    case: tuple[np.ndarray, np.ndarray], start: int, factor: float, eos: list[int]
) -> None:
    own = ours.ExponentialDecayLengthPenalty((start, factor), eos, 2)
    check_same(own, hf.ExponentialDecayLengthPenalty((start, factor), eos, 2), case)


@EXAMPLES
@given(cases(), st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(1, 6))
def test_suppressed_tokens_equal_transformers(
    case: tuple[np.ndarray, np.ndarray], tokens: list[int], begin: int
) -> None:
    check_same(ours.SuppressTokensLogitsProcessor(tokens), hf.SuppressTokensLogitsProcessor(tokens), case)
    own = ours.SuppressTokensAtBeginLogitsProcessor(tokens, begin)
    check_same(own, hf.SuppressTokensAtBeginLogitsProcessor(tokens, begin), case)


@EXAMPLES
@given(cases())
def test_normalisation_equals_transformers(case: tuple[np.ndarray, np.ndarray]) -> None:
    check_same(ours.LogitNormalization(), hf.LogitNormalization(), case)


@EXAMPLES
@given(cases())
def test_removal_of_invalid_values_equals_transformers(case: tuple[np.ndarray, np.ndarray]) -> None:
    case[1][:, 0] = np.nan
    case[1][:, 1] = np.inf
    check_same(ours.InfNanRemoveLogitsProcessor(), hf.InfNanRemoveLogitsProcessor(), case)


@EXAMPLES
@given(cases(), st.floats(-2.0, 4.0), st.integers(0, 2**32 - 1))
def test_guidance_equals_transformers(case: tuple[np.ndarray, np.ndarray], scale: float, seed: int) -> None:
    other = np.random.default_rng(seed).normal(size=case[1].shape).astype(np.float32)
    calls: list[Any] = []

    class Output(dict[str, Any]):
        __getattr__ = dict.__getitem__

    def model(input_ids: Any, **kwargs: Any) -> Output:
        calls.append((np.asarray(input_ids).tolist(), np.asarray(kwargs["attention_mask"]).tolist()))
        wrap = torch.tensor if isinstance(input_ids, torch.Tensor) else np.asarray
        return Output(logits=wrap(other)[:, None], past_key_values=None)

    ids = case[0]
    longer = np.concatenate([ids, ids[:, :1]], axis=1)
    for use_cache in (True, False):
        own = ours.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, use_cache=use_cache)
        witness = hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, use_cache=use_cache)
        case[1][np.isneginf(case[1])] = -30.0
        # The log-probabilities carry an error of 1e-6 of their size, which the scale amplifies.
        size = max(float(np.ptp(case[1])), float(np.ptp(other))) + 5.0
        check_same(own, witness, case, atol=1e-6 * size * (1 + abs(scale)))
        check_same(own, witness, (longer, case[1]), atol=1e-6 * size * (1 + abs(scale)))
    assert calls[0::2] == calls[1::2]


@settings(max_examples=examples(13, 25))
@given(
    cases(), st.floats(0.05, 0.9), st.floats(-3.0, 3.0), st.integers(1, 2**31 - 1), st.integers(1, 3),
    st.sampled_from(["lefthash", "selfhash"]),
)  # fmt: skip
def test_watermark_equals_transformers(
    case: tuple[np.ndarray, np.ndarray], ratio: float, bias: float, key: int, width: int, scheme: str
) -> None:
    vocab = case[1].shape[1]
    if scheme == "selfhash":
        key = 15485863  # the table takes a second to make
        case[1][:] = np.random.default_rng(key % 7).normal(size=case[1].shape)  # no ties
        assume(vocab >= 40)  # Transformers reads past the end of the vocabulary
    own = WatermarkLogitsProcessor(vocab, WatermarkingConfig(ratio, bias, key, scheme, width))
    witness = hf.WatermarkLogitsProcessor(vocab, "cpu", ratio, bias, key, scheme, width)
    if scheme == "selfhash" and case[0].shape[1] >= width:
        rows = zip(*case, strict=True)
        assume(all(own._self_green_ids(row, scores) for row, scores in rows))  # Transformers fails where none is green
    check_same(own, witness, case)


@pytest.mark.parametrize("seed", [0, 1, 15485863, 2**40 + 17, 2**64 - 6])
def test_permutation_equals_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randperm(1000, generator=generator).numpy()
    np.testing.assert_array_equal(permutation_head(1000, 1000, seed), expected)
    np.testing.assert_array_equal(permutation_head(1000, 10, seed), expected[:10])


@pytest.mark.parametrize("key", [-2, -1, 0, -(2**31)])
def test_a_hashing_key_may_be_negative(key: int) -> None:
    """As a seed of Torch may."""
    assert WatermarkingConfig(hashing_key=key).hashing_key == key


# Illegal parameters: one sentence, the parameter named.

BAD: list[tuple[str, Callable[[], Any]]] = [
    ("temperature", lambda: warpers.TemperatureLogitsWarper(0.0)),
    ("temperature", lambda: warpers.TemperatureLogitsWarper(-1.0)),
    ("temperature", lambda: warpers.TemperatureLogitsWarper(float("nan"))),
    ("top_k", lambda: warpers.TopKLogitsWarper(0)),
    ("top_p", lambda: warpers.TopPLogitsWarper(-0.1)),
    ("top_p", lambda: warpers.TopPLogitsWarper(1.1)),
    ("top_p", lambda: warpers.TopPLogitsWarper(float("nan"))),
    ("min_p", lambda: warpers.MinPLogitsWarper(1.5)),
    ("top_h", lambda: warpers.TopHLogitsWarper(0.0)),
    ("top_h", lambda: warpers.TopHLogitsWarper(1.5)),
    ("typical_p", lambda: warpers.TypicalLogitsWarper(0.0)),
    ("typical_p", lambda: warpers.TypicalLogitsWarper(1.0)),
    ("epsilon_cutoff", lambda: warpers.EpsilonLogitsWarper(0.0)),
    ("epsilon_cutoff", lambda: warpers.EpsilonLogitsWarper(1.0)),
    ("eta_cutoff", lambda: warpers.EtaLogitsWarper(-0.5)),
    ("repetition_penalty", lambda: ours.RepetitionPenaltyLogitsProcessor(0.0)),
    ("encoder_repetition_penalty", lambda: ours.EncoderRepetitionPenaltyLogitsProcessor(-1.0, np.zeros((1, 1), int))),
    ("no_repeat_ngram_size", lambda: ours.NoRepeatNGramLogitsProcessor(0)),
    ("encoder_no_repeat_ngram_size", lambda: ours.EncoderNoRepeatNGramLogitsProcessor(0, np.zeros((1, 1), int))),
    ("bad_words_ids", lambda: ours.NoBadWordsLogitsProcessor([[1], []])),
    ("min_length", lambda: ours.MinLengthLogitsProcessor(-1, [2])),
    ("min_new_tokens", lambda: ours.MinNewTokensLengthLogitsProcessor(3, -1, [2])),
    ("greenlist_ratio", lambda: WatermarkingConfig(greenlist_ratio=1.0)),
    ("greenlist_ratio", lambda: WatermarkingConfig(greenlist_ratio=0.0)),
    ("seeding_scheme", lambda: WatermarkingConfig(seeding_scheme="righthash")),
    ("context_width", lambda: WatermarkingConfig(context_width=0)),
    ("hashing_key", lambda: WatermarkingConfig(hashing_key=-(2**31) - 1)),
]


@pytest.mark.parametrize(("name", "make"), BAD)
def test_illegal_parameter_is_named_in_one_sentence(name: str, make: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=name) as caught:
        make()
    assert "\n" not in str(caught.value)


CALLS: list[tuple[str, Any]] = [
    ("sequence_bias", ours.SequenceBiasLogitsProcessor({(1, 9): 1.0})),
    ("bad_words_ids", ours.NoBadWordsLogitsProcessor([[9]])),
    ("forced_bos_token_id", ours.ForcedBOSTokenLogitsProcessor(9)),
    ("forced_eos_token_id", ours.ForcedEOSTokenLogitsProcessor(2, [-1])),
    ("prefix_allowed_tokens_fn", ours.PrefixConstrainedLogitsProcessor(lambda row, ids: [9], 1)),
    ("prefix_allowed_tokens_fn", ours.PrefixConstrainedLogitsProcessor(lambda row, ids: [], 1)),
]


@pytest.mark.parametrize(("name", "processor"), CALLS)
def test_ids_outside_the_vocabulary_are_refused(name: str, processor: Any) -> None:
    with pytest.raises(InputError, match=name):
        processor(np.zeros((1, 1), np.int64), np.zeros((1, 9), np.float32))


# Order and activity.


def made(**values: Any) -> list[Any]:
    """The processors of this package for a prompt of 3 tokens and two end-of-sequence ids."""
    if "min_new_tokens" in values:  # as `generate` does
        values["min_length"] = 3 + values["min_new_tokens"]
    config, _ = GenerationConfig.resolve({"max_length": 10, **values}, None, GenerationConfig(eos_token_id=[2, 3]))
    inputs = ProcessorInputs(
        prompt_length=3,
        vocab_size=20,
        prompt_ids=np.zeros((1, 3), np.int64),
        model=lambda: None,
        prefix_allowed_tokens_fn=lambda row, ids: [1],
        user_processors=[lambda ids, scores: scores],
    )
    return list(make_processors(config, inputs))


def names(processors: list[Any]) -> list[str]:
    return [getattr(p, "__name__", type(p).__name__) for p in processors]


EVERYTHING: dict[str, Any] = {
    "guidance_scale": 1.5,
    "sequence_bias": {(1,): 1.0},
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "min_length": 4,
    "min_new_tokens": 1,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 1.1),
    "suppress_tokens": [7],
    "begin_suppress_tokens": [8],
    "do_sample": True,
    "temperature": 0.5,
    "top_h": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "watermarking_config": {"bias": 1.0},
    "renormalize_logits": True,
}


def witness_made(**values: Any) -> list[Any]:
    """What Transformers makes for the same settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.generation_config.eos_token_id = [2, 3]
    seen: list[Any] = []

    original = model._get_logits_processor

    def spy(**kwargs: Any) -> Any:
        result = original(**kwargs)
        seen.extend(result)
        return result

    model._get_logits_processor = spy
    ids = torch.zeros((1, 3), dtype=torch.long)
    model.generate(
        ids,
        max_length=4,
        **values,
        logits_processor=[lambda ids, scores: scores],
        prefix_allowed_tokens_fn=lambda r, i: [1],
    )
    return seen


@pytest.mark.parametrize("sampling", [True, False])
def test_processors_act_in_the_order_of_transformers(sampling: bool) -> None:
    values = EVERYTHING | {"do_sample": sampling}
    with nullcontext() if sampling else pytest.warns(UserWarning, match="without do_sample"):
        found = names(made(**values))
    assert found == names(witness_made(**values))


@pytest.mark.parametrize("name", sorted(set(EVERYTHING) - {"do_sample", "remove_invalid_values", "renormalize_logits"}))
def test_each_setting_alone_makes_what_transformers_makes(name: str) -> None:
    values = {"do_sample": True, "top_k": 0} | {name: EVERYTHING[name]}
    assert names(made(**values)) == names(witness_made(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"top_p": 1.0},
        {"typical_p": 1.0},
        {"repetition_penalty": 1.0},
        {"no_repeat_ngram_size": 0},
        {"epsilon_cutoff": 0.0},
        {"min_length": 0},
        {"guidance_scale": 1.0},
        {"top_k": None},
        {},
    ],
)
def test_inactive_settings_make_no_processor(values: dict[str, Any]) -> None:
    values = {"do_sample": True} | values
    assert names(made(**values)) == names(witness_made(**values))


@pytest.mark.parametrize("num_beams", [1, 2, 4])
@pytest.mark.parametrize("eos", [2, [2, 3, 4], None])
def test_warpers_keep_as_many_tokens_as_in_transformers(num_beams: int, eos: Any) -> None:
    values = {"do_sample": True, "num_beams": num_beams, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1}
    values |= {"epsilon_cutoff": 0.9, "eta_cutoff": 0.9}
    if eos is not None:  # else the ids of the model: 2 and 3
        values["eos_token_id"] = eos
    expected = {
        type(p).__name__: p.min_tokens_to_keep for p in witness_made(**values) if hasattr(p, "min_tokens_to_keep")
    }
    found = {
        type(p).__name__: getattr(p, "keep", getattr(p, "k", None))
        for p in made(**values)
        if hasattr(p, "keep") or hasattr(p, "k")
    }
    assert found == expected
    assert len(expected) == 6


def test_own_processor_replaces_the_standard_one_of_its_class() -> None:
    own = warpers.TemperatureLogitsWarper(2.0)
    penalty = ours.RepetitionPenaltyLogitsProcessor(3.0)
    config, _ = GenerationConfig.resolve({"max_length": 10, "repetition_penalty": 1.5}, None, None)
    inputs = ProcessorInputs(prompt_length=1, vocab_size=5, user_processors=[own, penalty])
    assert list(make_processors(config, inputs)) == [penalty, own]


# The settings themselves.


def test_settings_survive_saving_and_transformers_reads_the_same(tmp_path: Path) -> None:
    from transformers import GenerationConfig as Witness

    values = EVERYTHING | {"eos_token_id": [2, 3], "pad_token_id": 0, "stop_strings": ["a"], "max_new_tokens": 7}
    config = GenerationConfig(**values)
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    read = Witness.from_pretrained(tmp_path)
    for name, value in config.to_dict().items():
        other = getattr(read, name)
        assert (other.__dict__ if name == "watermarking_config" else other) == value


def test_settings_written_by_transformers_are_read(tmp_path: Path) -> None:
    from transformers import GenerationConfig as Witness

    Witness(
        do_sample=True, temperature=0.7, eos_token_id=[1, 2], max_length=30, num_assistant_tokens=5
    ).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.temperature, config.eos_token_id, config.max_length) == (0.7, [1, 2], 30)
    assert config.top_k is None
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written == json.loads((tmp_path / "generation_config.json").read_text())


def test_missing_file_takes_what_config_json_writes_down(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"temperature": 0.5, "eos_token_id": 2, "hidden_size": 8, "use_cache": false}'
    )
    config = GenerationConfig.from_checkpoint(tmp_path)
    assert config.set_fields() == {"temperature": 0.5, "eos_token_id": 2, "use_cache": False}
    GenerationConfig(top_k=7).save_pretrained(tmp_path)
    assert GenerationConfig.from_checkpoint(tmp_path).set_fields() == {"top_k": 7}


def test_priority_is_call_then_passed_config_then_model_then_default() -> None:
    model = GenerationConfig(temperature=0.1, top_k=1, top_p=0.1, max_length=9)
    passed = GenerationConfig(temperature=0.2, top_k=2)
    config, default_length = GenerationConfig.resolve({"temperature": 0.3, "do_sample": True}, passed, model)
    assert (config.temperature, config.top_k, config.top_p, config.num_beams) == (0.3, 2, 0.1, 1)
    assert not default_length
    assert GenerationConfig.resolve({}, None, GenerationConfig())[1]
    config, _ = GenerationConfig.resolve(
        {"eos_token_id": None, "num_beams": None}, None, GenerationConfig(eos_token_id=2)
    )
    assert config.eos_ids == []
    assert config.num_beams == 1


def test_unknown_keys_of_a_file_are_reported_and_kept(tmp_path: Path) -> None:
    keys = {"top_k": 3, "temprature": 0.5, "transformers_version": "5.0", "_own": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(keys))
    with pytest.warns(UserWarning, match="json: unknown keys have no effect: temprature$"):
        config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert '"temprature": 0.5' in (tmp_path / "generation_config.json").read_text()
