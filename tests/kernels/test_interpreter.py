"""What kernels compute on the repaired interpreter: formats, conversions, operators, dot, reductions, libdevice.

Every test launches a kernel of a few lines; what it should give is computed with Torch or ml_dtypes.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from refllm.kernels.interpreter import DeviceAssertionError, KernelError, interpreted  # noqa: E402
from refllm.kernels.interpreter import operations as language  # noqa: E402
from refllm.kernels.interpreter.builder import BUILDER  # noqa: E402

BF16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def _inside() -> Iterator[None]:
    with interpreted():
        yield


def every_bfloat16() -> Any:
    """All 65,536 bit patterns."""
    return torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16)


def as_bits(x: Any) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def same_numbers(a: Any, b: Any) -> None:
    """Equal bits, except that one NaN is as good as another."""
    a, b = a.float().numpy(), np.asarray(b, np.float32)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_array_equal(np.nan_to_num(a).view(np.uint32), np.nan_to_num(b).view(np.uint32))


@triton.jit
def arithmetic(a, b, sums, products, quotients, less, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(sums + at, x + y)
    tl.store(products + at, x * y)
    tl.static_assert((x / y).dtype == tl.float32)
    tl.store(quotients + at, x / y)
    tl.store(less + at, x < y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_arithmetic_rounds_once_to_nearest_even(dtype: Any) -> None:
    a = every_bfloat16().to(dtype) if dtype is torch.bfloat16 else torch.arange(65536).to(torch.int16).view(dtype)
    b = a[torch.randperm(65536, generator=torch.Generator().manual_seed(1))]
    sums, products, quotients = (torch.empty_like(a) for _ in range(3))
    less = torch.zeros(65536, dtype=torch.bool)
    arithmetic[(4,)](a, b, sums, products, quotients, less, 65536, BLOCK=16384)
    same_numbers(sums, (a + b).float())
    same_numbers(products, (a * b).float())
    same_numbers(quotients, (a.float() / b.float()).to(dtype).float())
    assert torch.equal(less, a < b)


@triton.jit
def convert(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def converted(x: Any, dtype: Any) -> Any:
    y = torch.zeros(len(x), dtype=dtype)
    convert[(1,)](x, y, BLOCK=len(x))
    return y


def test_float32_to_bfloat16_rounds_to_even_keeps_nan_and_overflows_to_infinity() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFF800001 - 2**32, 0x7F800000, 1])
    got = converted(bits.to(torch.int32).view(torch.float32), torch.bfloat16)
    assert [f"{b:04x}" for b in as_bits(got)[[0, 1, 2, 3, 6, 7]]] == ["3f80", "3f82", "3f81", "7f80", "7f80", "0000"]
    assert got[4:6].isnan().all()
    x = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = x.view(torch.float32)
    same_numbers(converted(x, torch.bfloat16), x.bfloat16().float())


@pytest.mark.parametrize("source", [torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32])
def test_conversion_to_bfloat16_from(source: Any) -> None:
    x = torch.arange(-512, 512).abs().to(source) if source is torch.uint8 else torch.arange(-512, 512).to(source) * 3
    assert torch.equal(converted(x, torch.bfloat16), x.to(torch.bfloat16))


def test_conversion_of_every_bfloat16_to_float32_is_exact() -> None:
    x = every_bfloat16()
    y = torch.zeros(65536)
    convert[(4,)](x, y, BLOCK=16384)
    same_numbers(y, x.float())


def test_float_to_integer_truncates_and_saturates() -> None:
    x = torch.tensor([1.9, -1.9, float("nan"), 3e9, -3e9, float("inf"), -float("inf"), 0.5])
    limit = torch.iinfo(torch.int32)
    assert converted(x, torch.int32).tolist() == [1, -1, 0, limit.max, limit.min, limit.max, limit.min, 0]
    assert converted(x, torch.int64).tolist()[5:7] == [2**63 - 1, -(2**63)]


def test_8_bit_floats_round_to_even_and_saturate() -> None:
    x = torch.tensor([1.0, 1.0625, 1.1875, 1e6, -1e6, float("inf"), float("nan"), 2.0**-10])
    for name in ("float8_e4m3fn", "float8_e5m2"):
        dtype, reference = getattr(torch, name), getattr(ml_dtypes, name)
        largest = float(ml_dtypes.finfo(reference).max)
        expected = np.clip(x.numpy(), -largest, largest).astype(reference).astype(np.float32)
        same_numbers(converted(x, dtype).float(), expected)
        same_numbers(converted(converted(x, dtype), torch.float32), expected)


@triton.jit
def towards_zero(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty, fp_downcast_rounding="rtz"))


def test_rounding_towards_zero() -> None:
    x = torch.tensor([1.00390625, -1.00390625, 1.999, 65504.9, -1e-30, 0.0, 3.0, 1e38])
    y = torch.zeros(8, dtype=torch.bfloat16)
    towards_zero[(1,)](x, y, BLOCK=8)
    assert as_bits(y).tolist() == (x.view(torch.int32).numpy().view(np.uint32) >> 16).tolist()


@triton.jit
def constants(y):
    tl.store(y + tl.arange(0, 8), tl.full([8], 3.14159, tl.bfloat16))
    tl.store(y + 8, tl.load(y) * 2.5)


def test_bfloat16_constants() -> None:
    y = torch.zeros(9, dtype=torch.bfloat16)
    constants[(1,)](y)
    assert torch.equal(y[:8], torch.full((8,), 3.14159, dtype=torch.bfloat16))
    assert y[8] == y[0] * 2.5


@triton.jit
def fused(x, y, z, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def test_fma_rounds_once() -> None:
    x = torch.full((8,), 1 + 2.0**-12)
    out = torch.zeros(8)
    fused[(1,)](x, x, -x * x, out, BLOCK=8)
    assert out[0] == (x.double() * x.double() - (x * x).double())[0].float() != 0


@triton.jit
def extremes(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.maximum(a, b))
    tl.store(out + BLOCK + at, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 2 * BLOCK + at, tl.clamp(a, -1.0, 1.0))
    tl.store(out + 3 * BLOCK, tl.max(a, 0))
    tl.store(out + 3 * BLOCK + 1, tl.min(a, 0))


def test_max_and_min_drop_nan_unless_asked_to_keep_it() -> None:
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, nan, 2.0]), torch.tensor([1.0, nan, nan, 3.0])
    out = torch.zeros(14)
    extremes[(1,)](x, y, out, BLOCK=4)
    same_numbers(out[:4], [1, 1, nan, 3])
    same_numbers(out[4:8], [nan, nan, nan, 2])
    same_numbers(out[8:12], [-1, 1, -1, 1])
    same_numbers(out[12:14], [2, 1])


# -- dot ---------------------------------------------------------------------------------------------------------------


@triton.jit
def product(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def matrices(dtype: Any = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 32, generator=generator).to(dtype), torch.randn(32, 32, generator=generator).to(dtype)


def dotted(a: Any, b: Any, precision: str | None, out: Any = torch.float32) -> Any:
    c = torch.zeros(len(a), len(a), dtype=out)
    product[(1,)](a, b, c, N=len(a), PRECISION=precision)
    return c


def test_tf32_drops_13_bits_of_the_operands() -> None:
    a, b = matrices()
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(dotted(a, b, None), cut[0] @ cut[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(dotted(a, b, "tf32"), cut[0] @ cut[1], rtol=0, atol=1e-5)
    assert (dotted(a, b, "tf32") - a @ b).abs().max() > 1e-3
    with interpreted(tf32=False):
        torch.testing.assert_close(dotted(a, b, "tf32"), a @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "error"), [("ieee", 3e-7), ("tf32x3", 3e-6), ("bf16x6", 3e-6), ("bf16x3", 1e-4)])
def test_the_other_precisions_of_a_float32_dot(precision: str, error: float) -> None:
    a, b = matrices()
    exact = a.double() @ b.double()
    relative = float((dotted(a, b, precision) - exact).norm() / exact.norm())
    assert error / 300 < relative < error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_dot_accumulates_in_float32(dtype: Any) -> None:
    a, b = matrices(dtype)
    torch.testing.assert_close(dotted(a, b, None), a.float() @ b.float(), rtol=1e-6, atol=1e-5)
    ones = torch.ones(32, 32, dtype=dtype)
    assert (dotted(256 * ones, 256 * ones, None) == 2.0**21).all()  # beyond float16, and beyond what bfloat16 sums


def test_infinities_in_split_products_stay_infinite() -> None:
    a, b = matrices()
    a[0, 0], b[0] = float("inf"), 1.0
    for precision in ("tf32", "tf32x3", "bf16x3", "bf16x6"):
        assert dotted(a, b, precision)[0].isposinf().all(), precision


@triton.jit
def rows_by_columns(a, b, c, a_strides, b_strides, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left = tl.load(a + m * a_strides[0] + k[None, :] * a_strides[1])
    right = tl.load(b + k[:, None] * b_strides[0] + n * b_strides[1])
    tl.store(c + m * N + n, tl.dot(left, right, input_precision="ieee"))
    tl.store(c + M * N + n * M + m, tl.trans(tl.dot(tl.trans(right), tl.trans(left), input_precision="ieee")))


@pytest.mark.parametrize("sizes", [(16, 16, 16), (64, 16, 32), (16, 64, 64), (32, 128, 64), (128, 32, 256)])
def test_an_element_of_a_dot_is_the_same_in_any_row_column_and_layout(sizes: tuple[int, int, int]) -> None:
    """To the bit, as on a GPU: that a row is the same whatever its batch mates can be tested on a CPU then."""
    M, N, K = sizes
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)

    def run(a: Any, b: Any) -> Any:
        c = torch.zeros(2, M * N)
        rows_by_columns[(1,)](a, b, c, a.stride(), b.stride(), M=M, N=N, K=K)
        assert torch.equal(c[0].view(M, N), c[1].view(N, M).T)
        return c[0].view(M, N)

    expected = run(a, b)
    torch.testing.assert_close(expected, a @ b, rtol=0, atol=1e-4)
    rows, columns = torch.randperm(M, generator=generator), torch.randperm(N, generator=generator)
    assert torch.equal(run(a[rows], b[:, columns]), expected[rows][:, columns])
    assert torch.equal(run(a.T.contiguous().T, b.T.contiguous().T), expected)
    only = torch.zeros(M, K)
    only[M - 1] = a[0]
    assert torch.equal(run(only, b)[M - 1], expected[0])


def test_a_dot_that_is_too_small_is_refused() -> None:
    a = torch.ones(4, 4)
    with pytest.raises(KernelError, match=r"product, program 0, test_interpreter.py:\d+: .*K >= (8|16)"):  # 8 in 3.9
        dotted(a, a, "ieee")


# -- reductions and scans ----------------------------------------------------------------------------------------------


@triton.jit
def sums(x, y, rows, N: tl.constexpr):
    i = tl.arange(0, N)
    block = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(y + i, tl.sum(block, 1))
    tl.store(rows + i, block.sum(0))


def test_sums_of_bfloat16_round_at_every_step() -> None:
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    x[0] = torch.tensor([256.0] + [1.0] * 63)
    y, rows = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
    sums[(1,)](x, y, rows, N=64)
    assert (y[1:] == 64).all()
    assert y[0] in (256 + 62, 256 + 64)  # 319 has no bfloat16; a serial sum in bfloat16 would stay at 256
    assert (rows[1:] == 64).all()


def test_sums_of_float32_have_the_error_of_a_tree() -> None:
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    y, rows = torch.empty(64), torch.empty(64)
    sums[(1,)](x, y, rows, N=64)
    torch.testing.assert_close(y.double(), x.double().sum(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(rows.double(), x.double().sum(0), rtol=2e-7, atol=0)


@triton.jit
def _last(a, b):
    return b


@triton.jit
def _linear(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def scans(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, tl.cumsum(v, 0))
    tl.store(y + N + i, tl.cumsum(v, 0, reverse=True))
    tl.store(y + 2 * N + i, tl.cumprod(v, 0))
    _factors, state = tl.associative_scan((v, v), 0, _linear)
    tl.store(y + 3 * N + i, state)
    tl.store(y + 4 * N, tl.reduce(v, 0, _last))
    tl.store(y + 4 * N + 1, tl.argmax(v, 0))
    tl.store(y + 4 * N + 2, tl.argmin(v, 0))
    _factor, last_state = tl.reduce((v, v), 0, _linear)
    tl.store(y + 4 * N + 3, last_state)
    tl.store(y + 5 * N + i, tl.sort(v, descending=True))
    tl.store(y + 6 * N + i, tl.flip(v, 0))
    tl.store(y + 7 * N + i, tl.softmax(v))


def test_scans_and_reductions_keep_the_order_of_their_operands() -> None:
    x = torch.tensor([0.5, -2.0, 3.0, 1.0, 1.5, 3.0, -2.0, 0.25])
    y = torch.zeros(8, 8)
    scans[(1,)](x, y, N=8)
    torch.testing.assert_close(y[0], x.cumsum(0))
    torch.testing.assert_close(y[1], x.flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(y[2], x.cumprod(0))
    state, expected = 0.0, []
    for v in x.tolist():
        state = state * v + v
        expected.append(state)
    torch.testing.assert_close(y[3], torch.tensor(expected))
    assert y[4, :4].tolist() == [0.25, 2, 1, y[3, -1]]
    assert y[5].tolist() == sorted(x.tolist(), reverse=True)
    torch.testing.assert_close(y[6], x.flip(0))
    torch.testing.assert_close(y[7], torch.softmax(x, 0))


# -- atomics -----------------------------------------------------------------------------------------------------------


@triton.jit
def add_all(x, total, old, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(old + tl.program_id(0) * N + i, tl.atomic_add(total + i % 2, tl.load(x + i)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_atomic_add_counts_every_lane_and_returns_what_was_there(dtype: Any) -> None:
    x, total, old = torch.arange(8).to(dtype), torch.zeros(2, dtype=dtype), torch.empty(16, dtype=dtype)
    add_all[(2,)](x, total, old, N=8)
    assert total.tolist() == [24, 32]
    assert old.tolist() == [0, 0, 0, 1, 2, 4, 6, 9, 12, 16, 12, 17, 14, 20, 18, 25]


@triton.jit
def atomics(p, out):
    tl.store(out, tl.atomic_max(p, 7))
    tl.store(out + 1, tl.atomic_min(p + 1, -7))
    tl.store(out + 2, tl.atomic_xchg(p + 2, 5))
    tl.store(out + 3, tl.atomic_cas(p + 3, 3, 9))
    tl.store(out + 4, tl.atomic_cas(p + 4, 3, 9))
    tl.store(out + 5, tl.atomic_and(p + 5, 4))


def test_the_other_atomics() -> None:
    p, out = torch.tensor([0, 1, 2, 3, 4, 5], dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    atomics[(1,)](p, out)
    assert p.tolist() == [7, -7, 5, 9, 4, 4]
    assert out.tolist() == [0, 1, 2, 3, 4, 5]


@triton.jit
def atomics_of_lanes(p, x, old, N: tl.constexpr, OP: tl.constexpr, MASKED: tl.constexpr):
    i = tl.arange(0, N)
    at, value = p + i // 2, tl.load(x + i)
    if OP == "cas":
        before = tl.atomic_cas(at, tl.full([N], 4, tl.int32), value)
    elif OP == "xchg":
        before = tl.atomic_xchg(at, value, mask=i < MASKED)
    elif OP == "max":
        before = tl.atomic_max(at, value, mask=i < MASKED)
    elif OP == "min":
        before = tl.atomic_min(at, value, mask=i < MASKED)
    elif OP == "and":
        before = tl.atomic_and(at, value, mask=i < MASKED)
    elif OP == "or":
        before = tl.atomic_or(at, value, mask=i < MASKED)
    elif OP == "xor":
        before = tl.atomic_xor(at, value, mask=i < MASKED)
    else:
        before = tl.atomic_add(at, value, mask=i < MASKED)
    tl.store(old + i, before)


ATOMICS: dict[str, Any] = {
    "cas": lambda held, new: new if held == 4 else held,
    "xchg": lambda held, new: new,
    "max": max,
    "min": min,
    "and": lambda held, new: held & new,
    "or": lambda held, new: held | new,
    "xor": lambda held, new: held ^ new,
    "add": lambda held, new: held + new,
}


@pytest.mark.parametrize("masked", [8, 5, 0])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics_of_lanes_take_turns_and_return_what_was_there(op: str, masked: int) -> None:
    p, x = torch.tensor([3, 4, 5, 6], dtype=torch.int32), torch.tensor([4, 9, -2, 6, 5, 12, 7, 1], dtype=torch.int32)
    held, before, old = p.tolist(), [0] * 8, torch.full((8,), -1, dtype=torch.int32)
    for i in range(8 if op == "cas" else masked):
        before[i] = held[i // 2]
        held[i // 2] = ATOMICS[op](held[i // 2], int(x[i]))
    atomics_of_lanes[(1,)](p, x, old, N=8, OP=op, MASKED=masked)
    assert p.tolist() == held
    assert old.tolist() == before


# -- the language ------------------------------------------------------------------------------------------------------


@triton.jit
def loops(n, step, out):
    total = 0
    tl.static_assert(total.dtype == tl.int32)  # a variable, unlike a tl.constexpr, is a tensor
    for i in range(0, n, step):
        total += i.to(tl.int64)
    for j in tl.static_range(3):
        total += j
    k = 0
    while k < n:
        k += 2
    for wide in range(total, total + 1):
        tl.static_assert(wide.dtype == tl.int64)
    tl.store(out, total)
    tl.store(out + 1, k)


def test_loops_over_runtime_bounds() -> None:
    out = torch.zeros(2, dtype=torch.int64)
    loops[(1,)](10, 3, out)
    assert out.tolist() == [0 + 3 + 6 + 9 + 3, 10]


@triton.jit
def arguments(flag, scale, small, large, nothing, out, out64):
    if flag:
        tl.store(out, scale)
    if nothing is None:
        tl.store(out + 1, scale * 1.0)
    tl.store(out + 2, scale.to(tl.float64))
    tl.store(out64, small.to(tl.int64) + large)
    tl.static_assert(scale.dtype == tl.float32)
    tl.static_assert(small.dtype == tl.int32)
    tl.static_assert(large.dtype == tl.int64)
    tl.static_assert(flag.dtype == tl.int1)


def test_scalar_arguments_have_the_types_of_a_launch() -> None:
    out, out64 = torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    arguments[(1,)](True, 0.1, 1, 2**40, None, out, out64)
    assert out.tolist() == [float(np.float32(0.1))] * 3  # float32, not the float64 of Python
    assert out64.item() == 2**40 + 1


@triton.jit
def chained(n, out):
    i = tl.arange(0, 8)
    tl.store(out + i, 2 <= i < n)


def test_chained_comparisons_are_refused_or_right() -> None:
    out = torch.zeros(8, dtype=torch.bool)
    if language.CHAINED_COMPARISONS:
        chained[(1,)](5, out)
        assert out.tolist() == [2 <= i < 5 for i in range(8)]
    else:
        with pytest.raises(KernelError, match=r"chained: .*`2 <= i < n`; write \(2 <= i\) & \(i < n\)"):
            chained[(1,)](5, out)


@triton.jit
def ambiguous(x):
    if tl.load(x + tl.arange(0, 4)) > 0:
        tl.store(x, 1.0)


def test_the_truth_of_a_block_is_refused() -> None:
    with pytest.raises(KernelError, match=r"truth of a block of shape \[4\] is ambiguous"):
        ambiguous[(1,)](torch.ones(4))


@triton.jit
def words(x, out, FLAG: tl.constexpr):
    i = tl.arange(0, 4)
    v = tl.load(x + i)
    both = (v > 0) and (v < 3)
    tl.store(out + i, both or (v == 5.0))
    tl.store(out + 4 + i, not (v > 0))
    if FLAG and x.dtype.element_ty == tl.float32:
        tl.store(out + 8, min(3, 4) + max(1, 2) == 5)
    tl.store(out + 9, 7 if FLAG else 8)


def test_and_or_not_on_blocks() -> None:
    x, out = torch.tensor([-1.0, 1.0, 4.0, 5.0]), torch.zeros(10, dtype=torch.int32)
    words[(1,)](x, out, FLAG=True)
    assert out.tolist() == [0, 1, 0, 1, 1, 0, 0, 0, 1, 7]


@triton.jit
def integers(a, b, out):
    i = tl.arange(0, 4)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x // y)
    tl.store(out + 4 + i, x % y)
    tl.store(out + 8 + i, x >> 1)
    tl.store(out + 12 + i, (x.to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True))


def test_integer_division_truncates_and_shifts_follow_the_sign() -> None:
    a, b = torch.tensor([7, -7, 7, -7], dtype=torch.int32), torch.tensor([2, 2, -2, -2], dtype=torch.int32)
    out = torch.zeros(16, dtype=torch.int32)
    integers[(1,)](a, b, out)
    assert out.tolist() == [3, -3, -3, 3, 1, -1, 1, -1, 3, -4, 3, -4, 3, 2147483644, 3, 2147483644]


@triton.jit
def overwrite(x, y, i):
    kept, scalar = tl.load(x + tl.arange(0, 4)), tl.load(x)
    tl.store(x + tl.arange(0, 4), tl.zeros([4], tl.float32))
    tl.store(y + tl.arange(0, 4), kept + scalar)


def test_a_store_does_not_change_what_was_loaded() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4)
    overwrite[(1,)](x, y, 0)
    assert y.tolist() == [2, 3, 4, 5]


@triton.jit
def transcendental(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, tl.exp(v))
    tl.store(y + N + i, tl.exp2(v))
    tl.store(y + 2 * N + i, tl.log2(v))
    tl.store(y + 3 * N + i, tl.erf(v))
    tl.store(y + 4 * N + i, tl.rsqrt(v))
    tl.store(y + 5 * N + i, tl.sqrt_rn(v))
    tl.store(y + 6 * N + i, tl.sigmoid(v))
    tl.store(y + 7 * N + i, tl.cos(v))


def test_functions_of_the_language() -> None:
    x, y = torch.linspace(0.1, 3, 16), torch.zeros(8, 16)
    transcendental[(1,)](x, y, N=16)
    expected = [f(x) for f in (torch.exp, torch.exp2, torch.log2, torch.erf, torch.rsqrt, torch.sqrt, torch.sigmoid)]
    torch.testing.assert_close(y, torch.stack([*expected, x.cos()]), rtol=1e-6, atol=1e-7)


@triton.jit
def device_library(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, libdevice.tanh(v))
    tl.store(y + N + i, libdevice.rsqrt(v))
    tl.store(y + 2 * N + i, libdevice.pow(v, 2.0))
    tl.store(y + 3 * N + i, libdevice.erf(v))
    tl.store(y + 4 * N + i, libdevice.isnan(v))
    tl.store(y + 5 * N + i, tl.extra.cuda.libdevice.floor(v))
    tl.store(y + 6 * N + i, libdevice.log1p(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_libdevice(dtype: Any) -> None:
    x = torch.tensor([0.5, 1.5, 2.75, float("nan")]).to(dtype)
    y = torch.zeros(7, 4, dtype=dtype)
    device_library[(1,)](x, y, N=4)
    f = x.float()
    expected = torch.stack([f.tanh(), f.rsqrt(), f**2, f.erf(), f.isnan().float(), f.floor(), f.log1p()])
    torch.testing.assert_close(y.float(), expected.to(dtype).float(), rtol=1e-6, atol=0, equal_nan=True)


@triton.jit
def unknown_function(x):
    tl.store(x, libdevice.j0(tl.load(x)))


def test_a_libdevice_function_that_is_missing_is_named() -> None:
    with pytest.raises(KernelError, match=r"does not know libdevice.j0; it knows .*tanh"):
        unknown_function[(1,)](torch.ones(1))


@triton.jit
def asserting(x, n):
    tl.device_assert(tl.load(x + tl.arange(0, 4)) < n, "x must be small")
    assert n > 0, "n must be positive"
    tl.assume(n > 1)


def test_assertions() -> None:
    x = torch.arange(4)
    asserting[(1,)](x, 5)
    for n, words_ in ((3, "x must be small"), (-1, "x must be small")):
        with pytest.raises(DeviceAssertionError, match=rf"asserting, program 0, .*: the assertion failed: {words_}"):
            asserting[(1,)](x, n)
    with pytest.raises(DeviceAssertionError, match="n must be positive"):
        asserting[(1,)](x - 10, 0)
    with pytest.raises(DeviceAssertionError, match=r"tl\.assume"):
        asserting[(1,)](x - 10, 1)


@triton.jit
def descriptors(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
    target = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BM, BN])
    target.store([0, 4], source.load([0, 4]) * 2)


def test_tensor_descriptors_cut_off_at_the_edges() -> None:
    x, y = torch.arange(24.0).reshape(3, 8), torch.zeros(3, 8)
    descriptors[(1,)](x, y, 3, 8, BM=4, BN=8)
    assert torch.equal(y[:, 4:], 2 * x[:, 4:])
    assert not y[:, :4].any()


@triton.jit
def host_descriptor(source, y, BM: tl.constexpr, BN: tl.constexpr):
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(y + at, source.load([1, 0]))


def test_tensor_descriptors_made_by_the_caller() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.arange(24.0).reshape(3, 8), torch.zeros(2, 8)
    host_descriptor[(1,)](TensorDescriptor.from_tensor(x, [2, 8]), y, BM=2, BN=8)
    assert torch.equal(y, x[1:])


@triton.jit
def many(tensors, out, N: tl.constexpr):
    for k in tl.static_range(len(tensors)):
        tl.store(out + k * N + tl.arange(0, N), tl.load(tensors[k] + tl.arange(0, N)))


def test_tuples_of_tensors() -> None:
    out = torch.zeros(2, 4)
    many[(1,)]((torch.ones(4), torch.arange(4.0)), out, N=4)
    assert out.tolist() == [[1] * 4, [0, 1, 2, 3]]


@triton.jit
def random(out, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.rand(seed, i))


def test_random_numbers_do_not_count_as_overflow() -> None:
    out = torch.empty(1024)
    random[(1,)](out, 7, N=1024)
    assert 0.45 < out.mean() < 0.55
    assert out.min() >= 0
    assert out.max() < 1


@triton.jit
def _clipped(a, b):
    return a if a > b else b * 2


@triton.jit
def shapes(x, y, order, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    pairs = tl.join(a, b)
    left, right = tl.split(pairs)
    tl.store(out + i, left - right)
    tl.store(out + N + tl.arange(0, 2 * N), tl.interleave(a, b))
    square = tl.reshape(a, (N // 4, 4))
    tl.store(out + 3 * N + i, tl.ravel(tl.permute(square, (1, 0))))
    tl.store(out + 4 * N + i, tl.ravel(square.T + tl.broadcast_to(tl.arange(0, 4)[:, None], (4, N // 4))))
    tl.store(out + 5 * N + i, tl.gather(a, tl.load(order + i), 0))
    tl.store(out + 6 * N + tl.arange(0, 4), tl.histogram(tl.load(order + i) % 4, 4))
    tl.store(out + 7 * N + i, tl.where(i[:, None] == i[None, :], a[None, :], 0.0).sum(1))
    if HAS_MAP:
        tl.store(out + 8 * N + i, tl.map_elementwise(_clipped, a, b))


HAS_MAP = tl.constexpr(hasattr(tl, "map_elementwise"))


def test_shapes() -> None:
    x, y = torch.arange(8.0), torch.arange(8.0).flip(0) / 2
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4], dtype=torch.int32)
    out = torch.zeros(9, 8)
    shapes[(1,)](x, y, order, out, N=8)
    assert torch.equal(out[0], x - y)
    assert torch.equal(out[1:3].flatten(), torch.stack([x, y], -1).flatten())
    assert torch.equal(out[3], x.reshape(2, 4).T.flatten())
    assert torch.equal(out[4], (x.reshape(2, 4).T + torch.arange(4)[:, None]).flatten())
    assert torch.equal(out[5], x[order.long()])
    assert out[6, :4].tolist() == [2, 2, 2, 2]
    assert torch.equal(out[7], x)
    if HAS_MAP:
        assert torch.equal(out[8], torch.where(x > y, x, 2 * y))


@triton.jit
def batched(a, b, c, B: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = tl.arange(0, B)[:, None, None] * N * N + i[None, :, None] * N + i[None, None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


def test_batched_dot() -> None:
    a, b = (torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    c = torch.zeros(2, 16, 16)
    batched[(1,)](a, b, c, B=2, N=16)
    torch.testing.assert_close(c, a @ b)


@triton.jit
def integer_dot(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_integer_dot_accumulates_in_int32() -> None:
    a = torch.full((32, 32), -128, dtype=torch.int8)
    c = torch.zeros(32, 32, dtype=torch.int32)
    integer_dot[(1,)](a, a, c, N=32)
    assert (c == 32 * 128 * 128).all()


@triton.jit
def added_to(a, b, c, N: tl.constexpr, TYPE: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), tl.load(c + at), input_precision="ieee", out_dtype=TYPE))


@pytest.mark.parametrize(
    ("stored", "summed", "triton_type"),
    [
        (torch.int8, torch.int32, tl.int32),
        (torch.bfloat16, torch.float32, tl.float32),
        (torch.float32, torch.float32, tl.float32),
        (torch.float64, torch.float64, tl.float64),
    ],
)
def test_a_product_is_added_to_what_was_there(stored: Any, summed: Any, triton_type: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-9, 9, (32, 32), generator=draw) for _ in range(3))
    result = c.to(summed)
    added_to[(1,)](a.to(stored), b.to(stored), result, N=32, TYPE=triton_type)
    assert torch.equal(result, (a @ b + c).to(summed))


@triton.jit
def two_together(x, y, N: tl.constexpr, M: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, M)
    rows, columns = tl.broadcast(tl.load(x + i)[:, None], tl.load(x + j)[None, :])
    tl.store(y + i, tl.sum(rows, 1))
    tl.store(y + N + j, tl.sum(columns, 0))
    columns, rows = tl.broadcast(tl.load(x + j)[None, :], tl.load(x + i)[:, None])
    tl.store(y + N + M + i, tl.sum(rows, 1))
    tl.store(y + 2 * N + M + j, tl.sum(columns, 0))


def test_both_of_two_blocks_get_their_common_shape() -> None:
    x, y = torch.arange(1.0, 9), torch.zeros(24)
    two_together[(1,)](x, y, N=4, M=8)
    assert torch.equal(y, torch.cat([8 * x[:4], 4 * x] * 2))


@triton.jit
def printing(x):
    tl.device_print("value", tl.load(x))
    tl.static_print("constant")


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    printing[(2,)](torch.tensor([1.5]))
    assert capsys.readouterr().out.count("constant") == 2


@triton.jit
def block_pointers(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_block_ptr(x, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    target = tl.make_block_ptr(y, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    for _ in range(0, N, BN):
        tl.store(target, tl.load(source, boundary_check=(0, 1), padding_option="zero"), boundary_check=(0, 1))
        source, target = tl.advance(source, (0, BN)), tl.advance(target, (0, BN))


def test_an_operation_that_the_interpreter_does_not_have_is_named() -> None:
    with pytest.raises(KernelError, match="the interpreter has no operation of_the_future"):
        _ = BUILDER.create_of_the_future
    assert not hasattr(BUILDER, "no_operation_at_all")


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.skipif(not hasattr(InterpreterBuilder, "create_make_block_ptr"), reason="gone from this version of Triton")
def test_block_pointers() -> None:
    x, y = torch.arange(21.0).reshape(3, 7), torch.zeros(3, 7)
    block_pointers[(1,)](x, y, 3, 7, BM=4, BN=4)
    assert torch.equal(x, y)
