"""The backward pass of RMSNorm and LayerNorm, alone and after a residual sum.

    n = r / sqrt(mean(r^2) + eps)       or (r - mean(r)) / sqrt(var(r) + eps), s its factor 1 / sqrt(...)
    g = w * dy
    dx = s * (g - n mean(g n))          or s * (g - mean(g) - n mean(g n)); dx + dsum where the sum r was handed on
    dw = sum of dy * n over the rows    db = sum of dy over the rows

All in float32, r the row that was normed (x, or residual + x rounded as in the forward pass); dx, dw and db are rounded
once, at the end. A row of LayerNorm is centred twice, as in layer_norm.py.

Tiles: a program takes `rows` rows one after another and adds their terms of dw and db up in registers; a second kernel
adds the sums of all programs. How many rows that is does not depend on the GPU or on the batch, so the order of
every sum is fixed: the same bits in every run, and dx of a row has those of the row alone. Rows of up to `ROW` columns
are one tile that is read once. Of longer ones a first kernel, a program per row, finds the means; then a program takes
one tile of `rows` rows.
Traffic: reads 2 E numbers per row and writes E (with residual and dsum: reads 4 E; rows over `ROW` are read twice),
and 8 E / rows bytes of sums. About 12 E flops per row: the loads decide the speed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import CHUNK, chunk_length, rows
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.rms_norm import inverse_root, load_sum
from refllm.kernels.tuning.tunables import Tunable

ROW = 8192
"""Columns up to which a row is one tile. A number of it takes about six registers: the row and its gradient, n, g, the
weight, and the sums; so a thread has 16 of them, half as many as in the forward pass."""

SUMS = (64, 64)
"""Rows and columns per step of the kernel that adds up the sums of all programs."""


_ALL = (True, True, True)
"""What is needed of a norm: the gradients of x, weight and bias."""


class Tile(NamedTuple):
    """Numbers of a tile per thread, as long as that makes no more than 16 warps; rows per program."""

    per_thread: int
    rows: int


TUNABLE = Tunable(
    "norm_backward",
    "add_layer_norm_backward",
    {"one tile": {"S": 4096, "row": 5120, "rows": 16}, "longer": {"S": 4096, "row": 20_480, "rows": 16}},
    {"per_thread": (32, 16, 8)},
)
"""16 rows per program: few sums beside what is read, and a program for each of 128 multiprocessors at 2,048 rows."""


def shape_class(E: int) -> str:
    """Which line of the table of tiles serves rows of E numbers."""
    return "one tile" if E <= ROW else "longer"


@triton.jit
def _centred(r, centre, rest, columns, E):
    """r - centre - rest in float32; lanes past E are 0 and add nothing to a sum or a variance."""
    return tl.where(columns < E, (r.to(tl.float32) - centre) - rest, 0.0)


@triton.jit
def _statistics(r, g, columns, E, eps, LAYER: tl.constexpr):
    """The two centres of a row that is one tile, its factor s, mean(g) and mean(g n)."""
    centre, rest, shift = 0.0, 0.0, 0.0
    if LAYER:
        centre = tl.div_rn(tl.sum(r, 0), E * 1.0)
        rest = tl.div_rn(tl.sum(_centred(r, centre, 0.0, columns, E), 0), E * 1.0)
        r = _centred(r, centre, rest, columns, E)
        shift = tl.div_rn(tl.sum(g, 0), E * 1.0)
    scale = inverse_root(tl.div_rn(tl.sum(r * r, 0), E * 1.0) + eps)
    return centre, rest, scale, shift, tl.div_rn(tl.sum(g * (r * scale), 0), E * 1.0)


@triton.jit
def _load_scaled(dy_ptr, weight_ptr, columns, E):
    """dy and g = w dy of a tile, in float32; lanes past E are 0."""
    dy = tl.load(dy_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)
    return dy, dy * tl.load(weight_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)


# Strides and the number of rows are exempt from specialization so that the bits of a row do not depend on the batch:
# see rms_norm.py.
@triton.jit(do_not_specialize=["dy_stride", "x_stride", "residual_stride"])
def long_row_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, statistics_ptr, dy_stride, x_stride, residual_stride, E, eps,
    ADD: tl.constexpr, LAYER: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program: what `_statistics` gives, of one row in tiles; statistics_ptr [N, 5]."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    dy_ptr += tl.multiple_of(row * dy_stride, CHUNK)
    x_ptr += tl.multiple_of(row * x_stride, CHUNK)
    if ADD:
        residual_ptr += tl.multiple_of(row * residual_stride, CHUNK)
    columns = tl.arange(0, BLOCK_E)
    centre, rest, shift = 0.0, 0.0, 0.0
    if LAYER:
        first = load_sum(x_ptr, residual_ptr, columns, E, ADD).to(tl.float32)
        centre = tl.div_rn(tl.sum(first, 0), BLOCK_E * 1.0)  # the mean of the first tile: as good a guess as any
        sums, shifts = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, E, BLOCK_E):
            r = load_sum(x_ptr, residual_ptr, start + columns, E, ADD)
            sums += _centred(r, centre, 0.0, start + columns, E)
            shifts += _load_scaled(dy_ptr, weight_ptr, start + columns, E)[1]
        rest = tl.div_rn(tl.sum(sums, 0), E * 1.0)
        shift = tl.div_rn(tl.sum(shifts, 0), E * 1.0)
    squares, products = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, E, BLOCK_E):
        r = load_sum(x_ptr, residual_ptr, start + columns, E, ADD).to(tl.float32)
        if LAYER:
            r = _centred(r, centre, rest, start + columns, E)
        squares += r * r
        products += r * _load_scaled(dy_ptr, weight_ptr, start + columns, E)[1]
    scale = inverse_root(tl.div_rn(tl.sum(squares, 0), E * 1.0) + eps)
    statistics_ptr += row * 5
    tl.store(statistics_ptr, centre)
    tl.store(statistics_ptr + 1, rest)
    tl.store(statistics_ptr + 2, scale)
    tl.store(statistics_ptr + 3, shift)
    tl.store(statistics_ptr + 4, tl.div_rn(tl.sum(products, 0) * scale, E * 1.0))


@triton.jit(do_not_specialize=["dy_stride", "dsum_stride", "x_stride", "residual_stride", "N"])
def norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, residual_ptr, weight_ptr, statistics_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    dy_stride, dsum_stride, x_stride, residual_stride, N, E, eps,
    ADD: tl.constexpr, DSUM: tl.constexpr, LAYER: tl.constexpr, DX: tl.constexpr, DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr, ONE_TILE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program: dx of ROWS rows, or of one tile of them, and their sums for dw and db [programs, E]."""
    tiles = 1 if ONE_TILE else tl.cdiv(E, BLOCK_E)
    block = (tl.program_id(0) // tiles).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    columns = (tl.program_id(0) % tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = columns < E
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    for row in range(block * ROWS, tl.minimum((block + 1) * ROWS, N)):
        dy = tl.load(dy_ptr + tl.multiple_of(row * dy_stride, CHUNK) + columns, mask=inside, other=0.0).to(tl.float32)
        residual_row = residual_ptr + tl.multiple_of(row * residual_stride, CHUNK) if ADD else residual_ptr
        x_row = x_ptr + tl.multiple_of(row * x_stride, CHUNK)
        r = load_sum(x_row, residual_row, columns, E, ADD).to(tl.float32)
        g = dy * weight
        if ONE_TILE:
            centre, rest, scale, shift, mean = _statistics(r, g, columns, E, eps, LAYER)
        else:
            centre, rest = tl.load(statistics_ptr + row * 5), tl.load(statistics_ptr + row * 5 + 1)
            scale, shift = tl.load(statistics_ptr + row * 5 + 2), tl.load(statistics_ptr + row * 5 + 3)
            mean = tl.load(statistics_ptr + row * 5 + 4)
        n = (_centred(r, centre, rest, columns, E) if LAYER else r) * scale
        if DX:
            dx = scale * ((g - shift if LAYER else g) - n * mean)
            if DSUM:
                dsum_row = dsum_ptr + tl.multiple_of(row * dsum_stride, CHUNK)
                dx += tl.load(dsum_row + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * E + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if DWEIGHT:
            dweight += dy * n
        if DBIAS:
            dbias += dy
    if DWEIGHT:
        tl.store(dweight_ptr + block * E + columns, dweight, mask=inside)
    if DBIAS:
        tl.store(dbias_ptr + block * E + columns, dbias, mask=inside)


@triton.jit(do_not_specialize=["P"])
def add_rows_kernel(sums_ptr, out_ptr, P, E, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """A program: the sum over the P rows of some columns, [P, E] -> [E], in an order that depends on P alone."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (p < P)[:, None] & (columns < E)[None, :]
        total += tl.load(sums_ptr + p[:, None] * E + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < E)


def add_rows(sums: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes the sum of sums [P, E] over its rows to out, of E numbers."""
    P, E = sums.shape
    given = {"sums_ptr": sums, "out_ptr": out, "P": P, "E": E}
    constants = {"BLOCK_P": SUMS[0], "BLOCK_E": SUMS[1]}
    return Launch(add_rows_kernel, (triton.cdiv(E, SUMS[1]),), given, constants, num_warps=4)


def _plan(
    operator: str,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    needed: Sequence[bool] = _ALL,
    target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launches in their order, then dx (also that of the residual), dweight and dbias.

    operator: rms_norm_backward, layer_norm_backward, or one of these after add_. dsum, residual, bias: None where there
    is none, or where the row that was normed is given as x. needed: which of x, weight and bias have a gradient; in the
    place of the others, and of that of no bias, is an empty tensor.
    """
    of_x, of_weight, of_bias = needed[0], needed[1], needed[2] and bias is not None
    dx = torch.empty(x.shape if of_x else 0, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape if of_weight else 0, dtype=weight.dtype, device=x.device)
    dbias = torch.empty(weight.shape if of_bias else 0, dtype=(x if bias is None else bias).dtype, device=x.device)
    E = x.shape[-1]
    dy, x = rows(dy), rows(x)
    dsum = rows(dsum) if dsum is not None and of_x else None
    residual = None if residual is None else rows(residual)
    tile = tile or Tile(**tuning.tile("norm_backward", shape_class(E), target))
    block = max(8 * target.warp_size, triton.next_power_of_2(E)) if E <= ROW else ROW // 4
    one_tile, warps = block >= E, min(16, max(1, block // (tile.per_thread * target.warp_size)))
    N = len(x)
    programs, tiles = triton.cdiv(N, tile.rows), 1 if one_tile else triton.cdiv(E, block)
    sums = [dy.new_empty((programs, E) if asked else (0, 0), dtype=torch.float32) for asked in (of_weight, of_bias)]
    statistics = None if one_tile else dy.new_empty((N, 5), dtype=torch.float32)
    wide = chunk_length(E, dy, dsum, x, residual) == CHUNK
    row = {
        "dy_ptr": dy, "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight.contiguous(),
        "statistics_ptr": statistics, "dy_stride": dy.stride(0), "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0), "E": E, "eps": eps,
    }  # fmt: skip
    kind = {
        "ADD": residual is not None,
        "LAYER": "layer_norm" in operator,
        "CHUNK": CHUNK if wide else 1,
        "BLOCK_E": block,
    }
    steps = [] if one_tile else [Launch(long_row_kernel, (N,), row, kind, num_warps=warps, wide_loads=wide)]
    given = row | {
        "dsum_ptr": dsum, "dx_ptr": dx, "dweight_ptr": sums[0], "dbias_ptr": sums[1],
        "dsum_stride": 0 if dsum is None else dsum.stride(0), "N": N,
    }  # fmt: skip
    constants = kind | {
        "DSUM": dsum is not None, "DX": of_x, "DWEIGHT": of_weight, "DBIAS": of_bias, "ONE_TILE": one_tile,
        "ROWS": tile.rows,
    }  # fmt: skip
    steps.append(Launch(norm_backward_kernel, (programs * tiles,), given, constants, num_warps=warps, wide_loads=wide))
    steps += [add_rows(each, out) for each, out in zip(sums, (dweight, dbias), strict=True) if out.numel()]
    return steps, dx, dweight, dbias


def plan(
    operator: str,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[Any, ...]:
    """The launches in their order, then what the operator of that name returns."""
    steps, *found = _plan(operator, dy, dsum, x, residual, weight, bias, eps, target=target, tile=tile)
    return steps, *_results(operator, bias, *found)


def _results(
    operator: str, bias: torch.Tensor | None, dx: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor
) -> tuple[Any, ...]:
    """The gradients in the order of the operator's arguments: a sum hands its own to both of its terms."""
    of_terms = (dx, dx) if operator.startswith("add_") else (dx,)
    of_bias = (if_needed(bias is not None, dbias),) if "layer_norm" in operator else ()
    return *of_terms, dweight, *of_bias


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: dense, ragged and long rows."""
    for dtype, E in shipped((1000, 2560, 5120, 20_480), (2560,), target):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, E), (E,)))
        kind = f"{str(dtype).removeprefix('torch.')} E={E}"
        for layer, norm in ((False, "rms_norm"), (True, "layer_norm")):
            bias = weight if layer else None
            for name, dsum in ((f"{norm}_backward", None), (f"add_{norm}_backward", x)):
                steps = plan(name, x, dsum, x, dsum, weight, bias, 1e-5, target)[0]
                for step in steps[: len(steps) - 1 - layer]:
                    yield f"{name} {kind}" + (", means" if step.kernel is long_row_kernel else ""), step
    sums, weight = (torch.empty(shape, device="meta") for shape in ((64, 2560), (2560,)))
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        yield f"norm_backward {kind}, sums of all programs", add_rows(sums, weight.to(dtype))


@torch.library.custom_op("refllm::norm_backward", mutates_args=())
def _norm_backward(
    operator: str,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with on_device(operator, x):
        steps, *found = _plan(operator, dy, dsum, x, residual, weight, bias, eps, needed, target_of(x.device))
        for step in steps:
            step.run()
    return found[0], found[1], found[2]


@_norm_backward.register_fake
def _(
    operator: str,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_bias = needed[2] and bias is not None
    return (
        x.new_empty(x.shape if needed[0] else 0),
        weight.new_empty(weight.shape if needed[1] else 0),
        weight.new_empty(weight.shape if of_bias else 0, dtype=x.dtype if bias is None else bias.dtype),
    )


only_once("norm_backward")


def _of_norm(
    operator: str,
    needed: Sequence[bool],
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    row: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> Gradients:
    """The gradients for row (the x, or the sum, that was normed), weight and bias; None for those that none needs."""
    found = _norm_backward(operator, dy, dsum, row, None, weight, bias, eps, list(needed))
    return tuple(if_needed(asked, each) for asked, each in zip(needed, found, strict=True))


def _of_sum(operator: str, needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    """The same after a residual sum, of which one of two results may have been used alone."""
    dy, dsum = incoming
    return (dsum, None, None) if dy is None else _of_norm(operator, needed, dy, dsum, *kept)


def _rms_norm_gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    (dy,), (x, weight, eps) = incoming, kept
    assert dy is not None
    return _of_norm("rms_norm_backward", (*needed[:2], False), dy, None, x, weight, None, eps)


def _layer_norm_gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    (dy,), (x, weight, bias, eps) = incoming, kept
    assert dy is not None
    return (*_of_norm("layer_norm_backward", needed[:3], dy, None, x, weight, bias, eps), None)


def _add_rms_norm_gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    total, weight, eps = kept
    asked = needed[0] or needed[1], needed[2], False
    dtotal, dweight, _ = _of_sum("add_rms_norm_backward", asked, incoming, total, weight, None, eps)
    return dtotal, dtotal, dweight, None


def _add_layer_norm_gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    asked = needed[0] or needed[1], needed[2], needed[3]
    dtotal, dweight, dbias = _of_sum("add_layer_norm_backward", asked, incoming, *kept)
    return dtotal, dtotal, dweight, dbias, None


# After a sum its result is kept, and neither of its terms: it is one tensor less to keep and to read.
differentiable("rms_norm", lambda inputs, _: inputs, _rms_norm_gradients)
differentiable("layer_norm", lambda inputs, _: inputs, _layer_norm_gradients)
differentiable("add_rms_norm", lambda inputs, output: (output[1], *inputs[2:]), _add_rms_norm_gradients)
differentiable("add_layer_norm", lambda inputs, output: (output[1], *inputs[2:]), _add_layer_norm_gradients)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dweight of `rms_norm`: [..., E] and [E], contiguous, in the dtypes of x and weight.

    As `refllm.ops.rms_norm_backward`. dy has the shape and dtype of x, and any strides. Raises InputError for arguments
    that do not fit together.
    """
    operator = "rms_norm_backward"
    arguments.check(operator, x, weight)
    arguments.incoming(operator, x, dy=dy)
    return _results(operator, None, *_norm_backward(operator, dy, None, x, None, weight, None, eps, _ALL))


def add_rms_norm_backward(
    dy: torch.Tensor, dsum: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dresidual and dweight of `add_rms_norm`; the first two are one tensor. dsum: of the sum that it returned.

    As `refllm.ops.add_rms_norm_backward`. dy and dsum have the shape and dtype of x, and any strides. Raises InputError
    for arguments that do not fit together.
    """
    operator = "add_rms_norm_backward"
    arguments.check(operator, x, residual, weight)
    arguments.incoming(operator, x, dy=dy, dsum=dsum)
    return _results(operator, None, *_norm_backward(operator, dy, dsum, x, residual, weight, None, eps, _ALL))


def layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx, dweight and dbias of `layer_norm`, contiguous, in the dtypes of x, weight and bias; dbias None without bias.

    As `refllm.ops.layer_norm_backward`. dy has the shape and dtype of x, and any strides. Raises InputError for
    arguments that do not fit together.
    """
    operator = "layer_norm_backward"
    arguments.check(operator, x, weight, bias)
    arguments.incoming(operator, x, dy=dy)
    return _results(operator, bias, *_norm_backward(operator, dy, None, x, None, weight, bias, eps, _ALL))


def add_layer_norm_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx, dresidual, dweight and dbias of `add_layer_norm`; the first two are one tensor, dbias is None without bias.

    As `refllm.ops.add_layer_norm_backward`. dsum: of the sum that it returned. dy and dsum have the shape and dtype of
    x, and any strides. Raises InputError for arguments that do not fit together.
    """
    operator = "add_layer_norm_backward"
    arguments.check(operator, x, residual, weight, bias)
    arguments.incoming(operator, x, dy=dy, dsum=dsum)
    return _results(operator, bias, *_norm_backward(operator, dy, dsum, x, residual, weight, bias, eps, _ALL))
