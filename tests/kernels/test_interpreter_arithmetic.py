"""The operators of the interpreter that ask no questions give the answers of those that ask: Triton's own."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

tl = pytest.importorskip("triton.language")

from refllm import kernels  # noqa: E402
from refllm.kernels.interpreter import arithmetic, operations  # noqa: E402
from refllm.kernels.interpreter.builder import BUILDER  # noqa: E402
from refllm.kernels.interpreter.errors import IntegerOverflowError  # noqa: E402
from refllm.kernels.interpreter.memory import Memory  # noqa: E402
from refllm.kernels.interpreter.semantic import SEMANTIC, Tensor, make, shape_of  # noqa: E402
from refllm.kernels.interpreter.settings import CHOICES, Settings  # noqa: E402

NUMBERS = np.array([3, 1, -7, 2, 11, -1, 5, 4], np.float64)
DTYPES = {
    tl.int1: bool, tl.int32: np.int32, tl.int64: np.int64, tl.uint32: np.uint32,
    tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64,
}  # fmt: skip
SHAPES = ((), (1,), (4,), (1, 4), (2, 1), (2, 4))
NAMES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge")


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As inside a launch."""
    settings = Settings(**{name: choices[0] for name, choices in CHOICES.items()})  # type: ignore[arg-type]
    monkeypatch.setattr(BUILDER, "memory", Memory(settings))
    with kernels.interpreted(), np.errstate(all="ignore"):
        yield


def value(dtype: Any, shape: tuple[int, ...], start: int = 0) -> Tensor:
    count = max(1, int(np.prod(shape)))
    numbers = np.roll(NUMBERS, start)[:count].reshape(shape or (1,))
    wanted = DTYPES[dtype]
    data = (np.abs(numbers) if np.dtype(wanted).kind in "ub" else numbers).astype(wanted)
    return make(data, dtype, scalar=not shape)


def answer(operation: Any, left: Any, right: Any) -> Any:
    """Type, shape and numbers of a result; the kind of the error where it raises."""
    try:
        result = operation(left, right)
    except Exception as error:  # whichever: the two have to agree
        return type(error).__name__
    return result.dtype.name, shape_of(result.type), result.handle.data.dtype, result.handle.data.tolist()


def asked(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operator without the short way."""
    with monkeypatch.context() as undo:
        undo.setattr(operations, "quick", lambda name: lambda left, right: None)
        return operations._binary(name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_the_short_way_gives_the_answer_of_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all pairs of types, of shapes, and of a tensor with a number."""
    long, short = asked(name, monkeypatch), operations._binary(name, None)  # type: ignore[arg-type]
    types = [(a, b, (2, 4), (2, 4)) for a, b in itertools.product(DTYPES, DTYPES)]
    shapes = [(d, d, a, b) for d in (tl.int32, tl.float32) for a, b in itertools.product(SHAPES, SHAPES)]
    for a, b, left, right in types + shapes:
        pair = value(a, left), value(b, right, 3)
        assert repr(answer(short, *pair)) == repr(answer(long, *pair)), (name, a, b, left, right)
    for dtype, number in itertools.product(DTYPES, (2, 0, -3, 2**31, 2**40, 0.5, -0.0, 1e-45, True, tl.constexpr(2))):
        for pair in ((value(dtype, (2, 4)), number), (number, value(dtype, ()))):
            assert repr(answer(short, *pair)) == repr(answer(long, *pair)), (name, dtype, number)


def test_the_short_way_is_taken_where_kernels_are() -> None:
    """Otherwise the test above would compare Triton with itself."""
    for name in NAMES:
        dtype = tl.int1 if name in ("and", "or", "xor") else tl.float32 if name == "truediv" else tl.int32
        assert arithmetic.quick(name)(value(dtype, (4,)), value(dtype, ())) is not None, name
    assert arithmetic.quick("pow")(value(tl.int32, ()), 2) is None


def test_offsets_to_pointers_are_counted_in_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    pointers = make(np.array([1 << 40], np.uint64), tl.pointer_type(tl.float32), scalar=True)
    for offset in (value(tl.int32, (2, 4)), value(tl.int64, ()), 5, value(tl.uint32, (4,))):
        short, long = operations.add(pointers, offset), asked("add", monkeypatch)(pointers, offset)
        assert short.handle.data.tolist() == long.handle.data.tolist()
        assert shape_of(short.type) == shape_of(long.type)


@pytest.mark.parametrize(
    ("name", "numbers", "other", "overflows"),
    [
        ("mul", [1, 65_536], [65_536, 1], False),  # the ends meet nowhere: 1 * 65536 and 65536 * 1
        ("mul", [1, 65_536], [1, 65_536], True),
        ("add", [2**31 - 1, 0], [0, 2**31 - 1], False),
        ("add", [2**31 - 1, 0], [1, 0], True),
        ("sub", [-(2**31), 0], [0, 2**31 - 1], False),
        ("sub", [-(2**31), 0], [1, 0], True),
    ],
)
def test_an_overflow_is_one_of_elements_and_not_of_ends(
    name: str, numbers: list[int], other: list[int], overflows: bool
) -> None:
    pair = [make(np.array(n, np.int32), tl.int32) for n in (numbers, other)]
    result = getattr(operations, name)(*pair)
    if overflows:
        with pytest.raises(IntegerOverflowError, match="leaves the range of int32"):
            assert result.handle.data is None
        exact = getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply"}[name])(numbers, other, dtype=np.int64)
        assert result.handle.lost.tolist() == (np.abs(exact + 0.5) > 2**31).tolist()
    else:
        assert result.handle.data.min() >= result.handle.span[0]
        assert result.handle.data.max() <= result.handle.span[1]


def test_spans_hold_along_a_chain_and_an_overflow_at_its_end_is_seen() -> None:
    x = SEMANTIC.arange(0, 8)
    far = operations.add(operations.mul(operations.sub(x, 3), 1 << 27), 1 << 29)
    assert (far.handle.span[0], far.handle.span[1]) == (far.handle.data.min(), far.handle.data.max())
    with pytest.raises(IntegerOverflowError):
        operations.lt(operations.mul(far, 2), 0)


def test_what_is_shared_is_never_written_to() -> None:
    two, again = (arithmetic.constant(2, tl.int32) for _ in range(2))
    assert two is again
    assert two is not None
    for shared in (two, SEMANTIC.arange(0, 8)):
        with pytest.raises(ValueError, match="read-only"):
            shared.handle.data[0] = 1


def test_a_product_that_triton_refuses_is_refused_every_time() -> None:
    half = [make(np.ones((16, 16), np.float16), tl.float16) for _ in range(2)]
    short = make(np.ones((8, 16), np.float16), tl.float16)
    wide = make(np.ones((16, 16), np.float32), tl.float32)
    for _ in range(2):
        assert SEMANTIC.dot(*half, None, None, None, tl.float32).handle.data[0, 0] == 16
        for pair in ((half[0], short), (half[0], wide)):
            with pytest.raises(AssertionError):
                SEMANTIC.dot(*pair, None, None, None, tl.float32)
        with pytest.raises(AssertionError):
            SEMANTIC.dot(*half, None, "no such precision", None, tl.float32)
