"""The backward pass of the rotary embedding of q and k, in one launch.

    (da, db) -> (da cos + db sin, db cos - da sin)        for the R/2 pairs of each head; dims R..D-1 are copied

A rotation keeps lengths, so its transpose is the rotation back: the kernel, its tiles and its traffic are those of
rope.py with -sin in the place of sin. Nothing of the forward pass is needed but the tables, which have no gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from refllm.kernels import arguments
from refllm.kernels.launch import Launch, on_device, shipped
from refllm.kernels.targets import DEFAULT, Target, target_of
from refllm.kernels.triton.autograd import Gradients, differentiable, if_needed, only_once
from refllm.kernels.triton.rope import HEADS, TUNABLE, Tile
from refllm.kernels.triton.rope import plan as plan_rotation

__all__ = ["TUNABLE", "Tile", "launches", "plan", "rope_backward"]


def plan(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool,
    target: Target = DEFAULT, tile: Tile | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launch, dq and dk turned back; both are contiguous."""
    return plan_rotation(dq, dk, cos, sin, interleaved, target, tile, back=True)


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration that ships, by a name for it: Helium's and StableLM's heads, and others in bfloat16."""
    for dtype, (H, K, D, R, interleaved) in shipped((HEADS[0], HEADS[2], HEADS[4], HEADS[7]), HEADS[:1], target):
        dq, dk = (torch.empty(2, 64, n, D, dtype=dtype, device="meta").transpose(1, 2) for n in (H, K))
        table = torch.empty(64, R // 2, device="meta")
        kind = str(dtype).removeprefix("torch.") + (" interleaved" if interleaved else " half-split")
        yield f"rope_backward {kind} H={H} K={K} D={D} R={R}", plan(dq, dk, table, table, interleaved, target)[0]


@torch.library.custom_op("refllm::rope_backward", mutates_args=())
def _rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with on_device("rope_backward", dq):
        launch, *found = plan(dq, dk, cos, sin, interleaved, target_of(dq.device))
        launch.run()
    return found[0], found[1]


@_rope_backward.register_fake
def _(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape)


def _gradients(needed: Sequence[bool], incoming: Gradients, *kept: Any) -> Gradients:
    """dq and dk; where one of them is not asked for, or has no incoming gradient, it goes in as no heads at all."""
    given = next(d for d in incoming if d is not None)
    there = [asked and d is not None for asked, d in zip(needed, incoming, strict=False)]
    heads = [given[:, :0] if d is None or not has else d for has, d in zip(there, incoming, strict=True)]
    found = _rope_backward(*heads, *kept)
    return *(if_needed(has, d) for has, d in zip(there, found, strict=True)), None, None, None


only_once("rope_backward")
differentiable("rope", lambda inputs, _: inputs[2:], _gradients, without=("cos", "sin"))


def rope_backward(
    dq_BHSD: torch.Tensor, dk_BKSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq and dk of `rope`: pair i turned back; dims R..D-1 are bit-equal. As `refllm.ops.rope_backward`.

    cos, sin: as for `rope`. The incoming gradients may have any strides; both results are contiguous. Raises InputError
    for arguments that do not fit together.
    """
    arguments.check("rope_backward", dq_BHSD, dk_BKSD, cos, sin)
    return _rope_backward(dq_BHSD, dk_BKSD, cos, sin, interleaved)
