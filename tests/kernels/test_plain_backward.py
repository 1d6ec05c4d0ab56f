"""The gradients in plain Torch are those of the definitions, in the dtypes of what they belong to."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from refllm import ops
from refllm.errors import InputError
from refllm.kernels import plain

Call = tuple[str, list[Any], dict[str, Any]]
_LABELS = torch.tensor([1, -100, 3, 10, 0, -100, 2])
_KEYS = torch.arange(18).view(2, 9) % 4 > 0


def _calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every function, on odd shapes: several axes of rows, grouped heads, partial rotation, more and fewer keys."""
    seed = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seed).to(dtype)

    def like(*xs: torch.Tensor) -> list[torch.Tensor]:
        return [some(*x.shape) for x in xs]

    x, w = some(3, 5, 33), some(33)
    dy, dsum, residual, b = *like(x, x, x), some(33)
    yield "rms_norm_backward", [dy, x, w.float(), 1e-5], {}
    yield "layer_norm_backward", [dy, x, w, b, 1e-5], {}
    yield "layer_norm_backward", [dy, x, w, None, 1e-5], {}
    yield "swiglu_backward", [dy, x, residual], {}
    yield "relu2_backward", [dy, x], {}
    q, k = some(2, 4, 6, 10), some(2, 2, 6, 10)
    angles = torch.randn(2, 6, 4, generator=seed)
    tables = [angles.cos(), angles.sin()]
    for interleaved, norm in ((True, "rms"), (False, "layer")):
        yield "rope_backward", [*like(q, k), *tables], {"interleaved": interleaved}
        weights = [some(4, 10), some(2, 10)]
        yield (
            "norm_rope_backward",
            [*like(q, k), q, k, *weights, *tables, 1e-5],
            {"norm": norm, "interleaved": interleaved},
        )
    for causal, mask, T in ((True, None, 9), (False, _KEYS, 9), (True, _KEYS[:, :4], 4), (True, None, 6)):
        keys = [some(2, 2, T, 10), some(2, 2, T, 10)]
        yield "attention_backward", [*like(q), q, *keys], {"causal": causal, "key_mask": mask}
    kept = plain.attention(q, *keys, return_lse=True)
    if dtype == torch.float32:  # in a narrow format o, and what is rounded between two operators, is what it is
        yield "attention_backward", [*like(q), q, *keys, *kept], {}
        yield "add_rms_norm_backward", [dy, dsum, x, residual, w, 1e-5], {}
        yield "add_layer_norm_backward", [dy, dsum, x, residual, w, b, 1e-5], {}
        heads = {"num_heads": 4, "num_kv_heads": 2, "interleaved": True}
        matrix = [some(2, 6, 20), some(20), some(80, 20), some(80)]
        yield "rms_norm_qkv_rope_backward", [*like(q, k, k), *matrix, *tables, 1e-5], heads
    yield "decode_attention_backward", [*like(q), q, *keys, torch.tensor([0, 5])], {}
    for reduction in ("mean", "sum", "none"):
        dloss = torch.linspace(-1, 2, 7) if reduction == "none" else torch.tensor(1.7)
        how = {"reduction": reduction, "ignore_index": -100}
        yield "cross_entropy_backward", [dloss, 3 * some(7, 11), _LABELS], how
        if dtype == torch.float32:
            yield "linear_cross_entropy_backward", [dloss, some(7, 5), some(11, 5), _LABELS], how
    yield "linear_backward", [some(3, 4, 6), some(3, 4, 5), some(6, 5), some(6)], {}
    yield "embedding_backward", [some(3, 4, 6), torch.arange(12).view(3, 4) % 3, some(5, 6)], {}
    yield "softmax_backward", [some(3, 6), some(3, 6).softmax(-1)], {}


def _array(x: Any) -> Any:
    return (x.double() if x.is_floating_point() else x).numpy() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)])
def test_gradients_are_those_of_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    tried = set()
    for name, arguments, keywords in _calls(dtype):
        got = getattr(plain, name)(*arguments, **keywords)
        wanted = getattr(ops, name)(*map(_array, arguments), **{key: _array(x) for key, x in keywords.items()})
        pairs = [x if isinstance(x, tuple) else (x,) for x in (got, wanted)]
        for one, right in zip(*pairs, strict=True):
            assert (one is None) == (right is None), name
            if one is not None:
                assert one.shape == right.shape, name
                np.testing.assert_allclose(_array(one), right, atol=tolerance * max(1.0, np.abs(right).max()), rtol=0)
        tried.add(name)
    assert tried == set(plain.BACKWARD) - (
        {"add_rms_norm_backward", "add_layer_norm_backward", "rms_norm_qkv_rope_backward",
         "linear_cross_entropy_backward"} if dtype == torch.bfloat16 else set()
    )  # fmt: skip


def test_a_gradient_has_the_dtype_of_what_it_belongs_to() -> None:
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)
    dx, dweight = plain.rms_norm_backward(x, x, weight, 1e-5)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


def test_what_no_query_sees_gets_0_and_may_be_nan() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8)
    k[:, :, 4] = float("nan")
    mask = torch.tensor([[True, True, True, True, False]])
    dq, dk, dv = plain.attention_backward(torch.ones_like(q), q, k, k, causal=False, key_mask=mask)
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert not dk[:, :, 4].any()
    assert not dv[:, :, 4].any()
    none = plain.attention_backward(torch.ones_like(q), q, k, k, key_mask=torch.zeros_like(mask))
    assert not any(x.any() for x in none)


def test_the_gradient_of_the_log_sum_exp_counts() -> None:
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    do, dlse = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3)
    got = plain.attention_backward(do, q, k, v, dlse=dlse)
    wanted = ops.attention_backward(*map(_array, (do, q, k, v)), dlse_BHS=_array(dlse))
    off = [np.abs(_array(one) - right).max() for one, right in zip(got, wanted, strict=True)]
    assert max(off) < 1e-5


def test_an_incoming_gradient_of_another_shape_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(InputError, match=r"rms_norm_backward: dy is \[2, 3\] torch.float32 on cpu; expected \[2, 4\]"):
        plain.rms_norm_backward(torch.ones(2, 3), x, torch.ones(4), 1e-5)


def test_autograd_adds_the_parts_of_a_weight_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 parts of one row, all the same: in bfloat16 their sum stops at 256 of them. And it can go on twice."""
    monkeypatch.setattr("refllm.kernels.plain.loss.LOGITS", 4)
    x, labels = torch.ones(600, 8, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.long)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16).requires_grad_()
    plain.linear_cross_entropy(x, weight, labels, reduction="sum").backward()
    assert torch.equal(weight.grad, torch.tensor([-450, 150, 150, 150.0])[:, None].expand(4, 8).bfloat16())
    wide = [torch.randn(n, 3, dtype=torch.float32).requires_grad_() for n in (5, 4)]
    loss = plain.linear_cross_entropy(*wide, labels[:5])
    (first,) = torch.autograd.grad(loss, wide[0], create_graph=True)
    assert torch.autograd.grad(first.square().sum(), wide[1])[0].isfinite().all()
