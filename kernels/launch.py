"""One start of one Triton kernel, as a value: what to run, on which arguments, in which configuration.

The `plan` function of every kernel file returns a `Launch`. Running it starts the kernel; compiling it ahead of time
(`refllm.kernels.aot`) needs no GPU and no memory, because the tensors in it may live on the "meta" device. So what the
gate inspects is what users run.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from refllm.errors import InputError
from refllm.kernels import interpreter
from refllm.kernels.targets import DEFAULT, Target

Shape = TypeVar("Shape")


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that a start of it needs.

    kernel: the function decorated with `triton.jit`.
    grid: number of programs. One axis is enough for everything here, and the only one that may exceed 65,535.
    arguments: run-time arguments by name (tensors, ints, floats, None).
    constants: tl.constexpr arguments by name: tile sizes and switches.
    num_warps, num_stages: warps per program; depth of the pipeline of asynchronous copies.
    tensor_cores: whether the gate should find tensor-core instructions (there is a product of narrow numbers).
    async_copies: whether the gate should find asynchronous copies (there is a loop that they can run ahead of).
    wide_loads: whether the gate should find 16-byte loads (its speed is that of the memory).
    wide_stores: whether the gate should find 16-byte stores.
    narrow: why it has none, where its speed is that of the memory and no load can be that wide.
    """

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    async_copies: bool = False
    wide_loads: bool = False
    wide_stores: bool = False
    narrow: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Starts the kernel on the device of its tensors; does nothing if there is nothing to compute."""
        if not self.grid[0]:
            return
        self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages, **self.options
        )


def on_device(operator: str, tensor: torch.Tensor) -> Any:
    """A context in which kernels start on the device of `tensor`.

    Raises InputError if Triton cannot run there: only a GPU, or the interpreter, can.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and interpreter.active():
        return contextlib.nullcontext()
    raise InputError(
        f"{operator}: the tensors are on {tensor.device}, and a Triton kernel runs on a GPU; move them to cuda, call "
        f"refllm.kernels.plain.{operator}, or run this inside `with refllm.kernels.interpreted():`"
    )


def shipped(
    shapes: Iterable[Shape], of_other_dtypes: Iterable[Shape], target: Target
) -> Iterator[tuple[torch.dtype, Shape]]:
    """(dtype, shape) for what a kernel file ships: bfloat16 with every shape on every target, float16 and float32 with
    some, where `stands_for_others`."""
    yield from ((torch.bfloat16, shape) for shape in shapes)
    if stands_for_others(target):
        yield from ((dtype, shape) for dtype in (torch.float16, torch.float32) for shape in of_other_dtypes)


def stands_for_others(target: Target) -> bool:
    """Whether float16 and float32 are compiled ahead of time for it: one target of NVIDIA, and AMD's.

    float16 has the tiles of bfloat16, and its instructions but for the format in their names; float32 uses no tensor
    cores and has one tile on all of NVIDIA's.
    """
    return target == DEFAULT or target.is_amd
