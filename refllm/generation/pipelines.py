"""`pipeline("text-generation")`: text or chats in, text or chats out, in the shapes of transformers' pipelines.

pipe = refllm.pipeline("text-generation", model="folder", max_new_tokens=20)
pipe("Attention is")                                  # [{"generated_text": "Attention is ..."}]
pipe(["One", "Two"])                                  # [[{"generated_text": ...}], [{"generated_text": ...}]]
pipe([{"role": "user", "content": "Hello"}])          # [{"generated_text": [..., {"role": "assistant", ...}]}]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

import numpy as np

from refllm.errors import InputError
from refllm.generation.config import GenerationConfig
from refllm.inputs import to_numpy
from refllm.storage import hub_cache
from refllm.text.tokenizer import AutoTokenizer, warn_about_vocabulary

DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
"""Used where neither the call nor the checkpoint says anything, as in transformers (pipelines/text_generation.py)."""

_SAMPLING_ONLY = ("temperature",)  # of DEFAULTS: pointless, and warned about, without sampling

Chat = list[dict[str, Any]]


def pipeline(
    task: str | None = "text-generation",
    model: Any = None,
    tokenizer: Any = None,
    *,
    dtype: Any = "float32",
    policy: Any = None,
    low_memory: bool = False,
    backend: str = "numpy",
    device: Any = None,
    **options: Any,
) -> TextGenerationPipeline:
    """A text generation pipeline.

    model: a checkpoint folder, a name of the hub that is in its local cache, or a loaded causal language model.
    tokenizer: a folder, a tokenizer, of Transformers too, or None for the one in the model's folder. dtype, policy,
    low_memory, backend: as in `from_pretrained`, for a model that is loaded here, as are the `options` of `_LOADING`
    and `model_kwargs`. device: a name or the number of a GPU; one that is not here is the CPU, with a warning. Other
    options: defaults for the calls, `batch_size` or `max_new_tokens`, say.

    Raises InputError for another task and for a model without language model head, and what loading raises.
    """
    if task not in (None, "text-generation"):
        raise InputError(
            f"pipeline: the task {task!r} is not supported, only 'text-generation'; for other heads call a model of "
            "AutoModelForSequenceClassification, AutoModelForTokenClassification or AutoModelForQuestionAnswering"
        )
    if model is None:
        raise InputError("pipeline: name a model, that is a checkpoint folder or a loaded model")
    if options.get("device_map") is not None and device is not None:
        raise InputError("pipeline: device and device_map both say where the model goes; give one of them")
    folder = model if isinstance(model, (str, os.PathLike)) else None
    loading = {name: options.pop(name) for name in _LOADING & options.keys()} | options.pop("model_kwargs", {})
    for name in _NOTHING_TO_CHOOSE & options.keys():
        del options[name]
    source = folder if tokenizer is None else tokenizer
    if source is None:
        raise InputError("pipeline: a loaded model comes without its tokenizer, pass tokenizer= as well")
    if isinstance(source, (str, os.PathLike)):
        where = {name: loading[name] for name in hub_cache.KEYWORDS & loading.keys()}
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(source), **where)
    if folder is not None:
        how = {"dtype": dtype, "policy": policy, "low_memory": low_memory, "backend": backend}
        model = _load(folder, device, **(how | loading))
    elif device is not None:
        model.to(device)
    return TextGenerationPipeline(model, tokenizer, **options)


_LOADING = hub_cache.KEYWORDS | {"device_map", "torch_dtype", "attn_implementation", "config", "low_cpu_mem_usage"}
_NOTHING_TO_CHOOSE = {"framework", "use_fast", "feature_extractor", "image_processor", "processor", "num_workers"}
_NOTHING_TO_CHOOSE |= {"binary_output", "pipeline_class"}


def _load(folder: str | os.PathLike[str], device: Any, **options: Any) -> Any:
    import refllm  # its front door: the models are built on this package
    from refllm.terminal.progress import loading_bar

    if device is not None:
        options["device_map"] = device
    with loading_bar(sys.stderr) as progress:
        return refllm.AutoModelForCausalLM.from_pretrained(folder, progress=progress, **options)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options of a call that concern the text; all others are for `generate`."""

    return_full_text: bool | None = None
    return_text: bool | None = None
    return_tensors: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    skip_special_tokens: bool | None = True
    continue_final_message: bool | str | None = None
    prefix: str = ""
    handle_long_generation: str | None = None
    add_special_tokens: bool | None = None
    truncation: bool | str | None = None
    padding: bool | str | None = None
    max_length: int | None = None
    tokenizer_encode_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, str]] | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.return_text is not None and (self.return_full_text is not None or self.return_tensors is not None):
            raise InputError("pipeline: return_text excludes return_full_text and return_tensors")
        if self.return_full_text is not None and self.return_tensors is not None:
            raise InputError("pipeline: return_full_text and return_tensors exclude each other")
        if self.handle_long_generation not in (None, "hole"):
            raise InputError(f"pipeline: handle_long_generation={self.handle_long_generation!r} is not None or 'hole'")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"pipeline: batch_size={self.batch_size!r} is not a positive number")

    def continues(self, chat: Chat) -> bool | str:
        """Whether the model is to continue the last message of a chat (as a rule: if it is the assistant's)."""
        asked = self.continue_final_message
        return chat[-1]["role"] == "assistant" if asked is None else asked

    def encoding(self) -> dict[str, Any]:
        """Arguments for the tokenizer: those that are set."""
        names = ("add_special_tokens", "truncation", "padding", "max_length")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | dict(self.tokenizer_encode_kwargs)


_OPTION_NAMES = {option.name for option in fields(_Options)}


class TextGenerationPipeline:
    """A model and its tokenizer as a function from prompts to continuations. Made by `pipeline`."""

    task = "text-generation"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if getattr(model, "head", "causal_lm") != "causal_lm":
            raise InputError(f"pipeline: text generation needs a causal language model, not the head {model.head!r}")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        warn_about_vocabulary(tokenizer, model.config.vocab_size)

    @property
    def device(self) -> Any:
        """Where the model computes."""
        return self.model.device

    def __call__(self, text_inputs: Any, **options: Any) -> Any:
        """Continue a text or a chat, or each of a list of them; an iterator of prompts gives an iterator of results.

        Options: return_full_text (False: the continuation alone), return_tensors (token ids instead of text),
        batch_size (prompts per forward pass, padded on the left; the default runs one at a time), stop_sequence,
        continue_final_message, skip_special_tokens, prefix, tools, documents; all others go to `generate`:
        max_new_tokens, do_sample, num_return_sequences, seed, ...

        Returns a list of `{"generated_text": ...}` per prompt, one entry per returned sequence. Raises InputError.
        """
        text, generation = self._split(options)
        if isinstance(text_inputs, str) or _is_chat(text_inputs):
            return next(self._run([text_inputs], text, generation))
        if isinstance(text_inputs, Iterator):
            return self._run(text_inputs, text, generation)
        if not isinstance(text_inputs, (list, tuple)) or not text_inputs:
            raise InputError(
                f"pipeline: a prompt must be text or a list of messages, or a list of such, not {text_inputs!r}"
            )
        return list(self._run(text_inputs, text, generation))

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _split(self, options: Mapping[str, Any]) -> tuple[_Options, dict[str, Any]]:
        """Options for the text, and arguments for `generate`: the call's, those of the pipeline, DEFAULTS."""
        defaults = {
            name: value
            for name, value in self.options.items()
            # a generation_config of the call replaces the generation settings of the pipeline
            if name in _OPTION_NAMES or "generation_config" not in options
        }
        merged = defaults | dict(options)
        text = _Options(**{name: value for name, value in merged.items() if name in _OPTION_NAMES})
        generation = {name: value for name, value in merged.items() if name not in _OPTION_NAMES}
        if text.max_length is not None:
            generation["max_length"] = text.max_length
        if (stop := generation.pop("stop_sequence", None)) is not None:
            generation["stop_strings"] = [stop] if isinstance(stop, str) else list(stop)
        added = {name: value for name, value in self._defaults().items() if name not in self._known(generation)}
        if "max_length" in self._known(generation):
            added.pop("max_new_tokens", None)
        if not (self._known(generation) | added).get("do_sample"):
            added = {name: value for name, value in added.items() if name not in _SAMPLING_ONLY}
        return text, {"tokenizer": self.tokenizer} | added | generation

    def _defaults(self) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        return DEFAULTS | ({} if pad is None else {"pad_token_id": pad})

    def _known(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Every generation setting that someone has made."""
        passed = generation.get("generation_config")
        passed = None if passed is None else GenerationConfig.of(passed)
        known = dict(self.model.generation_config.set_fields())
        return known | (passed.set_fields() if passed is not None else {}) | dict(generation)

    # --- the three steps ----------------------------------------------------------------------------------------------

    def _run(self, prompts: Iterable[Any], text: _Options, generation: dict[str, Any]) -> Iterator[list[Any]]:
        remaining = iter(prompts)
        while batch := list(islice(remaining, text.batch_size)):
            prompts_ids = [self._encode(_checked(prompt), text, generation) for prompt in batch]
            ids_BS, mask_BS = self._pad(prompts_ids)
            sequences = self._generate(ids_BS, mask_BS, text, generation)
            width = ids_BS.shape[1]
            for prompt, rows in zip(batch, np.split(sequences, len(batch)), strict=True):
                yield [self._record(prompt, row, width, text) for row in rows]

    def _encode(self, prompt: str | Chat, text: _Options, generation: Mapping[str, Any]) -> np.ndarray:
        """Token ids [S] of a prompt."""
        if isinstance(prompt, str):
            encoding = self.tokenizer(text.prefix + prompt, **({"padding_side": "left"} | text.encoding()))
            ids = encoding["input_ids"]
        else:
            arguments = {name: value for name, value in text.encoding().items() if name != "add_special_tokens"}
            continues = text.continues(prompt)
            ids = self.tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tools=text.tools,
                documents=text.documents,
                return_dict=False,
                **arguments,
            )
        ids_S = np.array(ids, dtype=np.int64)
        return ids_S if text.handle_long_generation is None else ids_S[-self._room(ids_S.size, generation) :]

    def _room(self, length: int, generation: Mapping[str, Any]) -> int:
        """How many tokens of the prompt fit beside the new ones: handle_long_generation="hole" cuts its beginning."""
        known = self._known(generation)
        new = known.get("max_new_tokens")
        new = max(known["max_length"] - length, 0) if new is None else new
        room = self.tokenizer.model_max_length - new
        if room <= 0:
            raise InputError(f"pipeline: {new} new tokens alone exceed the tokenizer's model_max_length")
        return min(room, max(length, 1))

    def _pad(self, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """ids and attention mask [B, S], padded on the left."""
        width = max(row.size for row in rows)
        if any(row.size != width for row in rows) and self.tokenizer.pad_token_id is None:
            raise InputError("pipeline: batch_size above 1 needs a pad token, and this tokenizer has none")
        if len(rows) > 1 and any(row.size == 0 for row in rows):
            raise InputError("pipeline: an empty prompt cannot be part of a batch: use batch_size=1")
        pad = self.tokenizer.pad_token_id or 0
        ids_BS = np.stack([np.pad(row, (width - row.size, 0), constant_values=pad) for row in rows])
        mask_BS = np.stack([np.arange(width) >= width - row.size for row in rows]).astype(np.int64)
        return ids_BS, mask_BS

    def _generate(
        self, ids_BS: np.ndarray, mask_BS: np.ndarray, text: _Options, generation: dict[str, Any]
    ) -> np.ndarray:
        """Token ids [B * num_return_sequences, T]. An empty prompt starts from BOS."""
        arguments = dict(generation)
        if text.prefix:  # a total length does not count the prefix
            extra = len(self.tokenizer(text.prefix, add_special_tokens=False)["input_ids"])
            for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                known = self._known(generation)
                if total in known and new not in known:
                    arguments[total] = known[total] + extra
        if ids_BS.shape[1] == 0:
            output = self.model.generate(None, **arguments)
        else:
            output = self.model.generate(ids_BS, attention_mask=mask_BS, **arguments)
        return to_numpy(getattr(output, "sequences", output))

    def _record(self, prompt: str | Chat, ids_T: np.ndarray, width: int, text: _Options) -> dict[str, Any]:
        if text.return_tensors:
            return {"generated_token_ids": ids_T.tolist()}
        new = self.tokenizer.decode(
            ids_T[width:].tolist(),
            skip_special_tokens=text.skip_special_tokens is not False,
            clean_up_tokenization_spaces=text.clean_up_tokenization_spaces,
        )
        if text.return_full_text is False:
            return {"generated_text": new}
        if isinstance(prompt, str):
            return {"generated_text": prompt + new}
        if text.continues(prompt):
            last = prompt[-1]
            return {"generated_text": [*prompt[:-1], {"role": last["role"], "content": last["content"] + new}]}
        return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _checked(prompt: Any) -> str | Chat:
    if isinstance(prompt, str):
        return prompt
    if not _is_chat(prompt):
        raise InputError(f"pipeline: a prompt must be text or a list of messages, not {type(prompt).__name__}")
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"pipeline: a message must be a dict with a role and a content, not {message!r}")
    return list(prompt)
