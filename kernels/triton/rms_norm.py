"""RMSNorm, alone and after a residual sum.

    r = residual + x                          (add_rms_norm only; rounded to the dtype of x, and returned)
    y = w * r / sqrt(mean(r^2) + eps)         mean over the last axis, in float32; rounded once, at the end

Tiles: a program takes one row. Up to `ROW` columns are one tile that is read once; longer rows are walked over twice.
Traffic: reads and writes E numbers each per row (twice that with the residual; a row over `ROW` is read twice).
5 E flops per row: far below what memory allows, so the loads decide the speed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import CHUNK, chunk_length, rows
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.tuning.tunables import Tunable

ROW = 16_384
"""Columns up to which a row is one tile: at 16 warps 32 numbers per thread. Longer rows take tiles of a quarter."""


class Tile(NamedTuple):
    """Numbers of the tile per thread, as long as that makes no more than 16 warps: the tile itself is the row."""

    per_thread: int


ROWS_BY_CLASS = {"E <= 4096": 2560, "E <= 16384": 5120, "longer": 20_480}
TUNABLE = Tunable(
    "rms_norm",
    "add_rms_norm",
    {shape: {"S": 2048, "row": E} for shape, E in ROWS_BY_CLASS.items()},
    {"per_thread": (8, 16, 32)},
)


def shape_class(E: int) -> str:
    """Which line of the table of tiles serves rows of E numbers; layer_norm.py has the same classes."""
    return "E <= 4096" if E <= ROW // 4 else "E <= 16384" if E <= ROW else "longer"


@triton.jit
def load_sum(x_ptr, residual_ptr, columns, E, ADD: tl.constexpr):
    """A tile of the row to be normed, in its own dtype; lanes past E are 0."""
    x = tl.load(x_ptr + columns, mask=columns < E, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + columns, mask=columns < E, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) in float32, as the root of 1 / x: taking the root halves the error before it, division would not.

    x must be at least 2^-128, which any eps above 1e-38 sees to.
    """
    return tl.sqrt_rn(tl.div_rn(1.0, x))


@triton.jit
def _store_normed(y_ptr, weight_ptr, r, scale, columns, E):
    weight = tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)
    y = weight * (r.to(tl.float32) * scale)
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < E)


# Triton compiles a kernel anew for strides that 16 divides, and it then adds in another order. The stride of a lone row
# is arbitrary, and its bits must be those that it has in a batch: so strides are exempt, and CHUNK, which divides the
# row length as well, says what divides them.
@triton.jit(do_not_specialize=["x_stride", "residual_stride"])
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, x_stride, residual_stride, E, eps,
    ADD: tl.constexpr, ONE_TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program: one row."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    x_ptr += tl.multiple_of(row * x_stride, CHUNK)
    y_ptr += row * E
    if ADD:
        residual_ptr += tl.multiple_of(row * residual_stride, CHUNK)
        sum_ptr += row * E
    columns = tl.arange(0, BLOCK_E)

    if ONE_TILE:
        r = load_sum(x_ptr, residual_ptr, columns, E, ADD)
        if ADD:
            tl.store(sum_ptr + columns, r, mask=columns < E)
        r32 = r.to(tl.float32)
        scale = inverse_root(tl.div_rn(tl.sum(r32 * r32, 0), E * 1.0) + eps)
        _store_normed(y_ptr, weight_ptr, r, scale, columns, E)
    else:
        squares = tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, E, BLOCK_E):
            r = load_sum(x_ptr, residual_ptr, start + columns, E, ADD)
            if ADD:
                tl.store(sum_ptr + start + columns, r, mask=start + columns < E)
            r32 = r.to(tl.float32)
            squares += r32 * r32
        scale = inverse_root(tl.div_rn(tl.sum(squares, 0), E * 1.0) + eps)
        for start in range(0, E, BLOCK_E):  # the residual sum again: a program must not read what it has just written
            r = load_sum(x_ptr, residual_ptr, start + columns, E, ADD)
            _store_normed(y_ptr, weight_ptr, r, scale, start + columns, E)


def row_tile(E: int, tile: Tile, target: Target) -> tuple[int, int]:
    """Columns per tile and warps per program. A thread has 8 columns at least: 16 bytes of narrow numbers."""
    block = max(8 * target.warp_size, triton.next_power_of_2(E)) if E <= ROW else ROW // 4
    return block, min(16, max(1, block // (tile.per_thread * target.warp_size)))


def plan(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The launch, y, and residual + x (None without a residual). Both results are contiguous, shaped as x."""
    y, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    x, E = rows(x), x.shape[-1]
    if residual is not None:
        total, residual = torch.empty_like(y), rows(residual)
    tile = tile or Tile(**tuning.tile("rms_norm", shape_class(E), target))
    block, warps = row_tile(E, tile, target)
    chunk = CHUNK if chunk_length(E, x, residual) == CHUNK else 1  # of an E in run time Triton sees no other divisor
    given = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight.contiguous(), "y_ptr": y, "sum_ptr": total,
        "x_stride": x.stride(0), "residual_stride": 0 if residual is None else residual.stride(0), "E": E, "eps": eps,
    }  # fmt: skip
    constants = {"ADD": residual is not None, "ONE_TILE": block >= E, "CHUNK": chunk, "BLOCK_E": block}
    return Launch(rms_norm_kernel, (len(x),), given, constants, num_warps=warps, wide_loads=chunk == CHUNK), y, total


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: every tile, for dense, ragged and very long rows."""
    for dtype, E in shipped((64, 1000, 2048, 2560, 5120, 20_480), (2560, 20_480), target):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, E), (E,)))
        kind = str(dtype).removeprefix("torch.")
        yield f"rms_norm {kind} E={E}", plan(x, None, weight, 1e-5, target)[0]
        yield f"add_rms_norm {kind} E={E}", plan(x, x, weight, 1e-5, target)[0]


@torch.library.custom_op("refllm::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    with on_device("rms_norm", x):
        launch, y, _ = plan(x, None, weight, eps, target_of(x.device))
        launch.run()
    return y


@torch.library.custom_op("refllm::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("add_rms_norm", x):
        launch, y, total = plan(x, residual, weight, eps, target_of(x.device))
        launch.run()
    return y, total


@_rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@_add_rms_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis: [..., E] -> [..., E], weight [E]. As `refllm.ops.rms_norm`.

    weight may be float32 beside a narrower x. Raises InputError for arguments that do not fit together.
    """
    arguments.check("rms_norm", x, weight)
    return _rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(r, weight, eps), r) with r = residual + x, rounded to their dtype. As `refllm.ops.add_rms_norm`.

    residual has the shape and dtype of x. Raises InputError for arguments that do not fit together.
    """
    arguments.check("add_rms_norm", x, residual, weight)
    return _add_rms_norm(x, residual, weight, eps)
