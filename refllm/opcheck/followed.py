"""A forward operator whose gradients are those of a given function, for tests that go through torch.autograd.

rms_norm = followed("rms_norm_backward", my_rms_norm_backward)
rms_norm(x, weight, eps).sum().backward()          # calls my_rms_norm_backward(dy, x, weight, eps)
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from refllm.ops.backward_contracts import BACKWARD, forward_name


def followed(operator: str, gradients: Callable[..., Any], forward: Callable[..., Any] | None = None) -> Any:
    """The forward operator as a function that autograd follows, with the gradients of a function that has the
    signature of `operator`, a backward one. forward: takes the place of the operator of `refllm.kernels.plain`; where
    the backward pass has arguments that the forward pass keeps, it returns those."""
    function = _function()

    def call(*arguments: Any, **keywords: Any) -> Any:
        return function.apply(gradients, forward or forward_of(operator), BACKWARD[operator], keywords, *arguments)

    return call


@cache
def forward_of(operator: str) -> Callable[..., Any]:
    """The forward operator in plain Torch, of attention with all that its backward pass keeps."""
    import torch
    import torch.nn.functional as F

    from refllm.kernels import plain

    name = forward_name(operator)
    if name == "attention":
        return lambda *arguments, **how: plain.attention(*arguments, **how, return_lse=True)
    own: dict[str, Any] = {"linear": F.linear, "embedding": F.embedding, "softmax": lambda x: torch.softmax(x, -1)}
    found: Callable[..., Any] = own.get(name) or getattr(plain, name)
    return found


@cache
def _function() -> Any:
    import torch

    class Followed(torch.autograd.Function):
        """See `followed`."""

        @staticmethod
        def forward(ctx: Any, gradients: Any, forward: Any, known: Any, keywords: Any, *arguments: Any) -> Any:
            kept = forward(*arguments, **keywords)
            results = kept if isinstance(kept, tuple) else (kept,)
            ctx.how = gradients, known, keywords, [None if isinstance(x, torch.Tensor) else x for x in arguments]
            ctx.places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*(arguments[i] for i in ctx.places), *results)
            return results[0] if known.kept else kept

        @staticmethod
        def backward(ctx: Any, *incoming: Any) -> Any:
            gradients, known, keywords, arguments = ctx.how
            tensors, arguments, names = ctx.saved_tensors, list(arguments), list(known.forward.parameters)
            for place, x in zip(ctx.places, tensors, strict=False):
                arguments[place] = x
            results = tensors[len(ctx.places) :]
            given = dict(zip(names, arguments, strict=False)) | dict(zip(known.kept, results, strict=False))
            if "p" in known.arguments:  # of a softmax its result is kept, and not its argument
                given["p"] = results[0]
            places = [p.name for p in known.parameters.values() if p.kind is not p.KEYWORD_ONLY]
            asked = list(known.parameters)[len(incoming) : len(places)]
            got = gradients(*incoming, *(given.get(name) for name in asked), **keywords)
            named = zip(known.gradient_of.values(), got if isinstance(got, tuple) else (got,), strict=True)
            of = {"x" if name == "s" else name: gradient for name, gradient in named}
            return None, None, None, None, *(of.get(name) for name in names[: len(arguments)])

    return Followed
