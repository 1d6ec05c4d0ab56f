"""The backward pass of SwiGLU.

    dgate = dh up s (1 + gate (1 - s))        s = 1 / (1 + e^-gate), silu(gate) = gate s
    dup = dh gate s                           in float32; rounded once, at the end

1 - s is e^-gate s and never a difference, which for a large gate would have no digit left.

Tiles: as in swiglu.py, a program takes a piece of one row; dense tensors are one long row.
Traffic: reads three numbers and writes two per element. About 15 flops per element, 30 in float32, whose exponential
and quotient are the careful ones of swiglu.py: the loads decide the speed.
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
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.swiglu import Tile, exp_fp32, piece
from refllm.kernels.tuning.tunables import Tunable

TUNABLE = Tunable(
    "swiglu_backward", "swiglu_backward", {tuning.ANY: {"S": 2048, "F": 7040}}, {"bytes": (16, 32), "warps": (4, 8)}
)


@triton.jit
def swiglu_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dh_stride, gate_stride, up_stride, F,
    DGATE: tl.constexpr, DUP: tl.constexpr, PRECISE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A program: a piece of one row."""
    tiles = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    columns = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    dh = tl.load(dh_ptr + row * dh_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    e = exp_fp32(-gate) if PRECISE else tl.exp(-gate)
    s = tl.div_rn(1.0, 1.0 + e) if PRECISE else 1.0 / (1.0 + e)
    if DGATE:
        up = tl.load(up_ptr + row * up_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
        rest = tl.where(gate < -80.0, 1.0, tl.where(gate > 100.0, 0.0, e * s))  # 1 - s, also where e is infinite
        dgate = dh * up * (s * (1.0 + gate * rest))
        tl.store(dgate_ptr + row * F + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=columns < F)
    if DUP:
        silu = tl.div_rn(gate, 1.0 + e) if PRECISE else gate * s
        tl.store(dup_ptr + row * F + columns, (dh * silu).to(dup_ptr.dtype.element_ty), mask=columns < F)


def plan(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    target: Target = DEFAULT,
    tile: Tile | None = None,
    needed: Sequence[bool] = (True, True),
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch, dgate and dup, contiguous and shaped as gate. needed: which of them; the other is an empty tensor."""
    results = [torch.empty(gate.shape if asked else 0, dtype=gate.dtype, device=gate.device) for asked in needed]
    dh, gate, up = flat_rows(dh, gate, up)
    N, F = gate.shape
    tile = tile or Tile(**tuning.tile("swiglu_backward", tuning.ANY, target))
    block, full = piece(F, gate.element_size(), tile, target)
    given = {
        "dh_ptr": dh, "gate_ptr": gate, "up_ptr": up, "dgate_ptr": results[0], "dup_ptr": results[1],
        "dh_stride": dh.stride(0), "gate_stride": gate.stride(0), "up_stride": up.stride(0), "F": F,
    }  # fmt: skip
    constants = {
        "DGATE": bool(needed[0]), "DUP": bool(needed[1]), "PRECISE": gate.dtype == torch.float32, "BLOCK_F": block,
    }  # fmt: skip
    wide, grid = full and chunk_length(F, dh, gate, up) == CHUNK, (N * triton.cdiv(F, block),)
    launch = Launch(swiglu_backward_kernel, grid, given, constants, num_warps=tile.warps, wide_loads=wide)
    return launch, results[0], results[1]


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: dense tensors and halves of one, short rows, every dtype."""
    for dtype in arguments.FLOATS:
        kind = str(dtype).removeprefix("torch.")
        for F in (40, 7040):
            both = torch.empty(64, 2 * F, dtype=dtype, device="meta")
            dh = torch.empty(64, F, dtype=dtype, device="meta")
            yield f"swiglu_backward {kind} halves F={F}", plan(dh, both[:, :F], both[:, F:], target)[0]
        yield f"swiglu_backward {kind} dense", plan(both, both, both, target)[0]


@torch.library.custom_op("refllm::swiglu_backward", mutates_args=())
def _swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, needed: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("swiglu_backward", gate):
        launch, dgate, dup = plan(dh, gate, up, target_of(gate.device), needed=needed)
        launch.run()
    return dgate, dup


@_swiglu_backward.register_fake
def _(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, needed: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape if needed[0] else 0), gate.new_empty(gate.shape if needed[1] else 0)


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    found = _swiglu_backward(incoming[0], *kept, list(needed))
    return if_needed(needed[0], found[0]), if_needed(needed[1], found[1])


only_once("swiglu_backward")
differentiable("swiglu", lambda inputs, _: inputs, _gradients)


def swiglu_backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup of silu(gate) * up, element by element, contiguous. As `refllm.ops.swiglu_backward`.

    dh has the shape and dtype of gate, and any strides. Raises InputError for arguments that do not fit together.
    """
    arguments.check("swiglu_backward", gate, up)
    arguments.incoming("swiglu_backward", gate, dh=dh)
    return _swiglu_backward(dh, gate, up, [True, True])
