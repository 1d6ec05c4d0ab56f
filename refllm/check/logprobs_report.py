"""Log-probabilities that were judged, for a terminal and as a page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from refllm.accuracy.verdicts import verdict, worst
from refllm.check.findings import count, figure
from refllm.check.html import template
from refllm.check.logprobs import Disagreement, Found, LogProbReport
from refllm.check.report import STYLE
from refllm.storage import output_file
from refllm.terminal.fitted_table import Table

_WORST = 20


def show_logprobs(found: Found) -> RenderableType:
    """Each program against the page; then both against each other, and whose fault it is."""
    parts: list[RenderableType] = [part for report in found.reports for part in _report(report)]
    if found.difference is not None:
        parts += _difference(found.difference, found.verdict)
    return Group(*parts)


def _report(report: LogProbReport) -> list[RenderableType]:
    about = f"  {report.source}, {about_it(report)}: "
    title = Text.assemble((report.checkpoint, "bold"), about, (report.verdict, STYLE[report.verdict]))
    return [title, _grid(in_words(report)), ""]


def about_it(report: LogProbReport) -> str:
    """What of a file a report is on."""
    tempered = f", temperature {report.temperature:g}" if report.temperature != 1 else ""
    part = ""
    if len(report.sequences) < len(report.ids):
        part = f", sequences {', '.join(_spans(report.sequences))}"
    said = count(report.tokens, "log-probability").replace("ys", "ies")
    return f"{report.dtype}{tempered}{part}, {said}"


def _spans(numbers: tuple[int, ...]) -> Iterator[str]:
    """Runs of numbers as 3-5."""
    starts = [i for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        yield str(numbers[start]) if end - start == 1 else f"{numbers[start]}-{numbers[end - 1]}"


def in_words(report: LogProbReport) -> list[tuple[str, str]]:
    """What was found, by what it is called."""
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
    return lines


def _difference(found: Disagreement, verdict: str) -> list[RenderableType]:
    title = Text.assemble(f"{against(found)}: ", (verdict, STYLE[verdict]))
    return [title, _grid(difference_in_words(found)), ""]


def against(found: Disagreement) -> str:
    """Which two."""
    return f"{found.first} - {found.second}, {count(found.tokens, 'token')}"


def difference_in_words(found: Disagreement) -> list[tuple[str, str]]:
    """How far the two are from each other, and whose fault it is."""
    row, position = found.worst
    return [
        ("error", f"{figure(found.ratio)} sigma of the predicted rounding of both, mean {found.mean:+.3g}"),
        ("largest", f"{found.largest:+.4g}, sequence {row}, position {position}"),
        ("fault", found.in_words),
    ]


def _grid(lines: list[tuple[str, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, said in lines:
        grid.add_row(Text(label, style="dim"), Text(said))
    return grid


# ------------------------------------------------------------------------------------------------------------ as a page


def write_html(path: str | Path, found: Found, details: Mapping[str, Any], cut_short: str = "") -> None:
    """Write the page. details: name -> value, shown at the top. cut_short: why this is not all that was asked for."""
    output_file.write("--html", path, render(found, details, cut_short))


def render(found: Found, details: Mapping[str, Any], cut_short: str = "") -> str:
    """The page as text."""
    verdicts = [report.verdict for report in found.reports]
    told = [
        {"report": report, "about": about_it(report), "lines": in_words(report), "tokens": worst_tokens(report)}
        for report in found.reports
    ]
    difference = found.difference
    return template("logprobs.html").render(
        told=told,
        difference=difference,
        between=None if difference is None else (against(difference), difference_in_words(difference)),
        verdict=worst([found.verdict, verdict(False, cut_short)]),
        counts={word: verdicts.count(word) for word in STYLE if word in verdicts},
        details={**details, **({"incomplete": cut_short} if cut_short else {})},
        count=count,
    )


def worst_tokens(report: LogProbReport) -> list[dict[str, Any]]:
    """The tokens that are furthest off in sigma, the worst first."""
    sigmas = np.where(np.isnan(report.of_token), -1, report.of_token)
    order = np.argsort(-sigmas, axis=None, kind="stable")[: min(_WORST, report.tokens)]
    places = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, sigmas.shape), strict=True)]
    return [
        {
            "sequence": at[0],
            "position": at[1],
            "id": int(report.ids[at]),
            "error": f"{report.error[at]:+.3g}",
            "sigma": f"{np.sqrt(report.variance[at]):.3g}",
            "sigmas": figure(float(report.of_token[at])),
            "explained": bool(report.of_token[at] <= report.token_limit),
        }
        for at in places
    ]
