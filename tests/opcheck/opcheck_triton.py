"""Triton candidates for the tests of `check_op`: an RMSNorm, with what goes wrong in kernels."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def norm(
    x_ptr, w_ptr, y_ptr, E, eps, BLOCK: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, NARROW: tl.constexpr
):
    """A program: one row. LOAD: the weight is loaded with a mask, STORE: the result stored with one."""
    row = tl.program_id(0)
    if not NARROW:
        row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, E, BLOCK):
        x = tl.load(x_ptr + row * E + start + columns, mask=start + columns < E, other=0.0).to(tl.float32)
        squares += x * x
    scale = 1 / tl.sqrt_rn(tl.sum(squares, 0) / E + eps)
    x = tl.load(x_ptr + row * E + columns, mask=columns < E, other=0.0).to(tl.float32)
    weight = tl.load(w_ptr + columns, mask=columns < E, other=0.0) if LOAD else tl.load(w_ptr + columns)
    y = (weight.to(tl.float32) * x * scale).to(y_ptr.dtype.element_ty)
    if STORE:
        tl.store(y_ptr + row * E + columns, y, mask=columns < E)
    else:
        tl.store(y_ptr + row * E + columns, y)


def _launch(
    x: Any, weight: Any, eps: float, memory: int = 0, block: int = 0, load: bool = True, store: bool = True
) -> Any:
    x, weight, E = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = torch.empty(x.numel() + memory, dtype=x.dtype, device=x.device)
    if x.numel():
        BLOCK = block or triton.next_power_of_2(E)
        norm[(x.numel() // E,)](x, weight, y, E, eps, BLOCK=BLOCK, LOAD=load, STORE=store, NARROW=False)
    return y[: x.numel()].view(x.shape)


def right(x: Any, weight: Any, eps: float) -> Any:
    """Meets the contract."""
    return _launch(x, weight, eps)


def first_tile(x: Any, weight: Any, eps: float) -> Any:
    """Only the first 256 columns are written."""
    return _launch(x, weight, eps, block=256)


def beyond(x: Any, weight: Any, eps: float) -> Any:
    """The weight is read past its end."""
    return _launch(x, weight, eps, load=False)


def race(x: Any, weight: Any, eps: float) -> Any:
    """The padding lanes of a row are stored over the start of the next one."""
    return _launch(x, weight, eps, memory=4 * x.shape[-1] + 64, store=False)
