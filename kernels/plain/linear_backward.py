"""The gradients of a matrix product and of an embedding in plain Torch: float32 inside, one rounding at the end."""

import torch

from refllm.kernels.plain.wide import wide


def linear_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx = dy W, dW = dy^T x, db = sum dy over rows: dy [..., O], x [..., I], weight [O, I]. db is None without bias.

    As `refllm.ops.linear_backward`.
    """
    dx = wide(dy) @ wide(weight)
    rows_NO, rows_NI = wide(dy).flatten(0, -2), wide(x).flatten(0, -2)
    dweight = rows_NO.mT @ rows_NI
    return dx.to(x.dtype), dweight.to(weight.dtype), None if bias is None else rows_NO.sum(0).to(bias.dtype)


def embedding_backward(dy: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dW[v] = sum of dy over the places where ids is v, 0 for rows never read: dy [..., E], ids [...], weight [V, E].

    As `refllm.ops.embedding_backward`.
    """
    dweight = wide(weight.new_zeros(weight.shape))
    return dweight.index_add(0, ids.flatten(), wide(dy).flatten(0, -2)).to(weight.dtype)
