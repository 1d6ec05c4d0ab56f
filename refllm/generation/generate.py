"""`generate`: text generation with a causal language model - greedy, sampling, beam search and beam sampling.

Settings are described by `refllm.generation.config`, score processing by `refllm.generation.processor_order`, the loops
by `refllm.generation.decoding` and `refllm.generation.beam_search`. This module prepares the prompt: attention mask,
positions, lengths, cache. The rules are those of `GenerationMixin.generate` of Transformers 5.23.0, so that the same
model gives the same tokens (random draws excepted: those come from a NumPy generator).
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.generation.beam_search import BeamSettings, beam_search
from refllm.generation.config import FIELDS, GenerationConfig
from refllm.generation.decoding import Decoder, GenerateOutput, Recorder, decode_loop
from refllm.generation.logits_process import LogitsProcessor
from refllm.generation.processor_order import ProcessorInputs, make_processors
from refllm.generation.seeds import generator
from refllm.generation.stopping import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StoppingCriterion,
    StopStringCriteria,
)
from refllm.generation.streamers import BaseStreamer, TextIteratorStreamer
from refllm.inputs import is_tensor, refuse_unknown, to_numpy


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads first. B rows."""

    ids: np.ndarray
    """int64 [B, S]; S may be 0 where there are embeddings."""
    embeds: np.ndarray | None
    """[B, N, E], used for the first call instead of `ids`."""
    mask: np.ndarray
    """int64 0/1 [B, M], M = cached tokens + columns to run."""
    positions: np.ndarray
    """int64 [B, at least `new`]."""
    new: int
    """Columns at the end of ids or embeds that the cache does not hold."""
    cache: Any

    def repeated(self, count: int) -> Prompt:
        """Every row `count` times, the copies adjacent. The cache is the caller's to repeat."""
        if count == 1:
            return self
        return replace(
            self,
            ids=np.repeat(self.ids, count, axis=0),
            embeds=None if self.embeds is None else np.repeat(self.embeds, count, axis=0),
            mask=np.repeat(self.mask, count, axis=0),
            positions=np.repeat(self.positions, count, axis=0),
        )


def generate(
    model: Callable[..., Any],
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    streamer: BaseStreamer | None = None,
    seed: int | np.random.Generator | None = None,
    *,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    inputs_embeds: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **settings: Any,
) -> np.ndarray | GenerateOutput:
    """Continues each row of a prompt.

    Args:
        model: a causal language model: called with input_ids or inputs_embeds, attention_mask, position_ids,
            past_key_values, use_cache, logits_to_keep, it returns an object with `logits` [B, S', V] and
            `past_key_values`; it has `config` and `generation_config`.
        input_ids: integers [B, S], padded on the left; None starts from the beginning-of-sequence id.
        attention_mask: [B, S], 0 at padding. Without it, padding ids are masked where the padding id is not an
            end-of-sequence id, and nothing otherwise. With a cache: [B, cached + new], and `input_ids` are all tokens
            or the new ones only.
        generation_config, settings: see `GenerationConfig`. Settings win.
        tokenizer: needed for `stop_strings`.
        streamer: gets the prompt and every new token; not with beams.
        seed: for sampling: an integer, a NumPy generator, or None for that of `set_seed`, or else fresh randomness.
        logits_processor, stopping_criteria: the caller's own, after the standard ones.
        prefix_allowed_tokens_fn: (row, ids_T) -> ids that may follow.
        negative_prompt_ids: [B, N], the other side of classifier-free guidance (`guidance_scale`).
        inputs_embeds: [B, N, E] instead of the ids' embeddings; the result then holds `input_ids` (where given) and
            the new tokens.
        past_key_values: a cache that holds the beginning of the prompt. With beams or several sequences per row,
            its rows must be repeated already.

    Returns:
        int64 [B * num_return_sequences, T], prompt included, or a GenerateOutput with
        `return_dict_in_generate=True`. For a prompt of tensors they are tensors, on its device.

    Raises:
        InputError: for anything that cannot be done, in one sentence.
    """
    if "inputs" in settings:
        if input_ids is not None:
            raise InputError("generate: inputs and input_ids are two names of the same argument; give one")
        input_ids = settings.pop("inputs")
    settings = _without_absent(settings)
    refuse_unknown(settings, FIELDS | _ARGUMENTS, "generate")
    if (head := getattr(model, "head", "causal_lm")) != "causal_lm":
        raise InputError(f"generate: text needs a causal language model, and this one has the head {head}")
    defaults = getattr(model, "generation_config", None)
    config, length_is_default = GenerationConfig.resolve(settings, generation_config, defaults)
    limits = _ModelLimits.of(model)

    ids, embeds = _read_prompt(input_ids, inputs_embeds, config, limits)
    if embeds is not None:
        config = replace(config, use_cache=True, source="generate", published=True)
    prompt = _prepare_prompt(ids, embeds, attention_mask, position_ids, past_key_values, config)
    config = _with_lengths(config, prompt, length_is_default, limits)
    num_beams = config.num_beams or 1
    if streamer is not None and num_beams > 1:
        raise InputError("generate: a streamer needs num_beams=1, because beams change tokens they already have")

    copies = max(num_beams, config.num_return_sequences or 1)
    rows = prompt.repeated(copies)
    mask = None if rows.mask.all() else rows.mask
    processors = make_processors(
        config,
        ProcessorInputs(
            prompt_length=prompt.ids.shape[1],
            vocab_size=limits.vocab_size,
            prompt_ids=prompt.ids if embeds is None else None,
            padding_B=None if mask is None else np.argmax(mask != 0, axis=1),
            model=model,
            negative_prompt_ids=_rows_of(negative_prompt_ids, "negative_prompt_ids", prompt, copies),
            negative_prompt_attention_mask=_rows_of(
                negative_prompt_attention_mask, "negative_prompt_attention_mask", prompt, copies
            ),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            user_processors=logits_processor or (),
        ),
    )
    criteria = _criteria(config, stopping_criteria or (), tokenizer, limits)
    recorder = _recorder(config)
    only_the_largest = not (config.do_sample or num_beams > 1 or processors or recorder.reads_logits)
    decoder = Decoder(
        model=model,
        mask_BM=mask,
        positions_BN=rows.positions,
        use_cache=bool(config.use_cache),
        cache=_cache(config, prompt, model),
        chunk_size=config.prefill_chunk_size,
        options={name: True for name in ("output_attentions", "output_hidden_states") if getattr(config, name)},
        greedy=getattr(model, "greedy_tokens", None) if only_the_largest else None,
    )
    random = generator(seed) if config.do_sample else None
    if streamer is not None:
        streamer.put(rows.ids)
    logits_BV = decoder.prefill(rows.ids, rows.embeds, prompt.new)
    if num_beams > 1:
        settings_ = _beam_settings(config, random, limits)
        output = beam_search(decoder, rows.ids, logits_BV, processors, criteria, settings_, recorder)
        output.sequences_scores = output.sequences_scores if config.output_scores else None
    else:
        sequences = decode_loop(
            decoder,
            rows.ids,
            logits_BV,
            processors,
            criteria,
            pad_id=_pad_id(config),
            vocab_size=limits.vocab_size,
            random=random,
            streamer=streamer,
            recorder=recorder,
        )
        output = GenerateOutput(sequences=sequences, past_key_values=decoder.cache, **recorder.fields())
    tensor = next((given for given in (input_ids, attention_mask, inputs_embeds) if is_tensor(given)), None)
    if tensor is not None:
        output = output.as_tensors(tensor.device)
    return output if config.return_dict_in_generate else output.sequences


_OTHER_WAYS = frozenset({"assistant_model", "assistant_tokenizer", "custom_generate", "synced_gpus"})


def _without_absent(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without arguments of Transformers that ask for nothing. Raises InputError for those that do."""
    for name in sorted(_OTHER_WAYS & settings.keys()):
        if settings[name]:
            raise InputError(f"generate: {name} is not supported; refllm does greedy, sampling and beam search")
    # No model of these families reads token types, which some tokenizers make; defaults are used in one way.
    dropped = _OTHER_WAYS | {"token_type_ids", "use_model_defaults", "trust_remote_code"}
    return {name: value for name, value in settings.items() if name not in dropped}


_ARGUMENTS = frozenset(inspect.signature(generate).parameters) - {"settings"}


def stream_text(model: Callable[..., Any], tokenizer: Any, input_ids: Any, **arguments: Any) -> Iterator[str]:
    """Yields the generated text of one row piece by piece; the pieces join to the decoded continuation.

    `generate` runs in a thread of its own; its errors are raised here. It stops when the iteration is abandoned.
    `skip_special_tokens=False` shows special tokens. Further arguments: see `generate`.
    """
    decode = {"skip_special_tokens": arguments.pop("skip_special_tokens", True)}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, **decode)
    abandoned = threading.Event()
    own = [*(arguments.pop("stopping_criteria", None) or ()), lambda ids, scores: abandoned.is_set()]

    def run() -> None:
        try:
            generate(model, input_ids, tokenizer=tokenizer, streamer=streamer, stopping_criteria=own, **arguments)
        except BaseException as error:  # handed to the reader, who would wait for ever
            streamer.fail(error)

    thread = threading.Thread(target=run, daemon=True, name="refllm-stream_text")
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        abandoned.set()
        thread.join()


@dataclass(frozen=True)
class _ModelLimits:
    vocab_size: int
    max_positions: int | None

    @classmethod
    def of(cls, model: Any) -> _ModelLimits:
        config = model.config
        return cls(int(config.vocab_size), getattr(config, "max_position_embeddings", None))


def _integers(value: Any, name: str) -> np.ndarray:
    array = to_numpy(value)
    if array.ndim != 2:
        raise InputError(f"generate: {name} has the shape {array.shape}, expected [rows, length]")
    if array.dtype.kind not in "iu":
        raise InputError(f"generate: {name} holds {array.dtype} values, expected integers")
    return array.astype(np.int64)


def _read_prompt(
    input_ids: Any, inputs_embeds: Any, config: GenerationConfig, limits: _ModelLimits
) -> tuple[np.ndarray, np.ndarray | None]:
    embeds = None if inputs_embeds is None else to_numpy(inputs_embeds)
    if embeds is not None and (embeds.ndim != 3 or embeds.shape[1] == 0):
        text = f"generate: inputs_embeds has the shape {embeds.shape}, expected [rows, length > 0, hidden_size]"
        raise InputError(text)
    if input_ids is not None:
        ids = _integers(input_ids, "input_ids")
    elif embeds is not None:
        ids = np.zeros((embeds.shape[0], 0), dtype=np.int64)
    elif config.bos_token_id is not None:
        ids = np.full((1, 1), config.bos_token_id, dtype=np.int64)
    else:
        raise InputError("generate: there are no input_ids, and no bos_token_id to start from")
    if ids.shape[0] == 0 or (ids.shape[1] == 0 and embeds is None):
        raise InputError(f"generate: the prompt is empty (input_ids of shape {ids.shape})")
    if embeds is not None and embeds.shape[0] != ids.shape[0]:
        raise InputError(f"generate: inputs_embeds has {embeds.shape[0]} rows and input_ids has {ids.shape[0]}")
    outside = ids[(ids < 0) | (ids >= limits.vocab_size)]
    if outside.size:
        raise InputError(f"generate: input_ids holds {outside[0]}, expected ids from 0 to {limits.vocab_size - 1}")
    return ids, embeds


def _pad_id(config: GenerationConfig) -> int | None:
    """The padding id; where none is set the first end-of-sequence id."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_ids[0] if config.eos_ids else None


def _inferred_mask(ids: np.ndarray, config: GenerationConfig) -> np.ndarray:
    pad_id = _pad_id(config)
    if pad_id is None or pad_id in config.eos_ids:
        return np.ones_like(ids)
    return (ids != pad_id).astype(np.int64)


def _prepare_prompt(
    ids: np.ndarray,
    embeds: np.ndarray | None,
    attention_mask: Any,
    position_ids: Any,
    cache: Any,
    config: GenerationConfig,
) -> Prompt:
    """Mask, positions, and how much of the prompt is new to the cache."""
    length = ids.shape[1] if embeds is None else embeds.shape[1]
    if attention_mask is not None:
        mask = to_numpy(attention_mask)
        if mask.ndim != 2 or mask.shape[0] != ids.shape[0]:
            text = f"generate: attention_mask has the shape {mask.shape}, expected [{ids.shape[0]}, length]"
            raise InputError(text)
        mask = (mask != 0).astype(np.int64)
    elif ids.shape[1] > 0:
        mask = _inferred_mask(ids, config)
    else:
        mask = np.ones((ids.shape[0], length), dtype=np.int64)
    _warn_of_right_padding(ids, mask, embeds, config, given=attention_mask is not None)

    new = _new_columns(length, mask.shape[1], cache, holds_all=embeds is not None)
    if position_ids is None:
        positions = np.where(mask == 0, 0, np.cumsum(mask, axis=1) - 1)
    else:
        positions = _integers(position_ids, "position_ids")
        if positions.shape[0] not in (1, ids.shape[0]) or positions.shape[1] < new:
            text = f"generate: position_ids has the shape {positions.shape}, expected [{ids.shape[0]}, {new}]"
            raise InputError(text)
        positions = np.broadcast_to(positions, (ids.shape[0], positions.shape[1]))
    return Prompt(ids=ids, embeds=embeds, mask=mask, positions=positions, new=new, cache=cache)


def _new_columns(length: int, mask_length: int, cache: Any, holds_all: bool) -> int:
    """How many columns at the end of the prompt are to be run. The prompt is all tokens, or the new ones only."""
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise InputError(f"generate: past_key_values is a {type(cache).__name__}, not a cache object")
    past = 0 if cache is None else int(cache.get_seq_length())
    all_given = mask_length == length or holds_all
    new = length - past if all_given else length
    if mask_length != past + new:
        text = f"generate: attention_mask has {mask_length} columns, expected {past + length if past else length}"
        raise InputError(text + (f" ({past} cached and {length} given)" if past else ""))
    if new < 1:
        raise InputError(
            f"generate: past_key_values holds {past} tokens, so a prompt of {length} leaves nothing to run; give all "
            f"tokens, or the new ones with an attention_mask over cached and new ones, or crop the cache"
        )
    return new


def _warn_of_right_padding(
    ids: np.ndarray, mask: np.ndarray, embeds: np.ndarray | None, config: GenerationConfig, given: bool
) -> None:
    pad_id = _pad_id(config)
    if embeds is not None or pad_id is None or ids.shape[0] == 1:
        return
    ends_in_padding = (mask[:, -1] == 0) if given else (ids[:, -1] == pad_id)
    if ends_in_padding.any():
        text = "generate: rows are padded on the right, so that new tokens follow padding; pad on the left"
        warnings.warn(text, UserWarning, stacklevel=4)


def _with_lengths(
    config: GenerationConfig, prompt: Prompt, length_is_default: bool, limits: _ModelLimits
) -> GenerationConfig:
    """max_length and min_length as counts of prompt and new tokens together.

    max_new_tokens wins over max_length, min_new_tokens over min_length. A length nobody set means 20 new tokens, but
    no more than the model has positions. A prompt of embeddings does not count in the result, so that it is taken off
    a max_length or min_length that includes it.
    """
    length = prompt.ids.shape[1]
    embedded = 0 if prompt.embeds is None or prompt.embeds.shape[1] == length else prompt.embeds.shape[1]
    maximum, minimum = config.max_length or 0, config.min_length or 0
    if config.max_new_tokens is not None:
        maximum = length + config.max_new_tokens
    elif length_is_default:
        maximum = length + maximum
        maximum = maximum if limits.max_positions is None else min(maximum, limits.max_positions)
    else:
        maximum -= embedded
    minimum = max(minimum - embedded, 0) if config.min_new_tokens is None else length + config.min_new_tokens
    if length >= maximum:
        limit = "max_position_embeddings" if length_is_default and config.max_new_tokens is None else "max_length"
        advice = "set max_new_tokens" if limit != "max_length" else "increase it or set max_new_tokens"
        raise InputError(f"generate: the prompt has {length} tokens and {limit}={maximum} leaves no room; {advice}")
    if minimum > maximum:
        text = f"generate: min_length={minimum} is greater than max_length={maximum}, which stops the text"
        warnings.warn(text, UserWarning, stacklevel=3)
    return replace(config, max_length=maximum, min_length=minimum, source="generate", published=True)


def _rows_of(value: Any, name: str, prompt: Prompt, copies: int) -> np.ndarray | None:
    if value is None:
        return None
    array = _integers(value, name)
    if array.shape[0] != prompt.ids.shape[0] or array.shape[1] == 0:
        raise InputError(f"generate: {name} has the shape {array.shape}, expected [{prompt.ids.shape[0]}, length > 0]")
    return np.repeat(array, copies, axis=0)


def _criteria(
    config: GenerationConfig, own: Sequence[StoppingCriterion], tokenizer: Any, limits: _ModelLimits
) -> StoppingCriteriaList:
    assert config.max_length is not None
    found: list[StoppingCriterion] = [MaxLengthCriteria(config.max_length, limits.max_positions)]
    if config.max_time is not None:
        found.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise InputError("generate: stop_strings need the tokenizer; pass tokenizer=")
        found.append(StopStringCriteria(tokenizer, config.stop_strings))
    if config.eos_ids:
        found.append(EosTokenCriteria(config.eos_ids))
    return StoppingCriteriaList([*found, *own])


def _recorder(config: GenerationConfig) -> Recorder:
    def asked(flag: bool | None) -> list[Any] | None:
        return [] if flag and config.return_dict_in_generate else None

    return Recorder(
        scores=asked(config.output_scores),
        logits=asked(config.output_logits),
        attentions=asked(config.output_attentions),
        hidden_states=asked(config.output_hidden_states),
    )


def _cache(config: GenerationConfig, prompt: Prompt, model: Any) -> Any:
    """The cache to start with; None lets the model make one."""
    static = config.cache_implementation == "static"
    if prompt.cache is not None:
        if static:
            raise InputError("generate: give past_key_values or cache_implementation, not both")
        return prompt.cache
    if not config.use_cache:
        if config.prefill_chunk_size is not None:
            raise InputError("generate: prefill_chunk_size needs use_cache=True, because chunks meet in the cache")
        return None
    if not static:
        return None
    assert config.max_length is not None
    length = config.max_length - 1 + (prompt.new - prompt.ids.shape[1] if prompt.embeds is not None else 0)
    return model.new_cache(max_cache_len=max(length, config.max_cache_len or 0))


def _beam_settings(config: GenerationConfig, random: np.random.Generator | None, limits: _ModelLimits) -> BeamSettings:
    assert config.num_beams is not None
    assert config.num_return_sequences is not None
    assert config.max_length is not None
    assert config.length_penalty is not None
    assert config.early_stopping is not None
    eos_ids = config.eos_ids
    if limits.vocab_size < max(2, 1 + len(eos_ids)):
        text = f"generate: beams with {len(eos_ids)} end-of-sequence ids need a vocabulary of more tokens"
        raise InputError(f"{text} than {limits.vocab_size}")
    # Transformers: a padding id of 0 counts as none, and without end-of-sequence ids there is no fill but -1.
    fill = (config.pad_token_id or eos_ids[0]) if eos_ids else -1
    return BeamSettings(
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        max_length=config.max_length,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        num_eos=len(eos_ids),
        fill=fill,
        random=random,
    )
