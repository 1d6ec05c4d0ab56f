"""Norm of every head of q and k, then rotary position embedding, in one launch: the attention of StableLM-2-12B.

    y = w * x / sqrt(mean(x^2) + eps)                     "rms": over the D dims of each head, w of that head
    y = w * (x - mean(x)) / sqrt(var(x) + eps)            "layer"
    (a, b) -> (a cos - b sin, b cos + a sin)              for the R/2 pairs of each head of y; dims R..D-1 stay y

All in float32, rounded once at the end. A head centred twice is exact about its mean: see layer_norm.py.

Tiles: as in rope.py, a program takes one token and a share of its heads, of q and of k. A head is held in three parts
from the load to the store, the two numbers of each pair and the rest, so that a rotation needs no second load. On
NVIDIA a program is one warp, so that the sums of a head wait for no other warp.
Traffic: reads and writes D numbers per head, reads R per token; the weights stay in the cache. About 10 D flops per
head, and the instructions around them take longer to issue than the bytes to arrive: the tile is the one with the
fewest (`refllm bench tune --kernel norm_rope`).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments, tuning
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.layout import dense
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.rms_norm import inverse_root
from refllm.kernels.triton.rope import (
    HEADS,
    NUMBERS,
    SIZES,
    Tile,
    head_rows,
    load_angles,
    load_pairs,
    load_rest,
    sizes_and_tiles,
    store_pairs,
    store_rest,
    why_narrow,
)
from refllm.kernels.tuning.tunables import Tunable

_HEADS = {"H": 32, "K": 8, "D": 160, "R": 40, "S": 2048, "interleaved": 0}
TUNABLE = Tunable("norm_rope", "norm_rope", {tuning.ANY: _HEADS}, {"numbers": NUMBERS})


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
def _norm_and_rotate_heads(
    x_ptr, weight_ptr, y_ptr, x_rows, weight_rows, y_rows, valid, cos, sin, eps, LAYER: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    a, b = load_pairs(x_ptr, x_rows, valid, HALF, INTERLEAVED, BLOCK)
    rest = load_rest(x_ptr, x_rows, valid, 2 * HALF, D, BLOCK_REST)
    a, b, rest = a.to(tl.float32), b.to(tl.float32), rest.to(tl.float32)
    if LAYER:
        a, b, rest = _centre(a, b, rest, HALF, D)
        a, b, rest = _centre(a, b, rest, HALF, D)
    scale = inverse_root(_mean(a * a, b * b, rest * rest, D) + eps)

    weight_a, weight_b = load_pairs(weight_ptr, weight_rows, valid, HALF, INTERLEAVED, BLOCK)
    weight_rest = load_rest(weight_ptr, weight_rows, valid, 2 * HALF, D, BLOCK_REST)
    a, b, rest = weight_a * (a * scale), weight_b * (b * scale), weight_rest * (rest * scale)
    store_pairs(y_ptr, y_rows, valid, a * cos - b * sin, b * cos + a * sin, HALF, INTERLEAVED, BLOCK)
    store_rest(y_ptr, y_rows, valid, rest, 2 * HALF, D, BLOCK_REST)


# Sizes and strides are exempt from specialization so that a row's bits do not depend on the batch: see rms_norm.py.
@triton.jit(do_not_specialize=SIZES)
def norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, eps, S, H, K,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    cos_stride_b, cos_stride_s, sin_stride_b, sin_stride_s, LAYER: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, TABLE_CHUNK: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A program: some heads of one token, normed and rotated."""
    token = (tl.program_id(0) // SHARES).to(tl.int64)  # int64: token * stride passes 2^31 in large tensors
    share = (tl.program_id(0) % SHARES).to(tl.int64)
    b, s = token // S, token % S
    cos = load_angles(cos_ptr, b, s, cos_stride_b, cos_stride_s, HALF, TABLE_CHUNK, BLOCK)
    sin = load_angles(sin_ptr, b, s, sin_stride_b, sin_stride_s, HALF, TABLE_CHUNK, BLOCK)

    heads = share * BLOCK_H + tl.arange(0, BLOCK_H)
    x_rows = head_rows(heads, b, s, q_stride_b, q_stride_h, q_stride_s, CHUNK)
    y_rows = ((b * H + heads) * S + s) * D
    _norm_and_rotate_heads(
        q_ptr, q_weight_ptr, q_out_ptr, x_rows, heads * D, y_rows, heads < H, cos, sin, eps, LAYER,
        D, HALF, INTERLEAVED, BLOCK, BLOCK_REST,
    )  # fmt: skip

    heads = share * BLOCK_K + tl.arange(0, BLOCK_K)
    x_rows = head_rows(heads, b, s, k_stride_b, k_stride_h, k_stride_s, CHUNK)
    y_rows = ((b * K + heads) * S + s) * D
    _norm_and_rotate_heads(
        k_ptr, k_weight_ptr, k_out_ptr, x_rows, heads * D, y_rows, heads < K, cos, sin, eps, LAYER,
        D, HALF, INTERLEAVED, BLOCK, BLOCK_REST,
    )  # fmt: skip


def plan(
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
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch and the normed and rotated q and k, which are contiguous, whatever the strides of q and k are."""
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    q, k, cos, sin = dense(q), dense(k), dense(cos), dense(sin)
    tile = tile or Tile(**tuning.tile("norm_rope", tuning.ANY, target))
    grid, sizes, tiles, warps = sizes_and_tiles(q, k, cos, sin, tile, target)
    given = {
        "q_ptr": q, "k_ptr": k, "q_weight_ptr": q_weight.contiguous(), "k_weight_ptr": k_weight.contiguous(),
        "cos_ptr": cos, "sin_ptr": sin, "q_out_ptr": outputs[0], "k_out_ptr": outputs[1], "eps": eps,
    } | sizes  # fmt: skip
    narrow = why_narrow(tiles, interleaved)
    constants = tiles | {"INTERLEAVED": interleaved, "LAYER": norm == "layer"}
    launch = Launch(norm_rope_kernel, (grid,), given, constants, num_warps=warps, wide_loads=not narrow, narrow=narrow)
    return launch, *outputs


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: real and odd heads, with tables in float32."""
    for dtype, (H, K, D, R, interleaved) in shipped(HEADS, HEADS[:2], target):
        q, k = (torch.empty(2, 64, n, D, dtype=dtype, device="meta").transpose(1, 2) for n in (H, K))
        q_weight, k_weight = (torch.empty(n, D, dtype=dtype, device="meta") for n in (H, K))
        table = torch.empty(64, R // 2, device="meta")
        norm = "rms" if interleaved else "layer"
        kind = str(dtype).removeprefix("torch.") + (" interleaved" if interleaved else " half-split")
        launch = plan(q, k, q_weight, k_weight, table, table, 1e-5, norm, interleaved, target)[0]
        yield f"norm_rope {norm} {kind} H={H} K={K} D={D} R={R}", launch


@torch.library.custom_op("refllm::norm_rope", mutates_args=())
def _norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    norm: str,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("norm_rope", q):
        launch, q_out, k_out = plan(q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved, target_of(q.device))
        launch.run()
    return q_out, k_out


@_norm_rope.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    norm: str,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def norm_rope(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm over the D dims of each head with that head's own weight (q_weight [H, D], k_weight [K, D]), then `rope`.

    As `refllm.ops.norm_rope`, rounded once and not after the norm. norm: "rms" or "layer" (without bias). Weights and
    tables may be float32 beside a narrower q; strides are as for `rope`. Raises InputError for arguments that do not
    fit together.
    """
    arguments.check("norm_rope", q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, norm=norm)
    return _norm_rope(q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, eps, norm, interleaved)
