"""What the compiler makes of every kernel on the layers of published models: `refllm kernels check-aot --layers`.

Of every call, from one token to long prompts, the bytes and flops that it cannot do without, and from those a bound of
its time on an H200: the longer of moving the bytes at its published bandwidth and doing the flops at its published
rate. A bound is arithmetic on a data sheet; no time in these files was measured. And a row per kernel that the calls
start, on every target: registers, spills, shared memory, occupancy, instructions, and how many programs each size has.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import refllm
from refllm.accuracy.verdicts import verdict
from refllm.bench.workloads import Arguments, Job, operator_jobs, traffic_of
from refllm.errors import InputError
from refllm.kernels.aot.batch import Checked, Step, check, collect, cores
from refllm.kernels.aot.commands import read_targets
from refllm.kernels.aot.compile_code import Report
from refllm.kernels.aot.sources import Named
from refllm.kernels.calls import LAYERS
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target

FORMAT = 2
SIZES = ((1, 1), (64, 1), (1, 2048), (1, 32_768))
"""Sequences and tokens of each. One token attends to `CONTEXT` slots of the cache."""
CONTEXT = 4096
DTYPE = "bfloat16"
H200 = {"bytes_per_second": 4.8e12, "flops_per_second": 989e12}
"""Bandwidth and bfloat16 products without sparsity. Source: NVIDIA, H200 Tensor Core GPU data sheet (SXM)."""


@cache
def _jobs() -> tuple[Job, ...]:
    """A call for every size, layer and operator that its model runs."""
    return tuple(operator_jobs(LAYERS, SIZES, None, DTYPE, "meta", CONTEXT))


def launches(operator: str, call: Arguments, target: Target) -> list[Launch]:
    """The starts of kernels that a call on `target` consists of; its tensors may be without memory ("meta")."""
    from refllm.kernels.triton import plan

    planned = plan(operator, *call, target=target)[0]
    return [planned] if isinstance(planned, Launch) else list(planned)


@dataclass(frozen=True)
class LayerSource:
    """The launches of every call on one layer; can be sent to another process as it is. operator: "" for all."""

    layer: str
    operator: str = ""
    ours: bool = True

    @property
    def module(self) -> str:
        """What results are grouped by."""
        return self.layer

    def launches(self, target: Target) -> list[Named]:
        """Named `operator, size, number of the launch in the call`."""
        return [
            (f"{job.operator}, {job.group}, {index}", launch)
            for job in _jobs()
            if job.panel == self.layer and self.operator in ("", job.operator)
            for index, launch in enumerate(launches(job.operator, job.draw(0), target))
        ]


def check_layers(targets: str, jobs: int = 0, step: Step | None = None) -> tuple[dict[str, Any], str]:
    """The figures of every kernel on the layers of published models, and their page. InputError for unknown targets.

    targets: names, separated by commas; "" means all. jobs: processes; 0 means one per core.
    """
    started, gpus = time.perf_counter(), read_targets(targets)
    found = rows(gpus, jobs or cores(), step)
    kept = result(found, gpus, time.perf_counter() - started)
    return kept, page(kept)


def closing_line(kept: dict[str, Any]) -> str:
    """How many rows there are and how many have findings."""
    bad = sum(bool(row["findings"]) for row in kept["rows"])
    verdict = f"{bad} with findings" if bad else "all within the gates"
    return f"{len(kept['rows'])} kernels of {len(kept['calls'])} calls, {kept['seconds']:.0f} s: {verdict}"


def calls() -> list[dict[str, Any]]:
    """One entry per layer, operator and size: bytes, flops, and the bound that follows from them on an H200."""
    return [_call(job) for job in _jobs()]


def _call(job: Job) -> dict[str, Any]:
    cost = traffic_of(job, job.draw(0))
    by_memory, by_products = cost.bytes / H200["bytes_per_second"], cost.flops / H200["flops_per_second"]
    return {
        "layer": job.panel,
        "operator": job.operator,
        "size": job.group,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "flops_per_byte": round(cost.flops / cost.bytes, 3),
        "bound_seconds_h200": max(by_memory, by_products),
        "bound_by": "memory" if by_memory >= by_products else "products",
    }


def rows(
    targets: Sequence[Target], jobs: int = 1, step: Step | None = None, layers: Sequence[str] = (), operator: str = ""
) -> list[dict[str, Any]]:
    """A row per layer, operator, target and kernel; sizes for which the kernel is another have rows of their own.

    layers, operator: those alone. InputError for unknown names.
    """
    known = [layer.name for layer in LAYERS]
    if unknown := [name for name in layers if name not in known]:
        raise InputError(f"layer {unknown[0]!r} is not known; use one of {', '.join(known)}")
    sources: Any = [LayerSource(name, operator) for name in layers or known]
    found: list[dict[str, Any]] = []
    for checked in check(collect(sources, targets), jobs, step):
        row, size = _row(checked)
        same = [other for other in found if {**other, "programs": None} == row]
        if not same:
            found.append(row | {"programs": {}})
        (same or found[-1:])[0]["programs"][size] = checked.configuration.launch.grid[0]
    return found


def _row(checked: Checked) -> tuple[dict[str, Any], str]:
    """What is known of a kernel, and the size of the call that it was compiled for."""
    configuration, report = checked.configuration, checked.report
    operator, size, _ = configuration.name.split(", ")
    row: dict[str, Any] = {
        "layer": configuration.source.module,
        "operator": operator,
        "target": configuration.target.name,
        "kernel": configuration.kernel,
        "programs": None,
        "warps": configuration.launch.num_warps,
        "findings": [finding.sentence for finding in checked.findings],
        "narrow": configuration.launch.narrow,
    }
    return row | (_figures(report) if report else {}), size


def _figures(report: Report) -> dict[str, Any]:
    code = report.instructions
    return {
        "registers": report.resources.registers,
        "stack": report.resources.stack,
        "spill_bytes": report.resources.spill_bytes,
        "shared_bytes": report.shared,
        "programs_per_multiprocessor": report.occupancy.programs,
        "warps_per_multiprocessor": report.occupancy.warps,
        "limited_by": report.occupancy.limit,
        "instructions": code.count,
        "barriers": code.classes.get("BAR", 0) + code.classes.get("s_barrier", 0),
        "tensor_instructions": sum(code.tensor.values()),
        "async_copies": code.async_copies,
        "wide_share": round(code.wide_share, 3),
    }


def result(found: list[dict[str, Any]], targets: Sequence[Target], seconds: float) -> dict[str, Any]:
    """Everything that is kept: format, versions, command, date, settings, verdict, calls, rows."""
    return {
        "format": FORMAT,
        "benchmark": "ahead_of_time",
        "verdict": verdict(any(row["findings"] for row in found)),
        "versions": {"refllm": refllm.__version__, "triton": version("triton")},
        "command": " ".join(["refllm", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "settings": {
            "dtype": DTYPE,
            "targets": [target.name for target in targets],
            "context": CONTEXT,
            "h200": H200,
        },
        "calls": calls(),
        "rows": found,
    }


def read(file: Path) -> dict[str, Any]:
    """A file that `result` filled. Raises InputError if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["benchmark"] != "ahead_of_time":
            raise ValueError(f"format {found['format']} of {found['benchmark']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} holds no figures of check-aot --layers: {error}") from None
    return dict(found)


_CALL = ("operator", "size", "bytes", "flops", "flops/byte", "bound (H200)")
_KERNEL = (
    *("operator", "kernel", "programs", "warps", "regs", "spill", "shared", "at a time"),
    *("tensor", "async", "16-byte", "instr."),
)


def page(kept: dict[str, Any]) -> str:
    """The figures as Markdown: a table of the calls per layer, and one of the kernels per target and layer."""
    settings, versions, found = kept["settings"], kept["versions"], kept["rows"]
    text = [
        _INTRODUCTION.format(
            command=kept["command"], date=kept["date"], triton=versions["triton"], refllm=versions["refllm"],
            context=settings["context"], rows=len(found), bad=sum(bool(row["findings"]) for row in found),
        )
    ]  # fmt: skip
    layers = list(dict.fromkeys(row["layer"] for row in found))
    for layer in layers:
        of_layer = [_call_cells(call) for call in kept["calls"] if call["layer"] == layer]
        text += [f"\n## Calls of {layer}\n", *_table(_CALL, of_layer)]
    for target in settings["targets"]:
        for layer in layers:
            together = [row for row in found if (row["target"], row["layer"]) == (target, layer)]
            text += [f"\n## {target}, {layer}\n", *_table(_KERNEL, map(_cells, together)), *_remarks(together)]
    return "\n".join(text) + "\n"


def _table(columns: Sequence[str], lines: Iterable[list[str]]) -> Iterator[str]:
    """The first two columns hold words."""
    yield "| " + " | ".join(columns) + " |"
    yield "|---|---" + "|---:" * (len(columns) - 2) + "|"
    yield from ("| " + " | ".join(cells) + " |" for cells in lines)


def _call_cells(call: dict[str, Any]) -> list[str]:
    cells = [call["operator"], call["size"], _scaled(call["bytes"]), _scaled(call["flops"])]
    return cells + [f"{call['flops_per_byte']:.3g}", f"{1e6 * call['bound_seconds_h200']:.3g} us, {call['bound_by']}"]


def _cells(row: dict[str, Any]) -> list[str]:
    programs = "; ".join(f"{size.removesuffix(' tokens')}: {count:,}" for size, count in row["programs"].items())
    cells = [row["operator"], re.sub("_kernel$", "", row["kernel"]), programs, str(row["warps"])]
    if "registers" not in row:
        return cells + ["does not compile"] + [""] * (len(_KERNEL) - len(cells) - 1)
    cells += [str(row["registers"]), str(row["spill_bytes"]), f"{row['shared_bytes'] / 1024:.1f} K"]
    cells += [f"{row['programs_per_multiprocessor']} ({row['limited_by']})"]
    cells += [str(row[name] or "-") for name in ("tensor_instructions", "async_copies")]
    return cells + [f"{100 * row['wide_share']:.0f} %", f"{row['instructions']:,}"]


def _scaled(number: float) -> str:
    """A number with three digits and k, M, G or T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _remarks(together: list[dict[str, Any]]) -> list[str]:
    """Findings of the gate, and why a kernel whose speed is that of the memory has no loads of 16 bytes."""
    said = [f"- {row['operator']}: {sentence}" for row in together for sentence in row["findings"]]
    said += [f"- {row['operator']}: no loads of 16 bytes: {row['narrow']}" for row in together if row["narrow"]]
    return ["", *dict.fromkeys(said)] if said else []


_INTRODUCTION = """# Kernels on the layers of published models, compiled ahead of time

Rendered from [ahead_of_time.json](ahead_of_time.json): `{command}`, {date}, refllm {refllm}, triton {triton}.
**Nothing here was timed.** bfloat16; a size is the number of sequences x the tokens of each; one token attends to
{context} slots of the cache. {rows} rows of kernels, {bad} with a finding of the gate.

- bytes, flops: what the call cannot do without (each input read once, each output written once), over all its kernels.
- bound (H200): a bound, not a measurement: the longer of these bytes at 4.8 TB/s and these flops at 989 TFLOP/s, the
  bandwidth and bfloat16 rate in NVIDIA's data sheet of the H200.
- programs: in the grid, by size. At a time: how many fit on one multiprocessor, and what there is too little of for one
  more.
- tensor, async, instr.: instructions in the listing (not how often each runs). 16-byte: share of the loaded bytes that
  come in loads of 16 bytes or more.
"""
