"""The geometry of a page's charts: numbers in, coordinates and data URIs out. The template draws them."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from refllm.accuracy import limits
from refllm.check import findings
from refllm.check.error_map import column_edges
from refllm.check.oracle import Report, TapReport

WIDTH, HEIGHT = 1160.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 10.0, 14.0, 34.0
_LINEAR_TO = 4.0  # sigma; what goes beyond is drawn on a logarithmic scale
_LEAST = 0.1  # the bottom of the logarithmic scale
_LABEL_WIDTH = 52.0


@dataclass(frozen=True)
class Scale:
    """Sigma -> y. Linear while everything is small, else logarithmic; what is beyond is drawn at the edge."""

    top: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> "Scale":
        finite = [value for value in values if math.isfinite(value)]
        largest = max(finite, default=1.0)
        if largest <= _LINEAR_TO and len(finite) == len(values):
            return cls(max(2.5, 1.1 * largest), False)
        return cls(10.0 ** math.ceil(math.log10(max(10.0, 1.5 * largest))), True)

    def y(self, value: float) -> float:
        """The coordinate of a value."""
        if math.isnan(value) or value >= self.top:
            share = 1.0
        elif not self.logarithmic:
            share = value / self.top
        else:
            share = math.log(max(value, _LEAST) / _LEAST) / math.log(self.top / _LEAST)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """(y, label) of the grid lines."""
        if not self.logarithmic:
            step = 0.5 if self.top < 3.5 else 1.0
            values = [step * i for i in range(int(self.top / step) + 1)]
        else:
            values = [10.0**e for e in range(round(math.log10(_LEAST)), round(math.log10(self.top)) + 1)]
        return [(self.y(value), f"{value:g}") for value in values]


@dataclass(frozen=True)
class Slot:
    """One tap in the layer chart. x, width: of its slot; bar, dot: y of the two errors; title: for the pointer."""

    index: int
    x: float
    width: float
    bar: float | None
    bar_fails: bool
    dot: float
    dot_fails: bool
    title: str


@dataclass(frozen=True)
class LayerChart:
    """Errors in sigma along the computation: a bar per tap on its own inputs, a line end to end, and the limits."""

    slots: list[Slot]
    line: str
    isolated_limit: str
    end_to_end_limit: str
    bands: list[tuple[float, float, str]]
    ticks: list[tuple[float, str]]
    logarithmic: bool
    bottom: float = HEIGHT - _BOTTOM


def layer_chart(report: Report) -> LayerChart:
    """The chart of a report with at least one tap."""
    taps = report.taps
    step = (WIDTH - _LEFT - _RIGHT) / len(taps)
    isolated = [math.inf if t.isolated.nonfinite else t.isolated.ratio for t in taps if t.isolated]
    end_to_end = [math.inf if t.end_to_end.nonfinite else t.end_to_end.ratio for t in taps]
    scale = Scale.of([*isolated, *end_to_end])
    slots = [_slot(i, tap, _LEFT + i * step, step, scale) for i, tap in enumerate(taps)]
    alone = [limits.isolated_limit(t.isolated or t.end_to_end, t.dtype) for t in taps]
    after = [limits.end_to_end_limit(t.end_to_end) for t in taps]
    return LayerChart(
        slots=slots,
        line=" ".join(f"{slot.x + step / 2:.1f},{slot.dot}" for slot in slots),
        isolated_limit=_steps([scale.y(value) for value in alone], step),
        end_to_end_limit=_steps([scale.y(value) for value in after], step),
        bands=_bands(report, step),
        ticks=scale.ticks(),
        logarithmic=scale.logarithmic,
    )


def _slot(index: int, tap: TapReport, x: float, width: float, scale: Scale) -> Slot:
    alone, after = tap.isolated, tap.end_to_end
    said = [tap.name, f"end to end {'NaN' if after.nonfinite else findings.figure(after.ratio)} sigma"]
    bar = None
    if alone is not None:
        bar = scale.y(math.inf if alone.nonfinite else alone.ratio)
        said.insert(1, f"own inputs {'NaN' if alone.nonfinite else findings.figure(alone.ratio)} sigma")
    return Slot(
        index=index,
        x=round(x, 2),
        width=round(width, 2),
        bar=bar,
        bar_fails=tap.defect_here,
        dot=scale.y(math.inf if after.nonfinite else after.ratio),
        dot_fails=findings.end_to_end_severity(tap) > 1,
        title=", ".join(said),
    )


def _steps(heights: list[float], step: float) -> str:
    """Points of a line that is flat over each slot."""
    return " ".join(f"{_LEFT + (i + side) * step:.1f},{y}" for i, y in enumerate(heights) for side in (0, 1))


def _bands(report: Report, step: float) -> list[tuple[float, float, str]]:
    """(x, width, label) of every layer; only so many labels as fit."""
    found, x = [], _LEFT
    layers = [group for group in findings.groups(report) if group.layer is not None]
    every = max(1, math.ceil(_LABEL_WIDTH * len(layers) / (WIDTH - _LEFT - _RIGHT)))
    for group in findings.groups(report):
        width = step * len(group.taps)
        if group.layer is not None:
            found.append((round(x, 2), round(width, 2), group.label if group.layer % every == 0 else ""))
        x += width
    return found


@dataclass(frozen=True)
class HeatMap:
    """Where the error of a tap lies. image: a PNG as a data URI, positions downwards; labels along its edges."""

    name: str
    image: str
    positions: int
    across: str
    columns: list[str]
    largest: str


def heat_map(tap: TapReport) -> HeatMap | None:
    """The picture of a tap's error; None where no error is predicted."""
    if tap.zmap is None:
        return None
    positions, heads, channels = (tap.isolated or tap.end_to_end).shape
    of_heads, _ = column_edges(heads, channels)
    noun = findings.last_axis(tap.name)
    if heads > 1:
        columns = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(of_heads)]
        across = f"heads, each {noun} 0 to {channels - 1}"
    else:
        columns = ["0", f"{channels - 1}"]
        across = f"{noun}s"
    image = png(colours(tap.zmap, limits.ROW[tap.dtype]))
    finite = tap.zmap[np.isfinite(tap.zmap)]
    largest = f"{findings.figure(float(finite.max(initial=0)))} \N{GREEK SMALL LETTER SIGMA}"
    if finite.size < tap.zmap.size:
        largest = "NaN or infinity; else " + largest
    return HeatMap(tap.name, image, positions, across, columns, largest)


_CALM, _ALARM = (59, 111, 182), ((240, 160, 60), (214, 40, 40), (110, 0, 60))
_NONFINITE = (230, 0, 230, 255)


def colours(ratio: np.ndarray, limit: float) -> np.ndarray:
    """[rows, columns] -> RGBA: blue that grows denser up to the limit, then orange to dark red; NaN is magenta.

    Below the limit the page shows through, so that the picture serves on light and dark.
    """
    out = np.empty((*ratio.shape, 4), np.uint8)
    finite = np.isfinite(ratio)
    value = np.where(finite, ratio, 0.0)
    out[..., :3] = _CALM
    out[..., 3] = np.round(255 * (0.04 + 0.6 * np.clip(value / limit, 0, 1)))
    beyond = value > limit
    share = np.clip(np.log(np.maximum(value, limit) / limit) / math.log(100), 0, 1)  # 1 at 100 limits
    stops = np.linspace(0, 1, len(_ALARM))
    for channel in range(3):
        out[..., channel] = np.where(
            beyond, np.interp(share, stops, [colour[channel] for colour in _ALARM]), out[..., channel]
        )
    out[beyond, 3] = 255
    out[~finite] = _NONFINITE
    return out


def png(rgba: np.ndarray) -> str:
    """A data URI with an image [rows, columns, 4] of bytes. Source: the PNG specification, colour type 6, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = rgba.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), rgba.reshape(height, -1)], axis=1)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


@dataclass(frozen=True)
class Column:
    """The parts of the predicted variance that one layer adds. parts: (operator, y, height, share)."""

    label: str
    x: float
    width: float
    parts: list[tuple[str, float, float, float]]
    share: float
    shown: bool


@dataclass(frozen=True)
class ShareChart:
    """Attribution: a column per layer, stacked by operator."""

    columns: list[Column]
    ticks: list[tuple[float, str]]
    height: float = 220.0


def share_chart(report: Report) -> ShareChart | None:
    """The chart of a report's attribution; None if it has none."""
    layers = findings.by_layer(report)
    if not layers or not any(report.attribution.values()):
        return None
    bottom, full = 190.0, 176.0
    top = max(sum(parts.values()) for parts in layers.values())
    step = (WIDTH - _LEFT - _RIGHT) / len(layers)
    width = min(0.7 * step, 64.0)
    every = max(1, math.ceil(_LABEL_WIDTH * len(layers) / (WIDTH - _LEFT - _RIGHT)))
    columns = []
    for i, (label, parts) in enumerate(layers.items()):
        y, stacked = bottom, []
        for operator, share in sorted(parts.items(), key=lambda item: -item[1]):
            height = full * share / top
            y -= height
            stacked.append((operator, round(y, 2), round(height, 2), share))
        x = _LEFT + i * step + (step - width) / 2
        number = label.removeprefix("layer ")
        shown = not number.isdecimal() or int(number) % every == 0
        columns.append(Column(label, round(x, 2), round(width, 2), stacked, sum(parts.values()), shown))
    ticks = [(round(bottom - full * share, 2), findings.percent(share * top)) for share in (0.0, 0.5, 1.0)]
    return ShareChart(columns, ticks)
