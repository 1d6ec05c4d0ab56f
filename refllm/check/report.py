"""Reports of a check for a terminal. Everything fits 100 columns; `show_report` gives one line per layer."""

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from refllm.accuracy import limits
from refllm.accuracy.measure import Measure
from refllm.accuracy.verdicts import worst
from refllm.check import explained, findings, formulas
from refllm.check.findings import count, figure, percent
from refllm.check.next_tokens import Flip
from refllm.check.oracle import Report, TapReport
from refllm.terminal.fitted_table import Table

WIDTH = 100
STYLE = {"holds": "green", "fails": "bold red", "incomplete": "yellow", "untested": "yellow"}
_FLIPS_SHOWN = 3
_CONTRIBUTORS = 6


def show_report(report: Report, verbose: bool = False) -> RenderableType:
    """One candidate on one checkpoint and input: what fails first, a line per layer (per tap if verbose), next tokens,
    attribution, what is untested."""
    parts: list[RenderableType] = [_title(report)]
    if report.misbehaviour is not None:
        return Group(*parts, _panel(f"first failure: {report.misbehaviour.name}", [Text(report.misbehaviour.text)]), "")
    if report.verdict == "fails":
        parts.append(_failure(report))
    parts += [_tap_table(report) if verbose else _layer_table(report), ""]
    remarks = Table.grid(padding=(0, 2, 0, 0))
    for label, said in [
        *_tokens(report),
        *_habits(report),
        *_format(report),
        *_attribution(report),
        *_cautions(report),
    ]:
        remarks.add_row(Text(label, style="dim"), said)
    return Group(*parts, remarks, "")


def show_summary(reports: list[Report]) -> Table:
    """One line per report: the verdicts at a glance."""
    table = _table()
    several = len({report.candidate for report in reports}) > 1
    table.add_column("checkpoint", overflow="fold")
    if several:
        table.add_column("candidate", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("input", overflow="fold")
    for name in ("own\ninputs", "end\nto end", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", min_width=20, overflow="fold")
    for report in reports:
        names = [report.checkpoint, *([report.candidate] if several else []), report.dtype, report.inputs]
        table.add_row(*names, *_summary_figures(report), _verdict(report.verdict) + _where(report))
    return table


def closing_line(reports: list[Report]) -> RenderableType:
    """What the columns mean, and the verdict over all reports in one line."""
    verdicts = [report.verdict for report in reports]
    words = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in STYLE if verdict in verdicts)
    columns = Table.grid(padding=(0, 2, 0, 0))
    for label, said in legend():
        columns.add_row(Text(label, style="dim"), Text(said, style="dim"))
    columns.add_row("", Text("refllm learn term WORD says more of any of them", style="dim"))
    return Group("", columns, "", Text(f"{len(reports)} checked: {words}", style=STYLE[worst(verdicts)]))


def legend() -> list[tuple[str, str]]:
    """The columns and what they mean, with their limits; `limits.MISROUNDED` shows in a failure's own words."""
    narrow, wide = limits.ISOLATED["bfloat16"], limits.ISOLATED["float32"]
    row, wide_row = limits.ROW["bfloat16"], limits.ROW["float32"]
    own = (
        f"rms error / rms sigma of an operator's result, given the candidate's own inputs: is this operator wrong? "
        f"Limit {narrow:g} (float32: {wide:g}), and more where there are few numbers"
    )
    end = (
        f"rms error / rms sigma after everything before it, from the token ids on. Limit {limits.END_TO_END:g}, "
        f"or {limits.END_TO_END:g} times what an honest run in the same format has, if that is more"
    )
    same = f"the same of the worst position or head. Limit {row:g} (float32: {wide_row:g}), and more as above"
    return [
        ("sigma", "predicted rounding error of a correct implementation that rounds where this one does, or has to"),
        ("own inputs", own),
        ("worst row", same),
        ("end to end", end),
        ("untested", "a wrong answer such as zeros, or everything times 1.01, would hold here"),
        ("incomplete", "nothing is wrong, but values are untested, or something was not seen: exit code 1"),
    ]


def _title(report: Report) -> Text:
    policy = f"policy {report.policy}, " if report.policy else ""
    about = f"  {report.candidate}, {report.dtype}, {policy}{report.inputs}, "
    about += f"{count(report.tokens, 'token')}: "
    return Text.assemble((report.checkpoint, "bold"), about, (report.verdict, STYLE[report.verdict]))


def _verdict(verdict: str) -> Text:
    return Text(verdict, style=STYLE[verdict])


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)


# -------------------------------------------------------------------------------------------------------- first failure


def _failure(report: Report) -> RenderableType:
    first = report.first_failure
    why_it_is: list[RenderableType] = [Text(said, style="bold") for said in explained.in_words(report.explanation)]
    if first is None:
        body = Text("every value holds, but rounding does not explain the next tokens below")
        return _panel("first failure: next tokens", [body, *why_it_is])
    formula, span = formulas.formula(first.name, report.config), findings.span(first)
    lines: list[RenderableType] = [
        Text.assemble((formula.text, "bold"), f"    {formula.source}"),
        Text(formula.convention, style="dim"),
    ]
    if span:  # it is one of several operators
        lines = [Text(f"in one of {formulas.listed((*first.hidden, first.name))}")]
    reason, *more = why(report, first)
    lines = [Text(reason, style=STYLE["fails"]), *why_it_is, *lines, *(Text(said) for said in more)]
    lines += [Text.assemble((f"{label}  ", "dim"), said) for label, said in context(report, first)]
    return _panel(f"first failure: {first.name} ({span or formula.operator})", lines)


def why(report: Report, first: TapReport) -> list[str]:
    """What is wrong with the first failure, sentence by sentence."""
    said = findings.broken_in_words(first)
    if first.place:
        return [f"right, but not rounded where policy {report.policy} says: {first.place}", *said]
    if first.defect_here:
        return said + findings.hints(first, report.config)
    return [*said, "no operator is wrong on its own inputs: the error is built up by the values before"]


def _panel(title: str, lines: list[RenderableType]) -> Panel:
    return Panel(
        Group(*lines), title=Text(title, style=STYLE["fails"]), title_align="left", box=box.ROUNDED, border_style="red"
    )


def context(report: Report, first: TapReport) -> list[tuple[str, str]]:
    """What came before the first failure, which other operators are wrong, and what follows from it."""
    said = []
    before = findings.before(report, first)
    innocent = [f"{formulas.short(tap.name)} {_isolated_figure(tap)}" for tap in before if tap.verdict != "fails"]
    if innocent:
        said.append(("innocent before it:", ", ".join(innocent)))
    others = findings.other_defects(report)
    if first.defect_here and others:
        names = [f"{formulas.spoken(tap.name)} {_isolated_figure(tap)}" for tap in others[:3]]
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        said.append(("also wrong on own inputs:", ", ".join(names) + more))
    elsewhere = findings.elsewhere(report)
    if elsewhere:
        names = [formulas.spoken(tap.name) for tap in elsewhere[:3]]
        more = f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else ""
        said.append((f"rounded elsewhere than {report.policy}:", ", ".join(names) + more))
    consequences = findings.consequences(report)
    if first.defect_here and consequences:
        said.append(
            (
                "consequences:",
                f"{count(consequences, 'value')} over a limit, though their own operators hold, or an infinity came in",
            )
        )
    return said


# --------------------------------------------------------------------------------------------------------------- tables


def _layer_table(report: Report) -> Table:
    table = _table()
    table.add_column("", no_wrap=True, max_width=12)
    table.add_column("own\ninputs", justify="right", no_wrap=True)
    table.add_column("worst\nrow", justify="right", no_wrap=True)
    table.add_column("\nof", no_wrap=True)
    table.add_column("end\nto end", justify="right", no_wrap=True)
    table.add_column("\nof", no_wrap=True)
    table.add_column("", no_wrap=True)
    for group in findings.groups(report):
        alone, after = group.worst_isolated, group.worst_end_to_end
        one = len(group.taps) == 1
        table.add_row(
            group.label,
            *(_isolated_cells(alone) if alone is not None else ["", ""]),
            "" if one or alone is None else formulas.short(alone.name),
            _end_to_end_cell(after),
            "" if one else formulas.short(after.name),
            _verdict(group.verdict),
        )
    return table


def _tap_table(report: Report) -> Table:
    table = _table()
    table.add_column("\nvalue", no_wrap=True)
    for name in ("own\ninputs", "worst\nrow", "\nlargest", "mis-\nrounded", "end\nto end", "\ngain"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for group in findings.groups(report):
        if group.layer is not None:
            table.add_row(Text(group.label, style="dim"))
        for tap in group.taps:
            name = formulas.short(tap.name)
            table.add_row(f"  {name}" if group.layer is not None else name, *_tap_cells(tap), _verdict(tap.verdict))
    return table


def _tap_cells(tap: TapReport) -> list[Text]:
    alone = tap.isolated or tap.end_to_end
    ratio, row = _isolated_cells(tap)
    largest, gain = Text(figure(alone.largest)), Text(f"{alone.gain:+.1e}")
    over = alone.misrounded > limits.misrounded_limit(alone.elements)
    share = findings.percent(alone.misrounded) if alone.misrounded else ""
    misrounded = Text(share, style=STYLE["fails"] if over else "")
    return [ratio, row, largest, misrounded, _end_to_end_cell(tap), gain]


def _isolated_cells(tap: TapReport) -> tuple[Text, Text]:
    found = tap.isolated
    if found is None:
        return Text("-"), Text("-")
    return (
        _limited(found, found.ratio, limits.isolated_limit(found, tap.dtype)),
        _limited(found, found.row_ratio, limits.row_limit(found, tap.dtype)),
    )


def _end_to_end_cell(tap: TapReport) -> Text:
    if not tap.end_to_end.elements:
        return Text("-")
    return _limited(tap.end_to_end, tap.end_to_end.ratio, limits.end_to_end_limit(tap.end_to_end))


def _limited(found: Measure, value: float, limit: float) -> Text:
    """A figure, red if it is over its limit; NaN if the value has a NaN or infinity of its own."""
    if found.nonfinite:
        return Text("NaN", style=STYLE["fails"])
    return Text(figure(value), style=STYLE["fails"] if value > limit else "")


def _isolated_figure(tap: TapReport) -> str:
    return "" if tap.isolated is None else figure(tap.isolated.ratio)


def _summary_figures(report: Report) -> list[Text]:
    alone = max((tap for tap in report.taps if tap.isolated), key=findings.isolated_severity, default=None)
    if not report.taps:
        return [Text("-"), Text("-"), Text("")]
    after = max(report.taps, key=findings.end_to_end_severity)
    tokens = report.next_tokens
    flips = Text("") if tokens is None else Text(f"{len(tokens.flips)}/{tokens.positions}")
    if tokens is not None and tokens.defects:
        flips.stylize(STYLE["fails"])
    return [_isolated_cells(alone)[0] if alone is not None else Text("-"), _end_to_end_cell(after), flips]


def _where(report: Report) -> Text:
    """The first failure, or what was not seen, in few words."""
    if report.verdict == "incomplete":
        return Text(f": {_not_seen(report)}")
    if report.verdict == "holds":
        return Text("")
    if report.misbehaviour is not None:
        return Text(f": {report.misbehaviour.name}")
    first = report.first_failure
    return Text(": next tokens" if first is None else f": {formulas.spoken(first.name)}")


def _not_seen(report: Report) -> str:
    """What was not seen, in few words."""
    untested = sum(tap.verdict == "untested" for tap in report.taps)
    few = [said.partition(",")[0].partition(":")[0] for said in report.unseen]
    return "; ".join(few + [f"{count(untested, 'value')} untested"] * bool(untested))


# ----------------------------------------------------------------------------------------------- next tokens and shares


def _tokens(report: Report) -> list[tuple[str, Text]]:
    if report.next_tokens is None:
        return []
    agree, kl = findings.tokens_in_words(report)
    defects = report.next_tokens.defects
    style = STYLE["fails"] if defects else ""
    lines = [("next tokens", Text(agree, style=style)), ("", Text(kl))]
    shown = sorted(defects, key=lambda flip: -flip.sigmas)[:_FLIPS_SHOWN]
    return lines + [("", Text(flip_in_words(flip), style=style)) for flip in shown]


def flip_in_words(flip: Flip) -> str:
    """One changed token."""
    where = findings.row_place((flip.row, flip.position))
    return f"{where}: token {flip.exact} became {flip.candidate}, margin {figure(flip.sigmas)} sigma"


def _habits(report: Report) -> list[tuple[str, Text]]:
    """Where the candidate rounds."""
    return [("rounds" if i == 0 else "", Text(said)) for i, said in enumerate(findings.habits_in_words(report))]


def _format(report: Report) -> list[tuple[str, Text]]:
    """What the format of the candidate's own weights costs."""
    said = [] if report.format_error is None else report.format_error.in_words()
    return [("format" if i == 0 else "", Text(text)) for i, text in enumerate(said)]


def _attribution(report: Report) -> list[tuple[str, Text]]:
    """Where the predicted error of the last value comes from."""
    if not report.attribution or not report.last_value:
        return []
    layers = {label: sum(part.values()) for label, part in findings.by_layer(report).items()}
    return [
        ("sigma of", Text(f"{report.last_value} comes from {_shares(findings.by_operator(report))}")),
        ("", Text(_shares(dict(sorted(layers.items(), key=lambda item: -item[1]))))),
        ("", Text(_shares({formulas.spoken(name): share for name, share in report.attribution.items()}, 3))),
    ]


def _cautions(report: Report) -> list[tuple[str, Text]]:
    """What is untested, and what a reader should know."""
    said = [("ranks", said) for said in (*report.copies, *report.blamed)]
    said += [("incomplete", said) for said in report.unsaid]
    said += [("not seen", said) for said in report.unseen]
    said += [("untested", said) for said in findings.untested(report)] + [("note", note) for note in report.notes]
    return [(label, Text(text, style=STYLE["untested"])) for label, text in said]


def _shares(parts: dict[str, float], most: int = _CONTRIBUTORS) -> str:
    """The largest parts, and the rest in one."""
    shown = [(name, share) for name, share in parts.items() if share >= 0.005][:most]
    rest = sum(parts.values()) - sum(share for _, share in shown)
    said = [f"{name} {percent(share)}" for name, share in shown]
    return ", ".join(said + ([f"others {percent(rest)}"] if rest >= 0.005 else []))
