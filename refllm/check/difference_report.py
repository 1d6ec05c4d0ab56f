"""The table of `refllm diff`."""

from rich.console import Group, RenderableType
from rich.text import Text

from refllm.check.difference import Difference, TapDifference
from refllm.terminal.fitted_table import Table


def show_difference(found: Difference) -> RenderableType:
    """A line per value in common, in order of computation; then what only one trace has."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("value", "difference", "largest", "over 1 ulp", "differ", "of"):
        table.add_column(column, justify="left" if column == "value" else "right", no_wrap=True)
    for tap in found.taps:
        table.add_row(*_cells(tap), style="" if tap.differing else "dim")
    lines: list[RenderableType] = [Text.assemble((found.first, "bold"), " against ", (found.second, "bold")), table]
    for names, source in ((found.only_first, found.first), (found.only_second, found.second)):
        if names:
            lines.append(Text(f"only in {source}: {len(names)} values, first {names[0]}", style="yellow"))
    first = found.first_difference
    if first is None:
        lines.append(Text("identical, bit for bit", style="green"))
    else:
        lines.append(Text(f"first difference: {first.name} at {list(first.at)}", style="bold"))
    note = f"difference is rms over the first's rms; ulp are those of {found.dtype}; padding is left out"
    return Group(*lines, Text(note, style="dim"))


def _cells(tap: TapDifference) -> list[str]:
    over = sum(tap.ulps[3:])
    return [
        tap.name,
        f"{tap.relative:.1e}" if tap.differing else "0",
        f"{tap.largest:.1e}" + (f" +{tap.nonfinite} NaN/inf" if tap.nonfinite else "") if tap.differing else "",
        str(over) if over else "",
        str(tap.differing),
        str(tap.elements),
    ]
