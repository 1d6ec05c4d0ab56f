"""What the repaired interpreter refuses: accesses out of bounds, overflow, races, memory that nobody wrote."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from refllm.kernels.interpreter import (  # noqa: E402
    IntegerOverflowError,
    KernelError,
    OutOfBoundsError,
    RaceError,
    UninitializedError,
    interpreted,
    unwritten,
)


@triton.jit
def copy(x, y, n, offset, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + offset, mask=at < n, other=0.0), mask=at < n)


def test_masked_off_lanes_are_never_touched() -> None:
    x, y = torch.arange(5.0), torch.zeros(5)
    with interpreted():
        copy[(2,)](x, y, 5, 0, BLOCK=4)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("n", "offset", "place"),
    [
        (7, 0, r"program 1, test_interpreter_checks.py:\d+: tl.load through `x`: 2 of 3 .* at byte 20 of the 20 bytes"),
        (5, -2, r"program 0, .*: tl.load through `x`: 2 of 4 active lanes .* 8 bytes before the 20 bytes"),
        (5, 10**6, r"program 0, .*: 4 of 4 active lanes"),
    ],
)
def test_out_of_bounds_names_kernel_program_argument_and_lanes(n: int, offset: int, place: str) -> None:
    with interpreted(), pytest.raises(OutOfBoundsError, match="copy, " + place):
        copy[(2,)](torch.arange(5.0), torch.zeros(5), n, offset, BLOCK=4)


def test_a_store_out_of_bounds_stores_nothing_and_names_its_argument() -> None:
    x, y = torch.arange(8.0), torch.zeros(8)[:6]
    storage = y.untyped_storage()
    short = torch.zeros(6)
    with interpreted(), pytest.raises(OutOfBoundsError, match=r"tl.store through `y`: 2 of 4"):
        copy[(2,)](x, short, 8, 0, BLOCK=4)
    assert short.tolist() == [0, 1, 2, 3, 0, 0]
    with interpreted():  # inside the storage, if outside the view
        copy[(2,)](x, y, 8, 0, BLOCK=4)
    assert storage.nbytes() == 32
    with interpreted(bounds="view"), pytest.raises(OutOfBoundsError, match=r"`y`: 2 of 4"):
        copy[(2,)](x, y, 8, 0, BLOCK=4)


def test_an_offset_that_lands_in_another_argument_is_out_of_bounds() -> None:
    both = torch.arange(8.0)
    x, y = both[:4].clone(), both[4:].clone()
    distance = (y.data_ptr() - x.data_ptr()) // 4
    with interpreted(), pytest.raises(OutOfBoundsError, match="`x`: 4 of 4"):
        copy[(1,)](x, y, 4, distance, BLOCK=4)
    with interpreted(bounds=False):
        copy[(1,)](x, y, 4, distance, BLOCK=4)
    assert torch.equal(y, both[4:])


@triton.jit
def rows(x, y, stride, n, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y + row, tl.load(x + row * stride, mask=row == n, other=0.0))


def test_int32_overflow_names_operation_and_program() -> None:
    x, y = torch.zeros(1), torch.zeros(3)
    with interpreted():
        rows[(3,)](x, y, 2**30, 0, WIDE=True)
        rows[(3,)](x, y, 2**30, 0, WIDE=False)  # the lane that overflows is masked off
        with pytest.raises(IntegerOverflowError, match=r"rows, program 2, .*: a multiplication leaves .* int32"):
            rows[(3,)](x, y, 2**30, 2, WIDE=False)
    with interpreted(overflow=False):
        rows[(3,)](x, y, 2**30, 0, WIDE=False)


@triton.jit
def wrapping(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(y + at, v + v - v * 3)


@pytest.mark.parametrize(
    ("value", "words"),
    [(2**30, "addition"), (-(2**31), "addition"), (2**29 * 2 - 1, "multiplication"), (1, "")],
)
def test_overflow_in_one_lane(value: int, words: str) -> None:
    x, y = torch.ones(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    x[5] = value
    with interpreted():
        if not words:
            wrapping[(1,)](x, y, BLOCK=8)
            assert (y == -1).all()
        else:
            with pytest.raises(IntegerOverflowError, match=words):
                wrapping[(1,)](x, y, BLOCK=8)


# -- races -------------------------------------------------------------------------------------------------------------


@triton.jit
def two_widths(wide, narrow, byte, CAST: tl.constexpr, SCATTERED: tl.constexpr):
    at = tl.arange(0, 2)
    if SCATTERED:
        at = 1 - at
    if tl.program_id(0) == 0:
        tl.store(wide + 2 + at, at)  # bytes 8 to 15
    elif CAST:
        tl.store(wide.to(tl.pointer_type(tl.int8)) + byte + at, at.to(tl.int8))
    else:
        tl.store(narrow + byte + at, at.to(tl.int8))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_stores_of_different_widths_meet_in_their_bytes(cast: bool, scattered: bool) -> None:
    wide = torch.zeros(8, dtype=torch.int32)
    narrow = torch.zeros(8, dtype=torch.int8) if cast else wide.view(torch.int8)
    with interpreted():
        for byte in (0, 5, 6, 16, 17, 22):
            two_widths[(2,)](wide, narrow, byte, CAST=cast, SCATTERED=scattered)
        for byte in (7, 8, 11, 14, 15):
            with pytest.raises(RaceError, match="programs 0 and 1 both store"):
                two_widths[(2,)](wide, narrow, byte, CAST=cast, SCATTERED=scattered)


@triton.jit
def stores(y, stride, BLOCK: tl.constexpr):
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    tl.store(y + program * stride + tl.arange(0, BLOCK), program.to(tl.float32))


def test_two_programs_that_store_to_one_element() -> None:
    y = torch.zeros(64)
    with interpreted():
        stores[(4,)](y, 8, BLOCK=8)
        with pytest.raises(RaceError, match=r"stores, program 1, .*: programs 0 and 1 both store to element 6 of `y`"):
            stores[(4,)](y, 6, BLOCK=8)
        with pytest.raises(RaceError, match=r"programs \(0, 1\) and \(1, 0\) both store to element 1 of `y`"):
            second_and_third[(2, 2)](y)
    with interpreted(races=False):
        stores[(4,)](y, 6, BLOCK=8)


@triton.jit
def second_and_third(y):
    program = tl.program_id(0) * 2 + tl.program_id(1)
    tl.store(y + (program + 1) // 2, 1.0)


@triton.jit
def neighbours(x, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at + SHIFT, mask=at + SHIFT < n, other=0.0)
    tl.store(x + at, v)


@pytest.mark.parametrize("shift", [1, 4])
def test_a_load_of_what_another_program_stores(shift: int) -> None:
    with interpreted():
        neighbours[(4,)](torch.arange(16.0), 16, BLOCK=4, SHIFT=0)
        with pytest.raises(RaceError, match=r"neighbours: program 0 loads element 4 of `x`, to which program 1 stores"):
            neighbours[(4,)](torch.arange(16.0), 16, BLOCK=4, SHIFT=shift)


@triton.jit
def scattered(x, order, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = tl.load(order + at)
    tl.store(y + where, tl.load(x + where))


def test_races_of_scattered_accesses() -> None:
    order = torch.tensor([7, 2, 5, 0, 1, 6, 3, 4])
    x, y = torch.arange(8.0), torch.zeros(8)
    with interpreted():
        scattered[(2,)](x, order, y, BLOCK=4)
        assert torch.equal(x, y)
        order[6] = 5
        with pytest.raises(RaceError, match="programs 0 and 1 both store to element 5 of `y`"):
            scattered[(2,)](x, order, y, BLOCK=4)
        order[6], order[2] = 3, 7
        with pytest.raises(RaceError, match=r"program 0, .*: tl\.store through `y`: lanes of one program"):
            neighbours_lanes[(1,)](x, order, y, BLOCK=4)


@triton.jit
def neighbours_lanes(x, order, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + tl.load(order + at), tl.load(x + at))


def test_many_scattered_reads_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from refllm.kernels.interpreter import memory

    monkeypatch.setattr(memory, "REMEMBERED", 4)
    order = torch.tensor([7, 2, 5, 0, 1, 6, 3, 4])
    x, y = torch.arange(8.0), torch.zeros(8)
    with interpreted():
        scattered[(2,)](x, order, y, BLOCK=4)
        order[6] = 5
        with pytest.raises(RaceError, match=r"program 1 loads element 5 of `x, y`|both store to element 5 of `x, y`"):
            scattered[(2,)](x, order, x, BLOCK=4)
        with pytest.raises(RaceError, match="program 0 loads element 0 of `x`, to which program 1 stores"):
            reads_first[(2,)](x, BLOCK=8)


@triton.jit
def reads_first(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + (at * 3) % BLOCK)
    if tl.program_id(0) == 1:
        tl.store(x, tl.sum(v))


@triton.jit
def last_one_sums(x, partial, counter, y, BLOCK: tl.constexpr, N: tl.constexpr):
    program = tl.program_id(0)
    tl.store(partial + program, tl.sum(tl.load(x + program * BLOCK + tl.arange(0, BLOCK))))
    if tl.atomic_add(counter, 1) == N - 1:
        tl.store(y, tl.sum(tl.load(partial + tl.arange(0, N))))


def test_an_atomic_puts_programs_in_order() -> None:
    x, y = torch.arange(32.0), torch.zeros(1)
    with interpreted():
        partial, counter = torch.empty(4), torch.zeros(1, dtype=torch.int32)
        last_one_sums[(4,)](x, partial, counter, y, BLOCK=8, N=4)
    assert y.item() == x.sum()


# -- memory that nobody wrote ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_new_memory_is_poisoned_and_reading_it_is_an_error(dtype: Any) -> None:
    with interpreted():
        x = torch.empty(8, dtype=dtype)
        assert x.isnan().all() if dtype.is_floating_point else (x > 2**30).all()
        x[:6] = torch.arange(6)
        assert unwritten(x).tolist() == [False] * 6 + [True] * 2
        with pytest.raises(UninitializedError, match=r"copy, program 1, .*: tl.load through `x`: 2 of 4 .* element 6"):
            copy[(2,)](x, torch.zeros(8, dtype=dtype), 8, 0, BLOCK=4)
        copy[(2,)](x, torch.zeros(8, dtype=dtype), 6, 0, BLOCK=4)


def test_an_output_element_that_no_program_stores_shows() -> None:
    with interpreted():
        y = torch.empty_like(torch.zeros(2, 4))
        copy[(2,)](torch.arange(8.0), y, 7, 0, BLOCK=4)
        assert unwritten(y).nonzero().tolist() == [[1, 3]]
        assert y[1, 3].isnan()


def test_computed_nan_is_not_taken_for_poison() -> None:
    with interpreted():
        y = torch.empty(4)
        copy[(1,)](torch.full((4,), float("nan")), y, 4, 0, BLOCK=4)
        assert not unwritten(y).any()
        copy[(1,)](y, torch.empty(4), 4, 0, BLOCK=4)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(4),
        lambda x: torch.empty_like(x),
        lambda x: torch.empty_strided((2, 2), (1, 2)),
        lambda x: x.new_empty(4),
        lambda x: x.new_empty_strided((4,), (1,)),
        lambda x: torch.empty_permuted((2, 2), (1, 0)),
    ],
)
def test_every_allocator_is_poisoned_inside_and_none_outside(allocate: Any) -> None:
    with interpreted():
        assert allocate(torch.zeros(4)).isnan().all()
    with interpreted(poison=False):
        assert not unwritten(allocate(torch.zeros(4))).any()
    with pytest.raises(KernelError, match=r"unwritten: torch\.bool"):
        unwritten(torch.zeros(1, dtype=torch.bool))


@triton.jit
def without_other(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < n)))


def test_lanes_masked_off_without_other_are_undefined() -> None:
    y = torch.zeros(1)
    with interpreted():
        without_other[(1,)](torch.ones(4), y, 4, BLOCK=4)
        assert y.item() == 4
        without_other[(1,)](torch.ones(4), y, 3, BLOCK=4)
        assert y.isnan().all()


# -- launches that a GPU would refuse ----------------------------------------------------------------------------------


def test_launches_that_cannot_be() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    with interpreted():
        for axis, grid in ((1, (1, 65536)), (2, (1, 1, 65536))):
            with pytest.raises(KernelError, match=f"65536 programs along axis {axis} of the grid.* 0 to 65,535"):
                copy[grid](x, y, 4, 0, BLOCK=4)
        with pytest.raises(KernelError, match=r"no argument `BLOK`.* its arguments are x, y, n, offset, BLOCK"):
            copy[(1,)](x, y, 4, 0, BLOK=4)
        with pytest.raises(KernelError, match="copy: missing a required argument: 'BLOCK'"):
            copy[(1,)](x, y, 4, 0)
        with pytest.raises(KernelError, match=r"copy, .*`x` is on meta; the interpreter runs on tensors of the CPU"):
            copy[(1,)](x.to("meta"), y, 4, 0, BLOCK=4)
        with pytest.raises(
            KernelError, match=r"copy, program 0, .*:\d+: ValueError: arange's range must be a power of 2"
        ):
            copy[(1,)](x, y, 4, 0, BLOCK=3)
        copy[(0,)](x, y, 4, 0, BLOCK=4)
        copy[(1,)](x, y, 4, 0, BLOCK=4, num_warps=8, num_stages=3, num_ctas=1, maxnreg=128)


@triton.jit
def hinted(x, stride):
    stride = tl.multiple_of(stride, 16)
    tl.store(x + tl.max_contiguous(tl.multiple_of(tl.arange(0, 4), 4), 4), stride)


def test_a_false_promise_to_the_compiler() -> None:
    x = torch.zeros(4, dtype=torch.int32)
    with interpreted():
        hinted[(1,)](x, 32)
        with pytest.raises(KernelError, match="promises a multiple of 16, and the value is 24"):
            hinted[(1,)](x, 24)


@triton.jit
def assembly(x):
    v = tl.load(x)
    tl.store(x, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1))


@triton.jit
def two_targets(x):
    a = b = tl.load(x)
    tl.store(x, a + b)


def test_what_cannot_run_is_said() -> None:
    with interpreted():
        with pytest.raises(KernelError, match="cannot run the inline assembly"):
            assembly[(1,)](torch.zeros(1))
        with pytest.raises(KernelError, match=r"two_targets: Triton does not compile the double assignment `a = b ="):
            two_targets[(1,)](torch.zeros(1))


PLAIN = 2.0


@triton.jit
def reads_a_plain_global(x, USE: tl.constexpr):
    if USE:
        tl.store(x, PLAIN)
    else:
        tl.store(x, 1.0)


def test_a_global_that_the_compiler_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    with interpreted():
        reads_a_plain_global[(1,)](x, USE=False)
        with pytest.raises(KernelError, match=r"`PLAIN` is a plain float; write PLAIN = tl\.constexpr"):
            reads_a_plain_global[(1,)](x, USE=True)
        monkeypatch.setenv("TRITON_ALLOW_NON_CONSTEXPR_GLOBALS", "1")
        reads_a_plain_global[(1,)](x, USE=True)
    assert x.item() == 2


def test_numbers_of_numpy_are_not_arguments() -> None:
    import numpy as np

    with interpreted(), pytest.raises(KernelError, match=r"copy, .*`n` is a numpy\.int64"):
        copy[(1,)](torch.zeros(4), torch.zeros(4), np.int64(4), 0, BLOCK=4)
