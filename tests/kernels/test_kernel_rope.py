"""Rotary position embedding as a Triton kernel and in plain Torch: it meets its contract wherever it holds."""

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
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.verify import assert_meets_contract  # noqa: E402

FORMS = {"triton": kernels, "plain": plain}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
rope_file = import_module("refllm.kernels.triton.rope")

form = pytest.mark.parametrize("form", FORMS)
pairing = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


def draw(*shape: int, dtype: Any = torch.float32, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def tables(*positions: int, R: int, dtype: Any, device: str) -> list[torch.Tensor]:
    """cos and sin [*positions, R/2] of random angles, as slices of longer rows: what follows a row is NaN."""
    angles = draw(*positions, R // 2, device="cpu", seed=7) * 100
    out = []
    for table in (angles.cos(), angles.sin()):
        wide = torch.full((*positions, R // 2 + 5), torch.nan)
        wide[..., : R // 2] = table
        out.append(wide.to(device=device, dtype=dtype)[..., : R // 2])
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN payloads included."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check(form: str, *given: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, which meet the contract, are contiguous, keep the last dims, and leave every argument as it was."""
    before = [x.clone() for x in given]
    results = FORMS[form].rope(*given, interleaved=interleaved)
    assert all(same_bits(a, b) for a, b in zip(given, before, strict=True))
    R = 2 * given[2].shape[-1]
    for x, y in zip(given, results, strict=False):
        assert y.is_contiguous()
        assert same_bits(y[..., R:], x[..., R:])
    assert_meets_contract("rope", results, *given, interleaved=interleaved)
    return results


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider row": lambda x: torch.cat((x, x), -1)[..., 1 : 1 + x.shape[-1]],
    "one head, expanded": lambda x: x[:, :1].expand(x.shape),
    "strided dims": lambda x: torch.stack((x, x + 1), -1)[..., 0],
}


@form
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_meets_contract_on_ragged_heads_and_any_strides(form: str, device: str, data: st.DataObject) -> None:
    """K != H, partial rotation, tables of each row or of all, in x's dtype or float32; q and k laid out differently."""
    D = data.draw(st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128, 160))), "D")
    half = data.draw(st.one_of(st.integers(0, D // 2), st.just(D // 2)), "R/2")
    B, S = data.draw(st.integers(1, 3), "B"), data.draw(st.integers(1, 4), "S")
    H, K = data.draw(st.integers(1, 9), "H"), data.draw(st.integers(1, 5), "K")
    dtype, table = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES[:1]) | st.none())
    q, k = (
        VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))](draw(B, n, S, D, dtype=dtype, device=device, seed=n))
        for n in (H, K)
    )
    positions = (B, S) if data.draw(st.booleans(), "batched tables") else (S,)
    cos, sin = tables(*positions, R=2 * half, dtype=table or dtype, device=device)
    if data.draw(st.booleans(), "dense tables"):  # a read past the last row is out of bounds
        cos, sin = cos.contiguous(), sin.contiguous()
    check(form, q, k, cos, sin, interleaved=data.draw(st.booleans(), "interleaved"))


@form
@pytest.mark.parametrize("heads", rope_file.HEADS, ids=str)
def test_heads_of_real_models(form: str, device: str, heads: tuple[int, int, int, int, bool]) -> None:
    H, K, D, R, interleaved = heads
    q, k = (draw(1, 2, n, D, dtype=torch.bfloat16, device=device, seed=n).transpose(1, 2) for n in (H, K))
    check(form, q, k, *tables(2, R=R, dtype=torch.float32, device=device), interleaved=interleaved)


@form
@pairing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_rotated_keeps_its_bits(form: str, device: str, interleaved: bool, dtype: Any) -> None:
    """NaN with any payload, signalling ones included, both infinities, -0 and subnormal numbers."""
    width, kind = (16, torch.int16) if dtype != torch.float32 else (32, torch.int32)
    bits = torch.randint(
        -(2 ** (width - 1)), 2 ** (width - 1), (1, 2, 3, 24), generator=torch.Generator().manual_seed(0)
    )
    bits[0, 0, 0, 20] = -(2 ** (width - 1))  # -0
    exponent = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    bits[0, 0, :, 21] = torch.tensor([exponent, exponent | 1, exponent | 1 - 2 ** (width - 1)])
    x = bits.to(kind).view(dtype).to(device)
    cos, sin = tables(3, R=20, dtype=torch.float32, device=device)
    y, _ = FORMS[form].rope(x, x, cos, sin, interleaved=interleaved)
    assert same_bits(y[..., 20:], x[..., 20:])


@form
@pairing
def test_nan_and_infinity_stay_in_their_pairs(form: str, device: str, interleaved: bool) -> None:
    q = draw(1, 3, 2, 16, device=device)
    q[0, 1, 0, 5], q[0, 2, 1, 0] = torch.nan, torch.inf
    cos, sin = tables(2, R=12, dtype=torch.float32, device=device)
    y, _ = check(form, q, q[:, :1], cos, sin, interleaved=interleaved)
    assert y.isnan().sum() == 2
    assert y.isinf().sum() == 2


@form
@pairing
def test_a_rotation_keeps_lengths_and_turns_by_its_angle(form: str, device: str, interleaved: bool) -> None:
    """A pair (1, 0) turned by t is (cos t, sin t): what tells one pairing, and one sign of sin, from the other."""
    angles = torch.tensor([[0.3, 1.1, 2.0]])
    x = torch.zeros(1, 1, 1, 6, device=device)
    x[..., slice(0, 6, 2) if interleaved else slice(0, 3)] = 1
    y, _ = FORMS[form].rope(x, x, angles.cos().to(device), angles.sin().to(device), interleaved=interleaved)
    expected = torch.stack((angles.cos(), angles.sin()), -1 if interleaved else -2).reshape(6)
    assert torch.equal(y.flatten().cpu(), expected)


@form
@pytest.mark.parametrize(("B", "H", "K", "S"), [(0, 2, 1, 3), (2, 2, 1, 0), (1, 0, 2, 2), (1, 2, 0, 2), (1, 0, 0, 2)])
def test_nothing_to_do(form: str, device: str, B: int, H: int, K: int, S: int) -> None:
    q, k = draw(B, H, S, 8, device=device), draw(B, K, S, 8, device=device)
    cos, sin = tables(S, R=8, dtype=torch.float32, device=device)
    results = check(form, q, k, cos, sin, interleaved=True)
    assert [y.shape for y in results] == [q.shape, k.shape]


@pairing
def test_offsets_beyond_32_bits(device: str, interleaved: bool) -> None:
    """Batches, heads or positions 2^30 elements apart. Only the pages that are touched take memory."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    cos, sin = tables(3, R=8, dtype=torch.float32, device=device)
    for axis, shape in enumerate([(3, 1, 1, 8), (1, 3, 1, 8), (1, 1, 3, 8)]):
        strides = [8, 8, 8, 1]
        strides[axis] = 2**30
        q = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, shape, strides)
        q.copy_(draw(*shape, dtype=torch.bfloat16, device=device))
        near = q.contiguous()
        angles = cos[: shape[2]], sin[: shape[2]]
        check("triton", q, near, *angles, interleaved=interleaved)
        check("triton", near, q, *angles, interleaved=interleaved)
    table = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, (3, 3, 4), (2**20, 2**30 - 2**20, 1))
    table.copy_(draw(3, 3, 4, dtype=torch.bfloat16, device=device))
    x = draw(3, 1, 3, 8, dtype=torch.bfloat16, device=device)
    check("triton", x, x, table, table, interleaved=interleaved)


@pairing
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_writes_every_element(device: str, target: str, interleaved: bool) -> None:
    """Heads in one share and in several, for the GPU they ship for, on results that hold NaN before."""
    for H, K, D, R in ((20, 20, 128, 128), (32, 8, 160, 40), (40, 3, 256, 256), (3, 70, 24, 10)):
        q, k = (draw(1, n, 2, D, dtype=torch.bfloat16, device=device, seed=n) for n in (H, K))
        cos, sin = tables(2, R=R, dtype=torch.float32, device=device)
        launch, *results = rope_file.plan(q, k, cos, sin, interleaved, TARGETS[target])
        results = [y.fill_(torch.nan) for y in results]
        launch.run()
        assert_meets_contract("rope", tuple(results), q, k, cos, sin, interleaved=interleaved)


@pairing
def test_a_token_has_the_same_bits_alone_and_in_any_batch(device: str, interleaved: bool) -> None:
    q, k = (draw(3, n, 4, 40, device=device, seed=n) for n in (5, 2))
    cos, sin = tables(3, 4, R=20, dtype=torch.float32, device=device)
    together = kernels.rope(q, k, cos, sin, interleaved=interleaved)
    alone = kernels.rope(q[1:2, :, 2:3], k[1:2, :, 2:3], cos[1:2, 2:3], sin[1:2, 2:3], interleaved=interleaved)
    for one, all_ in zip(alone, together, strict=True):
        assert same_bits(one[0, :, 0], all_[1, :, 2])


@form
def test_arguments_that_do_not_fit_are_named(form: str, device: str) -> None:
    q, k = torch.ones(2, 4, 3, 8, device=device), torch.ones(2, 2, 3, 8, device=device)
    t = torch.ones(3, 4, device=device)

    def fails(match: str, *given: Any) -> None:
        with pytest.raises(InputError, match=match):
            FORMS[form].rope(*given, interleaved=True)

    fails(r"rope: q is \[4, 3, 8\] .*; expected 4 axes", q[0], k, t, t)
    fails(r"rope: k is \[2, 2, 3, 6\] .*; expected \[2, 2, 3, 8\]", q, k[..., :6], t, t)
    fails(r"rope: k is \[1, 2, 3, 8\] .*; expected \[2, 2, 3, 8\]", q, k[:1], t, t)
    fails(r"rope: k is \[2, 3, 8\] .*; expected \[2, heads, 3, 8\]", q, k[:, 0], t, t)
    fails(r"rope: k is .*float16 .*; expected .*float32", q, k.half(), t, t)
    fails(r"rope: cos is \[3, 5\] .*R <= D = 8: each angle once", q, k, torch.ones(3, 5, device=device), t)
    fails(r"rope: cos is \[2, 4\] .*; expected \[3, 4\]", q, k, t[:2], t[:2])
    fails(r"rope: cos is \[1, 3, 4\] .*; expected \[2, 3, 4\]", q, k, t[None], t[None])
    fails(r"rope: cos is .*float16 .*; expected \[3, 4\] torch.float32", q, k, t.half(), t.half())
    fails(r"rope: sin is \[3, 3\] .*; expected \[3, 4\]", q, k, t, t[:, :3])
    fails(r"rope: sin is .*bfloat16 .*; expected \[3, 4\] torch.float32", q, k, t, t.bfloat16())
    fails(r"rope: cos is .* on meta; expected .* on " + device, q, k, t.to("meta"), t)
    fails("rope: cos is float", q, k, 1.0, t)


@pytest.mark.parametrize("layout", ["dense", "transposed", "part of a wider row"])
def test_torch_takes_it_for_an_operator_of_its_own(device: str, layout: str) -> None:
    """Schema, fake tensors with the strides of the real ones, and a graph without breaks."""
    q, k = (VIEWS[layout](draw(2, n, 3, 8, device=device)) for n in (4, 2))
    cos, sin = tables(3, R=4, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.refllm.rope.default, (q, k, cos, sin, True))
    compiled = torch.compile(lambda *given: kernels.rope(*given, interleaved=True), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, cos, sin), kernels.rope(q, k, cos, sin, interleaved=True), strict=True):
        assert same_bits(a, b)
        assert a.stride() == b.stride()
