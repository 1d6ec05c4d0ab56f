"""LayerNorm, alone and after a residual sum.

    r = residual + x                                    (add_layer_norm only; rounded to the dtype of x, and returned)
    y = w * (r - mean(r)) / sqrt(var(r) + eps) + b      over the last axis, in float32; rounded once, at the end

A row is centred twice. Its mean, rounded to float32, is off by up to half a unit in its last place, and at a mean of
1000 that is more than all other errors together: so the mean of what is left is taken off too. The variance is that of
the centred numbers and never a difference of two large sums.

Tiles: a program takes one row. Up to `ROW` columns are one tile that is read once. Longer rows are walked over three
times after a first look at their first tile, whose mean is as good a first guess as any.
Traffic: reads and writes E numbers each per row (twice that with the residual; a row over `ROW` is read three times,
mostly from the cache). 9 E flops per row: far below what memory allows, so the loads decide the speed.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import CHUNK, chunk_length, rows
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.rms_norm import TUNABLE as rms_norm_rows
from refllm.kernels.triton.rms_norm import Tile, inverse_root, load_sum, row_tile, shape_class
from refllm.kernels.tuning.tunables import Tunable

TUNABLE = Tunable("layer_norm", "add_layer_norm", rms_norm_rows.shapes, rms_norm_rows.fields)


@triton.jit
def _centre(x, centre, rest, columns, E):
    """x - centre - rest in float32; lanes past E are 0 and add nothing to a sum or a variance."""
    return tl.where(columns < E, (x.to(tl.float32) - centre) - rest, 0.0)


@triton.jit
def _store_normed(y_ptr, weight_ptr, bias_ptr, centred, scale, columns, E, BIAS: tl.constexpr):
    y = centred * scale * tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < E)


# Strides are exempt from specialization so that the bits of a row do not depend on the batch: see rms_norm.py.
@triton.jit(do_not_specialize=["x_stride", "residual_stride"])
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, x_stride, residual_stride, E, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, ONE_TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program: one row."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    x_ptr += tl.multiple_of(row * x_stride, CHUNK)
    y_ptr += row * E
    if ADD:
        residual_ptr += tl.multiple_of(row * residual_stride, CHUNK)
        sum_ptr += row * E
    columns = tl.arange(0, BLOCK_E)
    r = load_sum(x_ptr, residual_ptr, columns, E, ADD)  # the row, or its first tile
    centre = tl.div_rn(tl.sum(r.to(tl.float32), 0), (E if ONE_TILE else BLOCK_E) * 1.0)

    if ONE_TILE:
        if ADD:
            tl.store(sum_ptr + columns, r, mask=columns < E)
        rest = tl.div_rn(tl.sum(_centre(r, centre, 0.0, columns, E), 0), E * 1.0)
        centred = _centre(r, centre, rest, columns, E)
        scale = inverse_root(tl.div_rn(tl.sum(centred * centred, 0), E * 1.0) + eps)
        _store_normed(y_ptr, weight_ptr, bias_ptr, centred, scale, columns, E, BIAS)
    else:
        sums, squares = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, E, BLOCK_E):
            r = load_sum(x_ptr, residual_ptr, start + columns, E, ADD)
            if ADD:
                tl.store(sum_ptr + start + columns, r, mask=start + columns < E)
            sums += _centre(r, centre, 0.0, start + columns, E)
        rest = tl.div_rn(tl.sum(sums, 0), E * 1.0)
        for start in range(0, E, BLOCK_E):  # the residual sum again: a program must not read what it has just written
            centred = _centre(load_sum(x_ptr, residual_ptr, start + columns, E, ADD), centre, rest, start + columns, E)
            squares += centred * centred
        scale = inverse_root(tl.div_rn(tl.sum(squares, 0), E * 1.0) + eps)
        for start in range(0, E, BLOCK_E):
            centred = _centre(load_sum(x_ptr, residual_ptr, start + columns, E, ADD), centre, rest, start + columns, E)
            _store_normed(y_ptr, weight_ptr, bias_ptr, centred, scale, start + columns, E, BIAS)


def plan(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor | None]:
    """The launch, y, and residual + x (None without a residual). Both results are contiguous, shaped as x."""
    y, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    x, E = rows(x), x.shape[-1]
    if residual is not None:
        total, residual = torch.empty_like(y), rows(residual)
    tile = tile or Tile(**tuning.tile("layer_norm", shape_class(E), target))
    block, warps = row_tile(E, tile, target)
    chunk = CHUNK if chunk_length(E, x, residual) == CHUNK else 1  # of an E in run time Triton sees no other divisor
    given = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(), "y_ptr": y, "sum_ptr": total,
        "x_stride": x.stride(0), "residual_stride": 0 if residual is None else residual.stride(0), "E": E, "eps": eps,
    }  # fmt: skip
    constants = {
        "ADD": residual is not None, "BIAS": bias is not None, "ONE_TILE": block >= E, "CHUNK": chunk,
        "BLOCK_E": block,
    }  # fmt: skip
    return Launch(layer_norm_kernel, (len(x),), given, constants, num_warps=warps, wide_loads=chunk == CHUNK), y, total


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: every tile, for dense, ragged and very long rows."""
    for dtype, E in shipped((64, 1000, 2048, 2560, 5120, 20_480), (2560, 20_480), target):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, E), (E,)))
        kind = str(dtype).removeprefix("torch.")
        yield f"layer_norm {kind} E={E}", plan(x, None, weight, None, 1e-5, target)[0]
        yield f"layer_norm {kind} E={E} bias", plan(x, None, weight, weight, 1e-5, target)[0]
        yield f"add_layer_norm {kind} E={E} bias", plan(x, x, weight, weight, 1e-5, target)[0]


@torch.library.custom_op("refllm::layer_norm", mutates_args=())
def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    with on_device("layer_norm", x):
        launch, y, _ = plan(x, None, weight, bias, eps, target_of(x.device))
        launch.run()
    return y


@torch.library.custom_op("refllm::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("add_layer_norm", x):
        launch, y, total = plan(x, residual, weight, bias, eps, target_of(x.device))
        launch.run()
    return y, total


@_layer_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@_add_layer_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """y = w * (x - mean(x)) / sqrt(var(x) + eps) + b over the last axis: [..., E] -> [..., E]; weight, bias [E].

    As `refllm.ops.layer_norm`. weight and bias may be float32 beside a narrower x. Raises InputError for arguments that
    do not fit together.
    """
    arguments.check("layer_norm", x, weight, bias)
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(r, weight, bias, eps), r) with r = residual + x, rounded to their dtype.

    As `refllm.ops.add_layer_norm`. residual has the shape and dtype of x. Raises InputError for arguments that do not
    fit together.
    """
    arguments.check("add_layer_norm", x, residual, weight, bias)
    return _add_layer_norm(x, residual, weight, bias, eps)
