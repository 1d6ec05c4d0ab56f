"""Cross-entropy of the logits x W^T, which are never stored.

    logits_nv = sum_e x_ne W_ve          m, s, loss per row as in `cross_entropy.py`

Tiles: a program takes BLOCK_N rows and one chunk of `CHUNK` consecutive words of the vocabulary. It makes the logits
of BLOCK_N rows and BLOCK_V words in registers, in float32, folds them into a maximum and a sum per row, and goes on to
the next words. A second kernel merges the chunks of a row, always in the same order. The length of a chunk is constant,
so what is computed for a row does not depend on how many rows there are.
Programs that run at the same time share a chunk and differ in their rows: W is read from memory once and x, which is
small, again for every chunk.
Traffic: N E + V E numbers from memory and 8 N V / CHUNK bytes of workspace, instead of N V logits written and read.
2 N V E flops: beyond a few hundred rows the tensor cores decide the speed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.cross_entropy import LOG2E, finite_shift, merge, plan_reduction, row_loss
from refllm.kernels.tuning.tunables import STEPS, Tunable

CHUNK = 1024
"""Words per program: 125 programs for Llama 3's vocabulary, about one per multiprocessor when rows are few."""


class Tile(NamedTuple):
    """Rows x words x numbers per step of the product, and what they need to be fast."""

    N: int
    V: int
    E: int
    warps: int
    stages: int


TUNABLE = Tunable(
    "linear_cross_entropy", "linear_cross_entropy",
    {"16-bit": {"S": 2048, "V": 48_000, "E": 2560}, "16-bit, odd V": {"S": 2048, "V": 128_005, "E": 2560},
     "16-bit, ragged": {"S": 512, "V": 8000, "E": 1000}, "float32": {"S": 512, "V": 48_000, "E": 2560}},
    {"N": (64, 128), "V": (64, 128, 256), "E": (32, 64), "warps": (4, 8), "stages": STEPS},
    {"float32": {"N": (32, 64), "V": (64, 128), "E": (16,), "stages": (2, 3)}}, ("N", "V"), sums=(("N", "V"),),
)  # fmt: skip


def shape_class(E: int, V: int, dtype: torch.dtype) -> str:
    """Which line of the table of tiles serves. float32: products are plain multiplications, because tensor cores would
    round the operands to TF32. ragged: rows that do not start at multiples of 16 numbers; every load takes registers of
    its own. odd V: 16 does not divide it, as AFM's 128,005, and what masks the last words takes registers."""
    if dtype == torch.float32:
        return "float32"
    if E % 16:
        return "16-bit, ragged"
    return "16-bit" if V % 16 == 0 else "16-bit, odd V"


def choose_tile(E: int, V: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of tuning/tiles.json: the largest that the accumulators leave room for, 128 registers per thread. On an
    H100: 128 rows x 256 words x 64 numbers."""
    return Tile(**tuning.tile("linear_cross_entropy", shape_class(E, V, dtype), target))


@triton.jit
def _logits(x_ptrs, w_ptrs, x_rows, w_rows, E, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr):
    """A tile of logits. x_ptrs [BLOCK_N, BLOCK_E] and w_ptrs [BLOCK_E, BLOCK_V]; x_rows, w_rows: which rows to read."""
    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    columns = tl.arange(0, BLOCK_E)
    for start in range(0, E, BLOCK_E):
        within = start + columns < E
        x = tl.load(x_ptrs + start, mask=x_rows[:, None] & within[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=within[:, None] & w_rows[None, :], other=0.0)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    return logits


@triton.jit(do_not_specialize=["label_stride", "N"])  # one binary for any number of rows
def partials_kernel(
    x_ptr, w_ptr, labels_ptr, max_ptr, sum_ptr, own_ptr, x_stride, w_stride, label_stride, ignore_index, N, V, E,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """max_ptr, sum_ptr [N, chunks]: of the logits of one chunk without the label's; own_ptr [N]: the label's."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    chunk = tl.program_id(0) // row_tiles
    n = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(labels_ptr + n * label_stride, mask=n < N, other=ignore_index).to(tl.int64)
    counted = (n < N) & (label != ignore_index)

    first = chunk.to(tl.int64) * CHUNK
    last = tl.minimum(first + CHUNK, V)
    last = tl.where(tl.max(counted.to(tl.int32), 0) > 0, last, first)  # nothing but ignored rows: nothing to do
    columns = tl.arange(0, BLOCK_E)
    x_ptrs = x_ptr + n[:, None] * x_stride + columns[None, :]
    m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    own = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        w_ptrs = w_ptr + v[None, :] * w_stride + columns[:, None]
        logits = _logits(x_ptrs, w_ptrs, counted, v < V, E, BLOCK_N, BLOCK_V, BLOCK_E)
        is_own = v[None, :] == label[:, None]
        own += tl.sum(tl.where(is_own, logits, 0.0), 1)
        others = tl.where(is_own | (v >= V)[None, :], -float("inf"), logits)
        m_new = tl.maximum(m, tl.max(others, 1))
        shift = finite_shift(m_new)
        s = s * tl.exp2((m - shift) * LOG2E) + tl.sum(tl.exp2((others - shift[:, None]) * LOG2E), 1)
        m = m_new

    slot = n * tl.cdiv(V, CHUNK) + chunk
    tl.store(max_ptr + slot, m, mask=counted)
    tl.store(sum_ptr + slot, s, mask=counted)
    tl.store(own_ptr + n, own, mask=counted & (label >= first) & (label < last))


@triton.jit(do_not_specialize=["label_stride"])
def merge_kernel(
    max_ptr, sum_ptr, own_ptr, labels_ptr, loss_ptr, label_stride, ignore_index, V, chunks, BLOCK: tl.constexpr
):
    """A program: the loss of one row, from the partial results of all its chunks."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
    else:
        columns = tl.arange(0, BLOCK)
        m = tl.load(max_ptr + row * chunks + columns, mask=columns < chunks, other=-float("inf"))
        s = tl.load(sum_ptr + row * chunks + columns, mask=columns < chunks, other=0.0)
        own = tl.load(own_ptr + row, mask=(label >= 0) & (label < V), other=float("nan"))
        m_all, s_all = merge(m, s)
        tl.store(loss_ptr + row, row_loss(own, m_all, s_all))


def plan(
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    ignore_index: int,
    reduction: str,
    target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches in their order, and the loss: [N] for "none", else []; float32."""
    (N, E), V = x_NE.shape, weight_VE.shape[0]
    x_NE, weight_VE = dense(x_NE), dense(weight_VE)
    chunks = triton.cdiv(V, CHUNK)
    maxima, sums = (x_NE.new_empty((N, chunks), dtype=torch.float32) for _ in range(2))
    own_N, loss_N = (x_NE.new_empty(N, dtype=torch.float32) for _ in range(2))
    narrow = x_NE.element_size() < 4
    tile = tile or choose_tile(E, V, x_NE.dtype, target)
    labelled = {"labels_ptr": labels_N, "label_stride": labels_N.stride(0), "ignore_index": ignore_index, "V": V}
    workspace = {"max_ptr": maxima, "sum_ptr": sums, "own_ptr": own_N}
    product = {
        "x_ptr": x_NE, "w_ptr": weight_VE, "x_stride": x_NE.stride(0), "w_stride": weight_VE.stride(0), "N": N, "E": E,
    }  # fmt: skip
    partials = Launch(
        partials_kernel,
        (triton.cdiv(N, tile.N) * chunks,),
        product | labelled | workspace,
        {"CHUNK": CHUNK, "BLOCK_N": tile.N, "BLOCK_V": tile.V, "BLOCK_E": tile.E},
        num_warps=tile.warps,
        num_stages=tile.stages,
        tensor_cores=narrow,
        async_copies=E % 16 == 0,
    )
    merged = Launch(
        merge_kernel,
        (N,),
        labelled | workspace | {"loss_ptr": loss_N, "chunks": chunks},
        {"BLOCK": triton.next_power_of_2(max(1, chunks))},
        num_warps=1,
    )
    last, loss = plan_reduction(loss_N, labels_N, ignore_index, reduction)
    return [partials, merged, *last], loss


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: Helium's, Llama's, AFM's and a ragged head."""
    for dtype, (V, E) in shipped(
        ((48_000, 2560), (128_256, 2048), (128_005, 2560), (1000, 100)), ((128_256, 2048), (1000, 100)), target
    ):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((256, E), (V, E)))
        labels = torch.empty(256, dtype=torch.int64, device="meta")
        partials, merged, _ = plan(x, weight, labels, -100, "mean", target)[0]
        kind = f"{str(dtype).removeprefix('torch.')} V={V} E={E}"
        yield f"linear_cross_entropy {kind}", partials
        yield f"linear_cross_entropy {kind}, merged", merged


@torch.library.custom_op("refllm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    if labels.device.type == "cpu":  # here and not in the public function: torch.compile cannot trace a look at values
        arguments.labels_exist("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    with on_device("linear_cross_entropy", x):
        steps, loss = plan(x, weight, labels, ignore_index, reduction, target_of(x.device))
        for step in steps:
            step.run()
    return loss


@_linear_cross_entropy.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    return x.new_empty(labels.shape if reduction == "none" else (), dtype=torch.float32)


def linear_cross_entropy(
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """`cross_entropy` of the logits x W^T: x [N, E], weight [V, E], labels [N] int32 or int64. As
    `refllm.ops.linear_cross_entropy`, in float32; the logits are never rounded to the dtype of x.

    reduction: "mean" over the rows whose label is not ignore_index (NaN if there are none), "sum", or "none" ([N], 0
    where ignored). Of an ignored row nothing is read. x and weight are copied if their last axis is not dense.
    Raises InputError for arguments that do not fit together, and for a label outside 0..V-1 if labels are on the CPU.
    On a GPU, where a look at them would mean waiting, the loss of such a row is NaN; nothing is read out of bounds.
    """
    arguments.check("linear_cross_entropy", x_NE, weight_VE, labels_N, reduction=reduction)
    return _linear_cross_entropy(x_NE, weight_VE, labels_N, ignore_index, reduction)
