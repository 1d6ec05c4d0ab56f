"""Attention, plain and Triton, against its definition: values, masks, NaN, strides, lengths, what must not matter."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from where_kernels_run import DEVICE, running

from refllm import kernels
from refllm.errors import InputError
from refllm.kernels import plain
from refllm.kernels import triton as compiled
from refllm.kernels.launch import stands_for_others
from refllm.kernels.targets import TARGETS
from refllm.kernels.verify import Contract, assert_meets_contract

kernel = importlib.import_module("refllm.kernels.triton.attention")

Form = Callable[..., Any]
FORMS = pytest.mark.parametrize("form", [plain.attention, compiled.attention], ids=["plain", "triton"])
HEAD_DIMS = (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
NAN, INF = float("nan"), float("inf")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def draw(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v for (B, H, K, S, T, D)."""
    B, H, K, S, T, D = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, S, D), (B, K, T, D), (B, K, T, D))
    q, k, v = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    return q, k, v


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that NaN equals NaN and 0 differs from -0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def check(form: Form, *arguments: torch.Tensor, **keywords: Any) -> Any:
    """What form returns, after it has been held against the definition."""
    results = form(*arguments, **keywords)
    assert_meets_contract("attention", results, *arguments, **keywords)
    return results


# ---------------------------------------------------------------------------------------------------------- values


@settings(max_examples=5)
@given(data=st.data())
def test_meets_the_contract(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([F32, F16, BF16]), "dtype")
    K = data.draw(st.integers(1, 2), "K")
    shape = (
        data.draw(st.integers(1, 2), "B"),
        K * data.draw(st.integers(1, 2), "group"),
        K,
        data.draw(st.integers(100, 140), "S"),  # an error is judged by its mean square: that takes a few hundred rows
        data.draw(st.just(0) | st.integers(64, 200), "T"),
        # In float32 only the order of additions is left to judge. NumPy and Torch share one, save for small products.
        40 if dtype == F32 else data.draw(st.sampled_from([8, 16, 40]), "D"),
    )
    causal, masked = data.draw(st.booleans(), "causal"), data.draw(st.booleans(), "masked")
    scale = data.draw(st.sampled_from([None, 0.7, -0.4, 0.0]), "scale")
    with running():
        q, k, v = draw(shape, dtype, DEVICE)
        seen = torch.rand(shape[0], shape[4], generator=torch.Generator().manual_seed(1)) > 0.3
        key_mask = seen.to(DEVICE) if masked else None
        keywords = {"scale": scale, "causal": causal, "key_mask": key_mask, "return_lse": True}
        contract = Contract("attention", (q, k, v), keywords)
        for form in (plain.attention, compiled.attention):
            problems = [verdict.problem for verdict in contract.judge(form(q, k, v, **keywords)) if verdict.problem]
            assert not problems, (form, problems)


@FORMS
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_meets_the_contract_for_every_head_dim(form: Form, D: int, device: str) -> None:
    check(form, *draw((1, 2, 1, 70, 90, D), BF16, device, seed=D))


@FORMS
@pytest.mark.parametrize("D", [8, 80, 160])
def test_meets_the_contract_for_split_head_dims_in_float32(form: Form, D: int, device: str) -> None:
    check(form, *draw((1, 1, 1, 33, 40, D), F32, device, seed=D))


@FORMS
@pytest.mark.parametrize(
    ("S", "T"),
    [
        *((1, 1), (1, 2), (2, 1), (127, 127), (128, 128), (129, 129), (127, 129), (129, 127), (128, 257), (257, 2)),
        *((2, 64), (2, 65)),  # the first query sees all but one key of a tile, and all of it
    ],
)
def test_meets_the_contract_at_the_edges_of_tiles(form: Form, S: int, T: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, S, T, 16), F16, device, seed=S)
    check(form, q, k, v)
    if S != T:
        check(form, q, k, v, causal=False)


@FORMS
@pytest.mark.parametrize("scale", [0.7, -0.4, 0.0, 2])
def test_meets_the_contract_for_scales_of_any_sign(form: Form, scale: float, device: str) -> None:
    q, k, v = draw((1, 2, 1, 70, 90, 24), BF16, device)
    check(form, q, k, v, scale=scale)


@FORMS
@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_zero_lengths_are_legal(form: Form, B: int, S: int, T: int, device: str) -> None:
    q, k, v = draw((B, 4, 2, S, T, 16), BF16, device)
    for key_mask in (None, torch.ones(B, T, dtype=torch.bool, device=device)):
        o, lse = form(q, k, v, key_mask=key_mask, return_lse=True)
        assert o.shape == (B, 4, S, 16)
        assert lse.shape == (B, 4, S)
        assert (o == 0).all()
        assert (lse == -INF).all()


@FORMS
def test_zero_queries_give_the_mean_of_the_values_they_see(form: Form, device: str) -> None:
    q, k, v = draw((2, 2, 1, 20, 77, 16), F32, device)
    o, lse = form(torch.zeros_like(q), k, v, causal=False, return_lse=True)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, 77).log(), rtol=1e-6, atol=0)
    o = form(torch.zeros_like(q), k, v)
    torch.testing.assert_close(o[:, :, 0], v[:, :, :58].mean(2).expand(2, 2, 16), rtol=1e-5, atol=1e-6)


@FORMS
def test_equal_values_are_returned_unchanged(form: Form, device: str) -> None:
    q, k, _ = draw((1, 2, 1, 20, 77, 40), F32, device)
    o = form(q, k, torch.full_like(k, 1.75))
    torch.testing.assert_close(o, torch.full_like(o, 1.75), rtol=1e-6, atol=0)


@FORMS
def test_without_a_mask_the_order_of_keys_does_not_matter(form: Form, device: str) -> None:
    q, k, v = draw((1, 1, 1, 30, 150, 16), BF16, device)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3)).to(device)
    o = form(q, k[:, :, order], v[:, :, order], causal=False)
    assert_meets_contract("attention", o, q, k, v, causal=False)


@FORMS
def test_query_heads_of_a_group_share_a_head_of_keys(form: Form, device: str) -> None:
    q, k, v = draw((3, 6, 2, 5, 9, 16), F32, device)
    o = form(q, k, torch.tensor([2.0, 3.0], device=device)[None, :, None, None].expand_as(v))
    torch.testing.assert_close(o[:, :3], torch.full_like(o[:, :3], 2.0))
    torch.testing.assert_close(o[:, 3:], torch.full_like(o[:, 3:], 3.0))
    check(form, q, k, v)


@FORMS
@pytest.mark.parametrize("D", [40, 72])
def test_every_slice_of_the_head_dim_takes_part(form: Form, D: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, 4, 9, D), BF16, device)
    whole = form(q, k, v)
    for first in range(0, D, 8):
        dims = slice(first, first + 8)
        for x in (q, v):
            less = x.clone()
            less[..., dims] = 0
            arguments = (less, k, v) if x is q else (q, k, less)
            o = check(form, *arguments)
            others = torch.cat((o[..., :first] - whole[..., :first], o[..., first + 8 :] - whole[..., first + 8 :]), -1)
            if x is q:
                assert (others != 0).any(), dims
            else:
                assert (o[..., dims] == 0).all(), dims
                assert (others == 0).all(), dims


@FORMS
def test_scores_around_minus_100000_are_scores_as_others(form: Form, device: str) -> None:
    q, k, v = draw((1, 2, 1, 40, 100, 16), F32, device)
    q[..., 0], k[..., 0] = 256, -392  # -100352 with scale 1
    o = check(form, q, k, v, scale=1.0)
    assert (o != 0).any()
    q[..., 0] = 0  # the shift changes nothing but how scores are rounded: 2^-8 at 1e5
    torch.testing.assert_close(o, form(q, k, v, scale=1.0), rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------- masks, NaN and infinity


@FORMS
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_without_keys_yields_zero_and_its_neighbours_are_untouched(
    form: Form, causal: bool, device: str
) -> None:
    q, k, v = draw((3, 2, 1, 20, 40, 16), BF16, device)
    key_mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    key_mask[1] = False
    o, lse = form(q, k, v, causal=causal, key_mask=key_mask, return_lse=True)
    assert (o[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert lse[[0, 2]].isfinite().all()
    assert_meets_contract("attention", (o, lse), q, k, v, causal=causal, key_mask=key_mask, return_lse=True)


@FORMS
def test_more_queries_than_keys_leave_the_first_queries_without_any(form: Form, device: str) -> None:
    q, k, v = draw((1, 2, 2, 150, 20, 24), BF16, device)
    o, lse = form(q, k, v, return_lse=True)
    assert (o[:, :, :130] == 0).all()
    assert (lse[:, :, :130] == -INF).all()
    assert (o[:, :, 130:] != 0).any(-1).all()
    assert lse[:, :, 130:].isfinite().all()


@FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4])
def test_masked_keys_and_values_never_reach_a_row(form: Form, value: float, device: str) -> None:
    q, k, v = draw((2, 1, 1, 20, 90, 16), BF16, device)
    key_mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
    hidden = ~key_mask[:, None, :, None].expand_as(k)
    results = [
        form(q, k.masked_fill(hidden, x), v.masked_fill(hidden, x), causal=causal, key_mask=key_mask, return_lse=True)
        for causal in (True, False)
        for x in (0.0, value)
    ]
    for a, b in (results[:2], results[2:]):
        assert len(a) == len(b) == 2
        for clean, dirty in zip(a, b, strict=True):
            torch.testing.assert_close(clean, dirty, rtol=2e-2, atol=1e-3)
            assert dirty.isfinite().all()


@FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("D", [24, 80])
def test_later_keys_and_values_never_reach_an_earlier_row(form: Form, value: float, D: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, 12, 20, D), BF16, device)
    k[:, :, 15:], v[:, :, 15:] = value, value
    o, lse = form(q, k, v, return_lse=True)
    clean, clean_lse = form(q, k.masked_fill(~k.isfinite(), 0), v.masked_fill(~v.isfinite(), 0), return_lse=True)
    torch.testing.assert_close(o[:, :, :7], clean[:, :, :7], rtol=2e-2, atol=1e-3)
    assert same(lse[:, :, :7], clean_lse[:, :, :7])
    assert o[:, :, 7:].isnan().any(-1).all(), "they do reach the rows that see them"


@FORMS
@pytest.mark.parametrize("dim", [0, 31, 32, 39])
def test_one_nan_in_any_dim_of_a_later_value_never_reaches_an_earlier_row(form: Form, dim: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, 12, 20, 40), BF16, device)
    v[:, :, 15, dim] = NAN
    o = check(form, q, k, v)
    assert o[:, :, :7].isfinite().all()
    assert int(o.isnan().sum()) == 5


@FORMS
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("tail", [0, 70], ids=["diagonal tile", "full tile"])
def test_values_that_are_not_finite_reach_exactly_the_rows_that_see_them(
    form: Form, dtype: torch.dtype, tail: int, device: str
) -> None:
    q, k, v = draw((1, 2, 1, 70, 70 + tail, 40), dtype, device)
    v[:, :, 3, 1], v[:, :, 5, 2], v[:, :, 7, 4] = NAN, INF, -INF
    v[:, :, 9, 5], v[:, :, 12, 5], v[:, :, 14, 35] = INF, -INF, INF  # inf - inf is NaN from row 12 on
    check(form, q, k, v)


@FORMS
def test_a_weight_of_exactly_zero_silences_its_value(form: Form, device: str) -> None:
    q, k, v = draw((1, 1, 1, 4, 90, 16), F32, device)
    k[:, :, 20], k[:, :, 50] = 0, 0
    k[:, :, 20, 0], q[..., 0] = -1e4, 1.0  # e^-2500 is 0
    v[:, :, 20], v[:, :, 50, 3] = NAN, INF
    o = check(form, q, k, v)
    assert not o.isnan().any()
    assert (o[..., 3] == INF).all()


@FORMS
@pytest.mark.parametrize("score", [NAN, INF, -INF])
@pytest.mark.parametrize("key", [3, 20, 70])
def test_scores_that_are_not_finite_act_as_in_the_definition(form: Form, score: float, key: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, 70, 80, 16), F32, device)
    q[..., 0] = q[..., 0].abs() + 1
    k[:, :, key, 0] = score
    check(form, q, k, v)
    check(form, q, k, v, causal=False)


@FORMS
def test_a_nan_query_spoils_its_own_row_only(form: Form, device: str) -> None:
    q, k, v = draw((1, 2, 1, 10, 30, 16), BF16, device)
    q[0, 1, 4, 2] = NAN
    o, lse = form(q, k, v, return_lse=True)
    assert o[0, 1, 4].isnan().all()
    assert lse[0, 1, 4].isnan()
    assert int(o.isnan().any(-1).sum()) == 1
    assert int(lse.isnan().sum()) == 1


# ----------------------------------------------------------------------------------------- layouts, and what is free


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors that lie differently in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), NAN, dtype=x.dtype, device=x.device)
    wide[..., 1 : 1 + x.shape[-1]] = x
    gaps = torch.full((x.shape[0], x.shape[1], 2 * x.shape[2], x.shape[3]), NAN, dtype=x.dtype, device=x.device)
    gaps[:, :, ::2] = x
    return {
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a wider projection": wide[..., 1 : 1 + x.shape[-1]],
        "every second token": gaps[:, :, ::2],
        "last axis not dense": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@FORMS
def test_strides_do_not_matter(form: Form, device: str) -> None:
    q, k, v = draw((3, 4, 2, 9, 20, 24), BF16, device)
    expected = form(q, k, v, return_lse=True)
    names = list(layouts(q))
    assert len(names) > 2
    for i, name in enumerate(names):  # q, k and v each in another layout
        arguments = [layouts(x)[names[(i + j) % len(names)]] for j, x in enumerate((q, k, v))]
        for a, b in zip(expected, form(*arguments, return_lse=True), strict=True):
            assert same(a, b), name


@FORMS
def test_expanded_tensors_are_read_as_they_are(form: Form, device: str) -> None:
    q, k, v = draw((1, 2, 2, 9, 20, 16), BF16, device)
    key_mask = torch.rand(20, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    o = form(q.expand(3, 2, 9, 16), k.expand(3, 2, 20, 16), v.expand(3, 2, 20, 16), key_mask=key_mask.expand(3, 20))
    one = form(q, k, v, key_mask=key_mask[None])
    assert all(same(o[b : b + 1], one) for b in range(3))
    every_second = torch.stack((key_mask, ~key_mask), -1)[None, :, 0]
    assert same(form(q, k, v, key_mask=every_second), one)


@FORMS
def test_heads_of_the_result_merge_without_a_copy(form: Form, device: str) -> None:
    q, k, v = draw((2, 4, 2, 9, 20, 16), BF16, device)
    o, lse = form(q, k, v, return_lse=True)
    assert o.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == F32
    assert o.dtype == BF16
    assert o.device == q.device


@FORMS
def test_offsets_past_2_31_elements_are_reached(form: Form, device: str) -> None:
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)  # only the pages that are touched take memory
    far = torch.empty(0, dtype=BF16, device=device).set_(storage, 0, (1, 1, 3, 16), (0, 0, 2**30, 1))
    q, k, v = draw((1, 1, 1, 3, 3, 16), BF16, device)
    for i, x in enumerate((q, k, v)):
        far.copy_(x)
        arguments = [far if i == j else y for j, y in enumerate((q, k, v))]
        assert same(form(*arguments), form(q, k, v)), "qkv"[i]
    heads = far.as_strided((3, 1, 1, 16), (2**30, 0, 0, 1))
    q, k, v = draw((3, 1, 1, 1, 1, 16), BF16, device)
    heads.copy_(v)
    assert same(form(q, k, heads), form(q, k, v))


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_alone_equals_the_row_in_a_batch_bitwise(form: Form, dtype: torch.dtype, device: str) -> None:
    q, k, v = draw((3, 4, 2, 30, 70, 40), dtype, device)
    o, lse = form(q, k, v, return_lse=True)
    for b in range(3):
        row = slice(b, b + 1)
        alone, lse_alone = form(q[row].clone(), k[row].clone(), v[row].clone(), return_lse=True)
        assert same(o[row], alone)
        assert same(lse[row], lse_alone)


@FORMS
def test_two_runs_agree_bitwise_and_inputs_stay_as_they_were(form: Form, device: str) -> None:
    arguments = draw((2, 4, 2, 30, 70, 24), F16, device)
    before = [x.clone() for x in arguments]
    first, second = form(*arguments), form(*arguments)
    assert same(first, second)
    assert all(same(a, b) for a, b in zip(arguments, before, strict=True))


@FORMS
def test_every_option_can_be_combined_with_every_other(form: Form, device: str) -> None:
    q, k, v = draw((2, 2, 1, 20, 40, 16), F16, device)
    key_mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
    for causal in (True, False):
        for mask in (None, key_mask):
            o = check(form, q, k, v, causal=causal, key_mask=mask)
            assert same(o, form(q, k, v, causal=causal, key_mask=mask))


# --------------------------------------------------------------------------------------- the kernel, and its binding


def shipped_tiles() -> list[tuple[torch.dtype, Any]]:
    """Every distinct tile, as (dtype, target, D): what differs only in warps or stages computes the same."""
    found = {}
    for target in TARGETS.values():
        for dtype in (BF16, F32):
            for D in HEAD_DIMS:
                tile = kernel.choose_tile(D, dtype, target)
                apart = kernel.constants_of(D, dtype, 1.0, target)
                found.setdefault((tile.M, tile.N, dtype, apart["HIGH"] > 0, apart["CHAINED"]), (dtype, target, D))
    return list(found.values())


@pytest.mark.parametrize(("dtype", "target", "D"), shipped_tiles(), ids=lambda x: getattr(x, "name", str(x)))
def test_every_shipped_tile_writes_all_of_its_output(dtype: torch.dtype, target: Any, D: int, device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU runs the tiles of its own target")
    q, k, v = draw((1, 1, 1, 150, 150, D), dtype, device)
    launch, o, lse = kernel.plan(q, k, v, D**-0.5, True, None, target)
    o.fill_(NAN), lse.fill_(NAN)
    launch.run()
    assert_meets_contract("attention", (o, lse), q, k, v, return_lse=True)


def test_tiles_do_not_depend_on_batch_or_heads() -> None:
    grids = set()
    for B, H, K in ((1, 1, 1), (7, 8, 2), (64, 32, 8)):
        q, kv = (torch.empty(B, heads, 300, 80, dtype=BF16, device="meta") for heads in (H, K))
        launch = kernel.plan(q, kv, kv, 0.1, True, None)[0]
        assert launch.grid[0] % (B * H) == 0
        grids.add((launch.grid[0] // (B * H), *launch.constants.items(), launch.num_warps, launch.num_stages))
    assert len(grids) == 1


def test_head_dims_split_into_powers_of_two() -> None:
    assert [kernel.parts(D) for D in HEAD_DIMS] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 32),
        (128, 64), (256, 0),
    ]  # fmt: skip
    for D in range(8, 257):
        low, high = kernel.parts(D)
        assert D <= low + high < 2 * max(D, 16)


def test_launches_have_names_of_their_own_and_cover_every_tile() -> None:
    for target in TARGETS.values():
        found = dict(kernel.launches(target))
        assert len(found) == len(list(kernel.launches(target)))
        tiles = {(x.constants["BLOCK_M"], x.constants["BLOCK_N"], x.num_warps, x.num_stages) for x in found.values()}
        dtypes = (BF16, F32) if stands_for_others(target) else (BF16,)
        assert tiles == {tuple(kernel.choose_tile(D, dtype, target)) for D in range(8, 257) for dtype in dtypes}


def test_opcheck_and_torch_compile(device: str) -> None:
    q, k, v = draw((2, 4, 2, 5, 9, 16), BF16, device)
    key_mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    torch.library.opcheck(torch.ops.refllm.attention.default, (q, k, v, 0.25, True, key_mask))
    torch.library.opcheck(torch.ops.refllm.attention.default, (q, k, v, 0.25, True, None))

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, lse = kernels.attention(q, k, v, key_mask=key_mask, return_lse=True)
        return 2 * o + lse[..., None].to(o.dtype)

    backend = "inductor" if device == "cuda" else "aot_eager"
    assert same(torch.compile(doubled, fullgraph=True, backend=backend)(q, k, v), doubled(q, k, v))


def test_backward_says_that_there_is_none(device: str) -> None:
    q, k, v = draw((1, 1, 1, 2, 2, 16), F32, device)
    o = kernels.attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        o.sum().backward()


@FORMS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (2, 4, 5)}, ["q is [2, 4, 5]", "4 axes"]),
        ({"q": (2, 4, 5, 300), "k": (2, 2, 9, 300)}, ["q is", "8 to 256"]),
        ({"q": (2, 4, 5, 4), "k": (2, 2, 9, 4)}, ["q is", "8 to 256"]),
        ({"k": (2, 3, 9, 16), "v": (2, 3, 9, 16)}, ["k is [2, 3, 9, 16]", "divides the 4 query heads"]),
        ({"k": (2, 0, 9, 16), "v": (2, 0, 9, 16)}, ["k is", "divides"]),
        ({"k": (3, 2, 9, 16)}, ["k is [3, 2, 9, 16]", "[2, 2, 9, 16]"]),
        ({"v": (2, 2, 8, 16)}, ["v is [2, 2, 8, 16]", "[2, 2, 9, 16]"]),
        ({"v": F32}, ["v is", "float32", "bfloat16"]),
        ({"q": torch.int32}, ["q is", "int32"]),
        ({"key_mask": (2, 8)}, ["key_mask is [2, 8]", "[2, 9]"]),
        ({"key_mask": F32}, ["key_mask is", "torch.bool"]),
    ],
)
def test_arguments_that_do_not_fit_are_named(form: Form, change: dict[str, Any], words: list[str]) -> None:
    made = {"q": (2, 4, 5, 16), "k": (2, 2, 9, 16), "v": (2, 2, 9, 16), "key_mask": (2, 9)}
    shapes = made | {name: x for name, x in change.items() if isinstance(x, tuple)}
    dtypes = dict.fromkeys(made, BF16) | {"key_mask": torch.bool}
    dtypes |= {name: x for name, x in change.items() if isinstance(x, torch.dtype)}
    x = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    with pytest.raises(InputError) as error:
        form(x["q"], x["k"], x["v"], key_mask=x["key_mask"])
    assert all(word in str(error.value) for word in ["attention", *words]), error.value


def test_a_cpu_tensor_outside_the_interpreter_is_told_where_to_go() -> None:
    with pytest.raises(InputError, match=r"refllm\.kernels\.plain\.attention"):
        kernels.attention(*draw((1, 1, 1, 2, 2, 16), F32, "cpu"))
