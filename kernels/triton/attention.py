"""Attention with grouped key/value heads, without ever storing the scores.

    o = softmax(scale q k^T + mask) v         query head h reads key/value head h // (H / K)
    lse = log of the softmax's denominator    float32

Tiles: a program takes BLOCK_M queries of one head and walks over the keys they may see, BLOCK_N at a time. Of each row
it keeps the largest score so far (m), the sum of the weights relative to it (total) and their product with v (low and
high); when a tile brings a larger score, these fade by the difference. Weights are powers of two, e^x = 2^(x log2 e)
with log2 e folded into the scale, because 2^x is what the hardware has. A head dimension that is no power of two is
held in two parts, low and high, as in 80 = 64 + 16: padding it to 128 would be 60 % more work.
Masks: first the tiles that every query of the program sees in full, without any mask; then those on the diagonal and
at the end. With a key mask all tiles are of the second kind.
NaN: a product multiplies what a row may not see by 0, and NaN survives that. A program whose result is not finite
therefore computes it again with care (`store_carefully`); where all is finite nothing but one test is spent on it.
Traffic: q and o once, k and v once per BLOCK_M queries (mostly from L2). 4 B H S T D flops, half of it if causal.
Source: Dao 2023, "FlashAttention-2", algorithm 1; Milakov and Gimelshein 2018, "Online normalizer calculation".
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, stands_for_others
from refllm.kernels.layout import CHUNK, chunk_length, dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.tuning.tunables import Tunable

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
SLICE = tl.constexpr(16)
"""Dims at a time where registers are short: the fewest that a product takes."""


class Queries(NamedTuple):
    """The queries of a program: where their rows begin, which of them exist, and both parts of their dims."""

    ptr: Any
    offsets: Any
    inside: Any
    low: Any
    high: Any


class Keys(NamedTuple):
    """Keys and values of one head and the key mask of its batch row (None: no mask), with the strides between keys."""

    k_ptr: Any
    k_stride: Any
    v_ptr: Any
    v_stride: Any
    mask_ptr: Any
    mask_stride: Any


class Head(NamedTuple):
    """What is known when a kernel is compiled: the head dimension D and the two parts (LOW, HIGH) it is held in.

    SLICED: scores are summed over slices of D, because products of float32 need a register per number.
    CHAINED: the products of both parts of D may go through one accumulator.
    NEGATE: the scale is negative. `scale` itself is then its absolute value.
    """

    D: Any
    LOW: Any
    HIGH: Any
    SLICED: Any
    CHAINED: Any
    NEGATE: Any


@triton.jit
def load_rows(ptr, offsets, inside, first, D, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """Dims first .. first + WIDTH of the rows at these offsets. 0 for dims from D on and for rows not `inside`; ALL
    says that all of them are, and `first` is known when compiling."""
    dims = first + tl.arange(0, WIDTH)
    tile = ptr + offsets[:, None] + dims[None, :]
    if ALL:
        if first + WIDTH <= D:
            return tl.load(tile)
        return tl.load(tile, mask=(dims < D)[None, :], other=0.0)
    return tl.load(tile, mask=inside[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offsets, inside, first, D, x, WIDTH: tl.constexpr):
    """Dims first .. first + WIDTH of the rows at these offsets, rounded to the dtype they are stored in."""
    dims = first + tl.arange(0, WIDTH)
    tile = ptr + offsets[:, None] + dims[None, :]
    tl.store(tile, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (dims < D)[None, :])


@triton.jit
def load_queries(ptr, offsets, inside, head):
    """The queries at these offsets. Where scores are summed over slices, those load them."""
    low, high = None, None
    if not head.SLICED:
        low = load_rows(ptr, offsets, inside, 0, head.D, head.LOW, False)
        if head.HIGH:
            high = load_rows(ptr, offsets, inside, head.LOW, head.D, head.HIGH, False)
    return Queries(ptr, offsets, inside, low, high)


@triton.jit
def add_apart(acc, a, b):
    """acc + a b, where the product is summed by itself. Of a sum Triton makes one product that starts from acc; the
    difference from the negative product is the same number, and stays as it is written."""
    return acc - tl.dot(-a, b, input_precision="ieee")


@triton.jit
def _scores(q, keys, n, inside, head, ALL: tl.constexpr):
    """q k^T for the keys n, [queries, keys]."""
    offsets = n.to(tl.int64) * keys.k_stride
    if head.SLICED:
        s = tl.zeros([q.offsets.shape[0], n.shape[0]], tl.float32)
        for dim in range(0, head.D, SLICE):
            q_part = load_rows(q.ptr, q.offsets, q.inside, dim, head.D, SLICE, False)
            k_part = load_rows(keys.k_ptr, offsets, inside, dim, head.D, SLICE, False)
            s = add_apart(s, q_part, tl.trans(k_part))
    else:
        k = load_rows(keys.k_ptr, offsets, inside, 0, head.D, head.LOW, ALL)
        s = tl.dot(q.low, tl.trans(k))
        if head.HIGH:
            k = load_rows(keys.k_ptr, offsets, inside, head.LOW, head.D, head.HIGH, ALL)
            s = tl.dot(q.high, tl.trans(k), s) if head.CHAINED else add_apart(s, q.high, tl.trans(k))
    return -s if head.NEGATE else s


@triton.jit
def _visible_scores(q, keys, n, stop, limit, head):
    """Scores of the keys n, -inf for keys that a query may not see: those from its limit on, those masked out."""
    s = _scores(q, keys, n, n < stop, head, False)
    visible = n[None, :] < limit[:, None]
    if keys.mask_ptr is not None:
        attend = tl.load(keys.mask_ptr + n.to(tl.int64) * keys.mask_stride, mask=n < stop, other=0)
        visible = visible & (attend != 0)[None, :]
    return tl.where(visible, s, float("-inf"))


@triton.jit
def finite_or_zero(m):
    """What to subtract from the scores of a row: the largest, or 0 where all are -inf, because -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _add_product(p, v, acc, head):
    """acc + p v, with p rounded to the dtype of v. In float32 one long chain of additions would round more than the
    definition does, so tiles are summed by themselves; tensor cores add to what they are given for free."""
    return add_apart(acc, p, v) if head.SLICED else tl.dot(p.to(v.dtype), v, acc)


@triton.jit
def walk(m, total, low, high, q, keys, start, stop, limit, scale, head, BLOCK_N: tl.constexpr, ALL: tl.constexpr):
    """m, total, low and high after the keys start .. stop. ALL: all queries see all of them, and they fill tiles.

    m is in units of log2, so that 2^(scale s - m) is a weight.
    """
    # A softmax needs the largest score of its row before the first weight, and the row is never there as a whole. So
    # the sums are kept relative to the largest score so far, and scaled down when a larger one comes. Scores in log2:
    #
    #   tile     scores    m    fade           weights       total                low = sum of weight v
    #            (none)   -inf                               0                    0
    #   first    1  3      3    2^(-inf-3)=0   2^-2  1       0 fade + 1.25        0 fade + 2^-2 v0 + 1 v1
    #   second   5  2      5    2^(3-5)=1/4    1  2^-3       1.25 / 4 + 1.125     (that) / 4 + 1 v2 + 2^-3 v3
    #
    # In the end low / total is the softmax times v: the common factor 2^-m has cancelled. lse = m ln 2 + ln total.
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        s = _scores(q, keys, n, n < stop, head, True) if ALL else _visible_scores(q, keys, n, stop, limit, head)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        shift = finite_or_zero(m_new)
        p = tl.exp2(tl.fma(s, scale, -shift[:, None]))  # fma: a rounded product is off by 1 % where scores are 1e5
        fade = tl.exp2(m - shift)
        m, total = m_new, total * fade + tl.sum(p, 1)
        offsets = n.to(tl.int64) * keys.v_stride
        v = load_rows(keys.v_ptr, offsets, n < stop, 0, head.D, head.LOW, ALL)
        low = _add_product(p, v, low * fade[:, None], head)
        if head.HIGH:
            v = load_rows(keys.v_ptr, offsets, n < stop, head.LOW, head.D, head.HIGH, ALL)
            high = _add_product(p, v, high * fade[:, None], head)
    return m, total, low, high


@triton.jit
def any_not_finite(x):
    """Whether a tile holds a NaN or an infinity. (Two reductions, one per axis, do not compile for sm_100.)"""
    return tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32)) != 0


@triton.jit
def careful_product(p, v, acc):
    """acc + p v, where a weight of exactly 0 silences whatever v holds, and other weights pass NaN and infinities on.

    Those are taken out of v and added to the rows that see them afterwards: NaN as both infinities, inf - inf.
    """
    v32 = v.to(tl.float32)
    finite = tl.abs(v32) < float("inf")
    seen = (p.to(tl.float32) != 0).to(v.dtype)
    up = tl.dot(seen, (~finite & ~(v32 < 0)).to(v.dtype), input_precision="ieee")
    down = tl.dot(seen, (~finite & ~(v32 > 0)).to(v.dtype), input_precision="ieee")
    acc = tl.dot(p, tl.where(finite, v32, 0.0).to(v.dtype), acc, input_precision="ieee")
    return acc + tl.where(up > 0, float("inf"), 0.0) - tl.where(down > 0, float("inf"), 0.0)


@triton.jit
def store_carefully(
    ptr, offsets, inside, factor, m, q, keys, start, stop, limit, scale, head, BLOCK_N: tl.constexpr
):  # fmt: skip
    """p v times factor, computed once more from start: m is final now, and so every weight is known.

    Rare, and so it must not be fast but small: a slice of D at a time, with fewer registers than the walk before it.
    """
    for dim in range(0, head.D, SLICE):
        acc = tl.zeros([m.shape[0], SLICE], tl.float32)
        for first in tl.range(start, stop, BLOCK_N, num_stages=1):
            n = first + tl.arange(0, BLOCK_N)
            s = _visible_scores(q, keys, n, stop, limit, head)
            p = tl.exp2(tl.fma(s, scale, -finite_or_zero(m)[:, None]))
            v = load_rows(keys.v_ptr, n.to(tl.int64) * keys.v_stride, n < stop, dim, head.D, SLICE, False)
            acc = careful_product(p.to(v.dtype), v, acc)
        store_rows(ptr, offsets, inside, dim, head.D, acc * factor[:, None], SLICE)


@triton.jit
def natural_log(x):
    """ln x for x >= 0, to a unit in the last place. tl.log2 is off by up to two (CUDA C++ Programming Guide, table of
    intrinsic functions), which is more than all other errors of an lse together.

    x = 2^e f with f around 1, and ln f = 2 artanh z for z = (f - 1) / (f + 1), whose series ends below 2^-27 at z^9.
    """
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2): f lies between that and sqrt(2)
    f = (bits - (e << 23)).to(tl.float32, bitcast=True)
    z = tl.div_rn(f - 1.0, f + 1.0)
    zz = z * z
    series = zz * (1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9))))
    log_f = tl.fma(2.0 * z, series, 2.0 * z)
    return tl.where(x > 0, tl.fma(e.to(tl.float32), LN_2, log_f), tl.log2(x))  # 0 and NaN: -inf and NaN


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_row,
    H, group, S, T, tiles, scale, unit, unit_rest,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SLICED: tl.constexpr, CHAINED: tl.constexpr,
    NEGATE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head, over the keys that they may see."""
    heads = tl.num_programs(0) // tiles
    first = (tiles - 1 - tl.program_id(0) // heads) * BLOCK_M  # late queries see the most keys: they start first
    b = (tl.program_id(0) % heads // H).to(tl.int64)  # int64: index * stride passes 2^31 in large tensors
    h = (tl.program_id(0) % heads % H).to(tl.int64)
    head: tl.constexpr = Head(D, LOW, HIGH, SLICED, CHAINED, NEGATE)
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < S
    q = load_queries(q_ptr + b * q_batch + h * q_head, rows.to(tl.int64) * q_row, inside, head)
    mask = None if mask_ptr is None else mask_ptr + b * mask_batch
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h // group * v_head
    keys = Keys(k_ptr, k_row, v_ptr, v_row, mask, mask_row)

    # Row `rows` sees the keys below `limit`; all rows those below `full`, no row those from `stop` on.
    limit = tl.full([BLOCK_M], T, tl.int32)
    full, stop = T, T
    if CAUSAL:
        limit = tl.minimum(T, T - S + rows + 1)
        full = tl.maximum(0, tl.minimum(T, T - S + first + 1))
        stop = tl.maximum(0, tl.minimum(T, T - S + first + BLOCK_M))
    full = full // BLOCK_N * BLOCK_N if mask_ptr is None else 0

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, LOW], tl.float32)
    high = tl.zeros([BLOCK_M, HIGH], tl.float32) if HIGH else None
    m, total, low, high = walk(m, total, low, high, q, keys, 0, full, limit, scale, head, BLOCK_N, True)
    m, total, low, high = walk(m, total, low, high, q, keys, full, stop, limit, scale, head, BLOCK_N, False)

    shift = finite_or_zero(m)
    lse = tl.fma(shift, unit, tl.fma(shift, unit_rest, natural_log(total)))
    tl.store(lse_ptr + (b * H + h) * S + rows, lse, mask=inside)
    o_ptr += b * S * H * D + h * D
    offsets = rows.to(tl.int64) * (H * D)
    factor = tl.div_rn(1.0, tl.where(total == 0, 1.0, total))  # a row that sees nothing is 0
    odd = any_not_finite(low)
    if HIGH:
        odd = odd | any_not_finite(high)
    if odd:
        store_carefully(o_ptr, offsets, inside, factor, m, q, keys, 0, stop, limit, scale, head, BLOCK_N)
    else:
        store_rows(o_ptr, offsets, inside, 0, D, low * factor[:, None], LOW)
        if HIGH:
            store_rows(o_ptr, offsets, inside, LOW, D, high * factor[:, None], HIGH)


def parts(D: int) -> tuple[int, int]:
    """The head dimension as a sum of powers of two from 16 on, which is what products take: 80 -> (64, 16),
    112 -> (128, 0), 8 -> (16, 0). The second is 0 where one part is not larger than two."""
    low = max(16, 1 << (D.bit_length() - 1))
    high = max(16, triton.next_power_of_2(D - low)) if low < D else 0
    return (2 * low, 0) if high == low else (low, high)


def fold(scale: float) -> dict[str, float]:
    """The scale as a kernel takes it: `scale`, the float32 next to |scale| log2 e, and `unit` + `unit_rest`, what leads
    from scores times that back to natural ones. (In two numbers: rounding one would shift every lse the same way.)"""
    # A scale of 0 becomes the smallest normal number, because 0 * -inf is NaN: scores below 2^100 give weights of 1.
    folded = torch.tensor(abs(scale) * LOG2_E, dtype=torch.float32).clamp(min=2.0**-126).item()
    unit = torch.tensor(abs(scale) / folded, dtype=torch.float32).item()
    return {"scale": folded, "unit": unit, "unit_rest": abs(scale) / folded - unit}


def constants_of(D: int, dtype: torch.dtype, scale: float, target: Target) -> dict[str, Any]:
    """What a `Head` is made of. Two products of a loop chained through one accumulator are wrong on sm_103, whose
    configurations are those of sm_100 (triton-lang/triton#10821)."""
    low, high = parts(D)
    sliced, chained = dtype == torch.float32, target.name != "sm_100"
    return {"D": D, "LOW": low, "HIGH": high, "SLICED": sliced, "CHAINED": chained, "NEGATE": scale < 0}


class Tile(NamedTuple):
    """Queries and keys per step, warps per program, stages of the pipeline that loads keys and values."""

    M: int
    N: int
    warps: int
    stages: int


WIDTHS = (64, 128, 160, 192, 256)
"""Classes of head dimensions, by the width of both parts together: what registers and shared memory hold per row."""


# 128 keys per step take all 255 registers for D = 128 on sm_90, and 4,337 instructions instead of 3,148.
TUNABLE = Tunable(
    "attention", "attention",
    {**{f"16-bit, D <= {D}": {"S": 4096, "H": 32, "K": 8, "D": D} for D in WIDTHS},
     "float32": {"S": 1024, "H": 8, "K": 2, "D": 128}},
    {"M": (32, 64, 128), "N": (16, 32, 64), "warps": (4, 8), "stages": (2, 3)},
    {"float32": {"M": (32,), "N": (16, 32), "stages": (2,)}},
    outer=("M",), inner=("N",), sums=(("M", "D"), ("M", "N")),
)  # fmt: skip


def shape_class(D: int, dtype: torch.dtype) -> str:
    """Which line of the table of tiles serves: by what belongs to one row alone, so that its bits do not depend on the
    batch. float32 has no tensor cores to feed, and a thread must hold its part of the sums."""
    if dtype == torch.float32:
        return "float32"
    return f"16-bit, D <= {next(width for width in WIDTHS if sum(parts(D)) <= width)}"


def choose_tile(D: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of tuning/tiles.json: as large as registers allow without spills, because what is read per query halves
    with twice the queries. D = 128 on an H100: 128 queries, 64 keys per step, 8 warps, 3 stages."""
    return Tile(**tuning.tile("attention", shape_class(D, dtype), target))


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool,
    key_mask: torch.Tensor | None, target: Target = DEFAULT, tile: Tile | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launch, o and lse. o lies as [B, S, H, D] in memory: merging the heads afterwards moves nothing."""
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    o = q.new_empty((B, S, H, D)).transpose(1, 2)
    scale = D**-0.5 if scale is None else scale
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    q, k, v = dense(q), dense(k), dense(v)
    tile = tile or choose_tile(D, q.dtype, target)
    tiles = triton.cdiv(S, tile.M)
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    given = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask, "o_ptr": o, "lse_ptr": lse,
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "v_batch": v.stride(0), "v_head": v.stride(1), "v_row": v.stride(2),
        "mask_batch": 0 if mask is None else mask.stride(0), "mask_row": 0 if mask is None else mask.stride(1),
        "H": H, "group": H // K, "S": S, "T": T, "tiles": tiles, **fold(scale),
    }  # fmt: skip
    constants = {**constants_of(D, q.dtype, scale, target), "CAUSAL": causal, "BLOCK_M": tile.M, "BLOCK_N": tile.N}
    narrow = q.dtype != torch.float32
    launch = Launch(
        attention_kernel, (tiles * B * H,), given, constants, num_warps=tile.warps, num_stages=tile.stages,
        tensor_cores=narrow, async_copies=narrow and chunk_length(D, k, v) == CHUNK,
    )  # fmt: skip
    return launch, o, lse


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships: each tile, with and without a split head dimension, causal or not, masked."""
    half, full = torch.bfloat16, torch.float32
    for D in (16, 40, 64, 80, 128, 160, 192, 256):
        yield _example(half, D, target)
    yield _example(half, 160, target, causal=False)
    yield _example(half, 128, target, masked=True)
    yield _example(half, 128, target, scale=-0.1)
    if stands_for_others(target):
        for dtype, D in ((torch.float16, 96), (full, 64), (full, 160), (full, 256)):
            yield _example(dtype, D, target)
        yield _example(full, 128, target, masked=True)


def _example(
    dtype: torch.dtype, D: int, target: Target, causal: bool = True, masked: bool = False, scale: float = 0.1
) -> tuple[str, Launch]:
    """A launch on tensors that lie as projections leave them, [B, S, H, D] in memory, and a name for it."""
    q, kv = (torch.empty(2, 1000, heads, D, dtype=dtype, device="meta").transpose(1, 2) for heads in (8, 2))
    key_mask = torch.empty(2, 1000, dtype=torch.bool, device="meta") if masked else None
    words = (str(dtype).removeprefix("torch."), f"D={D}", "causal" if causal else "all keys")
    name = " ".join(["attention", *words, *["key mask"] * masked, *["scale < 0"] * (scale < 0)])
    return name, plan(q, kv, kv, scale, causal, key_mask, target)[0]


@torch.library.custom_op("refllm::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("attention", q):
        launch, o, lse = plan(q, k, v, scale, causal, key_mask, target_of(q.device))
        launch.run()
    return o, lse


@_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    return q.new_empty((B, S, H, D)).transpose(1, 2), q.new_empty((B, H, S), dtype=torch.float32)


def attention(
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o_BHSD = softmax(scale q k^T + mask) v; query head h reads key/value head h // (H / K).

    As `refllm.ops.attention`. scale: D^-1/2 if None. causal: query s sees keys 0 .. T-S+s (aligned at the end).
    key_mask: bool [B, T], True = attend. A query with no key to attend to yields 0 and lse = -inf. What a masked key
    or value holds, NaN included, never reaches a valid row. With return_lse also lse_BHS, float32. head_dim 8 to 256;
    any strides, copied only where the last axis is not dense. o lies as [B, S, H, D] in memory.
    Raises InputError for arguments that do not fit together.
    """
    arguments.attention("attention", q_BHSD, k_BKTD, v_BKTD, key_mask)
    scale = q_BHSD.shape[-1] ** -0.5 if scale is None else float(scale)
    o_BHSD, lse_BHS = _attention(q_BHSD, k_BKTD, v_BKTD, scale, causal, key_mask)
    return (o_BHSD, lse_BHS) if return_lse else o_BHSD
