"""What a benchmark of kernels or models leaves behind: rows, and a result with machine, versions, command and date."""

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from refllm.accuracy.verdicts import verdict
from refllm.bench import numpy_blas, processor_name
from refllm.bench.timer import Spread

FORMAT = 1
"""The number of the form of the JSON files. Another number means other keys."""

WHOLE_CALL, STEP_ALONE = "whole call", "step alone"
"""What rows of decoding add to the name of a form: all of `generate`, and a recorded step without its host."""

PACKAGES = ("refllm", "numpy", "torch", "triton", "liger-kernel", "transformers")


@dataclass
class Row:
    """One form of one call, timed or not.

    what: operator, or "prefill" or "decode". panel, group: where it stands in a table or a chart. sizes: the numbers
    that make up the call. form: who computed it; ours: whether that is one of this project's. time: None if it was not
    timed, and then `note` or `finding` says why. error: of what was checked, over the contract's error in the same
    precision (ours) or relative (a peer). checked: which part of the output was held against what. finding: what is
    wrong; it makes the run fail. tokens: per call, where a speed in tokens per second means something.
    """

    what: str
    panel: str
    group: str
    form: str
    ours: bool
    dtype: str
    sizes: dict[str, int]
    bytes: int
    flops: int
    time: Spread | None = None
    error: float | None = None
    checked: str = ""
    note: str = ""
    finding: str = ""
    tokens: int = 0
    figures: dict[str, Any] = field(default_factory=dict)

    def rate(self, ceilings: dict[str, Any]) -> None:
        """Fills `figures`: GB/s, TFLOP/s, what bounds it (memory, arithmetic or launch), and the share of that.

        share: the least time that the ceilings allow for these bytes and flops, over the median. A call whose least
        time is under that of an empty launch is bound by the launch, whatever its share.
        """
        if self.time is None:
            return
        by_memory = self.bytes / ceilings["copy_bytes_per_second"]
        product = ceilings["flops_per_second"].get(self.dtype)
        by_arithmetic = self.flops / product if product else 0.0
        floor, median = max(by_memory, by_arithmetic), self.time.median
        bound = "memory" if by_memory >= by_arithmetic else "arithmetic"
        if floor < ceilings["launch_seconds"]:
            bound = "launch"
        self.figures = {
            "bytes_per_second": self.bytes / median,
            "flops_per_second": self.flops / median,
            "bound": bound,
            "share": floor / median,
        }
        if self.tokens:
            self.figures["tokens_per_second"] = self.tokens / median

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@cache  # asked again for every row that is saved
def describe_machine(device: str) -> dict[str, Any]:
    """Processor and, on "cuda", the GPU."""
    values: dict[str, Any] = {
        "device": device,
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "blas": numpy_blas(),
        "gpu": None,
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        values |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    return values


@cache
def installed_versions() -> dict[str, str | None]:
    """The versions of the packages whose speed this is; None for one that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def stamp(bench: str) -> dict[str, Any]:
    """What every result begins with: which benchmark, when, and the command as it was typed."""
    return {
        "bench": bench,
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["refllm", *sys.argv[1:]]),
    }


def assemble(
    bench: str,
    device: str,
    rows: list[Row],
    *,
    ceilings: dict[str, Any],
    settings: dict[str, Any],
    left_out: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The whole result of one run as plain values. left_out: what the time did not suffice for."""
    return {
        **stamp(bench),
        "verdict": verdict(any(row.finding for row in rows)),
        "machine": describe_machine(device),
        "versions": installed_versions(),
        "settings": settings,
        "seconds": round(seconds, 1),
        "ceilings": ceilings,
        "rows": [row.to_dict() for row in rows],
        "left_out": left_out,
    }


def speed(row: dict[str, Any]) -> str:
    """The figure that a reader looks for: tokens/s, TFLOP/s or GB/s. row: as `Row.to_dict` gives it."""
    figures = row["figures"]
    if not figures:
        return ""
    if "tokens_per_second" in figures:
        return f"{figures['tokens_per_second']:,.1f} tokens/s"
    if figures["bound"] == "arithmetic":
        return f"{figures['flops_per_second'] / 1e12:,.3g} TFLOP/s"
    return f"{figures['bytes_per_second'] / 1e9:,.3g} GB/s"


def span(seconds: float) -> str:
    """A time with three digits: 12.3 us, 4.56 ms, 1.2 s."""
    rounded = float(f"{seconds:.3g}")  # before the unit is chosen: 0.9996 s are 1 s, not 1e+03 ms
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if rounded >= size or unit == "us":
            return f"{rounded / size:.3g} {unit}" if rounded < 1000 else f"{seconds:.0f} s"
    raise AssertionError(seconds)
