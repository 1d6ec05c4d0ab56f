"""The precision in which the backward functions of this folder compute."""

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
