"""The search for a wrong call: what it asks, where it stops, and whether nothing found means that nothing is there."""

import time
from collections.abc import Callable
from typing import Any

import pytest

st = pytest.importorskip("hypothesis").strategies

from refllm.errors import InputError  # noqa: E402
from refllm.opcheck import search  # noqa: E402
from refllm.opcheck.examine import Finding  # noqa: E402
from refllm.opcheck.search import Searched  # noqa: E402
from refllm.opcheck.worker import TimeIsUpError  # noqa: E402
from refllm.strategies import Call, corners  # noqa: E402

CALLS = corners("relu2", "float32", "fused")[:5]
SOON = time.monotonic() + 1e6


class Examine:
    """Answers the n-th call with what `answer(n)` returns or raises. score: of the last, for Hypothesis to climb."""

    def __init__(self, answer: Callable[[int], Finding | None] = lambda n: None) -> None:
        self.answer, self.calls, self.score = answer, list[Call](), 0.0

    def __call__(self, call: Call) -> Any:
        self.calls.append(call)
        return self.answer(len(self.calls))


def late(n: int) -> None:
    if n == 3:
        raise TimeIsUpError("now")


FINDING = Finding("value", "wrong", CALLS[0])


def found_third(n: int) -> Finding | None:
    return FINDING if n == 3 else None


def test_fixed_calls_are_examined_in_order_until_one_is_wrong() -> None:
    told: list[Any] = []
    assert search.fixed(all_ := Examine(), CALLS, SOON, lambda *said: told.append(said)) == Searched(None, "", True)
    assert all_.calls == CALLS
    assert [said[1:] for said in told] == [(i, len(CALLS)) for i in range(len(CALLS))]
    assert told[2][0] == f"relu2, float32: {CALLS[2].kind}"
    assert search.fixed(some := Examine(found_third), CALLS, SOON, lambda *_: None) == Searched(FINDING)
    assert some.calls == CALLS[:3]


def test_fixed_calls_that_were_not_all_examined_prove_nothing() -> None:
    cut = search.fixed(Examine(late), CALLS, SOON, lambda *_: None)
    assert cut == Searched(None, f"the time was up while fixed call 3 of 5 was running: {CALLS[2]}", complete=False)
    over = search.fixed(none := Examine(), CALLS, time.monotonic() - 1, lambda *_: None)
    assert over == Searched(None, "the time was up after 0 of 5 fixed calls", complete=False)
    assert none.calls == []


def drawn(examine: Examine, examples: int = 20, seed: int = 0, until: float = SOON, told: Any = None) -> Searched:
    strategy = st.sampled_from(corners("relu2", "float32", "fused"))
    return search.drawn(examine, strategy, examples, seed, until, told or (lambda *_: None))  # type: ignore[arg-type]


def test_drawn_calls_follow_from_their_seed() -> None:
    one, again, other, told = Examine(), Examine(), Examine(), list[Any]()
    assert drawn(one, told=lambda *said: told.append(said)) == drawn(again) == drawn(other, seed=1) == Searched(None)
    assert one.calls == again.calls != other.calls
    assert 10 < len(one.calls) <= 20
    assert [said[1:] for said in told] == [(i, 20) for i in range(len(one.calls))]
    assert told[0][0].startswith("relu2, float32: drawn, ")
    assert drawn(none := Examine(), examples=0) == Searched(None)
    assert none.calls == []


def test_drawing_stops_at_a_finding_and_when_the_time_is_up() -> None:
    assert drawn(three := Examine(found_third)) == Searched(FINDING)
    assert len(three.calls) == 3
    cut = drawn(running := Examine(late))
    said = f"the time was up while drawn call 3 of 20 was running: {running.calls[2]}"
    assert (cut, len(running.calls)) == (Searched(None, said, complete=False), 3)
    over = drawn(none := Examine(), until=time.monotonic() - 1)
    assert over == Searched(None, "the time was up after 0 of 20 drawn calls", complete=True)  # the fixed ones count
    assert none.calls == []


def test_what_the_examination_itself_raises_is_raised() -> None:
    def breaks(n: int) -> None:
        raise ZeroDivisionError("a fault of one's own")

    with pytest.raises(ZeroDivisionError, match="one's own"):
        drawn(Examine(breaks))


def test_a_strategy_without_calls_is_refused() -> None:
    with pytest.raises(InputError, match="draws no call that can be checked"):
        search.drawn(Examine(), st.just(CALLS[0]).filter(lambda _: False), 5, 0, SOON, lambda *_: None)  # type: ignore[arg-type]
