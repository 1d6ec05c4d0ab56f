"""What the compiler makes of every kernel on the layers of published models: `refllm kernels check-aot --layers`.

A row per kernel that a call starts, for one token and for a prompt, on every target: registers, spills, shared memory,
occupancy, instructions, and beside them the bytes and flops that the call cannot do without. From those follows a
bound of its time on an H200: the longer of moving the bytes at its published bandwidth and doing the flops at its
published rate. A bound is arithmetic on a data sheet; no time in these files was measured.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

import refllm
from refllm.bench.workloads import Job, operator_jobs, traffic_of
from refllm.errors import InputError
from refllm.kernels.aot.batch import Checked, Step, check, collect
from refllm.kernels.aot.calls import launches
from refllm.kernels.aot.sources import Named
from refllm.kernels.cases import LAYERS
from refllm.kernels.targets import Target

FORMAT = 1
SIZES = {"decode": (1, 1), "prefill": (1, 2048)}
"""Sequences and tokens of each. One token attends to 4096 slots of the cache."""
CONTEXT = 4096
DTYPE = "bfloat16"
H200 = {"bytes_per_second": 4.8e12, "flops_per_second": 989e12}
"""Bandwidth and bfloat16 products without sparsity. Source: NVIDIA, H200 Tensor Core GPU data sheet (SXM)."""


@cache
def _jobs() -> tuple[tuple[str, Job], ...]:
    """("decode" or "prefill", a call), for every layer and operator that its model runs."""
    return tuple(
        (phase, job)
        for phase, size in SIZES.items()
        for job in operator_jobs(LAYERS, [size], None, DTYPE, "meta", CONTEXT)
    )


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
        """Named `operator, phase, number of the launch in the call`."""
        return [
            (f"{job.operator}, {phase}, {index}", launch)
            for phase, job in _jobs()
            if job.panel == self.layer and self.operator in ("", job.operator)
            for index, launch in enumerate(launches(job.operator, job.draw(0), target))
        ]


def rows(
    targets: Sequence[Target], jobs: int = 1, step: Step | None = None, layers: Sequence[str] = (), operator: str = ""
) -> list[dict[str, Any]]:
    """A row per kernel, call, layer and target. layers, operator: those alone. InputError for unknown names."""
    known = [layer.name for layer in LAYERS]
    if unknown := [name for name in layers if name not in known]:
        raise InputError(f"layer {unknown[0]!r} is not known; use one of {', '.join(known)}")
    sources: Any = [LayerSource(name, operator) for name in layers or known]
    checked = check(collect(sources, targets), jobs, step)
    return [_row(one) for one in checked]


def _row(checked: Checked) -> dict[str, Any]:
    configuration = checked.configuration
    operator, phase, _ = configuration.name.split(", ")
    job = next(j for p, j in _jobs() if (p, j.panel, j.operator) == (phase, configuration.source.module, operator))
    cost, report = traffic_of(job, job.draw(0)), checked.report
    by_memory, by_products = cost.bytes / H200["bytes_per_second"], cost.flops / H200["flops_per_second"]
    row: dict[str, Any] = {
        "layer": job.panel,
        "operator": operator,
        "phase": phase,
        "target": configuration.target.name,
        "kernel": configuration.kernel,
        "programs": configuration.launch.grid[0],
        "warps": configuration.launch.num_warps,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "flops_per_byte": round(cost.flops / cost.bytes, 3),
        "bound_seconds_h200": max(by_memory, by_products),
        "bound_by": "memory" if by_memory >= by_products else "products",
        "findings": [finding.sentence for finding in checked.findings],
    }
    if report is None:
        return row
    code = report.instructions
    return row | {
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
    """Everything that is kept: format, versions, command, date, settings, verdict, rows."""
    return {
        "format": FORMAT,
        "benchmark": "ahead_of_time",
        "verdict": "finding" if any(row["findings"] for row in found) else "holds",
        "versions": {"refllm": refllm.__version__, "triton": triton.__version__},
        "command": " ".join(["refllm", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "settings": {
            "dtype": DTYPE,
            "targets": [target.name for target in targets],
            "sizes": SIZES,
            "context": CONTEXT,
            "h200": H200,
        },
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


_COLUMNS = (
    *("operator", "kernel", "bytes", "flops", "flops/byte", "bound (H200)", "programs", "warps", "regs", "spill"),
    *("shared", "at a time", "tensor", "async", "16-byte", "instr."),
)


def page(kept: dict[str, Any]) -> str:
    """The figures as Markdown, a table per target and layer and phase."""
    settings, versions = kept["settings"], kept["versions"]
    rows_of = kept["rows"]
    text = [
        _INTRODUCTION.format(
            command=kept["command"], date=kept["date"], triton=versions["triton"], refllm=versions["refllm"],
            context=settings["context"], tokens=settings["sizes"]["prefill"][1],
            rows=len(rows_of), bad=sum(bool(row["findings"]) for row in rows_of),
        )
    ]  # fmt: skip
    for target in settings["targets"]:
        for layer in dict.fromkeys(row["layer"] for row in rows_of):
            for phase in settings["sizes"]:
                together = [r for r in rows_of if (r["target"], r["layer"], r["phase"]) == (target, layer, phase)]
                text += [f"\n## {target}, {layer}, {phase}\n", *_table(together), *_findings(together)]
    return "\n".join(text) + "\n"


def _table(together: list[dict[str, Any]]) -> Iterator[str]:
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "|---|---" + "|---:" * (len(_COLUMNS) - 2) + "|"
    for row in together:
        yield "| " + " | ".join(_cells(row)) + " |"


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["operator"], re.sub("_kernel$", "", row["kernel"]), _scaled(row["bytes"]), _scaled(row["flops"])]
    cells += [f"{row['flops_per_byte']:.3g}", f"{1e6 * row['bound_seconds_h200']:.3g} us, {row['bound_by']}"]
    cells += [f"{row['programs']:,}", str(row["warps"])]
    if "registers" not in row:
        return cells + ["does not compile"] + [""] * (len(_COLUMNS) - len(cells) - 1)
    cells += [str(row["registers"]), str(row["spill_bytes"]), f"{row['shared_bytes'] / 1024:.1f} K"]
    cells += [f"{row['programs_per_multiprocessor']} ({row['limited_by']})"]
    cells += [str(row[name] or "-") for name in ("tensor_instructions", "async_copies")]
    return cells + [f"{100 * row['wide_share']:.0f} %", f"{row['instructions']:,}"]


def _scaled(number: float) -> str:
    """With three digits and k, M, G or T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _findings(together: list[dict[str, Any]]) -> list[str]:
    found = [f"- {row['operator']}: {sentence}" for row in together for sentence in row["findings"]]
    return ["", *found] if found else []


_INTRODUCTION = """# Kernels on the layers of published models, compiled ahead of time

Rendered from [ahead_of_time.json](ahead_of_time.json): `{command}`, {date}, refllm {refllm}, triton {triton}.
**Nothing here was timed.** bfloat16; decode: one token of one sequence, over a cache of {context} slots; prefill: one
sequence of {tokens} tokens. {rows} rows, {bad} with a finding of the gate.

- bytes, flops: what the call cannot do without (each input read once, each output written once), over all its kernels.
- bound (H200): a bound, not a measurement: the longer of these bytes at 4.8 TB/s and these flops at 989 TFLOP/s, the
  bandwidth and bfloat16 rate in NVIDIA's data sheet of the H200, whatever the target of the row.
- programs: in the grid. At a time: how many fit on one multiprocessor, and what there is too little of for one more.
- tensor, async, instr.: instructions in the listing (not how often each runs). 16-byte: share of the loaded bytes that
  come in loads of 16 bytes or more.
"""
