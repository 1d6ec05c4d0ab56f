"""Pictures of a result, as PNG and SVG: a roofline and a bar chart, or lines of growth. Needs matplotlib.

Colours are those of Okabe and Ito 2008, which stay apart for colour-blind readers; every series has a marker or a
hatching of its own too, so that nothing hangs on colour alone.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from refllm.bench.results import span
from refllm.errors import InputError, MissingExtraError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vP*X"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
LABELS = {
    "prefill": ("tokens of the prompt", "time"),
    "decode": ("tokens before", "time per token"),
    "check": ("layers", "time"),
}


def pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises MissingExtraError."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        command = "pip install 'refllm[bench]'"
        raise MissingExtraError(f"--plots needs matplotlib; install it with: {command}") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "refllm", "font.size": 9, "axes.axisbelow": True})
    return plt


def write_plots(result: dict[str, Any], folder: Path, stem: str = "") -> list[Path]:
    """The pictures of a result in `folder`: STEM-roofline and STEM-bars, or STEM for growth. Returns the files.

    stem: of the files' names; "" for that of the benchmark. A result in which nothing was timed has no pictures.
    Raises InputError if the folder cannot be written, MissingExtraError without matplotlib.
    """
    plt = pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plots {folder} cannot be made a folder: {error.strerror or error}") from None
    name = stem or result["bench"]
    if result["bench"] == "growth":
        return _save(plt, growth_figure(plt, result), folder / name)
    rows = [row for row in result["rows"] if row["time"]]
    if not rows:
        return []
    if result["bench"] == "kernels":  # many calls: one size of each is enough for a picture
        rows = _largest(rows)
    files = _save(plt, roofline_figure(plt, result, rows), folder / f"{name}-roofline")
    return files + _save(plt, bar_figure(plt, result, rows), folder / f"{name}-bars")


def _save(plt: Any, figure: Any, stem: Path) -> list[Path]:
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        # No date: the same result makes the same file.
        figure.savefig(file, dpi=130, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"refllm bench {result['bench']}, {machine['gpu'] or machine['processor']}, {result['date']}"


def roofline_figure(plt: Any, result: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    """Flops per second over flops per byte: the ceilings as lines, a point per row; colour and marker by what it is."""
    figure, axes = plt.subplots(figsize=(9, 5.2))
    ceilings = result["ceilings"]
    bandwidth = ceilings["copy_bytes_per_second"]
    intensity = [max(row["flops"] / row["bytes"], 1e-3) for row in rows]
    low, high = 0.5 * min(intensity), 2 * max(intensity)
    for index, (dtype, peak) in enumerate(ceilings["flops_per_second"].items()):
        if dtype not in {row["dtype"] for row in rows}:
            continue
        high = max(high, 4 * peak / bandwidth)
        points = [low, peak / bandwidth, high]
        label = f"ceiling: {bandwidth / 1e9:,.0f} GB/s copy, {peak / 1e12:,.3g} TFLOP/s {dtype}"
        style = ("-", "--", ":")[index % 3]
        axes.plot(points, [min(x * bandwidth, peak) / 1e12 for x in points], style, color="#444444", label=label)
    names = list(dict.fromkeys((row["what"], row["ours"]) for row in rows))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    for what, ours in names:
        number = kinds.index(what)
        some = [
            (x, row["figures"]["flops_per_second"] / 1e12)
            for x, row in zip(intensity, rows, strict=True)
            if (row["what"], row["ours"]) == (what, ours)
        ]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            *zip(*some, strict=True),
            linestyle="",
            marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
            markersize=7 if ours else 4.5,
            markerfacecolor=colour if ours else "none",
            markeredgecolor=colour,
            alpha=0.9 if ours else 0.6,
            label=f"{what}, {'refllm' if ours else 'peers'}",
        )
    axes.set(xscale="log", yscale="log", xlabel="flops per byte (least traffic)", ylabel="TFLOP/s", xlim=(low, high))
    axes.set_title(_title(result), fontsize=10)
    axes.grid(True, which="major", color="#dddddd")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def bar_figure(plt: Any, result: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    """Share of the ceiling for every form: a panel per layer, head size or model; of each call the largest size."""
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    charts = {panel: _bars(result["bench"], [row for row in rows if row["panel"] == panel]) for panel in panels}
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(sum(len(bars) + 1 for bars in chart.values()) for chart in charts.values())
    height = 0.9 + lines * (0.9 + 0.135 * tallest)
    figure, grid = plt.subplots(lines, columns, figsize=(1.5 + 3.6 * columns, height), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_bars(axes, panel, charts[panel], forms)
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=COLOURS[i % 8], hatch=HATCHES[i % 8], edgecolor="white")
        for i in range(len(forms))
    ]
    figure.suptitle(_title(result), fontsize=10, y=1 - 0.05 / height, va="top")
    figure.tight_layout(rect=(0, 0.4 / height, 1, 1 - 0.25 / height))
    figure.legend(handles, forms, loc="lower center", ncol=min(len(forms), 5), fontsize=8, frameon=False)
    return figure


def _largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every operator and layer at the size that moves the most bytes."""
    most: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        call = row["what"], row["panel"]
        if call not in most or row["bytes"] > most[call]["bytes"]:
            most[call] = row
    return [row for row in rows if row["group"] == most[row["what"], row["panel"]]["group"]]


def _bars(bench: str, rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    """Label of a call -> (form, share of the ceiling)."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        label = row["what"] if bench == "kernels" else f"{row['what']}\n{row['group']}"
        found.setdefault(label, []).append((row["form"], row["figures"]["share"]))
    return found


def _draw_bars(axes: Any, panel: str, chart: dict[str, list[tuple[str, float]]], forms: list[str]) -> None:
    place, ticks, longest = 0.0, [], max(share for bars in chart.values() for _, share in bars)
    for label, bars in chart.items():
        start = place
        for form, share in bars:
            i = forms.index(form) % 8
            axes.barh(
                place, 100 * share, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", height=0.9, linewidth=0
            )
            axes.text(100 * (share + 0.01 * longest), place, f"{100 * share:.3g}", va="center", fontsize=6)
            place += 1
        ticks.append(((start + place - 1) / 2, label))
        place += 0.8
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_ylim(place - 0.5, -1.0)
    axes.set_xlim(0, 114 * longest)
    axes.set_xlabel("% of the ceiling", fontsize=8)
    axes.set_title(panel, fontsize=9)
    axes.grid(True, axis="x", color="#dddddd")
    axes.tick_params(axis="x", labelsize=7)


def growth_figure(plt: Any, result: dict[str, Any]) -> Any:
    """Log-log: a panel per measure, a line per side with its exponent; bars, the range of a point; dashed, the fit."""
    from matplotlib import ticker

    kinds = list(dict.fromkeys(one["what"] for one in result["series"]))
    figure, grid = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.8), squeeze=False)
    sides = list(dict.fromkeys(one["side"] for one in result["series"]))
    settings = result["settings"]
    for axes, what in zip(grid.flat, kinds, strict=True):
        for one in (one for one in result["series"] if one["what"] == what):
            i = sides.index(one["side"])
            label = f"{one['side']}: $n^{{{one['exponent']:.2f}}}$, at the end $n^{{{one['exponent_at_the_end']:.2f}}}$"
            low, high = (np.abs(np.subtract(one[end], one["seconds"])) for end in ("lowest", "highest"))
            style = {"marker": MARKERS[i], "color": COLOURS[i], "linestyle": "", "capsize": 2, "elinewidth": 1}
            axes.errorbar(one["n"], one["seconds"], yerr=[low, high], label=label, **style)
            fit = [one["factor"] * n ** one["exponent"] for n in one["n"]]
            axes.plot(one["n"], fit, linestyle="--", linewidth=1, color=COLOURS[i])
        axes.set(xscale="log", yscale="log", xlabel=LABELS[what][0], ylabel=LABELS[what][1])
        axes.set_title(f"{what}, {settings['check_shape' if what == 'check' else 'shape']}", fontsize=9)
        ns = next(one["n"] for one in result["series"] if one["what"] == what)
        axes.set_xticks(ns, [str(n) for n in ns], fontsize=7)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda seconds, _: span(seconds))
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(True, which="major", color="#dddddd")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
        axes.legend(fontsize=7, loc="upper left")
    figure.suptitle(f"{_title(result)}, float32", fontsize=10)
    figure.tight_layout()
    return figure
