"""The backward pass of the norm of every head of q and k and their rotation: two launches for each, of one kernel.

    (da, db) -> (da cos + db sin, db cos - da sin)        the incoming gradient turned back: d, of the normed head
    n = x / sqrt(mean(x^2) + eps)                         "rms"; s the factor 1 / sqrt(...), g = w * d
    dx = s * (g - n mean(g n))
    n = (x - mean(x)) / sqrt(var(x) + eps)                "layer"
    dx = s * (g - mean(g) - n mean(g n))
    dw = sum of d * n over all tokens                     for each head's own weight

All in float32, rounded once at the end. A head is held in three parts, as in norm_rope.py.

Tiles: a program takes `tokens` tokens one after another and, of each, some of the heads of q, or of k; it adds its
terms of dw up in registers, and a second kernel adds the sums of all programs (see norm_backward.py: the order of every
sum is fixed). q and k have launches of their own: together they would take twice the registers.
Traffic: reads 2 D numbers per head and writes D, reads R per token, and 8 D / tokens bytes of sums per head. About 25 D
flops per head.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import chunk_length, dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.norm_backward import add_rows
from refllm.kernels.triton.rms_norm import inverse_root
from refllm.kernels.triton.rope import (
    HEADS,
    head_rows,
    load_angles,
    load_pairs,
    load_rest,
    store_pairs,
    store_rest,
    why_narrow,
)
from refllm.kernels.tuning.tunables import Tunable


class Tile(NamedTuple):
    """Numbers of a token that a program holds at a time, 32 per thread up to 4 warps; tokens that it takes one after
    another."""

    numbers: int
    tokens: int


_SIZES = {"H": 32, "K": 8, "D": 160, "R": 40, "S": 2048, "interleaved": 0, "tokens": 32}
TUNABLE = Tunable("norm_rope_backward", "norm_rope_backward", {tuning.ANY: _SIZES}, {"numbers": (256, 512, 1024)})


@triton.jit
def _mean(a, b, rest, D: tl.constexpr):
    """Mean of each head over its D dims, [heads, 1]; what is past the end of a part is 0."""
    return tl.div_rn(tl.sum(a + b, 1) + tl.sum(rest, 1), D * 1.0)[:, None]


@triton.jit
def _centre(a, b, rest, HALF: tl.constexpr, D: tl.constexpr):
    """The parts less the mean of the head; what is past their end stays 0."""
    mean = _mean(a, b, rest, D)
    in_pair = (tl.arange(0, a.shape[1]) < HALF)[None, :]
    in_rest = (tl.arange(0, rest.shape[1]) < D - 2 * HALF)[None, :]
    return tl.where(in_pair, a - mean, 0.0), tl.where(in_pair, b - mean, 0.0), tl.where(in_rest, rest - mean, 0.0)


@triton.jit
def _load_head(
    x_ptr, rows, valid,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The three parts of each head in float32."""
    a, b = load_pairs(x_ptr, rows, valid, HALF, INTERLEAVED, BLOCK)
    rest = load_rest(x_ptr, rows, valid, 2 * HALF, D, BLOCK_REST)
    return a.to(tl.float32), b.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _heads_backward(
    d_ptr, x_ptr, weight_ptr, dx_ptr, d_rows, x_rows, weight_rows, dx_rows, valid, cos, sin, eps,
    LAYER: tl.constexpr, DX: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Stores dx of some heads of one token; their terms d * n of dw, in three parts."""
    da, db, drest = _load_head(d_ptr, d_rows, valid, D, HALF, INTERLEAVED, BLOCK, BLOCK_REST)
    da, db = da * cos + db * sin, db * cos - da * sin
    a, b, rest = _load_head(x_ptr, x_rows, valid, D, HALF, INTERLEAVED, BLOCK, BLOCK_REST)
    if LAYER:
        a, b, rest = _centre(a, b, rest, HALF, D)
        a, b, rest = _centre(a, b, rest, HALF, D)
    scale = inverse_root(_mean(a * a, b * b, rest * rest, D) + eps)
    a, b, rest = a * scale, b * scale, rest * scale
    if DX:
        wa, wb, wrest = _load_head(weight_ptr, weight_rows, valid, D, HALF, INTERLEAVED, BLOCK, BLOCK_REST)
        ga, gb, grest = wa * da, wb * db, wrest * drest
        mean = _mean(ga * a, gb * b, grest * rest, D)
        if LAYER:
            ga, gb, grest = _centre(ga, gb, grest, HALF, D)
        dxa, dxb = scale * (ga - a * mean), scale * (gb - b * mean)
        store_pairs(dx_ptr, dx_rows, valid, dxa, dxb, HALF, INTERLEAVED, BLOCK)
        store_rest(dx_ptr, dx_rows, valid, scale * (grest - rest * mean), 2 * HALF, D, BLOCK_REST)
    return da * a, db * b, drest * rest


SIZES = [
    "tokens", "S", "H", "d_stride_b", "d_stride_h", "d_stride_s", "x_stride_b", "x_stride_h", "x_stride_s",
    "cos_stride_b", "cos_stride_s", "sin_stride_b", "sin_stride_s",
]  # fmt: skip


# Sizes and strides are exempt from specialization so that a row's bits do not depend on the batch: see rms_norm.py.
@triton.jit(do_not_specialize=SIZES)
def norm_rope_backward_kernel(
    d_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, sums_ptr, eps, tokens, S, H,
    d_stride_b, d_stride_h, d_stride_s, x_stride_b, x_stride_h, x_stride_s,
    cos_stride_b, cos_stride_s, sin_stride_b, sin_stride_s,
    LAYER: tl.constexpr, DX: tl.constexpr, DWEIGHT: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, TABLE_CHUNK: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program: dx of some heads of TOKENS tokens, and their sums for dw, [programs / SHARES, H, D]."""
    block = (tl.program_id(0) // SHARES).to(tl.int64)  # int64: token * stride passes 2^31 in large tensors
    heads = (tl.program_id(0) % SHARES).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    sum_a, sum_b = tl.zeros([BLOCK_H, BLOCK], tl.float32), tl.zeros([BLOCK_H, BLOCK], tl.float32)
    sum_rest = tl.zeros([BLOCK_H, BLOCK_REST], tl.float32)
    for token in range(block * TOKENS, tl.minimum((block + 1) * TOKENS, tokens)):
        b, s = token // S, token % S
        cos = load_angles(cos_ptr, b, s, cos_stride_b, cos_stride_s, HALF, TABLE_CHUNK, BLOCK)
        sin = load_angles(sin_ptr, b, s, sin_stride_b, sin_stride_s, HALF, TABLE_CHUNK, BLOCK)
        d_rows = head_rows(heads, b, s, d_stride_b, d_stride_h, d_stride_s, CHUNK)
        x_rows = head_rows(heads, b, s, x_stride_b, x_stride_h, x_stride_s, CHUNK)
        terms_a, terms_b, terms_rest = _heads_backward(
            d_ptr, x_ptr, weight_ptr, dx_ptr, d_rows, x_rows, heads * D, ((b * H + heads) * S + s) * D, heads < H,
            cos, sin, eps, LAYER, DX, D, HALF, INTERLEAVED, BLOCK, BLOCK_REST,
        )  # fmt: skip
        sum_a, sum_b, sum_rest = sum_a + terms_a, sum_b + terms_b, sum_rest + terms_rest
    if DWEIGHT:
        rows = (block * H + heads) * D
        store_pairs(sums_ptr, rows, heads < H, sum_a, sum_b, HALF, INTERLEAVED, BLOCK)
        store_rest(sums_ptr, rows, heads < H, sum_rest, 2 * HALF, D, BLOCK_REST)


def _plan_heads(
    d: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    norm: str,
    interleaved: bool,
    target: Target,
    tile: Tile,
    needed: tuple[bool, bool],
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches, dx and dweight, for q or for k. needed: which of them; the other is an empty tensor."""
    dx = torch.empty(x.shape if needed[0] else 0, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape if needed[1] else 0, dtype=weight.dtype, device=x.device)
    d, x, cos, sin = (dense(each) for each in (d, x, cos, sin))
    (B, H, S, D), half = x.shape, cos.shape[-1]
    block, rest = triton.next_power_of_2(max(half, 1)), triton.next_power_of_2(max(D - 2 * half, 1))
    lanes = triton.next_power_of_2(2 * block + (rest if 2 * half < D else 0))
    block_h = min(max(1, tile.numbers // lanes), triton.next_power_of_2(max(1, H)))
    shares, programs = triton.cdiv(H, block_h), triton.cdiv(B * S, tile.tokens)
    sums = x.new_empty((programs, H * D) if needed[1] else (0, 0), dtype=torch.float32)
    chunk, table_chunk = chunk_length(D, d, x), chunk_length(half, cos, sin)
    given: dict[str, Any] = {
        "d_ptr": d, "x_ptr": x, "weight_ptr": weight.contiguous(), "cos_ptr": cos, "sin_ptr": sin, "dx_ptr": dx,
        "sums_ptr": sums, "eps": eps, "tokens": B * S, "S": S, "H": H,
    }  # fmt: skip
    for name, each in (("d", d), ("x", x)):
        given |= {f"{name}_stride_{axis}": each.stride(i) // chunk for i, axis in enumerate("bhs")}
    for name, each in (("cos", cos), ("sin", sin)):
        strides = each.stride(0) if each.ndim == 3 else 0, each.stride(-2)  # one table for all sequences: stride 0
        given |= {f"{name}_stride_{axis}": stride // table_chunk for axis, stride in zip("bs", strides, strict=True)}
    constants = {
        "LAYER": norm == "layer", "DX": needed[0], "DWEIGHT": needed[1], "D": D, "HALF": half,
        "INTERLEAVED": interleaved, "CHUNK": chunk, "TABLE_CHUNK": table_chunk, "SHARES": shares, "BLOCK_H": block_h,
        "BLOCK": block, "BLOCK_REST": rest, "TOKENS": tile.tokens,
    }  # fmt: skip
    warps, narrow = min(4, max(1, block_h * lanes // (32 * target.warp_size))), why_narrow(constants, interleaved)
    first = Launch(
        norm_rope_backward_kernel, (programs * shares,), given, constants, num_warps=warps, wide_loads=not narrow,
        narrow=narrow,
    )  # fmt: skip
    last = [add_rows(sums, dweight)] if dweight.numel() else []
    return ([first, *last] if any(needed) else []), dx, dweight


def plan(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    norm: str,
    interleaved: bool,
    target: Target = DEFAULT,
    tile: Tile | None = None,
    needed: Sequence[bool] = (True,) * 4,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launches in their order, then dq, dk, dq_weight and dk_weight, which are contiguous.

    needed: which of them; in the place of another is an empty tensor.
    """
    tile = tile or Tile(**tuning.tile("norm_rope_backward", tuning.ANY, target))
    how = cos, sin, eps, norm, interleaved, target, tile
    of_q, dq, dq_weight = _plan_heads(dq, q, q_weight, *how, (bool(needed[0]), bool(needed[2])))
    of_k, dk, dk_weight = _plan_heads(dk, k, k_weight, *how, (bool(needed[1]), bool(needed[3])))
    return [*of_q, *of_k], dq, dk, dq_weight, dk_weight


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: real and odd heads, with tables in float32."""
    for dtype, (H, K, D, R, interleaved) in shipped((HEADS[0], HEADS[2], HEADS[4], HEADS[7]), HEADS[:1], target):
        q, k = (torch.empty(2, 64, n, D, dtype=dtype, device="meta").transpose(1, 2) for n in (H, K))
        q_weight, k_weight = (torch.empty(n, D, dtype=dtype, device="meta") for n in (H, K))
        table = torch.empty(64, R // 2, device="meta")
        norm = "rms" if interleaved else "layer"
        kind = str(dtype).removeprefix("torch.") + (" interleaved" if interleaved else " half-split")
        steps = plan(q, k, q, k, q_weight, k_weight, table, table, 1e-5, norm, interleaved, target)[0]
        yield f"norm_rope_backward {norm} {kind} H={H} K={K} D={D} R={R}", steps[0]


@torch.library.custom_op("refllm::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    norm: str,
    interleaved: bool,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with on_device("norm_rope_backward", q):
        steps, *found = plan(
            dq, dk, q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved, target_of(q.device), needed=needed
        )
        for step in steps:
            step.run()
    return found[0], found[1], found[2], found[3]


@_norm_rope_backward.register_fake
def _(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    norm: str,
    interleaved: bool,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of = zip((q, k, q_weight, k_weight), needed, strict=True)
    found = [x.new_empty(x.shape if asked else 0) for x, asked in of]
    return found[0], found[1], found[2], found[3]


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    """Where q or k was normed and turned for nothing, neither it nor its weight has a gradient."""
    used = [d is not None for d in incoming] * 2
    asked = [bool(x and y) for x, y in zip(needed, used, strict=False)]
    d = [x if d is None else d for d, x in zip(incoming, kept, strict=False)]
    found = _norm_rope_backward(*d, *kept, asked)
    return *(if_needed(x, gradient) for x, gradient in zip(asked, found, strict=True)), *([None] * 5)


only_once("norm_rope_backward")
differentiable("norm_rope", lambda inputs, _: inputs, _gradients, without=("cos", "sin"))


def norm_rope_backward(
    dq_BHSD: torch.Tensor,
    dk_BKSD: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    norm: str,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dq_weight [H, D] and dk_weight [K, D] of `norm_rope`, contiguous. As `refllm.ops.norm_rope_backward`.

    The incoming gradients have the shapes and the dtype of q and k, and any strides; the rest is as for `norm_rope`.
    Raises InputError for arguments that do not fit together.
    """
    operator = "norm_rope_backward"
    arguments.check(operator, q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, norm=norm)
    arguments.incoming(operator, q_BHSD, dq=dq_BHSD)
    arguments.incoming(operator, k_BKSD, dk=dk_BKSD)
    return _norm_rope_backward(
        dq_BHSD, dk_BKSD, q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, eps, norm, interleaved, [True] * 4
    )
