"""Beam search and beam sampling.

The rule of `GenerationMixin._beam_search` (Transformers 5.23.0), for each row of the batch. With nb beams, n
end-of-sequence ids, prompt length P, maximum length M, length penalty a:

    Q = max(2, 1 + n) * nb                                   candidates looked at
    running beams: score r = 0 for the first, -1e9 for the others;  finished slots: score -1e9, empty
    repeat with length t = P, P + 1, ...
        lp = processors(ids, log softmax(logits))            (not normalised again)
        c  = r + lp over all nb * V continuations; the Q best
             (sampling: Q draws without replacement from softmax(c), in the order drawn)
        hit = a stopping criterion holds for the continuation
        running beams  = the nb best of c - 1e9 * hit
        finished slots = the nb best of the stored ones and of c / (t + 1 - P)^a, where the latter get -1e9 for each
             of: no hit or not among the first nb candidates; the row cannot improve; early_stopping is true and all
             slots are finished
        a row can improve while   best r / L^a > (worst finished score, -1e9 with an empty slot)   held so far,
             L = t + 1 - P, or M - P where early_stopping is "never" and a > 0
    until no row can improve, or early_stopping is true and every slot of every row is finished, or all candidates hit

Scores are float32, so that -1e9 absorbs what it is added to. Among equal scores the first candidate wins (the lowest
beam and token id; stored slots before new ones); `torch.topk`, which Transformers uses, leaves that open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refllm.generation.decoding import Decoder, GenerateOutput, Recorder
from refllm.generation.logits_process import LogitsProcessorList, log_softmax
from refllm.generation.stopping import StoppingCriteriaList

OUT = np.float32(-1e9)
"""The score of what must not win. In float32 the sum of it and any usual score is it again."""


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """The numbers of the rule above. `fill` stands in sequences behind their end."""

    num_beams: int
    num_return_sequences: int
    max_length: int
    length_penalty: float
    early_stopping: bool | str
    num_eos: int
    fill: int
    random: np.random.Generator | None = None
    """None: beam search; else beam sampling with this source."""

    @property
    def num_candidates(self) -> int:
        """Q of the rule."""
        return max(2, 1 + self.num_eos) * self.num_beams


@dataclass
class _Beams:
    """k hypotheses for each row: tokens int64 [B, k, M], the rows they came from int64 [B, k, M - P], scores."""

    tokens: np.ndarray
    origins: np.ndarray
    scores: np.ndarray

    def pick(self, index_BK: np.ndarray) -> _Beams:
        """Some of the hypotheses, by index."""
        return _Beams(_take(self.tokens, index_BK), _take(self.origins, index_BK), _take(self.scores, index_BK))

    def rescored(self, scores_BK: np.ndarray) -> _Beams:
        """The same hypotheses with other scores."""
        return _Beams(self.tokens, self.origins, scores_BK)

    def and_then(self, other: _Beams) -> _Beams:
        """These hypotheses followed by others."""
        pairs = zip((self.tokens, self.origins, self.scores), (other.tokens, other.origins, other.scores), strict=True)
        return _Beams(*(np.concatenate(pair, axis=1) for pair in pairs))


def _take(array: np.ndarray, index_BK: np.ndarray) -> np.ndarray:
    return np.take_along_axis(array, index_BK.reshape(index_BK.shape + (1,) * (array.ndim - 2)), axis=1)


def _best(scores_BN: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, largest first, the lowest index first among equals: int64 [B, count]."""
    size = scores_BN.shape[-1]
    if size > 8 * count:  # narrow down: everything not below the count-th largest, in order
        limit_B = np.partition(scores_BN, size - count, axis=-1)[:, size - count]
        picked = [np.flatnonzero(row >= limit) for row, limit in zip(scores_BN, limit_B, strict=True)]
        if all(len(p) >= count for p in picked):  # not so where scores are NaN
            rows = zip(picked, scores_BN, strict=True)
            return np.stack([p[np.argsort(-row[p], kind="stable")[:count]] for p, row in rows])
    return np.argsort(-scores_BN, axis=-1, kind="stable")[:, :count]


def draw_without_replacement(scores_BN: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` different indices of each row, one after the other with probabilities softmax(scores): int64 [B, count].

    The Gumbel-top-k rule: the largest scores after independent Gumbel noise, in order, are such draws. Indices of
    probability 0 come last. Source: Kool et al., "Stochastic Beams and Where to Find Them" (arXiv:1903.06059).
    """
    noise_BN = random.gumbel(size=scores_BN.shape)
    return _best(scores_BN.astype(np.float64) + noise_BN, count)


def _continuations(running: _Beams, lp_BKV: np.ndarray, step: int, prompt_length: int, s: BeamSettings) -> _Beams:
    """The Q candidates that extend the running beams by one token."""
    batch, _, vocab_size = lp_BKV.shape
    c_BN = (lp_BKV + running.scores[:, :, None]).reshape(batch, -1)
    if s.random is None:
        best_BQ = _best(c_BN, s.num_candidates)
    else:
        best_BQ = draw_without_replacement(c_BN, s.num_candidates, s.random)
    beam_BQ, token_BQ = np.divmod(best_BQ, vocab_size)
    candidates = running.pick(beam_BQ).rescored(np.take_along_axis(c_BN, best_BQ, axis=1))
    candidates.tokens[:, :, prompt_length + step] = token_BQ
    candidates.origins[:, :, step] = beam_BQ + np.arange(batch)[:, None] * s.num_beams
    return candidates


def _normalised(scores: np.ndarray, length: int, length_penalty: float) -> np.ndarray:
    """scores / length^penalty."""
    with np.errstate(all="ignore"):
        return scores / np.float32(np.float64(length) ** length_penalty)


def _can_improve(running: _Beams, finished: _Beams, done_BK: np.ndarray, length: int, s: BeamSettings) -> np.ndarray:
    """Bool [B, 1]: a running beam may still beat the worst finished one. `length` counts new tokens."""
    if s.early_stopping == "never" and s.length_penalty > 0.0:
        length = finished.origins.shape[-1]
    bound_B1 = _normalised(running.scores[:, :1], length, s.length_penalty)
    worst_BK = np.where(done_BK, finished.scores.min(axis=1, keepdims=True), OUT)
    return np.any(bound_B1 > worst_BK, axis=1, keepdims=True)


def beam_search(
    decoder: Decoder,
    ids_RT: np.ndarray,
    logits_RV: np.ndarray,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    settings: BeamSettings,
    recorder: Recorder,
) -> GenerateOutput:
    """Runs the rule of this module from the prompt's logits; rows R = batch * num_beams, the beams of a row adjacent.

    Returns sequences int64 [batch * num_return_sequences, T], best first, with their scores and beam indices.
    """
    s = settings
    rows, prompt_length = ids_RT.shape
    batch = rows // s.num_beams
    tokens = np.full((batch, s.num_beams, s.max_length), s.fill, dtype=np.int64)
    tokens[:, :, :prompt_length] = ids_RT.reshape(batch, s.num_beams, -1)
    origins = np.full((batch, s.num_beams, s.max_length - prompt_length), -1, dtype=np.int64)
    scores = np.full((batch, s.num_beams), OUT)
    finished, done = _Beams(tokens, origins, scores), np.zeros((batch, s.num_beams), dtype=bool)
    running = finished.rescored(np.where(np.arange(s.num_beams) == 0, np.float32(0), scores))
    among_first = np.arange(s.num_candidates) < s.num_beams
    improvable = np.ones((batch, 1), dtype=bool)

    for step in range(s.max_length - prompt_length):
        length = step + 1
        lp_RV = processors(ids_RT, log_softmax(logits_RV))
        recorder.add(logits_RV, lp_RV, decoder.output)
        lp_BKV = lp_RV.reshape(batch, s.num_beams, -1)
        candidates = _continuations(running, lp_BKV, step, prompt_length, s)
        ended = candidates.tokens[:, :, : prompt_length + length].reshape(-1, prompt_length + length)
        recorded = None if recorder.scores is None else tuple(recorder.scores)
        hit = criteria(ended, recorded).reshape(batch, -1)

        going_on = candidates.scores + np.where(hit, OUT, np.float32(0))
        running = candidates.rescored(going_on).pick(_best(going_on, s.num_beams))

        ending = hit & among_first
        final = _normalised(candidates.scores, length, s.length_penalty)
        for barred in (done.all(axis=1, keepdims=True) & (s.early_stopping is True), ~improvable, ~ending):
            final = final + np.where(barred, OUT, np.float32(0))
        merged = finished.and_then(candidates.rescored(final))
        best = _best(merged.scores, s.num_beams)
        finished, done = merged.pick(best), _take(np.concatenate([done, ending], axis=1), best)

        decoder.reorder(running.origins[:, :, step].reshape(-1))
        improvable &= _can_improve(running, finished, done, length, s)
        if not improvable.any() or (s.early_stopping is True and done.all()) or hit.all():
            break
        ids_RT = running.tokens[:, :, : prompt_length + length].reshape(rows, -1)
        logits_RV = decoder.step(ids_RT)
    return _output(finished, prompt_length, s, recorder, decoder)


def _output(
    finished: _Beams, prompt_length: int, s: BeamSettings, recorder: Recorder, decoder: Decoder
) -> GenerateOutput:
    """The best num_return_sequences of each row, cut to the longest one."""
    tokens = finished.tokens[:, : s.num_return_sequences].reshape(-1, s.max_length)
    origins = finished.origins[:, : s.num_return_sequences].reshape(tokens.shape[0], -1)
    longest = int((origins >= 0).sum(axis=1).max())
    return GenerateOutput(
        sequences=tokens[:, : prompt_length + longest],
        sequences_scores=finished.scores[:, : s.num_return_sequences].reshape(-1),
        beam_indices=origins[:, :longest],
        past_key_values=decoder.cache,
        **recorder.fields(),
    )
