"""Threads for work that falls into independent pieces. NumPy releases the interpreter lock in its loops, and BLAS has
threads of its own; this is for what lies between two matrix products.

There are never more threads at work than cores: while pieces are worked on, a product inside of one runs on that
piece's thread alone. Otherwise each of N threads would start N of BLAS, and all would wait for each other. A large
product is cut into pieces too, because the threads of OpenBLAS do not sleep after one: for some 25 ms they ask for the
next, on cores that what lies between needs, and where something else runs besides, each product waits for them.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from typing import Any

_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


@cache
def threads() -> int:
    """How many threads to use: what OPENBLAS_NUM_THREADS or OMP_NUM_THREADS says, else the cores of this process."""
    for variable in _VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads beside the calling one, which works too."""
    return ThreadPoolExecutor(threads() - 1, thread_name_prefix="refllm")


def blocks(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` elements that cover range(size)."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def for_each(work: Callable[[Any], object], items: Iterable[Any]) -> None:
    """work(item) for every item, in any order and several at a time. All are run, whatever one of them raises; the
    exception of the earliest item is raised at the end.

    `np.errstate` of the caller holds in the threads. Matrix products inside of `work` run on one thread each.
    """
    todo = deque(enumerate(items))
    if len(todo) < 2 or threads() == 1:
        with one_blas_thread():
            for _, item in todo:
                work(item)
        return
    raised: dict[int, BaseException] = {}

    def take() -> None:
        while True:
            try:
                number, item = todo.popleft()
            except IndexError:
                return
            try:
                work(item)
            except BaseException as error:
                raised[number] = error

    with one_blas_thread():
        # As many tasks as there are threads, not as there are items: waking one costs as much as a small item.
        others = [_pool().submit(copy_context().run, take) for _ in range(min(threads(), len(todo)) - 1)]
        take()
        for other in others:
            if not other.cancel():  # one that has not begun has nothing left to do
                other.result()
    if raised:
        raise raised[min(raised)]


class _Blas:
    """The thread count of NumPy's BLAS, and how many callers want it to be one at this moment."""

    def __init__(self) -> None:
        self.lock, self.wanted_by, self.before = threading.Lock(), 0, list[int]()
        self._found: list[Any] | None = None

    @property
    def libraries(self) -> list[Any]:
        """Controllers of what computes NumPy's products; looked for once. Torch's library is none of them."""
        if self._found is None:
            from threadpoolctl import ThreadpoolController

            self._found = list(ThreadpoolController().select(user_api="blas").lib_controllers)
        return self._found

    def limit(self) -> None:
        with self.lock:
            self.wanted_by += 1
            if self.wanted_by == 1:
                self.before = [library.num_threads for library in self.libraries]
                for library in self.libraries:
                    library.set_num_threads(1)

    def restore(self) -> None:
        with self.lock:
            self.wanted_by -= 1
            if self.wanted_by == 0:
                for library, count in zip(self.libraries, self.before, strict=True):
                    library.set_num_threads(count)


_blas = _Blas()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products of NumPy run on the thread that calls them, until the last of those who want it so leaves."""
    _blas.limit()
    try:
        yield
    finally:
        _blas.restore()
