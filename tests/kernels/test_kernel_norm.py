"""RMSNorm and LayerNorm as Triton kernels and in plain Torch: they meet their contract wherever it holds."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.launch import stands_for_others  # noqa: E402
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.verify import assert_meets_contract, judge  # noqa: E402

FORMS = {"triton": kernels, "plain": plain}
OPERATORS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
NARROW = (torch.bfloat16, torch.float16)
rms_norm_file, layer_norm_file = (import_module(f"refllm.kernels.triton.{name}") for name in ("rms_norm", "layer_norm"))

form = pytest.mark.parametrize("form", FORMS)
operator = pytest.mark.parametrize("operator", OPERATORS)


def draw(*shape: int, dtype: Any, device: str, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + mean).to(device=device, dtype=dtype)


def arguments(operator: str, x: torch.Tensor, *, wide: bool = False, bias: bool = True, eps: float = 1e-5) -> list[Any]:
    """The arguments of `operator` for this x: a residual of its shape, distinct weights, a bias or None."""
    like = {"dtype": torch.float32 if wide else x.dtype, "device": str(x.device)}
    weight, shift = draw(x.shape[-1], seed=1, **like), draw(x.shape[-1], seed=2, **like)
    residual = draw(*x.shape, seed=3, dtype=x.dtype, device=str(x.device))
    given = [x, residual, weight] if operator.startswith("add_") else [x, weight]
    return [*given, *([shift if bias else None] if "layer" in operator else []), eps]


def call(form: str, operator: str, given: list[Any]) -> tuple[torch.Tensor, ...]:
    results = getattr(FORMS[form], operator)(*given)
    return results if isinstance(results, tuple) else (results,)


def check(form: str, operator: str, given: list[Any]) -> tuple[torch.Tensor, ...]:
    """The results, which meet the contract, are contiguous, and leave every argument as it was."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    results = call(form, operator, given)
    assert all(r.is_contiguous() for r in results)
    for a, b in zip(given, before, strict=True):
        assert a is b or a == b if not isinstance(a, torch.Tensor) else same_bits(a, b)
    assert_meets_contract(operator, results, *given)
    return results


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN payloads included."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda x: x,
    "transposed rows": lambda x: x.transpose(0, 1),
    "one row, expanded": lambda x: x[:1, :1].expand(3, 5, x.shape[-1]),
    "part of wider rows": lambda x: torch.cat((x, x), -1)[..., 1 : 1 + x.shape[-1]],
    "strided columns": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "one axis": lambda x: x[1, 1],
    "four axes": lambda x: x[:, :, None, :],
}


@form
@operator
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    E=st.one_of(st.integers(1, 40), st.sampled_from((127, 128, 129, 255, 256, 257, 769, 1000))),
    view=st.sampled_from(sorted(VIEWS)),
    dtype=st.sampled_from(NARROW),
    mean=st.sampled_from((0.0, 1000.0)),
    wide=st.booleans(),
    bias=st.booleans(),
)
def test_meets_contract_on_ragged_rows_and_any_strides(
    form: str, operator: str, device: str, E: int, view: str, dtype: Any, mean: float, wide: bool, bias: bool
) -> None:
    x = VIEWS[view](draw(2, 3, E, dtype=dtype, device=device, mean=mean))
    check(form, operator, arguments(operator, x, wide=wide, bias=bias))


@form
@operator
def test_meets_contract_in_float32(form: str, operator: str, device: str) -> None:
    """Many rows: all numbers of a row share the error of its scale, and a few rows would be a throw of dice."""
    x = draw(300, 77, dtype=torch.float32, device=device)
    check(form, operator, arguments(operator, x))


@form
@pytest.mark.parametrize("E", [77, 769, 2048, 17_000])
def test_layer_norm_loses_nothing_to_a_mean_of_1000(form: str, device: str, E: int) -> None:
    """The contract in float32 is only as good as the rounding of its mean; a kernel centres twice and is far better."""
    x = draw(8, E, dtype=torch.float32, device=device, mean=1000.0)
    given = arguments("layer_norm", x)
    (verdict,) = judge("layer_norm", call(form, "layer_norm", given), *given)
    assert verdict.holds, verdict.problem
    assert verdict.ratio < 0.1


@form
@operator
@pytest.mark.parametrize("E", [16_384, 16_385, 20_480])
def test_long_rows(form: str, operator: str, device: str, E: int) -> None:
    """More than one tile, the last one ragged; what the first tile holds is nothing like the rest."""
    x = draw(2, E, dtype=torch.bfloat16, device=device)
    x[:, :5000] += 100
    check(form, operator, arguments(operator, x))


@form
@pytest.mark.parametrize("operator", OPERATORS[::2])
@pytest.mark.parametrize("E", [100, 17_000])
def test_the_norm_is_that_of_the_sum_that_returns(form: str, operator: str, device: str, E: int) -> None:
    """A norm of the sum before its rounding would be closer to the truth, and not that of what the caller gets."""
    given = arguments(operator, draw(3, E, dtype=torch.bfloat16, device=device))
    y, r = call(form, f"add_{operator}", [given[0], given[0].flip(0), *given[1:]])
    assert same_bits(y, call(form, operator, [r, *given[1:]])[0])


@form
@operator
def test_nan_and_infinity_stay_in_their_rows(form: str, operator: str, device: str) -> None:
    x = draw(5, 100, dtype=torch.bfloat16, device=device)
    x[1, 3], x[2, 99], x[3, 0] = torch.nan, torch.inf, -torch.inf
    y = check(form, operator, arguments(operator, x))[0]
    assert y[0].isfinite().all()
    assert y[4].isfinite().all()
    assert y[1].isnan().all()


@form
def test_rows_of_equal_numbers_and_of_zeros(form: str, device: str) -> None:
    x = draw(3, 300, dtype=torch.float32, device=device)
    x[0], x[1] = 0.0, 12_345.678
    for name in ("rms_norm", "layer_norm"):
        y = call(form, name, arguments(name, x, bias=False))[0]
        assert not y[0].any()
        assert y.isfinite().all()
    assert not y[1].any()


@form
@operator
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (4, 0), (0, 0), (0,)])
def test_nothing_to_do(form: str, operator: str, device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.float16, device=device)
    for y in call(form, operator, arguments(operator, x)):
        assert y.shape == x.shape
        assert y.dtype == x.dtype


@operator
def test_offsets_beyond_32_bits(operator: str, device: str) -> None:
    """Rows 2^30 elements apart: row 2 begins at 2^31. Only the pages that are touched take memory."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    far = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, (3, 64), (2**30, 1))
    far.copy_(draw(3, 64, dtype=torch.bfloat16, device=device))
    given = arguments(operator, far)
    check("triton", operator, given)
    if operator.startswith("add_"):
        given[0], given[1] = given[1], given[0]
        check("triton", operator, given)


@operator
@pytest.mark.parametrize("E", [64, 1000, 20_480])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(operator: str, device: str, E: int) -> None:
    x = draw(6, E, dtype=torch.float32, device=device)
    given = arguments(operator, x)
    together, again = call("triton", operator, given), call("triton", operator, given)
    for i in (0, 3, 5):
        alone = call("triton", operator, [g[i : i + 1] if j < len(together) else g for j, g in enumerate(given)])
        for a, b, c in zip(alone, together, again, strict=True):
            assert same_bits(a[0], b[i])
            assert same_bits(b, c)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("E", [7, 64, 1000, 2560, 20_480])
def test_every_configuration_writes_every_element(device: str, target: str, E: int) -> None:
    """Each tile size that ships, for the GPU it ships for, on results that hold NaN before."""
    x = draw(3, E, dtype=torch.bfloat16, device=device)
    for name in OPERATORS:
        given = arguments(name, x)
        file, residual = rms_norm_file if "rms" in name else layer_norm_file, given[1] if "add_" in name else None
        rest = given[2:] if "add_" in name else given[1:]
        launch, *results = file.plan(x, residual, *rest, TARGETS[target])
        results = [r.fill_(torch.nan) for r in results if r is not None]
        launch.run()
        assert_meets_contract(name, tuple(results), *given)


def test_what_is_compiled_ahead_of_time_has_every_dtype_and_kind_of_row() -> None:
    for file in (rms_norm_file, layer_norm_file):
        for target in TARGETS.values():
            made = [launch for _, launch in file.launches(target)]
            dtypes = {torch.float32, *NARROW} if stands_for_others(target) else {torch.bfloat16}
            assert {launch.arguments["x_ptr"].dtype for launch in made} == dtypes
            assert {(launch.constants["ONE_TILE"], launch.constants["ADD"]) for launch in made} == {
                (True, True), (True, False), (False, True), (False, False)
            }  # fmt: skip
            assert any(launch.wide_loads for launch in made)
            assert not all(launch.wide_loads for launch in made)


@form
def test_arguments_that_do_not_fit_are_named(form: str, device: str) -> None:
    f = FORMS[form]
    x, w = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(InputError, match=r"rms_norm: weight is \[7\] torch.float32 .*; expected \[8\]"):
        f.rms_norm(x, w[:7], 1e-5)
    with pytest.raises(InputError, match=r"rms_norm: weight is .*bfloat16 .*; expected \[8\] torch.float32"):
        f.rms_norm(x, w.bfloat16(), 1e-5)
    with pytest.raises(InputError, match=r"rms_norm: x is .*float64"):
        f.rms_norm(x.double(), w, 1e-5)
    with pytest.raises(InputError, match="rms_norm: x is list"):
        f.rms_norm([1.0], w, 1e-5)
    with pytest.raises(InputError, match=r"rms_norm: x is .*; expected at least one axis"):
        f.rms_norm(x[0, 0], w, 1e-5)
    with pytest.raises(InputError, match=r"add_rms_norm: residual is \[1, 8\] .*; expected \[2, 8\]"):
        f.add_rms_norm(x, x[:1], w, 1e-5)
    with pytest.raises(InputError, match=r"layer_norm: bias is \[2, 8\] .*; expected \[8\]"):
        f.layer_norm(x, w, x, 1e-5)
    with pytest.raises(InputError, match=r"add_layer_norm: residual is .*float16 .*; expected \[2, 8\] torch.float32"):
        f.add_layer_norm(x, x.half(), w, None, 1e-5)
    with pytest.raises(InputError, match=r"layer_norm: weight is .* on meta; expected .* on " + device):
        f.layer_norm(x, w.to("meta"), None, 1e-5)


def test_without_gpu_or_interpreter_the_error_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"rms_norm: the tensors are on cpu.*refllm.kernels.plain.rms_norm"):
        kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)


@operator
def test_torch_takes_it_for_an_operator_of_its_own(operator: str, device: str) -> None:
    """Schema, fake tensors, and a graph without breaks."""
    x = draw(2, 3, 24, dtype=torch.float32, device=device).transpose(0, 1)
    given = arguments(operator, x)
    torch.library.opcheck(getattr(torch.ops.refllm, operator).default, tuple(given))
    compiled = torch.compile(getattr(kernels, operator), fullgraph=True, backend="aot_eager")
    results = compiled(*given)
    for a, b in zip(
        results if isinstance(results, tuple) else (results,), call("triton", operator, given), strict=True
    ):
        assert same_bits(a, b)
        assert a.stride() == b.stride()
