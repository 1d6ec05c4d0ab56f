"""Rows of `refllm bench kernels | attention | decode | prefill` as tables for a terminal."""

from typing import Any

from rich.console import Group, RenderableType

from refllm.bench.results import span, speed
from refllm.terminal.fitted_table import Table


def show_result(result: dict[str, Any]) -> RenderableType:
    """Ceilings, a table per panel, what was left out, findings, and the verdict."""
    machine, ceilings = result["machine"], result["ceilings"]
    products = ", ".join(f"{rate / 1e12:,.3g} TFLOP/s {dtype}" for dtype, rate in ceilings["flops_per_second"].items())
    parts: list[RenderableType] = [
        f"{machine['gpu'] or machine['processor']}: copy {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s, product "
        f"{products}, launch {span(ceilings['launch_seconds'])} "
        f"({span(ceilings['launch_from_python_seconds'])} from Python)",
        "",
    ]
    for panel in dict.fromkeys(row["panel"] for row in result["rows"]):
        parts += [_table(panel, [row for row in result["rows"] if row["panel"] == panel]), ""]
    if result["left_out"]:
        parts.append(f"left out, for want of time (--minutes): {len(result['left_out'])}")
        parts += [f"  {name}" for name in result["left_out"][:5]] + (["  ..."] if len(result["left_out"]) > 5 else [])
    findings = [row for row in result["rows"] if row["finding"]]
    parts += [f"{row['what']}, {row['panel']}, {row['group']}, {row['form']}: {row['finding']}" for row in findings]
    timed = sum(row["time"] is not None for row in result["rows"])
    parts.append(f"{result['verdict']}: {timed} of {len(result['rows'])} timed, {result['seconds']} s")
    return Group(*parts)


def _table(panel: str, rows: list[dict[str, Any]]) -> RenderableType:
    """The timed rows of a panel, and below them why the others were not timed."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=panel, title_justify="left")
    for index, name in enumerate(("", "", "by", "median", "p20 .. p80", "", "of the ceiling", "")):
        table.add_column(name, justify="left" if index < 3 or index == 7 else "right", no_wrap=index < 7)
    seen: tuple[str, str] | None = None
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        time, figures = row["time"], row["figures"]
        if time is None:
            reasons[row["form"], row["note"]] = reasons.get((row["form"], row["note"]), 0) + 1
            continue
        call = (row["what"], row["group"])
        names = call if call != seen else ("", "")
        seen = call
        share = f"{100 * figures['share']:.3g} % ({figures['bound']})"
        around = f"{span(time['p20'])} .. {span(time['p80'])}"
        table.add_row(*names, row["form"], span(time["median"]), around, speed(row), share, row["note"])
    lines = [f"{form}, {count} {_calls(count)}: {note}" for (form, note), count in reasons.items()]
    return Group(table, *lines)


def _calls(count: int) -> str:
    return "call" if count == 1 else "calls"
