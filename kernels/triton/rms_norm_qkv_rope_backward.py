"""The backward pass of RMSNorm, the projection to q, k and v, and the rotation of q and k.

    (du, dv) -> (du cos_i + dv sin_i, dv cos_i - du sin_i)    for every pair of dq and dk: turned back; dv as it is
    da = dqkv W,   dW = dqkv^T a,   db = sum of dqkv over the tokens      dqkv: all heads of a token side by side
    dx, dw_norm: the backward pass of RMSNorm at x, with da                a = rms_norm(x), computed again

Composed and not fused: dx of a token needs all of its da, and dW all tokens, so neither can end in the program that
turned a head back. turn_back_kernel writes dqkv, rounded once; product_kernel is both products; the norm's kernels are
those of rms_norm.py and norm_backward.py, and the sum for db that of the latter.

Tiles: product_kernel takes BLOCK_M x BLOCK_N numbers of a product and walks over the whole inner axis, tile after tile,
in groups of tiles that share what they read (rms_norm_qkv_rope.py). Nothing is split over programs, so that every sum
has one order: the bits of a token's da do not depend on the batch.
Traffic: dq, dk, dv once, dqkv written once and read by both products; W, a and x. 4 T E (H + 2K) D flops: for many
tokens the tensor cores decide the speed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.norm_backward import add_rows
from refllm.kernels.triton.norm_backward import plan as norm_backward_plan
from refllm.kernels.triton.rms_norm import plan as norm_plan
from refllm.kernels.triton.rms_norm_qkv_rope import GROUP, pair_dim
from refllm.kernels.tuning.tunables import Tunable

_ALL = (True, True, True, True)
"""What is needed: the gradients of x, norm_weight, w_qkv and b_qkv."""
HEADS = 16
"""Heads of a token per program of `turn_back_kernel`."""


class Tile(NamedTuple):
    """Rows x columns of a product, numbers of the inner axis per step, and what they need to be fast."""

    M: int
    N: int
    K: int
    warps: int
    stages: int


TUNABLE = Tunable(
    "rms_norm_qkv_rope_backward", "rms_norm_qkv_rope_backward",
    {"16-bit": {"S": 2048, "E": 2560, "H": 20, "K": 4, "D": 128, "R": 128},
     "float32": {"S": 512, "E": 2560, "H": 20, "K": 4, "D": 128, "R": 128}},
    {"M": (64, 128), "N": (64, 128), "K": (32, 64), "warps": (4, 8), "stages": (3, 4)},
    {"float32": {"M": (32, 64), "N": (32, 64), "K": (16,), "stages": (2,)}},
    outer=("M", "N"), streamed=("N", "K"), sums=(("M", "N"),), about=3,
)  # fmt: skip


@triton.jit
def turn_back_kernel(
    d_ptr, out_ptr, cos_ptr, sin_ptr, d_batch, d_head, d_row, d_dim, cos_batch, cos_row, cos_i, sin_batch, sin_row,
    sin_i, S, heads, first_head, width,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, TURN: tl.constexpr, BLOCK_H: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_H heads of one token, turned back if TURN, into the columns of these heads in dqkv."""
    shares = tl.cdiv(heads, BLOCK_H)
    token = (tl.program_id(0) // shares).to(tl.int64)  # int64: token * stride passes 2^31 in large tensors
    b, s = token // S, token % S
    head = tl.program_id(0) % shares * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, PAIRS)
    inside = (head < heads)[:, None] & (i < HEAD_DIM // 2)[None, :]
    rows = (b * d_batch + s * d_row + head.to(tl.int64) * d_head)[:, None]
    dim_u, dim_v = pair_dim(i, 0, HALF, HEAD_DIM, INTERLEAVED), pair_dim(i, 1, HALF, HEAD_DIM, INTERLEAVED)
    u = tl.load(d_ptr + rows + (dim_u.to(tl.int64) * d_dim)[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(d_ptr + rows + (dim_v.to(tl.int64) * d_dim)[None, :], mask=inside, other=0.0).to(tl.float32)
    if TURN:
        turned = i < HALF
        cos_row_ptr, sin_row_ptr = cos_ptr + b * cos_batch + s * cos_row, sin_ptr + b * sin_batch + s * sin_row
        cos = tl.load(cos_row_ptr + i.to(tl.int64) * cos_i, mask=turned, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(sin_row_ptr + i.to(tl.int64) * sin_i, mask=turned, other=0.0).to(tl.float32)[None, :]
        # A choice and not cos = 1 and sin = 0: 0 times an infinite v would make u NaN.
        u, v = tl.where(turned[None, :], u * cos + v * sin, u), tl.where(turned[None, :], v * cos - u * sin, v)
    out = out_ptr + token * width + ((first_head + head) * HEAD_DIM)[:, None]
    tl.store(out + dim_u[None, :], u.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + dim_v[None, :], v.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "K"])  # one of them is the number of tokens
def product_kernel(
    a_ptr, b_ptr, c_ptr, a_row, a_column, b_row, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: one tile of a b, [M, N], for a [M, K] of any strides and b [K, N] with dense rows."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows, columns = (m.to(tl.int64) * a_row)[:, None], n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = k.to(tl.int64)
        a = tl.load(a_ptr + a_rows + (at * a_column)[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + (at * b_row)[:, None] + columns, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    c = c_ptr + (m.to(tl.int64) * N)[:, None] + columns
    tl.store(c, total.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def choose_tile(dtype: torch.dtype, target: Target) -> Tile:
    """The tile of tuning/tiles.json: 128 x 128 numbers on an H100, 64 of the inner axis per step. float32: products are
    plain multiplications, because tensor cores would round the operands to TF32."""
    shape = "float32" if dtype == torch.float32 else "16-bit"
    return Tile(**tuning.tile("rms_norm_qkv_rope_backward", shape, target))


def product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, tile: Tile) -> Launch:
    """The launch that writes a b to c, contiguous [M, N]; b [K, N] is contiguous."""
    (M, K), N = a.shape, b.shape[1]
    given = {
        "a_ptr": a, "b_ptr": b, "c_ptr": c, "a_row": a.stride(0), "a_column": a.stride(1), "b_row": b.stride(0),
        "M": M, "N": N, "K": K,
    }  # fmt: skip
    constants = {"GROUP": GROUP, "BLOCK_M": tile.M, "BLOCK_N": tile.N, "BLOCK_K": tile.K}
    grid, narrow = triton.cdiv(M, tile.M) * triton.cdiv(N, tile.N), a.dtype != torch.float32
    aligned = narrow and N % 16 == 0 and max(a.stride()) % 16 == 0
    return Launch(
        product_kernel, (grid,), given, constants, num_warps=tile.warps, num_stages=tile.stages, tensor_cores=narrow,
        async_copies=aligned,
    )  # fmt: skip


def _turned_back(
    gradients: Sequence[torch.Tensor], dqkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> Iterator[Launch]:
    """The launches that write dq, dk and dv to dqkv [B, S, (H + 2K) D]."""
    B, S, width = dqkv.shape
    D, first = gradients[0].shape[3], 0
    tables = {
        f"{name}_{axis}": stride
        for name, table in (("cos", cos), ("sin", sin))
        for axis, stride in zip(("batch", "row", "i"), (0, *table.stride())[-3:], strict=True)
    }  # one table for all sequences: stride 0
    for number, d in enumerate(gradients):
        given = {
            "d_ptr": d, "out_ptr": dqkv, "cos_ptr": cos, "sin_ptr": sin,
            **{f"d_{axis}": stride for axis, stride in zip(("batch", "head", "row", "dim"), d.stride(), strict=True)},
            **tables, "S": S, "heads": d.shape[1], "first_head": first, "width": width,
        }  # fmt: skip
        constants = {
            "HEAD_DIM": D, "HALF": cos.shape[-1], "INTERLEAVED": interleaved, "TURN": number < 2, "BLOCK_H": HEADS,
            "PAIRS": triton.next_power_of_2(D // 2),
        }  # fmt: skip
        yield Launch(turn_back_kernel, (B * S * triton.cdiv(d.shape[1], HEADS),), given, constants, num_warps=4)
        first += d.shape[1]


def plan(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, x: torch.Tensor, norm_weight: torch.Tensor,
    w_qkv: torch.Tensor, b_qkv: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float,
    interleaved: bool, target: Target = DEFAULT, tile: Tile | None = None, needed: Sequence[bool] = _ALL,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launches in their order, then dx, dnorm_weight, dw_qkv and db_qkv; in the place of what is not needed, and of
    that of no bias, is an empty tensor."""
    B, S, E = x.shape
    width, of_bias = len(w_qkv), needed[3] and b_qkv is not None
    tile = tile or choose_tile(x.dtype, target)
    dqkv = x.new_empty((B, S, width))
    steps = list(_turned_back((dq, dk, dv), dqkv, cos, sin, interleaved))
    rows = dqkv.view(B * S, width)
    dx, dnorm_weight = x.new_empty(0), norm_weight.new_empty(0)
    if needed[0] or needed[1]:
        dnormed = x.new_empty((B * S, E))
        steps.append(product(rows, w_qkv.contiguous(), dnormed, tile))
        given = "rms_norm_backward", dnormed.view(x.shape), None, x, None, norm_weight, None, eps
        norm, dx, dnorm_weight = norm_backward_plan(*given, target)
        steps += norm
    dw_qkv = w_qkv.new_empty(w_qkv.shape if needed[2] else 0)
    if needed[2]:
        again, normed, _ = norm_plan(x, None, norm_weight, eps, target)
        steps += [again, product(rows.T, normed.view(B * S, E), dw_qkv, tile)]
    db_qkv = x.new_empty(width if of_bias else 0)
    if of_bias:
        steps.append(add_rows(rows, db_qkv))
    return steps, dx, dnorm_weight, dw_qkv, db_qkv


SHAPES = (("Llama-3.2-1B", 2048, 32, 8, 64, 64, False), ("ragged", 100, 4, 2, 24, 12, True))
"""Name, E, H, K, D, R, interleaved: as in rms_norm_qkv_rope.py."""


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """What is not in other files, by a name: of dq turned back, and of both products."""
    for dtype, (name, E, H, K, D, R, interleaved) in shipped(SHAPES, SHAPES[:1], target):
        x, norm, w = (torch.empty(s, dtype=dtype, device="meta") for s in ((4, 512, E), (E,), ((H + 2 * K) * D, E)))
        dq, dkv = (torch.empty((4, 512, n, D), dtype=dtype, device="meta").transpose(1, 2) for n in (H, K))
        table = torch.empty((512, R // 2), device="meta")
        steps = plan(dq, dkv, dkv, x, norm, w, None, table, table, 1e-5, interleaved, target)[0]
        kind = f"rms_norm_qkv_rope_backward {str(dtype).removeprefix('torch.')} {name}"
        of_x, of_w = (step for step in steps if step.kernel is product_kernel)
        for what, step in (("turned back", steps[0]), ("dqkv W", of_x), ("dqkv^T a", of_w)):
            yield f"{kind}, {what}", step


@torch.library.custom_op("refllm::rms_norm_qkv_rope_backward", mutates_args=())
def _rms_norm_qkv_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    interleaved: bool,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with on_device("rms_norm_qkv_rope_backward", x):
        given = dq, dk, dv, x, norm_weight, w_qkv, b_qkv, cos, sin, eps, interleaved
        steps, *gradients = plan(*given, target_of(x.device), None, needed)
        for step in steps:
            step.run()
    return gradients[0], gradients[1], gradients[2], gradients[3]


@_rms_norm_qkv_rope_backward.register_fake
def _(dq, dk, dv, x, norm_weight, w_qkv, b_qkv, cos, sin, eps, interleaved, needed):
    of_bias = needed[3] and b_qkv is not None
    of_norm = needed[0] or needed[1]  # both come of one kernel
    asked = ((x, of_norm), (norm_weight, of_norm), (w_qkv, needed[2]))
    return (*(like.new_empty(like.shape if each else 0) for like, each in asked), x.new_empty(len(w_qkv) * of_bias))


only_once("rms_norm_qkv_rope_backward")


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    x, _, w_qkv, *_, num_heads, num_kv_heads, interleaved = kept
    B, S = x.shape[:2]
    D = len(w_qkv) // (num_heads + 2 * num_kv_heads)
    given = (
        x.new_zeros((B, heads, S, D)) if d is None else d  # a result that the loss does not depend on
        for d, heads in zip(incoming, (num_heads, num_kv_heads, num_kv_heads), strict=True)
    )
    asked = list(needed[:4])
    found = _rms_norm_qkv_rope_backward(*given, *kept[:7], interleaved, asked)
    return (*(if_needed(*each) for each in zip(asked, found, strict=True)), *(None,) * 6)


differentiable("rms_norm_qkv_rope", lambda inputs, _: inputs, _gradients, without=("cos", "sin"))


def rms_norm_qkv_rope_backward(
    dq_BHSD: torch.Tensor,
    dk_BKSD: torch.Tensor,
    dv_BKSD: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx, dnorm_weight, dw_qkv and db_qkv (None without bias) of `rms_norm_qkv_rope`, in the dtypes of these.

    As `refllm.ops.rms_norm_qkv_rope_backward`. The incoming gradients may have any strides. Raises InputError for
    arguments that do not fit together.
    """
    operator = "rms_norm_qkv_rope_backward"
    heads = num_heads, num_kv_heads
    arguments.rms_norm_qkv_rope(operator, x_BSE, norm_weight, w_qkv, b_qkv, cos, sin, *heads)
    (B, S, _), D = x_BSE.shape, len(w_qkv) // (num_heads + 2 * num_kv_heads)
    for name, d, count in (("dq", dq_BHSD, num_heads), ("dk", dk_BKSD, num_kv_heads), ("dv", dv_BKSD, num_kv_heads)):
        arguments.like(operator, name, d, (B, count, S, D), x_BSE)
    given = dq_BHSD, dk_BKSD, dv_BKSD, x_BSE, norm_weight, w_qkv, b_qkv, cos, sin, eps, interleaved
    dx, dnorm_weight, dw_qkv, db_qkv = _rms_norm_qkv_rope_backward(*given, list(_ALL))
    return dx, dnorm_weight, dw_qkv, None if b_qkv is None else db_qkv
