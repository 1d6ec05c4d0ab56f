"""Reports of a check as one page: a single file that needs no network, no script and no font of its own."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refllm.accuracy import limits
from refllm.accuracy.measure import ULP_BINS, Measure
from refllm.accuracy.verdicts import verdict, worst
from refllm.check import charts, explained, findings, formulas
from refllm.check.oracle import Report, TapReport
from refllm.check.report import context, why
from refllm.storage import output_file

_TEMPLATE = "page.html"
_MAPS, _FLIPS, _VALUES = 4, 100, 8
_OPEN_REPORTS = 3  # so many reports are shown unfolded; of more, only those that fail

TokenText = Callable[[Report, int], str]
"""The text of a token id of a report's checkpoint."""


def write_html(
    path: str | Path,
    reports: list[Report],
    details: Mapping[str, Any] | None = None,
    token_text: TokenText | None = None,
    cut_short: str = "",
) -> None:
    """Write the page of one or more reports.

    details: name -> value, shown at the top (command line, versions, prompt). token_text: for the table of flips.
    cut_short: why this is not all that was to be checked.
    """
    page = render(reports, details, token_text, cut_short)
    output_file.write("--html", path, page)


def render(
    reports: list[Report],
    details: Mapping[str, Any] | None = None,
    token_text: TokenText | None = None,
    cut_short: str = "",
) -> str:
    """The page as text."""
    found = [report.verdict for report in reports]
    return template(_TEMPLATE).render(
        sections=[_section(i, report, len(reports), token_text) for i, report in enumerate(reports)],
        verdict=worst([*found, verdict(False, cut_short)]),
        counts={word: found.count(word) for word in ("fails", "incomplete", "holds") if word in found},
        details={**(details or {}), **({"incomplete": cut_short} if cut_short else {})},
        limits=limits,
        count=findings.count,
    )


def template(name: str) -> Any:
    """A template of this folder, ready to be rendered."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": findings.figure,
        "percent": findings.percent,
        "spoken": formulas.spoken,
        "signs": signs,
    }
    return environment.get_template(name)


def signs(text: str) -> str:
    """The text with the signs that a terminal may lack."""
    return text.replace(" sigma", " \N{GREEK SMALL LETTER SIGMA}").replace("+-", "\N{PLUS-MINUS SIGN}")


def _section(index: int, report: Report, reports: int, token_text: TokenText | None) -> dict[str, Any]:
    alone = max((tap for tap in report.taps if tap.isolated), key=findings.isolated_severity, default=None)
    after = max(report.taps, key=findings.end_to_end_severity, default=None)
    values = {formulas.spoken(name): share for name, share in list(report.attribution.items())[:_VALUES]}
    return {
        "id": f"r{index}",
        "report": report,
        "open": reports <= _OPEN_REPORTS or report.verdict == "fails",
        "failure": _failure(report),
        "worst_isolated": None if alone is None else _row(0, alone, report),
        "worst_end_to_end": None if after is None else _row(0, after, report),
        "kl_finite": report.next_tokens is not None and math.isfinite(report.next_tokens.kl),
        "tokens": findings.tokens_in_words(report),
        "flips": _flips(report, token_text),
        "chart": charts.layer_chart(report) if report.taps else None,
        "maps": _maps(report),
        "shares": charts.share_chart(report),
        "operators": {name: share for name, share in findings.by_operator(report).items() if share},
        "values": values,
        "groups": _groups(report),
        "untested": findings.untested(report),
        "habits": findings.habits_in_words(report),
    }


def _failure(report: Report) -> dict[str, Any] | None:
    """What the box at the top of a failing report says."""
    first, said = report.first_failure, explained.in_words(report.explanation)
    if report.verdict != "fails":
        return None
    if report.misbehaviour is not None:
        found = report.misbehaviour
        return {"name": found.name, "span": "", "formula": None, "text": f"{found.text}.", "said": [], "context": []}
    if first is None:
        below = report.explanation is not None and report.explanation.kind == "slope"
        text = "Every value holds, but rounding does not explain " + (
            "its error." if below else "the next tokens below."
        )
        return {"name": "next tokens", "span": "", "formula": None, "text": text, "said": said, "context": []}
    return {
        "name": first.name,
        "span": findings.span(first),
        "formula": formulas.formula(first.name, report.config),
        "said": [*said, *why(report, first)],
        "context": context(report, first),
    }


def _flips(report: Report, token_text: TokenText | None) -> list[dict[str, Any]]:
    """The flips with the largest margins first."""
    if report.next_tokens is None:
        return []

    def text(token: int) -> str | None:
        return None if token_text is None else token_text(report, token)

    flips = sorted(report.next_tokens.flips, key=lambda flip: -flip.sigmas)[:_FLIPS]
    return [
        asdict(flip)
        | {"explained": flip.explained, "exact_text": text(flip.exact), "candidate_text": text(flip.candidate)}
        for flip in flips
    ]


def _maps(report: Report) -> list[charts.HeatMap]:
    """The error maps of the worst taps, the first failure before all others."""
    first = report.first_failure
    taps = sorted(report.taps, key=lambda tap: (tap is first, findings.severity(tap)), reverse=True)
    drawn = [picture for tap in taps[: 4 * _MAPS] if (picture := charts.heat_map(tap)) is not None]
    return drawn[:_MAPS]


@dataclass(frozen=True)
class Row:
    """One tap in the list of all taps. isolated, end_to_end: the figures, or "NaN"; *_fails: over their limit."""

    index: int
    tap: TapReport
    short: str
    formula: formulas.Formula
    rounds_at: tuple[str, ...]
    isolated: str
    isolated_fails: bool
    row: str
    row_fails: bool
    end_to_end: str
    end_to_end_fails: bool
    figures: list[tuple[str, str, str]]
    broken: list[str]
    ulps: list[tuple[str, int, float]]


def _groups(report: Report) -> list[dict[str, Any]]:
    found, index = [], 0
    for group in findings.groups(report):
        rows = [_row(index + i, tap, report) for i, tap in enumerate(group.taps)]
        index += len(rows)
        found.append({"group": group, "rows": rows})
    return found


def _row(index: int, tap: TapReport, report: Report) -> Row:
    formula = formulas.formula(tap.name, report.config)
    alone, after = tap.isolated, tap.end_to_end
    return Row(
        index=index,
        tap=tap,
        short=formulas.short(tap.name),
        formula=formula,
        rounds_at=formula.rounds_at(report.policy or "", report.config),
        isolated=_figure(alone, "ratio"),
        isolated_fails="error" in tap.broken or bool(alone and alone.nonfinite),
        row=_figure(alone, "row_ratio"),
        row_fails="one row" in tap.broken or bool(alone and alone.nonfinite),
        end_to_end=_figure(after, "ratio"),
        end_to_end_fails=findings.end_to_end_severity(tap) > 1,
        figures=_figures(tap),
        broken=findings.broken_in_words(tap),
        ulps=_ulps(tap.ulps),
    )


def _figure(found: Measure | None, name: str) -> str:
    if found is None or not found.elements:
        return "-"
    return "NaN" if found.nonfinite else findings.figure(getattr(found, name))


def _figures(tap: TapReport) -> list[tuple[str, str, str]]:
    """(what, own inputs, end to end) of everything that was measured."""
    figures: list[tuple[str, Callable[[Measure], str]]] = [
        ("rms error / rms sigma", lambda m: findings.figure(m.ratio)),
        ("the same in an honest run", lambda m: findings.figure(m.honest) if m.honest else ""),
        ("worst row", lambda m: f"{findings.figure(m.row_ratio)} ({findings.place_of_row(tap.name, m.row)})"),
        ("largest element", lambda m: f"{findings.figure(m.largest)} ({findings.place(tap.name, m.at)})"),
        ("rms error", lambda m: f"{m.rms_error:.3g}"),
        ("rms sigma", lambda m: f"{m.rms_sigma:.3g}"),
        ("rms of the value", lambda m: f"{m.scale:.4g}"),
        ("bias, in standard errors", lambda m: findings.figure(m.bias)),
        ("gain (best common factor - 1)", lambda m: f"{m.gain:+.2e}"),
        ("not as the policy rounds", lambda m: findings.percent(m.misrounded) if m.misrounded else ""),
        ("NaN or infinity", lambda m: _nonfinite(tap.name, m)),
        ("elements", lambda m: f"{m.elements:,}"),
    ]
    alone = tap.isolated
    rows = [(name, "-" if alone is None else say(alone), say(tap.end_to_end)) for name, say in figures]
    return [(name, own, "" if name.startswith("not as") else after) for name, own, after in rows]


def _nonfinite(name: str, found: Measure) -> str:
    return f"{found.nonfinite:,} (first: {findings.place(name, found.nonfinite_at)})" if found.nonfinite else "0"


def _ulps(counts: list[int]) -> list[tuple[str, int, float]]:
    """(label, count, share of the largest) of each bin."""
    edges = ULP_BINS[1:-1]
    labels = ["exact", *(f"to {edge:g}" for edge in edges), f"over {edges[-1]:g}"]
    return [(label, n, n / max(1, *counts)) for label, n in zip(labels, counts, strict=False)]
