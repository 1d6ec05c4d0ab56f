"""Views of tensors in the shapes that kernels walk over, without copies where strides allow it."""

import math

import torch

CHUNK = 16
"""What Triton wants to divide a stride, in elements, before it lets a thread load 16 bytes at a time."""


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last axis dense in memory: x itself, or a copy where that axis has another stride than 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x as [N, E] over its last axis, which lies densely in memory; the rows may have any stride, 0 included.

    A copy only where the last axis is not dense, or where no single stride leads from row to row.
    """
    return dense(x).reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)


def chunk_length(length: int, *tensors: torch.Tensor | None) -> int:
    """What divides `CHUNK`, `length` and every stride but those of the last axes (None has none).

    In pieces of so many elements, each row is aligned as its tensor is.
    """
    strides = [stride for x in tensors if x is not None for stride in x.stride()[:-1]]
    return math.gcd(CHUNK, length, *strides)


def flat_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one shape, for work that knows no rows: each as one row [1, all] if all are dense, else as `rows`."""
    flat = all(x.is_contiguous() for x in tensors)
    return [x.reshape(1, -1) if flat else rows(x) for x in tensors]
