"""The matrix products that a forward pass does, done again with nothing between them: what is left to win around them.

They are recorded from a real call (sizes, weights, in which thread), and repeated on the same weights by the same
library. Inputs are random numbers, results go to memory that is there already.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from refllm.parallel import for_each


class _Product(NamedTuple):
    a: np.ndarray
    b: np.ndarray
    out: np.ndarray

    def __call__(self) -> None:
        np.matmul(self.a, self.b, out=self.out)


def of_numpy(model: Any, forward: Callable[[], None]) -> Callable[[], None]:
    """Those of the reference `model`. forward: runs it once."""
    found: list[_Product] = []
    buffers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def buffer(what: str, shape: tuple[int, ...]) -> np.ndarray:
        drawn = np.random.default_rng(0).standard_normal
        return buffers.setdefault((what, shape), buffers.get((what, shape), drawn(shape, np.float32)))

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        y = np.matmul(a, b)
        # Attention's products are done by several threads at a time: each needs results of its own.
        found.append(_Product(buffer("in", a.shape), b, buffer("out", y.shape) if a.ndim == 2 else np.empty_like(y)))
        return y

    before = model.arithmetic
    model.arithmetic = replace(before, product=product)
    try:
        forward()
    finally:
        model.arithmetic = before
    alone, shared = [p for p in found if p.a.ndim == 2], [p for p in found if p.a.ndim > 2]

    def job() -> None:
        for each in alone:
            each()
        for_each(_Product.__call__, shared)

    return job


def of_torch(forward: Callable[[], None]) -> Callable[[], None]:
    """Those with weights of a fast model (attention is an operator of its own there). forward: runs it once."""
    from unittest.mock import patch

    import torch

    from refllm.kernels.models import products

    linear, found, inputs = products.linear, list[tuple[Any, Any]](), dict[Any, Any]()

    def recorded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found.append((inputs.setdefault((x.shape, x.dtype), torch.randn(x.shape).to(x.dtype)), weight))
        return linear(x, weight, bias)

    with patch.object(products, "linear", recorded):
        forward()

    def job() -> None:
        with torch.no_grad():
            for x, weight in found:
                linear(x, weight)

    return job
