"""The gradients of attention of the last few tokens over a cache, where each sequence has its own length.

    p = e^(scale q k^T - lse),   ds = p (do v^T - sum(do o)),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T do

Tiles: the kernels of attention_backward.py, in which the g S query rows of a key/value head (g = H / K) are one walk.
A program that holds slots from the length of its sequence on writes zeros and reads nothing. lse, which the forward
pass does not return, is computed again by the kernels of decode_attention.py, and lse_kernel adds up what they leave.
Batch: as in attention_backward.py; the size of the cache changes no bit either.
Traffic: every used slot of k and v twice, and once more for lse; every slot of dk and dv once. 14 H S D flops per slot.
A single program per key/value head finds dq: training through a cache is rare, and not what a GPU is filled with here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from refllm.kernels import arguments
from refllm.kernels.launch import Launch, on_device, stands_for_others
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.attention import finite_or_zero, fold, natural_log
from refllm.kernels.triton.attention_backward import TUNABLE, Tile, choose_tile, plan_gradients, results
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.decode_attention import CHUNK, COMBINED, read_length
from refllm.kernels.triton.decode_attention import plan as forward_plan

__all__ = ["TUNABLE", "Tile", "decode_attention_backward", "launches", "plan"]
_ALL = (True, True)


@triton.jit(do_not_specialize=["N", "splits"])  # a row's bits must not depend on the size of the cache
def lse_kernel(
    m_ptr, total_ptr, lengths_ptr, lse_ptr, lengths_stride, K, group, S, N, splits, unit, unit_rest,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the logarithm of the sum of 2^(m_i) total_i over its chunks i, as `combine_kernel` adds them up."""
    rows = group * S
    b = (tl.program_id(0) // (K * rows)).to(tl.int64)
    row = tl.program_id(0) % (K * rows)
    length, _ = read_length(lengths_ptr, b, lengths_stride, N)
    chunks = tl.cdiv(length, CHUNK)
    place = (b * K + row // rows) * splits * rows + row % rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, chunks, BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        top = tl.maximum(top, tl.load(m_ptr + place + i * rows, mask=i < chunks, other=float("-inf")))
    shift = finite_or_zero(tl.max(top, 0))
    totals = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        m = tl.load(m_ptr + place + i * rows, mask=i < chunks, other=float("-inf"))
        totals += tl.exp2(m - shift) * tl.load(total_ptr + place + i * rows, mask=i < chunks, other=0.0)
    lse = tl.fma(shift, unit, tl.fma(shift, unit_rest, natural_log(tl.sum(totals, 0))))
    tl.store(lse_ptr + b * K * rows + row, lse)


def _logarithms(combine: Launch, lse: torch.Tensor, scale: float) -> Launch:
    """The launch that writes lse [B, H, S], of what the first kernel of decode_attention.py left for the second."""
    names = ("m_ptr", "total_ptr", "lengths_ptr", "lengths_stride", "K", "group", "S", "N", "splits")
    given = {name: combine.arguments[name] for name in names} | {"lse_ptr": lse}
    folded = fold(scale)
    given |= {"unit": folded["unit"], "unit_rest": folded["unit_rest"]}
    return Launch(lse_kernel, (lse.numel(),), given, {"CHUNK": CHUNK, "BLOCK": COMBINED}, num_warps=1)


def plan(
    do: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    o: torch.Tensor | None, lse: torch.Tensor | None, scale: float | None, target: Target = DEFAULT,
    tile: Tile | None = None, needed: Sequence[bool] = _ALL,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launches in their order, and dq, dk_cache, dv_cache, which lie as [B, S, heads, D] in memory.

    Without o or lse the first three launches are the forward pass, and lse of what that leaves in its workspace.
    needed: as in attention_backward.py.
    """
    before: tuple[Launch, ...] = ()
    if o is None or lse is None:
        (split, combine), o_again = forward_plan(q, k_cache, v_cache, lengths, scale, target)
        lse_again = q.new_empty(q.shape[:3], dtype=torch.float32)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        before = split, combine, _logarithms(combine, lse_again, scale)
        o, lse = o_again if o is None else o, lse_again if lse is None else lse
    # Rows of several heads have addresses of their own, which take registers: a tile that fills them holds half.
    chosen = choose_tile(q.shape[3], q.dtype, target)
    fuller = "queries" if q.element_size() == 2 else "keys"
    tile = tile or chosen._replace(**{fuller: max(16, getattr(chosen, fuller) // 2)})
    given = do, q, k_cache, v_cache, o, lse, None, scale, True, None, lengths
    steps, *gradients = plan_gradients(*given, needed, target, tile)
    return [*before, *steps], gradients[0], gradients[1], gradients[2]


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Configurations that ship, of what differs from attention_backward.py, for caches [B, N, K, D]."""
    others = ((torch.float32, 128, 4, 1),) if stands_for_others(target) else ()
    for dtype, D, group, S in ((torch.bfloat16, 128, 4, 8), *others):
        q = torch.empty(2, S, 2 * group, D, dtype=dtype, device="meta").transpose(1, 2)
        cache = torch.empty(2, 4096, 2, D, dtype=dtype, device="meta").transpose(1, 2)
        lengths = torch.empty(2, dtype=torch.int64, device="meta")
        name = f"decode_attention_backward {str(dtype).removeprefix('torch.')} D={D} {group * S} rows"
        _split, _combine, logarithms, _rows, *steps = plan(q, q, cache, cache, lengths, None, None, 0.1, target)[0]
        for launch in (logarithms, *steps):
            yield f"{name}, {launch.kernel.__name__.removesuffix('_kernel')}", launch


@torch.library.custom_op("refllm::decode_attention_backward", mutates_args=())
def _decode_attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    o: torch.Tensor | None,
    lse: torch.Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if lengths.device.type == "cpu":
        arguments.lengths_exist("decode_attention_backward", lengths, k_cache.shape[2])
    with on_device("decode_attention_backward", q):
        target = target_of(q.device)
        steps, *gradients = plan(do, q, k_cache, v_cache, lengths, o, lse, scale, target, None, needed)
        for step in steps:
            step.run()
    return gradients[0], gradients[1], gradients[2]


@_decode_attention_backward.register_fake
def _(do, q, k_cache, v_cache, lengths, o, lse, scale, needed):
    return results(q, k_cache, v_cache, needed)


only_once("decode_attention_backward")


def _kept(inputs: tuple[Any, ...], output: torch.Tensor) -> tuple[Any, ...]:
    q, k_cache, v_cache, lengths, scale = inputs
    return q, k_cache, v_cache, lengths, output, None, scale


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    (do,) = incoming
    assert do is not None
    found = _decode_attention_backward(do, *kept, [needed[0], needed[1] or needed[2]])
    return (*(if_needed(*each) for each in zip(needed, found, strict=False)), None, None)


differentiable("decode_attention", _kept, _gradients)


def decode_attention_backward(
    do_BHSD: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_cache_BKND: torch.Tensor,
    v_cache_BKND: torch.Tensor,
    lengths_B: torch.Tensor,
    o_BHSD: torch.Tensor | None = None,
    lse_BHS: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk_cache, dv_cache of `decode_attention`, in the dtype of q: 0 in the slots from lengths_B[b] on, which are
    never read.

    As `refllm.ops.decode_attention_backward`. o_BHSD, lse_BHS (float32): of the forward pass; None: computed again. Any
    strides, copied only where the last axis is not dense.
    Raises InputError for arguments that do not fit together, and for lengths outside 0..N if they are on the CPU; on a
    GPU, where looking would mean to wait, dq of such a sequence becomes NaN, and nothing out of bounds is read.
    """
    operator = "decode_attention_backward"
    arguments.decode_attention(operator, q_BHSD, k_cache_BKND, v_cache_BKND, lengths_B)
    arguments.incoming(operator, q_BHSD, do=do_BHSD)
    arguments.kept(operator, q_BHSD, o_BHSD, lse_BHS)
    scale = q_BHSD.shape[-1] ** -0.5 if scale is None else float(scale)
    given = do_BHSD, q_BHSD, k_cache_BKND, v_cache_BKND, lengths_B, o_BHSD, lse_BHS, scale
    return _decode_attention_backward(*given, list(_ALL))
