"""Pictures of a result, as PNG and SVG: shares of the ceilings and a roofline, or lines of growth. Needs matplotlib."""

import io
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.bench.charts import COLOURS, MARKERS, largest, roofline_figure, shares_figure, split, title
from refllm.bench.results import span
from refllm.storage import output_file

LABELS = {
    "prefill": ("tokens of the prompt", "time"),
    "decode": ("tokens before", "time per token"),
    "check": ("layers", "time"),
}


def pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises MissingExtraError."""
    extras.require("--plots", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "refllm", "font.size": 9, "axes.axisbelow": True})
    return plt


def write_plots(result: dict[str, Any], folder: Path, stem: str = "") -> list[Path]:
    """The pictures of a result in `folder`: STEM-roofline and STEM-shares-..., or STEM for growth. Returns the files.

    stem: of the files' names; "" for that of the benchmark. A result in which nothing was timed has no pictures.
    Raises InputError if the folder cannot be written, MissingExtraError without matplotlib.
    """
    plt = pyplot()
    output_file.must_be_folder("--plots", folder)
    name = stem or result["bench"]
    if result["bench"] == "growth":
        return _save(plt, growth_figure(plt, result), folder / name)
    rows = [row for row in result["rows"] if row["time"]]
    files = []
    for part, figure in _figures(plt, result, rows) if rows else ():
        files += _save(plt, figure, folder / f"{name}-{part}")
    return files


def _figures(plt: Any, result: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(end of the file's name, figure): shares, one for each size or kind of call, and a roofline."""
    kernels = result["bench"] == "kernels"
    if result["bench"] == "attention":  # rows come in the order of their importance
        rows = sorted(rows, key=lambda row: row["sizes"]["D"])
    for kind, some in split(rows, itemgetter("group" if kernels else "what")).items():
        heading, label = f"{title(result)}: {kind}", itemgetter("what" if kernels else "group")
        yield f"shares-{'-'.join(kind.split())}", shares_figure(plt, heading, some, label)
    panel = (
        (lambda row: f"{row['what']}\n{row['group']}") if kernels else (lambda row: f"{row['what']}\n{row['panel']}")
    )
    shown = largest(rows) if kernels else rows
    yield "roofline", roofline_figure(plt, title(result), shown, panel, result["ceilings"])


def _save(plt: Any, figure: Any, stem: Path) -> list[Path]:
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        # No date: the same result makes the same file.
        about = {"Date": None} if file.suffix == ".svg" else None
        picture = io.BytesIO()
        figure.savefig(picture, format=file.suffix[1:], dpi=130, bbox_inches="tight", metadata=about)
        output_file.write("--plots", file, picture.getvalue())
    plt.close(figure)
    return files


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
    figure.suptitle(f"{title(result)}, float32", fontsize=10)
    figure.tight_layout()
    return figure
