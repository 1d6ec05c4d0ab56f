"""Attention over a cache, plain and Triton, against its definition: lengths, unused slots, NaN, strides, the batch."""

import importlib
from collections.abc import Callable, Sequence
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
from refllm.kernels.targets import TARGETS
from refllm.kernels.verify import assert_meets_contract

kernel = importlib.import_module("refllm.kernels.triton.decode_attention")

Form = Callable[..., Any]
FORMS = pytest.mark.parametrize("form", [plain.decode_attention, compiled.decode_attention], ids=["plain", "triton"])
HEAD_DIMS = (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
NAN, INF = float("nan"), float("inf")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CHUNK = kernel.CHUNK


def draw(
    shape: tuple[int, int, int, int, int],
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    unused: float = NAN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, both caches and lengths for (H, K, S, N, D); slots that no sequence uses hold `unused`."""
    H, K, S, N, D = shape
    B, g = len(lengths), torch.Generator().manual_seed(seed)
    sizes = ((B, H, S, D), (B, K, N, D), (B, K, N, D))
    q, k, v = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = unused, unused
    return q, k, v, torch.tensor(lengths, dtype=torch.int64, device=device)


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that NaN equals NaN and 0 differs from -0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def check(form: Form, *arguments: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """What form returns, after it has been held against the definition."""
    o = form(*arguments, **keywords)
    assert_meets_contract("decode_attention", o, *arguments, **keywords)
    return o


# ---------------------------------------------------------------------------------------------------------- values


@settings(max_examples=5)
@given(data=st.data())
def test_meets_the_contract(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([F32, F16, BF16]), "dtype")
    # In float32 only the order of additions is left to judge. NumPy and Torch share one, but not for small products.
    small = dtype != F32
    D = data.draw(st.sampled_from([8, 24, 40]), "D") if small else 40
    group, S = data.draw(st.integers(1 if small else 4, 5), "group"), data.draw(st.integers(1 if small else 4, 8), "S")
    N, K = data.draw(st.integers(0 if small else 200, 600), "N"), data.draw(st.integers(1, 2), "K")
    length = st.just(0) | st.integers(0 if small else 200, N)
    lengths = data.draw(st.lists(length, min_size=3, max_size=4), "lengths")
    scale = data.draw(st.sampled_from([None, 0.7, -0.4]), "scale")
    with running():
        arguments = draw((K * group, K, S, N, D), lengths, dtype, DEVICE)
        for form in (plain.decode_attention, compiled.decode_attention):
            check(form, *arguments, scale=scale)


@FORMS
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_meets_the_contract_for_every_head_dim(form: Form, D: int, device: str) -> None:
    check(form, *draw((2, 1, 2, 100, D), [100], BF16, device, seed=D))


@FORMS
@pytest.mark.parametrize("D", [40, 80, 160])
def test_meets_the_contract_for_split_head_dims_in_float32(form: Form, D: int, device: str) -> None:
    check(form, *draw((4, 1, 4, 300, D), [300], F32, device, seed=D))


@FORMS
@pytest.mark.parametrize("S", [1, 3, 8])
def test_meets_the_contract_at_every_edge_of_a_length(form: Form, S: int, device: str) -> None:
    lengths = [0, 1, 2, S - 1, S, 127, 128, 129, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + S - 1, 300]
    o = check(form, *draw((2, 2, S, 300, 16), lengths, F16, device))
    assert (o[0] == 0).all()
    for b, length in enumerate(lengths):  # the first queries of a sequence shorter than S see nothing
        assert (o[b, :, : max(0, S - length)] == 0).all()
        assert (o[b, :, max(0, S - length) :] != 0).any(-1).all()


@FORMS
@pytest.mark.parametrize(("group", "S"), [(1, 1), (3, 5), (16, 1), (8, 3), (8, 8), (17, 8)])
def test_meets_the_contract_for_every_number_of_query_rows(form: Form, group: int, S: int, device: str) -> None:
    check(form, *draw((group, 1, S, 90, 16), [90], BF16, device))


@FORMS
def test_equals_causal_attention_of_the_same_prefix(form: Form, device: str) -> None:
    attention = plain.attention if form is plain.decode_attention else compiled.attention
    q, k, v, lengths = draw((4, 2, 5, 300, 40), [300], BF16, device)
    torch.testing.assert_close(form(q, k, v, lengths), attention(q, k, v), rtol=2e-2, atol=1e-3)


@FORMS
def test_zero_sizes_are_legal(form: Form, device: str) -> None:
    q, k, v, lengths = draw((4, 2, 3, 0, 16), [0, 0], BF16, device)
    assert (form(q, k, v, lengths) == 0).all()
    q, k, v, lengths = draw((4, 2, 3, 8, 16), [], BF16, device)
    assert form(q, k, v, lengths).shape == (0, 4, 3, 16)


@FORMS
def test_zero_queries_give_the_mean_of_the_values_they_see(form: Form, device: str) -> None:
    q, k, v, lengths = draw((2, 1, 2, 600, 16), [600, 16, 257], F32, device)
    o = form(torch.zeros_like(q), k, v, lengths)
    for b, length in enumerate([600, 16, 257]):
        for s in range(2):
            mean = v[b, :, : length - 1 + s].mean(1).expand(2, 16)
            torch.testing.assert_close(o[b, :, s], mean, rtol=1e-5, atol=1e-6)


@FORMS
def test_query_heads_of_a_group_share_a_head_of_keys(form: Form, device: str) -> None:
    q, k, v, lengths = draw((6, 2, 2, 9, 16), [9, 5, 7], F32, device, unused=0.0)
    o = form(q, k, torch.tensor([2.0, 3.0], device=device)[None, :, None, None].expand_as(v), lengths)
    torch.testing.assert_close(o[:, :3], torch.full_like(o[:, :3], 2.0))
    torch.testing.assert_close(o[:, 3:], torch.full_like(o[:, 3:], 3.0))


@FORMS
@pytest.mark.parametrize("D", [40, 72])
def test_every_slice_of_the_head_dim_takes_part(form: Form, D: int, device: str) -> None:
    q, k, v, lengths = draw((1, 1, 1, 80, D), [80], BF16, device)
    whole = form(q, k, v, lengths)
    for first in range(0, D, 8):
        less_q, less_v = q.clone(), v.clone()
        less_q[..., first : first + 8], less_v[..., first : first + 8] = 0, 0
        assert not torch.equal(check(form, less_q, k, v, lengths), whole), first
        assert (form(q, k, less_v, lengths)[..., first : first + 8] == 0).all(), first


@FORMS
def test_scores_around_minus_100000_are_scores_as_others(form: Form, device: str) -> None:
    q, k, v, lengths = draw((2, 1, 2, 600, 16), [600, 90], F32, device)
    q[..., 0], k[..., 0] = 256, -392  # -100352 with scale 1
    o = check(form, q, k, v, lengths, scale=1.0)
    q[..., 0] = 0  # the shift changes nothing but how scores are rounded: 2^-8 at 1e5
    torch.testing.assert_close(o, form(q, k, v, lengths, scale=1.0), rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------------- NaN


@FORMS
@pytest.mark.parametrize("S", [1, 3])
def test_unused_slots_never_reach_the_result(form: Form, S: int, device: str) -> None:
    lengths = [0, 1, 100, 256, 300]
    clean = form(*draw((2, 1, S, 520, 24), lengths, BF16, device, unused=0.0))
    for unused in (NAN, INF, -INF):
        assert same(clean, form(*draw((2, 1, S, 520, 24), lengths, BF16, device, unused=unused)))


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite_reach_exactly_the_rows_that_see_them(
    form: Form, dtype: torch.dtype, value: float, device: str
) -> None:
    q, k, v, lengths = draw((2, 1, 4, 300, 40), [300, 258, 100], dtype, device)
    v[0, 0, 298, 3], v[1, 0, 256, 35], v[2, 0, 40, 1] = value, value, value
    v[0, 0, 10, 20], v[0, 0, 298, 20] = INF, -INF  # in two chunks: NaN where both are seen
    o = check(form, q, k, v, lengths)
    assert o[0, :, :2, 3].isfinite().all()
    assert not o[0, :, 2:, 3].isfinite().any()


@FORMS
def test_a_weight_of_exactly_zero_silences_a_whole_chunk(form: Form, device: str) -> None:
    q, k, v, lengths = draw((2, 1, 2, 600, 16), [600, 300], F32, device)
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, :CHUNK, 0], v[:, :, 10] = -1e4, NAN  # e^-2500 is 0
    assert check(form, q, k, v, lengths).isfinite().all()


@FORMS
@pytest.mark.parametrize("score", [NAN, INF, -INF])
@pytest.mark.parametrize("slot", [3, 299])
def test_scores_that_are_not_finite_act_as_in_the_definition(form: Form, score: float, slot: int, device: str) -> None:
    q, k, v, lengths = draw((2, 1, 3, 300, 16), [300, 300], F32, device)
    q[..., 0] = q[..., 0].abs() + 1
    k[0, :, slot, 0] = score
    check(form, q, k, v, lengths)


@FORMS
def test_a_chunk_of_scores_that_are_minus_infinity_counts_as_none(form: Form, device: str) -> None:
    q, k, v, lengths = draw((2, 1, 1, 600, 16), [600, 400], F32, device)
    q[..., 0] = 1
    k[:, :, :CHUNK, 0] = -INF
    k[1, :, :, 0] = -INF
    o = check(form, q, k, v, lengths)
    assert (o[0] != 0).any()
    assert (o[1] == 0).all()


# ----------------------------------------------------------------------------------------- layouts, and what is free


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors that lie differently in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), NAN, dtype=x.dtype, device=x.device)
    wide[..., 1 : 1 + x.shape[-1]] = x
    longer = torch.full((x.shape[0], x.shape[1], x.shape[2] + 7, x.shape[3]), NAN, dtype=x.dtype, device=x.device)
    longer[:, :, : x.shape[2]] = x
    return {
        "slots first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a wider tensor": wide[..., 1 : 1 + x.shape[-1]],
        "part of a longer cache": longer[:, :, : x.shape[2]],
        "last axis not dense": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@FORMS
def test_strides_do_not_matter(form: Form, device: str) -> None:
    q, k, v, lengths = draw((4, 2, 2, 70, 24), [70, 0, 33], BF16, device)
    expected = form(q, k, v, lengths)
    names = list(layouts(q))
    assert len(names) > 2
    strided = torch.stack((lengths, lengths + 1), -1)[:, 0]
    for i, name in enumerate(names):  # q, k and v each in another layout
        arguments = [layouts(x)[names[(i + j) % len(names)]] for j, x in enumerate((q, k, v))]
        assert same(expected, form(*arguments, strided)), name
        assert same(expected, form(*arguments, lengths.int())), name


@FORMS
def test_heads_of_the_result_merge_without_a_copy(form: Form, device: str) -> None:
    q, k, v, lengths = draw((4, 2, 3, 9, 16), [9, 4], BF16, device)
    o = form(q, k, v, lengths)
    assert o.transpose(1, 2).is_contiguous()
    assert o.dtype == BF16
    assert o.shape == q.shape


@FORMS
def test_offsets_past_2_31_elements_are_reached(form: Form, device: str) -> None:
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)  # only the pages that are touched take memory
    far = torch.empty(0, dtype=BF16, device=device).set_(storage, 0, (1, 1, 3, 16), (0, 0, 2**30, 1))
    q, k, v, lengths = draw((1, 1, 3, 3, 16), [3], BF16, device)
    for i, x in enumerate((q, k, v)):
        far.copy_(x)
        arguments = [far if i == j else y for j, y in enumerate((q, k, v))]
        assert same(form(*arguments, lengths), form(q, k, v, lengths)), "qkv"[i]


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_depends_neither_on_its_batch_nor_on_the_size_of_the_cache(
    form: Form, dtype: torch.dtype, device: str
) -> None:
    lengths_B = [600, 70, 300]
    q, k, v, lengths = draw((4, 2, 2, 600, 24), lengths_B, dtype, device, unused=0.0)
    o = form(q, k, v, lengths)
    for b, length in enumerate(lengths_B):
        row = slice(b, b + 1)
        alone = form(q[row].clone(), k[row].clone(), v[row].clone(), lengths[row].clone())
        assert same(o[row], alone)
        if form is compiled.decode_attention:  # the plain form multiplies by the whole cache
            assert same(o[row], form(q[row], k[row, :, :length].clone(), v[row, :, :length].clone(), lengths[row]))


@FORMS
def test_two_runs_agree_bitwise_and_inputs_stay_as_they_were(form: Form, device: str) -> None:
    arguments = draw((4, 2, 2, 300, 24), [300, 7, 270], F16, device)
    before = [x.clone() for x in arguments]
    assert same(form(*arguments), form(*arguments))
    assert all(same(a, b) for a, b in zip(arguments[:3], before[:3], strict=True))
    assert torch.equal(arguments[3], before[3])


# --------------------------------------------------------------------------------------- the kernel, and its binding


def test_every_output_is_written_and_unwritten_chunks_are_not_read(device: str) -> None:
    q, k, v, lengths = draw((4, 2, 2, 700, 40), [700, 0, 1, 300], BF16, device)
    (split, combine), o = kernel.plan(q, k, v, lengths, 40**-0.5)
    o.fill_(NAN)
    for name in ("acc_ptr", "m_ptr", "total_ptr"):
        split.arguments[name].fill_(NAN)
    split.run(), combine.run()
    assert_meets_contract("decode_attention", o, q, k, v, lengths)


def test_a_length_that_is_impossible_makes_its_row_nan_on_a_gpu(device: str) -> None:
    q, k, v, lengths = draw((2, 1, 2, 300, 16), [300, 0, 20, 299], BF16, device)
    good = kernels.decode_attention(q, k, v, lengths)
    for wrong in (-1, 301, 2**31 - 1, -(2**31), 2**40):
        lengths[1] = wrong
        (split, combine), o = kernel.plan(q, k, v, lengths, 0.25)
        split.run(), combine.run()
        assert o[1].isnan().all(), wrong
        assert same(o[[0, 2, 3]], good[[0, 2, 3]]), wrong


@FORMS
@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_length_that_is_impossible_is_an_error_on_the_cpu(form: Form, wrong: int, device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU is not waited for")
    q, k, v, lengths = draw((2, 1, 2, 9, 16), [9, 9], BF16, device)
    lengths[1] = wrong
    with pytest.raises(InputError, match=rf"decode_attention: lengths\[1\] is {wrong}; expected 0\.\.9"):
        form(q, k, v, lengths)


def test_tiles_do_not_depend_on_batch_or_cache() -> None:
    found = set()
    for B, N in ((1, 256), (7, 4096), (64, 100_000)):
        q, kv = (torch.empty(B, heads, n, 80, dtype=BF16, device="meta") for heads, n in ((8, 1), (2, N)))
        lengths = torch.empty(B, dtype=torch.int64, device="meta")
        (split, combine), _ = kernel.plan(q, kv, kv, lengths, 0.1)
        assert split.grid == (B * 2 * -(-N // CHUNK),)
        assert combine.grid == (B * 8,)
        for launch in (split, combine):
            found.add((*launch.constants.items(), launch.num_warps, launch.num_stages))
    assert len(found) == 2


def test_launches_have_names_of_their_own() -> None:
    for target in TARGETS.values():
        names = [name for name, _ in kernel.launches(target)]
        assert len(set(names)) == len(names) > 0


def test_opcheck_and_torch_compile(device: str) -> None:
    q, k, v, lengths = draw((4, 2, 2, 9, 16), [9, 3], BF16, device, unused=0.0)
    torch.library.opcheck(torch.ops.refllm.decode_attention.default, (q, k, v, lengths, 0.25))

    def doubled(*arguments: torch.Tensor) -> torch.Tensor:
        return 2 * kernels.decode_attention(*arguments)

    backend = "inductor" if device == "cuda" else "aot_eager"
    assert same(torch.compile(doubled, fullgraph=True, backend=backend)(q, k, v, lengths), doubled(q, k, v, lengths))


@FORMS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (2, 4, 9, 16)}, ["q is [2, 4, 9, 16]", "1 to 8 queries"]),
        ({"q": (2, 4, 0, 16)}, ["q is", "1 to 8 queries"]),
        ({"q": (2, 3, 1, 16)}, ["k is", "divides the 3 query heads"]),
        ({"k": (2, 2, 8, 16)}, ["v_cache is [2, 2, 9, 16]", "[2, 2, 8, 16]"]),
        ({"lengths": (3,)}, ["lengths is [3]", "[2]"]),
        ({"lengths": F32}, ["lengths is", "int32 or torch.int64"]),
        ({"v": F16}, ["v_cache is", "float16", "bfloat16"]),
    ],
)
def test_arguments_that_do_not_fit_are_named(form: Form, change: dict[str, Any], words: list[str]) -> None:
    made = {"q": (2, 4, 1, 16), "k": (2, 2, 9, 16), "v": (2, 2, 9, 16), "lengths": (2,)}
    shapes = made | {name: x for name, x in change.items() if isinstance(x, tuple)}
    dtypes = dict.fromkeys(made, BF16) | {"lengths": torch.int64}
    dtypes |= {name: x for name, x in change.items() if isinstance(x, torch.dtype)}
    x = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    with pytest.raises(InputError) as error:
        form(x["q"], x["k"], x["v"], x["lengths"])
    assert all(word in str(error.value) for word in ["decode_attention", *words]), error.value


def test_a_cpu_tensor_outside_the_interpreter_is_told_where_to_go() -> None:
    with pytest.raises(InputError, match=r"refllm\.kernels\.plain\.decode_attention"):
        kernels.decode_attention(*draw((1, 1, 1, 2, 16), [2], F32, "cpu"))
