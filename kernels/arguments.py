"""What every operator checks about its arguments, in one place for the plain and the Triton form.

Each function raises InputError: the operator, the argument, what it is, what was expected. Shape checks only look at
shapes, dtypes and devices, never at values, and so never wait for a GPU.
"""

from typing import Any

import torch

from refllm.errors import InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def describe(x: Any) -> str:
    """[2, 3] torch.bfloat16 on cuda:0; or the type, for what is not a tensor."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def fail(operator: str, name: str, value: Any, expected: str) -> None:
    """Raises the InputError for one argument."""
    raise InputError(f"{operator}: {name} is {describe(value)}; expected {expected}")


def floating(operator: str, name: str, x: Any, ndim: int | None = None) -> torch.Tensor:
    """x, a tensor of float32, float16 or bfloat16 with `ndim` axes (None: one or more)."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        fail(operator, name, x, "a float32, float16 or bfloat16 tensor")
    if (ndim is None and x.ndim < 1) or (ndim is not None and x.ndim != ndim):
        fail(operator, name, x, "at least one axis" if ndim is None else f"{ndim} axes")
    return x


def like(
    operator: str,
    name: str,
    x: Any,
    shape: tuple[int, ...],
    model: torch.Tensor,
    *,
    or_float32: bool = False,
) -> None:
    """x has that shape and the dtype (or float32, if or_float32) and device of `model`."""
    dtypes = {model.dtype, torch.float32} if or_float32 else {model.dtype}
    ok = isinstance(x, torch.Tensor) and tuple(x.shape) == shape and x.dtype in dtypes and x.device == model.device
    if not ok:
        kinds = " or ".join(sorted(str(dtype) for dtype in dtypes))
        fail(operator, name, x, f"{list(shape)} {kinds} on {model.device}")


def rms_norm(operator: str, x: Any, weight: Any) -> None:
    """x [..., E], weight [E]."""
    floating(operator, "x", x)
    like(operator, "weight", weight, (x.shape[-1],), x, or_float32=True)
