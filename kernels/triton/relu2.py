"""Squared ReLU, the activation of Arcee.

    y = max(x, 0)^2                           in float32; rounded once, at the end

Tiles: a program takes a piece of one row; a dense tensor is one long row.
Traffic: reads and writes one number per element. 2 flops per element: the loads decide the speed.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device
from refllm.kernels.layout import CHUNK, chunk_length, flat_rows
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.swiglu import Tile, piece
from refllm.kernels.tuning.tunables import Tunable

TUNABLE = Tunable("relu2", "relu2", {tuning.ANY: {"S": 2048, "F": 18_432}}, {"bytes": (16, 32, 64), "warps": (4, 8)})


@triton.jit
def relu2_kernel(x_ptr, y_ptr, x_stride, F, BLOCK_F: tl.constexpr):
    """A program: a piece of one row."""
    tiles = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    columns = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)  # tl.maximum would turn NaN into 0
    tl.store(y_ptr + row * F + columns, (x * x).to(y_ptr.dtype.element_ty), mask=columns < F)


def plan(x: torch.Tensor, target: Target = DEFAULT, tile: Tile | None = None) -> tuple[Launch, torch.Tensor]:
    """The launch and y, contiguous and shaped as x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x,) = flat_rows(x)
    N, F = x.shape
    tile = tile or Tile(**tuning.tile("relu2", tuning.ANY, target))
    block, full = piece(F, x.element_size(), tile, target)
    given = {"x_ptr": x, "y_ptr": y, "x_stride": x.stride(0), "F": F}
    wide = full and chunk_length(F, x) == CHUNK
    grid = (N * triton.cdiv(F, block),)
    return Launch(relu2_kernel, grid, given, {"BLOCK_F": block}, num_warps=tile.warps, wide_loads=wide), y


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: a dense tensor and a part of one, short rows, every dtype."""
    for dtype in arguments.FLOATS:
        kind = str(dtype).removeprefix("torch.")
        for F in (40, 18_432):
            x = torch.empty(64, 2 * F, dtype=dtype, device="meta")
            yield f"relu2 {kind} part F={F}", plan(x[:, :F], target)[0]
        yield f"relu2 {kind} dense", plan(x, target)[0]


@torch.library.custom_op("refllm::relu2", mutates_args=())
def _relu2(x: torch.Tensor) -> torch.Tensor:
    with on_device("relu2", x):
        launch, y = plan(x, target_of(x.device))
        launch.run()
    return y


@_relu2.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """y = max(x, 0)^2, element by element. As `refllm.ops.relu2`: float16 overflows to infinity above 255.9.

    Raises InputError if x is not a tensor of float32, float16 or bfloat16.
    """
    arguments.check("relu2", x)
    return _relu2(x)
