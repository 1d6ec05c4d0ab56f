"""Kernels of another library, untouched: Liger-Kernel's, forward and backward, on the interpreter with all its checks.

Forward results are held against the contracts in refllm.ops where the operator is the same one; Liger rounds more often
than those allow in two places, which is measured. Gradients are held against Torch in float64.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'refllm[test]'")

import torch.nn.functional as F  # noqa: E402
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # noqa: E402
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # noqa: E402
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction  # noqa: E402
from liger_kernel.ops.geglu import LigerGELUMulFunction  # noqa: E402
from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # noqa: E402
from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction  # noqa: E402
from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # noqa: E402
from liger_kernel.ops.rope import LigerRopeFunction  # noqa: E402
from liger_kernel.ops.softmax import LigerSoftmaxFunction  # noqa: E402
from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # noqa: E402

from refllm import ops  # noqa: E402
from refllm.kernels.interpreter import interpreted  # noqa: E402
from refllm.kernels.verify import as_array, assert_meets_contract, judge  # noqa: E402
from refllm.precision import EXACT, HF_EAGER, Arithmetic  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
LABELS = torch.tensor([1, 2, 3, -100, 0, 5])


@pytest.fixture(autouse=True)
def _inside() -> Iterator[None]:
    with interpreted():
        yield


def draw(dtype: Any, *shapes: tuple[int, ...]) -> list[Any]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def rms_norm(mode: str) -> Callable[..., Any]:
    # Modes differ in what is rounded: "gemma" computes in float32 throughout, "llama" rounds before the weight.
    return lambda x, w: LigerRMSNormFunction.apply(x.clone(), w, EPS, 0.0, mode, False)


def tables(S: int, D: int) -> tuple[Any, Any]:
    angle = torch.outer(torch.arange(S, dtype=torch.float64), 10000 ** -(torch.arange(0, D, 2) / D))
    return angle.cos(), angle.sin()


# -- forward, against the contracts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_meets_the_contracts(dtype: Any) -> None:
    x, r, w, b = draw(dtype, (16, 300), (16, 300), (300,), (300,))
    assert_meets_contract("rms_norm", rms_norm("gemma")(x, w), x, w, EPS)
    assert_meets_contract("layer_norm", LigerLayerNormFunction.apply(x.clone(), w, b, EPS), x, w, b, EPS)
    added = LigerFusedAddRMSNormFunction.apply(x.clone(), r.clone(), w, EPS, 0.0, "gemma", False)
    assert_meets_contract("add_rms_norm", added, x, r, w, EPS)
    assert_meets_contract("relu2", LigerReLUSquaredFunction.apply(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_with_float32_tables_meets_the_contract(dtype: Any) -> None:
    q, k = draw(dtype, (2, 4, 7, 64), (2, 2, 7, 64))
    cos, sin = (t.float() for t in tables(7, 64))
    rotated = LigerRopeFunction.apply(q.clone(), k.clone(), *(torch.cat([t, t], -1)[None] for t in (cos, sin)))
    assert_meets_contract("rope", rotated, q, k, cos, sin, interleaved=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_meet_the_contracts(dtype: Any) -> None:
    # One number per row, so that the error is not that of a single rounding.
    logits, h, w = draw(dtype, (64, 1000), (64, 48), (300, 48))
    labels = torch.arange(64)
    loss = LigerCrossEntropyFunction.apply(logits.clone(), labels, None, -100, 0.0, 0.0, "none")[0]
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    assert rms(loss, exact) < (2e-7 if dtype is torch.float32 else 1.5 * torch.finfo(dtype).eps) * rms(exact, 0 * exact)
    fused = LigerFusedLinearCrossEntropyFunction.apply(h.clone(), w.clone(), labels)[0]
    torch.testing.assert_close(fused.double(), F.cross_entropy((h @ w.T).double(), labels), rtol=1e-6, atol=1e-3)


def rms(x: Any, reference: Any) -> float:
    return float((x.double() - reference.double()).square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_where_liger_rounds_twice_its_error_is_that_of_two_roundings(dtype: Any) -> None:
    """Before the weight of RMSNorm ("llama"), after the SiLU, in the products of RoPE with 16-bit tables.

    The contracts round once; the eager policy rounds at these places too, and there Liger is as good as it.
    """
    x, up, w = draw(dtype, (16, 300), (16, 300), (300,))
    q, k = draw(dtype, (2, 4, 7, 64), (2, 2, 7, 64))
    cos, sin = (t.to(dtype) for t in tables(7, 64))
    wide = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    cases: list[tuple[str, Any, tuple[Any, ...], dict[str, Any], float]] = [
        ("rms_norm", rms_norm("llama")(x, w), (x, w, EPS), {}, 1.3),
        ("swiglu", LigerSiLUMulFunction.apply(x.clone(), up.clone()), (x, up), {}, 1.3),
        ("rope", LigerRopeFunction.apply(q.clone(), k.clone(), *wide), (q, k, cos, sin), {"interleaved": False}, 1.02),
    ]
    for name, result, arguments, keywords, least in cases:
        verdict = judge(name, result, *arguments, **keywords)[0]
        assert least < verdict.ratio < 1.5, verdict
        got = result[0] if isinstance(result, tuple) else result
        exact, eager = (_contract(name, ar, arguments, keywords) for ar in (EXACT, Arithmetic(_name(dtype), HF_EAGER)))
        size, unit = (np.sqrt(np.mean((as_array(e) - exact) ** 2)) for e in (got, eager))
        assert size < 1.1 * unit, name


def _name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.")


def _contract(name: str, ar: Arithmetic, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> np.ndarray:
    out = getattr(ops, name)(*map(as_array, arguments), **keywords, ar=ar)
    return np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)


# -- backward, against Torch in float64 --------------------------------------------------------------------------------


def errors(function: Callable[..., Any], reference: Callable[..., Any], *inputs: Any) -> list[float]:
    """Relative errors of the gradients of all inputs, for random gradients of all outputs."""
    exact = [x.double().requires_grad_() for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs, expected = (y if isinstance(y, tuple) else (y,) for y in (function(*leaves), reference(*exact)))
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, [g.clone() for g in given])  # Liger writes over them
    torch.autograd.backward(expected, [g.double() for g in given])
    pairs = [(x.grad.double(), e.grad) for x, e in zip(leaves, exact, strict=True)]
    return [float((got - want).norm() / want.norm()) for got, want in pairs]


def half_turned(x: Any) -> Any:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rope(dtype: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in tables(7, 64))

    def exact(q: Any, k: Any) -> Any:
        return tuple(x * cos.double() + half_turned(x) * sin.double() for x in (q, k))

    return lambda q, k: LigerRopeFunction.apply(q.clone(), k.clone(), cos[None], sin[None]), exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: Any) -> None:
    limit = 3 * torch.finfo(dtype).eps
    rows, row, heads = (6, 96), (96,), ((1, 4, 7, 64), (1, 2, 7, 64))
    x, y, w, b = draw(dtype, rows, rows, row, row)
    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any]]] = {
        "rms_norm": (rms_norm("llama"), lambda x, w: F.rms_norm(x, row, w, EPS), [x, w]),
        "layer_norm": (
            lambda x, w, b: LigerLayerNormFunction.apply(x.clone(), w, b, EPS),
            lambda x, w, b: F.layer_norm(x, row, w, b, EPS),
            [x, w, b],
        ),
        "add_rms_norm": (
            lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x.clone(), r.clone(), w, EPS, 0.0, "llama", False),
            lambda x, r, w: (F.rms_norm(x + r, row, w, EPS), x + r),
            [x, y, w],
        ),
        "swiglu": (
            lambda a, b: LigerSiLUMulFunction.apply(a.clone(), b.clone()),
            lambda a, b: F.silu(a) * b,
            [x, y],
        ),
        "geglu": (
            lambda a, b: LigerGELUMulFunction.apply(a.clone(), b.clone()),
            lambda a, b: F.gelu(a, approximate="tanh") * b,
            [x, y],
        ),
        "softmax": (LigerSoftmaxFunction.apply, lambda x: F.softmax(x, -1), [x]),
        "rope": (*rope(dtype), draw(dtype, *heads)),
        "cross_entropy": (
            lambda x: LigerCrossEntropyFunction.apply(x.clone(), LABELS, None, -100)[0],
            lambda x: F.cross_entropy(x, LABELS),
            draw(dtype, (6, 500)),
        ),
    }
    measured = {name: errors(*case[:2], *case[2]) for name, case in cases.items()}
    assert {name: e for name, e in measured.items() if max(e) > limit} == {}
