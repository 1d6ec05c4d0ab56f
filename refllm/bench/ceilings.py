"""What the machine at hand can do at best, measured at the start of every run; every other figure is a share of it.

    copy       bytes read plus bytes written per second, copying a buffer far larger than the last cache
    product    flops per second of the library's matrix product of random numbers, per dtype
    launch     seconds per call of an operation on one number: in a graph, and started one by one

A product of zeros runs faster than one of numbers (less is switched in the chip), so inputs are random.
"""

import time
from typing import Any

from refllm.bench.timer import Clock, clock

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
PRODUCT_SIZES = {"cuda": (4096, 8192), "cpu": (1024,)}
"""The sizes of the square products that are timed; the fastest counts."""
LAUNCHES = 64


def measure_ceilings(
    device: str, dtypes: tuple[str, ...], *, seconds: float = 0.3, scale: float = 1.0, watch: Clock | None = None
) -> dict[str, Any]:
    """The ceilings of `device`. seconds: for each figure. scale: of the buffers (tests take a small one).

    Returns copy_bytes_per_second, flops_per_second {dtype: value}, launch_seconds, launch_from_python_seconds and
    cache_bytes.
    """
    watch = watch or clock(device)
    copy = copy_rate(watch, int(COPY_BYTES[device] * scale), seconds)
    sizes = [max(64, int(size * scale**0.5)) for size in PRODUCT_SIZES[device]]
    products = {dtype: max(product_rate(watch, dtype, size, seconds) for size in sizes) for dtype in dtypes}
    in_graph, from_python = launch_seconds(watch, seconds)
    return {
        "copy_bytes_per_second": copy,
        "flops_per_second": products,
        "launch_seconds": in_graph,
        "launch_from_python_seconds": from_python,
        "cache_bytes": watch.cache_bytes,
    }


def copy_rate(watch: Clock, size: int, seconds: float) -> float:
    """Bytes per second, read plus written, of copying `size` bytes."""
    import torch

    source = torch.randn(size // 4, device=watch.device)
    target = torch.empty_like(source)
    timed = watch.time([lambda: target.copy_(source)], seconds)
    return 2 * source.nbytes / timed.spread.median


def product_rate(watch: Clock, dtype: str, size: int, seconds: float) -> float:
    """Flops per second of a product of two square matrices of random numbers."""
    import torch

    a, b = (torch.randn(size, size, device=watch.device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    timed = watch.time([lambda: torch.mm(a, b, out=out)], seconds)
    return 2 * size**3 / timed.spread.median


def launch_seconds(watch: Clock, seconds: float) -> tuple[float, float]:
    """Seconds per call of adding one to one number: inside a graph (on a CPU: a plain call), and from Python."""
    import torch

    x = torch.zeros(1, device=watch.device)
    in_graph = watch.time([lambda: x.add_(1)] * LAUNCHES, seconds).spread.median
    watch.synchronize()
    start = time.perf_counter()
    for _ in range(10 * LAUNCHES):
        x.add_(1)
    watch.synchronize()
    return in_graph, (time.perf_counter() - start) / (10 * LAUNCHES)
