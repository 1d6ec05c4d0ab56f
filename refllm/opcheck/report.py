"""The report of a search: for a terminal, as text, and as JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.text import Text

from refllm.accuracy.judge import Judgement
from refllm.accuracy.verdicts import SCHEMA
from refllm.opcheck.api import LevelReport, OpFinding, OpReport
from refllm.opcheck.examine import Finding
from refllm.opcheck.tile import begin, tile
from refllm.ops.backward_contracts import BACKWARD
from refllm.ops.contracts import CONTRACTS
from refllm.strategies.call import Call
from refllm.terminal.fitted_table import Table

WIDTH = 110
_STYLE = {"holds": "green", "incomplete": "yellow", "fails": "bold red"}


def show_report(report: OpReport, with_repro: bool = False) -> RenderableType:
    """What a person reads. with_repro: the reproduction below it."""
    title = Text.assemble(
        f"{report.op}  {report.candidate}, {report.dtype}, {_policy(report)}{report.device}, level {report.level}: ",
        (f"{report.verdict}" + (f", {report.property}" if report.property else ""), _STYLE[report.verdict]),
        f", without {', '.join(report.not_asked)}" if report.not_asked else "",
    )
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in _lines(report):
        grid.add_row(label, text)
    parts: list[RenderableType] = [title, grid]
    if with_repro and report.repro:
        parts += ["", Syntax(report.repro, "python", background_color="default", word_wrap=False)]
    return Group(*parts, "")


def show_operators() -> RenderableType:
    """Every operator with its signature."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for known in (*CONTRACTS.values(), *BACKWARD.values()):
        table.add_row(Text(known.operator, style="bold"), Text(known.text))
    return table


def report_text(report: OpReport) -> str:
    """The same without colours, for an assertion."""
    console = Console(width=WIDTH, no_color=True)
    with console.capture() as captured:
        console.print(show_report(report))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines)


def _lines(report: OpReport) -> list[tuple[str, str]]:
    lines = []
    counted = [one for one in report.findings if _counts(report, one)]
    beside = [one for one in report.findings if not _counts(report, one)]
    for i, one in enumerate(counted):
        lines += [("", "")] if i else []
        lines += _finding(one)
    if not counted and report.worst is not None:
        w = report.worst
        said = f"RMS error {w.ratio:.2f} times that of the contract (limit {w.limit:.3g})"
        lines.append(("worst", f"{said}; {_worst(w)}"))
    if report.rounds:
        lines.append(("rounds", report.rounds))
    lines += [(f"level {one.level}", _level(one, report)) for one in report.levels]
    for one in beside:
        lines += [("beside it", f"{one.finding.property}: {one.finding.text}")]
        lines += [("", _plainly(one.finding.call))]
    if report.not_asked:
        lines.append(("not asked", ", ".join(report.not_asked)))
    if report.untested:
        lines.append(("untested", f"these wrong answers would have held as well: {', '.join(report.untested)}"))
    lines.append(("examined", _examined(report)))
    if report.repro_file:
        lines.append(("reproduction", f"python {report.repro_file}"))
    elif report.repro:
        lines.append(("reproduction", "--repro FILE.py writes a program that shows it, --repro - prints it"))
    return lines


def _policy(report: OpReport) -> str:
    return f"policy {report.policy}, " if report.policy else ""


def _counts(report: OpReport, one: OpFinding) -> bool:
    return any(level.level == one.level and level.counts for level in report.levels)


def _finding(one: OpFinding) -> list[tuple[str, str]]:
    """The lines about one finding."""
    finding = one.finding
    lines = [(finding.property, finding.text)]
    if finding.judgement is not None:
        lines.append(("worst element", _worst(finding.judgement)))
    lines.append(("smallest call", _plainly(finding.call)))
    lines += _places(one)
    lines += [("breaks" if not i else "", law) for i, law in enumerate(one.laws)]
    lines += _looks_like(one)
    return lines + ([("offers less?", one.suggestion)] if one.suggestion else [])


def _looks_like(one: OpFinding) -> list[tuple[str, str]]:
    """All that gives these numbers in one line, and what the first of it is in the definition."""
    if not one.guesses:
        return [("wrong in", one.wrong_in)] if one.wrong_in else []
    first = one.guesses[0]
    lines = [("looks like", "; or: ".join(found.text for found in one.guesses))]
    if first.changed and len(one.guesses) == 1:
        lines += [("definition", first.definition), ("with that", first.changed)]
    return lines


def _level(one: LevelReport, report: OpReport) -> str:
    """What was found at one level, and what that means."""
    if not one.examples:
        return "not examined" + ("" if one.counts else ", does not count")
    found = f"{one.findings} finding{'s' * (one.findings != 1)}" if one.findings else one.verdict
    return f"{found}, {one.examples} call{'s' * (one.examples != 1)}" + ("" if one.counts else ", does not count")


def _plainly(call: Call) -> str:
    """A call without the kind that it came from, which a smaller one need not belong to."""
    return str(call).replace(f" ({call.kind})", "")


def _places(found: OpFinding) -> list[tuple[str, str]]:
    finding, first = found.finding, found.first
    lines = []
    for label, one in (("where", finding), ("first seen", first)):
        at = tile(one.where, one.axes) if one.where is not None else ""
        if one is first and first.call == finding.call:
            continue
        said = f"{one.output}: {at}" if at else ""
        if one is first:
            said = f"{first.call}" + (f"; {said}" if said else "")
        if said:
            lines.append((label, said))
    return lines


def _worst(judgement: Judgement) -> str:
    where = f"{judgement.name}{list(judgement.worst)}" if judgement.worst else judgement.name
    said = f"{where} = {judgement.value:.7g}, exact {judgement.exact:.7g}"
    if np.isfinite(judgement.sigma):
        said += f": {judgement.sigma:.3g} sigma, {judgement.ulp:.3g} ulp"
    return said


def _examined(report: OpReport) -> str:
    said = f"{report.examples} call{'s' * (report.examples != 1)}"
    said += f", {report.shrinking} more to shrink it" if report.shrinking else ""
    said += f", {report.seconds:.1f} s, seed {report.seed}"
    return said + (f"; {report.ended}" if report.ended else "")


def report_dict(report: OpReport) -> dict[str, Any]:
    """See `OpReport.to_dict`."""
    finding = report.finding
    return {
        "schema": SCHEMA,
        "op": report.op,
        "verdict": report.verdict,
        "dtype": report.dtype,
        "policy": report.policy or None,
        "rounds": report.rounds or None,
        "level": report.level,
        "levels": [vars(one) for one in report.levels],
        "candidate": report.candidate,
        "device": report.device,
        "property": report.property or None,
        "text": finding.text if finding else None,
        "examples": report.examples,
        "shrinking": report.shrinking,
        "seconds": round(report.seconds, 3),
        "seed": report.seed,
        "ended": report.ended or None,
        "without": list(report.without),
        "not_asked": list(report.not_asked),
        "worst": _worst_dict(report.worst),
        "counterexample": _call_dict(report.findings, finding) if finding else None,
        "findings": [_finding_dict(one, _counts(report, one)) for one in report.findings],
        "looks_like": [vars(found) for found in report.guesses],
        "untested": list(report.untested),
        "repro": report.repro or None,
        "repro_file": report.repro_file or None,
    }


def _worst_dict(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return {"ratio": None}
    names = ("ratio", "limit", "sigma", "ulp", "value", "exact")
    numbers = {name: _number(getattr(judgement, name)) for name in names}
    return {**numbers, "output": judgement.name, "index": list(judgement.worst)}


def _number(x: float) -> float | str | None:
    """JSON has neither infinity nor NaN."""
    return float(x) if np.isfinite(x) else str(float(x))


def _finding_dict(one: OpFinding, counts: bool) -> dict[str, Any]:
    return {
        "level": one.level,
        "counts": counts,
        "property": one.finding.property,
        "text": one.finding.text,
        "counterexample": _call_dict([one], one.finding),
        "looks_like": [vars(found) for found in one.guesses],
        "wrong_in": one.wrong_in or None,
        "laws": list(one.laws),
        "suggestion": one.suggestion or None,
        "repro": one.repro,
    }


def _call_dict(findings: Sequence[OpFinding], finding: Finding) -> dict[str, Any]:
    first = next(one.first for one in findings if one.finding is finding)
    where = finding.where
    shapes = {
        name: list(x.shape)
        for name, x in (*zip(finding.call.names, finding.call.arguments, strict=True), *finding.call.keywords)
        if hasattr(x, "shape")
    }
    return {
        "call": _plainly(finding.call),
        "kind": first.call.kind,
        "shapes": shapes,
        "code": finding.call.code(),
        "output": finding.output or None,
        "where": (tile(where, finding.axes) or None) if where is not None else None,
        "begins": list(begin(where)) if where is not None else None,
        "first_call": str(first.call),
        "first_where": (tile(first.where, first.axes) or None) if first.where is not None else None,
    }
