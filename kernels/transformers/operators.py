"""One call of an operator of `refllm.kernels` from inside a Transformers model."""

import functools
import sys
from typing import Any

import torch

from refllm import kernels
from refllm.errors import InputError

BACKENDS = ("triton", "torch")


def backend_for(x: torch.Tensor) -> str:
    """ "triton" for a tensor on a GPU, and on the CPU inside `refllm.kernels.interpreted()`; else "torch"."""
    interpreter = sys.modules.get("refllm.kernels.interpreter")  # not imported: a plain form must not need Triton
    interpreted = interpreter is not None and interpreter.active()
    return "triton" if x.device.type == "cuda" or (x.device.type == "cpu" and interpreted) else "torch"


def call(name: str, backend: str | None, *args: Any, **options: Any) -> Any:
    """The operator `name` on `args`, of which the first is a tensor.

    backend: "triton", "torch", or None for `backend_for` that tensor. Where a gradient could be asked for, the result
    knows that there is none: its backward raises InputError.
    """
    backend = backend or backend_for(args[0])
    function = getattr(kernels if backend == "triton" else kernels.plain, name)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return _ForwardOnly.apply(name, functools.partial(function, **options), *args)
    return function(*args, **options)


class _ForwardOnly(torch.autograd.Function):
    """Runs a function without recording it; the plain forms, too, would otherwise be differentiated unchecked."""

    @staticmethod
    def forward(ctx: Any, name: str, function: Any, *args: Any) -> Any:
        ctx.name = name
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise InputError(
            f"{ctx.name}: the operators of refllm.kernels are forward only and have no gradient. For inference, call "
            "the model under torch.no_grad(). To train, undo the patch (refllm.kernels.unpatch) and load the model "
            'with attn_implementation="sdpa"'
        )
