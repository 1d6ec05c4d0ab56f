"""What `rope` and `norm_rope` have to keep beside what all operators do (test_operators.py)."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from refllm import kernels  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.triton.rope import HEADS  # noqa: E402
from refllm.kernels.verify import assert_meets_contract, judge  # noqa: E402

FORMS = {"triton": kernels, "plain": plain}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

form = pytest.mark.parametrize("form", FORMS)
norms = pytest.mark.parametrize("norm", ["rms", "layer"])
pairing = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


def draw(*shape: int, dtype: Any = torch.float32, device: str, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean).to(device=device, dtype=dtype)


def arguments(
    norm: str, sizes: tuple[int, int, int, int, int], dtype: Any, device: str, mean: float = 0.0
) -> list[Any]:
    """q, k, distinct weights for every head and eps if there is a norm, cos and sin [S, R/2] of random angles."""
    H, K, S, D, R = sizes
    q, k = (draw(1, n, S, D, dtype=dtype, device=device, seed=n, mean=mean) for n in (H, K))
    angles = draw(S, R // 2, device="cpu", seed=7) * 100
    tables = [table.to(device, dtype) for table in (angles.cos(), angles.sin())]
    weights = [draw(n, D, dtype=dtype, device=device, seed=50 + n) for n in (H, K)]
    return [q, k, *weights, *tables, 1e-5] if norm else [q, k, *tables]


def rotated(form: str, norm: str, given: list[Any], interleaved: bool) -> Any:
    operator, how = ("norm_rope", {"norm": norm}) if norm else ("rope", {})
    return getattr(FORMS[form], operator)(*given, **how, interleaved=interleaved)


@form
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_of_real_models(form: str, norm: str, device: str, heads: tuple[int, int, int, int, bool]) -> None:
    H, K, D, R, interleaved = heads
    given = arguments(norm, (H, K, 2, D, R), torch.bfloat16, device)
    how = {"norm": norm, "interleaved": interleaved} if norm else {"interleaved": interleaved}
    assert_meets_contract("norm_rope" if norm else "rope", rotated(form, norm, given, interleaved), *given, **how)


@form
@pairing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_rotated_keeps_its_bits(form: str, device: str, interleaved: bool, dtype: Any) -> None:
    """NaN with any payload, signalling ones included, both infinities, -0 and subnormal numbers."""
    width, kind = (16, torch.int16) if dtype != torch.float32 else (32, torch.int32)
    lowest, generator = -(2 ** (width - 1)), torch.Generator().manual_seed(0)
    bits = torch.randint(lowest, -lowest, (1, 2, 3, 24), generator=generator)
    bits[0, 0, 0, 20] = lowest  # -0
    exponent = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    bits[0, 0, :, 21] = torch.tensor([exponent, exponent | 1, exponent | 1 + lowest])
    x = bits.to(kind).view(dtype).to(device)
    tables = arguments("", (2, 2, 3, 24, 20), torch.float32, device)[2:]
    y, _ = FORMS[form].rope(x, x, *tables, interleaved=interleaved)
    assert torch.equal(y[..., 20:].contiguous().view(kind), x[..., 20:].contiguous().view(kind))


@form
@pairing
def test_nan_and_infinity_stay_in_their_pairs(form: str, device: str, interleaved: bool) -> None:
    q, k, *tables = arguments("", (3, 1, 2, 16, 12), torch.float32, device)
    q[0, 1, 0, 5], q[0, 2, 1, 0] = torch.nan, torch.inf
    y, _ = FORMS[form].rope(q, k, *tables, interleaved=interleaved)
    assert y.isnan().sum() == 2
    assert y.isinf().sum() == 2


@form
@norms
def test_nan_and_infinity_stay_in_their_heads(form: str, norm: str, device: str) -> None:
    given = arguments(norm, (5, 3, 1, 24, 16), torch.bfloat16, device)
    q = given[0]
    q[0, 1, 0, 3], q[0, 2, 0, 23], q[0, 3, 0, 0] = torch.nan, torch.inf, -torch.inf
    results = rotated(form, norm, given, True)
    assert_meets_contract("norm_rope", results, *given, norm=norm, interleaved=True)
    assert results[0][0, [0, 4]].isfinite().all()
    assert results[0][0, 1].isnan().all()


@form
@pairing
def test_layer_norm_loses_nothing_to_a_mean_of_1000(form: str, device: str, interleaved: bool) -> None:
    given = arguments("layer", (4, 4, 8, 37, 18), torch.float32, device, mean=1000.0)
    verdicts = judge(
        "norm_rope", rotated(form, "layer", given, interleaved), *given, norm="layer", interleaved=interleaved
    )
    assert [verdict.problem for verdict in verdicts] == ["", ""]
    assert max(verdict.ratio for verdict in verdicts) < 0.1


@form
@norms
def test_the_normed_value_is_not_rounded_before_the_rotation(form: str, norm: str, device: str) -> None:
    """One rounding is closer than the two of the contract in bfloat16: that the fusion is good for."""
    given = arguments(norm, (8, 8, 16, 64, 64), torch.bfloat16, device)
    verdicts = judge("norm_rope", rotated(form, norm, given, False), *given, norm=norm, interleaved=False)
    assert max(verdict.ratio for verdict in verdicts) < 0.9
