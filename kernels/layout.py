"""Views of tensors in the shapes that kernels walk over, without copies where strides allow it."""

import torch


def rows(x: torch.Tensor) -> torch.Tensor:
    """x as [N, E] over its last axis, which lies densely in memory; the rows may have any stride, 0 included."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
