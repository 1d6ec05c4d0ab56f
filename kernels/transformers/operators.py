"""One call of an operator of `refllm.kernels` from inside a Transformers model."""

import sys
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from refllm import kernels
from refllm.ops.backward_contracts import BACKWARD, SUFFIX
from refllm.ops.contracts import without_axes

BACKENDS = ("triton", "torch")


def backend_for(x: torch.Tensor) -> str:
    """ "triton" for a tensor on a GPU, and on the CPU inside `refllm.kernels.interpreted()`; else "torch"."""
    interpreter = sys.modules.get("refllm.kernels.interpreter")  # not imported: a plain form must not need Triton
    interpreted = interpreter is not None and interpreter.active()
    return "triton" if x.device.type == "cuda" or (x.device.type == "cpu" and interpreted) else "torch"


def call(name: str, backend: str | None, *args: Any, **options: Any) -> Any:
    """The operator `name` on `args`, of which the first is a tensor. It is differentiable.

    backend: "triton", "torch", or None for `backend_for` that tensor.
    """
    backend = backend or backend_for(args[0])
    if backend == "triton":
        return getattr(kernels, name)(*args, **options)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return _Plain.apply(name, options, *args)
    return getattr(kernels.plain, name)(*args, **options)


class _Plain(torch.autograd.Function):
    """A plain form with its plain backward form: autograd alone would round where the forward form happens to, and make
    NaN of rows without a key."""

    @staticmethod
    def forward(ctx: Any, name: str, options: dict[str, Any], *args: Any) -> Any:
        known = BACKWARD[name + SUFFIX]
        keeps_lse = "lse" in known.kept and "return_lse" in known.forward.parameters
        how = {**options, "return_lse": True} if keeps_lse else options
        results = getattr(kernels.plain, name)(*args, **how)
        every = results if isinstance(results, tuple) else (results,)
        kept = dict(zip(known.kept, every, strict=False))
        tensors = {i: x for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
        ctx.save_for_backward(*tensors.values(), *kept.values())
        ctx.refllm = name, options, [None if i in tensors else x for i, x in enumerate(args)], list(tensors), list(kept)
        return every[0] if keeps_lse and not options.get("return_lse") else results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: torch.Tensor) -> Any:
        name, options, args, places, kept = ctx.refllm
        args, known = list(args), BACKWARD[name + SUFFIX]
        for i, x in zip(places, ctx.saved_tensors, strict=False):
            args[i] = x
        given = known.forward.bound(args, options)
        given |= dict(zip(kept, ctx.saved_tensors[len(places) :], strict=True))
        given |= dict(zip(known.incoming, incoming, strict=False))
        positional, keywords = [], {}
        for parameter in known.parameters.values():
            value = given.get(without_axes(parameter.name))
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[without_axes(parameter.name)] = value
            else:
                positional.append(value)
        found = getattr(kernels.plain, name + SUFFIX)(*positional, **keywords)
        found = found if isinstance(found, tuple) else (found,)
        of = dict(zip(known.gradient_of.values(), found, strict=True))
        names = list(known.forward.parameters)[: len(args)]
        return (None, None, *(of.get(each) for each in names))
