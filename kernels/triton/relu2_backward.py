"""The backward pass of squared ReLU.

    dx = 2 max(x, 0) dy                       in float32; rounded once, at the end

Tiles: as in relu2.py, a program takes a piece of one row; dense tensors are one long row.
Traffic: reads two numbers and writes one per element. 3 flops per element: the loads decide the speed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device
from refllm.kernels.layout import CHUNK, chunk_length, flat_rows
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, only_once
from refllm.kernels.triton.swiglu import Tile, piece
from refllm.kernels.tuning.tunables import Tunable

TUNABLE = Tunable(
    "relu2_backward", "relu2_backward", {tuning.ANY: {"S": 2048, "F": 18_432}}, {"bytes": (16, 32), "warps": (4, 8)}
)


@triton.jit
def relu2_backward_kernel(dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, F, BLOCK_F: tl.constexpr):
    """A program: a piece of one row."""
    tiles = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    columns = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    dx = 2.0 * tl.where(x < 0.0, 0.0, x) * dy  # tl.maximum would turn NaN into 0
    tl.store(dx_ptr + row * F + columns, dx.to(dx_ptr.dtype.element_ty), mask=columns < F)


def plan(
    dy: torch.Tensor, x: torch.Tensor, target: Target = DEFAULT, tile: Tile | None = None
) -> tuple[Launch, torch.Tensor]:
    """The launch and dx, contiguous and shaped as x."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy, x = flat_rows(dy, x)
    N, F = x.shape
    tile = tile or Tile(**tuning.tile("relu2_backward", tuning.ANY, target))
    block, full = piece(F, x.element_size(), tile, target)
    given = {"dy_ptr": dy, "x_ptr": x, "dx_ptr": dx, "dy_stride": dy.stride(0), "x_stride": x.stride(0), "F": F}
    wide, grid = full and chunk_length(F, dy, x) == CHUNK, (N * triton.cdiv(F, block),)
    return Launch(relu2_backward_kernel, grid, given, {"BLOCK_F": block}, num_warps=tile.warps, wide_loads=wide), dx


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: a dense tensor and a part of one, short rows, every dtype."""
    for dtype in arguments.FLOATS:
        kind = str(dtype).removeprefix("torch.")
        for F in (40, 18_432):
            x = torch.empty(64, 2 * F, dtype=dtype, device="meta")
            yield f"relu2_backward {kind} part F={F}", plan(x[:, F:], x[:, :F], target)[0]
        yield f"relu2_backward {kind} dense", plan(x, x, target)[0]


@torch.library.custom_op("refllm::relu2_backward", mutates_args=())
def _relu2_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with on_device("relu2_backward", x):
        launch, dx = plan(dy, x, target_of(x.device))
        launch.run()
    return dx


@_relu2_backward.register_fake
def _(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _gradients(_: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    return (_relu2_backward(incoming[0], *kept),)


only_once("relu2_backward")
differentiable("relu2", lambda inputs, _: inputs, _gradients)


def relu2_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dx = 2 max(x, 0) dy, element by element, contiguous. As `refllm.ops.relu2_backward`.

    dy has the shape and dtype of x, and any strides. Raises InputError for arguments that do not fit together.
    """
    arguments.check("relu2_backward", x)
    arguments.incoming("relu2_backward", x, dy=dy)
    return _relu2_backward(dy, x)
