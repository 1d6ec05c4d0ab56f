"""Log-probabilities that were judged, for a terminal."""

from rich.console import Group, RenderableType
from rich.text import Text

from refllm.check.findings import count, figure
from refllm.check.logprobs import Disagreement, Found, LogProbReport
from refllm.check.report import STYLE
from refllm.terminal.fitted_table import Table


def show_logprobs(found: Found) -> RenderableType:
    """Each program against the page; then both against each other, and whose fault it is."""
    parts: list[RenderableType] = [part for report in found.reports for part in _report(report)]
    if found.difference is not None:
        parts += _difference(found.difference, found.verdict)
    return Group(*parts)


def _report(report: LogProbReport) -> list[RenderableType]:
    tempered = f", temperature {report.temperature:g}" if report.temperature != 1 else ""
    about = (
        f"  {report.source}, {report.dtype}, {count(report.tokens, 'log-probability').replace('ys', 'ies')}{tempered}: "
    )
    title = Text.assemble((report.checkpoint, "bold"), about, (report.verdict, STYLE[report.verdict]))
    lines = [("error", f"{figure(report.ratio)} sigma of the predicted rounding (limit {figure(report.limit)})")]
    row, position = report.worst
    said = f"sequence {row}, position {position}: {report.value:.6g}, exact {report.exact:.6g}: "
    lines.append(("worst token", f"{said}{figure(report.sigmas)} sigma (limit {figure(report.token_limit)})"))
    if report.unexplained:
        lines.append(("", f"rounding does not explain {count(report.unexplained, 'token')}"))
    if report.untested:
        lines.append(("untested", "the log-probabilities of the tokens before would hold as well"))
    how = (
        "the error of the head's input, carried through the head" if report.carried else "a bound: errors that all add"
    )
    lines.append(("sigma", f"{how}; rounding as in {report.policy}"))
    return [title, _grid(lines), ""]


def _difference(found: Disagreement, verdict: str) -> list[RenderableType]:
    row, position = found.worst
    lines = [
        ("error", f"{figure(found.ratio)} sigma of the predicted rounding of both, mean {found.mean:+.3g}"),
        ("largest", f"{found.largest:+.4g}, sequence {row}, position {position}"),
        ("fault", found.in_words),
    ]
    title = Text.assemble(
        f"{found.first} - {found.second}, {count(found.tokens, 'token')}: ", (verdict, STYLE[verdict])
    )
    return [title, _grid(lines), ""]


def _grid(lines: list[tuple[str, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, said in lines:
        grid.add_row(Text(label, style="dim"), Text(said))
    return grid
