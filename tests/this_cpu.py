"""What the CPU at hand adds in which order. Tests of the last bit are skipped where torch runs other kernels.

Each probe multiplies rows whose sum comes out differently in every order that is in use: a large number and its
negative swallow the ones between them.
"""

import pytest
import torch


def _sum_of_products(terms: list[float], dtype: torch.dtype) -> float:
    """The sum of the terms, each split into two equal factors, as a matrix product of medium size adds it."""
    x = torch.tensor(terms)
    rows, columns = (x.sign() * x.abs().sqrt()).expand(64, -1), x.abs().sqrt().expand(64, -1)
    return float(torch.nn.functional.linear(rows.to(dtype), columns.to(dtype))[0, 0])


def _adds_in_the_known_order(dtype: str) -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # softmax adds in as many lanes as a register has
        return False
    large = 2.0**28
    if dtype == "bfloat16":  # pairs, the odd element first (one after another: 0, with AMX: 2)
        return _sum_of_products([1.0, large, 1.0, -large], torch.bfloat16) == 1
    terms = [1.0] * 64
    terms[0], terms[32] = large, -large
    if dtype == "float16":  # in registers of eight lanes, where no one meets a large number
        return _sum_of_products(terms, torch.float16) == 62
    return _sum_of_products(terms, torch.float32) == 31  # one after another: the first 31 are swallowed


def needs_known_order(dtype: str) -> pytest.MarkDecorator:
    """Skip unless torch adds on this CPU in the orders that `refllm.torch_cpu` emulates."""
    return pytest.mark.skipif(
        not _adds_in_the_known_order(dtype),
        reason=f"on this CPU torch adds {dtype} products or softmax in other orders",
    )


def every_dtype() -> list[object]:
    """The emulated dtypes, as parameters, each with its condition."""
    return [pytest.param(dtype, marks=needs_known_order(dtype)) for dtype in ("bfloat16", "float16", "float32")]
