"""What the interpreter does with Python values inside a kernel: what is known at compile time behaves as in Python."""

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl

from refllm.kernels.interpreter import operations
from refllm.kernels.interpreter.errors import DeviceAssertionError, KernelError

BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


@pytest.mark.parametrize("name", BINARY)
def test_operators_of_numbers_are_those_of_python(name: str) -> None:
    for a, b in product((-3, 0, 2, 5), repeat=2):
        assert getattr(operations, name)(a, b) == BINARY[name](a, b)


def test_signs_and_negation_of_numbers() -> None:
    assert [operations.pos(-3), operations.neg(-3), operations.invert(5)] == [-3, 3, -6]
    assert [operations.not_(x) for x in (0, 1, tl.constexpr(0), tl.constexpr(2))] == [True, False, True, False]


def test_and_and_or_stop_at_the_first_that_decides() -> None:
    asked: list[int] = []

    def ask(value: Any) -> Any:
        return lambda: (asked.append(1), value)[1]

    assert not operations.both(ask(True), ask(False), ask(True))
    assert len(asked) == 2
    assert operations.either(ask(False), ask(True), ask(True))
    assert len(asked) == 4
    assert operations.both(ask(1), ask(2))
    assert not operations.either(ask(0), ask(0))


def test_a_chain_of_comparisons_evaluates_its_middle_once_and_stops_where_it_fails() -> None:
    for a, b, c in product(range(3), repeat=3):
        asked: list[int] = []

        def ask(value: int, asked: list[int] = asked) -> Any:
            return lambda: (asked.append(value), value)[1]

        assert bool(operations.chain(("lt", "le"), ask(a), ask(b), ask(c))) == (a < b <= c)
        assert asked == ([a, b, c] if a < b else [a, b])


def test_ranges_of_numbers() -> None:
    for bounds in ((3,), (1, 4), (1, 8, 3), (5, 0, -2), (2, 2)):
        assert list(operations._static_range(*bounds)) == list(range(*bounds))
        found = list(operations._range(*map(tl.constexpr, bounds)))
        assert [operations._integer(i) for i in found] == list(range(*bounds))
        assert {i.dtype for i in found} <= {tl.int32}


def test_assertions_say_what_they_were_told() -> None:
    operations._static_assert(True, "never")
    operations.device_assert(tl.constexpr(True), "never")
    with pytest.raises(DeviceAssertionError, match=r"^tl\.static_assert failed: 3 is odd$"):
        operations._static_assert(False, tl.constexpr("3 is odd"))
    with pytest.raises(DeviceAssertionError, match=r"^tl\.static_assert failed$"):
        operations._static_assert(tl.constexpr(0))
    with pytest.raises(DeviceAssertionError, match=r"^the assertion failed: no$"):
        operations.device_assert(False, "no")
    with pytest.raises(DeviceAssertionError, match=r"^the assertion failed$"):
        operations.device_assert(0)


def test_a_constant_is_what_is_known_at_compile_time() -> None:
    assert operations.constant(tl.constexpr(4)) == 4
    assert operations.constant("text") == "text"
    with pytest.raises(KernelError, match="known only when the kernel runs"):
        operations.constant(operations.SEMANTIC.to_tensor(4))
    with pytest.raises(KernelError, match=r"write N = tl\.constexpr"):
        operations.plain_global("N", 4)


def test_functions_of_python_get_plain_values() -> None:
    assert operations.call(max, tl.constexpr(3), 5) == 5
    assert operations.call(tl.constexpr(divmod), 7, tl.constexpr(2)) == (3, 1)
    assert operations.call(int, tl.constexpr("11"), base=tl.constexpr(2)) == 3
    assert operations.attribute(tl.constexpr("ab"), "upper")() == "AB"
    assert operations.attribute(tl.constexpr(3), "value") == 3
    assert operations.attribute(3, "value") == 3
