"""What `attention` and `decode_attention` have to keep beside what all operators do (test_operators.py): edges of tiles
and chunks, what is not finite, and lengths. Laws about their numbers: tests/ops/test_properties_operators.py."""

from collections.abc import Sequence
from importlib import import_module
from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from refllm import kernels  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.launch import stands_for_others  # noqa: E402
from refllm.kernels.targets import TARGETS  # noqa: E402
from refllm.kernels.verify import assert_meets_contract  # noqa: E402

prefill, decoding = (import_module(f"refllm.kernels.triton.{name}") for name in ("attention", "decode_attention"))
Form = Any
FORMS = pytest.mark.parametrize("form", [plain, kernels], ids=["plain", "triton"])
HEAD_DIMS = (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
NAN, INF = float("nan"), float("inf")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CHUNK = decoding.CHUNK
Tensors = tuple[torch.Tensor, ...]


def normal(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=g).to(device, dtype) for size in sizes)


def draw(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensors:
    """q, k, v for (B, H, K, S, T, D)."""
    B, H, K, S, T, D = shape
    return normal(((B, H, S, D), (B, K, T, D), (B, K, T, D)), dtype, device, seed)


def draw_cache(
    shape: tuple[int, int, int, int, int], lengths: Sequence[int], dtype: torch.dtype, device: str, unused: float = NAN
) -> Tensors:
    """q, both caches and lengths for (H, K, S, N, D); slots that no sequence uses hold `unused`."""
    H, K, S, N, D = shape
    B = len(lengths)
    q, k, v = normal(((B, H, S, D), (B, K, N, D), (B, K, N, D)), dtype, device, D)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = unused, unused
    return q, k, v, torch.tensor(lengths, dtype=torch.int64, device=device)


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that NaN equals NaN and 0 differs from -0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def check(form: Form, operator: str, *arguments: torch.Tensor, **keywords: Any) -> Any:
    """What form returns, after it has been held against the definition."""
    results = getattr(form, operator)(*arguments, **keywords)
    assert_meets_contract(operator, results, *arguments, **keywords)
    return results


# -- head dims, tiles and chunks ---------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_head_dim(form: Form, D: int, device: str) -> None:
    """In float32 a few: only the order of additions is left to judge, and plain products of few rows have their own."""
    check(form, "attention", *draw((1, 2, 1, 70, 90, D), BF16, device, seed=D))
    check(form, "decode_attention", *draw_cache((2, 1, 2, 100, D), [100], BF16, device))
    if D in (8, 80, 160):
        check(form, "attention", *draw((1, 1, 1, 33, 40, D), F32, device, seed=D))
    if D in (40, 80, 160):
        check(form, "decode_attention", *draw_cache((4, 1, 4, 300, D), [300], F32, device))


EDGES = (
    *((1, 1), (1, 2), (2, 1), (127, 127), (128, 128), (129, 129), (127, 129), (129, 127), (128, 257), (257, 2)),
    *((2, 64), (2, 65)),  # the first query sees all but one key of a tile, and all of it
)


@FORMS
@pytest.mark.parametrize(("S", "T"), EDGES)
def test_the_edges_of_tiles(form: Form, S: int, T: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, S, T, 16), F16, device, seed=S)
    check(form, "attention", q, k, v)
    if S != T:
        check(form, "attention", q, k, v, causal=False)


@FORMS
@pytest.mark.parametrize("S", [1, 3, 8])
def test_every_edge_of_a_length(form: Form, S: int, device: str) -> None:
    lengths = [0, 1, 2, S - 1, S, 127, 128, 129, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + S - 1, 300]
    o = check(form, "decode_attention", *draw_cache((2, 2, S, 300, 16), lengths, F16, device))
    for b, length in enumerate(lengths):  # the first queries of a sequence shorter than S see nothing
        assert (o[b, :, : max(0, S - length)] == 0).all()
        assert (o[b, :, max(0, S - length) :] != 0).any(-1).all()


@FORMS
@pytest.mark.parametrize(("group", "S"), [(1, 1), (3, 5), (16, 1), (8, 3), (8, 8), (17, 8)])
def test_every_number_of_query_rows(form: Form, group: int, S: int, device: str) -> None:
    check(form, "decode_attention", *draw_cache((group, 1, S, 90, 16), [90], BF16, device))


@FORMS
@pytest.mark.parametrize("scale", [None, 0.7, -0.4, 0.0, 2])
def test_every_option_can_be_combined_with_every_other(form: Form, scale: float | None, device: str) -> None:
    q, k, v = draw((2, 2, 1, 70, 90, 24), BF16, device)
    key_mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
    for causal, mask in product((True, False), (None, key_mask)):
        o = check(form, "attention", q, k, v, scale=scale, causal=causal, key_mask=mask)
        both = check(form, "attention", q, k, v, scale=scale, causal=causal, key_mask=mask, return_lse=True)
        assert same(o, both[0])


# -- what is not finite ------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4])
def test_masked_keys_and_values_never_reach_a_row(form: Form, value: float, device: str) -> None:
    q, k, v = draw((2, 1, 1, 20, 90, 16), BF16, device)
    key_mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
    hidden = ~key_mask[:, None, :, None].expand_as(k)
    for causal in (True, False):
        how = {"causal": causal, "key_mask": key_mask, "return_lse": True}
        dirty, clean = ([y.masked_fill(hidden, x) for y in (k, v)] for x in (value, 0.0))
        results = form.attention(q, *dirty, **how)
        assert all(x.isfinite().all() for x in results)
        assert_meets_contract("attention", results, q, *clean, **how)


@FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_slots_past_a_length_never_reach_the_result(form: Form, value: float, device: str) -> None:
    for S in (1, 3):
        found = [
            form.decode_attention(*draw_cache((2, 1, S, 520, 24), [0, 1, 100, 256, 300], BF16, device, unused))
            for unused in (0.0, value)
        ]
        assert same(*found)


@FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("D", [24, 80])
def test_later_keys_and_values_never_reach_an_earlier_row(form: Form, value: float, D: int, device: str) -> None:
    q, k, v = draw((1, 1, 1, 12, 20, D), BF16, device)
    k[:, :, 15:], v[:, :, 15:] = value, value
    o, lse = form.attention(q, k, v, return_lse=True)
    clean, clean_lse = form.attention(
        q, k.masked_fill(~k.isfinite(), 0), v.masked_fill(~v.isfinite(), 0), return_lse=True
    )
    torch.testing.assert_close(o[:, :, :7], clean[:, :, :7], rtol=2e-2, atol=1e-3)
    assert same(lse[:, :, :7], clean_lse[:, :, :7])
    assert o[:, :, 7:].isnan().any(-1).all(), "they do reach the rows that see them"


@FORMS
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("tail", [0, 70], ids=["diagonal tile", "full tile"])
def test_values_that_are_not_finite_reach_exactly_the_rows_that_see_them(
    form: Form, dtype: torch.dtype, tail: int, device: str
) -> None:
    q, k, v = draw((1, 2, 1, 70, 70 + tail, 40), dtype, device)
    v[:, :, 3, 1], v[:, :, 5, 2], v[:, :, 7, 4], v[:, :, 8, 0] = NAN, INF, -INF, NAN
    v[:, :, 9, 5], v[:, :, 12, 5], v[:, :, 14, 35] = INF, -INF, INF  # inf - inf is NaN from row 12 on
    v[:, :, 20, 31], v[:, :, 30, 32], v[:, :, 40, 39] = NAN, NAN, NAN
    check(form, "attention", q, k, v)


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_slots_that_are_not_finite_reach_exactly_the_rows_that_see_them(
    form: Form, dtype: torch.dtype, value: float, device: str
) -> None:
    q, k, v, lengths = draw_cache((2, 1, 4, 300, 40), [300, 258, 100], dtype, device)
    v[0, 0, 298, 3], v[1, 0, 256, 35], v[2, 0, 40, 1] = value, value, value
    v[0, 0, 10, 20], v[0, 0, 298, 20] = INF, -INF  # in two chunks: NaN where both are seen
    o = check(form, "decode_attention", q, k, v, lengths)
    assert o[0, :, :2, 3].isfinite().all()
    assert not o[0, :, 2:, 3].isfinite().any()


@FORMS
def test_a_weight_of_exactly_zero_silences_its_value(form: Form, device: str) -> None:
    """Of one key, and of a whole chunk of a cache."""
    q, k, v = draw((1, 1, 1, 4, 90, 16), F32, device)
    k[:, :, 20], k[:, :, 50] = 0, 0
    k[:, :, 20, 0], q[..., 0] = -1e4, 1.0  # e^-2500 is 0
    v[:, :, 20], v[:, :, 50, 3] = NAN, INF
    o = check(form, "attention", q, k, v)
    assert not o.isnan().any()
    assert (o[..., 3] == INF).all()
    q, k, v, lengths = draw_cache((2, 1, 2, 600, 16), [600, 300], F32, device)
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, :CHUNK, 0], v[:, :, 10] = -1e4, NAN
    assert check(form, "decode_attention", q, k, v, lengths).isfinite().all()


@FORMS
@pytest.mark.parametrize("score", [NAN, INF, -INF])
@pytest.mark.parametrize("key", [3, 20, 70])
def test_scores_that_are_not_finite_act_as_in_the_definition(form: Form, score: float, key: int, device: str) -> None:
    """Through a key, and through a query: that spoils its own row only."""
    q, k, v = draw((1, 2, 1, 70, 80, 16), F32, device)
    q[..., 0] = q[..., 0].abs() + 1
    k[:, :, key, 0] = score
    check(form, "attention", q, k, v)
    check(form, "attention", q, k, v, causal=False)
    k[:, :, key, 0], q[0, 1, 4, 2] = 0, NAN
    o, lse = form.attention(q, k, v, return_lse=True)
    assert o[0, 1, 4].isnan().all()
    assert (int(o.isnan().any(-1).sum()), int(lse.isnan().sum())) == (1, 1)


@FORMS
@pytest.mark.parametrize("score", [NAN, INF, -INF])
@pytest.mark.parametrize("slot", [3, 299])
def test_scores_of_slots_that_are_not_finite_act_as_in_the_definition(
    form: Form, score: float, slot: int, device: str
) -> None:
    q, k, v, lengths = draw_cache((2, 1, 3, 300, 16), [300, 300], F32, device)
    q[..., 0] = q[..., 0].abs() + 1
    k[0, :, slot, 0] = score
    check(form, "decode_attention", q, k, v, lengths)


@FORMS
def test_a_chunk_of_scores_that_are_minus_infinity_counts_as_none(form: Form, device: str) -> None:
    q, k, v, lengths = draw_cache((2, 1, 1, 600, 16), [600, 400], F32, device)
    q[..., 0] = 1
    k[:, :, :CHUNK, 0] = -INF
    k[1, :, :, 0] = -INF
    o = check(form, "decode_attention", q, k, v, lengths)
    assert (o[0] != 0).any()
    assert (o[1] == 0).all()


# -- the kernels, and their binding ------------------------------------------------------------------------------------


def shipped_tiles() -> list[tuple[torch.dtype, Any]]:
    """Every distinct tile, as (dtype, target, D): what differs only in warps or stages computes the same."""
    found = {}
    for target, dtype, D in product(TARGETS.values(), (BF16, F32), HEAD_DIMS):
        tile = prefill.choose_tile(D, dtype, target)
        apart = prefill.constants_of(D, dtype, 1.0, target)
        found.setdefault((tile.M, tile.N, dtype, apart["HIGH"] > 0, apart["CHAINED"]), (dtype, target, D))
    return list(found.values())


@pytest.mark.parametrize(("dtype", "target", "D"), shipped_tiles(), ids=lambda x: getattr(x, "name", str(x)))
def test_every_shipped_tile_writes_all_of_its_output(dtype: torch.dtype, target: Any, D: int, device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU runs the tiles of its own target")
    q, k, v = draw((1, 1, 1, 150, 150, D), dtype, device)
    launch, o, lse = prefill.plan(q, k, v, D**-0.5, True, None, target)
    o.fill_(NAN), lse.fill_(NAN)
    launch.run()
    assert_meets_contract("attention", (o, lse), q, k, v, return_lse=True)


def test_head_dims_split_into_powers_of_two() -> None:
    assert [prefill.parts(D) for D in HEAD_DIMS] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 32),
        (128, 64), (256, 0),
    ]  # fmt: skip
    for D in range(8, 257):
        low, high = prefill.parts(D)
        assert D <= low + high < 2 * max(D, 16)


def test_launches_cover_every_tile() -> None:
    for target in TARGETS.values():
        found = [launch for _, launch in prefill.launches(target)]
        tiles = {(x.constants["BLOCK_M"], x.constants["BLOCK_N"], x.num_warps, x.num_stages) for x in found}
        dtypes = (BF16, F32) if stands_for_others(target) else (BF16,)
        assert tiles == {tuple(prefill.choose_tile(D, dtype, target)) for D in range(8, 257) for dtype in dtypes}


def test_lengths_of_32_bits_and_apart_in_memory(device: str) -> None:
    q, k, v, lengths = draw_cache((4, 2, 2, 70, 24), [70, 0, 33], BF16, device)
    for form in (plain, kernels):
        for other in (lengths.int(), torch.stack((lengths, lengths + 1), -1)[:, 0]):
            assert same(form.decode_attention(q, k, v, other), form.decode_attention(q, k, v, lengths))


def test_chunks_that_nobody_wrote_are_not_read(device: str) -> None:
    q, k, v, lengths = draw_cache((4, 2, 2, 700, 40), [700, 0, 1, 300], BF16, device)
    (split, combine), o = decoding.plan(q, k, v, lengths, 40**-0.5)
    for x in (o, *(split.arguments[name] for name in ("acc_ptr", "m_ptr", "total_ptr"))):
        x.fill_(NAN)
    split.run(), combine.run()
    assert_meets_contract("decode_attention", o, q, k, v, lengths)


def test_a_length_that_is_impossible_makes_its_row_nan_on_a_gpu(device: str) -> None:
    q, k, v, lengths = draw_cache((2, 1, 2, 300, 16), [300, 0, 20, 299], BF16, device)
    good = kernels.decode_attention(q, k, v, lengths)
    for wrong in (-1, 301, 2**31 - 1, -(2**31), 2**40):
        lengths[1] = wrong
        (split, combine), o = decoding.plan(q, k, v, lengths, 0.25)
        split.run(), combine.run()
        assert o[1].isnan().all(), wrong
        assert same(o[[0, 2, 3]], good[[0, 2, 3]]), wrong
