"""The model's side of generation: which tokens, positions, mask and cache each forward call gets; and the plain loop.

Rules of `GenerationMixin` of Transformers 5.23.0: `_prefill`, `prepare_inputs_for_generation`,
`_update_model_kwargs_for_generation`, `_sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.generation.logits_process import LogitsProcessorList, softmax
from refllm.generation.stopping import StoppingCriteriaList
from refllm.generation.streamers import BaseStreamer
from refllm.inputs import as_tensor, to_numpy


@dataclass(kw_only=True)
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns; fields that were not asked for are None.

    R rows are batch * num_return_sequences; with beams, scores and logits have batch * num_beams rows.
    """

    sequences: np.ndarray
    """int64 [R, T]: prompt and generated tokens, padded on the right."""
    sequences_scores: np.ndarray | None = None
    """Beams: float32 [R], sum of the processed log-probabilities / length ** length_penalty."""
    scores: tuple[np.ndarray, ...] | None = None
    """One float32 [rows, V] per step: after the processors."""
    logits: tuple[np.ndarray, ...] | None = None
    """One float32 [rows, V] per step: as the model gave them."""
    beam_indices: np.ndarray | None = None
    """Beams: int64 [R, steps], the row of `scores` each token was chosen from, -1 behind the end."""
    attentions: tuple[Any, ...] | None = None
    """One entry per step: what the model returned."""
    hidden_states: tuple[Any, ...] | None = None
    """One entry per step: what the model returned."""
    past_key_values: Any = None

    def as_tensors(self, device: Any) -> GenerateOutput:
        """The same, its arrays as tensors of Torch."""
        return replace(self, **{name: as_tensor(value, device=device) for name, value in vars(self).items()})

    def keys(self) -> list[str]:
        """The names of the fields that are there."""
        return [name for name, value in vars(self).items() if value is not None]

    def __getitem__(self, key: str | int) -> Any:
        """A field by name, or by its place among those that are there."""
        name = self.keys()[key] if isinstance(key, int) else key
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


@dataclass(kw_only=True)
class Recorder:
    """Collects what the caller asked for, step by step."""

    scores: list[np.ndarray] | None = None
    logits: list[np.ndarray] | None = None
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None

    def add(self, logits_BV: np.ndarray, scores_BV: np.ndarray, output: Any) -> None:
        """Takes one step."""
        if self.logits is not None:
            self.logits.append(logits_BV)
        if self.scores is not None:
            self.scores.append(scores_BV)
        if self.attentions is not None:
            self.attentions.append(output.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(output.hidden_states)

    @property
    def reads_logits(self) -> bool:
        """Whether numbers of every token are among it, and not only what was chosen."""
        return self.scores is not None or self.logits is not None

    def fields(self) -> dict[str, Any]:
        """The collected tuples, as fields of GenerateOutput."""
        return {name: None if value is None else tuple(value) for name, value in vars(self).items()}


@dataclass(kw_only=True)
class Decoder:
    """A model with the state of one running generation.

    `mask_BM`, int64 [B, M], covers cached tokens and prompt; None means all ones. `positions_BN` are the positions of
    the prompt, at least of its part that is not cached. Both grow by one column per step.

    `greedy`, logits [B, V] -> int64 [B], chooses the largest of each row; None: `np.argmax`. A model that has its own
    gets its logits as it gave them: they stay on its device.
    """

    model: Callable[..., Any]
    mask_BM: np.ndarray | None
    positions_BN: np.ndarray
    use_cache: bool
    cache: Any = None
    chunk_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    greedy: Callable[[Any], np.ndarray] | None = None
    output: Any = None
    """What the model returned last."""

    def prefill(self, ids_BS: np.ndarray, embeds_BSE: np.ndarray | None, new: int) -> Any:
        """Runs the last `new` columns of the prompt (what the cache does not hold), in chunks where asked for.

        Returns the logits of the last position, float32 [B, V] (with `greedy` a tensor in the model's dtype).
        """
        prompt = ids_BS if embeds_BSE is None else embeds_BSE
        prompt = prompt[:, prompt.shape[1] - new :]
        past = 0 if self.cache is None else self.cache.get_seq_length()
        positions_BN = self.positions_BN[:, self.positions_BN.shape[1] - new :]
        size = self.chunk_size or new
        for start in range(0, new, size):
            chunk = prompt[:, start : start + size]
            end = start + chunk.shape[1]
            mask_BM = self.mask_BM
            if mask_BM is not None and end < new:
                mask_BM = mask_BM[:, : past + end]
            what = {"input_ids": chunk} if embeds_BSE is None else {"inputs_embeds": chunk}
            logits_BV = self._forward(mask_BM, positions_BN[:, start:end], **what)
        return logits_BV

    def step(self, ids_BT: np.ndarray) -> Any:
        """Runs the last token of each row (without a cache: all of them). Returns logits [B, V] as `prefill` does."""
        self.positions_BN = np.concatenate([self.positions_BN, self.positions_BN[:, -1:] + 1], axis=1)
        if self.mask_BM is not None:
            self.mask_BM = np.concatenate([self.mask_BM, np.ones_like(self.mask_BM[:, :1])], axis=1)
        if self.use_cache:
            return self._forward(self.mask_BM, self.positions_BN[:, -1:], input_ids=ids_BT[:, -1:])
        return self._forward(self.mask_BM, self.positions_BN, input_ids=ids_BT)

    def _forward(self, mask_BM: np.ndarray | None, positions_BN: np.ndarray, **what: np.ndarray) -> Any:
        self.output = self.model(
            attention_mask=mask_BM,
            position_ids=positions_BN,
            past_key_values=self.cache,
            use_cache=self.use_cache,
            logits_to_keep=1,
            **what,
            **self.options,
        )
        if self.use_cache:
            self.cache = self.output.past_key_values
        logits_BV = self.output.logits[:, -1]
        return to_numpy(logits_BV).astype(np.float32) if self.greedy is None else logits_BV

    def best(self, scores_BV: Any) -> np.ndarray:
        """The token of the largest score of each row, int64 [B]; the lowest id on ties."""
        return np.argmax(scores_BV, axis=-1) if self.greedy is None else self.greedy(scores_BV)

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i of the cache the former row rows[i]."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def draw(scores_BV: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One token of each row, drawn from softmax(scores) by inversion of the cumulative distribution. int64 [B].

    Raises InputError where a row has no distribution (NaN, or every token dropped).
    """
    p_BV = softmax(scores_BV).astype(np.float64)
    cumulative_BV = np.cumsum(p_BV, axis=-1)
    total_B1 = cumulative_BV[:, -1:]
    if not np.all(np.isfinite(total_B1)):
        row = int(np.flatnonzero(~np.isfinite(total_B1))[0])
        raise InputError(f"generate: the scores of row {row} hold NaN, +inf, or no token that is not dropped")
    # Strictly greater: a token of probability 0 adds nothing to the sum and is never the first one above.
    threshold_B1 = random.random((p_BV.shape[0], 1)) * total_B1
    return np.argmax(cumulative_BV > threshold_B1, axis=-1)


def decode_loop(
    decoder: Decoder,
    ids_BT: np.ndarray,
    logits_BV: Any,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    *,
    pad_id: int | None,
    vocab_size: int,
    random: np.random.Generator | None,
    streamer: BaseStreamer | None,
    recorder: Recorder,
) -> np.ndarray:
    """Greedy decoding (`random` None) or sampling, one token per row and step, until every row has stopped.

        s = processors(ids, logits);  t = argmax s (lowest id on ties)  or  t ~ softmax(s)

    Rows that stopped get `pad_id` - unless no criterion looks for end-of-sequence ids: then, as in Transformers, they
    go on until the last row stops. Returns all tokens, int64 [B, T].
    """
    unfinished_B = np.ones(ids_BT.shape[0], dtype=bool)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    while True:
        scores_BV = processors(ids_BT, logits_BV)
        recorder.add(logits_BV, scores_BV, decoder.output)
        tokens_B = decoder.best(scores_BV) if random is None else draw(scores_BV, random)
        if pads and not unfinished_B.all():
            tokens_B = np.where(unfinished_B, tokens_B, _padding(pad_id, vocab_size))
        ids_BT = np.concatenate([ids_BT, tokens_B[:, None]], axis=1)
        recorded = None if recorder.scores is None else tuple(recorder.scores)
        unfinished_B &= ~criteria(ids_BT, recorded)
        if streamer is not None:
            streamer.put(tokens_B)
        if not unfinished_B.any():
            break
        logits_BV = decoder.step(ids_BT)
    if streamer is not None:
        streamer.end()
    return ids_BT


def _padding(pad_id: int | None, vocab_size: int) -> int:
    if pad_id is None or not 0 <= pad_id < vocab_size:
        raise InputError(
            f"generate: rows end at different times, so pad_token_id={pad_id} must be a token id below {vocab_size}"
        )
    return pad_id
