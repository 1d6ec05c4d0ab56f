"""RMSNorm, the projection to q, k and v, and the rotation of q and k, in one kernel; optionally into the KV cache.

    a = w_norm * x / sqrt(mean(x^2) + eps)        rounded to the dtype of x, for the tensor cores
    qkv = a W^T + b                               in float32
    (u, v) -> (u cos_i - v sin_i, v cos_i + u sin_i)   for every pair of q and k; dims R..D-1 and all of v pass through

Tiles: a program takes BLOCK_M tokens and BLOCK_C columns of the product. The columns stand in an order of their own, in
which the two dims of a pair are neighbours: the rows of W are gathered in that order (each row stays dense, so loads
stay wide), u and v are the even and the odd columns, and the rotation is plain arithmetic on two tiles, for any
head_dim and any R, without padding.
The product is computed transposed, W a^T: on Hopper the left operand then comes from shared memory as it was copied,
and the one that is computed, a, is the right one. Were it the left one, it would come from registers, and ptxas would
wait after every wgmma.

The norm's scale is one number per token, so it may be applied after the product: x * w_norm goes into the product
while the sum of squares is still being formed, and x is read once. That needs a dtype in which x * w_norm neither
overflows nor loses small numbers, as bfloat16 and float32 are. float16 ends at 65504 and is only correct if the scale
comes first (SCALE_FIRST): there a loop over x goes before, and x is read twice.

Traffic: T E numbers of x per tile of columns, mostly from L2; (H + 2K) D E of W; (H + 2K) D T written. 2 T E (H + 2K) D
flops. For a few tokens the reading of W decides the speed, for many the tensor cores.
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
from refllm.kernels.tuning.tunables import STEPS, Tunable

Cache = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""k_cache [B, K, N, D], v_cache [B, K, N, D], lengths [B]."""

DECODE = 16
"""Sequences of up to so many tokens take the decode tiles: BLOCK_M = 16 is the smallest that tensor cores take."""

GROUP = 16
"""Tiles of tokens that are worked on together, so that their x and some columns of W stay in L2."""


class Tile(NamedTuple):
    """Tokens x columns x numbers per step of the product, and what they need to be fast."""

    M: int
    C: int
    E: int
    warps: int
    stages: int


_LAYER = {"E": 2560, "H": 20, "K": 4, "D": 128, "R": 128}
TUNABLE = Tunable(
    "rms_norm_qkv_rope", "rms_norm_qkv_rope",
    {"16-bit, prefill": {**_LAYER, "S": 2048}, "16-bit, decode": {**_LAYER, "S": 1},
     "16-bit, ragged": {"E": 1000, "H": 8, "K": 2, "D": 72, "R": 72, "S": 512}, "float32": {**_LAYER, "S": 512}},
    {"M": (32, 64, 128), "C": (32, 64, 128), "E": (32, 64), "warps": (4, 8), "stages": STEPS},
    {"16-bit, decode": {"M": (16,), "C": (32, 64), "E": (128,), "stages": (3, 4, 5)},
     "float32": {"M": (32, 64), "C": (32, 64), "E": (16,), "stages": (2,)}},
    outer=("M", "C"), streamed=("C", "E"), sums=(("M", "C"),),
)  # fmt: skip


@triton.jit
def _scale(squares, E, eps):
    """1 / rms of every row; squares [BLOCK_M, any] are its elements' squares, partly added up."""
    mean = tl.div_rn(tl.sum(squares, 1), tl.maximum(E, 1) * 1.0)  # a row of no elements: 0, and no NaN
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _squares(x):
    """The squares of a tile [BLOCK_M, BLOCK_E] in float32, eight neighbours, which one thread holds, added up."""
    return tl.sum(tl.reshape(x * x, [x.shape[0], x.shape[1] // 8, 8]), 2)


@triton.jit
def _scale_of(x_ptrs, exists, E, eps, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """1 / rms of the rows at x_ptrs, by a walk over them."""
    squares = tl.zeros([BLOCK_M, BLOCK_E // 8], tl.float32)
    for start in range(0, E, BLOCK_E):
        within = start + tl.arange(0, BLOCK_E) < E
        squares += _squares(tl.load(x_ptrs + start, mask=exists[:, None] & within[None, :], other=0.0).to(tl.float32))
    return _scale(squares, E, eps)


@triton.jit
def pair_dim(i, member, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The dim of a head that is one member (0 or 1) of its pair i of HEAD_DIM / 2.

    Interleaved: dims (2i, 2i + 1). Half-split: dims (i, i + R/2), and of the dims that are not rotated the first half
    goes with the second half.
    """
    if INTERLEAVED:
        dim = 2 * i + member
    elif 2 * HALF == HEAD_DIM:
        dim = i + member * HALF
    else:
        dim = tl.where(i < HALF, i + member * HALF, i + HALF + member * (HEAD_DIM // 2 - HALF))
    return dim


@triton.jit
def _angles(table_ptr, rows, columns, mask):
    return tl.load(table_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(
    y, head, dim, token, place_k, place_v, exists, has_slot, q_ptr, k_ptr, v_ptr,
    k_stride_h, k_stride_d, v_stride_h, v_stride_d, num_heads, num_kv_heads, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """y [BLOCK_M, columns] goes to q, k or v, by the head (of all H + 2K) that each column belongs to."""
    y = y.to(q_ptr.dtype.element_ty)
    q_ptrs = q_ptr + (token * (num_heads * HEAD_DIM))[:, None] + (head * HEAD_DIM + dim)[None, :]
    tl.store(q_ptrs, y, mask=exists[:, None] & (head < num_heads)[None, :])
    head -= num_heads
    k_ptrs = k_ptr + place_k[:, None] + (head.to(tl.int64) * k_stride_h + dim.to(tl.int64) * k_stride_d)[None, :]
    tl.store(k_ptrs, y, mask=has_slot[:, None] & ((head >= 0) & (head < num_kv_heads))[None, :])
    head -= num_kv_heads
    v_ptrs = v_ptr + place_v[:, None] + (head.to(tl.int64) * v_stride_h + dim.to(tl.int64) * v_stride_d)[None, :]
    tl.store(v_ptrs, y, mask=has_slot[:, None] & ((head >= 0) & (head < num_kv_heads))[None, :])


@triton.jit(do_not_specialize=["tokens"])  # one binary for any number of sequences
def rms_norm_qkv_rope_kernel(
    x_ptr, norm_ptr, w_ptr, b_ptr, cos_ptr, sin_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr,
    x_stride_b, x_stride_s, w_stride, cos_stride_b, cos_stride_s, cos_stride_i, sin_stride_b, sin_stride_s,
    sin_stride_i, k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    length_stride, tokens, S, E, N, num_heads, num_kv_heads, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program: one tile of tokens by rotary pairs, from the norm to the stores."""
    width = (num_heads + 2 * num_kv_heads) * HEAD_DIM
    tiles_m, tiles_c = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_C)
    # Programs start in about the order of their numbers, so those that run at one time should share what they read.
    # Row by row, 16 of them would read one tile of x and 16 of W. Instead GROUP rows are walked column by column, and
    # 16 read 4 of each if GROUP = 4. With GROUP = 2, 4 x 3 tiles:
    #
    #             columns of W                          0 1 2             0 2 4
    #   tokens    as programs are numbered at first     3 4 5    become   1 3 5
    #                                                   6 7 8             6 8 10
    #                                                   9 10 11           7 9 11
    pid = tl.program_id(0)
    tile_m, tile_c = tl.swizzle2d(pid // tiles_c, pid % tiles_c, tiles_m, tiles_c, GROUP)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = token < tokens
    b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
    # Column c of the product is not row c of W: the two dims of a pair stand side by side. With D = 8 and R = 4,
    # half-split, where (0, 2) and (1, 3) are rotated and 4..7 pass through:
    #
    #   column         0  1 | 2  3 | 4  5 | 6  7      even columns: u, odd ones: v
    #   row of W       0  2 | 1  3 | 4  6 | 5  7      + 8 for each head before
    #   pair i           0  |   1  |   2  |   3       rotated while i < R/2 = HALF
    #
    # A row of W is read as it lies, only the order of rows changes: loads stay wide. The way back is `_store`'s.
    column = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    dim = pair_dim(column % HEAD_DIM // 2, column % 2, HALF, HEAD_DIM, INTERLEAVED)
    weight_row = (column // HEAD_DIM * HEAD_DIM + dim).to(tl.int64)

    e = tl.arange(0, BLOCK_E)
    x_ptrs = x_ptr + (b * x_stride_b + s * x_stride_s)[:, None] + e[None, :]
    w_ptrs = w_ptr + (weight_row * w_stride)[:, None] + e[None, :]
    squares = tl.zeros([BLOCK_M, BLOCK_E // 8], tl.float32)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if SCALE_FIRST:
        scale = _scale_of(x_ptrs, exists, E, eps, BLOCK_M, BLOCK_E)
    qkv = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for start in range(0, E, BLOCK_E):
        within = start + e < E
        x = tl.load(x_ptrs + start, mask=exists[:, None] & within[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=(column < width)[:, None] & within[None, :], other=0.0)
        norm = tl.load(norm_ptr + start + e, mask=within, other=0.0).to(tl.float32)
        a = x.to(tl.float32)
        if SCALE_FIRST:
            a *= scale[:, None]
        else:
            squares += _squares(a)
        a = (a * norm[None, :]).to(w.dtype)
        qkv = tl.dot(w, tl.trans(a), qkv, input_precision="ieee")
    qkv = tl.trans(qkv)
    if not SCALE_FIRST:
        qkv *= _scale(squares, E, eps)[:, None]
    if b_ptr is not None:
        qkv += tl.load(b_ptr + weight_row, mask=column < width, other=0.0).to(tl.float32)[None, :]

    # [BLOCK_M, BLOCK_C] -> [BLOCK_M, pairs, 2]: the last axis is the member of the pair, and `split` takes it apart.
    u, v = tl.split(tl.reshape(qkv, [BLOCK_M, BLOCK_C // 2, 2]))
    pair = tile_c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
    head, i = pair // (HEAD_DIM // 2), pair % (HEAD_DIM // 2)
    turned = (i < HALF) & (head < num_heads + num_kv_heads)  # neither dims R..D-1 nor v
    mask = exists[:, None] & turned[None, :]
    cos = _angles(cos_ptr, b * cos_stride_b + s * cos_stride_s, i.to(tl.int64) * cos_stride_i, mask)
    sin = _angles(sin_ptr, b * sin_stride_b + s * sin_stride_s, i.to(tl.int64) * sin_stride_i, mask)
    # A choice and not cos = 1 and sin = 0: 0 times an infinite v would make u NaN.
    u, v = tl.where(mask, u * cos - v * sin, u), tl.where(mask, v * cos + u * sin, v)

    slot, has_slot = s, exists
    if lengths_ptr is not None:
        slot += tl.load(lengths_ptr + b * length_stride, mask=exists, other=0).to(tl.int64)
        has_slot = exists & (slot >= 0) & (slot < N)
    place_k, place_v = b * k_stride_b + slot * k_stride_n, b * v_stride_b + slot * v_stride_n
    token = token.to(tl.int64)
    if INTERLEAVED:
        _store(
            tl.interleave(u, v), column // HEAD_DIM, column % HEAD_DIM, token, place_k, place_v, exists, has_slot,
            q_ptr, k_ptr, v_ptr, k_stride_h, k_stride_d, v_stride_h, v_stride_d, num_heads, num_kv_heads, HEAD_DIM,
        )  # fmt: skip
    else:
        for member in tl.static_range(2):
            _store(
                u if member == 0 else v, head, pair_dim(i, member, HALF, HEAD_DIM, INTERLEAVED), token, place_k,
                place_v, exists, has_slot, q_ptr, k_ptr, v_ptr, k_stride_h, k_stride_d, v_stride_h, v_stride_d,
                num_heads, num_kv_heads, HEAD_DIM,
            )  # fmt: skip


def shape_class(S: int, E: int, half: int, dtype: torch.dtype) -> str:
    """Which line of the table of tiles serves: by what belongs to one sequence, never by how many there are, so that a
    row's bits do not depend on its batch.

    float32: products are plain multiplications, because tensor cores would round the operands to TF32. ragged: rows
    that do not start at multiples of 16 numbers, or R/2 that 8 does not divide; loads of single numbers take registers
    of their own. decode: the reading of W decides the speed, prefill: the tensor cores.
    """
    if dtype == torch.float32:
        return "float32"
    if E % 16 or half % 8:
        return "16-bit, ragged"
    return "16-bit, decode" if S <= DECODE else "16-bit, prefill"


def choose_tile(x: torch.Tensor, half: int, target: Target) -> Tile:
    """The tile of tuning/tiles.json. Prefill on an H100: 128 tokens x 128 columns x 64, the largest that fits. Decode:
    16 x 32 x 128, few columns and many stages: 96 programs for Llama's 3072 columns, each with 32 KiB of W on its way.
    (Twice the columns would get wgmma, and leave two thirds of an H100 without a program.)"""
    S, E = x.shape[1:]
    return Tile(**tuning.tile("rms_norm_qkv_rope", shape_class(S, E, half, x.dtype), target))


def plan(
    x_BSE: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    cache: Cache | None = None,
    target: Target = DEFAULT,
    tile: Tile | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launch and q, k, v: new, [B, S, heads, D] in memory; with a cache, k and v are the cache."""
    B, S, E = x_BSE.shape
    D = w_qkv.shape[0] // (num_heads + 2 * num_kv_heads)
    q, k, v = (_heads(x_BSE, heads, D) for heads in (num_heads, num_kv_heads, num_kv_heads))
    lengths = None
    if cache is not None:
        k, v, lengths = cache
    x_BSE, w_qkv = dense(x_BSE), dense(w_qkv)
    tile = tile or choose_tile(x_BSE, cos.shape[-1], target)
    given = {
        "x_ptr": x_BSE, "norm_ptr": norm_weight.contiguous(), "w_ptr": w_qkv,
        "b_ptr": None if b_qkv is None else b_qkv.contiguous(), "cos_ptr": cos, "sin_ptr": sin, "lengths_ptr": lengths,
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "w_stride": w_qkv.stride(0),
        "x_stride_b": x_BSE.stride(0), "x_stride_s": x_BSE.stride(1),
        "length_stride": 0 if lengths is None else lengths.stride(0), "tokens": B * S, "S": S, "E": E, "N": k.shape[2],
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": eps,
    }  # fmt: skip
    for name, table in (("cos", cos), ("sin", sin)):
        strides = table.stride() if table.ndim == 3 else (0, *table.stride())  # one table for all sequences: stride 0
        given |= {f"{name}_stride_{axis}": stride for axis, stride in zip("bsi", strides, strict=True)}
    for name, heads in (("k", k), ("v", v)):
        given |= {f"{name}_stride_{axis}": stride for axis, stride in zip("bhnd", heads.stride(), strict=True)}
    constants = {
        "HEAD_DIM": D, "HALF": cos.shape[-1], "INTERLEAVED": interleaved, "SCALE_FIRST": x_BSE.dtype == torch.float16,
        "GROUP": GROUP, "BLOCK_M": tile.M, "BLOCK_C": tile.C, "BLOCK_E": tile.E,
    }  # fmt: skip
    launch = Launch(
        rms_norm_qkv_rope_kernel,
        (triton.cdiv(B * S, tile.M) * triton.cdiv(w_qkv.shape[0], tile.C),),
        given,
        constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        tensor_cores=x_BSE.dtype != torch.float32,
        async_copies=E % 16 == 0,
    )
    return launch, q, k, v


def _heads(x_BSE: torch.Tensor, heads: int, D: int) -> torch.Tensor:
    """Room for [B, heads, S, D], a view of [B, S, heads, D]."""
    return x_BSE.new_empty((*x_BSE.shape[:2], heads, D)).transpose(1, 2)


SHAPES = (
    ("helium-1-preview-2b", 2560, 20, 20, 128, 128, True),
    ("Llama-3.2-1B", 2048, 32, 8, 64, 64, False),
    ("AFM-4.5B", 2560, 20, 4, 128, 128, False),
    ("partial", 2560, 32, 32, 80, 20, False),
    ("ragged", 100, 4, 2, 24, 12, False),
)
"""Name, E, H, K, D, R, interleaved: three published config.json, a partial rotation, odd sizes."""


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: decode and prefill, with and without cache."""
    for dtype, (name, E, H, K, D, R, interleaved) in shipped(SHAPES, SHAPES[:2], target):
        for S, cached in ((1, True), (512, False)):
            x, norm, w = (torch.empty(s, dtype=dtype, device="meta") for s in ((4, S, E), (E,), ((H + 2 * K) * D, E)))
            table = torch.empty((4, S, R // 2), device="meta")
            room = torch.empty((4, K, 1024, D), dtype=dtype, device="meta")
            cache = (room, room, torch.empty(4, dtype=torch.int64, device="meta")) if cached else None
            bias = None if cached else w[:, 0].contiguous()
            launch = plan(x, norm, w, bias, table, table, 1e-5, H, K, interleaved, cache, target)[0]
            yield f"rms_norm_qkv_rope {str(dtype).removeprefix('torch.')} {name} S={S}", launch


@torch.library.custom_op("refllm::rms_norm_qkv_rope", mutates_args=())
def _rms_norm_qkv_rope(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with on_device("rms_norm_qkv_rope", x):
        sizes = num_heads, num_kv_heads, interleaved, None, target_of(x.device)
        launch, q, k, v = plan(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *sizes)
        launch.run()
    return q, k, v


@torch.library.custom_op("refllm::rms_norm_qkv_rope_cache", mutates_args=("k_cache", "v_cache"))
def _rms_norm_qkv_rope_cache(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    if lengths.device.type == "cpu":  # here and not in the public function: torch.compile cannot trace a look at values
        arguments.slots_exist("rms_norm_qkv_rope", lengths, x.shape[1], k_cache.shape[2])
    with on_device("rms_norm_qkv_rope", x):
        sizes = num_heads, num_kv_heads, interleaved, (k_cache, v_cache, lengths), target_of(x.device)
        launch, q, _, _ = plan(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, *sizes)
        launch.run()
    return q


@_rms_norm_qkv_rope.register_fake
def _(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, num_heads, num_kv_heads, interleaved):
    D = w_qkv.shape[0] // (num_heads + 2 * num_kv_heads)
    return tuple(_heads(x, heads, D) for heads in (num_heads, num_kv_heads, num_kv_heads))


@_rms_norm_qkv_rope_cache.register_fake
def _(x, norm_weight, w_qkv, b_qkv, cos, sin, eps, num_heads, num_kv_heads, *_):
    return _heads(x, num_heads, w_qkv.shape[0] // (num_heads + 2 * num_kv_heads))


def rms_norm_qkv_rope(
    x_BSE: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    cache: Cache | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_BHSD, k_BKSD, v_BKSD: the rotated heads of rms_norm(x) W^T + b; w_qkv [(H + 2K) D, E], rows q, then k, then v.
    As `refllm.ops.rms_norm_qkv_rope`; cos and sin [S, R/2] or [B, S, R/2].

    The results are views of [B, S, heads, D]. x and w_qkv are copied if their last axis is not dense.
    cache: (k_cache [B, K, N, D], v_cache [B, K, N, D], lengths [B]), of any strides. Then k and v of token s of
    sequence b are written to slot lengths[b] + s of the caches, every other slot keeps its bits, and (q, k_cache,
    v_cache) returns.
    Raises InputError for arguments that do not fit together, an odd head_dim among them, and for a slot outside 0..N-1
    if lengths are on the CPU. On a GPU, where a look at them would mean waiting, nothing is written for such a token.
    """
    heads = num_heads, num_kv_heads
    arguments.rms_norm_qkv_rope("rms_norm_qkv_rope", x_BSE, norm_weight, w_qkv, b_qkv, cos, sin, *heads, cache)
    given = x_BSE, norm_weight, w_qkv, b_qkv, cos, sin, eps, *heads, interleaved
    if cache is None:
        return _rms_norm_qkv_rope(*given)
    return _rms_norm_qkv_rope_cache(*given, *cache), cache[0], cache[1]
