"""Tests of kernels as they are usually written, to be audited beside our own check (docs/mutants.md).

One call on normally distributed numbers of a round shape, densely stored, compared with plain Torch by one tolerance.
"""

from collections.abc import Callable
from typing import Any

from refllm.ops.contracts import ROWS, contract_of

Test = Callable[[Callable[..., Any]], None]


def typical_tests(operator: str) -> dict[str, Test]:
    """Name -> test(fn), for one operator."""
    import torch

    def allclose(dtype: str) -> Test:
        def test(fn: Callable[..., Any]) -> None:
            for got, want in _results(operator, fn, dtype):
                assert torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2)

        return test

    def assert_close(dtype: str) -> Test:
        def test(fn: Callable[..., Any]) -> None:
            for got, want in _results(operator, fn, dtype):
                torch.testing.assert_close(got, want)

        return test

    return {
        "allclose 1e-2, bfloat16": allclose("bfloat16"),
        "assert_close, bfloat16": assert_close("bfloat16"),
        "assert_close, float32": assert_close("float32"),
    }


def _results(operator: str, fn: Callable[..., Any], dtype: str) -> list[tuple[Any, Any]]:
    """(result, what plain Torch returns) per output, on the same numbers."""
    from refllm.kernels import plain

    arguments, keywords = _call(operator, dtype)
    want = getattr(plain, operator)(*arguments, **keywords)
    arguments, keywords = _call(operator, dtype)  # in case that fn writes into its inputs
    got = fn(*arguments, **keywords)
    pairs = [x if isinstance(x, tuple) else (x,) for x in (got, want)]
    return list(zip(*pairs, strict=True))


def _call(operator: str, dtype: str) -> tuple[list[Any], dict[str, Any]]:
    """What somebody writes who wants one call: densely stored, rows in one axis, no bias of a product."""
    from refllm.kernels.calls import Source, call

    known = contract_of(operator)
    axes = next(iter(known.arguments.values()))
    B, S = (1, 4) if ROWS in axes else (1, 64) if "N" in axes else (2, 1 if "lengths" in known.arguments else 128)
    sizes = {"B": B, "S": S, "N": 128, "H": 8, "K": 2, "D": 64, "R": 64, "E": 1024, "F": 1024, "V": 1000}
    made, keywords = call(operator, sizes, Source(dtype, "cpu", 0), bias=not known.product, norm="rms", eps=1e-6)
    given = known.bound(made, {})
    for name, axes in known.arguments.items():
        if given[name] is not None:
            given[name] = (given[name].flatten(0, -2) if ROWS in axes else given[name]).contiguous()
    return [given[name] for name, _ in zip(given, made, strict=False)], keywords
