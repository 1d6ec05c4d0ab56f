"""The checks of `make gpu` that compare with the reference, as processes of their own; a line of JSON per result.

    python -m refllm.bench.gpu_checks operators|models --rows FILE [--device cuda|cpu] [--only TEXT]

A process that breaks the GPU, hangs or is ended takes no other with it, and every line up to then stays. The last line
is {"done": true}: a file without it is that of a check that did not get to its end. --only: parts
of the names of the layers or checkpoints to run, with commas between them.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refllm import kernels
from refllm.bench.end_to_end import check_models
from refllm.kernels.calls import LAYERS, REDUCED, Call, Layer, calls
from refllm.kernels.verify import Contract

DTYPES = {"cuda": ("float32", "bfloat16", "float16"), "cpu": ("float32", "bfloat16")}
MODEL_DTYPES = ("float32", "bfloat16")
TOKENS = {"cuda": 129, "cpu": 5}
"""Positions per call: over one tile of 128 by one; few where the interpreter runs."""
MODEL_TOKENS = {"cuda": 96, "cpu": 12}

Row = dict[str, Any]


def layers(device: str, only: str = "") -> dict[str, Layer]:
    """The layers whose operators are checked, by name."""
    known = LAYERS if device == "cuda" else REDUCED
    return {layer.name: layer for layer in known if any(part in layer.name for part in only.split(","))}


def check_operators(device: str, only: str = "") -> Iterator[Row]:
    """A row per output of every call, for the Triton and the plain form."""
    interpreter = contextlib.nullcontext if device == "cuda" else kernels.interpreted
    for layer in layers(device, only).values():
        for dtype in DTYPES[device]:
            for call in calls(layer, dtype, device, tokens=TOKENS[device]):
                contract, where = Contract(call.operator, call.arguments, call.keywords), (layer.name, dtype)
                for form, namespace in (("triton", kernels), ("plain", kernels.plain)):
                    with interpreter():
                        yield from check_call(call, contract, form, namespace, where)


def check_call(call: Call, contract: Contract, form: str, namespace: Any, where: tuple[str, str]) -> Iterator[Row]:
    """A row per output of one call. namespace: has the operator. where: layer and dtype."""
    layer, dtype = where
    row = {"layer": layer, "dtype": dtype, "operator": call.operator, "call": call.name, "form": form}
    try:
        verdicts = contract.judge(getattr(namespace, call.operator)(*call.arguments, **call.keywords))
    except Exception as error:  # whatever a kernel raises is this run's finding, and the other calls still count
        yield {**row, "output": None, "ratio": None, "limit": None, "problem": f"{type(error).__name__}: {error}"}
        return
    for verdict in verdicts:
        ratio = float(verdict.ratio) if np.isfinite(verdict.ratio) else None
        yield {**row, "output": verdict.output, "ratio": ratio, "limit": verdict.limit, "problem": verdict.problem}


def _check_models(device: str, only: str) -> Iterator[Row]:
    for part in only.split(","):
        yield from check_models(
            device, MODEL_DTYPES, lambda _: None, real=device == "cuda", tokens=MODEL_TOKENS[device], only=part
        )


def read_rows(file: Path) -> tuple[list[Row], bool]:
    """The rows of a check as far as it got, and whether that is its end."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line, of a process that was killed
            rows.append(json.loads(line))
    done = {"done": True} in rows
    return [row for row in rows if row != {"done": True}], done


def main(arguments: list[str] | None = None) -> int:
    """Writes a line as soon as there is one; exit code 0, whatever was found."""
    parser = argparse.ArgumentParser(prog="python -m refllm.bench.gpu_checks", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("operators", "models"))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="")
    given = parser.parse_args(arguments)
    if given.what == "operators":
        rows = check_operators(given.device, given.only)
    else:
        rows = _check_models(given.device, given.only)
    with given.rows.open("w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
        print(json.dumps({"done": True}), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
