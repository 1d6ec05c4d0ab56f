"""Drawings as SVG text: boxes, arrows and words in the colours of the page, light or dark."""

import html
import math
from collections.abc import Mapping, Sequence

CHARACTER = 7.2  # the width of a character of 12 pixels in a font of fixed width


class Drawing:
    """A drawing that grows: parts, and how far they reach. title: what it shows, for those who cannot see it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []
        self.width = self.height = 0.0

    def box(self, x: float, y: float, width: float, height: float, kind: str = "") -> None:
        """A rectangle with a class of the style sheet."""
        self._reach(x + width, y + height)
        self.parts.append(
            f'<rect class="{kind or "box"}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>'
        )

    def words(self, x: float, y: float, text: str, at: str = "middle", kind: str = "") -> None:
        """A line of text; at: "start", "middle" or "end"."""
        self._reach(x + CHARACTER * len(text) / (2 if at == "middle" else 1) if at != "end" else x, y + 4)
        chosen = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{at}"{chosen}>{html.escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str = "flow") -> None:
        """A line through points; `flow` ends in an arrow."""
        self._reach(max(x for x, _ in points), max(y for _, y in points))
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def _reach(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)

    def svg(self) -> str:
        """The drawing; it shrinks where the page is narrow."""
        width, height = self.width + 10, self.height + 10
        arrow = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        )
        size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px"'
        return f'<svg {size} role="img" aria-label="{html.escape(self.title)}">{arrow}' + "".join(self.parts) + "</svg>"


_UNIT = {"E": 66, "F": 84, "V": 84, "D": 44, "T": 62, "N": 62, "S": 44, "R/2": 26, "*": 44, "(H+2K)D": 76}


def shapes(title: str, arguments: Mapping[str, Sequence[str]], results: Mapping[str, Sequence[str]]) -> str:
    """The arrays of an operator: those that it takes, an arrow, those that it gives. The last axis runs to the right,
    the one before it down, and others are drawn as sheets."""
    drawing = Drawing(f"the shapes of {title}")
    x, tallest = 8.0, 0.0
    for name, axes in arguments.items():
        x, height = _array(drawing, x, name, axes)
        tallest = max(tallest, height)
    middle = 34 + tallest / 2
    drawing.line([(x, middle), (x + 96, middle)])
    drawing.words(x + 48, middle - 8, "the way back" if title.endswith("_backward") else title, kind="strong")
    x += 112
    for name, axes in results.items():
        x, _ = _array(drawing, x, name, axes)
    return drawing.svg()


def _array(drawing: Drawing, x: float, name: str, axes: Sequence[str]) -> tuple[float, float]:
    *sheets, down, right = ["", "", *axes][-max(2, len(axes)) :]
    width, height = _UNIT.get(right, 40) if right else 14, _UNIT.get(down, 40) if down else 14
    label = max(len(name), 2) * CHARACTER + 8
    x += CHARACTER * len(down) + 4
    depth = 5 * min(3, len([axis for axis in sheets if axis]) + 1) if any(sheets) else 0
    for offset in range(depth, -1, -5):
        drawing.box(x + offset, 34 - offset + depth, width, height)
    drawing.words(x + width / 2, 34 + depth + height + 15, right)
    drawing.words(x - 4, 34 + depth + height / 2 + 4, down, at="end")
    if any(sheets):
        drawing.words(x + width + depth + 3, 34 + 8, " ".join(axis for axis in sheets if axis), at="start")
    drawing.words(x + width / 2, 20, name, kind="strong")
    extra = CHARACTER * len(" ".join(sheets)) + 6 if any(sheets) else 0
    return x + max(width + depth + extra, label) + 14, height + depth


def curves(
    lines: Mapping[str, Sequence[float]], across: Sequence[float], title: str, below: str, log: bool = False
) -> str:
    """Lines over the numbers `across`, with the largest and smallest value at the left. log: values as logarithms."""
    drawing, width, height = Drawing(title), 620.0, 200.0
    values = [v for line in lines.values() for v in line]
    low, high = min(values), max(values)
    place = (lambda v: math.log(v / low) / math.log(high / low)) if log else (lambda v: (v - low) / (high - low))
    left, right = min(across), max(across)
    drawing.box(60, 10, width, height)
    for index, (name, line) in enumerate(lines.items()):
        points = [
            (round(60 + width * (x - left) / (right - left), 1), round(10 + height * (1 - place(v)), 1))
            for x, v in zip(across, line, strict=True)
        ]
        drawing.line(points, "curve other" if index % 2 else "curve")
        drawing.words(
            72 + 190 * index, 26, f"{'- - ' if index % 2 else '--- '}{name}" if len(lines) > 1 else name, "start"
        )
    drawing.words(54, 20, f"{high:.2g}", "end")
    drawing.words(54, 10 + height, f"{low:.2g}", "end")
    drawing.words(60 + width / 2, height + 30, below)
    drawing.words(60, height + 30, f"{left:g}")
    drawing.words(60 + width, height + 30, f"{right:g}", "end")
    return drawing.svg()


def turns(vectors: Mapping[str, tuple[float, float]], title: str) -> str:
    """Vectors in the plane, each from the middle of one circle."""
    drawing, middle, radius = Drawing(title), 120.0, 84.0
    drawing.parts.append(f'<circle class="wire" cx="{middle:g}" cy="{middle:g}" r="{radius:g}"/>')
    for name, (x, y) in vectors.items():
        size = math.hypot(x, y)
        tip = middle + radius * x / size, middle - radius * y / size
        drawing.line([(middle, middle), (round(tip[0], 1), round(tip[1], 1))])
        drawing.words(
            round(middle + 1.22 * (tip[0] - middle), 1), round(middle + 1.22 * (tip[1] - middle) + 4, 1), name
        )
    drawing._reach(2 * middle, 2 * middle)
    return drawing.svg()
