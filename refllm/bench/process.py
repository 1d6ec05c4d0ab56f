"""A benchmark in a process of its own, as `make gpu` runs it: what one breaks on the GPU, the next does not see.

    python -m refllm.bench.process kernels --device cuda --minutes 2 --json F [--plots DIR] [--settings JSON]
    python -m refllm.bench.process kernels --device cuda --compile-ahead 0/4

The file is replaced after every call that was timed. Whoever ends the process early has all rows up to then, and names
of what is missing in `left_out`; a file that misses something has the verdict "incomplete". --settings: an object, or a
list of them, one after the other into one file. --compile-ahead: times nothing, see `kernels.compile_ahead`.

Needs Torch, Triton and NumPy, and nothing for a terminal. Exit codes as everywhere: 0, 1 a finding, 2 wrong use.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from refllm.accuracy.verdicts import verdict
from refllm.bench.timer import Deadline
from refllm.errors import InputError, MissingExtraError, RefllmError
from refllm.storage import output_file
from refllm.storage.json_text import json_text

BENCHES = ("kernels", "attention", "decode", "prefill")
Result = dict[str, Any]


def run(name: str, device: str, minutes: float, passes: list[dict[str, Any]], file: Path) -> Result:
    """The result of a benchmark, in `file` too. passes: fields of its Settings (lists for tuples), in this order."""
    from refllm.bench import kernels, models

    work: Any = {
        "kernels": (kernels.Settings, kernels.bench_kernels),
        "attention": (kernels.Settings, kernels.bench_attention),
        "decode": (models.Settings, models.bench_decode),
        "prefill": (models.Settings, models.bench_prefill),
    }
    make, bench = work[name]
    deadline, done = Deadline(minutes), list[Result]()
    command = f"refllm bench {name} --device {device} --minutes {minutes:.2g}"

    def write(result: Result, later: list[dict[str, Any]]) -> Result:
        whole = merge([*done, result], later) | {"command": command}
        output_file.replace(file, json_text(whole) + "\n")
        return whole

    for number, given in enumerate(passes):
        settings = make(
            **{key: _tuples(value) for key, value in given.items()}, device=device, minutes=deadline.minutes
        )
        later = passes[number + 1 :]
        result = bench(settings, save=lambda partial, later=later: write(partial, later))
        whole = write(result, later)
        done.append(result)
    return whole


def merge(results: list[Result], later: list[dict[str, Any]]) -> Result:
    """Several results of one benchmark as one; later: settings of what has not begun. The settings are the first's."""
    rows = [row for result in results for row in result["rows"]]
    left_out = [name for result in results for name in result["left_out"]] + [json.dumps(given) for given in later]
    found = verdict(any(row["finding"] for row in rows), missing=left_out)
    seconds = round(sum(result["seconds"] for result in results), 1)
    return results[0] | {"verdict": found, "seconds": seconds, "rows": rows, "left_out": left_out}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def compile_ahead(name: str, device: str, part: str) -> int:
    """`kernels.compile_ahead` for part "I/N" of a benchmark of kernels; how many calls ran."""
    from refllm.bench import kernels

    share, of = (int(number) for number in part.split("/"))
    settings = kernels.Settings(device=device)
    jobs = {"kernels": kernels.kernel_jobs, "attention": kernels.head_jobs}[name](settings)
    return kernels.compile_ahead(settings, jobs, share, of)


def main(arguments: list[str] | None = None) -> int:
    """Runs it, writes the file and the pictures, prints one line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m refllm.bench.process", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--compile-ahead", metavar="I/N")
    given = parser.parse_args(arguments)
    try:
        if given.compile_ahead:
            print(f"{given.name}: {compile_ahead(given.name, given.device, given.compile_ahead)} calls compiled")
            return 0
        if given.json is None:
            raise InputError("--json FILE is missing: the result has to go somewhere")
        given.json.parent.mkdir(parents=True, exist_ok=True)
        passes = given.settings if isinstance(given.settings, list) else [given.settings]
        result = run(given.name, given.device, given.minutes, passes, given.json)
        pictures = _pictures(json.loads(json_text(result)), given.plots, given.json.stem)
    except RefllmError as error:
        print(f"refllm: {error}", file=sys.stderr)
        return 2
    return _say(given.name, result, pictures)


def _say(name: str, result: Result, pictures: str) -> int:
    findings = [row for row in result["rows"] if row["finding"]]
    timed, missing = sum(row["time"] is not None for row in result["rows"]), result["left_out"]
    print(f"{name}: {result['verdict']}, {timed} of {len(result['rows'])} timed, {result['seconds']} s{pictures}")
    for row in findings:
        print(f"  {row['what']}, {row['panel']}, {row['group']}, {row['form']}: {row['finding']}")
    if missing:
        print(f"  left out: {len(missing)} calls, from {missing[0]}")
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
