"""Two charts of the rows of a result: how near each form comes to the ceiling, and where it stands under the roofline.

A form has the same colour and the same marker everywhere, so that nothing hangs on colour alone. Colours are those of
Okabe and Ito 2008, which stay apart for colour-blind readers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from refllm.bench.results import span

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vP*X"
# Form -> number of its colour, marker.
FORMS = {
    "triton": (0, "o"),
    "triton, step alone": (5, "P"),
    "plain": (2, "D"),
    "torch": (2, "D"),
    "torch, step alone": (7, "X"),
    "eager": (1, "s"),
    "transformers": (1, "s"),
    "compile": (4, "v"),
    "liger": (3, "^"),
    "sdpa math": (7, "X"),
    "sdpa flash": (5, "<"),
    "sdpa efficient": (2, ">"),
    "sdpa cudnn": (6, "p"),
}
OTHER = (6, "*")
DODGE = 1.05
"""Forms of one call stand side by side, by so much of their place."""

LITTLE = 0.05
"""A share below this is nothing to read off a linear axis."""

Row = dict[str, Any]


def title(result: dict[str, Any]) -> str:
    """Command, machine and date, as every picture has them."""
    machine = result["machine"]
    return f"refllm bench {result['bench']}, {machine['gpu'] or machine['processor']}, {result['date']}"


def largest(rows: Sequence[Row]) -> list[Row]:
    """The rows of every operator and layer at the size that moves the most bytes."""
    most: dict[tuple[str, str], Row] = {}
    for row in rows:
        call = row["what"], row["panel"]
        if call not in most or row["bytes"] > most[call]["bytes"]:
            most[call] = row
    return [row for row in rows if row["group"] == most[row["what"], row["panel"]]["group"]]


def split(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by what `key` says of them, in the order of their first one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def shares_figure(plt: Any, heading: str, rows: Sequence[Row], label: Callable[[Row], str]) -> Any:
    """Share of the ceiling of every form: a panel per layer, head size or model, a line per call, a marker per form.

    label: of the line of a row. At the right edge stands the time of this project's first form. Shares that a launch
    keeps far from any ceiling are drawn on a logarithmic axis.
    """
    panels = split(rows, lambda row: str(row["panel"]))
    labels = list(split(sorted(rows, key=_order), label))
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    size = (1.9 + 3.0 * columns, 1.5 + lines * (0.75 + 0.27 * len(labels)))
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, sharex=True)
    own = _in_order([row for row in rows if row["ours"]])
    for axes, (panel, some) in zip(grid.flat, panels.items(), strict=False):
        for row in some:
            place = labels.index(label(row))
            axes.plot(100 * row["figures"]["share"], place, zorder=3 + bool(row["ours"]), **_look(row))
            if row["form"] in own[:1]:
                text, edge = span(row["time"]["median"]), axes.get_yaxis_transform()
                axes.annotate(text, (1.0, place), (3, 0), edge, "offset points", va="center", fontsize=6)
        axes.set_title(panel, fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        _share_axis(axes, [row["figures"]["share"] for row in rows])
    below = f"% of the ceiling; at the right the time of {own[0]}" if own else "% of the ceiling"
    _end(plt, figure, grid, len(panels), heading, below, rows)
    return figure


def _share_axis(axes: Any, shares: Sequence[float]) -> None:
    """The axis goes from nothing to the ceiling; it is logarithmic if something is far below that."""
    low = min(shares)
    if low < LITTLE:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(80 * low if low < LITTLE else 0, 105 * max(1.0, *shares))
    axes.axvline(100, color="#444444", linewidth=0.8)
    axes.grid(True, color="#dddddd")
    axes.tick_params(labelsize=8)


def roofline_figure(
    plt: Any, heading: str, rows: Sequence[Row], panel: Callable[[Row], str], ceilings: dict[str, Any]
) -> Any:
    """TFLOP/s over flops per byte, a panel per kind of call (`panel` names it), with the ceilings that apply there."""
    panels = split(rows, panel)
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    size = (0.7 + 2.9 * columns, 1.3 + 2.55 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axes, (name, some) in zip(grid.flat, panels.items(), strict=False):
        _roofline(axes, some, ceilings)
        axes.set_title(name, fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s", fontsize=8)
    _end(
        plt,
        figure,
        grid,
        len(panels),
        heading,
        "flops per byte of the least traffic; lines: what this machine allows; forms of a call stand side by side",
        rows,
    )
    return figure


def _roofline(axes: Any, rows: Sequence[Row], ceilings: dict[str, Any]) -> None:
    from matplotlib import ticker

    intensity = [max(row["flops"] / row["bytes"], 1e-3) for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    bandwidth, peak = ceilings["copy_bytes_per_second"], ceilings["flops_per_second"].get(rows[0]["dtype"], math.inf)
    points = sorted({low, high, min(max(peak / bandwidth, low), high)})
    roof = [min(x * bandwidth, peak) / 1e12 for x in points]
    axes.plot(points, roof, color="#444444", linewidth=1)
    forms = _in_order(rows)
    reached = []
    for x, row in zip(intensity, rows, strict=True):
        reached.append(row["figures"]["flops_per_second"] / 1e12)
        moved = x * DODGE ** (forms.index(row["form"]) - (len(forms) - 1) / 2)
        axes.plot(moved, reached[-1], zorder=3 + bool(row["ours"]), **_look(row))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(reached) / 1.5, max(roof) * 1.5))
    for axis in (axes.xaxis, axes.yaxis):
        lowest, highest = axis.get_view_interval()
        subs = (1, 2, 5) if highest < 200 * lowest else (1,)
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=6))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, color="#dddddd")
    axes.tick_params(labelsize=7)


def _order(row: Row) -> list[int]:
    """The key that sorts calls on an axis: their sizes, so that 4096 comes before 16384."""
    return [row["sizes"].get(name, 0) for name in ("batch", "S", "B", "N")]


def _in_order(rows: Sequence[Row]) -> list[str]:
    """Forms of rows in the order of `FORMS`; unknown ones behind."""
    return sorted(
        {row["form"] for row in rows}, key=lambda form: (list(FORMS).index(form) if form in FORMS else 99, form)
    )


def _look(row: Row) -> dict[str, Any]:
    """Ours filled, peers hollow."""
    number, marker = FORMS.get(row["form"], OTHER)
    fill = {"markerfacecolor": COLOURS[number] if row["ours"] else "none", "markeredgecolor": COLOURS[number]}
    return {"marker": marker, "linestyle": "", "markersize": 5.5, "markeredgewidth": 1.1, **fill}


def _end(plt: Any, figure: Any, grid: Any, used: int, heading: str, below: str, rows: Sequence[Row]) -> None:
    """Heading above, what the axes mean and who is who below, at a fixed distance whatever the size of the figure."""
    for axes in grid.flat[used:]:
        axes.set_visible(False)
    for axes in grid.flat[:used]:
        axes.tick_params(labelbottom=True)
    inch = 1 / figure.get_size_inches()[1]
    figure.tight_layout(rect=(0.005, 0.62 * inch, 0.99, 1 - 0.3 * inch))
    figure.suptitle(heading, fontsize=10, y=1 - 0.06 * inch, va="top")
    figure.text(0.5, 0.42 * inch, below, ha="center", fontsize=8)
    looks = {row["form"]: _look(row) for row in rows}
    handles = [plt.Line2D([], [], label=form, **looks[form]) for form in _in_order(rows)]
    columns = min(len(handles), 8)
    figure.legend(handles=handles, loc="lower center", ncol=columns, fontsize=8, frameon=False, borderaxespad=0.2)
