"""What `make gpu` runs, compiled: every operator against its definition, the fast models, the kernel tests, and then
the benchmarks; one JSON file out, and one per benchmark in the folder benchmarks beside it.

    python -m refllm.bench.gpu [-o FILE] [--device cuda|cpu] [--no-tests] [--benchmarks kernels,attention | none]
                                 [--only TEXT]

The file holds
    machine: GPU, driver, versions, date, command
    operators: one row per output of every call of `refllm.kernels.calls`: layer, dtype, form (triton or plain), ratio
        of its error to the contract's in the same precision, limit, problem ("" if it holds)
    checks: one row per process that compared with the reference: seconds, results, problem if it broke
    models: one row per checkpoint, backend and dtype: the verdict of the check, and whether decoding on a graph gives
        the tokens of decoding without; embedded checkpoints and random ones of real layer shapes
    tests: what pytest counted over the kernel tests, and the failures with their messages
    benchmarks: one row per benchmark: its file (which docs/benchmarks can keep as it is), verdict and problem
    missing: what was not run to its end, by name
    verdict: "fails" if there is a finding; else "incomplete" if something is missing; else "holds"

It ends inside `TOTAL_SECONDS`, and is of use whenever somebody ends it: the file is written at the start, with
everything missing, and again after every part; beside it every check leaves a line per result, and every benchmark a
file that is replaced after each call.

    0 s     checks, side by side, each a process: the operators of every layer (5), the models (1), the tests (8), and 5
            that compile what the benchmarks will time. They compute on the CPU for the most part: the definitions in
            float64, and the compilers. All are ended at `CHECK_SECONDS`.
    170 s   benchmarks, one after the other, because two would disturb each other; each gets its share of what is left
            (at least 370 s: kernels 101, attention 84, decode 118, prefill 67) and hands on what it does not use.
    540 s   the end. Ten minutes leave 60 s for starting, installing and a slow machine.

Exit codes: 0 it holds, 1 a finding, or something is missing, 2 there is no GPU or the tests are not there.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import refllm
from refllm import kernels
from refllm.accuracy.verdicts import SCHEMA, verdict
from refllm.apart import SECONDS_TO_TIDY_UP, Batch
from refllm.bench.gpu_benchmarks import BENCHMARKS, run_benchmarks, start_compilers
from refllm.bench.gpu_checks import layers, read_rows
from refllm.errors import InputError, RefllmError
from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine

PROCESSES = 8
CHECK_SECONDS = 170.0
TOTAL_SECONDS = 540.0
"""Seconds from the start after which all checks have ended, and after which everything has."""
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2")
"""The threads of each check: they share the cores."""
PARTS = ("operators", "models", "tests")


def machine(device: str) -> dict[str, Any]:
    """Where this run took place."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "capability": list(torch.cuda.get_device_capability()) if device == "cuda" else None,
        "device": device,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": np.__version__,
        "refllm": refllm.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m refllm.bench.gpu", *sys.argv[1:]]),
    }


def start_checks(device: str, output: Path, only: str, seconds: float) -> dict[str, tuple[Batch, Path]]:
    """The checks of operators and models, running: name -> process and the file that it writes."""
    found = {f"operators, {name}": ("operators", name) for name in layers(device, only)}
    found["models"] = ("models", only)
    started = {}
    for name, (what, part) in found.items():
        file = output.with_name(f"{output.stem}-{'-'.join(name.replace(',', '').split())}.jsonl")
        file.unlink(missing_ok=True)
        arguments = ["-m", "refllm.bench.gpu_checks", what, "--rows", str(file), "--device", device, "--only", part]
        started[name] = Batch(arguments, seconds, THREADS), file
    return started


def end_checks(started: dict[str, tuple[Batch, Path]], result: dict[str, Any]) -> None:
    """Waits for them, and puts their rows, and a row on each of them, into `result`."""
    for name, (process, file) in started.items():
        process.wait()
        rows, done = read_rows(file)
        result[name.split(",")[0]] += rows
        why = "its time was over" if process.code is None else f"exit code {process.code}: {process.last_line}"
        row = {"check": name, "seconds": round(process.seconds, 1), "results": len(rows)}
        broke = "" if done or process.code is None else f"ended early, {why}"
        result["checks"].append(row | {"problem": broke, "missing": "" if done else f"what comes behind ({why})"})


def start_tests(device: str, folder: Path, rows: Path, seconds: float) -> Batch:
    """The kernel tests in `folder` on `device`, running; `rows` receives a line per result. InputError if none."""
    files = sorted(str(path) for name in ("test_operators.py", "test_kernel_*.py") for path in folder.glob(name))
    if not files:
        raise InputError(
            f"{folder}: no test_kernel_*.py here; run this from the root of the project, or with --no-tests"
        )
    rows.unlink(missing_ok=True)
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    arguments += ["-p", "refllm.bench.pytest_rows", "--rows", str(rows)]
    if find_spec("xdist") is not None:  # most of the time is compilation, on the CPU
        arguments += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = {**THREADS, "REFLLM_TEST_DEVICE": device, "HYPOTHESIS_PROFILE": "ci"}
    return Batch([*arguments, *files], seconds - SECONDS_TO_TIDY_UP, environment)


def end_tests(process: Batch, file: Path) -> dict[str, Any]:
    """What the tests found as far as they got. problem: "" if nothing failed. missing: "" if all tests ran."""
    process.wait()
    rows, done = read_rows(file)
    found: dict[str, Any] = {"exit": process.code, "problem": "", "missing": "", **_counted(rows)}
    if process.code is None:
        found["missing"] = f"ended after {process.seconds:.0f} s"
    if found["failures"] or (done and process.code != 0):
        found["problem"] = "tests failed"
    elif not done and process.code is not None:
        found["problem"] = process.output[-2000:] + process.errors[-2000:] or "no report"
    return found


def _counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of tests come to: how many of each outcome, seconds in all, and what failed."""
    outcomes = [row["outcome"] for row in rows]
    counts = {"tests": len({row["test"] for row in rows}), "failures": outcomes.count("failed")}
    counts |= {"errors": outcomes.count("error"), "skipped": outcomes.count("skipped")}
    failed = [row for row in rows if row["outcome"] in ("failed", "error")]
    failures = [{"test": row["test"], "message": row["message"]} for row in failed]
    return {"counts": counts, "seconds": round(sum(row["seconds"] for row in rows), 1), "failures": failures}


def run(
    device: str, tests: Path | None, output: Path, benchmarks: tuple[str, ...] = (), only: str = ""
) -> dict[str, Any]:
    """Everything, as the dictionary that becomes the JSON file `output`; files of other kinds go beside it.

    tests: their folder, None for none. only: as in `refllm.bench.gpu_checks`.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("make gpu needs a GPU, and torch sees none here; `make test` runs the kernels without one")
    start, rows = time.perf_counter(), output.with_name(f"{output.stem}-tests.jsonl")
    with StatusLine(sys.stderr) as step:
        result: dict[str, Any] = {"schema": SCHEMA, "verdict": "", "machine": machine(device), "seconds": 0.0}
        result |= {"checks": [], "operators": [], "models": [], "tests": None, "benchmarks": []}
        _write(result, start, output, [*PARTS, *benchmarks])
        step(f"operators, models and kernel tests, at most {CHECK_SECONDS:.0f} s")
        testing = None if tests is None else start_tests(device, tests, rows, CHECK_SECONDS)
        checks = start_checks(device, output, only, CHECK_SECONDS)
        compilers = start_compilers(benchmarks, device, CHECK_SECONDS)
        end_checks(checks, result)
        _write(result, start, output, [*PARTS[2:], *benchmarks])
        result["tests"] = None if testing is None else end_tests(testing, rows)
        for process in compilers:
            process.wait()
        _write(result, start, output, benchmarks)
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        name = result["machine"]["gpu"] or "cpu"
        for row in run_benchmarks(benchmarks, device, name, output.parent / "benchmarks", left, step):
            result["benchmarks"].append(row)
            _write(result, start, output, benchmarks[len(result["benchmarks"]) :])
    return result


def _write(result: dict[str, Any], start: float, output: Path, to_come: Sequence[str]) -> None:
    """Brings verdict, what is missing and seconds up to date, and writes the file. to_come: parts that did not run."""
    parts = [*result["checks"], *([result["tests"]] if result["tests"] else []), *result["benchmarks"]]
    missing = [f"{_name(row)}: {row['missing']}" for row in parts if row["missing"]]
    missing += [f"{name}: not run yet" for name in to_come]
    found = any(row["problem"] for row in [*result["operators"], *result["models"], *parts])
    result |= {"verdict": verdict(found, missing), "missing": missing, "seconds": round(time.perf_counter() - start, 1)}
    output_file.replace(output, json.dumps(result, indent=1) + "\n")


def _name(part: dict[str, Any]) -> str:
    return str(part.get("check") or part.get("benchmark") or "tests")


def summary(result: dict[str, Any]) -> str:
    """A line per operator and form, then the findings."""
    lines = []
    for form in ("triton", "plain"):
        for operator in kernels.OPERATORS:
            rows = [r for r in result["operators"] if (r["operator"], r["form"]) == (operator, form)]
            worst = max((r["ratio"] or 0.0 for r in rows), default=0.0)
            held = sum(not r["problem"] for r in rows)
            lines.append(
                f"{form:7}{operator:22}{held:4} of {len(rows):3} hold   worst error {worst:.2f} x the contract's"
            )
    for row in result["operators"]:
        if row["problem"]:
            lines.append(f"{row['layer']}, {row['form']} {row['operator']} {row['call']}: {row['problem']}")
    for row in result["models"]:
        name = f"{row['checkpoint']}, {row['backend']}, {row['dtype']}, {row['what']}"
        lines.append(f"{name}: {row['problem'] or 'holds'}")
    tested = result["tests"]
    if tested is not None:
        lines.append(f"tests: {tested.get('counts', {})} {tested['problem']}".rstrip())
        lines += [f"  {failure['test']}: {failure['message'][:200]}" for failure in tested["failures"]]
    for row in result["benchmarks"]:
        lines += row["said"].splitlines()
    lines += [f"{_name(row)}: {row['problem']}" for row in [*result["checks"], *result["benchmarks"]] if row["problem"]]
    lines += [f"missing: {name if len(name) < 200 else name[:200] + ' ...'}" for name in result["missing"]]
    return "\n".join([*lines, f"{result['verdict']}, {result['seconds']} s"])


def main(arguments: list[str] | None = None) -> int:
    """Runs it, writes the file, prints the summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m refllm.bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/gpu.json"), help="the JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted, reduced shapes")
    parser.add_argument("--no-tests", action="store_true", help="only the operators, not the kernel tests")
    parser.add_argument("--benchmarks", help=f"of {','.join(BENCHMARKS)}, or none; default: all on cuda, none on cpu")
    parser.add_argument("--only", default="", help="layers and checkpoints to check: parts of names, with commas")
    options = parser.parse_args(arguments)
    output: Path = options.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tests = None if options.no_tests else Path("tests/kernels")
        benchmarks = _benchmarks(options.benchmarks, options.device)
        result = run(options.device, tests, output.absolute(), benchmarks, options.only)
    except (RefllmError, OSError) as error:
        print(f"refllm: {error}", file=sys.stderr)
        return 2
    print(summary(result))
    print(output)
    return 0 if result["verdict"] == "holds" else 1


def _benchmarks(given: str | None, device: str) -> tuple[str, ...]:
    """The benchmarks asked for; else all on a GPU and none on a CPU. Raises InputError for an unknown one."""
    if given is None:
        return tuple(BENCHMARKS) if device == "cuda" else ()
    names = tuple(given.split(",")) if given != "none" else ()
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"--benchmarks {name} is not known: use {', '.join(BENCHMARKS)}, or none")
    return names


if __name__ == "__main__":
    sys.exit(main())
