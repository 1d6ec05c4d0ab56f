"""Cross-entropy of rows of logits with one label each.

    m = max_{j != label} x_j        s = sum_{j != label} e^(x_j - m)        d = x_label - m
    loss = log(1 + s e^-d)                                  = -log softmax(x)[label]

The label's own logit stays out of the sum. With it the sum of a confident row would be 1 + tiny, and float32 keeps of a
tiny number beside 1 nothing below 6e-8; without it a loss of 1e-9 has seven correct digits. For d < 0 the same thing
is written as -d + log(s + e^d), so that nothing overflows; both terms are positive, so nothing cancels either.

Tiles: a program takes one row, `LANES` x `PER_LANE` logits at a time. A lane has a maximum and a sum of its own, so the
loop needs no exchange between threads and 1 + 1 / PER_LANE exponentials per logit. Lanes are merged once, at the end.
A lane is the 16 bytes that a thread loads at once. Where rows do not start at multiples of 16 bytes, as those of AFM's
128,005 words, no such load exists; a lane then is every LANES-th logit, so that threads side by side load logits side
by side.
Traffic: every logit of a counted row is read once, of an ignored row none; 4 bytes are written per row. About 8 flops
per logit: the loads decide the speed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import CHUNK, chunk_length
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.tuning.tunables import Tunable

LOG2E = tl.constexpr(1.4426950408889634)  # exp2(x log2 e) = exp(x); exp2 is one instruction on a GPU

SUM_TILE = 4096
"""Losses per step of the one program that adds them up."""


class Tile(NamedTuple):
    """Logits per step of a long row; warps per program, of a short row fewer."""

    logits: int
    warps: int


TUNABLE = Tunable(
    "cross_entropy",
    "cross_entropy",
    {"rows of 16 bytes": {"S": 2048, "V": 48_000}, "odd V": {"S": 2048, "V": 128_005}},
    {"logits": (4096, 8192), "warps": (4, 8, 16)},
    streamed=("LANES", "PER_LANE"),
)


def shape_class(V: int, dtype: torch.dtype) -> str:
    """Which line of the table of tiles serves: whether V numbers are a multiple of 16 bytes. The stride has no say,
    because that of a lone row is arbitrary and its bits must not depend on it."""
    return "rows of 16 bytes" if V % (16 // dtype.itemsize) == 0 else "odd V"


def choose_tile(V: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of tuning/tiles.json."""
    return Tile(**tuning.tile("cross_entropy", shape_class(V, dtype), target))


@triton.jit
def _log1p(t):
    """log(1 + t) for t >= 0, infinity and NaN, to float32 precision: t = 1e-9, which 1 + t would lose, gives 1e-9.

    Below 1: 2 atanh(z) with z = t / (2 + t) <= 1/3; what its power series lacks from z^17 on is below 9^-8 / 17 =
    1.4e-9 of the result.
    """
    z = tl.div_rn(t, 2.0 + t)
    series = 1 / 15
    for i in tl.static_range(7):
        series = series * z * z + 1 / (13 - 2 * i)
    return tl.where(t < 1, 2.0 * z * series, tl.log(1.0 + t))


@triton.jit
def row_loss(label_logit, m, s):
    """The loss from the label's logit, the maximum of the others (-inf if there are none) and their sum s."""
    d = label_logit - m
    # What the rounding of d has lost (Knuth 1969, two-sum): without it the loss would be rounded twice.
    back = d - label_logit
    lost = tl.where(tl.abs(d) < float("inf"), (label_logit - (d - back)) - (m + back), 0.0)
    far = tl.exp2(-tl.abs(d) * LOG2E)
    # For d < 0 the other logits hold the maximum, so s >= 1 and s - 1 is exact up to the rounding of s itself.
    loss = tl.where(d < 0, (_log1p((s - 1.0) + far) - lost) - d, _log1p(s * far))
    # The definition subtracts the row's maximum from infinity: NaN. And -inf at the label is a loss of +inf.
    return tl.where(label_logit < float("inf"), loss, float("nan"))


@triton.jit
def finite_shift(m):
    """What to subtract before exp2 for a maximum m: 0 while nothing but -inf was seen, as -inf - -inf would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def merge(m, s):
    """Maximum and sum over all lanes. A NaN need not survive the maximum: the lane's sum holds it too."""
    total = tl.max(m, 0)
    return total, tl.sum(s * tl.exp2((m - finite_shift(total)) * LOG2E), 0)


# Strides are exempt from specialisation, and constants say what matters about them, because a kernel that is compiled
# anew for strides that 16 divides adds in another order: the bits of a row must not depend on its batch.
@triton.jit(do_not_specialize=["logits_stride", "column_stride", "label_stride"])
def cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, logits_stride, column_stride, label_stride, ignore_index, V,
    DENSE: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """A program: the loss of one row; an ignored row reads no logits. AXIS: that of the logits of a lane."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
    else:
        logits_ptr += tl.multiple_of(row * logits_stride, CHUNK)
        exists = (label >= 0) & (label < V)
        own = tl.load(logits_ptr + label * column_stride, mask=exists, other=float("nan")).to(tl.float32)
        own_column = tl.where(exists, label, -1).to(tl.int32)  # int64 would take twice the instructions per column
        if AXIS == 1:
            columns = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
        else:
            columns = tl.arange(0, PER_LANE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        m = tl.full([LANES], -float("inf"), tl.float32)
        s = tl.zeros([LANES], tl.float32)
        for start in range(0, V, LANES * PER_LANE):
            j = start + columns
            places = j if DENSE else j.to(tl.int64) * column_stride
            x = tl.load(logits_ptr + places, mask=j < V, other=-float("inf")).to(tl.float32)
            x = tl.where(j == own_column, -float("inf"), x)
            m_new = tl.maximum(m, tl.max(x, AXIS))
            shift = finite_shift(m_new)
            s = s * tl.exp2((m - shift) * LOG2E) + tl.sum(tl.exp2((x - tl.expand_dims(shift, AXIS)) * LOG2E), AXIS)
            m = m_new
        m_all, s_all = merge(m, s)
        tl.store(loss_ptr + row, row_loss(own, m_all, s_all))


@triton.jit(do_not_specialize=["label_stride", "N"])
def reduce_kernel(
    loss_ptr, labels_ptr, out_ptr, label_stride, ignore_index, N, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of all losses (ignored rows hold 0), or their mean over the counted rows. One program, a fixed order."""
    losses = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        losses += tl.load(loss_ptr + rows, mask=rows < N, other=0.0)
        labels = tl.load(labels_ptr + rows * label_stride, mask=rows < N, other=ignore_index)
        counted += ((rows < N) & (labels != ignore_index)).to(tl.int32)
    total = tl.sum(losses, 0)
    if MEAN:
        total = tl.div_rn(total, tl.sum(counted, 0).to(tl.float32))  # no rows: 0 / 0 = NaN, as in the definition
    tl.store(out_ptr, total)


def plan(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str, target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[list[Launch], torch.Tensor]:  # fmt: skip
    """The launches in their order, and the loss: [N] for "none", else []; float32."""
    N, V = logits_NV.shape
    loss_N = logits_NV.new_empty(N, dtype=torch.float32)
    per_lane = 16 // logits_NV.element_size()
    tile = tile or choose_tile(V, logits_NV.dtype, target)
    lanes = min(tile.logits // per_lane, max(target.warp_size, triton.next_power_of_2(triton.cdiv(V, per_lane))))
    given = {
        "logits_ptr": logits_NV, "labels_ptr": labels_N, "loss_ptr": loss_N, "logits_stride": logits_NV.stride(0),
        "column_stride": logits_NV.stride(1), "label_stride": labels_N.stride(0), "ignore_index": ignore_index, "V": V,
    }  # fmt: skip
    dense = logits_NV.stride(1) == 1
    chunk = chunk_length(V, logits_NV) if dense else 1
    axis = int(V % per_lane == 0)  # as `shape_class`
    constants = {"DENSE": dense, "CHUNK": chunk, "LANES": lanes, "PER_LANE": per_lane, "AXIS": axis}
    warps = min(tile.warps, max(1, lanes // target.warp_size))
    wide = chunk == CHUNK
    narrow = "" if wide else f"{CHUNK} does not divide the {V:,} words of a row, so that rows start anywhere"
    first = Launch(cross_entropy_kernel, (N,), given, constants, num_warps=warps, wide_loads=wide, narrow=narrow)
    last, loss = plan_reduction(loss_N, labels_N, ignore_index, reduction)
    return [first, *last], loss


def plan_reduction(
    loss_N: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[list[Launch], torch.Tensor]:
    """The launch, if one is needed, that makes the reduced loss of the losses of the rows; and that loss."""
    if reduction == "none":
        return [], loss_N
    loss = loss_N.new_empty(())
    given = {
        "loss_ptr": loss_N, "labels_ptr": labels_N, "out_ptr": loss, "label_stride": labels_N.stride(0),
        "ignore_index": ignore_index, "N": len(loss_N),
    }  # fmt: skip
    return [Launch(reduce_kernel, (1,), given, {"MEAN": reduction == "mean", "BLOCK": SUM_TILE}, num_warps=8)], loss


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: tiny, real and ragged vocabularies."""
    for dtype, V in shipped((32, 1000, 32_000, 128_256, 151_937), (128_256,), target):
        logits = torch.empty((64, V), dtype=dtype, device="meta")
        labels = torch.empty(64, dtype=torch.int64, device="meta")
        steps, _ = plan(logits, labels, -100, "none", target)
        yield f"cross_entropy {str(dtype).removeprefix('torch.')} V={V}", steps[0]
    losses, labels = torch.empty(64, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    for reduction in ("mean", "sum"):
        yield f"cross_entropy {reduction}", plan_reduction(losses, labels, -100, reduction)[0][0]


@torch.library.custom_op("refllm::cross_entropy", mutates_args=())
def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    if labels.device.type == "cpu":  # here and not in the public function: torch.compile cannot trace a look at values
        arguments.labels_exist("cross_entropy", labels, logits.shape[1], ignore_index)
    with on_device("cross_entropy", logits):
        steps, loss = plan(logits, labels, ignore_index, reduction, target_of(logits.device))
        for step in steps:
            step.run()
    return loss


@_cross_entropy.register_fake
def _(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    return logits.new_empty(labels.shape if reduction == "none" else (), dtype=torch.float32)


def cross_entropy(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """-log softmax(logits)[label] per row: logits [N, V] with any strides, labels [N] int32 or int64. As
    `refllm.ops.cross_entropy`, in float32.

    reduction: "mean" over the rows whose label is not ignore_index (NaN if there are none), "sum", or "none" ([N], 0
    where ignored). Of an ignored row no logit is read.
    Raises InputError for arguments that do not fit together, and for a label outside 0..V-1 if labels are on the CPU.
    On a GPU, where a look at them would mean waiting, the loss of such a row is NaN; nothing is read out of bounds.
    """
    arguments.check("cross_entropy", logits_NV, labels_N, reduction=reduction)
    return _cross_entropy(logits_NV, labels_N, ignore_index, reduction)
