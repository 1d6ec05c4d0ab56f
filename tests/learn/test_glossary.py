"""Every word that a report uses has an entry, and every entry can be read."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refllm.check.report import legend
from refllm.commands import cli
from refllm.errors import InputError
from refllm.learn.glossary import find, terms

ROOT = Path(__file__).parents[2]
REPORTS = [*(ROOT / "refllm" / "check").glob("*report.py"), ROOT / "refllm/opcheck/report.py", ROOT / "golden/show.py"]
EVERYDAY = {
    "backend", "dtypes", "golden", "goldens", "note", "of", "or", "outputs", "seed", "shape", "smallest", "tensor",
    "what it is for", "where",
}  # fmt: skip
"""Words that mean here what they mean everywhere."""


def columns(tree: ast.AST) -> Iterator[ast.expr]:
    """The headers of tables: `add_column(...)`, alone or in a loop over words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_column":
            yield from node.args[:1]
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and "add_column" in ast.unparse(node.body[0]):
            yield from node.iter.elts


def labels(tree: ast.AST) -> Iterator[ast.expr]:
    """What stands before a line: the first of each pair, in functions that return pairs of a label and a text."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and ast.unparse(function.returns or ast.Pass()).startswith(
            "list[tuple"
        ):
            yield from (n.elts[0] for n in ast.walk(function) if isinstance(n, ast.Tuple) and len(n.elts) == 2)


def words(expression: ast.expr) -> Iterator[str]:
    """The texts that an expression may be; of one with figures in it what stands before them."""
    match expression:
        case ast.Constant(str(text)):
            yield text
        case ast.IfExp(body=one, orelse=other):
            yield from (*words(one), *words(other))
        case ast.JoinedStr(values=[first, *_]):
            yield from words(first)


def used() -> set[str]:
    found = {label for label, _ in legend()}
    for file in REPORTS:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found |= {text for part in (*columns(tree), *labels(tree)) for text in words(part)}
    plain = {" ".join(text.replace("-\n", "").split()).rstrip(":").lower() for text in found}
    return plain - EVERYDAY - {""}


def test_every_word_of_a_report_has_an_entry() -> None:
    found = used()
    assert {"own inputs", "misrounded", "rounds", "sigma of", "smallest call", "level", "innocent before it"} <= found
    assert [word for word in sorted(found) if not known(word)] == []


def known(word: str) -> bool:
    try:
        return bool(find(word))
    except InputError:
        return False


def test_entries_are_whole_and_lead_on() -> None:
    names = [name for term in terms().values() for name in (term.name, *term.also)]
    assert len({name.lower() for name in names}) == len(names)
    for term in terms().values():
        assert term.means.endswith("."), term.name
        assert 20 < len(term.means) < 300, term.name
        assert all(find(other).name != term.name for other in term.see), term.name
    linked = {find(other).name for term in terms().values() for other in term.see}
    assert {"sigma", "ulp", "own inputs"} <= linked


def test_the_command() -> None:
    shown = CliRunner().invoke(cli.app, ["learn", "term", "sigma"])
    assert shown.exit_code == 0
    assert "standard deviation of the rounding error" in " ".join(shown.output.split())
    isolated = json.loads(CliRunner().invoke(cli.app, ["learn", "term", "Isolated:", "--json", "-"]).stdout)
    assert isolated["name"] == "own inputs"
    everything = CliRunner().invoke(cli.app, ["learn", "term"]).output
    assert all(name in everything for name in terms())
    unknown = CliRunner().invoke(cli.app, ["learn", "term", "sigmma"])
    assert isinstance(unknown.exception, InputError)
    assert str(unknown.exception) == "'sigmma' is no term of the reports; did you mean sigma?"


@pytest.mark.parametrize("spelled", ["end to end", "END  to end", "end to end:"])
def test_a_word_is_found_however_it_is_written(spelled: str) -> None:
    assert find(spelled).name == "end to end"
