"""What norms and activations have to keep beside what all operators do (test_operators.py)."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from refllm import kernels  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.launch import stands_for_others  # noqa: E402
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.triton import FILES, plan  # noqa: E402
from refllm.kernels.triton.swiglu import exp_fp32  # noqa: E402
from refllm.kernels.verify import assert_meets_contract, judge  # noqa: E402

FORMS = {"triton": kernels, "plain": plain}
NORMS = ("rms_norm", "layer_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

form = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(*shape: int, dtype: Any = torch.float32, device: str, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + mean).to(device=device, dtype=dtype)


def arguments(operator: str, x: torch.Tensor, *, bias: bool = True) -> list[Any]:
    """The arguments of a norm for this x: a residual of its shape, distinct weights, a bias or None."""
    like = {"dtype": x.dtype, "device": str(x.device)}
    given = [
        x,
        *([draw(*x.shape, seed=3, **like)] if operator.startswith("add_") else []),
        draw(x.shape[-1], seed=1, **like),
    ]
    return [*given, *([draw(x.shape[-1], seed=2, **like) if bias else None] if "layer" in operator else []), 1e-5]


def check(form: str, operator: str, *given: Any) -> Any:
    """What it returns, which meets the contract."""
    results = getattr(FORMS[form], operator)(*given)
    assert_meets_contract(operator, results, *given)
    return results


@form
@pytest.mark.parametrize("E", [77, 769, 2048, 17_000])
def test_layer_norm_loses_nothing_to_a_mean_of_1000(form: str, device: str, E: int) -> None:
    """The contract in float32 is only as good as the rounding of its mean; a kernel centres twice and is far better."""
    given = arguments("layer_norm", draw(8, E, device=device, mean=1000.0))
    (verdict,) = judge("layer_norm", FORMS[form].layer_norm(*given), *given)
    assert verdict.holds, verdict.problem
    assert verdict.ratio < 0.1


@form
@pytest.mark.parametrize("operator", [*NORMS, *(f"add_{name}" for name in NORMS)])
@pytest.mark.parametrize("E", [16_384, 16_385, 20_480])
def test_long_rows(form: str, operator: str, device: str, E: int) -> None:
    """More than one tile, the last one ragged; what the first tile holds is nothing like the rest."""
    x = draw(2, E, dtype=torch.bfloat16, device=device)
    x[:, :5000] += 100
    check(form, operator, *arguments(operator, x))


@form
@pytest.mark.parametrize("operator", NORMS)
@pytest.mark.parametrize("E", [100, 17_000])
def test_the_norm_is_that_of_the_sum_that_returns(form: str, operator: str, device: str, E: int) -> None:
    """A norm of the sum before its rounding would be closer to the truth, and not that of what the caller gets."""
    x, *rest = arguments(operator, draw(3, E, dtype=torch.bfloat16, device=device))
    y, r = getattr(FORMS[form], f"add_{operator}")(x, x.flip(0), *rest)
    assert torch.equal(y, getattr(FORMS[form], operator)(r, *rest))


@form
@pytest.mark.parametrize("operator", NORMS)
def test_rows_of_equal_numbers_and_of_zeros(form: str, operator: str, device: str) -> None:
    x = draw(3, 300, device=device)
    x[0], x[1] = 0.0, 12_345.678
    y = getattr(FORMS[form], operator)(*arguments(operator, x, bias=False))
    assert y.isfinite().all()
    assert not y[0].any()
    assert y[1].any() == (operator == "rms_norm")


@pytest.mark.parametrize("operator", NORMS)
def test_what_is_compiled_ahead_of_time_has_every_dtype_and_kind_of_row(operator: str) -> None:
    for target in TARGETS.values():
        made = [launch for _, launch in FILES[operator].launches(target)]
        dtypes = set(DTYPES) if stands_for_others(target) else {torch.bfloat16}
        assert {launch.arguments["x_ptr"].dtype for launch in made} == dtypes
        assert len({(launch.constants["ONE_TILE"], launch.constants["ADD"]) for launch in made}) == 4
        assert {bool(launch.wide_loads) for launch in made} == {True, False}


@form
@dtypes
def test_swiglu_where_the_exponential_is_large(form: str, device: str, dtype: Any) -> None:
    """Gates from -100 to -1 alone: beside positive ones their errors would not show."""
    gates = -torch.linspace(1, 100, 5000).to(device, dtype)
    for first in range(0, 5000, 500):
        part = gates[first : first + 500]
        check(form, "swiglu", part, draw(len(part), dtype=dtype, device=device))


@form
@pytest.mark.parametrize("operator", ["swiglu", "relu2"])
@dtypes
def test_nan_infinity_and_overflow_are_those_of_the_definition(
    form: str, operator: str, device: str, dtype: Any
) -> None:
    """float16 overflows above 65504; 0 * infinity is NaN; e^88.7 is finite in float32, and e^89 is not."""
    finite = [0.0, -0.0, 1.0, -1.0, 255.9, 256.1, 300.0, -300.0, -88.7, -89.0, 6e4, 1e30, -1e30]
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, *finite], dtype=dtype, device=device)
    y = check(form, operator, x.repeat_interleave(len(x)), *([x.repeat(len(x))] if operator == "swiglu" else []))
    if operator == "relu2":
        assert y[0].isnan()
        assert y[:: len(x)][1:5].tolist() == [torch.inf, 0.0, 0.0, 0.0]


@triton.jit
def _exp_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes, exp_fp32(tl.load(x_ptr + lanes)))


def test_exp_is_good_to_two_units_in_the_last_place(device: str) -> None:
    """Also far from 0, where tl.exp on a GPU is off by up to 63."""
    x = torch.linspace(-87, 88, 8192).to(device)  # above, NumPy's exp2(127) is not exact, and it is the interpreter's
    y = torch.empty_like(x)
    _exp_kernel[(1,)](x, y, BLOCK=8192)
    exact = np.exp(x.cpu().numpy().astype(np.float64))
    units = np.abs(y.cpu().numpy() - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() < 2.5  # exp2 on a GPU: 2^-22, two units (CUDA C Programming Guide, table of ex2.approx), and 0.5


@pytest.mark.parametrize("operator", ["swiglu", "relu2"])
def test_one_row_longer_than_32_bits_is_planned_in_64(operator: str) -> None:
    """Columns past 2^31 of a dense tensor; on "meta", which has no memory, only the plan can be looked at."""
    x = torch.empty(2**20, 2**12, dtype=torch.bfloat16, device="meta")
    launch, _ = plan(operator, [x, x] if operator == "swiglu" else [x], {}, target=TARGETS["sm_90"])
    assert launch.arguments["F"] == 2**32
    assert launch.grid[0] * launch.constants["BLOCK_F"] == x.numel()
