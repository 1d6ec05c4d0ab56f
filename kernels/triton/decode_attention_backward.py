"""The gradients of attention of the last few tokens over a cache, where each sequence has its own length.

    p = e^(scale q k^T - lse),   ds = p (do v^T - sum(do o)),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T do

Tiles: the kernels of attention_backward.py, in which the g S query rows of a key/value head (g = H / K) are one walk.
A program that holds slots from the length of its sequence on writes zeros and reads nothing. lse, which the forward
pass does not return, is computed again by the kernels of decode_attention.py.
Batch: as in attention_backward.py; the size of the cache changes no bit either.
Traffic: every used slot of k and v twice, and once more for lse; every slot of dk and dv once. 14 H S D flops per slot.
A single program per key/value head finds dq: training through a cache is rare, and not what a GPU is filled with here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from refllm.kernels import arguments
from refllm.kernels.launch import Launch, on_device, stands_for_others
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.attention_backward import TUNABLE, Tile, plan_gradients, results
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.decode_attention import plan as forward_plan

__all__ = ["TUNABLE", "Tile", "decode_attention_backward", "launches", "plan"]
_ALL = (True, True)


def plan(
    do: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    o: torch.Tensor | None, lse: torch.Tensor | None, scale: float | None, target: Target = DEFAULT,
    tile: Tile | None = None, needed: Sequence[bool] = _ALL,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launches in their order, and dq, dk_cache, dv_cache, which lie as [B, S, heads, D] in memory.

    Without o or lse the first two launches are the forward pass. needed: as in attention_backward.py.
    """
    before: tuple[Launch, ...] = ()
    if o is None or lse is None:
        (split, combine), o_again = forward_plan(q, k_cache, v_cache, lengths, scale, target)
        lse_again = q.new_empty(q.shape[:3], dtype=torch.float32)
        before = split, replace(combine, arguments={**combine.arguments, "lse_ptr": lse_again})
        o, lse = o_again if o is None else o, lse_again if lse is None else lse
    given = do, q, k_cache, v_cache, o, lse, None, scale, True, None, lengths
    steps, *gradients = plan_gradients(*given, needed, target, tile)
    return [*before, *steps], gradients[0], gradients[1], gradients[2]


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Configurations that ship, of what differs from attention_backward.py: some head dimensions, for caches
    [B, N, K, D], and the forward pass that also writes lse."""
    half = torch.bfloat16
    others = ((torch.float32, 128, 4, 1),) if stands_for_others(target) else ()
    for dtype, D, group, S in ((half, 128, 4, 8), (half, 256, 4, 1), *others):
        q = torch.empty(2, S, 2 * group, D, dtype=dtype, device="meta").transpose(1, 2)
        cache = torch.empty(2, 4096, 2, D, dtype=dtype, device="meta").transpose(1, 2)
        lengths = torch.empty(2, dtype=torch.int64, device="meta")
        name = f"decode_attention_backward {str(dtype).removeprefix('torch.')} D={D} {group * S} rows"
        _, combine, _, *steps = plan(q, q, cache, cache, lengths, None, None, 0.1, target)[0]
        for launch in (combine, *steps):
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
