"""The benchmarks of `make gpu`: each in a process of its own and bounded in time; one JSON file each.

Files are named as docs/benchmarks keeps them: kernels-nvidia-h200.json, and pictures beside them. A benchmark that is
ended early leaves the file as far as it got.

What they hold on a GPU, counted by tests/bench/test_gpu.py:

    kernels     152 calls in 516 forms, 20 of these through torch.compile; targets name 50 calls, which come first
    attention    72 calls in 360 forms; targets name 23 calls, which come first
    decode        5 models at batch 1, which targets name; then 2 models at batches 8 and 64
    prefill       5 models at 4096 tokens; then 2 models at 1024 and 16384; no target names any

A form is timed for 0.05 s, so that timing itself takes 26 s of `kernels` and 18 s of `attention`; drawing and checking
come on top. Compiling would take more than all of that (about 300 Triton kernels of 0.7 to 0.8 s each, ahead of time on
one core), and is done before, by `COMPILERS` processes beside the checks (`refllm.bench.kernels.compile_ahead`).
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refllm.apart import SECONDS_TO_TIDY_UP, Batch

# Name -> (share of the time, seconds that what it has begun, and the pictures, may take after its time is over).
BENCHMARKS = {"kernels": (6, 30), "attention": (5, 25), "decode": (7, 35), "prefill": (4, 35)}
PASSES: dict[str, list[dict[str, Any]]] = {
    "kernels": [{"seconds": 0.05}],
    "attention": [{"seconds": 0.05}],
    "decode": [
        {"batches": [1], "new": 64},
        {"batches": [8, 64], "new": 64, "models": ["helium-1-preview-2b", "stablelm-2-12b"]},
    ],
    "prefill": [
        {"lengths": [4096]},
        {"lengths": [1024, 16384], "models": ["helium-1-preview-2b", "stablelm-2-12b"]},
    ],
}
"""The settings of the passes of a benchmark on a GPU, one after the other."""
COMPILERS = {"kernels": 3, "attention": 2}

Row = dict[str, Any]


def slug(machine_name: str) -> str:
    """ "NVIDIA H200" as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")


def start_compilers(names: tuple[str, ...], device: str, seconds: float) -> list[Batch]:
    """Processes that fill the caches of the compilers for these benchmarks, beside the checks. On a CPU none."""
    of = COMPILERS if device == "cuda" else {}
    parts = [(name, f"{part}/{of[name]}") for name in names for part in range(of.get(name, 0))]
    return [
        Batch(["-m", "refllm.bench.process", name, "--device", device, "--compile-ahead", part], seconds)
        for name, part in parts
    ]


def run_benchmarks(
    names: tuple[str, ...],
    device: str,
    machine_name: str,
    folder: Path,
    seconds: float,
    step: Callable[[str], None],
    settings: dict[str, list[dict[str, Any]]] | None = None,
) -> Iterator[Row]:
    """A row per benchmark: its file, verdict, what it said, problem (a finding, a crash) and what is missing.

    All of them together end inside `seconds`.

    settings: instead of `PASSES`, which are for a GPU.
    """
    end = time.monotonic() + seconds
    for index, name in enumerate(names):
        left = end - time.monotonic()
        share, grace = BENCHMARKS[name]
        slot = left * share / sum(BENCHMARKS[other][0] for other in names[index:])
        step(f"benchmark: {name}, {slot:.0f} s")
        file = folder / f"{name}-{slug(machine_name)}.json"
        row = {"benchmark": name, "file": str(file), "seconds": 0.0, "verdict": None, "said": ""}
        if slot < grace:
            yield row | {"problem": "", "missing": f"not run: {slot:.0f} s are left for it"}
            continue
        passes = (settings or (PASSES if device == "cuda" else {})).get(name, [{}])
        yield row | _run(name, device, file, passes, slot, grace)


def _run(name: str, device: str, file: Path, passes: list[dict[str, Any]], slot: float, grace: float) -> Row:
    arguments = ["-m", "refllm.bench.process", name, "--device", device, "--minutes", f"{(slot - grace) / 60:.3f}"]
    arguments += ["--json", str(file), "--plots", str(file.parent), "--settings", json.dumps(passes)]
    file.unlink(missing_ok=True)
    process = Batch(arguments, slot - SECONDS_TO_TIDY_UP).wait()
    row: Row = {"said": process.output, "seconds": round(process.seconds, 1)}
    late = f"not done after {slot - SECONDS_TO_TIDY_UP:.0f} s" if process.code is None else ""
    broke = f"ended with {process.code}: {process.last_line}" if process.code not in (None, 0, 1) else ""
    if not file.exists():
        return row | {"problem": broke or ("" if late else f"no result: {process.last_line}"), "missing": late}
    result = json.loads(file.read_text(encoding="utf-8"))
    left = f"left out: {'; '.join(result['left_out'])}" if result["left_out"] else ""
    found = "a finding" if result["verdict"] == "fails" else ""
    both = "; ".join(filter(None, (broke, found))), "; ".join(filter(None, (late, left)))
    return row | {"verdict": result["verdict"], "problem": both[0], "missing": both[1]}
