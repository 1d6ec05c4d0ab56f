"""What `make gpu` runs, compiled: every operator against its definition, the fast models, the kernel tests, and then
the benchmarks; one JSON file out, and one per benchmark in the folder benchmarks beside it.

    python -m refllm.kernels.gpu [-o FILE] [--device cuda|cpu] [--no-tests] [--benchmarks kernels,attention | none]

The file holds
    machine: GPU, driver, versions, date, command
    operators: one row per output of every call of `refllm.kernels.cases`: layer, dtype, form (triton or plain), ratio
        of its error to the contract's in the same precision, limit, problem ("" if it holds)
    models: one row per checkpoint, backend and dtype: the verdict of the check, and whether decoding on a graph gives
        the tokens of decoding without; embedded checkpoints and random ones of real layer shapes
    tests: what pytest counted over the kernel tests, and the failures with their messages
    benchmarks: one row per benchmark: its file (which docs/benchmarks can keep as it is), verdict and problem
    verdict: "holds" or "fails"

Exit codes: 0 it holds, 1 a finding, 2 there is no GPU or the tests are not there.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

import refllm
from refllm import kernels
from refllm.errors import InputError, RefllmError
from refllm.kernels.cases import LAYERS, REDUCED, Case, cases
from refllm.kernels.end_to_end import check_models
from refllm.kernels.gpu_benchmarks import BENCHMARKS, run_benchmarks
from refllm.kernels.verify import Contract
from refllm.status_line import StatusLine

DTYPES = ("float32", "bfloat16", "float16")
TOKENS = {"cuda": 129, "cpu": 5}
"""Positions per call: over one tile of 128 by one; few where the interpreter runs."""
MODEL_TOKENS = {"cuda": 96, "cpu": 12}
PROCESSES = 8
TEST_SECONDS = 240
TOTAL_SECONDS = 570
"""Limits for the kernel tests, and for everything: the benchmarks get what is left, so that it ends in ten minutes."""


def machine(device: str) -> dict[str, Any]:
    """Where this run took place."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "capability": list(torch.cuda.get_device_capability()) if device == "cuda" else None,
        "device": device,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "refllm": refllm.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m refllm.kernels.gpu", *sys.argv[1:]]),
    }


def check_operators(device: str, step: StatusLine) -> Iterator[dict[str, Any]]:
    """A row per output of every call, for the Triton and the plain form."""
    interpreter = contextlib.nullcontext if device == "cuda" else kernels.interpreted
    for layer in LAYERS if device == "cuda" else REDUCED:
        for dtype in DTYPES:
            for case in cases(layer, dtype, device, tokens=TOKENS[device]):
                step(f"{layer.name}, {dtype}: {case.operator} {case.name}")
                contract, where = Contract(case.operator, case.arguments, case.keywords), (layer.name, dtype)
                for form, namespace in (("triton", kernels), ("plain", kernels.plain)):
                    with interpreter():
                        yield from _check_call(case, contract, form, namespace, where)


def _check_call(
    case: Case, contract: Contract, form: str, namespace: Any, where: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    layer, dtype = where
    row = {"layer": layer, "dtype": dtype, "operator": case.operator, "case": case.name, "form": form}
    try:
        verdicts = contract.judge(getattr(namespace, case.operator)(*case.arguments, **case.keywords))
    except Exception as error:  # whatever a kernel raises is this run's finding, and the other calls still count
        yield {**row, "output": None, "ratio": None, "limit": None, "problem": f"{type(error).__name__}: {error}"}
        return
    for verdict in verdicts:
        ratio = float(verdict.ratio) if np.isfinite(verdict.ratio) else None
        yield {**row, "output": verdict.output, "ratio": ratio, "limit": verdict.limit, "problem": verdict.problem}


def run_tests(device: str, folder: Path, report: Path) -> dict[str, Any]:
    """The kernel tests in `folder` on `device`, in a process of their own; `report` receives pytest's XML."""
    files = sorted(str(path) for path in folder.glob("test_kernel_*.py"))
    if not files:
        raise InputError(
            f"{folder}: no test_kernel_*.py here; run this from the root of the project, or with --no-tests"
        )
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *files]
    if find_spec("xdist") is not None:  # most of the time is compilation, on the CPU
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = {**os.environ, "REFLLM_TEST_DEVICE": device, "HYPOTHESIS_PROFILE": "ci"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"exit": None, "problem": f"not done after {TEST_SECONDS} s", "failures": []}
    if not report.exists():
        return {"exit": done.returncode, "problem": done.stdout[-2000:] + done.stderr[-2000:], "failures": []}
    return {"exit": done.returncode, "problem": "" if done.returncode == 0 else "tests failed", **_counts(report)}


def _counts(report: Path) -> dict[str, Any]:
    suite = next(iter(xml.parse(report).getroot().iter("testsuite")))
    failures = [
        {"test": f"{test.get('classname')}.{test.get('name')}", "message": (bad.get("message") or "")[:1000]}
        for test in suite.iter("testcase")
        for bad in [*test.iter("failure"), *test.iter("error")]
    ]
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    return {"counts": counts, "seconds": float(suite.get("time", "0")), "failures": failures}


def run(device: str, tests: Path | None, output: Path, benchmarks: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything, as the dictionary that becomes the JSON file `output`; files of other kinds go beside it.

    The file is there before the benchmarks begin: whoever ends them loses only them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("make gpu needs a GPU, and torch sees none here; `make test` runs the kernels without one")
    start = time.perf_counter()
    with StatusLine(sys.stderr) as step:
        result: dict[str, Any] = {"verdict": "", "machine": machine(device), "seconds": 0.0}
        result["operators"] = list(check_operators(device, step))
        result["models"] = list(
            check_models(device, DTYPES[:2], step, real=device == "cuda", tokens=MODEL_TOKENS[device])
        )
        step("the kernel tests")
        result["tests"] = run_tests(device, tests, output.with_suffix(".xml")) if tests is not None else None
        result["benchmarks"] = []
        _write(result, start, output)
        if device == "cuda":
            torch.cuda.empty_cache()  # the benchmarks are other processes
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        name = result["machine"]["gpu"] or "cpu"
        for row in run_benchmarks(benchmarks, device, name, output.parent / "benchmarks", left, step):
            result["benchmarks"].append(row)
            _write(result, start, output)
    return result


def _write(result: dict[str, Any], start: float, output: Path) -> None:
    """Brings verdict and seconds up to date, and writes the file."""
    rows = result["operators"] + result["models"] + result["benchmarks"]
    bad = any(row["problem"] for row in rows) or (result["tests"] is not None and result["tests"]["problem"])
    result |= {"verdict": "fails" if bad else "holds", "seconds": round(time.perf_counter() - start, 1)}
    output.write_text(json.dumps(result, indent=1) + "\n")


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
            lines.append(f"{row['layer']}, {row['form']} {row['operator']} {row['case']}: {row['problem']}")
    for row in result["models"]:
        name = f"{row['checkpoint']}, {row['backend']}, {row['dtype']}, {row['what']}"
        lines.append(f"{name}: {row['problem'] or 'holds'}")
    tested = result["tests"]
    if tested is not None:
        lines.append(f"tests: {tested.get('counts', {})} {tested['problem']}")
        lines += [f"  {failure['test']}: {failure['message'][:200]}" for failure in tested["failures"]]
    for row in result["benchmarks"]:
        lines += row["said"].splitlines()
        if row["problem"]:
            lines.append(f"{row['benchmark']}: {row['problem']}")
    return "\n".join([*lines, f"{result['verdict']}, {result['seconds']} s"])


def main(arguments: list[str] | None = None) -> int:
    """Runs it, writes the file, prints the summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m refllm.kernels.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/gpu.json"), help="the JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted, reduced shapes")
    parser.add_argument("--no-tests", action="store_true", help="only the operators, not the kernel tests")
    parser.add_argument("--benchmarks", help=f"of {','.join(BENCHMARKS)}, or none; default: all on cuda, none on cpu")
    options = parser.parse_args(arguments)
    output: Path = options.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tests = None if options.no_tests else Path("tests")
        result = run(options.device, tests, output.absolute(), _benchmarks(options.benchmarks, options.device))
    except (RefllmError, OSError) as error:
        print(f"refllm: {error}", file=sys.stderr)
        return 2
    print(summary(result))
    print(output)
    return 0 if result["verdict"] == "holds" else 1


def _benchmarks(given: str | None, device: str) -> tuple[str, ...]:
    """As asked for; else all on a GPU and none on a CPU. InputError for an unknown one."""
    if given is None:
        return tuple(BENCHMARKS) if device == "cuda" else ()
    names = tuple(given.split(",")) if given != "none" else ()
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"--benchmarks {name} is not known: use {', '.join(BENCHMARKS)}, or none")
    return names


if __name__ == "__main__":
    sys.exit(main())
