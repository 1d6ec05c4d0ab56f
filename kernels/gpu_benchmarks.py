"""The benchmarks of `make gpu`: each in a process of its own and bounded in time; one JSON file each.

Files are named as docs/benchmarks keeps them: kernels-nvidia-h200.json, and pictures beside them.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Name -> (share of the time, seconds that what it has begun may take after its time is over).
BENCHMARKS = {"kernels": (3, 12), "attention": (2, 12), "decode": (3, 30), "prefill": (2, 30)}


def slug(machine_name: str) -> str:
    """ "NVIDIA H200" as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")


def run_benchmarks(
    names: tuple[str, ...],
    device: str,
    machine_name: str,
    folder: Path,
    seconds: float,
    step: Callable[[str], None],
    settings: dict[str, dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per benchmark: its file, verdict and what it said. All of them together end inside `seconds`.

    settings: name -> fields of the benchmark's Settings, for a reduced run.
    """
    end = time.monotonic() + seconds
    for index, name in enumerate(names):
        left = end - time.monotonic()
        share, grace = BENCHMARKS[name]
        slot = left * share / sum(BENCHMARKS[other][0] for other in names[index:])
        step(f"benchmark: {name}, {slot:.0f} s")
        file = folder / f"{name}-{slug(machine_name)}.json"
        row = {"benchmark": name, "file": str(file), "seconds": 0.0, "verdict": None, "said": "", "problem": ""}
        if slot < grace:
            yield row | {"problem": f"not run: {slot:.0f} s are left for it"}
            continue
        start = time.monotonic()
        row |= _run(name, device, file, (slot - grace) / 60, min(slot + grace, left), (settings or {}).get(name, {}))
        yield row | {"seconds": round(time.monotonic() - start, 1)}


def _run(
    name: str, device: str, file: Path, minutes: float, timeout: float, settings: dict[str, Any]
) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "refllm.bench.process", name, "--device", device]
    command += ["--minutes", f"{minutes:.3f}", "--json", str(file), "--plots", str(file.parent)]
    command += ["--settings", json.dumps(settings)]
    file.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"not done after {timeout:.0f} s"}
    said = done.stdout.strip()
    if not file.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"said": said, "problem": f"ended with {done.returncode}: {last}"}
    verdict = json.loads(file.read_text())["verdict"]
    return {"said": said, "verdict": verdict, "problem": "" if verdict == "holds" else "a finding"}
