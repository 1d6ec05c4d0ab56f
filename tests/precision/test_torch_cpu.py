"""refllm.precision.torch_cpu computes what torch's CPU kernels compute, bit for bit, where these are the known ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from this_cpu import avx2, same_bits

from refllm import ops
from refllm.precision import HF_EAGER, Arithmetic, round_bfloat16, round_float16, torch_cpu

pytestmark = pytest.mark.cpu
widths = st.integers(1, 40) | st.integers(41, 700) | st.sampled_from([1024, 2560, 5120])


def random(seed: int, *shape: int, scale: float = 3.0, mean: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale + mean).astype(np.float32)


def equal_bits(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    """The same numbers; the sign of a zero, which no later step can tell, does not count."""
    return ours.dtype == np.float32 and np.array_equal(ours, theirs.numpy(), equal_nan=True)


@avx2
@given(st.integers(0, 2**31), st.floats(0.01, 60))
@settings(max_examples=20)
def test_exp_is_the_one_of_silu_and_sigmoid(seed, scale):
    x = random(seed, 9984, scale=scale)  # whole steps of the vector loop: see exp_elementwise
    one = np.float32(1)
    with np.errstate(over="ignore"):
        assert equal_bits(one / (one + torch_cpu.exp(-x)), torch.sigmoid(torch.from_numpy(x)))
        assert equal_bits(x / (one + torch_cpu.exp(-x)), torch.nn.functional.silu(torch.from_numpy(x)))


@avx2
@given(st.integers(0, 2**31), widths)
@settings(max_examples=60)
def test_softmax_equals_the_kernel(seed, n):
    x = random(seed, 20, n)
    e = torch_cpu.exp(x - x.max(axis=-1, keepdims=True))
    assert equal_bits(e * (np.float32(1) / torch_cpu.softmax_sum(e)), torch.softmax(torch.from_numpy(x), -1))


@avx2
@given(st.integers(0, 2**31), widths)
@settings(max_examples=60)
def test_row_sum_equals_the_kernel(seed, n):
    x = random(seed, 20, n, mean=0.5)
    assert equal_bits(torch_cpu.row_sum(x), torch.from_numpy(x).sum(-1))
    assert equal_bits(torch_cpu.row_sum(x) / np.float32(n), torch.from_numpy(x).mean(-1))


@avx2
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(st.integers(0, 2**31), widths, st.booleans())
@settings(max_examples=30)
def test_layer_norm_of_half_precision_rows_equals_the_kernel(dtype, seed, n, with_bias):
    """Many rows, because an error in the last bit of float32 shows in one of 8192 float16 results (65536 bfloat16)."""
    rounded = {torch.bfloat16: round_bfloat16, torch.float16: round_float16}[dtype]
    rows = 1 + 100_000 // n
    x, weight, bias = rounded(random(seed, rows, n)), rounded(random(seed + 1, n)), rounded(random(seed + 2, n))
    args = [torch.from_numpy(a).to(dtype) for a in (x, weight, bias)]
    theirs = torch.nn.functional.layer_norm(args[0], (n,), args[1], args[2] if with_bias else None, 1e-5)
    ar = Arithmetic(str(dtype).removeprefix("torch."), HF_EAGER)
    ours = ops.layer_norm(x, weight, bias if with_bias else None, 1e-5, ar=ar)
    assert equal_bits(ours, theirs.float())


def terms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The products that are to be summed, their axis first."""
    return np.moveaxis(a * b, -1, 0)


def tensor(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x).to(dtype)


def cancelling(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows that are nearly orthogonal to rows of ones: sums of products of which little is left, so that the order of
    the additions shows in the leading digits."""
    x = rng.standard_normal(shape).astype(np.float32)
    half = shape[-1] // 2
    x[..., half : 2 * half] = -x[..., :half]
    return np.ascontiguousarray(x[..., rng.permutation(shape[-1])])  # torch looks at strides


def nearly_one(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (1 + 0.004 * rng.standard_normal(shape)).astype(np.float32)


@same_bits("float16")
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 300), st.integers(2, 30))
@settings(max_examples=60)
def test_float16_linear_equals_the_kernel(seed, m, k, n):
    rng = np.random.default_rng(seed)
    x, w = round_float16(cancelling(rng, m, k)), round_float16(nearly_one(rng, n, k))
    theirs = torch.nn.functional.linear(tensor(x, torch.float16), tensor(w, torch.float16)).float()
    assert equal_bits(round_float16(torch_cpu.registers(terms(x[:, None], w))), theirs)


@same_bits("float16")
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 100), st.integers(2, 40))
@settings(max_examples=60)
def test_float16_attention_products_equal_the_kernels(seed, m, k, n):
    """q k^T of m queries and n keys of k dims, and p v of m queries, k keys and n dims, six heads at once."""
    rng = np.random.default_rng(seed)
    a, b = round_float16(cancelling(rng, 6, m, k)), round_float16(nearly_one(rng, 6, n, k))
    left, right = tensor(a, torch.float16), tensor(b, torch.float16)
    for transposed in (True, False):
        stored = right if transposed else right.transpose(1, 2).contiguous().transpose(1, 2)
        theirs = torch.matmul(left[None], stored.transpose(1, 2)[None])[0].float()
        order = torch_cpu.half_order("float16", m, k, n, transposed=transposed, batched=True)
        assert equal_bits(round_float16(order(terms(a[:, :, None], b[:, None]))), theirs)


@same_bits("bfloat16")
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 1600), st.integers(1, 80), st.booleans())
@settings(max_examples=60)
def test_bfloat16_products_equal_the_kernel(seed, m, k, n, batched):
    rng = np.random.default_rng(seed)
    if batched:
        n = max(n, 4096 // (m * k) + 1)  # see half_order
    a, b = round_bfloat16(cancelling(rng, m, k)), round_bfloat16(nearly_one(rng, n, k))
    left, right = tensor(a, torch.bfloat16), tensor(b, torch.bfloat16)
    theirs = torch.matmul(left[None], right.T[None])[0] if batched else torch.nn.functional.linear(left, right)
    order = torch_cpu.half_order("bfloat16", m, k, n, transposed=True, batched=batched)
    assert equal_bits(round_bfloat16(order(terms(a[:, None], b))), theirs.float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(2, 700), st.integers(1, 400), st.booleans(), st.booleans()
)
@settings(max_examples=25)
def test_products_with_blas_round_like_products_in_order(dtype, seed, m, k, n, with_bias, one_sign):
    """`half_product` settles every element that the order of additions decides."""
    rng, rounded = np.random.default_rng(seed), {"bfloat16": round_bfloat16, "float16": round_float16}[dtype]
    a, b, bias = (rounded(rng.standard_normal(shape).astype(np.float32)) for shape in ((m, k), (n, k), (n,)))
    if one_sign:
        a, b = np.abs(a), np.abs(b)
    order = torch_cpu.half_order(dtype, m, k, n, transposed=True, batched=False)
    added = bias if with_bias else None
    expected = order(terms(a[:, None], b)) + (bias if with_bias else 0)
    ours = torch_cpu.half_product(a, b, added, order, rounded)
    np.testing.assert_array_equal(rounded(ours), rounded(expected.astype(np.float32)))


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_to_half_precision_equals_torch(values):
    x = np.array(values, np.float32)
    for ours, dtype in ((round_bfloat16, torch.bfloat16), (round_float16, torch.float16)):
        np.testing.assert_array_equal(ours(x), torch.from_numpy(x).to(dtype).float().numpy())


def test_every_bfloat16_boundary_rounds_like_torch():
    """All upper halves of a float32, with the lower halves that decide: 0, below, at and above the tie."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = (upper[:, None] | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)
    x = bits.view(np.float32)
    np.testing.assert_array_equal(round_bfloat16(x), torch.from_numpy(x.copy()).bfloat16().float().numpy())


@pytest.mark.parametrize("shape", [(0, 1), (0, 96), (0, 700), (2, 0, 5)])
def test_no_rows_give_no_sums(shape):
    x = np.zeros(shape, np.float32)
    assert torch_cpu.row_sum(x).shape == shape[:-1]
    for sums in (torch_cpu.softmax_sum(x), *torch_cpu.moments(x, "float16")):
        assert sums.shape == (*shape[:-1], 1)
