"""Logits processors: rules that change the scores of the next token before it is chosen.

A processor is a callable (ids_BT, scores_BV) -> scores_BV. ids_BT int64 [B, T] are all tokens so far, prompt and its
padding included; scores_BV float32 [B, V] are logits (beam search: log-probabilities). Inputs are never modified. To
"drop" a token is to set its score to -inf. Names and rules are those of `transformers.generation.logits_process`
(5.23.0). The processors that shape the distribution for sampling are in `refllm.generation.logits_warpers`; the order
in which all of them act is in `refllm.generation.processor_order`.

A parameter out of its range raises InputError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from refllm.errors import InputError

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]


class LogitsProcessorList(list[LogitsProcessor]):
    """Processors applied one after the other."""

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] after every processor."""
        for processor in self:
            scores_BV = processor(ids_BT, scores_BV)
        return scores_BV


def log_softmax(scores_BV: np.ndarray) -> np.ndarray:
    """ln softmax over the last axis: s - max - ln sum exp(s - max), in the type of `scores_BV`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted_BV = scores_BV - scores_BV.max(-1, keepdims=True)
        lse_B1 = np.log(np.exp(shifted_BV, dtype=np.float64).sum(-1, keepdims=True))
        return shifted_BV - lse_B1.astype(scores_BV.dtype)


def softmax(scores_BV: np.ndarray) -> np.ndarray:
    """exp(s - max) / sum exp(s - max) over the last axis, computed in float64, returned in the type of the input."""
    with np.errstate(invalid="ignore"):
        weights_BV = np.exp(scores_BV - scores_BV.max(-1, keepdims=True), dtype=np.float64)
        return (weights_BV / weights_BV.sum(-1, keepdims=True)).astype(scores_BV.dtype)


def drop(scores_BV: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy with -inf where the mask, [B, V] or [V], is true."""
    scores_BV = scores_BV.copy()
    scores_BV[np.broadcast_to(mask, scores_BV.shape)] = -np.inf
    return scores_BV


def _members(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Bool [V], true at the given ids. Ids outside the vocabulary cannot be generated and are left out."""
    mask_V = np.zeros(vocab_size, dtype=bool)
    mask_V[[i for i in ids if 0 <= i < vocab_size]] = True
    return mask_V


def _force(scores_BV: np.ndarray, ids: Sequence[int], name: str) -> np.ndarray:
    """0 at the given ids, -inf elsewhere."""
    vocab_size = scores_BV.shape[-1]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise InputError(f"{name}: token id {i} is outside the vocabulary of {vocab_size} tokens")
    forced_BV = np.full_like(scores_BV, -np.inf)
    forced_BV[:, list(ids)] = 0
    return forced_BV


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise InputError(f"{name}={value} must be greater than 0")
    if not 1e-30 <= value <= 1e30:
        raise InputError(f"{name}={value} must lie in [1e-30, 1e+30]: scores changed by it are no numbers of float32")
    return float(value)


def _rescale(scores_BV: np.ndarray, mask_BV: np.ndarray, penalty: float) -> np.ndarray:
    """s * penalty where s < 0, else s / penalty, at the masked entries: both lower the score when penalty > 1."""
    with np.errstate(invalid="ignore", over="ignore"):
        changed_BV = np.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return np.where(mask_BV, changed_BV, scores_BV)


def _seen(ids_BT: np.ndarray, vocab_size: int, counted_BT: np.ndarray | None = None) -> np.ndarray:
    """Bool [B, V]: the token occurs in the row, at a counted position."""
    valid_BT = (ids_BT >= 0) & (ids_BT < vocab_size)
    if counted_BT is not None:
        valid_BT &= counted_BT
    seen_BV = np.zeros((ids_BT.shape[0], vocab_size), dtype=bool)
    rows, columns = np.nonzero(valid_BT)
    seen_BV[rows, ids_BT[rows, columns]] = True
    return seen_BV


class UnbatchedClassifierFreeGuidanceLogitsProcessor:
    """Classifier-free guidance: w * (s - u) + u, with s, u = ln softmax of the logits with and without the prompt.

    The second context is `unconditional_ids` [B, N] (a negative prompt; default: the last token of the prompt),
    continued with the generated tokens. It is run with its own cache. As in Transformers, that cache keeps its row
    order while beams are reordered. Source: Sanchez et al., "Stay on topic with Classifier-Free Guidance"
    (arXiv:2306.17806).
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Callable[..., Any],
        unconditional_ids: np.ndarray | None = None,
        unconditional_attention_mask: np.ndarray | None = None,
        use_cache: bool = True,
    ) -> None:
        self.guidance_scale = guidance_scale
        self.model = model
        self.ids = unconditional_ids
        self.mask = unconditional_attention_mask
        self.use_cache = use_cache
        self.cache: Any = None
        self.started = False

    def _unconditional_logits(self, last_B1: np.ndarray) -> np.ndarray:
        if not self.started:
            ids = last_B1 if self.ids is None else self.ids
            self.mask = np.ones_like(ids) if self.mask is None else self.mask
            self.started = True
        else:
            ids = last_B1 if self.use_cache else np.concatenate([self.ids, last_B1], axis=1)
            self.mask = np.concatenate([self.mask, np.ones_like(last_B1)], axis=1)
        self.ids = ids
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=self.use_cache,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return np.asarray(output.logits)[:, -1].astype(np.float32)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Guided log-probabilities [B, V]."""
        scores_BV = log_softmax(scores_BV)
        if self.guidance_scale == 1:
            return scores_BV
        without_BV = log_softmax(self._unconditional_logits(ids_BT[:, -1:]))
        with np.errstate(invalid="ignore", over="ignore"):
            return self.guidance_scale * (scores_BV - without_BV) + without_BV


class SequenceBiasLogitsProcessor:
    """Adds the bias of (t1 .. tn) to token tn in rows that end with t1 .. t(n-1). Contributions sum.

    `sequence_bias` maps tuples of token ids to biases. Raises InputError for an id outside the vocabulary.
    """

    name = "sequence_bias"

    def __init__(self, sequence_bias: Mapping[tuple[int, ...], float]) -> None:
        self.sequence_bias = dict(sequence_bias)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] plus biases."""
        vocab_size = scores_BV.shape[-1]
        bias_BV = np.zeros_like(scores_BV)
        for sequence, bias in self.sequence_bias.items():
            if max(sequence) >= vocab_size:
                text = f"{self.name}: token id {max(sequence)} is outside the vocabulary of {vocab_size} tokens"
                raise InputError(text)
            prefix, token = sequence[:-1], sequence[-1]
            if len(prefix) <= ids_BT.shape[1]:
                rows_B = (ids_BT[:, ids_BT.shape[1] - len(prefix) :] == np.array(prefix, dtype=np.int64)).all(axis=1)
                bias_BV[rows_B, token] += scores_BV.dtype.type(bias)
        with np.errstate(invalid="ignore"):
            return scores_BV + bias_BV


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Drops the last token of a bad word where the row ends with the rest of it: sequence bias -inf.

    A bad word that is one end-of-sequence id is ignored.
    """

    name = "bad_words_ids"

    def __init__(self, bad_words_ids: Sequence[Sequence[int]], eos_token_id: Sequence[int] = ()) -> None:
        words = [tuple(word) for word in bad_words_ids]
        if not all(words):
            raise InputError("bad_words_ids: holds an empty word")
        super().__init__({word: -np.inf for word in words if word not in {(i,) for i in eos_token_id}})


class EncoderRepetitionPenaltyLogitsProcessor:
    """The repetition rule with 1 / penalty on the tokens of the prompt: penalty > 1 raises their scores.

    `encoder_input_ids` int64 [B, N]; a multiple of B rows of scores belongs to them, in order.
    """

    def __init__(self, penalty: float, encoder_input_ids: np.ndarray) -> None:
        self.penalty = 1 / _positive("encoder_repetition_penalty", penalty)
        self.ids = encoder_input_ids

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Rescaled scores [B, V]."""
        ids = np.repeat(self.ids, max(1, scores_BV.shape[0] // self.ids.shape[0]), axis=0)
        return _rescale(scores_BV, _seen(ids, scores_BV.shape[-1]), self.penalty)


class RepetitionPenaltyLogitsProcessor:
    """The score s of each distinct token of the row becomes s * penalty if s < 0, else s / penalty.

    `prompt_ignore_length`: how many tokens at the start of all rows, or of each row (int [B]), do not count;
    generation leaves out the padding on the left. Source: Keskar et al., "CTRL" (arXiv:1909.05858).
    """

    def __init__(self, penalty: float, prompt_ignore_length: int | np.ndarray | None = None) -> None:
        self.penalty = _positive("repetition_penalty", penalty)
        self.ignore = 0 if prompt_ignore_length is None else prompt_ignore_length

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Rescaled scores [B, V]."""
        counted_BT = np.arange(ids_BT.shape[1]) >= np.broadcast_to(self.ignore, ids_BT.shape[:1])[:, None]
        return _rescale(scores_BV, _seen(ids_BT, scores_BV.shape[-1], counted_BT), self.penalty)


def _drop_completed_ngrams(
    source_BN: np.ndarray, ids_BT: np.ndarray, scores_BV: np.ndarray, size: int, rows_per_source: int = 1
) -> np.ndarray:
    """Drops every token that would complete an n-gram of `source_BN` after the last n - 1 tokens of `ids_BT`."""
    if source_BN.shape[1] < size or ids_BT.shape[1] < size - 1:
        return scores_BV
    windows = np.lib.stride_tricks.sliding_window_view(source_BN, size, axis=1)  # [B', N - n + 1, n]
    windows = np.repeat(windows, rows_per_source, axis=0)
    last = ids_BT[:, None, ids_BT.shape[1] - (size - 1) :]
    repeated = (windows[..., :-1] == last).all(axis=-1)
    return drop(scores_BV, _seen(windows[..., -1], scores_BV.shape[-1], repeated))


class NoRepeatNGramLogitsProcessor:
    """Drops tokens that would complete an n-gram which the row already holds (prompt and padding included).

    For n = 1 all seen tokens are dropped. Source: Paulus et al., "A Deep Reinforced Model for Abstractive
    Summarization" (arXiv:1705.04304), section 2.5.
    """

    def __init__(self, ngram_size: int) -> None:
        self.size = _at_least_one("no_repeat_ngram_size", ngram_size)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        return _drop_completed_ngrams(ids_BT, ids_BT, scores_BV, self.size)


class EncoderNoRepeatNGramLogitsProcessor:
    """Drops tokens that would complete an n-gram of the prompt, `encoder_input_ids` int64 [B, N]."""

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: np.ndarray) -> None:
        self.size = _at_least_one("encoder_no_repeat_ngram_size", encoder_ngram_size)
        self.ids = encoder_input_ids

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        rows_per_source = scores_BV.shape[0] // self.ids.shape[0]
        return _drop_completed_ngrams(self.ids, ids_BT, scores_BV, self.size, rows_per_source)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name}={value} must be at least 1")
    return int(value)


class MinLengthLogitsProcessor:
    """Drops all end-of-sequence ids while the row, prompt included, is shorter than `min_length`."""

    def __init__(self, min_length: int, eos_token_id: Sequence[int]) -> None:
        if min_length < 0:
            raise InputError(f"min_length={min_length} must be at least 0")
        self.min_length = min_length
        self.eos_ids = list(eos_token_id)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        if ids_BT.shape[1] >= self.min_length:
            return scores_BV
        return drop(scores_BV, _members(self.eos_ids, scores_BV.shape[-1]))


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """Drops all end-of-sequence ids while fewer than `min_new_tokens` follow the prompt."""

    def __init__(self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: Sequence[int]) -> None:
        if min_new_tokens < 0:
            raise InputError(f"min_new_tokens={min_new_tokens} must be at least 0")
        super().__init__(prompt_length_to_skip + min_new_tokens, eos_token_id)


class PrefixConstrainedLogitsProcessor:
    """Drops all tokens but those that `prefix_allowed_tokens_fn(row of the prompt, ids_T)` returns.

    If no beam of a row has an allowed token with a finite score, the allowed ones get 0, so that the constraint
    holds. Source: De Cao et al., "Autoregressive Entity Retrieval" (arXiv:2010.00904). Raises InputError when nothing
    is allowed.
    """

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]], num_beams: int) -> None:
        self.allowed = prefix_allowed_tokens_fn
        self.num_beams = num_beams

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        mask_BV = np.full_like(scores_BV, -np.inf)
        for row, ids_T in enumerate(ids_BT):
            allowed = np.asarray(self.allowed(row // self.num_beams, ids_T), dtype=np.int64)
            if allowed.size == 0:
                where = f"row {row // self.num_beams}"
                raise InputError(f"prefix_allowed_tokens_fn: returned no token for {where}, so nothing could follow")
            if allowed.min() < 0 or allowed.max() >= scores_BV.shape[-1]:
                raise InputError(
                    f"prefix_allowed_tokens_fn: returned an id outside the vocabulary of {scores_BV.shape[-1]} tokens"
                )
            mask_BV[row, allowed] = 0
        result_BV = scores_BV + mask_BV
        nothing_left = np.isneginf(result_BV.max(axis=-1)).reshape(-1, self.num_beams).all(axis=-1)
        return np.where(np.repeat(nothing_left, self.num_beams)[:, None], mask_BV, result_BV)


class ForcedBOSTokenLogitsProcessor:
    """The scores are 0 for `bos_token_id` and -inf for all others while the text is one token long."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V]."""
        return _force(scores_BV, [self.bos_token_id], "forced_bos_token_id") if ids_BT.shape[1] == 1 else scores_BV


class ForcedEOSTokenLogitsProcessor:
    """One token before `max_length`: 0 for the forced ids, -inf for all others."""

    def __init__(self, max_length: int, eos_token_id: Sequence[int]) -> None:
        self.max_length = max_length
        self.eos_ids = list(eos_token_id)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V]."""
        last = ids_BT.shape[1] == self.max_length - 1
        return _force(scores_BV, self.eos_ids, "forced_eos_token_id") if last else scores_BV


class InfNanRemoveLogitsProcessor:
    """NaN -> 0, +inf -> the largest and -inf -> the smallest finite number of the type."""

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Finite scores [B, V]."""
        return np.nan_to_num(scores_BV, nan=0.0)


class ExponentialDecayLengthPenalty:
    """The score s of end-of-sequence ids becomes s + abs(s) * (factor^n - 1), n = number of new tokens - start > 0.

    Infinite and NaN scores of end-of-sequence ids stay as they are.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: Sequence[int],
        input_ids_seq_length: int,
    ) -> None:
        start, self.factor = exponential_decay_length_penalty
        self.start = start + input_ids_seq_length
        self.eos_ids = list(eos_token_id)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with raised scores of the end-of-sequence ids."""
        excess = ids_BT.shape[1] - self.start
        if excess <= 0:
            return scores_BV
        with np.errstate(invalid="ignore", over="ignore"):
            change_BV = np.abs(scores_BV) * (float(np.float64(self.factor) ** excess) - 1)
        use_BV = np.isfinite(scores_BV) & _members(self.eos_ids, scores_BV.shape[-1])
        return scores_BV + np.where(use_BV, change_BV, scores_BV.dtype.type(0))


class SuppressTokensLogitsProcessor:
    """Drops the given tokens."""

    def __init__(self, suppress_tokens: Iterable[int]) -> None:
        self.ids = list(suppress_tokens)

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        return drop(scores_BV, _members(self.ids, scores_BV.shape[-1]))


class SuppressTokensAtBeginLogitsProcessor(SuppressTokensLogitsProcessor):
    """Drops the given tokens where the text is exactly `begin_index` tokens long."""

    def __init__(self, begin_suppress_tokens: Iterable[int], begin_index: int) -> None:
        super().__init__(begin_suppress_tokens)
        self.begin_index = begin_index

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Scores [B, V] with -inf at the dropped tokens."""
        return super().__call__(ids_BT, scores_BV) if ids_BT.shape[1] == self.begin_index else scores_BV


class LogitNormalization:
    """ln softmax of the scores."""

    def __call__(self, ids_BT: np.ndarray, scores_BV: np.ndarray) -> np.ndarray:
        """Log-probabilities [B, V]."""
        return log_softmax(scores_BV)
