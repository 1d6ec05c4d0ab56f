"""`cuda_stand_in()`: code that was written for "cuda" runs, with the interpreter as its GPU.

Everything that is exchanged is put back at the end. What was imported inside keeps what it was told there: a library
that asks for the GPU when it is imported goes on believing in it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from refllm.kernels.interpreter.context import interpreted
from refllm.kernels.interpreter.errors import KernelError
from refllm.kernels.interpreter.exchange import Exchange
from refllm.kernels.targets import DEFAULT, TARGETS, Target

GPUS = tuple(name for name, target in TARGETS.items() if not target.is_amd)
"""What can be stood in for."""


@contextlib.contextmanager
def cuda_stand_in(target: str = DEFAULT.name, **settings: Any) -> Iterator[None]:
    """Runs the `with` block inside `interpreted(**settings)`, with one GPU of the name "cuda" that is the interpreter.

    `device="cuda"`, `.cuda()` and `.to("cuda")` give tensors that say they are on cuda:0 and live on the CPU; what was
    never moved there cannot be launched on. torch.cuda answers as for the GPU of `target`, "sm_80", "sm_90" or
    "sm_100"; streams and events do nothing; torch.autocast("cuda") rounds as on the CPU; torch.compile returns what it
    is given; Triton has an active driver. One thread, one GPU. What needs a real one raises NeedsGpuError.

    Raises KernelError for another target, and as `interpreted`.
    """
    if target not in GPUS:
        raise KernelError(f"cuda_stand_in: target={target!r}; expected {', '.join(GPUS[:-1])} or {GPUS[-1]}")
    from refllm.kernels.interpreter.cuda_tensors import one_gpu

    exchanged = Exchange()
    with interpreted(**settings):
        try:
            _exchange(exchanged, TARGETS[target])
            with one_gpu():
                yield
        finally:
            exchanged.undo()


def _exchange(exchanged: Exchange, target: Target) -> None:
    import torch
    from triton.runtime import driver

    from refllm.kernels.interpreter import cuda_answers, cuda_tensors

    for owner, answers in ((torch.cuda, cuda_answers.cuda(target)), (torch.accelerator, cuda_answers.accelerator())):
        for name, answer in answers.items():
            exchanged.set(owner, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        exchanged.set(torch.cuda.nvtx, name, lambda *_, **__: None)
    if torch.version.cuda is None:
        exchanged.set(torch.version, "cuda", cuda_answers.VERSION)
    exchanged.set(driver, "_active", cuda_answers.Driver(target))
    exchanged.set(torch, "compile", _not_compiled)
    exchanged.set(torch, "Generator", _generator())
    exchanged.set(torch.Tensor, "record_stream", lambda tensor, stream: None)
    exchanged.set(torch, "from_numpy", cuda_tensors.of_host(torch.from_numpy))
    _autocast(exchanged)


def _not_compiled(model: Any = None, **_: Any) -> Any:
    """torch.compile: code for a GPU cannot be made here, and what it is made of runs as it is."""
    return model if model is not None else lambda function: function


def _generator() -> type:
    """torch.Generator, that takes "cuda" for a device."""
    import torch

    from refllm.kernels.interpreter.cuda_tensors import HOST, asks_for_gpu

    original = torch.Generator

    class _Kind(type(original)):  # type: ignore[misc]
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, original)

    class Generator(original, metaclass=_Kind):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return original(device=HOST if asks_for_gpu(device) else device)

    return Generator


def _autocast(exchanged: Exchange) -> None:
    """torch.autocast("cuda") sets its own switches, which code may ask for, and those of the CPU, where tensors are."""
    import torch

    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__
    inner: list[Any] = []

    def entered(self: Any) -> Any:
        if self.device == "cuda":
            inner.append(kind("cpu", self.fast_dtype, self._enabled, self._cache_enabled))
            enter(inner[-1])
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        result = leave(self, *error)
        if self.device == "cuda":
            leave(inner.pop(), *error)
        return result

    exchanged.set(kind, "__enter__", entered)
    exchanged.set(kind, "__exit__", left)
