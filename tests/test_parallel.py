"""Work in several threads: all of it is done, and matrix products inside of it start no threads of their own."""

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from refllm import parallel
from refllm.parallel import for_each, one_blas_thread

_threads = parallel.threads.__wrapped__  # the fixture below stands in its place


def blas_threads() -> list[int]:
    """Threads that a product of NumPy's BLAS may use now. Another test may have loaded the BLAS of another library."""
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    own = [library for library in found if "numpy" in (library.filepath or "")]
    return [library.num_threads for library in own or found]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one core too."""
    pool = ThreadPoolExecutor(1)
    monkeypatch.setattr(parallel, "threads", lambda: 2)
    monkeypatch.setattr(parallel, "_pool", lambda: pool)


@pytest.fixture(autouse=True)
def blas_with_two_threads() -> Any:
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        if set(blas_threads()) != {2}:
            pytest.skip("this NumPy's BLAS has no thread count that can be set")
        yield


def test_products_in_a_piece_of_work_run_on_its_thread_alone_and_afterwards_as_before() -> None:
    both = Barrier(2, timeout=10)  # both threads are at work at the same time
    seen: list[int] = []

    def work(item: int) -> None:
        both.wait()
        seen.extend(blas_threads())

    for_each(work, range(2))
    assert seen == [1] * 2 * len(blas_threads())
    assert set(blas_threads()) == {2}


def test_thread_count_comes_back_after_an_error_and_not_before_the_last_who_wants_one() -> None:
    def fails(item: int) -> None:
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        for_each(fails, range(5))
    assert set(blas_threads()) == {2}
    with one_blas_thread():
        for_each(lambda item: None, range(3))
        assert set(blas_threads()) == {1}
    assert set(blas_threads()) == {2}


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_item_is_worked_on_once_whatever_fails_and_the_earliest_error_is_raised(count: int) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        done.append(item)
        if item % 3 == 2:
            raise ValueError(f"item {item}")

    if count > 2:
        with pytest.raises(ValueError, match=r"item 2$"):
            for_each(work, range(count))
    else:
        for_each(work, range(count))
    assert sorted(done) == list(range(count))


def test_settings_of_numpy_hold_in_the_threads() -> None:
    def work(item: int) -> None:
        np.float32(1) / np.zeros(1, np.float32)

    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        for_each(work, range(8))


def test_work_may_start_work() -> None:
    done: list[tuple[int, int]] = []
    for_each(lambda i: for_each(lambda j: done.append((i, j)), range(3)), range(3))
    assert len(set(done)) == len(done) == 9


def test_the_caller_does_it_all_where_the_other_threads_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that was forked off one that had them."""

    class Gone:
        def submit(self, *_: Any) -> Future[None]:
            return Future()

    monkeypatch.setattr(parallel, "_pool", Gone)
    done: list[int] = []
    for_each(done.append, range(10))
    assert done == list(range(10))


def test_the_number_of_threads_is_what_the_environment_says_else_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for blas, omp, expected in (("3", "2", 3), ("", "2", 2), ("x", "2", 2), ("0", "4", 4)):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", blas)
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        assert _threads() == expected
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    assert _threads() == 3
