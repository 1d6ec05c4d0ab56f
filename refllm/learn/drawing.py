"""What the coach says, on a terminal: the failing call as a small table with the wrong cells marked, then in words."""

from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from refllm.learn.coach import Drawn, Named, Review
from refllm.learn.exercise import STAGES, Exercise

_ROWS, _COLUMNS = 8, 6
_ALIKE = 1e-4
_OF_ERRORS = {
    "OutOfBoundsError": "follow the lanes of that program in that line: which elements do they touch, and which exist?",
    "RaceError": "which elements does each program store? Two programs, or two lanes, have the same one",
    "UninitializedError": "who writes what that line reads? Memory that torch.empty gives holds anything",
    "has the shape": "follow the shape line by line: which line gives it another one than you think?",
}
"""The first hint on what comes before any values."""
_ITS = {"B": "batch", "H": "head", "K": "kv head", "S": "query", "N": "row", "rows": "row"}


def drawn(review: Review, exercise: Exercise, hints: int) -> Group:
    """A review. hints: how much is told: 0 the question alone, 1 where to look, 2 the sentence, 3 the line."""
    printed = [Text(f"it prints:\n{review.printed}", style="dim")] if review.printed else []
    return Group(*_head(review), *printed, *_call(review.drawn, exercise), *told(review, exercise, hints))


def told(review: Review, exercise: Exercise, hints: int) -> list[Any]:
    """The question, and as many of the three hints."""
    lines: list[Any] = []
    if review.by_values and review.drawn:
        lines += [Text(question(review, exercise), style="bold")]
    for number, text in enumerate(hints_of(review, exercise)[:hints], 1):
        lines.append(Text.assemble((f"hint {number}: ", "bold"), text))
    return lines


def question(review: Review, exercise: Exercise) -> str:
    """What to ask oneself first."""
    if review.named:
        return " ".join(dict.fromkeys(one.asks for one in review.named))
    return "No known mistake gives these numbers. Which cell of the table can you follow by hand?"


def hints_of(review: Review, exercise: Exercise) -> tuple[str, str, str]:
    """Three hints: where to look, what is wrong in a sentence, the line. Of what is not recognised, the exercise's."""
    if review.trouble is not None and not review.by_values:
        own = next((hint for error, hint in _OF_ERRORS.items() if error in review.trouble.text), exercise.hints[0])
        return own, *exercise.hints[1:]
    if not review.named:
        return exercise.hints
    where = f"look at {review.where}" if review.where else exercise.hints[0]
    factor = _ratio(review.drawn)
    where += f"; what you have there is {factor} times what is right" if factor else ""
    sentences = " / or: ".join(_sentence(one) for one in review.named)
    return where, sentences, " / or: ".join(_line(one, exercise) for one in review.named)


def _sentence(one: Named) -> str:
    return f"it is as if {one.says}" if one.as_if else one.says


def _line(one: Named, exercise: Exercise) -> str:
    if not one.definition:
        return exercise.hints[2]
    place = "the definition" if exercise.definition else "the solution"
    return f"{place} has\n    {_indented(one.definition)}\nand your numbers are those of\n    {_indented(one.changed)}"


def _indented(text: str) -> str:
    return (text or "nothing there").replace("\n", "\n    ")


def _head(review: Review) -> list[Any]:
    lines = [Text.assemble((review.exercise, "bold"), ": ", _verdict(review))]
    if review.done or review.by_values:
        stages = ", ".join(
            f"{stage} {'holds' if ok else 'fails'} ({STAGES[stage]})" for stage, ok in review.stages.items()
        )
        lines.append(Text(f"stages: {stages}"))
    if review.trouble is not None:
        at = f"line {review.trouble.line}: " if review.trouble.line else ""
        lines.append(Text(f"{at}{review.trouble.text}"))
    return lines


def _verdict(review: Review) -> tuple[str, str]:
    kind = "" if review.trouble is None or review.by_values else f" ({review.trouble.kind})"
    return (f"{review.verdict}{kind}", {"holds": "green", "fails": "red"}.get(review.verdict, "yellow"))


# ------------------------------------------------------------------------------------------------------- tables


def _call(call: Drawn | None, exercise: Exercise) -> list[Any]:
    if call is None:
        return []
    lines: list[Any] = [Text(f"{exercise.function}({_arguments(call)}): {call.call.words}", style="dim")]
    for (name, axes), got, wanted, wrong in zip(
        exercise.outputs.items(), call.got, call.wanted, call.wrong, strict=True
    ):
        if wrong.any():
            lines.append(_table(name, axes, got, wanted, wrong))
    return lines


def _arguments(call: Drawn) -> str:
    said = (f"{list(x.shape)}" if isinstance(x, np.ndarray) else f"{x:g}" for x in call.call.values)
    return ", ".join(said)


def _table(name: str, axes: tuple[str, ...], got: np.ndarray, wanted: np.ndarray, wrong: np.ndarray) -> Table:
    """Rows of yours, wrong cells in red and marked with !, and below each what would be right."""
    table = Table(title=f"{name} (! is wrong)", title_justify="left", title_style="", box=None, show_header=False)
    rows = got.reshape(-1, got.shape[-1]) if got.ndim else got.reshape(1, 1)
    right, bad = wanted.reshape(rows.shape), wrong.reshape(rows.shape)
    shown = _window(np.asarray(bad.any(axis=1)), _ROWS)
    columns = _window(np.asarray(bad.any(axis=0)), _COLUMNS)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for _ in columns:
        table.add_column(justify="right", no_wrap=True)
    for r in shown:
        cells = [Text(_number(rows[r, c]) + "! "[not bad[r, c]], style="red" if bad[r, c] else "") for c in columns]
        table.add_row(_place(r, axes, got.shape), "yours", *cells)
        if bad[r].any():
            table.add_row("", "right", *[f"{_number(right[r, c])} " for c in columns], style="dim")
    if len(shown) < len(rows) or len(columns) < rows.shape[1]:
        table.caption = f"{len(shown)} of {len(rows)} rows, columns {columns[0]} to {columns[-1]} of {rows.shape[1]}"
    return table


def _window(wrong: np.ndarray, most: int) -> range:
    """Which rows or columns to draw: as many as fit, from just before the first wrong one."""
    first = max(0, min(int(np.flatnonzero(wrong)[0]) - 1, len(wrong) - most))
    return range(first, min(len(wrong), first + most))


def _place(r: int, axes: tuple[str, ...], shape: tuple[int, ...]) -> str:
    """A row by the names of its axes: head 1, query 2."""
    front = shape[:-1]
    if not front:
        return ""
    names = axes[-len(shape) : -1] if len(axes) >= len(shape) else (axes[0],) * len(front)
    index = np.unravel_index(r, front)
    said = [f"{_ITS.get(name, name)} {i}" for name, i, n in zip(names, index, front, strict=False) if n > 1]
    return ", ".join(said) or f"{_ITS.get(names[-1], names[-1])} {index[-1]}"


def _number(x: float) -> str:
    if not np.isfinite(x):
        return str(x)
    return f"{x:.0f}" if x == round(x) and abs(x) < 1e5 else f"{x:.4g}"


def _ratio(call: Drawn | None) -> str:
    """The factor between yours and right, if it is one for all wrong cells."""
    if call is None:
        return ""
    pairs = [(g[w & (y != 0)], y[w & (y != 0)]) for g, y, w in zip(call.got, call.wanted, call.wrong, strict=True)]
    with np.errstate(all="ignore"):
        ratios = np.concatenate([np.ravel(g / y) for g, y in pairs])
    if len(ratios) < 2 or not np.isfinite(ratios).all() or np.ptp(ratios) > _ALIKE * abs(np.median(ratios)):
        return ""
    return f"{np.median(ratios):.4g}"
