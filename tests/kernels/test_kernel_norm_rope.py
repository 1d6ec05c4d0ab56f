"""Per-head norm and rotation as one Triton kernel and in plain Torch: it meets its contract wherever it holds."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from refllm import kernels, ops  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.triton.rope import HEADS  # noqa: E402
from refllm.kernels.verify import assert_meets_contract, judge  # noqa: E402

FORMS = {"triton": kernels, "plain": plain}
NARROW = (torch.bfloat16, torch.float16)
norm_rope_file = import_module("refllm.kernels.triton.norm_rope")

form = pytest.mark.parametrize("form", FORMS)
norms = pytest.mark.parametrize("norm", ["rms", "layer"])
pairing = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


def draw(*shape: int, dtype: Any = torch.float32, device: str, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + mean).to(device=device, dtype=dtype)


def arguments(
    B: int, H: int, K: int, S: int, D: int, half: int, dtype: Any, device: str, *, wide: bool = False, mean: float = 0.0
) -> list[Any]:
    """q, k, distinct weights for every head, cos and sin [S, R/2] of random angles, eps."""
    q, k = (draw(B, n, S, D, dtype=dtype, device=device, seed=n, mean=mean) for n in (H, K))
    weights = (draw(n, D, dtype=torch.float32 if wide else dtype, device=device, seed=50 + n) for n in (H, K))
    angles = draw(S, half, device="cpu", seed=7) * 100
    cos, sin = (
        table.to(device=device, dtype=torch.float32 if wide else dtype) for table in (angles.cos(), angles.sin())
    )
    return [q, k, *weights, cos, sin, 1e-5]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN payloads included."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check(form: str, given: list[Any], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, which meet the contract, are contiguous, and leave every argument as it was."""
    before = [x.clone() for x in given[:-1]]
    results = FORMS[form].norm_rope(*given, **how)
    assert all(same_bits(a, b) for a, b in zip(given[:-1], before, strict=True))
    assert all(y.is_contiguous() for y in results)
    assert_meets_contract("norm_rope", results, *given, **how)
    return results


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider row": lambda x: torch.cat((x, x), -1)[..., 1 : 1 + x.shape[-1]],
    "one head, expanded": lambda x: x[:, :1].expand(x.shape),
    "strided dims": lambda x: torch.stack((x, x + 1), -1)[..., 0],
}


@form
@norms
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_meets_contract_on_ragged_heads_and_any_strides(form: str, norm: str, device: str, data: st.DataObject) -> None:
    D = data.draw(st.one_of(st.integers(2, 40), st.sampled_from((64, 80, 128, 160))), "D")
    half = data.draw(st.one_of(st.integers(0, D // 2), st.just(D // 2)), "R/2")
    B, S = data.draw(st.integers(1, 2), "B"), data.draw(st.integers(1, 3), "S")
    H, K = data.draw(st.integers(1, 9), "H"), data.draw(st.integers(1, 5), "K")
    dtype, mean = data.draw(st.sampled_from(NARROW), "dtype"), data.draw(st.sampled_from((0.0, 100.0)), "mean")
    given = arguments(B, H, K, S, D, half, dtype, device, wide=data.draw(st.booleans(), "float32 weights"), mean=mean)
    for i in (0, 1):
        given[i] = VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))](given[i])
    check(form, given, norm=norm, interleaved=data.draw(st.booleans(), "interleaved"))


@form
@norms
@pairing
def test_meets_contract_in_float32(form: str, norm: str, device: str, interleaved: bool) -> None:
    """Many heads: all numbers of a head share the error of its scale, and a few would be a throw of dice."""
    given = arguments(2, 9, 7, 40, 40, 10, torch.float32, device)
    check(form, given, norm=norm, interleaved=interleaved)


@form
@norms
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_of_real_models(form: str, norm: str, device: str, heads: tuple[int, int, int, int, bool]) -> None:
    H, K, D, R, interleaved = heads
    check(form, arguments(1, H, K, 2, D, R // 2, torch.bfloat16, device), norm=norm, interleaved=interleaved)


@form
@pairing
def test_layer_norm_loses_nothing_to_a_mean_of_1000(form: str, device: str, interleaved: bool) -> None:
    given = arguments(1, 4, 4, 8, 37, 9, torch.float32, device, mean=1000.0)
    how = {"norm": "layer", "interleaved": interleaved}
    verdicts = judge("norm_rope", FORMS[form].norm_rope(*given, **how), *given, **how)
    assert len(verdicts) == 2
    for verdict in verdicts:
        assert verdict.holds, verdict.problem
        assert verdict.ratio < 0.1


@form
@norms
def test_the_normed_value_is_not_rounded_before_the_rotation(form: str, norm: str, device: str) -> None:
    """One rounding is closer than the two of the contract in bfloat16: that the fusion is good for."""
    given = arguments(2, 8, 8, 8, 64, 32, torch.bfloat16, device)
    how = {"norm": norm, "interleaved": False}
    results = FORMS[form].norm_rope(*given, **how)
    assert all(verdict.ratio < 0.9 for verdict in judge("norm_rope", results, *given, **how))


@form
@norms
def test_nan_and_infinity_stay_in_their_heads(form: str, norm: str, device: str) -> None:
    given = arguments(1, 5, 3, 1, 24, 8, torch.bfloat16, device)
    q = given[0]
    q[0, 1, 0, 3], q[0, 2, 0, 23], q[0, 3, 0, 0] = torch.nan, torch.inf, -torch.inf
    y, _ = check(form, given, norm=norm, interleaved=True)
    assert y[0, 0].isfinite().all()
    assert y[0, 4].isfinite().all()
    assert y[0, 1].isnan().all()


@form
@norms
@pytest.mark.parametrize(("B", "H", "K", "S"), [(0, 2, 1, 3), (2, 2, 1, 0), (1, 0, 2, 2), (1, 2, 0, 2), (1, 0, 0, 2)])
def test_nothing_to_do(form: str, norm: str, device: str, B: int, H: int, K: int, S: int) -> None:
    given = arguments(B, H, K, S, 8, 4, torch.float16, device)
    results = FORMS[form].norm_rope(*given, norm=norm, interleaved=True)
    assert [y.shape for y in results] == [given[0].shape, given[1].shape]
    assert all(y.isfinite().all() for y in results)


@norms
def test_offsets_beyond_32_bits(norm: str, device: str) -> None:
    """Batches, heads or positions 2^30 elements apart. Only the pages that are touched take memory."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    for axis, (B, H, S) in enumerate([(3, 1, 1), (1, 3, 1), (1, 1, 3)]):
        given = arguments(B, H, H, S, 8, 3, torch.bfloat16, device)
        strides = [8, 8, 8, 1]
        strides[axis] = 2**30
        far = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, (B, H, S, 8), strides)
        for i in (0, 1):
            far.copy_(given[i])
            check("triton", [far if i == j else g for j, g in enumerate(given)], norm=norm, interleaved=True)


@norms
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_writes_every_element(device: str, target: str, norm: str) -> None:
    """Heads in one share and in several, for the GPU they ship for, on results that hold NaN before."""
    for H, K, D, half, interleaved in ((20, 20, 128, 64, True), (32, 8, 160, 20, False), (3, 70, 24, 5, True)):
        given = arguments(1, H, K, 2, D, half, torch.bfloat16, device)
        launch, *results = norm_rope_file.plan(*given, norm, interleaved, TARGETS[target])
        results = [y.fill_(torch.nan) for y in results]
        launch.run()
        assert_meets_contract("norm_rope", tuple(results), *given, norm=norm, interleaved=interleaved)


@norms
@pytest.mark.parametrize("D", [40, 72, 160])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(device: str, norm: str, D: int) -> None:
    given = arguments(3, 5, 2, 4, D, 10, torch.float32, device)
    how = {"norm": norm, "interleaved": False}
    together, again = kernels.norm_rope(*given, **how), kernels.norm_rope(*given, **how)
    assert len(together) == 2
    q, k, q_weight, k_weight, cos, sin, eps = given
    token = slice(2, 3)
    parts = q[1:2, :, token].clone(), k[1:2, :, token].clone(), q_weight, k_weight, cos[token], sin[token]
    for one, all_, twice in zip(kernels.norm_rope(*parts, eps, **how), together, again, strict=True):
        assert same_bits(one[0, :, 0], all_[1, :, 2])
        assert same_bits(all_, twice)


@form
@norms
def test_it_is_the_norm_and_then_the_rotation(form: str, norm: str, device: str) -> None:
    """Against the two definitions one after the other, head by head with that head's own weight."""
    given = arguments(1, 3, 2, 4, 10, 3, torch.float32, device)
    arrays = [g.cpu().numpy().astype(np.float64) for g in given[:-1]]
    for i, (x, weight) in enumerate(((arrays[0], arrays[2]), (arrays[1], arrays[3]))):
        one = ops.rms_norm if norm == "rms" else lambda x, w, eps: ops.layer_norm(x, w, None, eps)
        normed = np.stack([one(x[:, h], weight[h], given[-1]) for h in range(x.shape[1])], 1)
        expected, _ = ops.rope(normed, normed, *arrays[4:], interleaved=True)
        y = FORMS[form].norm_rope(*given, norm=norm, interleaved=True)[i]
        np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=0, atol=3e-6)  # a few roundings of numbers up to 5


@form
def test_arguments_that_do_not_fit_are_named(form: str, device: str) -> None:
    q, k, q_weight, k_weight, cos, sin, eps = arguments(2, 4, 2, 3, 8, 4, torch.float32, device)

    def fails(match: str, *given: Any, norm: str = "rms") -> None:
        with pytest.raises(InputError, match=match):
            FORMS[form].norm_rope(*given, eps, norm=norm, interleaved=True)

    fails(r"norm_rope: q_weight is \[2, 8\] .*; expected \[4, 8\]", q, k, k_weight, q_weight, cos, sin)
    fails(r"norm_rope: k_weight is \[8\] .*; expected \[2, 8\]", q, k, q_weight, k_weight[0], cos, sin)
    fails(r"norm_rope: k_weight is .*float16 .*; expected .*float32", q, k, q_weight, k_weight.half(), cos, sin)
    fails(r"norm_rope: cos is \[3, 8\] .*R <= D = 8", q, k, q_weight, k_weight, torch.cat((cos, cos), -1), sin)
    fails(
        r"norm_rope: norm='batch' is not known; use \"rms\" or \"layer\"",
        *(q, k, q_weight, k_weight, cos, sin),
        norm="batch",
    )


def test_torch_takes_it_for_an_operator_of_its_own(device: str) -> None:
    """Schema, fake tensors, and a graph without breaks."""
    given = arguments(2, 4, 2, 3, 8, 3, torch.float32, device)
    given[0] = VIEWS["transposed"](given[0])
    torch.library.opcheck(torch.ops.refllm.norm_rope.default, (*given, "layer", True))
    how = {"norm": "layer", "interleaved": True}
    compiled = torch.compile(lambda *given: kernels.norm_rope(*given, **how), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given), kernels.norm_rope(*given, **how), strict=True):
        assert same_bits(a, b)
        assert a.stride() == b.stride()
