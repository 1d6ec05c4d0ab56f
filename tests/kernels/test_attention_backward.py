"""The gradients of `attention` and `decode_attention` as Triton kernels: within 1.25 times the error of the definition
in the same precision, whatever the shape, mask and strides; what is masked reaches nothing; the same bits always."""

from collections.abc import Sequence
from importlib import import_module
from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from same_precision import assert_as_the_definition  # noqa: E402

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels.launch import Launch  # noqa: E402

module = import_module("refllm.kernels.triton.attention_backward")
decoding = import_module("refllm.kernels.triton.decode_attention_backward")
NAN = float("nan")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Tensors = tuple[torch.Tensor, ...]


def draw(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensors:
    """do, q, k, v for (B, H, K, S, T, D)."""
    (B, H, K, S, T, D), g = shape, torch.Generator().manual_seed(seed)
    sizes = (B, H, S, D), (B, H, S, D), (B, K, T, D), (B, K, T, D)
    return tuple(torch.randn(size, generator=g).to(device, dtype) for size in sizes)


def some_keys(B: int, T: int, device: str) -> torch.Tensor:
    """A key mask whose first sequence begins with padding."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[0, : T // 2] = False
    return mask.to(device)


def check(operator: str, *arguments: Any, **keywords: Any) -> Any:
    """What the kernels return, after it has been held against the definition."""
    found = getattr(kernels, operator)(*arguments, **keywords)
    assert_as_the_definition(operator, found, arguments, keywords)
    return found


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [8, 40, 64, 80, 128, 160, 256])
def test_every_head_dim(D: int, device: str) -> None:
    check("attention_backward", *draw((1, 2, 1, 70, 90, D), BF16, device, seed=D))
    if D in (8, 80):
        check("attention_backward", *draw((1, 2, 1, 40, 50, D), F32, device, seed=D))
        check("attention_backward", *draw((1, 2, 1, 40, 50, D), F16, device, seed=D))


@pytest.mark.parametrize(
    ("S", "T"), [(1, 1), (1, 200), (200, 1), (127, 128), (129, 127), (128, 129), (64, 65), (33, 170)]
)
def test_the_edges_of_tiles(S: int, T: int, device: str) -> None:
    given = draw((1, 2, 2, S, T, 16), BF16, device, seed=S)
    check("attention_backward", *given)
    check("attention_backward", *given, causal=False)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_every_option_can_be_combined_with_every_other(scale: float | None, device: str) -> None:
    do, q, k, v = draw((2, 2, 1, 20, 40, 24), BF16, device)
    dlse = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(1)).to(device)
    for causal, mask, of_lse in product((True, False), (None, some_keys(2, 40, device)), (None, dlse)):
        check("attention_backward", do, q, k, v, scale=scale, causal=causal, key_mask=mask, dlse=of_lse)


def test_large_scores_do_not_cost_digits(device: str) -> None:
    """One weight is nearly 1: a shift rounded to float32 alone would show."""
    do, q, k, v = draw((1, 2, 1, 40, 60, 16), F32, device)
    check("attention_backward", do, 6 * q, 6 * k, v)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_decoding_over_every_length(dtype: torch.dtype, device: str) -> None:
    """Slots from a length on hold NaN, and have the gradient 0."""
    lengths = [0, 1, 3, 64, 65, 90]
    do, q, k, v = draw((6, 4, 2, 3, 90, 16), dtype, device)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = NAN, NAN
    lengths_B = torch.tensor(lengths, device=device)
    dq, dk, dv = check("decode_attention_backward", do, q, k, v, lengths_B)
    for b, length in enumerate(lengths):
        assert not dk[b, :, length:].any()
        assert not dv[b, :, length:].any()
        assert not dq[b, :, : max(0, 3 - length)].any()


# -- what must not matter ----------------------------------------------------------------------------------------------


def test_what_no_query_sees_reaches_nothing(device: str) -> None:
    """Masked keys and values, keys after the last that a query sees, and queries without a key, all of them NaN."""
    do, q, k, v = draw((2, 4, 2, 30, 40, 24), BF16, device)
    mask = some_keys(2, 40, device)
    clean = kernels.attention_backward(do, q, k, v, key_mask=mask)
    hidden = ~mask[:, None, :, None]
    none = ~(mask[:, None] & torch.ones(30, 40, dtype=torch.bool, device=device).tril(10)).any(-1)[:, None, :, None]
    assert hidden.any()
    assert none.any()
    found = kernels.attention_backward(
        do.masked_fill(none, NAN), q.masked_fill(none, NAN), k.masked_fill(hidden, NAN), v.masked_fill(hidden, NAN),
        key_mask=mask,
    )  # fmt: skip
    assert same(found, clean)
    assert not found[0][none.expand_as(q)].any()
    for x in found[1:]:
        assert not x[hidden.expand_as(k)].any()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("which", ["k", "v", "q", "do"])
def test_nan_reaches_those_alone_that_see_it(which: str, dtype: torch.dtype, device: str) -> None:
    """Causally, key 25 of 40 is seen by the queries from 15 of 30 on."""
    given = dict(zip(("do", "q", "k", "v"), draw((1, 2, 1, 30, 40, 24), dtype, device), strict=True))
    clean = kernels.attention_backward(*given.values())
    given[which] = given[which].clone()
    given[which][:, :, 25 if which in "kv" else 15, 3] = NAN
    dq, dk, dv = kernels.attention_backward(*given.values())
    if which in "kv":
        assert same([dq[:, :, :15]], [clean[0][:, :, :15]])
        assert dq[:, :, 15:].isnan().any(-1).all()
    else:
        assert dq[:, :, 15].isnan().all()
        assert same([dq[:, :, i] for i in (0, 14, 16, 29)], [clean[0][:, :, i] for i in (0, 14, 16, 29)])
        for x, right in zip((dk, dv), clean[1:], strict=True):
            # float32: a tile that is formed again with care adds up in another order
            torch.testing.assert_close(x[:, :, 26:], right[:, :, 26:], rtol=1e-5, atol=1e-5)
        assert dv[:, :, :26].isnan().any(-1).all()


def test_strides_do_not_matter_and_nothing_that_is_given_is_written(device: str) -> None:
    do, q, k, v = draw((2, 4, 2, 20, 30, 24), BF16, device)
    o, lse = kernels.attention(q, k, v, return_lse=True)
    clean = kernels.attention_backward(do, q, k, v, o, lse)
    assert same(kernels.attention_backward(do, q, k, v), clean), "recomputed is kept"

    def heads_last(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_other(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), NAN, dtype=x.dtype, device=device)
        wide[..., ::2] = x
        return wide[..., ::2]

    for form in (heads_last, every_other, lambda x: x.mT.contiguous().mT):
        given = [form(x) for x in (do, q, k, v, o)]
        before = [x.clone() for x in given]
        assert same(kernels.attention_backward(*given, lse.mT.contiguous().mT), clean)
        assert same(given, before)
    one = torch.ones((), dtype=BF16, device=device).expand(q.shape)
    assert same(kernels.attention_backward(one, q, k, v), kernels.attention_backward(one.contiguous(), q, k, v))
    row = do[:, :, :1].expand(do.shape)
    assert same(kernels.attention_backward(row, q, k, v), kernels.attention_backward(row.contiguous(), q, k, v))


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 4, 16), (2, 2, 1, 0, 4, 16), (2, 2, 1, 3, 0, 16), (1, 2, 1, 9, 4, 16)])
def test_sizes_of_zero_and_rows_without_a_key(sizes: tuple[int, int, int, int, int, int], device: str) -> None:
    dq, dk, dv = check("attention_backward", *draw(sizes, BF16, device))
    assert not dq[:, :, : max(0, sizes[3] - sizes[4])].any()
    if not sizes[3]:
        assert not dk.any()
        assert not dv.any()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_bits_are_those_of_every_run_and_of_the_sequence_alone(dtype: torch.dtype, device: str) -> None:
    do, q, k, v = draw((3, 4, 2, 35, 35, 16), dtype, device)
    mask = some_keys(3, 35, device)
    found = kernels.attention_backward(do, q, k, v, key_mask=mask)
    assert same(kernels.attention_backward(do, q, k, v, key_mask=mask), found)
    alone = kernels.attention_backward(do[1:2], q[1:2], k[1:2], v[1:2], key_mask=mask[1:2])
    assert same(alone, [x[1:2] for x in found])
    lengths = torch.tensor([35, 20, 7], device=device)
    found = kernels.decode_attention_backward(do[:, :, :2], q[:, :, :2], k, v, lengths)
    alone = kernels.decode_attention_backward(
        *(x[1:2, :, :2] for x in (do, q)), k[1:2, :, :20], v[1:2, :, :20], lengths[1:2]
    )
    assert same(alone, [found[0][1:2], *(x[1:2, :, :20] for x in found[1:])])


def test_the_gradients_of_a_group_are_the_sum_over_its_heads(device: str) -> None:
    """Linear in do, too: a head alone is do with zeros for the others."""
    do, q, k, v = draw((1, 3, 1, 20, 20, 16), F32, device)
    whole = kernels.attention_backward(do, q, k, v)
    heads = [kernels.attention_backward(*(x[:, h : h + 1] for x in (do, q)), k, v) for h in range(3)]
    assert same([whole[0]], [torch.cat([dq for dq, _, _ in heads], 1)])
    for i in (1, 2):
        torch.testing.assert_close(whole[i], sum(each[i] for each in heads), rtol=1e-5, atol=1e-5)


# -- autograd ----------------------------------------------------------------------------------------------------------


def test_autograd_finds_the_gradients_of_both_results_and_of_what_is_asked_for_alone(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    do, q, k, v = draw((1, 4, 2, 20, 30, 16), BF16, device)
    dlse = torch.randn(1, 4, 20, generator=torch.Generator().manual_seed(2)).to(device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = kernels.attention(*leaves, return_lse=True)
    torch.autograd.backward([o, lse], [do, dlse])
    assert same([x.grad for x in leaves], kernels.attention_backward(do, q, k, v, dlse=dlse))
    lengths = torch.tensor([25], device=device)
    leaves = [x.clone().requires_grad_() for x in (q[:, :, :3], k, v)]
    kernels.decode_attention(*leaves, lengths).backward(do[:, :, :3])
    expected = kernels.decode_attention_backward(do[:, :, :3], q[:, :, :3], k, v, lengths)
    assert same([x.grad for x in leaves], expected)

    started: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda launch: started.append(launch.kernel.__name__))
    kernels.attention(q.clone().requires_grad_(), k, v).sum().backward()
    kernels.attention(q, k, v.clone().requires_grad_()).sum().backward()
    assert [name for name in started if name in ("keys_kernel", "queries_kernel")] == ["queries_kernel", "keys_kernel"]


def test_a_length_that_is_impossible_makes_its_gradient_nan_on_a_gpu(device: str) -> None:
    do, q, k, v = draw((3, 2, 1, 2, 70, 16), BF16, device)
    lengths = torch.tensor([70, 20, 69], device=device)
    good = kernels.decode_attention_backward(do, q, k, v, lengths)
    for wrong in (-1, 71, 2**40):
        lengths[1] = wrong
        steps, dq, dk, dv = decoding.plan(do, q, k, v, lengths, None, None, 0.25)
        for step in steps:
            step.run()
        assert dq[1].isnan().all(), wrong
        assert same([x[[0, 2]] for x in (dq, dk, dv)], [x[[0, 2]] for x in good]), wrong


def test_what_does_not_fit_together_is_one_sentence(device: str) -> None:
    do, q, k, v = draw((1, 2, 1, 3, 4, 16), BF16, device)
    lse = torch.zeros(1, 2, 3, device=device)
    for given, sentence in (
        ((do[:, :1], q, k, v), r"attention_backward: do is \[1, 1, 3, 16\].*expected \[1, 2, 3, 16\]"),
        ((do, q, k, v, do.float(), lse), r"attention_backward: o is .*float32.*expected .*bfloat16"),
        ((do, q, k, v, do, lse.to(BF16)), r"attention_backward: lse is .*bfloat16.*expected \[1, 2, 3\] torch.float32"),
        ((do, q, k[:, :0], v), r"attention_backward: "),
    ):
        with pytest.raises(InputError, match=sentence):
            kernels.attention_backward(*given)
