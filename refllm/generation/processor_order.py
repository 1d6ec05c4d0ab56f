"""Which logits processors a call of `generate` uses, and in which order.

The order is that of `GenerationMixin._get_logits_processor` (Transformers 5.23.0):

1 classifier-free guidance, 2 sequence bias, 3 encoder repetition penalty, 4 repetition penalty, 5 no repeated n-gram,
6 no n-gram of the prompt, 7 bad words, 8 minimum length, 9 minimum of new tokens, 10 allowed prefixes, 11 forced
first token, 12 forced last token, 13 invalid values, 14 exponential decay, 15 suppressed tokens, 16 tokens suppressed
at the start, 17 the caller's own; when sampling: 18 temperature, 19 top-H, 20 top-k, 21 top-p, 22 min-p, 23 typical,
24 epsilon, 25 eta; 26 watermark, 27 renormalisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.generation.config import GenerationConfig, as_ids
from refllm.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from refllm.generation.logits_warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from refllm.generation.watermark import WatermarkLogitsProcessor


@dataclass(frozen=True, kw_only=True)
class ProcessorInputs:
    """What processors need to know of a call beside its settings."""

    prompt_length: int
    """Tokens in front of the first generated one (0 for a prompt of embeddings only)."""
    vocab_size: int
    prompt_ids: np.ndarray | None = None
    """int64 [B, prompt_length] before the rows are repeated for beams; None for a prompt of embeddings."""
    padding_B: np.ndarray | None = None
    """int [rows]: padding columns in front of each row; None where there is no padding."""
    model: Callable[..., Any] | None = None
    negative_prompt_ids: np.ndarray | None = None
    negative_prompt_attention_mask: np.ndarray | None = None
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None
    user_processors: Sequence[LogitsProcessor] = ()


def make_processors(config: GenerationConfig, inputs: ProcessorInputs) -> LogitsProcessorList:
    """The processors that `config` (merged with the defaults) switches on, in order. Raises InputError."""
    _check_ids(config, inputs.vocab_size)
    processors = _guidance(config, inputs)
    processors += _penalties(config, inputs)
    processors += _constraints(config, inputs)
    processors = _with_user_processors(processors, inputs.user_processors)
    if config.do_sample:
        processors += warpers(config)
    if config.watermarking_config is not None:
        processors.append(WatermarkLogitsProcessor(inputs.vocab_size, config.watermarking_config))
    if config.renormalize_logits:
        processors.append(LogitNormalization())
    return LogitsProcessorList(processors)


def _check_ids(config: GenerationConfig, vocab_size: int) -> None:
    """Refuses ids that a processor would have to find in the vocabulary, before the first token is made."""
    ids = {
        "sequence_bias": [i for sequence in config.sequence_bias or () for i in sequence],
        "bad_words_ids": [i for word in config.bad_words_ids or () for i in word],
        "forced_bos_token_id": as_ids(config.forced_bos_token_id),
        "forced_eos_token_id": as_ids(config.forced_eos_token_id),
    }
    for name, used in ids.items():
        outside = [i for i in used if not 0 <= i < vocab_size]
        if outside:
            raise InputError(f"generate: {name} holds {outside[0]}, expected ids from 0 to {vocab_size - 1}")


def _guidance(config: GenerationConfig, inputs: ProcessorInputs) -> list[LogitsProcessor]:
    if config.guidance_scale in (None, 1):
        return []
    assert config.guidance_scale is not None
    assert inputs.model is not None
    return [
        UnbatchedClassifierFreeGuidanceLogitsProcessor(
            config.guidance_scale,
            inputs.model,
            unconditional_ids=inputs.negative_prompt_ids,
            unconditional_attention_mask=inputs.negative_prompt_attention_mask,
            use_cache=bool(config.use_cache),
        )
    ]


def _penalties(config: GenerationConfig, inputs: ProcessorInputs) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if config.sequence_bias is not None:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        if inputs.prompt_ids is None and getattr(config, name) not in (None, 0, 1.0):
            warnings.warn(f"generate: {name} has no effect on a prompt of embeddings", UserWarning, stacklevel=4)
    if config.encoder_repetition_penalty not in (None, 1.0) and inputs.prompt_ids is not None:
        found.append(EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, inputs.prompt_ids))
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty, inputs.padding_B))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size and inputs.prompt_ids is not None:
        found.append(EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, inputs.prompt_ids))
    if config.bad_words_ids is not None:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_ids))
    return found


def _constraints(config: GenerationConfig, inputs: ProcessorInputs) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    eos_ids, prompt_length = config.eos_ids, inputs.prompt_length
    if config.min_length and eos_ids:
        found.append(MinLengthLogitsProcessor(config.min_length, eos_ids))
    if config.min_new_tokens and eos_ids:
        found.append(MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, eos_ids))
    if inputs.prefix_allowed_tokens_fn is not None:
        found.append(PrefixConstrainedLogitsProcessor(inputs.prefix_allowed_tokens_fn, config.num_beams or 1))
    if config.forced_bos_token_id is not None:
        found.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        assert config.max_length is not None
        found.append(ForcedEOSTokenLogitsProcessor(config.max_length, as_ids(config.forced_eos_token_id)))
    if config.remove_invalid_values:
        found.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        if not eos_ids:
            raise InputError("generate: exponential_decay_length_penalty needs an eos_token_id, and none is set")
        found.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos_ids, prompt_length))
    if config.suppress_tokens is not None:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens is not None:
        # A forced first token is not suppressed: the rule then waits for the second one.
        after_bos = prompt_length <= 1 and config.forced_bos_token_id is not None
        begin = prompt_length + 1 if after_bos else prompt_length
        found.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
    return found


def _with_user_processors(found: list[LogitsProcessor], own: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """A caller's processor takes the place of one of the same class; the others follow."""
    by_type = {type(processor): processor for processor in reversed(own) if not _is_function(processor)}
    merged = [by_type.get(type(processor), processor) for processor in found]
    return merged + [processor for processor in own if not any(processor is other for other in merged)]


def _is_function(processor: LogitsProcessor) -> bool:
    return hasattr(processor, "__code__")


def warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """Those that sampling uses. Raises InputError for a setting out of its range."""
    # With beams one token that does not end the text must survive, for a continuation that may score better.
    beams = (config.num_beams or 1) > 1
    keep = max(2, len(config.eos_ids) + 1) if beams else 1
    found: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        found.append(TopHLogitsWarper(config.top_h))
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k, keep))
    if config.top_p not in (None, 1.0):
        found.append(TopPLogitsWarper(config.top_p, keep))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(config.min_p, keep))
    if config.typical_p not in (None, 1.0):
        found.append(TypicalLogitsWarper(config.typical_p, keep))
    if config.epsilon_cutoff:
        found.append(EpsilonLogitsWarper(config.epsilon_cutoff, keep))
    if config.eta_cutoff:
        found.append(EtaLogitsWarper(config.eta_cutoff, keep))
    return found
