"""Rotary position embedding of q and k, in one launch.

    (a, b) -> (a cos - b sin, b cos + a sin)        for the R/2 pairs of each head, in float32; rounded once

The pair (a, b) is dims (2i, 2i + 1) if interleaved, else dims (i, i + R/2). Dims R..D-1 are copied, bit for bit.
The backward pass (rope_backward.py) is the same kernel with -sin: the transpose of a rotation is the rotation back.

Tiles: a program takes one token and some numbers (`Tile`) of its heads, of q and of k, and reads the cos and sin
of that token once for all of them. Interleaved pairs are loaded side by side and split in registers: a load of every
second number would move twice the bytes in pieces of two.
Traffic: reads and writes D numbers per head, reads R per token. 3 R flops per head: the loads decide the speed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import CHUNK, chunk_length, dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.tuning.tunables import Tunable


class Tile(NamedTuple):
    """Numbers of q (and at most as many of k) per program; a thread holds 32 of them, up to 4 warps."""

    numbers: int


NUMBERS = (512, 1024, 2048, 4096)
TUNABLE = Tunable(
    "rope", "rope",
    {"R = D": {"H": 20, "K": 20, "D": 128, "R": 128, "S": 2048, "interleaved": 1},
     "R < D": {"H": 32, "K": 32, "D": 80, "R": 20, "S": 2048, "interleaved": 0}},
    {"numbers": NUMBERS},
)  # fmt: skip


def shape_class(D: int, R: int) -> str:
    """Which line of the table of tiles serves: heads that are rotated as a whole, or in part."""
    return "R = D" if R == D else "R < D"


@triton.jit
def head_rows(heads, b, s, stride_b, stride_h, stride_s, CHUNK: tl.constexpr):
    """Where each head's row begins, in elements [heads]. Strides count in CHUNKs: so the compiler sees that it divides.

    (tl.multiple_of would say it too, but the compiler for AMD forgets that where it makes 32-bit offsets of these.)
    """
    return (b * stride_b + s * stride_s + heads * stride_h) * CHUNK


@triton.jit
def load_pairs(x_ptr, rows, valid, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """a and b [heads, BLOCK] of every pair; pairs past HALF are 0."""
    if INTERLEAVED:
        dims = tl.arange(0, 2 * BLOCK)
        mask = valid[:, None] & (dims < 2 * HALF)[None, :]
        both = tl.load(x_ptr + rows[:, None] + dims[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(both, [rows.shape[0], BLOCK, 2]))
    else:
        dims = tl.arange(0, BLOCK)
        mask = valid[:, None] & (dims < HALF)[None, :]
        a = tl.load(x_ptr + rows[:, None] + dims[None, :], mask=mask, other=0.0)
        b = tl.load(x_ptr + rows[:, None] + (dims + HALF)[None, :], mask=mask, other=0.0)
    return a, b


@triton.jit
def store_pairs(y_ptr, rows, valid, a, b, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_pairs`, rounding to the dtype of y."""
    a, b = a.to(y_ptr.dtype.element_ty), b.to(y_ptr.dtype.element_ty)
    if INTERLEAVED:
        dims = tl.arange(0, 2 * BLOCK)
        mask = valid[:, None] & (dims < 2 * HALF)[None, :]
        both = tl.reshape(tl.join(a, b), [rows.shape[0], 2 * BLOCK])
        tl.store(y_ptr + rows[:, None] + dims[None, :], both, mask=mask)
    else:
        dims = tl.arange(0, BLOCK)
        mask = valid[:, None] & (dims < HALF)[None, :]
        tl.store(y_ptr + rows[:, None] + dims[None, :], a, mask=mask)
        tl.store(y_ptr + rows[:, None] + (dims + HALF)[None, :], b, mask=mask)


@triton.jit
def load_rest(x_ptr, rows, valid, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Dims R..D-1 [heads, BLOCK], in their own dtype; 0 past D."""
    if D > R:
        dims = R + tl.arange(0, BLOCK)
        mask = valid[:, None] & (dims < D)[None, :]
        rest = tl.load(x_ptr + rows[:, None] + dims[None, :], mask=mask, other=0.0)
    else:
        rest = tl.zeros([rows.shape[0], BLOCK], x_ptr.dtype.element_ty)
    return rest


@triton.jit
def store_rest(y_ptr, rows, valid, rest, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_rest`, rounding to the dtype of y."""
    if D > R:
        dims = R + tl.arange(0, BLOCK)
        mask = valid[:, None] & (dims < D)[None, :]
        tl.store(y_ptr + rows[:, None] + dims[None, :], rest.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(table_ptr, b, s, stride_b, stride_s, HALF: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """cos or sin of one token, [1, BLOCK] in float32. A table ends at HALF, and so does the load. Strides as above."""
    pairs = tl.arange(0, BLOCK)
    row = (b * stride_b + s * stride_s) * CHUNK
    return tl.load(table_ptr + row + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_rows, y_rows, valid, cos, sin,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    a, b = load_pairs(x_ptr, x_rows, valid, HALF, INTERLEAVED, BLOCK)
    rest = load_rest(x_ptr, x_rows, valid, 2 * HALF, D, BLOCK_REST)
    a, b = a.to(tl.float32), b.to(tl.float32)
    store_pairs(y_ptr, y_rows, valid, a * cos - b * sin, b * cos + a * sin, HALF, INTERLEAVED, BLOCK)
    store_rest(y_ptr, y_rows, valid, rest, 2 * HALF, D, BLOCK_REST)


SIZES = [
    "S", "H", "K", "q_stride_b", "q_stride_h", "q_stride_s", "k_stride_b", "k_stride_h", "k_stride_s",
    "cos_stride_b", "cos_stride_s", "sin_stride_b", "sin_stride_s",
]  # fmt: skip
"""The kernel is not compiled anew for special values of these, such as S = 1 or a stride that 16 divides."""


@triton.jit(do_not_specialize=SIZES)
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, S, H, K,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    cos_stride_b, cos_stride_s, sin_stride_b, sin_stride_s,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, TABLE_CHUNK: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """A program: some heads of one token, rotated; or turned back."""
    token = (tl.program_id(0) // SHARES).to(tl.int64)  # int64: token * stride passes 2^31 in large tensors
    share = (tl.program_id(0) % SHARES).to(tl.int64)
    b, s = token // S, token % S
    cos = load_angles(cos_ptr, b, s, cos_stride_b, cos_stride_s, HALF, TABLE_CHUNK, BLOCK)
    sin = load_angles(sin_ptr, b, s, sin_stride_b, sin_stride_s, HALF, TABLE_CHUNK, BLOCK)
    if BACK:
        sin = -sin

    heads = share * BLOCK_H + tl.arange(0, BLOCK_H)
    x_rows = head_rows(heads, b, s, q_stride_b, q_stride_h, q_stride_s, CHUNK)
    y_rows = ((b * H + heads) * S + s) * D
    _rotate_heads(q_ptr, q_out_ptr, x_rows, y_rows, heads < H, cos, sin, D, HALF, INTERLEAVED, BLOCK, BLOCK_REST)

    heads = share * BLOCK_K + tl.arange(0, BLOCK_K)
    x_rows = head_rows(heads, b, s, k_stride_b, k_stride_h, k_stride_s, CHUNK)
    y_rows = ((b * K + heads) * S + s) * D
    _rotate_heads(k_ptr, k_out_ptr, x_rows, y_rows, heads < K, cos, sin, D, HALF, INTERLEAVED, BLOCK, BLOCK_REST)


def sizes_and_tiles(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tile: Tile, target: Target
) -> tuple[int, dict[str, int], dict[str, int], int]:
    """Grid, run-time sizes and strides (in chunks), tile sizes, and warps, for this kernel and that of norm_rope.py.

    The heads of one token are shared out between as many programs as tiles of that size make them.
    """
    (B, H, S, D), K, half = q.shape, k.shape[1], cos.shape[-1]
    block, rest = triton.next_power_of_2(max(half, 1)), triton.next_power_of_2(max(D - 2 * half, 1))
    lanes = triton.next_power_of_2(2 * block + (rest if 2 * half < D else 0))
    shares = triton.cdiv(max(H, K, 1), max(1, tile.numbers // lanes))
    block_h, block_k = (triton.next_power_of_2(max(1, triton.cdiv(heads, shares))) for heads in (H, K))
    chunk, table_chunk = chunk_length(D, q, k), chunk_length(half, cos, sin)
    sizes = {"S": S, "H": H, "K": K}
    for name, x in (("q", q), ("k", k)):
        sizes |= {f"{name}_stride_{axis}": x.stride(i) // chunk for i, axis in enumerate("bhs")}
    for name, x in (("cos", cos), ("sin", sin)):
        strides = x.stride(0) if x.ndim == 3 else 0, x.stride(-2)  # one table for all sequences: stride 0
        sizes |= {f"{name}_stride_{axis}": stride // table_chunk for axis, stride in zip("bs", strides, strict=True)}
    tiles = {
        "D": D, "HALF": half, "CHUNK": chunk, "TABLE_CHUNK": table_chunk,
        "SHARES": shares, "BLOCK_H": block_h, "BLOCK_K": block_k, "BLOCK": block, "BLOCK_REST": rest,
    }  # fmt: skip
    warps = min(4, max(1, max(block_h, block_k) * lanes // (32 * target.warp_size)))
    return B * S * shares, sizes, tiles, warps


def why_narrow(tiles: dict[str, int], interleaved: bool) -> str:
    """Why no part of a head can be read 16 bytes at a time; "" if some part can: it starts at a multiple of 8 dims."""
    D, half = tiles["D"], tiles["HALF"]
    if tiles["CHUNK"] != CHUNK:
        return f"{CHUNK} does not divide the strides of q and k"
    if (half > 0 and (interleaved or half % 8 == 0)) or (2 * half < D and half % 4 == 0):
        return ""
    return f"a head is read in parts that meet at dims {half} and {2 * half}: in loads of 8 bytes at most"


def plan(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, target: Target = DEFAULT,
    tile: Tile | None = None, back: bool = False,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launch and q and k rotated (back: the other way), which are contiguous, whatever their strides are."""
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    q, k, cos, sin = dense(q), dense(k), dense(cos), dense(sin)
    tile = tile or Tile(**tuning.tile("rope", shape_class(q.shape[-1], 2 * cos.shape[-1]), target))
    grid, sizes, tiles, warps = sizes_and_tiles(q, k, cos, sin, tile, target)
    given = {
        "q_ptr": q, "k_ptr": k, "cos_ptr": cos, "sin_ptr": sin, "q_out_ptr": outputs[0], "k_out_ptr": outputs[1],
    } | sizes  # fmt: skip
    narrow, constants = why_narrow(tiles, interleaved), tiles | {"INTERLEAVED": interleaved} | {"BACK": back}
    launch = Launch(rope_kernel, (grid,), given, constants, num_warps=warps, wide_loads=not narrow, narrow=narrow)
    return launch, *outputs


HEADS = (
    (20, 20, 128, 128, True),
    (16, 8, 128, 128, False),
    (32, 32, 80, 20, False),
    (32, 32, 64, 16, False),
    (32, 8, 160, 40, False),
    (20, 4, 128, 128, False),
    (3, 1, 72, 72, True),
    (5, 2, 24, 10, True),
)
"""H, K, D, R, interleaved: Helium-1-preview, Helium-1-2b, StableLM-3B, -2-1.6B and -2-12B, AFM-4.5B; odd sizes."""


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: real and odd heads, with tables in float32."""
    for dtype, (H, K, D, R, interleaved) in shipped(HEADS, HEADS[:2], target):
        q, k = (torch.empty(2, 64, n, D, dtype=dtype, device="meta").transpose(1, 2) for n in (H, K))
        table = torch.empty(64, R // 2, device="meta")
        kind = str(dtype).removeprefix("torch.") + (" interleaved" if interleaved else " half-split")
        yield f"rope {kind} H={H} K={K} D={D} R={R}", plan(q, k, table, table, interleaved, target)[0]


@torch.library.custom_op("refllm::rope", mutates_args=())
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("rope", q):
        launch, q_out, k_out = plan(q, k, cos, sin, interleaved, target_of(q.device))
        launch.run()
    return q_out, k_out


@_rope.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rope(
    q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate dims 0..R-1 of every head of q and k; dims R..D-1 are bit-equal. As `refllm.ops.rope`.

    cos, sin: [S, R/2] or [B, S, R/2], in float32 or the dtype of q. q and k may have any strides, such as transposed
    views of [B, S, H, D]; both results are contiguous. Raises InputError for arguments that do not fit together.
    """
    arguments.check("rope", q_BHSD, k_BKSD, cos, sin)
    return _rope(q_BHSD, k_BKSD, cos, sin, interleaved)
