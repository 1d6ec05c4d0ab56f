"""`refllm generate`: continues a prompt and shows the text while it is made."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from refllm.errors import InputError, TokenizerError
from refllm.generation.config import GenerationConfig
from refllm.generation.processor_order import ProcessorInputs, make_processors
from refllm.generation.streamers import BaseStreamer, TextStreamer
from refllm.text.token_input import checked_ids, read_tokens


def check_settings(max_new_tokens: int, settings: Mapping[str, Any]) -> None:
    """Raises InputError for what `Task.generate` would refuse, before a model is loaded for it."""
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        np.random.default_rng(given.pop("seed", None))
    except ValueError:
        raise InputError(f"--seed {settings['seed']} must be at least 0") from None
    config = GenerationConfig(**given, max_new_tokens=max_new_tokens, source="generate")
    make_processors(config, ProcessorInputs(prompt_length=1, vocab_size=1 << 31))


@dataclass(frozen=True)
class Task:
    """A loaded model and the prompt's ids [1, S]. tokenizer: None where the folder has none and ids were given."""

    model: Any
    tokenizer: Any
    input_ids: np.ndarray

    def generate(self, max_new_tokens: int, settings: dict[str, Any], stream: TextIO | None) -> dict[str, Any]:
        """Runs `model.generate`; what is made goes to `stream` at once (with beams: at the end).

        Returns plain values: prompt_ids, new_ids, text (None without a tokenizer), seconds. Raises InputError for
        settings that cannot be used.
        """
        settings = dict(settings)
        beams = (settings.get("num_beams") or self.model.generation_config.num_beams or 1) > 1
        if "stop_strings" in settings and self.tokenizer is None:
            raise InputError("--stop needs a tokenizer, and this checkpoint has none")
        streamer = None if stream is None or beams else self._streamer(stream)
        start = time.perf_counter()
        out = self.model.generate(
            self.input_ids, max_new_tokens=max_new_tokens, tokenizer=self.tokenizer, streamer=streamer, **settings
        )
        seconds = time.perf_counter() - start
        new_ids = [int(token) for token in out[0, self.input_ids.shape[1] :]]
        text = None if self.tokenizer is None else self.tokenizer.decode(new_ids, skip_special_tokens=True)
        if stream is not None and streamer is None:
            print(" ".join(map(str, new_ids)) if text is None else text, file=stream)
        prompt_ids = [int(token) for token in self.input_ids[0]]
        return {"prompt_ids": prompt_ids, "new_ids": new_ids, "text": text, "seconds": seconds}

    def _streamer(self, stream: TextIO) -> BaseStreamer:
        return _IdPrinter(stream) if self.tokenizer is None else _TextPrinter(self.tokenizer, stream)


class _TextPrinter(TextStreamer):
    def __init__(self, tokenizer: Any, stream: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=self.stream, flush=True)


class _IdPrinter(BaseStreamer):
    def __init__(self, stream: TextIO) -> None:
        self.stream, self.at_prompt = stream, True

    def put(self, value: np.ndarray) -> None:
        if not self.at_prompt:
            print(int(value.reshape(-1)[0]), end=" ", file=self.stream, flush=True)
        self.at_prompt = False

    def end(self) -> None:
        print(file=self.stream, flush=True)


def prepare(
    folder: Path, tokens: dict[str, Any], how: dict[str, Any], *, chat: bool, step: Callable[..., None]
) -> Task:
    """Reads the prompt, then loads the model. chat: the prompt is a user's message for the chat template.

    tokens: as `read_tokens` takes them (prompt, ids, ids_file). how: what `refllm.load` is told beside the head.

    Raises InputError if there is no prompt or several, and what loading raises.
    """
    import refllm

    prompt = tokens["prompt"]
    if chat and prompt is None:
        raise InputError("--chat needs --prompt: the chat template is for text, not for token ids")
    config = refllm.AutoConfig.from_pretrained(folder)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        tokenizer = refllm.AutoTokenizer.from_pretrained(folder)
        numbers = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        input_ids: np.ndarray | None = checked_ids(list(numbers), config.vocab_size, "--prompt with the chat template")
    else:
        tokenizer = _tokenizer_or_none(folder, required=prompt is not None)
        input_ids = read_tokens(folder, config.vocab_size, **tokens)
    if input_ids is None:
        raise InputError("nothing to continue: give --prompt, --ids or --ids-file")
    step("loading")
    model = refllm.load(folder, head="causal_lm", **how)
    return Task(model, tokenizer, input_ids)


def _tokenizer_or_none(folder: Path, *, required: bool) -> Any:
    import refllm

    try:
        return refllm.AutoTokenizer.from_pretrained(folder)
    except TokenizerError:
        if required:
            raise
        return None
