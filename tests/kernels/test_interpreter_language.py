"""What the compiler takes and interpreters trip over: unsigned numbers, branches inside reductions, scaled products,
descriptors, launch handles, foreign objects, tables of pointers, functions of bits, barriers over the grid."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc, utils

from refllm.kernels import interpreted
from refllm.kernels.interpreter import IntegerOverflowError, KernelError, UninitializedError
from refllm.kernels.interpreter.errors import MaskedOffWarning, WaitsError


@pytest.fixture(autouse=True)
def _interpreted() -> Any:
    with interpreted():
        yield


@triton.jit
def congruential(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    h = tl.load(x + i).to(tl.uint32)
    h = h * 1664525 + 1013904223
    h = h - 4000000000
    tl.store(y + i, h.to(tl.int32, bitcast=True))


def test_unsigned_arithmetic_wraps() -> None:
    x, y = torch.arange(8, dtype=torch.int32) + 100_000, torch.empty(8, dtype=torch.int32)
    congruential[(1,)](x, y, 8)
    exact = (x.numpy().astype(object) * 1664525 + 1013904223 - 4000000000) % 2**32
    assert y.numpy().view(np.uint32).tolist() == exact.tolist()


@triton.jit
def far_apart(x, y, stride, used, COLUMNS: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, N)
    offsets = (rows * stride)[:, None] + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < used)[:, None] & (tl.arange(0, COLUMNS) >= 0)[None, :]
    v = tl.load(x + offsets, mask=mask, other=0.0)
    tl.store(y + offsets, v, mask=mask)


def test_an_offset_that_overflows_counts_where_it_is_used() -> None:
    x, y = torch.arange(2.0), torch.zeros(2)
    far_apart[(1,)](x, y, 2**30 + 5, 1, COLUMNS=2, N=4)
    assert torch.equal(x, y)
    with pytest.raises(IntegerOverflowError, match="multiplication leaves the range of int32"):
        far_apart[(1,)](x, y, 2**31 - 1, 4, COLUMNS=2, N=4)


@triton.jit
def last_valid(before, value):
    if value < 0:
        return before
    return value


@triton.jit
def scanned(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.associative_scan(tl.load(x + i), 0, last_valid))
    tl.store(z, tl.reduce(tl.load(x + i), 0, last_valid))


def test_a_combine_function_may_branch() -> None:
    x = torch.tensor([3, -1, -1, 5, -1, 7, -1, -1], dtype=torch.int32)
    y, z = torch.empty_like(x), torch.empty(1, dtype=torch.int32)
    scanned[(1,)](x, y, z, 8)
    assert (y.tolist(), z.item()) == ([3, 3, 3, 5, 5, 7, 7, 7], 7)


@triton.jit
def printed(x, N: tl.constexpr):
    tl.device_print("v", tl.load(x + tl.arange(0, N)))


def test_bfloat16_is_printed_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    printed[(1,)](torch.tensor([1, -2, 0.5, 3], dtype=torch.bfloat16), 4)
    assert [float(word) for word in capsys.readouterr().out.split("[")[1].strip("]\n ").split()] == [1, -2, 0.5, 3]


@triton.jit
def scaled(a, sa, b, sb, c, FA: tl.constexpr, FB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
           KA: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    m, n, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // GROUP)
    left = tl.load(a + m[:, None] * KA + tl.arange(0, KA)[None, :])
    right = tl.load(b + tl.arange(0, KB)[:, None] * N + n[None, :])
    scale_a = tl.load(sa + m[:, None] * (K // GROUP) + s[None, :])
    scale_b = tl.load(sb + n[:, None] * (K // GROUP) + s[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot_scaled(left, scale_a, FA, right, scale_b, FB))


NARROW = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
M, N, K = 16, 16, 64


def drawn(kind: str, axis: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """What the kernel reads, and its numbers [M, K] or [K, N] in float64."""
    rng = np.random.default_rng(seed)
    shape = (M, K) if axis else (K, N)
    if kind in NARROW:
        x = torch.from_numpy(rng.standard_normal(shape)).to(NARROW[kind])
        raw = x.view(torch.uint8) if x.itemsize == 1 else x
        return raw, x.double().numpy()
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    even, odd = (np.take(codes, np.arange(i, K, 2), axis) for i in (0, 1))
    return torch.from_numpy(even | odd << 4), codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


@pytest.mark.parametrize("kinds", [("e4m3", "e4m3"), ("e2m1", "e2m1"), ("e5m2", "e2m1"), ("bf16", "e4m3"),
                                   ("fp16", "fp16")], ids="-".join)  # fmt: skip
def test_scaled_products_of_every_format(kinds: tuple[str, str]) -> None:
    (a, left), (b, right) = drawn(kinds[0], 1, 0), drawn(kinds[1], 0, 1)
    rng = np.random.default_rng(2)
    sa, sb = (torch.from_numpy(rng.integers(120, 134, (n, K // 32)).astype(np.uint8)) for n in (M, N))
    c = torch.zeros(M, N)
    scaled[(1,)](a, sa, b, sb, c, *kinds, M, N, K, a.shape[1], b.shape[0], 32)
    factors = [np.repeat(2.0 ** (s.numpy().astype(int) - 127), 32, axis=1) for s in (sa, sb)]
    exact = (left * factors[0]) @ (right * factors[1].T)
    size = np.abs(left * factors[0]) @ np.abs(right * factors[1].T)
    assert (np.abs(c.numpy() - exact) <= K * 2.0**-24 * size).all()


@triton.jit
def added(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) + 1)


def test_a_launch_returns_a_handle_that_launches_again() -> None:
    x, y = torch.ones(4), torch.zeros(4)
    handle = added[(1,)](x, y, 4)
    for again in ((x, y), (x, y, 4)):
        y.zero_()
        handle[(1, 1, 1)](*again)
        assert (y == 2).all()
    with pytest.raises(KernelError, match="no `n_regs`: nothing was compiled"):
        _ = handle.n_regs
    with pytest.raises(KernelError, match="1 arguments for x, y, N"):
        handle[(1,)](x)


class Pointer:
    """An object around a tensor, with no more than a launch asks for."""

    __slots__ = ("dtype", "kept")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kept, self.dtype = tensor, tensor.dtype

    def data_ptr(self) -> int:
        return self.kept.data_ptr() + 4


def test_an_object_around_a_tensor_is_taken() -> None:
    x, y = torch.arange(5.0), torch.zeros(5)
    added[(1,)](Pointer(x), Pointer(y), 4)
    assert y.tolist() == [0, 2, 3, 4, 5]


@triton.autotune(configs=[triton.Config({"BLOCK": n}) for n in (8, 4)], key=["n"])
@triton.jit
def tuned(x, y, n, MOST: tl.constexpr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < MOST)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@pytest.mark.parametrize("configs", ["first", "all"])
def test_a_configuration_that_does_not_compile_is_left_out(configs: str) -> None:
    x, y = torch.ones(8), torch.zeros(8)
    with interpreted(configs=configs):
        tuned[lambda meta: (triton.cdiv(8, meta["BLOCK"]),)](x, y, 8, 8)
        with pytest.raises(KernelError, match="in each of its configurations"):
            tuned[(2,)](x, y, 8, 2)
    assert (y == 2).all()


@triton.jit
def from_table(table, y, N: tl.constexpr):
    p = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(y + tl.program_id(0) * N + tl.arange(0, N), tl.load(p + tl.arange(0, N)))


def test_pointers_come_from_a_table() -> None:
    a, b, y = torch.ones(4), torch.full((4,), 2.0), torch.zeros(8)
    from_table[(2,)](torch.tensor([a.data_ptr(), b.data_ptr()]), y, 4)
    assert y.tolist() == [1.0] * 4 + [2.0] * 4
    with pytest.raises(KernelError, match="lies in none"):
        from_table[(1,)](torch.tensor([64]), y, 4)


@triton.jit
def bits(x, y, f, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, libdevice.popc(v))
    tl.store(y + N + i, libdevice.clz(v))
    tl.store(y + 2 * N + i, libdevice.ffs(v))
    tl.store(y + 3 * N + i, libdevice.mulhi(v, v))
    tl.store(y + 4 * N + i, libdevice.byte_perm(v, ~v, 0x7210))
    tl.store(y + 5 * N + i, libdevice.float_as_int(tl.load(f + i)))
    tl.store(y + 6 * N + i, libdevice.llrint(tl.load(f + i)).to(tl.int32))


def test_functions_of_bits() -> None:
    numbers, floats = [1, -1, 2**31 - 1, 0x12345678], [0.5, 1.5, -2.5, 1e9]
    x, y = torch.tensor(numbers, dtype=torch.int32), torch.zeros(7, 4, dtype=torch.int32)
    bits[(1,)](x, y, torch.tensor(floats), 4)
    unsigned = [n % 2**32 for n in numbers]
    assert y[0].tolist() == [n.bit_count() for n in unsigned]
    assert y[1].tolist() == [32 - n.bit_length() for n in unsigned]
    assert y[2].tolist() == [(n & -n).bit_length() for n in unsigned]
    assert y[3].tolist() == [n * n >> 32 for n in numbers]
    high = [~n % 2**32 >> 24 for n in unsigned]
    assert y[4].numpy().view(np.uint32).tolist() == [
        h << 24 | n & 0xFFFFFF for h, n in zip(high, unsigned, strict=True)
    ]
    assert y[5].tolist() == np.float32(floats).view(np.int32).tolist()
    assert y[6].tolist() == [0, 2, -2, 10**9]


@triton.jit
def where_it_runs(y):
    gdc.gdc_wait()
    tl.store(y + tl.program_id(0), utils.smid())
    tl.store(y + 2, utils.num_warps())
    tl.store(y + 3, (utils.globaltimer() > 0).to(tl.int32))


def test_a_kernel_may_ask_where_it_runs() -> None:
    y = torch.zeros(4, dtype=torch.int32)
    with interpreted(races=False):
        where_it_runs[(2,)](y, num_warps=8)
    assert y.tolist() == [0, 1, 8, 1]


@triton.jit
def barrier(arrived, programs):
    tl.atomic_add(arrived, 1)
    while tl.atomic_add(arrived, 0) < programs:
        pass


def test_a_program_that_waits_for_a_later_one_is_told() -> None:
    with pytest.raises(WaitsError, match="program 0 waits at element 0 of `arrived` for a program that has not run"):
        barrier[(2,)](torch.zeros(1, dtype=torch.int32), 2)
    barrier[(1,)](torch.zeros(1, dtype=torch.int32), 1)


@triton.jit
def counted(y, count):
    tl.store(y + tl.program_id(0), tl.atomic_add(count, 1))


def test_an_atomic_on_memory_that_nobody_wrote_is_found() -> None:
    y = torch.empty(2, dtype=torch.int32)
    with pytest.raises(UninitializedError, match="an atomic through `count`"):
        counted[(2,)](y, torch.empty(1, dtype=torch.int32))
    counted[(2,)](y, torch.zeros(1, dtype=torch.int32))
    assert y.tolist() == [0, 1]


@triton.jit
def described(x, y, M: tl.constexpr, N: tl.constexpr):
    target = tl.make_tensor_descriptor(y, [M, N], [N, 1], [M, N])
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    target.atomic_add([0, 0], v)
    target.atomic_add([M // 2, 0], v)


def test_descriptors_add() -> None:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    x, y = torch.ones(8, 8), torch.ones(8, 8)
    described[(1,)](x, y, 8, 8)
    assert y.tolist() == [[2.0] * 8] * 4 + [[3.0] * 8] * 4


@triton.jit
def swapped(first, second):
    return second, first


@triton.jit
def in_pairs(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.map_elementwise(swapped, tl.load(x + i), pack=2))


def test_a_function_of_elements_takes_several_at_once() -> None:
    x, y = torch.arange(8.0), torch.zeros(8)
    in_pairs[(1,)](x, y, 8)
    assert y.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_launch_inside_torch_compile() -> None:
    @torch.compile(backend="eager")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        added[(1,)](x, y, 4)
        return y * 2

    assert (doubled(torch.ones(4)) == 4).all()


@triton.jit
def summed(x, y, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n)))


def test_lanes_masked_off_are_nan_or_what_nvidia_makes_of_them_with_the_line() -> None:
    x, y = torch.ones(3), torch.zeros(1)
    summed[(1,)](x, y, 3, 4)
    assert y.isnan().all()
    line = summed.starting_line_number + 3  # below the decorator and `def`
    with (
        interpreted(masked="zero"),
        pytest.warns(MaskedOffWarning, match=rf"test_interpreter_language\.py:{line}: tl\.load of `x` masks lanes off"),
    ):
        summed[(1,)](x, y, 3, 4)
    assert y.item() == 3


@triton.jit
def signs(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) * 0.0)
    tl.store(y + N + i, tl.load(x + i) * -0.0)


def test_minus_zero_is_the_constant_that_this_triton_makes_of_it() -> None:
    """From 3.9 on it keeps its sign; before, the compiler took it for 0."""
    y = torch.ones(2, 2)
    signs[(1,)](torch.tensor([1.0, -1.0]), y, 2)
    kept = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert y.signbit().tolist() == [[False, True], [kept, not kept]]


@triton.jit
def handed_over(flag, y):
    tl.atomic_store(flag, tl.program_id(0) + 1)
    tl.store(y, tl.atomic_poll(flag, tl.program_id(0) + 1).to(tl.int32))
    tl.atomic_poll(flag, tl.atomic_load(flag) + 1)


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="this Triton has no tl.atomic_poll")
def test_a_program_polls_for_what_is_there_and_not_for_what_comes_later() -> None:
    y = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(WaitsError, match="program 0 waits at element 0 of `flag` for a program that has not run"):
        handed_over[(2,)](torch.zeros(1, dtype=torch.int32), y)
    assert y.item() == 1
