"""What a fast model chooses by time: the faster of several right ways, the same one for equal calls."""

from typing import Any

import numpy as np
import pytest
import torch

from refllm import ops
from refllm.kernels import plain
from refllm.kernels.models import fastest, products, torch_forms
from refllm.kernels.models.fastest import Fastest


class Clock:
    """Time that passes only while a form computes."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def form(self, name: str, seconds: float) -> Any:
        def compute(x: torch.Tensor) -> torch.Tensor:
            self.now += seconds
            self.calls.append(name)
            return x + 1

        return compute


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(fastest, "_FORGOTTEN_BYTES", 4)
    return clock


@pytest.mark.parametrize(
    ("seconds", "winner"), [((1.0, 0.5), "other"), ((1.0, 2.0), "usual"), ((1.0, 0.97), "usual"), ((2.0, 1.8), "other")]
)
def test_the_fastest_form_is_taken_and_the_usual_one_unless_another_is_clearly_faster(
    clock: Clock, seconds: tuple[float, float], winner: str
) -> None:
    work = Fastest(usual=clock.form("usual", seconds[0]), other=clock.form("other", seconds[1]))
    for _ in range(2):
        assert work("a kind", torch.zeros(1)) == 1
    assert work.chosen == {"a kind": winner}
    assert clock.calls[-2:] == [winner] * 2
    before = len(clock.calls)
    work("another kind", torch.zeros(1))
    assert len(clock.calls) > before + 2  # measured anew


def test_a_form_that_is_not_there_is_left_out_but_an_error_of_the_usual_one_is_raised(clock: Clock) -> None:
    def absent(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not in this build")

    assert Fastest(usual=clock.form("usual", 1.0), absent=absent)("kind", torch.zeros(1)) == 1
    with pytest.raises(RuntimeError, match="not in this build"):
        Fastest(usual=absent, other=clock.form("other", 1.0))("kind", torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_every_form_of_a_product_is_the_product(dtype: torch.dtype, rows: int, biased: bool) -> None:
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(64, 96).to(dtype)
    bias = torch.randn(64).to(dtype) if biased else None
    exact = ops.linear(*(t.double().numpy() for t in (x, weight)), None if bias is None else bias.double().numpy())
    compared = 0
    for name, form in (products.one_row if rows == 1 else products.many_rows).forms.items():
        try:
            y = form(x, weight, bias)
        except (RuntimeError, AttributeError):  # oneDNN has no float16 on every processor
            assert name == "onednn"
            continue
        assert y.dtype == dtype
        np.testing.assert_allclose(
            y.double().numpy(), exact, rtol=2 * torch.finfo(dtype).eps, atol=5e-5 + exact.max() * torch.finfo(dtype).eps
        )
        compared += 1
    assert compared >= 1 + (rows == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "K", "S", "T", "causal"),
    [(1, 2, 2, 300, 300, True), (2, 4, 2, 130, 200, True), (1, 4, 4, 1, 64, False), (2, 6, 2, 20, 33, False)],
)
def test_every_form_of_attention_is_attention(
    dtype: torch.dtype, B: int, H: int, K: int, S: int, T: int, causal: bool
) -> None:
    """Keys and values as a cache holds them: with slots behind the last that nothing may read."""
    q = torch.randn(B, S, H, 16).to(dtype).transpose(1, 2)
    cache = torch.full((2, B, K, T + 9, 16), torch.nan, dtype=dtype)
    cache[:, :, :, :T] = torch.randn(2, B, K, T, 16)
    k, v = cache[0, :, :, :T], cache[1, :, :, :T]
    exact = ops.attention(*(x.double().numpy() for x in (q, k, v)), causal=causal)
    for name, form in torch_forms.forms_of_attention.forms.items():
        found = form(q, k, v, 0.25, causal)
        assert found.dtype == dtype
        error = np.abs(found.double().numpy() - exact).max()
        assert error < 16 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [8, 16])
def test_rotation_is_that_of_the_plain_form_and_leaves_the_rest_alone(
    dtype: torch.dtype, interleaved: bool, R: int
) -> None:
    q, k = (torch.randn(2, 7, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2))
    before = q.clone(), k.clone()
    angles = torch.randn(2, 7, R // 2)
    cos, sin = angles.cos(), angles.sin()
    found = torch_forms.rope(q, k, cos, sin, interleaved=interleaved)
    expected = plain.rope(q, k, cos, sin, interleaved=interleaved)
    for x, y, given, kept in zip(found, expected, (q, k), before, strict=True):
        torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(x[..., R:], given[..., R:])
        assert torch.equal(given, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_unit_changes_neither_gate_nor_up(dtype: torch.dtype) -> None:
    gate, up = torch.randn(3, 32).to(dtype), torch.randn(3, 32).to(dtype)
    before = gate.clone(), up.clone()
    torch.testing.assert_close(torch_forms.swiglu(gate, up), plain.swiglu(gate, up), rtol=1e-6, atol=1e-6)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
