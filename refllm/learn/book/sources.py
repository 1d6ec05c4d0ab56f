"""The code that pages show: functions as they stand in their files, and the lines that an anchor names.

An anchor is a piece of text that stands on exactly one line of the functions of its column. What is shown is the whole
statement around it; of a loop or a branch, its first line.
"""

import ast
import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import refllm
from refllm import kernels
from refllm.learn.book.errors import BookError

_FOLDERS = {
    "ops": Path(str(refllm.__file__)).parent / "ops",
    "models": Path(str(refllm.__file__)).parent / "models",
    "triton": Path(str(kernels.__file__)).parent / "triton",
    "plain": Path(str(kernels.__file__)).parent / "plain",
    "precision": Path(str(refllm.__file__)).parent / "precision",
}
_SHOWN = {name: f"refllm/{name}" for name in ("ops", "models", "precision")}
_SHOWN |= {name: f"kernels/{name}" for name in ("triton", "plain")}
"""Where the files of a folder stand in the repository."""


@dataclass(frozen=True)
class Function:
    """A function of a file. where: "refllm/ops/norm.py". lines: its text, as it stands."""

    where: str
    name: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Found:
    """The lines that an anchor names: of which function (its place in the column), first to last, from 0."""

    function: int
    first: int
    last: int


def path_of(folder: str, file: str) -> Path:
    """The file of a folder that pages read from."""
    return _FOLDERS[folder] / file


@cache
def _parsed(path: Path) -> tuple[ast.Module, tuple[str, ...]]:
    text = path.read_text(encoding="utf-8")
    return ast.parse(text), tuple(text.splitlines())


def function(folder: str, name: str) -> Function:
    """`function("ops", "norm.rms_norm")`; with a folder of its own `"precision:arithmetic.Arithmetic.mean"`. Raises
    BookError where there is none."""
    folder, name = name.split(":") if ":" in name else (folder, name)
    file, _, wanted = name.partition(".")
    inside, _, wanted = wanted.rpartition(".")
    path, where = path_of(folder, f"{file}.py"), f"{_SHOWN[folder]}/{file}.py"
    if not path.is_file():
        raise BookError(f"{name}: there is no file {where}")
    tree, lines = _parsed(path)
    bodies = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)} | {"": tree.body}
    for node in bodies.get(inside, []):
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            return Function(where, wanted, tuple(text.splitlines()))
    raise BookError(f"{name}: {where} has no function {wanted}")


def has(folder: str, name: str) -> bool:
    """Whether there is such a function."""
    try:
        function(folder, name)
    except BookError:
        return False
    return True


def find(anchor: str, column: Sequence[Function], page: str) -> Found:
    """The lines of an anchor. Raises BookError where it stands on no line, or on several."""
    places = [(i, n) for i, one in enumerate(column) for n, line in enumerate(one.lines) if anchor in line]
    if len(places) == 1:
        (i, n) = places[0]
        first, last = _statement(column[i], n)
        return Found(i, first, last)
    names = ", ".join(f"{one.name} ({one.where})" for one in column)
    lines = "".join(f"\n  {column[i].where}, {column[i].name}: {column[i].lines[n].strip()}" for i, n in places)
    raise BookError(f"{page}: the anchor {anchor!r} stands on {len(places)} lines of {names}, not on one{lines}")


def shown(found: Found, column: Sequence[Function]) -> list[str]:
    """The lines of an anchor in colour, from their first column on."""
    one, lines = column[found.function], slice(found.first, found.last + 1)
    least = min(len(line) - len(line.lstrip()) for line in one.lines[lines] if line.strip())
    return [line[least:] for line in coloured(one.text)[lines]]


def _statement(one: Function, line: int) -> tuple[int, int]:
    """First and last line of the statement around a line; a compound one ends where its body begins."""
    tree = ast.parse(one.text).body[0]
    smallest, best = (line, line), len(one.lines) + 1
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or node is tree:
            continue
        body = getattr(node, "body", None)
        first, last = node.lineno - 1, (body[0].lineno - 2 if body else (node.end_lineno or node.lineno) - 1)
        if first <= line <= last and last - first < best:
            smallest, best = (first, last), last - first
    return smallest


@cache
def coloured(text: str) -> tuple[str, ...]:
    """Python as HTML, line by line, with the classes of Pygments."""
    from pygments import lex
    from pygments.lexers import PythonLexer
    from pygments.token import STANDARD_TYPES

    lines = [""]
    for kind, value in lex(text, PythonLexer(stripnl=False, ensurenl=False)):
        while kind not in STANDARD_TYPES:
            kind = kind.parent
        short = _classes(STANDARD_TYPES[kind])
        for i, piece in enumerate(value.split("\n")):
            if i:
                lines.append("")
            if piece:
                safe = html.escape(piece, quote=False)
                lines[-1] += f'<span class="{short}">{safe}</span>' if short else safe
    return tuple(lines)


def _classes(short: str) -> str:
    """The few kinds that have a colour: comments, strings, keywords, numbers, names of functions."""
    for start, kept in (("c", "c"), ("s", "s"), ("k", "k"), ("m", "m"), ("nf", "f"), ("nd", "d"), ("ow", "k")):
        if short.startswith(start):
            return kept
    return ""
