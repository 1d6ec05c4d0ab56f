"""Results of a backward kernel against its definition in the same precision, as a ratio of root mean square errors."""

from typing import Any

import numpy as np
import torch

from refllm.inputs import to_numpy
from refllm.ops.contracts import contract_of, without_axes
from refllm.precision import EXACT, FUSED, Arithmetic

LIMIT = 1.25
NOISE = 1e-6
"""What float32 sums leave where a gradient is exactly 0, as for a single key: in a narrow format no error at all."""


def assert_as_the_definition(operator: str, found: tuple[Any, ...], arguments: Any, keywords: dict[str, Any]) -> None:
    """Every result has the shape and the dtype of what it is the gradient of, and at most `LIMIT` times the error."""
    known: Any = contract_of(operator)
    given = [to_numpy(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    names = {without_axes(name): name for name in _parameters(known)}
    named = {names[name]: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    dtype = str(arguments[0].dtype).removeprefix("torch.")
    exact, same = (known.definition(*given, **named, ar=ar) for ar in (EXACT, Arithmetic(dtype, FUSED)))
    of = known.bound(arguments, keywords)
    for name, x, right, like in zip(known.outputs, found, exact, same, strict=True):
        if x is None:
            assert right is None, name
            continue
        tensor = of[known.like(name)]
        assert (x.shape, x.dtype) == (tensor.shape, tensor.dtype), name
        error, unit = _rms(to_numpy(x) - right), _rms(like - right)
        limit = LIMIT * unit + (0 if dtype == "float32" else NOISE)
        assert error <= limit, (operator, name, dtype, error / max(unit, 1e-30))


def _parameters(known: Any) -> tuple[str, ...]:
    code = known.definition.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0
