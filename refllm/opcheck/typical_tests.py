"""Tests of kernels as they are usually written, to be audited beside our own check (docs/mutants.md).

One call on normally distributed numbers of a round shape, densely stored, compared with plain Torch by one tolerance.
"""

from collections.abc import Callable
from typing import Any

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
    import torch

    from refllm.kernels import plain

    arguments, keywords = _call(operator, getattr(torch, dtype))
    want = getattr(plain, operator)(*arguments, **keywords)
    arguments, keywords = _call(operator, getattr(torch, dtype))  # in case that fn writes into its inputs
    got = fn(*arguments, **keywords)
    pairs = [x if isinstance(x, tuple) else (x,) for x in (got, want)]
    return list(zip(*pairs, strict=True))


def _call(operator: str, dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    """What somebody writes who wants one call of an operator."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(dtype)

    B, H, K, S, D, E, V = 2, 8, 2, 128, 64, 1024, 1000
    angles = torch.outer(torch.arange(S), 1e4 ** (-torch.arange(0, D, 2) / D))
    table = [angles.cos().to(dtype), angles.sin().to(dtype)]
    q, k, v = randn(B, H, S, D), randn(B, K, S, D), randn(B, K, S, D)
    labels = torch.randint(V, (64,), generator=generator)
    x, residual, weight = randn(4, E), randn(4, E), randn(E)
    calls: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "rms_norm": ([x, weight, 1e-6], {}),
        "add_rms_norm": ([x, residual, weight, 1e-6], {}),
        "layer_norm": ([x, weight, randn(E), 1e-5], {}),
        "add_layer_norm": ([x, residual, weight, randn(E), 1e-5], {}),
        "rope": ([q, k, *table], {"interleaved": False}),
        "norm_rope": ([q, k, randn(H, D), randn(K, D), *table, 1e-5], {"norm": "rms", "interleaved": False}),
        "rms_norm_qkv_rope": (
            [randn(B, S, 256), randn(256), randn((H + 2 * K) * D, 256) / 16, None, *table, 1e-6],
            {"num_heads": H, "num_kv_heads": K, "interleaved": False},
        ),
        "attention": ([q, k, v], {}),
        "decode_attention": ([q[:, :, :1].contiguous(), k, v, torch.full((B,), S)], {}),
        "swiglu": ([x, residual], {}),
        "relu2": ([x], {}),
        "cross_entropy": ([randn(64, V), labels], {}),
        "linear_cross_entropy": ([randn(64, 256), randn(V, 256) / 16, labels], {}),
    }
    return calls[operator]
