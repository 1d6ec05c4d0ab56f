"""A table that loses nothing on a narrow terminal."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column
from rich.table import Table as RichTable

_PROSE = 20
"""Columns that text of several words is given before it is broken into lines."""


class Table(RichTable):
    """Rich's table, but for one that is too wide: Rich cuts cells off, as in "hol...", or breaks numbers.

    Here the columns move nearer to each other first; if that is not enough, the table is shown in parts, one below the
    other, each with the first column. Text and headings are broken between their words, numbers and names never.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        measured = [self._widths(column, console, options) for column in self.columns]
        wanted = [width for _, _, width in measured]
        gap = self.padding[1] + self.padding[3]
        room = options.max_width - (0 if self.box is None else len(wanted) + 1)
        if sum(wanted) + gap * len(wanted) <= room:
            yield from super().__rich_console__(console, options)
            return
        least = [width for _, width, _ in measured]
        if sum(least) + gap * len(least) > room:
            gap = min(1, gap)
        for number, part in enumerate(_parts(least, room, gap)):
            if number:
                yield ""
            widths = _given([measured[index] for index in part], room - gap * len(part))
            yield from self._with(part, widths, gap, number == 0).plainly(console, options)

    def plainly(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What Rich itself would show."""
        return super().__rich_console__(console, options)

    def _widths(self, column: Column, console: Console, options: ConsoleOptions) -> tuple[int, int, int]:
        """Three widths: in which no word is broken, in which text has room, and in which nothing is broken at all."""
        endless = options.update(width=1 << 16)
        head = Measurement.get(console, endless, column.header)
        cells = [Measurement.get(console, endless, cell) for cell in column.cells]
        widest = max((cell.maximum for cell in cells), default=0)
        word = max((cell.minimum for cell in cells), default=0)
        if column.no_wrap or column.justify == "right":
            word = widest
        least = max(word, head.minimum, min(widest, _PROSE))
        return max(word, head.minimum), least, max(widest, head.maximum)

    def _with(self, part: Sequence[int], widths: Sequence[int], gap: int, first: bool) -> "Table":
        """A table of some of the columns."""
        table = Table(
            title=self.title if first else None,
            title_justify=self.title_justify,
            box=self.box,
            padding=(0, gap, 0, 0),
            pad_edge=self.pad_edge,
            show_edge=self.show_edge,
            show_header=self.show_header,
            header_style=self.header_style,
        )
        chosen = [self.columns[index] for index in part]
        for column, width in zip(chosen, widths, strict=True):
            table.add_column(column.header, justify=column.justify, overflow="fold", width=width)
        for row in zip(*(column.cells for column in chosen), strict=True):
            table.add_row(*row)
        return table


def _parts(widths: Sequence[int], room: int, gap: int) -> list[list[int]]:
    """Which columns stand side by side: as many as fit, beside the first."""
    parts: list[list[int]] = [[0]]
    for index in range(1, len(widths)):
        if sum(widths[i] + gap for i in (*parts[-1], index)) > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _given(measured: Sequence[tuple[int, int, int]], room: int) -> list[int]:
    """The widths of columns: the least that each needs, and what is left to the first that wants more."""
    fits = sum(least for _, least, _ in measured) <= room
    start = [least if fits else word for word, least, _ in measured]
    given, left = [], max(0, room - sum(start))
    for least, (_, _, wanted) in zip(start, measured, strict=True):
        more = min(left, max(0, wanted - least))
        given.append(min(least + more, max(1, room)))
        left -= more
    return given
