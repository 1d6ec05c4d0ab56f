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


@triton.jit
def scaled(x_ptr, w_ptr, y_ptr, E, eps, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A program: one row. OTHER: lanes past its end are loaded as 0."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < E
    if OTHER:
        x = tl.load(x_ptr + row * E + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + row * E + columns, mask=inside).to(tl.float32)
    weight = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = weight * x / tl.sqrt_rn(tl.sum(x * x, 0) / E + eps)
    tl.store(y_ptr + row * E + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


tuned = triton.autotune([triton.Config({"BLOCK": 1024}), triton.Config({"BLOCK": 512})], key=["E"])(scaled)


def _of_rows(x: Any, launch: Any) -> Any:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        launch(x, y, (x.numel() // x.shape[-1],))
    return y


def load_without_other(x: Any, weight: Any, eps: float) -> Any:
    """The lanes past the end of a row are loaded with a mask and nothing in their place, and then summed."""
    weight, E = weight.contiguous(), x.shape[-1]
    block = triton.next_power_of_2(E)
    return _of_rows(x, lambda x, y, grid: scaled[grid](x, weight, y, E, eps, BLOCK=block, OTHER=False))


def second_configuration(x: Any, weight: Any, eps: float) -> Any:
    """Right in the first configuration of its autotuner; in the second, columns past 512 are dropped."""
    weight, E = weight.contiguous(), x.shape[-1]
    return _of_rows(x, lambda x, y, grid: tuned[grid](x, weight, y, E, eps, OTHER=True))


def _counted(function: Any) -> Any:
    def counted(*arguments: Any) -> Any:
        return function(*arguments)

    return counted


decorated = _counted(_counted(right))
"""`right` behind two decorators that do not say whom they wrap."""


@triton.jit
def row_norm(x_ptr, w_ptr, y_ptr, stride, E, eps, BLOCK: tl.constexpr):
    """As tutorials have it: a row is a program and a block, x is divided in its own dtype's store alone."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < E, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / E + eps)
    weight = tl.load(w_ptr + columns, mask=columns < E)
    tl.store(y_ptr + row * stride + columns, x * scale * weight, mask=columns < E)


def textbook(x: Any, weight: Any, eps: float) -> Any:
    """Dense rows alone."""
    y = torch.empty_like(x)
    M, E = x.shape
    row_norm[(M,)](x, weight, y, x.stride(0), E, eps, BLOCK=triton.next_power_of_2(E))
    return y
