"""Runs kernels of other libraries through `check_op`, interpreted on this CPU, and compares each verdict with float64.

    REFLLM_CHECKOUTS=~/checkouts python tests/released/try_released.py docs/findings.json docs/findings.md

No test: it needs libraries that no environment here has. `pip install --no-deps liger-kernel flash-linear-attention`
has two of them; the others are checkouts in one folder, under the names of their repositories. What cannot be imported
is said and left out. The JSON file is written after every kernel; its rows replace those of the page's table.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import wrapping
from in_float64 import far_off, right, right_gradients
from wrapping import Kernel

from refllm import kernels
from refllm.kernels.mutants.right_gradients import by_autograd
from refllm.opcheck.api import check_op
from refllm.opcheck.offers import find_offers
from refllm.storage import output_file
from refllm.strategies import corners, families_of, level_of
from refllm.strategies.call import Call

FOLDER = Path(__file__).parent
MODULES = [path.stem for path in sorted(FOLDER.glob("of_*.py"))]
HEADING = "## Every kernel that was tried"
SECONDS = 120.0
MOST_ULP = 4.0
"""What honest roundings may add up to, in units in the last place of a row's largest element."""
_MOST_ELEMENTS = 1 << 14


@dataclass(frozen=True)
class Outcome:
    """A row of the table. truth: "true" or "not shown"; proof: in words, what float64 says."""

    library: str
    version: str
    kernel: str
    operator: str
    lines: int
    options: str
    verdict: str
    finding: str
    truth: str
    proof: str
    seconds: float


def tried(kernel: Kernel, version: str) -> Outcome:
    """One kernel. The verdict is of the fixed calls, and of some drawn ones."""
    begin = time.monotonic()
    report = check_op(
        kernel.operator, kernel.function, dtype=kernel.dtype, max_examples=10, seconds=SECONDS, **kernel.options
    )
    seconds = time.monotonic() - begin
    if report.finding is None:
        beside = (f"{one.level}: {one.finding.property}, {one.finding.call.kind}" for one in report.findings)
        finding, (truth, proof) = "; ".join((report.rounds or "once, at the end", *beside)), _agrees(kernel)
    else:
        finding = f"{report.property} at {report.finding.call}: {report.finding.text}"
        truth, proof = _differs(kernel, report.finding.call, report.property)
        if truth != "true":  # the smallest one is the least of what is wrong
            truth, proof = _differs(kernel, report.first.call, report.property)
    words = (
        f"--{name} {one}"
        for name, value in kernel.options.items()
        if name != "backward"
        for one in ((value,) if isinstance(value, str) else value)
    )
    return Outcome(
        kernel.library, version, kernel.kernel, _operator(kernel), kernel.lines, " ".join((kernel.dtype, *words)),
        report.verdict, finding, truth, proof, round(seconds, 1),
    )  # fmt: skip


def _run(kernel: Kernel, call: Call) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what it returns, what is right) of a call."""
    arguments, keywords = call.tensors()
    if _of_gradients(kernel):
        wanted = right_gradients(call.operator, *call.tensors())
        with kernels.interpreted():
            got = by_autograd(kernel.function, call.operator)(*arguments, **keywords)
        got = tuple(x for x in (got if isinstance(got, tuple) else (got,)) if x is not None)
        return list(zip(got, wanted, strict=True))
    wanted = right(kernel.operator, *call.tensors())
    with torch.no_grad(), kernels.interpreted():
        got = kernel.function(*arguments, **keywords)
    return list(zip(got if isinstance(got, tuple) else (got,), wanted, strict=False))


def _of_gradients(kernel: Kernel) -> bool:
    return bool(kernel.options.get("backward"))


def _operator(kernel: Kernel) -> str:
    """The operator whose contract is asked."""
    return f"{kernel.operator}_backward" if _of_gradients(kernel) else kernel.operator


def _worst(kernel: Kernel, call: Call) -> tuple[float, str]:
    dtype = getattr(torch, kernel.dtype)
    pairs = _run(kernel, call)
    found = [(*far_off(got, wanted, dtype), got, wanted) for got, wanted in pairs]
    off, place, got, wanted = max(found, key=lambda one: one[0])
    values = f"{float(got[place]):.6g} where {float(wanted[place]):.6g} is right" if got.numel() else "no elements"
    return off, values


def _agrees(kernel: Kernel) -> tuple[str, str]:
    """Of a kernel that holds: how far it is off on the smaller fixed calls that it is asked, but for those where large
    numbers cancel, of which any float32 arithmetic makes an error."""
    given = kernel.options.get
    offers = find_offers(_operator(kernel), given("without", ()), given("sizes", ()), given("convention", ""))
    level = kernel.options.get("level", "contract")
    asked = [call for call in offers.of(corners(_operator(kernel), kernel.dtype)) if _is_asked(call, level)]
    offs = [_worst(kernel, call)[0] for call in asked]
    return ("true" if max(offs) <= MOST_ULP else "not shown"), f"at most {max(offs):.2g} ulp off in {len(offs)} calls"


def _is_asked(call: Call, level: str) -> bool:
    small = all(x.numel() <= _MOST_ELEMENTS for x in call.tensors()[0] if isinstance(x, torch.Tensor))
    return small and level_of(call) in ("basic", level) and not {"extreme_values", "large_means"} & {*families_of(call)}


def _differs(kernel: Kernel, call: Call, property: str) -> tuple[str, str]:
    """Of a kernel that fails: what it does on the smallest call that was found."""
    try:
        off, values = _worst(kernel, call)
    except Exception as error:
        return "true", f"raises {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    if off > MOST_ULP:
        return "true", f"{off:.3g} ulp off: {values}" if off < 1e9 else values
    shown_by_itself = ("result", "purity", "second backward")
    return ("true" if property in shown_by_itself else "not shown"), f"{off:.2g} ulp off: {values}"


def table(outcomes: list[dict[str, Any]]) -> str:
    """The rows of the page."""
    head = ("library", "kernel", "operator", "wrapper", "options", "verdict", "what is said", "true?", "in float64")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for one in outcomes:
        cells = [
            f"{one['library']} {one['version']}", one["kernel"], one["operator"], f"{one['lines']} lines",
            one["options"], one["verdict"], one["finding"], one["truth"], one["proof"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--backward", action="store_true", help="gradients alone")
    parser.add_argument("--only", action="append", default=[], help="a module (of_liger), or a kernel (of_liger:rope)")
    given = parser.parse_args()
    for name in MODULES:
        only = [one for one in given.only if one.partition(":")[0] == name]
        if only or not given.only:  # each in a process of its own: some change Triton when they are imported
            call = f"try_module({name!r}, {only}, {str(given.json)!r}, {given.backward})"
            code = f"import try_released; try_released.{call}"
            subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(FOLDER)}, check=False)
    found = json.loads(given.json.read_text())
    before, _, after = given.page.read_text().partition(HEADING)
    _, more, rest = after.partition("\n## ")
    output_file.replace(given.page, f"{before}{HEADING}\n\n{table(found)}\n{more}{rest}")
    return 0


def try_module(name: str, only: list[str], file: str, backward: bool = False) -> None:
    """Every kernel of one module, or some of them; the file is written after each. backward: gradients alone."""
    wrapping.answer_for_a_gpu()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
        return
    for kernel in wrapping.KERNELS:
        if backward and not _of_gradients(kernel):
            continue
        if not only or name in only or f"{name}:{kernel.function.__name__}" in only:
            one = asdict(tried(kernel, module.VERSION))
            print(*one.values(), sep=" | ", flush=True)
            found = json.loads(Path(file).read_text()) if Path(file).is_file() else []
            same = one["library"], one["kernel"], one["operator"]
            found = [o for o in found if (o["library"], o["kernel"], o["operator"]) != same] + [one]
            found.sort(key=lambda o: (o["library"].lower(), o["operator"], o["kernel"]))
            output_file.replace(file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
