"""Triton's interpreter, repaired: any Triton kernel on the CPU, with the numerics and the strictness of a GPU.

    with refllm.kernels.interpreted():
        kernel[grid](x, y, BLOCK=1024)        # tensors on the CPU; TRITON_INTERPRET stays unset

Triton's own interpreter computes bfloat16 on bit patterns, evaluates `2 <= i < 5` and `if block:` wrongly, hides
accesses out of bounds, overflow, races and results that nobody wrote, and breaks ahead-of-time compilation in the same
process. Here a kernel is rewritten (rewrite.py) so that each construct means what the compiler makes of it
(operations.py), on top of Triton's semantic layer and a repaired NumPy builder (builder.py, formats.py, reduction.py,
libdevice.py); memory.py checks every access. launch.py runs a grid, autotune.py stands in for the autotuner,
poison.py fills new memory, and context.py switches it on. cuda_stand_in.py lets "cuda" mean all this.

What it does not show: speed, registers and shared memory; the order of a GPU's sums; approximate division and
exponentials; products and sums that the compiler fuses into one rounding; what the compiler refuses (types that change
in a loop, variables defined on one path only). Compile your kernels ahead of time as well: that is the type checker.
"""

from typing import TYPE_CHECKING, Any

from refllm.kernels.interpreter.context import active, interpreted
from refllm.kernels.interpreter.cuda_stand_in import cuda_stand_in
from refllm.kernels.interpreter.errors import (
    DeviceAssertionError,
    IntegerOverflowError,
    KernelError,
    MaskedOffWarning,
    NeedsGpuError,
    OutOfBoundsError,
    RaceError,
    UninitializedError,
)

if TYPE_CHECKING:
    from refllm.kernels.interpreter.poison import unwritten

__all__ = [
    "DeviceAssertionError",
    "IntegerOverflowError",
    "KernelError",
    "MaskedOffWarning",
    "NeedsGpuError",
    "OutOfBoundsError",
    "RaceError",
    "UninitializedError",
    "active",
    "cuda_stand_in",
    "interpreted",
    "unwritten",
]


def __getattr__(name: str) -> Any:
    if name == "unwritten":  # needs Torch, which the rest of this module does without
        from refllm.kernels.interpreter import poison

        return poison.unwritten
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
