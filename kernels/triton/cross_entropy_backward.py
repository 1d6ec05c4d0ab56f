"""The backward pass of cross-entropy.

    m, s: the maximum and the sum of e^(x_j - m) over all logits of a row but the label's, as in cross_entropy.py
    M = max(m, x_label)        T = s e^(m - M) + e^(x_label - M)
    dx_j = dloss e^(x_j - M) / T                        j != label
    dx_label = - dloss s e^(m - M) / T                  = dloss (p_label - 1)

p - 1 of the label is the sum of the others with a minus sign, and never a difference: a confident row, whose p rounds
to 1, keeps all digits of its gradient. dloss is the row's own ("none"), or that of the sum, or of the mean over their
number; an ignored row has 0 everywhere, whatever it holds.

Tiles: as in cross_entropy.py, a program takes one row, `LANES` x `PER_LANE` logits at a time: once for m and s, and
once more for the gradient.
Traffic: every logit of a counted row is read twice, the second time mostly from the cache, and one number is written.
About 14 flops per logit: the loads decide the speed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import CHUNK, chunk_length
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, only_once
from refllm.kernels.triton.cross_entropy import LOG2E, SUM_TILE, Tile, finite_shift, merge, shape_class
from refllm.kernels.tuning.tunables import Tunable

TUNABLE = Tunable(
    "cross_entropy_backward",
    "cross_entropy_backward",
    {"rows of 16 bytes": {"S": 2048, "V": 48_000}, "odd V": {"S": 2048, "V": 128_005}},
    {"logits": (4096, 8192), "warps": (4, 8, 16)},
    streamed=("LANES", "PER_LANE"),
)


@triton.jit
def shares(own, m, s):
    """M, T and the part of T that is not the label's, from the label's logit and the others' maximum and sum."""
    top = tl.maximum(m, own)
    others = s * tl.exp2((m - top) * LOG2E)
    return top, others + tl.exp2((own - top) * LOG2E), others


@triton.jit(do_not_specialize=["label_stride", "N"])
def mean_kernel(dloss_ptr, labels_ptr, out_ptr, label_stride, ignore_index, N, BLOCK: tl.constexpr):
    """dloss over the number of counted rows. One program."""
    counted = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        labels = tl.load(labels_ptr + rows * label_stride, mask=rows < N, other=ignore_index)
        counted += ((rows < N) & (labels != ignore_index)).to(tl.int32)
    tl.store(out_ptr, tl.div_rn(tl.load(dloss_ptr), tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)))


# Strides are exempt from specialization so that the bits of a row do not depend on the batch: see cross_entropy.py.
@triton.jit(do_not_specialize=["dloss_stride", "logits_stride", "column_stride", "label_stride"])
def cross_entropy_backward_kernel(
    dloss_ptr, logits_ptr, labels_ptr, dlogits_ptr, dloss_stride, logits_stride, column_stride, label_stride,
    ignore_index, V,
    DENSE: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of one row. AXIS: that of the logits of a lane."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31 in large tensors
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    dlogits_ptr += tl.multiple_of(row * V, CHUNK)
    if AXIS == 1:
        columns = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    else:
        columns = tl.arange(0, PER_LANE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if label == ignore_index:
        zeros = tl.zeros(columns.shape, dlogits_ptr.dtype.element_ty)
        for start in range(0, V, LANES * PER_LANE):
            tl.store(dlogits_ptr + start + columns, zeros, mask=start + columns < V)
    else:
        dloss = tl.load(dloss_ptr + row * dloss_stride)
        logits_ptr += tl.multiple_of(row * logits_stride, CHUNK)
        exists = (label >= 0) & (label < V)
        own = tl.load(logits_ptr + label * column_stride, mask=exists, other=float("nan")).to(tl.float32)
        own_column = tl.where(exists, label, -1).to(tl.int32)  # int64 would take twice the instructions per column
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
        top, total, others = shares(own, m_all, s_all)
        factor = tl.div_rn(dloss, total)
        for start in range(0, V, LANES * PER_LANE):
            j = start + columns
            places = j if DENSE else j.to(tl.int64) * column_stride
            x = tl.load(logits_ptr + places, mask=j < V, other=-float("inf")).to(tl.float32)
            dx = tl.where(j == own_column, -(others * factor), tl.exp2((x - top) * LOG2E) * factor)
            tl.store(dlogits_ptr + j, dx.to(dlogits_ptr.dtype.element_ty), mask=j < V)


def plan_mean(
    dloss: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[list[Launch], torch.Tensor]:
    """The launch, if one is needed, that makes the gradient of each row's loss, and that gradient: [N] or [1]."""
    if reduction != "mean":
        return [], dloss.reshape(-1)
    of_row = dloss.new_empty(1)
    given = {
        "dloss_ptr": dloss, "labels_ptr": labels_N, "out_ptr": of_row, "label_stride": labels_N.stride(0),
        "ignore_index": ignore_index, "N": len(labels_N),
    }  # fmt: skip
    return [Launch(mean_kernel, (1,), given, {"BLOCK": SUM_TILE}, num_warps=8)], of_row


def plan(
    dloss: torch.Tensor, logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str,
    target: Target = DEFAULT, tile: Tile | None = None,
) -> tuple[list[Launch], torch.Tensor]:  # fmt: skip
    """The launches in their order, and dlogits, contiguous."""
    N, V = logits_NV.shape
    dlogits = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    first, of_row = plan_mean(dloss, labels_N, ignore_index, reduction)
    per_lane = 16 // logits_NV.element_size()
    tile = tile or Tile(**tuning.tile("cross_entropy_backward", shape_class(V, logits_NV.dtype), target))
    lanes = min(tile.logits // per_lane, max(target.warp_size, triton.next_power_of_2(triton.cdiv(V, per_lane))))
    given = {
        "dloss_ptr": of_row, "logits_ptr": logits_NV, "labels_ptr": labels_N, "dlogits_ptr": dlogits,
        "dloss_stride": of_row.stride(0) if reduction == "none" else 0, "logits_stride": logits_NV.stride(0),
        "column_stride": logits_NV.stride(1), "label_stride": labels_N.stride(0), "ignore_index": ignore_index, "V": V,
    }  # fmt: skip
    dense = logits_NV.stride(1) == 1
    chunk = chunk_length(V, logits_NV) if dense else 1
    axis = int(V % per_lane == 0)  # as `shape_class`
    wide = chunk == CHUNK
    constants = {
        "DENSE": dense, "CHUNK": chunk if wide else 1, "LANES": lanes, "PER_LANE": per_lane, "AXIS": axis,
    }  # fmt: skip
    warps = min(tile.warps, max(1, lanes // target.warp_size))
    narrow = "" if wide else f"{CHUNK} does not divide the {V:,} words of a row, so that rows start anywhere"
    last = Launch(
        cross_entropy_backward_kernel, (N,), given, constants, num_warps=warps, wide_loads=wide, narrow=narrow
    )
    return [*first, last], dlogits


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: small, real and ragged vocabularies."""
    labels, dloss = torch.empty(64, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    for dtype, V in shipped((1000, 128_256, 151_937), (128_256,), target):
        logits = torch.empty((64, V), dtype=dtype, device="meta")
        steps, _ = plan(dloss, logits, labels, -100, "sum", target)
        yield f"cross_entropy_backward {str(dtype).removeprefix('torch.')} V={V}", steps[0]
    yield "cross_entropy_backward mean", plan_mean(dloss, labels, -100, "mean")[0][0]


@torch.library.custom_op("refllm::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    if labels.device.type == "cpu":  # here and not in the public function: torch.compile cannot trace a look at values
        arguments.labels_exist("cross_entropy_backward", labels, logits.shape[1], ignore_index)
    with on_device("cross_entropy_backward", logits):
        steps, dlogits = plan(dloss, logits, labels, ignore_index, reduction, target_of(logits.device))
        for step in steps:
            step.run()
    return dlogits


@_cross_entropy_backward.register_fake
def _(
    dloss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _gradients(_: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    return _cross_entropy_backward(incoming[0], *kept), None, None, None


only_once("cross_entropy_backward")
differentiable("cross_entropy", lambda inputs, _: inputs, _gradients)


def cross_entropy_backward(
    dloss: torch.Tensor,
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """dlogits = (softmax(logits) - onehot(label)) dloss per row, contiguous; as `refllm.ops.cross_entropy_backward`.

    dloss: float32, a number, or [N] for reduction "none". Rows whose label is ignore_index have 0 everywhere, and
    nothing of them is read. Raises InputError for arguments that do not fit together, and for a label outside 0..V-1 if
    labels are on the CPU; on a GPU the gradient of such a row is NaN.
    """
    operator = "cross_entropy_backward"
    arguments.check(operator, logits_NV, labels_N, reduction=reduction)
    arguments.loss_gradient(operator, dloss, labels_N, reduction)
    return _cross_entropy_backward(dloss, logits_NV, labels_N, ignore_index, reduction)
