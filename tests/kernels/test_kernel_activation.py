"""SwiGLU and squared ReLU as Triton kernels and in plain Torch: they meet their contract wherever it holds."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.triton.swiglu import exp_fp32  # noqa: E402
from refllm.kernels.verify import assert_meets_contract  # noqa: E402

FORMS = {"triton": kernels, "plain": plain}
OPERATORS = ("swiglu", "relu2")
NARROW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *NARROW)
swiglu_file, relu2_file = (import_module(f"refllm.kernels.triton.{name}") for name in OPERATORS)

form = pytest.mark.parametrize("form", FORMS)
operator = pytest.mark.parametrize("operator", OPERATORS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(*shape: int, dtype: Any = torch.float32, device: str, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN payloads included."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check(form: str, operator: str, *given: torch.Tensor) -> torch.Tensor:
    """The result, which meets the contract, is contiguous, and leaves every argument as it was."""
    before = [x.clone() for x in given]
    y = getattr(FORMS[form], operator)(*given)
    assert all(same_bits(a, b) for a, b in zip(given, before, strict=True))
    assert y.is_contiguous()
    assert_meets_contract(operator, y, *given)
    return y


VIEWS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "dense": lambda x: [x, x.flip(0)],
    "halves of one tensor": lambda x: list(torch.cat((x, x.flip(0)), -1).chunk(2, -1)),
    "one of them transposed": lambda x: [x.transpose(0, 1).contiguous().transpose(0, 1), x.flip(0)],
    "one row, expanded": lambda x: [x, x[:1, :1].expand(x.shape)],
    "strided columns": lambda x: [torch.stack((x, x + 1), -1)[..., 0], x],
    "one axis": lambda x: [x[0, 0], x[1, 0]],
}


@form
@operator
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    F=st.one_of(st.integers(1, 40), st.sampled_from((1023, 1024, 1025, 2049, 4097))),
    view=st.sampled_from(sorted(VIEWS)),
    dtype=st.sampled_from(NARROW),
    scale=st.sampled_from((1.0, 30.0)),
)
def test_meets_contract_on_ragged_rows_and_any_strides(
    form: str, operator: str, device: str, F: int, view: str, dtype: Any, scale: float
) -> None:
    gate, up = VIEWS[view](draw(2, 3, F, dtype=dtype, device=device, scale=scale))
    check(form, operator, *((gate, up) if operator == "swiglu" else (gate,)))


@form
@operator
@pytest.mark.parametrize("view", VIEWS)
def test_meets_contract_in_float32(form: str, operator: str, device: str, view: str) -> None:
    """Many numbers: with a few, the ratio of two roundings would be a throw of dice."""
    gate, up = VIEWS[view](draw(2, 3, 4097, device=device, scale=4.0))
    check(form, operator, *((gate, up) if operator == "swiglu" else (gate,)))


@form
@dtypes
def test_swiglu_where_the_exponential_is_large(form: str, device: str, dtype: Any) -> None:
    """Gates from -100 to -1 alone: beside positive ones their errors would not show."""
    gates = -torch.linspace(1, 100, 5000).to(device, dtype)
    for first in range(0, 5000, 500):
        part = gates[first : first + 500]
        check(form, "swiglu", part, draw(len(part), dtype=dtype, device=device))


@form
@operator
@dtypes
def test_nan_infinity_and_overflow_are_those_of_the_definition(
    form: str, operator: str, device: str, dtype: Any
) -> None:
    """float16 overflows above 65504; 0 * infinity is NaN; e^88.7 is finite in float32, and e^89 is not."""
    finite = [0.0, -0.0, 1.0, -1.0, 255.9, 256.1, 300.0, -300.0, -88.7, -89.0, 6e4, 1e30, -1e30]
    values = [torch.nan, torch.inf, -torch.inf, *finite]
    x = torch.tensor(values, dtype=dtype, device=device)
    gate, up = x.repeat_interleave(len(x)), x.repeat(len(x))
    y = check(form, operator, *((gate, up) if operator == "swiglu" else (gate,)))
    if operator == "relu2":
        expected = [torch.nan, torch.inf, 0.0, 0.0, 0.0]
        assert torch.equal(y[:: len(x)][:5].isnan().cpu(), torch.tensor(expected).isnan())
        assert y[:: len(x)][1:5].tolist() == expected[1:]


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


@form
@operator
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (2, 0, 3)])
def test_nothing_to_do(form: str, operator: str, device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.float16, device=device)
    y = getattr(FORMS[form], operator)(*((x, x) if operator == "swiglu" else (x,)))
    assert y.shape == x.shape
    assert y.dtype == x.dtype


@operator
def test_offsets_beyond_32_bits(operator: str, device: str) -> None:
    """Rows 2^30 elements apart: row 2 begins at 2^31. Only the pages that are touched take memory."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    far = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, (3, 64), (2**30, 1))
    far.copy_(draw(3, 64, dtype=torch.bfloat16, device=device))
    near = draw(3, 64, dtype=torch.bfloat16, device=device, seed=1)
    for pair in ((far, near), (near, far)):
        check("triton", operator, *(pair if operator == "swiglu" else (far,)))


@operator
def test_one_row_longer_than_32_bits_is_planned_in_64(operator: str) -> None:
    """Columns past 2^31 of a dense tensor; on "meta", which has no memory, only the plan can be looked at."""
    x = torch.empty(2**20, 2**12, dtype=torch.bfloat16, device="meta")
    launch, y = swiglu_file.plan(x, x) if operator == "swiglu" else relu2_file.plan(x)
    assert launch.arguments["F"] == 2**32
    assert launch.grid[0] * launch.constants["BLOCK_F"] == y.numel()


@operator
@dtypes
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_writes_every_element(device: str, target: str, operator: str, dtype: Any) -> None:
    """Each tile size that ships, for the GPU it ships for, on a result that holds NaN before."""
    sizes = [(1, 8200), *([(100, 40)] if dtype == torch.float32 else [(3, 40), (3, 5)])]
    for rows, F in sizes:
        both = draw(rows, 2 * F, dtype=dtype, device=device)
        for pair in ((both, both.flip(1)), (both[:, :F], both[:, F:])):
            if operator == "relu2":
                launch, y = relu2_file.plan(pair[0], TARGETS[target])
            else:
                launch, y = swiglu_file.plan(*pair, TARGETS[target])
            y.fill_(torch.nan)
            launch.run()
            assert_meets_contract(operator, y, *(pair if operator == "swiglu" else pair[:1]))


@operator
def test_a_row_has_the_same_bits_alone_and_in_any_batch(operator: str, device: str) -> None:
    x = draw(4, 600, device=device)
    halves = (x[:, :300], x[:, 300:]) if operator == "swiglu" else (x[:, :300],)
    f = getattr(kernels, operator)
    together = f(*halves)
    for i in range(4):
        assert same_bits(f(*(h[i : i + 1].clone() for h in halves))[0], together[i])


@form
def test_arguments_that_do_not_fit_are_named(form: str, device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(InputError, match=r"swiglu: up is \[2, 7\] .*; expected \[2, 8\]"):
        FORMS[form].swiglu(x, x[:, :7])
    with pytest.raises(InputError, match=r"swiglu: up is .*float16 .*; expected \[2, 8\] torch.float32"):
        FORMS[form].swiglu(x, x.half())
    with pytest.raises(InputError, match=r"swiglu: up is .* on meta; expected .* on " + device):
        FORMS[form].swiglu(x, x.to("meta"))
    with pytest.raises(InputError, match=r"relu2: x is .*int64 .*; expected a float32, float16 or bfloat16 tensor"):
        FORMS[form].relu2(x.long())


@operator
def test_torch_takes_it_for_an_operator_of_its_own(operator: str, device: str) -> None:
    """Schema, fake tensors, and a graph without breaks."""
    x = draw(2, 3, 24, device=device)
    given = (x[..., :12], x[..., 12:]) if operator == "swiglu" else (x.transpose(0, 1),)
    torch.library.opcheck(getattr(torch.ops.refllm, operator).default, given)
    f = getattr(kernels, operator)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*given)
    assert same_bits(compiled, f(*given))
    assert compiled.stride() == f(*given).stride()
