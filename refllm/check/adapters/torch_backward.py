"""The backward pass of a torch model: values and gradients of every micro-batch, and of every parameter at the end."""

from collections.abc import Callable
from typing import Any

import numpy as np

from refllm.check.adapters.transformers_taps import ShownOnce
from refllm.check.inputs import NOT_COUNTED, Inputs
from refllm.check.misbehaviour import must_not_have_changed
from refllm.check.taps import Sink
from refllm.forward.gradients import tensor_names

Loss = Callable[[dict[str, Any], dict[str, Any]], Any]


def run_backward(
    module: Any,
    inputs: Inputs,
    sink: Sink,
    loss: Callable[[ShownOnce, dict[str, Any], dict[str, Any]], Any],
    head: str,
) -> None:
    """A forward and a backward pass over every micro-batch. Each value is shown with the rows of all of them.

    loss: (what is to be shown, ids with mask and positions, labels) -> a number of Torch. Gradients of before are
    forgotten; a module is in training mode only if it checkpoints, which it does nowhere else, so that nothing is
    dropped.
    """
    import torch

    learning = inputs.learning
    assert learning is not None
    shown: dict[str, list[Any]] = {}
    module.train(checkpoints(module))
    module.zero_grad(set_to_none=True)
    device = next(module.parameters()).device
    for rows in learning.parts():
        arrays = {"input_ids": inputs.input_ids[rows], "position_ids": inputs.positions[rows]}
        arrays |= {} if inputs.given_mask is None else {"attention_mask": inputs.given_mask[rows]}
        given = {name: tensor(value, device) for name, value in arrays.items()}
        targets = {name: tensor(value[rows], device) for name, value in learning.targets(head).items()}
        show = ShownOnce(lambda name, value: shown.setdefault(name, []).append(value.cpu()))
        (loss(show, given, targets) * learning.scale).backward()
        must_not_have_changed(arrays, {name: x.cpu().numpy() for name, x in given.items()})
    for name, parts in shown.items():
        sink(name, torch.cat(parts))


def checkpoints(module: Any) -> bool:
    """Whether it computes layers again on the way back, as Transformers' models may."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def gradient_of(parameter: Any) -> Any:
    """What a parameter learns: zeros where nothing arrived. None for one that is frozen and has none."""
    import torch

    if parameter.grad is None:
        return torch.zeros_like(parameter) if parameter.requires_grad else None
    return parameter.grad


def tensor(array: np.ndarray, device: Any) -> Any:
    """A tensor of int64."""
    import torch

    return torch.from_numpy(np.array(array, np.int64)).to(device)


def backward(candidate: Any, inputs: Inputs, sink: Sink) -> None:
    """The backward pass of a module whose values are found by names (`refllm.check.adapters.torch_module`).

    The loss is the module's own, where its forward takes labels; else the mean cross entropy of its logits in float32,
    as Transformers computes it.
    """
    import torch

    from refllm.check.adapters.torch_module import recorded
    from refllm.models.auto import load

    opening, call, learning = candidate.opening, candidate.call, inputs.learning
    assert learning is not None

    def loss(show: ShownOnce, given: dict[str, Any], targets: dict[str, Any]) -> Any:
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        with recorded(candidate.module, candidate.names, show):
            result, _ = call({**given, "attention_mask": mask}, None, None)
        if _head_place(candidate) is None:
            show(_last(candidate), result, lambda x: x)
        return _cross_entropy(result, targets["labels"], learning.items if learning.micro_batches > 1 else None)

    run_backward(candidate.module, inputs, sink, loss, opening.head)
    modules = dict(candidate.module.named_modules())
    model = load(opening.folder, head=opening.head, dtype=candidate.dtype, low_memory=True)
    for key in tensor_names(model).values():
        path, _, last = key.rpartition(".")
        place = candidate.names.places.get(path)
        parameter = None if place is None else getattr(modules[place.path], last, None)
        if place is None or parameter is None or place.side != "output":
            continue
        gradient = gradient_of(parameter)
        if gradient is not None:
            sink(f"grad:{key}", gradient if place.channels is None else gradient[place.channels])
    candidate.module.zero_grad(set_to_none=True)
    candidate.module.eval()


def _last(candidate: Any) -> str:
    from refllm.forward.taps import HEAD_TAPS

    return HEAD_TAPS.get(candidate.opening.head, "model.norm")


def _head_place(candidate: Any) -> Any:
    return candidate.names.places.get(_last(candidate))


def _cross_entropy(logits: Any, labels: Any, items: int | None) -> Any:
    """The loss of a causal language model: position s predicts the label of s + 1."""
    import torch

    logits = logits.reshape(*labels.shape, -1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    rows, targets = wide[:, :-1].reshape(-1, wide.shape[-1]), labels[:, 1:].reshape(-1)
    how = {"ignore_index": NOT_COUNTED, "reduction": "mean" if items is None else "sum"}
    found = torch.nn.functional.cross_entropy(rows, targets, **how)
    return found if items is None else found / items
