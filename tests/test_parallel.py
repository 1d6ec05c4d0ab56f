"""Pieces of work in threads: all are done, the first error comes out, NumPy's error settings hold in them."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from refllm import parallel


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(parallel, "threads", lambda: request.param)
    parallel._pool.cache_clear()
    yield request.param
    if request.param > 1:
        parallel._pool().shutdown()
    parallel._pool.cache_clear()


def test_every_piece_is_done_in_the_threads_there_are(threads: int) -> None:
    done, names = [], set()
    meet = threading.Barrier(threads)

    def work(item: int) -> None:
        if item < threads:
            meet.wait(20)  # all threads at once, or never
        done.append(item)
        names.add(threading.current_thread().name)

    parallel.for_each(work, iter(range(20)))
    assert sorted(done) == list(range(20))
    assert len(names) == threads
    parallel.for_each(done.append, [])
    parallel.for_each(done.append, [99])
    assert done[-1] == 99
    assert len(done) == 21


def test_the_first_error_comes_out(threads: int) -> None:
    done = []

    def work(item: int) -> None:
        if item in (3, 5):
            raise ValueError(f"piece {item}")
        done.append(item)

    with pytest.raises(ValueError, match="piece 3"):
        parallel.for_each(work, range(8))
    assert sorted(done) == ([0, 1, 2] if threads == 1 else [0, 1, 2, 4, 6, 7])


def test_error_settings_of_numpy_hold_in_the_threads(threads: int) -> None:
    def work(item: int) -> None:
        np.float64(1) / np.float64(0)

    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        parallel.for_each(work, range(4))
    with np.errstate(divide="ignore"):
        parallel.for_each(work, range(4))


def test_the_number_of_threads_is_what_the_environment_says_else_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for blas, omp, expected in (("3", "2", 3), ("", "2", 2), ("x", "2", 2), ("0", "4", 4)):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", blas)
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        assert parallel.threads.__wrapped__() == expected
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    assert parallel.threads.__wrapped__() == 3
