"""The backward pass of the cross-entropy of the logits x W^T, which are never stored.

    D_nv = (p_nv - onehot_nv) r_n        p the softmax of a row, as in cross_entropy_backward.py; 0 in ignored rows
    dx = c D W        dW = c D^T x       r_n c the gradient of the loss of row n

r_n is 1 and c the gradient of the sum, or of the mean over the number of rows; for "none" c is the power of two next to
the row's own, r_n what is left, and in dW each x_n is multiplied with its c over the largest c, which is exact. So D is
of size 1 when it is rounded to the format of x for the tensor cores, and nothing of the many small p is lost in float16
(where D is taken 2^14 times as large).

The maximum and the sum of every row come from the forward pass's own kernel, computed again. Then the vocabulary is
walked over in chunks of `WORDS` words, each in three launches: D of the chunk [N, WORDS]; its rows of dW, a product
over all rows at once; and what it adds to dx, which is kept in float32 from chunk to chunk. Nothing is added up in the
format of x, every order is fixed, and dx of a row does not depend on the others.

Tiles: dW and dx are products with BLOCK_M x BLOCK_E sums per program; D has the tiles of linear_cross_entropy.py, of up
to 128 words.
Traffic: W and x three times, D (N V numbers, WORDS of a row at a time) written once and read twice, dx 8 N E bytes per
chunk. 8 N V E flops: beyond a few hundred rows the tensor cores decide the speed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.cross_entropy import LOG2E, SUM_TILE, merge
from refllm.kernels.triton.cross_entropy_backward import plan_mean, shares
from refllm.kernels.triton.linear_cross_entropy import _logits as tile_of_logits
from refllm.kernels.triton.linear_cross_entropy import plan as plan_forward
from refllm.kernels.tuning.tunables import STEPS, Tunable

WORDS = 4096
"""Words of a chunk, of whose D 2 N WORDS bytes exist at a time."""


class Tile(NamedTuple):
    """Sums of a program (rows or words x numbers), the length of a step of its product, and what it needs."""

    M: int
    E: int
    K: int
    warps: int
    stages: int


TUNABLE = Tunable(
    "linear_cross_entropy_backward", "linear_cross_entropy_backward",
    {"16-bit": {"S": 2048, "V": 48_000, "E": 2560}, "16-bit, ragged": {"S": 512, "V": 8000, "E": 1000},
     "float32": {"S": 512, "V": 48_000, "E": 2560}},
    {"M": (128,), "E": (128, 256), "K": (32, 64), "warps": (8,), "stages": STEPS},
    {"16-bit, ragged": {"M": (64, 128), "E": (64, 128), "K": (32,), "stages": (3,)},
     "float32": {"M": (64,), "E": (64, 128), "K": (16,), "warps": (4, 8), "stages": (2,)}},
    ("M", "E"), sums=(("M", "E"),), about=-1,
)  # fmt: skip


def shape_class(E: int, dtype: torch.dtype) -> str:
    """Which line of the table of tiles serves: as for linear_cross_entropy.py, but the number of words has no say."""
    return "float32" if dtype == torch.float32 else "16-bit, ragged" if E % 16 else "16-bit"


@triton.jit
def power_of_two(x):
    """The one next to |x|, from below: its exponent; 1 where x is 0, too small for that, infinite or NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where((bits > 0) & (bits < 0x7F800000), bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit(do_not_specialize=["dloss_stride", "label_stride", "N"])
def largest_kernel(dloss_ptr, labels_ptr, out_ptr, dloss_stride, label_stride, ignore_index, N, BLOCK: tl.constexpr):
    """The largest of the powers of two of the counted rows. One program."""
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        labels = tl.load(labels_ptr + rows * label_stride, mask=rows < N, other=ignore_index)
        dloss = tl.load(dloss_ptr + rows * dloss_stride, mask=(rows < N) & (labels != ignore_index), other=0.0)
        finite = tl.abs(dloss) < float("inf")
        largest = tl.maximum(largest, tl.where(finite, tl.abs(dloss), 0.0))
    tl.store(out_ptr, power_of_two(tl.max(largest, 0)))


@triton.jit(do_not_specialize=["dloss_stride", "label_stride"])
def shares_kernel(
    dloss_ptr, max_ptr, sum_ptr, own_ptr, labels_ptr, shares_ptr, dloss_stride, label_stride, ignore_index,
    V, chunks, EACH: tl.constexpr, LARGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: what D is made of in one row: M, LARGER r / T, D at the label, c; shares_ptr [N, 4]. EACH: "none"."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    shares_ptr += row * 4
    if label == ignore_index:
        for i in tl.static_range(4):
            tl.store(shares_ptr + i, 0.0)
    else:
        columns = tl.arange(0, BLOCK)
        m = tl.load(max_ptr + row * chunks + columns, mask=columns < chunks, other=-float("inf"))
        s = tl.load(sum_ptr + row * chunks + columns, mask=columns < chunks, other=0.0)
        own = tl.load(own_ptr + row, mask=(label >= 0) & (label < V), other=float("nan"))
        m_all, s_all = merge(m, s)
        top, total, others = shares(own, m_all, s_all)
        r, c = 1.0, 1.0
        if EACH:
            dloss = tl.load(dloss_ptr + row * dloss_stride)
            c = power_of_two(dloss)
            r = tl.div_rn(dloss, c)
        factor = tl.div_rn(r * LARGER, total)
        tl.store(shares_ptr, top)
        tl.store(shares_ptr + 1, factor)
        tl.store(shares_ptr + 2, -(others * factor))
        tl.store(shares_ptr + 3, c)


@triton.jit(do_not_specialize=["label_stride", "first", "N"])  # one binary for any number of rows
def chunk_kernel(
    x_ptr, w_ptr, labels_ptr, shares_ptr, d_ptr, x_stride, w_stride, label_stride, ignore_index, first, N, V, E,
    WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program: a tile of D of the chunk that begins with word `first`; d_ptr [N, WORDS]."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (tl.program_id(0) // row_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    v = first.to(tl.int64) + column
    label = tl.load(labels_ptr + n * label_stride, mask=n < N, other=ignore_index).to(tl.int64)
    counted = (n < N) & (label != ignore_index)
    columns = tl.arange(0, BLOCK_E)
    x_ptrs = x_ptr + n[:, None] * x_stride + columns[None, :]
    w_ptrs = w_ptr + v[None, :] * w_stride + columns[:, None]
    logits = tile_of_logits(x_ptrs, w_ptrs, counted, v < V, E, BLOCK_N, BLOCK_V, BLOCK_E)
    top = tl.load(shares_ptr + n * 4, mask=counted, other=0.0)
    factor = tl.load(shares_ptr + n * 4 + 1, mask=counted, other=0.0)
    own = tl.load(shares_ptr + n * 4 + 2, mask=counted, other=0.0)
    d = tl.exp2((logits - top[:, None]) * LOG2E) * factor[:, None]
    d = tl.where(v[None, :] == label[:, None], own[:, None], d)
    d = tl.where(counted[:, None] & (v < V)[None, :], d, 0.0)
    tl.store(d_ptr + n[:, None] * WORDS + column[None, :], d.to(d_ptr.dtype.element_ty), mask=(n < N)[:, None])


@triton.jit(do_not_specialize=["label_stride", "first", "N"])
def dweight_kernel(
    d_ptr, x_ptr, labels_ptr, shares_ptr, common_ptr, dweight_ptr, x_stride, label_stride, ignore_index, first, N, V, E,
    EACH: tl.constexpr, WORDS: tl.constexpr, LARGER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: a tile of D^T x, words x numbers, over all rows; what ignored rows hold is not read."""
    e_tiles = tl.cdiv(E, BLOCK_E)
    word = (tl.program_id(0) // e_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = (tl.program_id(0) % e_tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    common = tl.load(common_ptr)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K).to(tl.int64)
        label = tl.load(labels_ptr + n * label_stride, mask=n < N, other=ignore_index)
        counted = (n < N) & (label != ignore_index)
        d = tl.load(d_ptr + n[:, None] * WORDS + word[None, :], mask=counted[:, None], other=0.0)
        x = tl.load(x_ptr + n[:, None] * x_stride + e[None, :], mask=counted[:, None] & (e < E)[None, :], other=0.0)
        if EACH:
            c = tl.load(shares_ptr + n * 4 + 3, mask=counted, other=0.0)
            x = (x.to(tl.float32) * tl.div_rn(c, common)[:, None]).to(x.dtype)
        total = tl.dot(tl.trans(d), x, total, input_precision="ieee")
    v = first.to(tl.int64) + word
    total *= common * (1.0 / LARGER)
    mask = (v < V)[:, None] & (e < E)[None, :]
    tl.store(dweight_ptr + v[:, None] * E + e[None, :], total.to(dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["label_stride", "first", "N"])
def dx_kernel(
    d_ptr, w_ptr, labels_ptr, shares_ptr, common_ptr, sums_ptr, dx_ptr, w_stride, label_stride, ignore_index, first,
    N, V, E,
    FIRST: tl.constexpr, LAST: tl.constexpr, EACH: tl.constexpr, WORDS: tl.constexpr, LARGER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: a tile of D W, rows x numbers, added to those of the chunks before; after the last chunk, dx."""
    e_tiles = tl.cdiv(E, BLOCK_E)
    n = (tl.program_id(0) // e_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = (tl.program_id(0) % e_tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, tl.minimum(V - first, WORDS), BLOCK_K):
        word = start + tl.arange(0, BLOCK_K)
        v = first.to(tl.int64) + word
        d = tl.load(d_ptr + n[:, None] * WORDS + word[None, :], mask=(n < N)[:, None], other=0.0)
        w = tl.load(w_ptr + v[:, None] * w_stride + e[None, :], mask=(v < V)[:, None] & (e < E)[None, :], other=0.0)
        total = tl.dot(d, w, total, input_precision="ieee")
    # Addresses after the loop: before it they would take registers beside the sums.
    mask = (n < N)[:, None] & (e < E)[None, :]
    places = n[:, None] * E + e[None, :]
    if not FIRST:
        total += tl.load(sums_ptr + places, mask=mask, other=0.0)
    if LAST:
        label = tl.load(labels_ptr + n * label_stride, mask=n < N, other=ignore_index)
        if EACH:
            total *= (tl.load(shares_ptr + n * 4 + 3, mask=n < N, other=0.0) * (1.0 / LARGER))[:, None]
        else:
            total *= tl.load(common_ptr) * (1.0 / LARGER)
        total = tl.where((label != ignore_index)[:, None], total, 0.0)  # 0 times infinity in W is not 0
        tl.store(dx_ptr + places, total.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sums_ptr + places, total, mask=mask)


def plan(
    dloss: torch.Tensor,
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    ignore_index: int,
    reduction: str,
    target: Target = DEFAULT,
    tile: Tile | None = None,
    needed: Sequence[bool] = (True, True),
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches in their order, dx and dweight, contiguous. needed: which of them; the other is an empty tensor."""
    (N, E), V = x_NE.shape, weight_VE.shape[0]
    results = [
        torch.empty(x.shape if asked else 0, dtype=x.dtype, device=x.device)
        for x, asked in zip((x_NE, weight_VE), needed, strict=True)
    ]
    x_NE, weight_VE = dense(x_NE), dense(weight_VE)
    tile = tile or Tile(**tuning.tile("linear_cross_entropy_backward", shape_class(E, x_NE.dtype), target))
    (forward, *_), _ = plan_forward(x_NE, weight_VE, labels_N, ignore_index, "none", target)
    scale, common = _plan_common(dloss, labels_N, ignore_index, reduction)
    whole = max(forward.constants["BLOCK_V"], tile.M)
    words = min(WORDS, triton.cdiv(V, whole) * whole)
    shares_N4 = x_NE.new_empty((N, 4), dtype=torch.float32)
    sums = x_NE.new_empty((N, E) if needed[0] and words < V else 0, dtype=torch.float32)
    d = x_NE.new_empty((N, words))
    labelled = {"labels_ptr": labels_N, "label_stride": labels_N.stride(0), "ignore_index": ignore_index, "V": V}
    larger = 2.0**14 if x_NE.dtype == torch.float16 else 1.0
    partials = forward.arguments["max_ptr"]
    merged = Launch(
        shares_kernel, (N,),
        labelled | {
            "dloss_ptr": dloss, "dloss_stride": dloss.stride(0) if dloss.ndim else 0, "shares_ptr": shares_N4,
            "chunks": partials.shape[1],
            **{name: forward.arguments[name] for name in ("max_ptr", "sum_ptr", "own_ptr")},
        },
        {"EACH": reduction == "none", "LARGER": larger, "BLOCK": triton.next_power_of_2(max(1, partials.shape[1]))},
        num_warps=1,
    )  # fmt: skip
    narrow = x_NE.element_size() < 4
    needs = {"tensor_cores": narrow, "async_copies": E % 16 == 0}
    how = {"num_warps": tile.warps, "num_stages": tile.stages, **needs}
    each = {"EACH": reduction == "none", "LARGER": larger}
    product = {"WORDS": words, **each, "BLOCK_M": tile.M, "BLOCK_E": tile.E, "BLOCK_K": tile.K}
    x_given = {"x_ptr": x_NE, "x_stride": x_NE.stride(0)}
    w_given = {"w_ptr": weight_VE, "w_stride": weight_VE.stride(0)}
    tiles = {name: forward.constants[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_E")}
    tiles["BLOCK_V"] = min(
        128, tiles["BLOCK_V"]
    )  # D and what it is made of take more registers than two numbers per row
    e_tiles = triton.cdiv(E, tile.E)
    steps = [*scale, forward, merged]
    for first in range(0, V, words):
        of_chunk = labelled | {"d_ptr": d, "first": first, "N": N, "E": E}
        given = of_chunk | x_given | w_given | {"shares_ptr": shares_N4}
        grid = triton.cdiv(N, tiles["BLOCK_N"]) * triton.cdiv(min(words, V - first), tiles["BLOCK_V"])
        steps.append(
            Launch(
                chunk_kernel, (grid,), given, {"WORDS": words} | tiles, num_warps=forward.num_warps,
                num_stages=forward.num_stages, **needs,
            )
        )  # fmt: skip
        of_chunk |= {"shares_ptr": shares_N4, "common_ptr": common}
        if needed[1]:
            grid = triton.cdiv(min(words, V - first), tile.M) * e_tiles
            steps.append(
                Launch(dweight_kernel, (grid,), of_chunk | x_given | {"dweight_ptr": results[1]}, product, **how)
            )
        if needed[0]:
            given = of_chunk | w_given | {"sums_ptr": sums, "dx_ptr": results[0]}
            ends = {"FIRST": first == 0, "LAST": first + words >= V}
            steps.append(Launch(dx_kernel, (triton.cdiv(N, tile.M) * e_tiles,), given, product | ends, **how))
    return steps, results[0], results[1]


def _plan_common(
    dloss: torch.Tensor, labels_N: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[list[Launch], torch.Tensor]:
    """The launch, if one is needed, that makes c, and c [1]."""
    if reduction != "none":
        return plan_mean(dloss, labels_N, ignore_index, reduction)
    common = dloss.new_empty(1)
    given = {
        "dloss_ptr": dloss, "labels_ptr": labels_N, "out_ptr": common, "dloss_stride": dloss.stride(0),
        "label_stride": labels_N.stride(0), "ignore_index": ignore_index, "N": len(dloss),
    }  # fmt: skip
    return [Launch(largest_kernel, (1,), given, {"BLOCK": SUM_TILE}, num_warps=8)], common


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: Llama's head, a ragged one, and a vocabulary of one chunk."""
    labels = torch.empty(256, dtype=torch.int64, device="meta")
    for dtype, (V, E) in shipped(((128_256, 2048), (9000, 100)), ((128_256, 2048),), target):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((256, E), (V, E)))
        kind = f"linear_cross_entropy_backward {str(dtype).removeprefix('torch.')} V={V} E={E}"
        dloss = torch.empty(256 if E == 2048 else (), device="meta")
        _, _, merged, chunk, dweight, first, *more = plan(
            dloss, x, weight, labels, -100, "none" if E == 2048 else "mean", target
        )[0]
        yield f"{kind}, D", chunk
        yield f"{kind}, dW", dweight
        for which, step in (("first", first), ("next", more[2]), ("last", more[-1])):
            yield f"{kind}, dx, {which} chunk", step
        yield f"{kind}, shares", merged
    dloss = torch.empty(256, device="meta")
    yield "linear_cross_entropy_backward none", _plan_common(dloss, labels, -100, "none")[0][0]


@torch.library.custom_op("refllm::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    operator = "linear_cross_entropy_backward"
    if labels.device.type == "cpu":  # here and not in the public function: torch.compile cannot trace a look at values
        arguments.labels_exist(operator, labels, weight.shape[0], ignore_index)
    with on_device(operator, x):
        steps, dx, dweight = plan(dloss, x, weight, labels, ignore_index, reduction, target_of(x.device), needed=needed)
        for step in steps:
            step.run()
    return dx, dweight


@_linear_cross_entropy_backward.register_fake
def _(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needed[0] else 0), weight.new_empty(weight.shape if needed[1] else 0)


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    found = _linear_cross_entropy_backward(incoming[0], *kept, list(needed[:2]))
    return *(if_needed(asked, x) for asked, x in zip(needed[:2], found, strict=True)), None, None, None


only_once("linear_cross_entropy_backward")
differentiable("linear_cross_entropy", lambda inputs, _: inputs, _gradients)


def linear_cross_entropy_backward(
    dloss: torch.Tensor,
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [N, E] and dweight [V, E] of `linear_cross_entropy`; as `refllm.ops.linear_cross_entropy_backward`.

    dloss: float32, a number, or [N] for reduction "none". Rows whose label is ignore_index have a dx of 0 and no part
    in dweight, and nothing of them is read. x and weight are copied if their last axis is not dense. Raises InputError
    for arguments that do not fit together, and for a label outside 0..V-1 if labels are on the CPU; on a GPU such a row
    makes gradients NaN.
    """
    operator = "linear_cross_entropy_backward"
    arguments.check(operator, x_NE, weight_VE, labels_N, reduction=reduction)
    arguments.loss_gradient(operator, dloss, labels_N, reduction)
    return _linear_cross_entropy_backward(dloss, x_NE, weight_VE, labels_N, ignore_index, reduction, [True, True])
