"""refllm's models in lm-evaluation-harness (EleutherAI), which makes the tables of model cards.

    python -m refllm.evaluation --model refllm --model_args pretrained=FOLDER,backend=torch --tasks hellaswag

What follows the module is the harness's own command line; the module only tells it of the model `refllm` first. From
Python `register()` does, before `lm_eval.simple_evaluate(model="refllm", ...)`.

Requests are answered as the harness's adapter of Transformers answers them (`hf`): the same tokens, cut on the left
where they are longer than the context; log-softmax in float32 over the logits; text from the tokens after the prompt,
up to the first stop string.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval.api.registry as registry
import numpy as np
from lm_eval import models as _every_model
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

import refllm
from refllm.errors import InputError
from refllm.evaluation.margins import Choice, Margin, margins, predicted_variance
from refllm.inputs import to_numpy
from refllm.storage import output_file

NAME = "refllm"
MAX_GENERATED = 256
"""Tokens that are generated where a task does not say how many, as in the adapter of Transformers."""

_Request = tuple[Any, list[int], list[int]]
"""(context and continuation as text or None, their tokens)."""


def register() -> None:
    """Tells the harness of the model `refllm`. Twice is once."""
    assert _every_model.MODEL_MAPPING  # the harness knows its own models only after this import
    registry.register_model(NAME)(RefllmLM)


class RefllmLM(TemplateLM):
    """A causal language model of refllm that answers the harness's requests.

    pretrained: the folder of a checkpoint. backend: numpy, torch or triton. dtype: float64, float32, bfloat16 or
    float16. policy, device: as for `refllm.load`. batch_size: sequences at a time. max_length: the longest context in
    tokens; None is the model's. margins: a file for the margins of all multiple choices in sigma of rounding, as JSON;
    then what hangs on rounding is also printed. Raises InputError for what cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str],
        backend: str = "torch",
        dtype: str = "float32",
        policy: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        margins: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size={batch_size}: expected a number of sequences, 1 or more")
        self.folder, self.dtype, self.batch_size = Path(pretrained), str(dtype), int(batch_size)
        device = None if device in (None, "cpu") else device
        self.model = refllm.load(
            self.folder, head="causal_lm", dtype=self.dtype, backend=backend, policy=policy, device=device
        )
        self.tokenizer = refllm.AutoTokenizer.from_pretrained(self.folder)
        self.max_length = int(max_length or self.model.config.max_position_embeddings)
        self.add_bos_token, self.margins_file = add_bos_token, margins
        if margins is not None:
            output_file.must_be_writable("margins", margins)

    # -- tokens ----------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Its tokens; special ones as the tokenizer adds them, and none where the text begins with that of a text."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        said = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        with warnings.catch_warnings():
            # The tokenizer warns of a text longer than the model's context; windows are the answer to that.
            warnings.filterwarnings("ignore", message=".*model_max_length")
            return [int(i) for i in self.tokenizer.encode(string, **said)]

    @property
    def tokenizer_name(self) -> str:
        """The folder, for the harness's cache of requests."""
        return str(self.folder).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    # -- log-likelihoods -------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is what greedy decoding gives) of each request."""
        answers: list[tuple[float, bool]] = super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)
        if self.margins_file is not None:
            self._write_margins(requests, answers)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **unused: Any) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        # Those that differ in their last token alone are one sequence of inputs.
        inputs = [
            tuple((context + continuation)[-(self.max_length + 1) :][:-1]) for _, context, continuation in requests
        ]
        order = sorted(range(len(requests)), key=lambda i: (-len(inputs[i]), inputs[i]))
        unique = [(ids, list(same)) for ids, same in groupby(order, key=inputs.__getitem__)]
        for start in range(0, len(unique), self.batch_size):
            part = unique[start : start + self.batch_size]
            most = max(len(requests[i][2]) for _, same in part for i in same)
            for (_, same), log_p in zip(part, self._log_probabilities([ids for ids, _ in part], most), strict=True):
                for i in same:
                    text, _, continuation = requests[i]
                    rows = log_p[len(log_p) - len(continuation) :]
                    of_token = rows[np.arange(len(continuation)), continuation]
                    greedy = bool((rows.argmax(axis=-1) == continuation).all())
                    answers[i] = (float(of_token.sum()), greedy)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[i])
        return answers

    def _log_probabilities(self, ids: Sequence[tuple[int, ...]], most: int) -> Iterator[np.ndarray]:
        """The log-probabilities of each sequence at its last `most` positions or more: float32 [n, V].

        Shorter ones are padded on the right, where no earlier position sees it.
        """
        longest = max(map(len, ids))
        padded = np.zeros((len(ids), longest), np.int64)
        for row, one in zip(padded, ids, strict=True):
            row[: len(one)] = one
        keep = min(longest, most + longest - min(map(len, ids)))
        logits = np.asarray(
            _array(self.model(input_ids=padded, use_cache=False, logits_to_keep=keep).logits), np.float32
        )
        for row, one in zip(logits, ids, strict=True):
            yield _log_softmax(row[: keep - (longest - len(one))])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context, each token with as much before it as fits."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            asked = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(one for one, _ in self._loglikelihood_tokens(asked)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    # -- texts -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, which is left out."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, asked: dict[str, Any]) -> str:
        how = normalize_gen_kwargs(asked, MAX_GENERATED)
        stop = handle_stop_sequences(how.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
        new = how.pop("max_gen_toks")
        if new >= self.max_length:
            raise InputError(f"{new} tokens to generate leave no context: the model's is {self.max_length} tokens")
        if how.get("temperature", 0.0) == 0.0:
            how = {name: value for name, value in how.items() if name != "temperature"} | {"do_sample": False}
        ids = np.array([self.tok_encode(context)[-(self.max_length - new) :]])
        out = self.model.generate(
            ids, max_new_tokens=new, tokenizer=self.tokenizer, stop_strings=[s for s in stop if s], **how
        )
        text = self.tokenizer.decode(_array(out)[0][ids.shape[1] :].tolist(), skip_special_tokens=True)
        text = str(postprocess_generated_text(generation=text, stop=stop, think_end_token=None))
        self.cache_hook.add_partial("generate_until", (context, asked), text)
        return text

    # -- rounding --------------------------------------------------------------------------------------------------

    def _write_margins(self, requests: Sequence[Any], answers: Sequence[tuple[float, bool]]) -> None:
        """Says which answers hang on rounding, and writes all margins."""
        found = list(self._margins(requests, answers))
        for margin in found:
            if margin.hangs:
                print(margin.text)
        hanging = sum(margin.hangs for margin in found)
        print(f"{hanging} of {len(found)} answers hang on rounding in {self.dtype}: {self.margins_file}")
        said = {"checkpoint": str(self.folder), "dtype": self.dtype, "margins": [m.to_dict() for m in found]}
        output_file.replace(Path(str(self.margins_file)), json.dumps(said, indent=1) + "\n")

    def _margins(self, requests: Sequence[Any], answers: Sequence[tuple[float, bool]]) -> Iterator[Margin]:
        variance = predicted_variance(self.folder, self.dtype)
        questions: dict[tuple[str, int], list[Choice]] = {}
        for request, (log_likelihood, _) in zip(requests, answers, strict=True):
            context, continuation = request.args
            before, after = self._pair(context, continuation)
            ids = tuple((before + after)[-(self.max_length + 1) :])
            choice = Choice(ids, len(after), log_likelihood, len(continuation))
            questions.setdefault((str(request.task_name), int(request.doc_id)), []).append(choice)
        for (task, question), choices in questions.items():
            yield from margins(task, question, choices, variance)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their tokens; an empty context is the token before a text."""
        if context:
            before, after = self._encode_pair(context, continuation)
            return list(before), list(after)
        after = self.tok_encode(continuation, add_special_tokens=False)
        return (after[:1], after[1:]) if after[0] == self.prefix_token_id else ([self.prefix_token_id], after)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _array(x: Any) -> np.ndarray:
    """An array or a tensor as an array."""
    return np.asarray(to_numpy(x))
