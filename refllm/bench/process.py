"""A benchmark in a process of its own, as `make gpu` runs it: what one breaks on the GPU, the next does not see.

    python -m refllm.bench.process kernels --device cuda --minutes 2 --json F [--plots DIR] [--settings JSON]

Needs Torch, Triton and NumPy, and nothing for a terminal. Exit codes as everywhere: 0, 1 a finding, 2 wrong use.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from refllm.errors import InputError, MissingExtraError, RefllmError
from refllm.json_text import json_text

BENCHES = ("kernels", "attention", "decode", "prefill")


def run(name: str, device: str, minutes: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a benchmark; settings: of `kernels.Settings` or `models.Settings`, lists for tuples."""
    from refllm.bench import kernels, models

    work: Any = {
        "kernels": (kernels.Settings, kernels.bench_kernels),
        "attention": (kernels.Settings, kernels.bench_attention),
        "decode": (models.Settings, models.bench_decode),
        "prefill": (models.Settings, models.bench_prefill),
    }
    if name not in work:
        raise InputError(f"benchmark {name} is not known: use {', '.join(BENCHES)}")
    make, bench = work[name]
    given = {key: _tuples(value) for key, value in settings.items()}
    result = bench(make(device=device, minutes=minutes, **given))
    return result | {"command": f"refllm bench {name} --device {device} --minutes {minutes:.2g}"}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def main(arguments: list[str] | None = None) -> int:
    """Runs it, writes the file and the pictures, prints one line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m refllm.bench.process", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    given = parser.parse_args(arguments)
    try:
        result = run(given.name, given.device, given.minutes, given.settings)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json_text(result) + "\n", encoding="utf-8")
        pictures = _pictures(json.loads(json_text(result)), given.plots, given.json.stem)
    except RefllmError as error:
        print(f"refllm: {error}", file=sys.stderr)
        return 2
    findings = [row for row in result["rows"] if row["finding"]]
    timed = sum(row["time"] is not None for row in result["rows"])
    print(f"{given.name}: {result['verdict']}, {timed} of {len(result['rows'])} timed, {result['seconds']} s{pictures}")
    for row in findings:
        print(f"  {row['what']}, {row['panel']}, {row['group']}, {row['form']}: {row['finding']}")
    return 1 if findings else 0


def _pictures(result: dict[str, Any], folder: Path | None, stem: str) -> str:
    """Draws them where matplotlib is; what came of it, for the line that is printed."""
    if folder is None:
        return ""
    from refllm.bench.plots import write_plots

    try:
        return f", {len(write_plots(result, folder, stem))} pictures"
    except MissingExtraError as error:
        return f", no pictures ({error})"


if __name__ == "__main__":
    sys.exit(main())
