"""The gradients of a loss by the tensors of a model: a forward pass on a tape, and the walk back over it."""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from refllm.errors import InputError
from refllm.forward.operators import Recorder
from refllm.forward.tape import Tape, TapedOperators, TapedWeights
from refllm.forward.traced import Traced
from refllm.inputs import as_tensor, is_tensor, to_numpy
from refllm.storage.load_report import file_name

EMBEDDINGS = "inputs_embeds"
"""The name of the gradient of embeddings that were given in the place of tokens."""


class Gradients(NamedTuple):
    """loss: a number. gradients: name of a tensor as in a checkpoint -> array of its shape."""

    loss: Any
    gradients: dict[str, Any]


Differentiate = Callable[..., tuple[Any, dict[str, Any]]]
"""(model, arguments of a call by name, wanted tensors, gradients so far, padding id, recorder) -> the loss and the
gradients; tensors by the names of `Model.tensors`."""


def gradients_of(
    model: Any,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    *,
    frozen: Collection[str],
    accumulated: Mapping[str, Any] | None,
    recorder: Recorder | None,
    differentiate: Differentiate | None = None,
) -> Gradients:
    """`Model.gradients`. arguments, keywords: those of the forward pass. differentiate: another backend's way; None
    runs the page on a tape."""
    given = {**dict(zip(signature(model.__call__).parameters, arguments, strict=False)), **keywords}
    _check_call(model, given)
    tensors = any(map(is_tensor, given.values()))
    given = {name: to_numpy(x) if is_tensor(x) else x for name, x in given.items()}
    names = {name: file_name(name, model.prefix) for name in model.weights.shapes}
    names |= {} if given.get(EMBEDDINGS) is None else {EMBEDDINGS: EMBEDDINGS}
    wanted = _not_frozen(names, frozen)
    before = _accumulated(names, accumulated or {})
    so_far = {name: before[key] for name, key in names.items() if key in before}
    differentiate = differentiate or _on_tape
    loss, found = differentiate(model, given, wanted, so_far, _padding_id(model.config), recorder)
    gradients = before | {names[name]: gradient for name, gradient in found.items()}
    if tensors:
        return Gradients(as_tensor(loss), {name: as_tensor(x, model.dtype) for name, x in gradients.items()})
    return Gradients(loss, gradients)


def _on_tape(
    model: Any,
    given: dict[str, Any],
    wanted: set[str],
    so_far: Mapping[str, np.ndarray],
    padding: int | None,
    recorder: Recorder | None,
) -> tuple[Any, dict[str, np.ndarray]]:
    listener = None if recorder is None else _WhileForward(recorder)
    tape = Tape(
        model.arithmetic,
        model.weights,
        wanted,
        inputs={"model.embed_tokens": EMBEDDINGS} if EMBEDDINGS in wanted else {},
        padding=padding,
        checkpointing=model.is_gradient_checkpointing,
        recorder=recorder,
    )
    loss = _loss(model, tape, {**given, "recorder": listener})
    if listener is not None:
        listener.over = True
    if not isinstance(loss, Traced):
        return loss, {}
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        found = tape.gradients(loss)
        return loss.value[()], {name: tape.sum(so_far.get(name), gradient) for name, gradient in found.items()}


def _check_call(model: Any, given: Mapping[str, Any]) -> None:
    if model.head == "base":
        name = type(model).__name__
        raise InputError(
            f"gradients: {name} has no loss; use the same checkpoint with a head, as {name.removesuffix('Model')}"
            "ForCausalLM say"
        )
    if given.get("past_key_values") is not None:
        raise InputError("gradients: past_key_values holds what has no gradient any more; give all tokens in one call")


def _loss(model: Any, tape: Tape, given: Mapping[str, Any]) -> Any:
    """The loss of the forward pass on the tape. The model is left as a forward pass leaves it."""
    taped = copy(model)
    taped.weights = TapedWeights(model.weights, tape)
    taped.rotary = copy(model.rotary)
    taped.follow = lambda operators: TapedOperators(operators, tape)
    loss = loss_of(taped, given)
    model.rotary = taped.rotary
    return loss


def loss_of(model: Any, given: Mapping[str, Any]) -> Any:
    """The loss of a call with these arguments, without a cache. Raises InputError where there are no labels."""
    loss = model(**{**given, "use_cache": False, "return_dict": True}).loss
    if loss is None:
        both = model.head == "question_answering"
        raise InputError(
            f"gradients: give {'start_positions and end_positions' if both else 'labels'}, which the loss is made of"
        )
    return loss


def _not_frozen(names: Mapping[str, str], frozen: Collection[str]) -> set[str]:
    """The tensors that are to have a gradient. names: as the page calls them -> as files do."""
    if isinstance(frozen, str):
        raise InputError(f"frozen={frozen!r}: expected a list of names or patterns, as [{frozen!r}]")
    for pattern in frozen:
        if not any(fnmatchcase(key, pattern) for key in names.values()):
            raise InputError(
                f"frozen: {pattern!r} is the name of no tensor; the first of all is {next(iter(names.values()))}"
            )
    return {name for name, key in names.items() if not any(fnmatchcase(key, pattern) for pattern in frozen)}


def _accumulated(names: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    for key in given:
        if key not in names.values():
            raise InputError(f"accumulated: {key!r} is the name of no tensor of this model")
    return {key: to_numpy(gradient) for key, gradient in given.items()}


def _padding_id(config: Any) -> int | None:
    """The row of the embeddings that learns nothing; -1 stands for the last one."""
    return None if config.pad_token_id is None else config.pad_token_id % config.vocab_size


class _WhileForward:
    """A recorder of a forward pass, which hears nothing of what is computed again afterwards."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self.over = recorder, False

    def wants(self, name: str) -> bool:
        return self._recorder.wants(name)

    def record(self, name: str, value: np.ndarray) -> None:
        if not self.over:
            self._recorder.record(name, value)
