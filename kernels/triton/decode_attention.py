"""Attention of the last few tokens over a cache, where each sequence has its own length.

    o = softmax(scale q k^T) v      query s of S sees the slots 0 .. length - S + s

Tiles: keys are split into chunks of CHUNK slots, one program each, because a few queries alone would keep a few
multiprocessors busy. A program takes all g S query rows of one key/value head as one tile (g = H / K; padded to 16,
the least a product takes) and leaves its sums (see attention.py) in a float32 workspace. A second kernel adds up
the chunks of each row, always in the same order.
Batch: a chunk has the same length whatever else there is, and a row adds up as many chunks as it has. So its bits
depend neither on the other rows nor on the size of the cache.
Traffic: every used slot of k and v once; the workspace adds 8 g S / CHUNK of that for 16-bit caches. 4 H S D flops per
slot and g S per byte of it: the memory decides the speed.
Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; the rest as in attention.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, stands_for_others
from refllm.kernels.layout import CHUNK as ALIGNED
from refllm.kernels.layout import chunk_length, dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.attention import (
    Head,
    Keys,
    any_not_finite,
    constants_of,
    finite_or_zero,
    fold,
    load_queries,
    load_rows,
    natural_log,
    store_carefully,
    store_rows,
    walk,
)
from refllm.kernels.tuning.tunables import STEPS, Tunable

CHUNK = 256
"""Slots per program: 8 heads and 4096 slots fill the 132 multiprocessors of an H100 with a single sequence, and the
workspace is 2 % of the cache (g = 4, one token)."""
ROWS = 64
"""Query rows per program at most (float32: 16); g S beyond that reads the cache more than once."""
COMBINED = 16
"""Chunks that are added up at a time."""


@triton.jit
def read_length(lengths_ptr, b, stride, N):
    """(length, whether it is possible): a length outside 0..N counts as 0, so that nothing out of bounds is read."""
    length = tl.load(lengths_ptr + b * stride).to(tl.int64)
    possible = (length >= 0) & (length <= N)
    return tl.where(possible, length, 0).to(tl.int32), possible


@triton.jit(do_not_specialize=["N", "splits"])  # a row's bits must not depend on the size of the cache
def split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, m_ptr, total_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, lengths_stride,
    K, group, S, N, splits, tiles, scale,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SLICED: tl.constexpr, CHAINED: tl.constexpr,
    NEGATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: the query rows of one key/value head, over one chunk of its keys."""
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits % tiles
    b = (tl.program_id(0) // splits // tiles // K).to(tl.int64)
    kv = (tl.program_id(0) // splits // tiles % K).to(tl.int64)
    length, _ = read_length(lengths_ptr, b, lengths_stride, N)
    start = split * CHUNK
    if start >= length:
        return

    head: tl.constexpr = Head(D, LOW, HIGH, SLICED, CHAINED, NEGATE)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # row i: token i % S of query head i // S of the group
    inside = rows < group * S
    q_offsets = (rows // S).to(tl.int64) * q_head + (rows % S).to(tl.int64) * q_row
    q = load_queries(q_ptr + b * q_batch + kv * group * q_head, q_offsets, inside, head)
    keys = Keys(k_ptr + b * k_batch + kv * k_head, k_row, v_ptr + b * v_batch + kv * v_head, v_row, None, 0)
    limit = length - S + rows % S + 1
    stop = tl.minimum(start + CHUNK, length)
    full = start + tl.maximum(0, tl.minimum(stop, length - S + 1) - start) // BLOCK_N * BLOCK_N

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, LOW], tl.float32)
    high = tl.zeros([BLOCK_M, HIGH], tl.float32) if HIGH else None
    m, total, low, high = walk(m, total, low, high, q, keys, start, full, limit, scale, head, BLOCK_N, True)
    m, total, low, high = walk(m, total, low, high, q, keys, full, stop, limit, scale, head, BLOCK_N, False)

    row_0 = ((b * K + kv) * splits + split) * group * S
    tl.store(m_ptr + row_0 + rows, m, mask=inside)
    tl.store(total_ptr + row_0 + rows, total, mask=inside)
    acc_ptr += row_0 * D
    offsets = rows.to(tl.int64) * D
    odd = any_not_finite(low)
    if HIGH:
        odd = odd | any_not_finite(high)
    if odd:
        one = tl.full([BLOCK_M], 1.0, tl.float32)
        store_carefully(acc_ptr, offsets, inside, one, m, q, keys, start, stop, limit, scale, head, BLOCK_N)
    else:
        store_rows(acc_ptr, offsets, inside, 0, D, low, LOW)
        if HIGH:
            store_rows(acc_ptr, offsets, inside, LOW, D, high, HIGH)


@triton.jit(do_not_specialize=["N", "splits"])
def combine_kernel(
    acc_ptr, m_ptr, total_ptr, lengths_ptr, o_ptr, lse_ptr, lengths_stride, K, group, S, N, splits, unit, unit_rest,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: o = sum of 2^(m_i - m) acc_i over sum of 2^(m_i - m) total_i, for its chunks i. NaN: a wrong length.
    lse_ptr: None, or where the logarithms of the denominators go, for the backward pass."""
    b = (tl.program_id(0) // (K * group * S)).to(tl.int64)
    kv = (tl.program_id(0) // (group * S) % K).to(tl.int64)
    row = tl.program_id(0) % (group * S)
    length, possible = read_length(lengths_ptr, b, lengths_stride, N)
    chunks = tl.cdiv(length, CHUNK)
    row_0 = (b * K + kv) * splits * group * S + row
    m_ptr += row_0
    total_ptr += row_0
    acc_ptr += row_0 * D

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, chunks, BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        top = tl.maximum(top, tl.load(m_ptr + i * (group * S), mask=i < chunks, other=float("-inf")))
    shift = finite_or_zero(tl.max(top, 0))

    totals = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, chunks, BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        m = tl.load(m_ptr + i * (group * S), mask=i < chunks, other=float("-inf"))
        weight = tl.exp2(m - shift)
        totals += weight * tl.load(total_ptr + i * (group * S), mask=i < chunks, other=0.0)
        part = load_rows(acc_ptr, i * (group * S * D), i < chunks, 0, D, WIDTH, False)
        # A weight of 0 silences what a chunk holds, as it does for a key.
        acc += tl.sum(tl.where(weight[:, None] == 0, 0.0, weight[:, None] * part), 0)
    total = tl.sum(totals, 0)
    if lse_ptr is not None:
        lse = tl.fma(shift, unit, tl.fma(shift, unit_rest, natural_log(total)))
        tl.store(lse_ptr + (b * K + kv) * group * S + row, lse)
    o = acc * tl.div_rn(1.0, tl.where(total == 0, 1.0, total))
    o = tl.where(possible, o, float("nan"))
    dims = tl.arange(0, WIDTH)
    head = kv * group + row // S
    o_ptr += ((b * S + row % S) * K * group + head) * D
    tl.store(o_ptr + dims, o.to(o_ptr.dtype.element_ty), mask=dims < D)


class Tile(NamedTuple):
    """Query rows of a program, slots per step, warps, stages of the pipeline that loads keys and values."""

    M: int
    N: int
    warps: int
    stages: int


_CACHE = {"B": 4, "N": 8192, "H": 32, "K": 4, "D": 128}
TUNABLE = Tunable(
    "decode_attention", "decode_attention",
    {**{f"16-bit, rows <= {8 * S}": {**_CACHE, "S": S, "M": 8 * S} for S in (2, 4, 8)},
     "float32": {**_CACHE, "K": 8, "N": 4096, "S": 1, "M": 16}},
    {"N": (32, 64), "warps": (4, 8), "stages": STEPS},
    {"float32": {"N": (16, 32), "stages": (2,)}}, streamed=("N", "D"),
)  # fmt: skip


def shape_class(rows: int, dtype: torch.dtype) -> str:
    """Which line of the table of tiles serves `rows` = g S query rows: the next power of two that a product takes."""
    if dtype == torch.float32:
        return "float32"
    return f"16-bit, rows <= {min(ROWS, max(16, triton.next_power_of_2(rows)))}"


def choose_tile(rows: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of tuning/tiles.json: small, so that several programs per multiprocessor keep the memory busy. Up to 16
    rows on an H100: 16 rows, 32 slots per step, 4 warps, 3 stages."""
    return Tile(**tuning.tile("decode_attention", shape_class(rows, dtype), target))


def plan(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, scale: float | None,
    target: Target = DEFAULT, tile: Tile | None = None,
) -> tuple[tuple[Launch, Launch], torch.Tensor]:  # fmt: skip
    """Both launches in order, and o, which lies as [B, S, H, D] in memory."""
    (B, H, S, D), (K, N) = q.shape, k_cache.shape[1:3]
    o = q.new_empty((B, S, H, D)).transpose(1, 2)
    scale = D**-0.5 if scale is None else scale
    q, k_cache, v_cache = dense(q), dense(k_cache), dense(v_cache)
    rows, splits = H // K * S, triton.cdiv(N, CHUNK)
    acc = q.new_empty((B, K, splits, rows, D), dtype=torch.float32)
    m, total = (q.new_empty((B, K, splits, rows), dtype=torch.float32) for _ in range(2))
    tile = tile or choose_tile(rows, q.dtype, target)
    tiles = triton.cdiv(rows, tile.M)
    shared = {"lengths_ptr": lengths, "lengths_stride": lengths.stride(0), "K": K, "group": H // K, "S": S, "N": N}
    workspace = {"acc_ptr": acc, "m_ptr": m, "total_ptr": total, "splits": splits}
    given = {
        "q_ptr": q, "k_ptr": k_cache, "v_ptr": v_cache, **shared, **workspace, "tiles": tiles,
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k_cache.stride(0), "k_head": k_cache.stride(1), "k_row": k_cache.stride(2),
        "v_batch": v_cache.stride(0), "v_head": v_cache.stride(1), "v_row": v_cache.stride(2),
        "scale": fold(scale)["scale"],
    }  # fmt: skip
    constants = {
        **constants_of(D, q.dtype, scale, target), "CHUNK": CHUNK, "BLOCK_M": tile.M, "BLOCK_N": tile.N,
    }  # fmt: skip
    narrow = q.dtype != torch.float32
    # Left alone, ptxas spills a few registers to fit one more program per multiprocessor; under a limit it does not.
    options = {} if target.is_amd else {"maxnreg": 255}
    split = Launch(
        split_kernel, (B * K * tiles * splits,), given, constants, num_warps=tile.warps, num_stages=tile.stages,
        options=options,
        tensor_cores=narrow, async_copies=narrow and chunk_length(D, k_cache, v_cache) == ALIGNED,
    )  # fmt: skip
    width = triton.next_power_of_2(D)
    constants = {"D": D, "WIDTH": width, "CHUNK": CHUNK, "BLOCK": COMBINED}
    unit, unit_rest = (fold(scale)[name] for name in ("unit", "unit_rest"))
    given = {**shared, **workspace, "o_ptr": o, "lse_ptr": None, "unit": unit, "unit_rest": unit_rest}
    combine = Launch(combine_kernel, (B * H * S,), given, constants, num_warps=4)
    return (split, combine), o


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships: each head dimension and each number of query rows, for caches [B, N, K, D]."""
    half, full = torch.bfloat16, torch.float32
    one_token = [(half, D, 4, 1) for D in (16, 40, 64, 80, 128, 160, 192, 256)]
    few_tokens = [(half, 128, 4, 8), (half, 80, 8, 8), (half, 256, 8, 8)]
    others = [(torch.float16, 96, 4, 1), (full, 80, 4, 1), (full, 256, 4, 1), (full, 256, 8, 8)]
    others = others if stands_for_others(target) else []
    for dtype, D, group, S in (*one_token, *few_tokens, *others):
        q = torch.empty(2, S, 2 * group, D, dtype=dtype, device="meta").transpose(1, 2)
        cache = torch.empty(2, 4096, 2, D, dtype=dtype, device="meta").transpose(1, 2)
        lengths = torch.empty(2, dtype=torch.int64, device="meta")
        name = f"decode_attention {str(dtype).removeprefix('torch.')} D={D} {group * S} rows"
        split, combine = plan(q, cache, cache, lengths, 0.1, target)[0]
        yield f"{name}, split", split
        yield f"{name}, combine", combine


@torch.library.custom_op("refllm::decode_attention", mutates_args=())
def _decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    if lengths.device.type == "cpu":
        arguments.lengths_exist("decode_attention", lengths, k_cache.shape[2])
    with on_device("decode_attention", q):
        (split, combine), o = plan(q, k_cache, v_cache, lengths, scale, target_of(q.device))
        split.run()
        combine.run()
    return o


@_decode_attention.register_fake
def _(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    B, H, S, D = q.shape
    return q.new_empty((B, S, H, D)).transpose(1, 2)


def decode_attention(
    q_BHSD: torch.Tensor,
    k_cache_BKND: torch.Tensor,
    v_cache_BKND: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """o_BHSD: causal `attention` of the last S = 1..8 tokens over the first lengths_B[b] slots of a cache of N slots.

    As `refllm.ops.decode_attention`. Slots from lengths_B[b] on are never read; where a query has no slot to see the
    result is 0. Any strides, copied only where the last axis is not dense. o lies as [B, S, H, D] in memory.
    Raises InputError for arguments that do not fit together, and for lengths outside 0..N if they are on the CPU. On a
    GPU, where looking would mean to wait, such a sequence becomes NaN and nothing out of bounds is read.
    """
    arguments.decode_attention("decode_attention", q_BHSD, k_cache_BKND, v_cache_BKND, lengths_B)
    scale = q_BHSD.shape[-1] ** -0.5 if scale is None else float(scale)
    return _decode_attention(q_BHSD, k_cache_BKND, v_cache_BKND, lengths_B, scale)
