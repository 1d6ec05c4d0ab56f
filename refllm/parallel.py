"""Threads for work that falls into independent pieces. NumPy releases the interpreter lock in its loops, and BLAS has
threads of its own; this is for what lies between two matrix products.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
    return ThreadPoolExecutor(threads(), thread_name_prefix="refllm")


def for_each(work: Callable[[Any], object], items: Iterable[Any]) -> None:
    """work(item) for every item, in any order and several at a time. The first exception is raised after all have run.

    `np.errstate` of the caller holds in the threads. `work` must not call `for_each` itself.
    """
    items = list(items)
    if len(items) < 2 or threads() == 1:
        for item in items:
            work(item)
        return
    futures = [_pool().submit(copy_context().run, work, item) for item in items]
    for future in futures:
        future.exception()
    for future in futures:
        future.result()
