"""How a Triton operator becomes differentiable: the one place where Torch's autograd is told of a backward kernel.

    differentiable("rms_norm", keep, gradients)
    only_once("rms_norm_backward")

Both are custom operators of `torch.library` ("refllm::rms_norm"), so that torch.compile, which cannot look into a
kernel, has the forward and the backward pass as two nodes of its graph. The file of a backward kernel makes both calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from refllm.errors import InputError

Kept = Sequence[Any]
"""Values that the backward pass needs: tensors, which Torch watches for changes, numbers, words, None."""
Gradients = tuple[torch.Tensor | None, ...]


def differentiable(
    operator: str,
    keep: Callable[[tuple[Any, ...], Any], Kept],
    gradients: Callable[..., Gradients],
    without: Sequence[str] = (),
) -> None:
    """Registers the backward pass of the custom operator of that name.

    keep: (inputs, output) -> what the backward pass needs, in the order in which it takes it.
    gradients: (needed, incoming, *kept) -> one gradient per input of the operator, None where none is needed. needed:
        per input, whether its gradient is asked for: what is not may not cost anything. incoming: one gradient per
        output, None for an output that the loss does not depend on (at least one is there).
    without: inputs that have no gradient, such as rotary tables. To ask for it raises InputError: it would be missing
        in silence.
    """
    names = [argument.name for argument in getattr(torch.ops.refllm, operator).default._schema.arguments]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = list(keep(inputs, output))
        tensors = [i for i, x in enumerate(kept) if isinstance(x, torch.Tensor)]
        ctx.set_materialize_grads(False)  # the zeros would be written and read again
        ctx.save_for_backward(*(kept[i] for i in tensors))
        ctx.refllm_kept = [None if i in tensors else x for i, x in enumerate(kept)], tensors

    def backward(ctx: Any, *incoming: torch.Tensor | None) -> Gradients:
        needed = tuple(ctx.needs_input_grad)
        for name, asked in zip(names, needed, strict=True):
            if asked and name in without:
                raise InputError(f"{operator}: {name} has no gradient; detach it")
        if all(gradient is None for gradient in incoming):
            return (None,) * len(needed)
        kept, tensors = list(ctx.refllm_kept[0]), ctx.refllm_kept[1]
        for i, x in zip(tensors, ctx.saved_tensors, strict=True):
            kept[i] = x
        return gradients(needed, incoming, *kept)

    torch.library.register_autograd(f"refllm::{operator}", backward, setup_context=setup_context)


def only_once(operator: str) -> None:
    """A backward operator has no backward pass of its own: to ask for one raises InputError with what has one."""

    def backward(*_: Any) -> Any:
        raise InputError(
            f"{operator}: the gradients of Triton kernels cannot be differentiated again; those of the operators of "
            "refllm.kernels.plain can"
        )

    torch.library.register_autograd(f"refllm::{operator}", backward)


def if_needed(needed: bool, gradient: torch.Tensor) -> torch.Tensor | None:
    """The gradient, or None where none was asked for: a custom operator returns an empty tensor in its place."""
    return gradient if needed else None
