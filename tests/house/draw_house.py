"""Draws docs/house.svg: the rooms on their storeys (pyproject.toml) and who imports whom. Run by `make house`.

Of the imports only those are drawn that no longer way implies: where bench imports check and check imports accuracy, an
arrow from bench to accuracy would say nothing new. Arrows point down, so a long one passes storeys in between: on each
it gets a gap of its own between the rooms, and rooms and gaps are sorted so that arrows cross little.
"""

import ast
import tomllib
from collections.abc import Iterable
from itertools import pairwise

from installed_layout import ROOT, modules

PICTURE = ROOT / "docs" / "house.svg"
Edge = tuple[str, str]
Point = tuple[float, float]
WIDTH, STEP, BOX, GAP = 700, 76, (104, 34), 22
"""Of the picture, from storey to storey, of a room's box, and of what an arrow needs where it passes a storey."""


def storeys() -> list[list[str]]:
    """The rooms of each storey, from the top."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(rule["layers"] for rule in rules if rule["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def imports() -> set[Edge]:
    """(room, room that it imports), imports inside functions counted. refllm itself, the front door, is no room."""
    known = {".".join(installed.with_suffix("").parts).removesuffix(".__init__") for installed, _ in modules()}
    found = set()
    for installed, file in modules():
        room = installed.with_suffix("").parts[1]
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "refllm" and len(parts) > 1 and f"refllm.{parts[1]}" in known and parts[1] != room:
                    found.add((room, parts[1]))
    return found


def needed(edges: set[Edge]) -> set[Edge]:
    """Without those that a longer way implies."""
    below: dict[str, set[str]] = {}

    def reached(room: str) -> set[str]:
        if room not in below:
            below[room] = set()
            for above, imported in edges:
                if above == room:
                    below[room] |= {imported, *reached(imported)}
        return below[room]

    return {(a, b) for a, b in edges if not any(b in reached(c) for other, c in edges if other == a and c != b)}


def places(
    rows: list[list[str]], edges: Iterable[Edge]
) -> tuple[dict[str, tuple[float, float]], dict[Edge, list[str]]]:
    """Name -> the middle of its box or gap; edge -> the names that its arrow goes through, both ends included."""
    row_of = {name: index for index, row in enumerate(rows) for name in row}
    rows, ways = [list(row) for row in rows], {}
    for a, b in sorted(edges):
        gaps = [f"{a} {b} {index}" for index in range(row_of[a] + 1, row_of[b])]
        for index, gap in enumerate(gaps, row_of[a] + 1):
            rows[index].append(gap)
        ways[a, b] = [a, *gaps, b]
    beside: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for way in ways.values():
        for one, next_one in pairwise(way):
            beside[one].append(next_one)
            beside[next_one].append(one)
    x = {name: 0.0 for row in rows for name in row}
    for _ in range(40):  # each towards the mean of its neighbours; then the row is spread without overlap
        for row in rows:
            row.sort(key=lambda name: (sum(x[n] for n in beside[name]) / max(len(beside[name]), 1), name))
            _spread(row, x)
    middle = (min(x.values()) + max(x.values())) / 2
    y = {name: STEP * index + STEP / 2 + 8 for index, row in enumerate(rows) for name in row}
    return {name: (x[name] - middle + WIDTH / 2, y[name]) for name in x}, ways


def _spread(row: list[str], x: dict[str, float]) -> None:
    widths = [GAP if " " in name else BOX[0] + 16 for name in row]
    left = -sum(widths) / 2
    for name, width in zip(row, widths, strict=True):
        x[name] = left + width / 2
        left += width


def picture() -> str:
    """The picture as SVG, and nothing that changes while the rooms and their imports stay."""
    rows, edges = storeys(), needed(imports())
    where, ways = places(rows, edges)
    height = STEP * len(rows) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The rooms of refllm, and who imports whom</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for index in range(len(rows)):
        shade = "#f3f5f8" if index % 2 else "#fafbfc"
        lines.append(f'<rect x="8" y="{8 + STEP * index}" width="{WIDTH - 16}" height="{STEP}" fill="{shade}"/>')
    for edge in sorted(ways):
        path = _curve([where[name] for name in ways[edge]])
        lines.append(f'<path d="{path}" fill="none" stroke="#667" stroke-width="1.2" marker-end="url(#tip)"/>')
    for name in sorted(room for row in rows for room in row):
        (x, y), (width, height) = where[name], BOX
        lines.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width}" height="{height}" rx="5" '
            f'fill="#e3ecfa" stroke="#35507a"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" font-size="14" text-anchor="middle" fill="#12233d">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _curve(points: list[Point]) -> str:
    """From the lower edge of the first box to the upper edge of the last, upright at every storey."""
    (x, y), (last_x, last_y) = points[0], points[-1]
    points = [(x, y + BOX[1] / 2), *points[1:-1], (last_x, last_y - BOX[1] / 2)]
    steps = [f"M{points[0][0]:.0f} {points[0][1]:.0f}"]
    for (x, y), (to_x, to_y) in pairwise(points):
        half = (y + to_y) / 2
        steps.append(f"C{x:.0f} {half:.0f} {to_x:.0f} {half:.0f} {to_x:.0f} {to_y:.0f}")
    return "".join(steps)


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(f"{PICTURE.relative_to(ROOT)}: {sum(map(len, storeys()))} rooms")
