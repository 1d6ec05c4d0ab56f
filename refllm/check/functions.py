"""A forward pass that somebody wrote, as a candidate: what it is given, and what is taken of what it returns."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.gradient_formulas import GRADIENT
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import EnoughError, floats, misbehaves, must_not_have_changed, raised
from refllm.check.taps import ALWAYS, GRADIENTS, LOSS_SCALE, Sink, as_array, cannot_run, is_array
from refllm.errors import InputError
from refllm.forward.taps import HEAD_TAPS
from refllm.precision import rounding
from refllm.precision.dtype_names import dtype_name
from refllm.user_code import find_function

DTYPES = ("float32", "bfloat16", "float16")

Forward = Callable[..., Any]
"""A user's forward pass: f(checkpoint, input_ids, attention_mask, position_ids, tap) -> logits.

checkpoint: the folder. The next three are int64 arrays [B, S]; mask: 1 = a token, 0 = padding. tap(name, value) hands
over a named value (`refllm.forward.taps`) and returns it; call it for whatever is at hand, or not at all. A function
that has an argument `dtype` is told in which format to compute, "float32", "bfloat16" or "float16". One that has an
argument `cache` returns (logits, cache) and is given what it returned as second value at its last call, None at first;
then input_ids and position_ids [B, S] are those of the new tokens, and attention_mask [B, T] is of all so far. One that
has an argument `inputs_embeds` is given None, or a float32 array [B, S, hidden_size], on the grid of the dtype: what to
take instead of the rows of the embedding.

One that has an argument `labels` is given None, or int64 [B, S] with -100 where nothing counts, and then returns
(logits, gradients), or an object or mapping that has `gradients`: name -> array, for tensors by their names in the
checkpoint and for values by theirs, of the mean cross entropy of the counted labels (position s predicts the label of
s + 1), in float32. tap("grad:" + name, gradient) shows one as well. If it has an argument `loss_scale`, the loss, and
so every gradient, is times that number.

What it returns may also be an object with `logits` (and `past_key_values`), as those of Transformers are; without a
head, the last norm's result or an object with `last_hidden_state`.
"""

TAKES = {
    "dtype": "dtype",
    "cache": "cache",
    "inputs_embeds": "embeddings",
    "labels": GRADIENTS,
    "loss_scale": LOSS_SCALE,
}
"""Argument -> what a function takes that has it (`Candidate.takes`)."""
_IN_ORDER = 5  # arguments that are given by their place


class FunctionCandidate:
    """A `Forward` as a candidate. takes: what all are given, and "dtype", "cache" and "embeddings", if the function has
    such arguments."""

    def __init__(self, function: Forward, folder: Path, *, head: str, dtype: str, name: str | None = None) -> None:
        dtype = dtype_name(dtype)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype} cannot be checked: use {', '.join(DTYPES)}")
        self.function, self.folder, self.head, self.dtype = function, folder, head, dtype
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self.details: dict[str, str] = {}
        self.takes: tuple[str, ...] = (*ALWAYS, *_named(function))

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Raises InputError for inputs that `cannot_run` has a reason for."""
        if reason := cannot_run(self, inputs):
            raise InputError(f"{self.name}: {inputs.label}: {reason}")
        cache, embeds = None, scaled_rows(self.folder, self.head, self.dtype, inputs)
        for piece in inputs.pieces():
            given = {
                "input_ids": inputs.input_ids[:, piece],
                "attention_mask": inputs.mask[:, : piece.stop],
                "position_ids": inputs.positions[:, piece],
            }
            learning = inputs.learning
            with_it = {} if learning is None else {GRADIENTS: learning.labels.copy(), LOSS_SCALE: learning.scale}
            cache = self._call(given, cache, None if embeds is None else embeds[:, piece], sink, with_it)
            if inputs.chunks and cache is None:
                raise misbehaves("result", "it takes a cache and returns none; expected (logits, cache)")

    def _call(
        self, given: dict[str, np.ndarray], cache: Any, embeds: np.ndarray | None, sink: Sink, learning: dict[str, Any]
    ) -> Any:
        """One pass. Returns its cache. learning: what it takes of labels and a scale of the loss."""
        last, shown = HEAD_TAPS.get(self.head, "model.norm"), {}

        def tap(name: str, value: Any) -> Any:
            sink(name, value)
            if name == last:
                shown[name] = value
            return value

        copies = {name: np.array(value) for name, value in given.items()}
        named = {
            "dtype": self.dtype,
            "cache": cache,
            "embeddings": embeds,
            GRADIENTS: None,
            LOSS_SCALE: 1.0,
            **learning,
        }
        more = {argument: named[what] for argument, what in TAKES.items() if what in self.takes}
        try:
            out = self.function(str(self.folder), *copies.values(), tap, **more)
        except (KeyboardInterrupt, EnoughError):
            raise
        except BaseException as error:  # of our own kinds too: it may be made of refllm
            raise raised(error) from None
        must_not_have_changed(given, copies)
        result, cache = result_and_cache(out)
        for name, gradient in _gradients(out, cache).items() if learning else ():
            sink(GRADIENT + str(name).removeprefix(GRADIENT), gradient)
        if result is not None and last not in shown:
            sink(last, result)
        elif result is not None and not _same(last, result, shown[last]):
            raise misbehaves("result", f"{last} is named as one value and returned as another")
        return cache


def scaled_rows(folder: Path, head: str, dtype: str, inputs: Inputs) -> np.ndarray | None:
    """The embeddings to feed, on the grid of the dtype: given ones, or the checkpoint's scaled; None where ids are."""
    if not inputs.feeds_embeddings:
        return None
    from refllm.models.auto import load

    weights = load(folder, head=head, dtype=dtype, low_memory=True).weights
    rows = inputs.embedded(lambda ids: as_array(weights.rows("embed_tokens.weight", ids)))
    return np.asarray(rounding(dtype)(rows), np.float32)


def imported(reference: str) -> Forward:
    """The function that "module:function" or "file.py:function" names. Raises InputError where there is none, and
    MisbehavesError for a module that raises when it is imported."""
    try:
        return find_function(reference)
    except InputError as error:
        if error.__cause__ is not None:
            raise raised(error.__cause__, " when it is imported") from None
        raise
    except BaseException as error:
        raise raised(error, " when it is imported") from None


def takes_a_checkpoint_alone(function: Any) -> bool:
    """Whether it has one argument that must be given by its place: it makes a model, and is no forward pass."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [a.kind in by_place for a in arguments if a.default is a.empty] == [True]


def _named(function: Forward) -> tuple[str, ...]:
    """What of `TAKES` a function has arguments for, beside those that are given by their place."""
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some of those that are written in C
        return ()
    only, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [a.name for i, a in enumerate(arguments) if a.kind == only or (a.kind == either and i >= _IN_ORDER)]
    return tuple(what for argument, what in TAKES.items() if argument in names)


def result_and_cache(out: Any) -> tuple[Any, Any]:
    """The result and the cache in what a function returned."""
    if isinstance(out, tuple):
        return (out + (None, None))[:2]
    if is_array(out):
        return out, None
    fields = out if isinstance(out, Mapping) else {name: getattr(out, name, None) for name in _FIELDS}
    found = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    if {"start_logits", "end_logits"} <= found.keys():
        pair = [as_array(found[name]) for name in ("start_logits", "end_logits")]
        return np.stack(pair, axis=-1), found.get("past_key_values")
    result = found.get("logits", found.get("last_hidden_state"))
    return (out if result is None else result), found.get("past_key_values")


def _gradients(out: Any, second: Any) -> Mapping[str, Any]:
    """Name -> gradient, of what a function returned that was given labels. second: of a pair."""
    named = out.get("gradients") if isinstance(out, Mapping) else getattr(out, "gradients", None)
    found = second if isinstance(second, Mapping) else named
    if found is not None and not isinstance(found, Mapping):
        raise misbehaves("result", f"gradients is a {type(found).__name__}; expected a mapping from names to arrays")
    return found or {}


_FIELDS = ("logits", "last_hidden_state", "start_logits", "end_logits", "past_key_values")


def _same(name: str, result: Any, shown: Any) -> bool:
    return result is shown or np.array_equal(floats(name, result), floats(name, shown), equal_nan=True)
