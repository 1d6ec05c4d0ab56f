"""Reports of a check as tables for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from refllm.check.compare import Report, TapReport, TokenReport, Verdict
from refllm.check.tolerance import RMS_FACTOR, ROW_FACTOR

STYLE: dict[Verdict, str] = {"holds": "green", "fails": "bold red", "untested": "yellow"}


def show_report(report: Report) -> RenderableType:
    """One checkpoint in one precision: a line per tap, then the next tokens, then what is wrong. Fits 80 columns."""
    title = Text.assemble((report.checkpoint, "bold"), f"  {report.dtype}, {report.tokens} tokens: {report.candidate}")
    table = _table("value", "error", "rounding", "ratio", "differ", "worst at", "")
    for tap in report.taps:
        table.add_row(*_tap_cells(tap))
    lines: list[RenderableType] = [title, table]
    if report.next_tokens is not None:
        lines.append(_token_line(report.next_tokens))
    lines += [Text(note, style="yellow") for note in report.notes]
    for tap in report.taps:
        if tap.reasons:
            lines.append(Text(f"{tap.name} {tap.verdict}: {', '.join(tap.reasons)}", style=STYLE[tap.verdict]))
    if report.first_failure is not None:
        lines.append(Text(f"first failure: {report.first_failure.name}", style=STYLE["fails"]))
    return Group(*lines, "")


def show_summary(reports: list[Report]) -> Table:
    """One line per report: the verdicts at a glance."""
    table = _table("checkpoint", "precision", "ratio", "differ", "next tokens", "")
    for report in reports:
        tokens = report.next_tokens
        table.add_row(
            report.checkpoint,
            report.dtype,
            f"{max(tap.ratio for tap in report.taps):.2f}",
            str(sum(tap.differing for tap in report.taps)),
            "" if tokens is None else f"{tokens.positions - tokens.flips}/{tokens.positions}",
            Text(report.verdict, style=STYLE[report.verdict]),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        words = name in ("value", "worst at", "checkpoint", "precision", "")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    return table


def closing_line(reports: list[Report]) -> Text:
    """What the columns mean, and the verdict over all reports in one line."""
    counts = {verdict: sum(report.verdict == verdict for report in reports) for verdict in STYLE}
    worst: Verdict = next(v for v in ("fails", "untested", "holds") if counts[v])
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return Text.assemble(("\n" + LEGEND + "\n\n", "dim"), (f"{len(reports)} checked: {words}", STYLE[worst]))


LEGEND = f"""\
error     distance from the exact float64 run: rms, relative to the value's rms
rounding  the same for the reference in this precision: what rounding costs
ratio     error / rounding; fails above {RMS_FACTOR:g} (of one position: above {ROW_FACTOR:g})
differ    elements whose bits are not those of the reference in this precision"""


def _tap_cells(tap: TapReport) -> list[str | Text]:
    return [
        tap.name,
        _figure(tap.candidate.relative),
        _figure(tap.yardstick.relative),
        f"{tap.ratio:.2f}" if tap.yardstick.rms or tap.ratio else "",
        str(tap.differing),
        "" if tap.max_error == 0 else _place(tap.at),
        Text(tap.verdict, style=STYLE[tap.verdict]),
    ]


def _figure(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _place(at: tuple[int, ...]) -> str:
    """Index of a value [B, S, n] in words; the batch is named only where there is more than one sequence."""
    if len(at) == 3:
        return (f"seq {at[0]}, " if at[0] else "") + f"pos {at[1]}, ch {at[2]}"
    return f"{list(at)}" if at else ""


def _token_line(tokens: TokenReport) -> Text:
    line = f"next tokens: {tokens.positions - tokens.flips} of {tokens.positions} agree"
    if tokens.flips:
        line += f"; largest margin of a flip {tokens.worst_margin:.2g} (pos {tokens.worst_position}), "
        line += f"limit {tokens.limit:.2g}"
    return Text(line, style="" if tokens.verdict == "holds" else STYLE["fails"])
