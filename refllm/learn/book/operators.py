"""The page of an operator: its formula, its NumPy lines and its Triton lines side by side, step by step.

operators/NAME.toml says in which order to read and which lines belong together, by anchors; everything that is shown is
taken from the sources, and every number is computed when the page is made.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refllm.learn.book import bugs, drawing, formula, numbers, sources
from refllm.learn.book.calls import SmallCall
from refllm.learn.exercises import exercises
from refllm.ops.backward_contracts import BACKWARD
from refllm.ops.contracts import CONTRACTS, contract_of

_FORMS = ("{}", "{}_kernel", "{}_backward", "bug_{}", "bug_{}_kernel")
"""What exercises about an operator are called."""
_FOLDER = Path(__file__).with_name("operators")


@dataclass(frozen=True)
class Code:
    """Lines of one column in a step. name: of their function, "" if that is the first of the column."""

    name: str
    lines: list[str]


@dataclass(frozen=True)
class Step:
    """One row of the three columns. values: the names that the formulas assign, and their numbers."""

    index: int
    says: str
    formulas: list[str]
    values: list[tuple[str, str]]
    columns: list[list[Code]]


@dataclass(frozen=True)
class Whole:
    """A function of a column in full. lines: (number of the step that the line belongs to or 0, the line in colour)."""

    name: str
    where: str
    lines: list[tuple[int, str]]


@dataclass(frozen=True)
class Pass:
    """The forward or the backward pass. numbers: (name of a result, by formula, by NumPy, by Triton or "", error)."""

    operator: str
    says: str
    steps: list[Step]
    columns: list[tuple[str, list[Whole]]]
    given: list[tuple[str, str]]
    numbers: list[tuple[str, str, str, str, str]]
    no_kernel: str
    drawn: str


@cache
def entries() -> dict[str, dict[str, Any]]:
    """What operators/ says of each operator, in the order of the book."""
    found = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in _FOLDER.glob("*.toml")}
    return dict(sorted(found.items(), key=lambda item: item[1]["order"]))


def page(name: str) -> dict[str, Any]:
    """What the template of an operator's page needs."""
    entry = entries()[name]
    forward = _forward_call(name, entry)
    passes = [_pass(name, name, entry, forward)]
    if "backward" in entry:
        back = entry["backward"]
        kept = {argument: forward.values[argument] for argument in back.get("kept", [])}
        given = {**entry["call"], **back["call"]}
        call = SmallCall(
            f"{name}, backward", f"{name}_backward", given, _formulas(back), back["results"], forward.values, kept
        )
        back = {**back, "symbols": {**entry.get("symbols", {}), **back.get("symbols", {})}}
        passes.append(_pass(f"{name}, backward", f"{name}_backward", back, call))
    known = CONTRACTS.get(name)
    return {
        "name": name,
        "title": entry["title"],
        "says": entry["says"],
        "used": entry["used"],
        "signature": known.text if known else entry["signature"],
        "docstring": (forward.definition.__doc__ or "").strip(),
        "passes": passes,
        "exercises": [one for one in _exercises(name, entry) if one in exercises()],
        "bugs": bugs.bugs_of(forward) if known else [],
    }


def _exercises(name: str, entry: dict[str, Any]) -> list[str]:
    return [form.format(name) for form in _FORMS] + entry.get("exercises", [])


def _forward_call(name: str, entry: dict[str, Any]) -> SmallCall:
    return SmallCall(name, name, entry["call"], _formulas(entry), entry["results"])


def _formulas(entry: dict[str, Any]) -> list[str]:
    return [line for step in entry["steps"] for line in step["math"]]


def _pass(page: str, operator: str, entry: dict[str, Any], call: SmallCall) -> Pass:
    kernel = bool(entry.get("triton")) and all(sources.has("triton", one) for one in entry["triton"])
    columns = [("NumPy", "ops", entry["numpy"])] + ([("Triton", "triton", entry["triton"])] if kernel else [])
    functions = [[sources.function(folder, one) for one in names] for _, folder, names in columns]
    marks: dict[tuple[str, int, int], int] = {}
    steps, assigned = [], iter(call.assigned)
    for index, step in enumerate(entry["steps"], 1):
        shown = []
        for (title, _, _), column in zip(columns, functions, strict=True):
            found = [
                sources.find(anchor, column, f"{page}, step {index}, {title}") for anchor in step.get(title.lower(), [])
            ]
            marks |= {(title, one.function, line): index for one in found for line in range(one.first, one.last + 1)}
            shown.append([_code(one, column) for one in found])
        steps.append(_step(index, step, entry, [next(assigned) for _ in step["math"]], shown))
    wholes = [
        (title, [_whole(one, title, i, marks) for i, one in enumerate(column)])
        for (title, _, _), column in zip(columns, functions, strict=True)
    ]
    return Pass(
        operator=operator,
        says=entry.get("says", ""),
        steps=steps,
        columns=wholes,
        given=[(name, _given(call.given[name])) for name in call.taken],
        numbers=list(_numbers(entry, call, kernel)),
        no_kernel="" if kernel else entry.get("no_kernel", "There is no Triton kernel of its own."),
        drawn=_drawn(operator, entry, call),
    )


def _step(
    index: int, step: dict[str, Any], entry: dict[str, Any], assigned: list[dict[str, Any]], shown: list[list[Code]]
) -> Step:
    symbols = entry.get("symbols", {})
    values = [
        (formula.name_in_mathml(name, symbols), _few(value)) for names in assigned for name, value in names.items()
    ]
    return Step(index, step["says"], [formula.mathml(line, symbols) for line in step["math"]], values, shown)


def _code(found: sources.Found, column: Sequence[sources.Function]) -> Code:
    name = column[found.function].name if found.function else ""
    return Code(name, sources.shown(found, column))


def _whole(one: sources.Function, title: str, place: int, marks: dict[tuple[str, int, int], int]) -> Whole:
    lines = sources.coloured(one.text)
    return Whole(one.name, one.where, [(marks.get((title, place, n), 0), line) for n, line in enumerate(lines)])


def _few(value: Any) -> str:
    """The numbers of a step: all of them if they are few, else the first row."""
    value = np.asarray(value)
    if value.dtype == bool:
        value = value.astype(int)
    rows = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
    if value.ndim > 1 and value.shape[-1] == 1:
        rows = rows.T
    text = numbers.array(rows[:1])
    return f"{text} ..." if len(rows) > 1 else text


def _given(value: Any) -> str:
    return numbers.array(value) if isinstance(value, np.ndarray) else str(value)


def _numbers(entry: dict[str, Any], call: SmallCall, kernel: bool) -> Iterator[tuple[str, str, str, str, str]]:
    judged = call.by_kernel if kernel else None
    names: Sequence[str] = entry["results"]
    for i, (name, by_formula, exact) in enumerate(zip(names, call.by_formula, call.exact, strict=True)):
        shown = numbers.array(judged.values[i]) if judged else ""
        error = f"{judged.errors[i]:.2g}" if judged else ""
        yield name, numbers.array(by_formula), numbers.array(exact), shown, error


def _drawn(operator: str, entry: dict[str, Any], call: SmallCall) -> str:
    known = contract_of(operator) if operator in (*CONTRACTS, *BACKWARD) else None
    if known is not None:
        arguments = {name: axes for name, axes in known.arguments.items() if call.given.get(name) is not None}
        asked = call.arguments[1].get("return_lse", False)
        return drawing.shapes(operator, arguments, {n: a for n, a in known.outputs.items() if n != "lse" or asked})
    if "shapes" not in entry:
        return ""
    axes = {name: words.split() for name, words in entry["shapes"].items()}
    return drawing.shapes(operator, {n: axes[n] for n in axes if n not in entry["results"]},
                          {n: axes[n] for n in entry["results"]})  # fmt: skip
