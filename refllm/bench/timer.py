"""Time of a call on a GPU or a CPU: warmed up, on inputs that no cache holds, repeated, as a median with its spread.

A clock gets the same call on several sets of inputs. One sample is a round over all sets, so no set is used twice in
a row; before each round a buffer larger than the cache is read, so that the first use of a set finds none of it there.
(Read and not written: what was written would still have to leave the cache while the clock runs.)

    GPU    a CUDA graph of the round is replayed between two events: no gap for Python between the calls. What cannot be
           recorded is started one by one between two events, and its samples say so.
    CPU    time.perf_counter

Results of a round are kept until the next one ends, so that each call writes memory of its own too.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CACHE_MULTIPLE = 3
"""The buffers of a round, or what is read before it, are at least so many times the cache."""
SETS = (2, 16)
"""Sets of inputs: at least, at most."""
SAMPLES = (5, 300)
CPU_CACHE = 32 << 20
"""Assumed where the system does not tell the size of the last cache."""


@dataclass(frozen=True)
class Spread:
    """Seconds per call: median, 20th and 80th percentile of so many samples, and how they were taken."""

    median: float
    p20: float
    p80: float
    samples: int
    method: str


@dataclass(frozen=True)
class Timed:
    """spread: seconds per call. outputs: what the last timed round returned, one entry per set."""

    spread: Spread
    outputs: list[Any]


def spread(seconds: Sequence[float], method: str) -> Spread:
    """The spread of samples in any order; percentiles are samples themselves (nearest rank)."""
    ordered = sorted(seconds)

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Spread(rank(0.5), rank(0.2), rank(0.8), len(ordered), method)


def sets_needed(bytes_per_set: int, cache_bytes: int) -> int:
    """How many sets of inputs a round takes so that it moves `CACHE_MULTIPLE` times the cache, within `SETS`."""
    return min(max(math.ceil(CACHE_MULTIPLE * cache_bytes / max(1, bytes_per_set)), SETS[0]), SETS[1])


def _samples(seconds: float, one: float) -> int:
    return min(max(int(seconds / max(one, 1e-9)), SAMPLES[0]), SAMPLES[1])


class CpuClock:
    """Wall clock on the CPU. cache_bytes: of the last cache; None asks the system."""

    device = "cpu"

    def __init__(self, cache_bytes: int | None = None) -> None:
        import torch

        self.cache_bytes = cpu_cache_bytes() if cache_bytes is None else cache_bytes
        self._other = torch.ones(CACHE_MULTIPLE * self.cache_bytes // 4)

    def evict(self) -> None:
        """Reads more than the cache holds."""
        self._other.sum()

    def time(self, calls: Sequence[Callable[[], Any]], seconds: float, graph: bool = True) -> Timed:
        """Seconds per call over rounds that together take about `seconds`. graph: means nothing here."""
        outputs = [call() for call in calls]
        start = time.perf_counter()
        self.evict()  # takes longer than most rounds
        outputs = [call() for call in calls]
        count = _samples(seconds, time.perf_counter() - start)
        values = []
        for _ in range(count):
            self.evict()
            start = time.perf_counter()
            fresh = [call() for call in calls]
            values.append((time.perf_counter() - start) / len(calls))
            outputs = fresh
        return Timed(spread(values, "wall clock"), outputs)

    def synchronize(self) -> None:
        """Nothing runs behind the back of a CPU."""


class GpuClock:
    """Events around the replay of a CUDA graph, on the current GPU."""

    device = "cuda"

    def __init__(self, cache_bytes: int | None = None) -> None:
        import torch

        self._torch = torch
        told = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self.cache_bytes = cache_bytes or told or 64 << 20
        self._other = torch.ones(CACHE_MULTIPLE * self.cache_bytes // 4, device="cuda")

    def evict(self) -> None:
        """Reads more than the L2 cache holds. The host meanwhile hands over the round that follows."""
        self._other.sum()

    def synchronize(self) -> None:
        """Waits for the GPU; raises what a kernel did wrong."""
        self._torch.cuda.synchronize()

    def time(self, calls: Sequence[Callable[[], Any]], seconds: float, graph: bool = True) -> Timed:
        """Seconds per call over rounds that together take about `seconds`.

        graph: False for calls that wait for the GPU, which a graph cannot record.
        """
        outputs: list[Any] = []

        def one_by_one() -> None:
            outputs[:] = [call() for call in calls]

        one_by_one()
        self.synchronize()
        run, method = one_by_one, "events"
        if graph:
            try:
                recorded, outputs[:] = self._record(calls)
                run, method = recorded.replay, "graph replay"
            except RuntimeError as error:
                self.synchronize()
                method = f"events ({str(error).splitlines()[0][:80]})"
                one_by_one()
        count = _samples(seconds, self._round(run, 3))
        pairs = [self._events() for _ in range(count)]
        for start, stop in pairs:
            self.evict()
            start.record()
            run()
            stop.record()
        self.synchronize()
        values = [start.elapsed_time(stop) / 1e3 / len(calls) for start, stop in pairs]
        return Timed(spread(values, method), outputs)

    def _record(self, calls: Sequence[Callable[[], Any]]) -> tuple[Any, list[Any]]:
        torch = self._torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate per stream, and must not do so while a graph is recorded
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
        graph.replay()
        self.synchronize()
        return graph, outputs

    def _events(self) -> tuple[Any, Any]:
        event = self._torch.cuda.Event
        return event(enable_timing=True), event(enable_timing=True)

    def _round(self, run: Callable[[], None], repeats: int) -> float:
        start, stop = self._events()
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        self.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / repeats


Clock = CpuClock | GpuClock


def clock(device: str, cache_bytes: int | None = None) -> Clock:
    """The clock of a device, "cuda" or "cpu"."""
    return GpuClock(cache_bytes) if device == "cuda" else CpuClock(cache_bytes)


def cpu_cache_bytes() -> int:
    """Size of the last cache of the first core, as Linux tells it; else `CPU_CACHE`."""
    from pathlib import Path

    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
        except (OSError, ValueError, KeyError):
            continue
    return max(sizes, default=CPU_CACHE)


class Deadline:
    """A moment by which a run should be done. minutes: None for never."""

    def __init__(self, minutes: float | None) -> None:
        self.start = time.monotonic()
        self._end = math.inf if minutes is None else self.start + 60 * minutes

    @property
    def passed(self) -> bool:
        """Whether it is too late to begin something."""
        return time.monotonic() >= self._end

    @property
    def minutes(self) -> float | None:
        """That are left; None for ever."""
        return None if math.isinf(self._end) else max(0.0, self._end - time.monotonic()) / 60

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start
