"""SwiGLU, the gated unit of Helium, Llama and StableLM.

    y = gate / (1 + e^-gate) * up             in float32; rounded once, at the end

Tiles: a program takes a piece of one row; dense tensors are one long row. gate and up may be two halves of one tensor.
Traffic: reads two numbers and writes one per element. About 10 flops per element, 25 in float32: the loads decide the
speed.

Rounding: on a GPU tl.exp(x) is exp2(x log2(e)) with that product rounded, off by up to 63 units in the last place
(x = -87), and `/` is off by two. bfloat16 and float16 keep nothing of that. float32 does, and gets the careful forms.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device
from refllm.kernels.layout import CHUNK, chunk_length, flat_rows
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.tuning.tunables import Tunable


class Tile(NamedTuple):
    """Bytes of each input that a thread reads, in loads of 16; warps per program. Also that of relu2.py."""

    bytes: int
    warps: int


TUNABLE = Tunable("swiglu", "swiglu", {tuning.ANY: {"S": 2048, "F": 7040}}, {"bytes": (16, 32, 64), "warps": (4, 8)})


def piece(F: int, element_size: int, tile: Tile, target: Target) -> tuple[int, bool]:
    """Numbers of a row of F per program, and whether every thread has its bytes: a shorter row gives it fewer."""
    longest = tile.warps * target.warp_size * tile.bytes // element_size
    block = min(longest, max(16, triton.next_power_of_2(F)))
    return block, block == longest


@triton.jit
def exp_fp32(x):
    """e^x to about one unit in the last place: 2^n e^r with n whole and |r| <= ln(2)/2, where exp2 is at its best.

    ln 2 comes in two parts, the first so short that n times it is exact. Source of the split: Cody and Waite 1980,
    "Software Manual for the Elementary Functions", chapter 6.
    """
    x = tl.where(x > 100.0, 100.0, x)  # infinity less infinity is NaN; e^100 is infinite and e^-100 is 0 anyway.
    x = tl.where(x < -100.0, -100.0, x)  # tl.clamp would lose NaN
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    return (2.0 * tl.exp2(r * 1.44269504)) * tl.exp2(n - 1.0)  # n - 1: 2^128 is infinite where e^x is not yet


@triton.jit
def swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, F,
    PRECISE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A program: a piece of one row."""
    tiles = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    columns = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + exp_fp32(-gate)) if PRECISE else gate / (1.0 + tl.exp(-gate))
    tl.store(y_ptr + row * F + columns, (silu * up).to(y_ptr.dtype.element_ty), mask=columns < F)


def plan(
    gate: torch.Tensor, up: torch.Tensor, target: Target = DEFAULT, tile: Tile | None = None
) -> tuple[Launch, torch.Tensor]:
    """The launch and y, contiguous and shaped as gate."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = flat_rows(gate, up)
    N, F = gate.shape
    tile = tile or Tile(**tuning.tile("swiglu", tuning.ANY, target))
    block, full = piece(F, gate.element_size(), tile, target)
    given = {
        "gate_ptr": gate, "up_ptr": up, "y_ptr": y, "gate_stride": gate.stride(0), "up_stride": up.stride(0), "F": F,
    }  # fmt: skip
    constants = {"PRECISE": gate.dtype == torch.float32, "BLOCK_F": block}
    wide, grid = full and chunk_length(F, gate, up) == CHUNK, (N * triton.cdiv(F, block),)
    return Launch(swiglu_kernel, grid, given, constants, num_warps=tile.warps, wide_loads=wide), y


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: dense tensors and halves of one, short rows, every dtype."""
    for dtype in arguments.FLOATS:
        kind = str(dtype).removeprefix("torch.")
        for F in (40, 7040, 14_336):
            both = torch.empty(64, 2 * F, dtype=dtype, device="meta")
            yield f"swiglu {kind} halves F={F}", plan(both[:, :F], both[:, F:], target)[0]
        yield f"swiglu {kind} dense", plan(both, both, target)[0]


@torch.library.custom_op("refllm::swiglu", mutates_args=())
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    with on_device("swiglu", gate):
        launch, y = plan(gate, up, target_of(gate.device))
        launch.run()
    return y


@_swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up, element by element; gate and up have one shape and dtype. As `refllm.ops.swiglu`.

    Raises InputError for arguments that do not fit together.
    """
    arguments.check("swiglu", gate, up)
    return _swiglu(gate, up)
