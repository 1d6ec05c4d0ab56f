"""The results of the gate and the list of kernels as tables for a terminal."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from refllm.kernels.aot.batch import Checked
from refllm.kernels.aot.machine_code import share_of_wide
from refllm.terminal.fitted_table import Table


def show_checked(checked: Sequence[Checked], verbose: bool = False) -> RenderableType:
    """The worst configuration per kernel and target, or every one; below it all findings, equal ones once."""
    configuration = "configuration" if verbose else "worst of"
    columns = ("kernel", "target", configuration, "regs", "spilled", "shared", "programs", "tensor", "async", "16-byte")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for index, name in enumerate((*columns, "instr.")):
        table.add_column(name, justify="left" if index < 3 else "right", no_wrap=index < 2)
    for rows in _by_kernel(checked):
        for row in rows if verbose else [max(rows, key=_badness)]:
            table.add_row(*_cells(row, 1 if verbose else len(rows)))
    return Group(table, *_findings(checked))


def closing_line(checked: Sequence[Checked], compiled: int, seconds: float) -> str:
    """How much was compiled and how much of it is wrong."""
    bad = sum(bool(row.findings) for row in checked)
    verdict = f"{bad} with findings" if bad else "all within the gates"
    return f"{len(checked)} configurations, {compiled} compiled in {seconds:.0f} s: {verdict}"


def _by_kernel(checked: Sequence[Checked]) -> Iterator[list[Checked]]:
    """The rows of one kernel and target together, in the order of kernels and then of targets."""

    def kernel(row: Checked) -> tuple[str, str]:
        return row.configuration.source.module, row.configuration.kernel

    order: dict[object, int] = {}
    for row in checked:
        order.setdefault(kernel(row), len(order))
        order.setdefault(row.configuration.target, len(order))

    def place(row: Checked) -> tuple[int, int]:
        return order[kernel(row)], order[row.configuration.target]

    for _, rows in groupby(sorted(checked, key=place), place):
        yield list(rows)


def _badness(row: Checked) -> tuple[float, ...]:
    """Findings first, then what is nearest to one."""
    if row.report is None:
        return (float("inf"),)
    return (len(row.findings), row.report.resources.spill_bytes, -row.report.occupancy.warps, row.report.shared)


def _cells(row: Checked, of: int) -> Iterator[str | Text]:
    configuration, report = row.configuration, row.report
    style = "red" if row.findings else ""
    yield Text(configuration.kernel, style)
    yield configuration.target.name
    yield f"{of}: {configuration.name}" if of > 1 else configuration.name
    if report is None:
        yield Text("does not compile", "red")
        return
    code = report.instructions
    yield str(report.resources.registers)
    yield Text(f"{report.resources.spill_bytes}", "red" if report.resources.spill_bytes else "")
    yield f"{report.shared / 1024:.1f}K"
    yield f"{report.occupancy.programs}"
    yield str(sum(code.tensor.values())) if code.tensor or report.dots else "-"
    yield str(code.async_copies) if code.async_copies else "-"
    yield " / ".join(f"{100 * share_of_wide(w):.0f} %" if w else "-" for w in (code.loads, code.stores))
    yield f"{code.count:,}"


def _findings(checked: Sequence[Checked]) -> Iterator[Text]:
    """One line per sentence and kernel; configurations that share it are counted."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for row in checked:
        for finding in row.findings:
            place = (row.configuration.kernel, row.configuration.target.name, finding.sentence)
            said.setdefault(place, []).append(row.configuration.name)
    if said:
        yield Text("")
    for (kernel, target, sentence), names in said.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Text.assemble((f"{kernel} {target} [{names[0]}{more}]: ", "bold"), sentence)


def show_list(kernels: Sequence[dict[str, Any]], verbose: bool = False) -> RenderableType:
    """Every kernel file with its operators; with `verbose` the names of its configurations. As `describe` returns."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("operators", "file", "kernels", "configurations", "what it is"):
        table.add_column(name, justify="right" if name == "configurations" else "left")
    for kernel in kernels:
        names = list(dict.fromkeys(name for names in kernel["configurations"].values() for name in names))
        counted = "\n".join(names) if verbose else str(len(names))
        operators, functions = "\n".join(kernel["operators"]), "\n".join(kernel["kernels"])
        table.add_row(operators, kernel["file"], functions, counted, kernel["about"])
    return table
