"""Which of torch's kernels run on the CPU at hand. Tests of the last bit are skipped where they are not the known ones.

A probe looks at torch alone, never at what is tested: it multiplies rows whose sum comes out differently in every order
that is in use, since a large number and its negative swallow what is added between them. (`refllm info` asks the other
question, whether refllm's results are torch's. On a CPU with known kernels the tests say that they must be.)
"""

from functools import cache

import pytest
import torch

# Sums of [1, L, 1, -L]; of 600 numbers, L and -L in the middle, as one of many rows; of 600, far apart, as one row.
KNOWN = {
    "bfloat16": {(1, 584, 89): "oneDNN's with vdpbf16ps", (0, 552, 568): "torch's own"},
    "float16": {(0, 552, 568): "torch's own"},
}
LARGE = 2.0**28


def _sum_of_products(terms: list[float], dtype: torch.dtype, rows: int) -> int:
    """The sum of the terms, each split into two equal factors, as a matrix product of medium size adds it."""
    x = torch.tensor(terms)
    left, right = (x.sign() * x.abs().sqrt()).expand(rows, -1), x.abs().sqrt().expand(64, -1)
    return int(torch.nn.functional.linear(left.to(dtype), right.to(dtype))[0, 0])


def _ones_and(length: int, plus: int, minus: int) -> list[float]:
    terms = [1.0] * length
    terms[plus], terms[minus] = LARGE, -LARGE
    return terms


@cache
def unknown_kernels(dtype: str) -> str:
    """Why torch's bits are not promised here, or nothing."""
    if (found := torch.backends.cpu.get_cpu_capability()) not in ("AVX2", "AVX512"):
        return f"no AVX2: torch runs its {found} kernels"
    kind = getattr(torch, dtype)
    sums = (
        _sum_of_products([1.0, LARGE, 1.0, -LARGE], kind, 64),
        _sum_of_products(_ones_and(600, 299, 300), kind, 64),
        _sum_of_products(_ones_and(600, 1, 511), kind, 1),
    )
    return "" if sums in KNOWN[dtype] else f"{dtype} products are added in an order that is not known: {sums}"


def same_bits(dtype: str) -> pytest.MarkDecorator:
    """Skip unless the kernels behind Transformers in this dtype are known ones."""
    return pytest.mark.skipif(bool(unknown_kernels(dtype)), reason=unknown_kernels(dtype))


def every_dtype() -> list[object]:
    """The narrow dtypes, as parameters, each with its condition."""
    return [pytest.param(dtype, marks=same_bits(dtype)) for dtype in ("bfloat16", "float16")]


avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no AVX2: torch runs none of its vector kernels",
)
