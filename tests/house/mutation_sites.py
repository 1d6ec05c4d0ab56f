"""Where the product can be changed, and how: the places and operators of Cosmic Ray, less what is no code that counts.

Left out: text (messages that are raised, f-strings), type annotations, what runs only as a program or for a type
checker, decorators that only remember results, and operators that change no behaviour (`==` for `is`). And files: see
`LEFT_OUT`.
"""

import ast
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

PRODUCT = ("refllm", "kernels", "golden")
LEFT_OUT = {
    "refllm/bench/": "benchmarks and their pages; needs a GPU",
    "refllm/commands/bench.py": "benchmarks and their pages",
    "refllm/mutants/attention.py": "planted bugs: a change of one is another bug",
    "refllm/mutants/blocks.py": "planted bugs: a change of one is another bug",
    "refllm/mutants/honest.py": "right ports: a change of one is another port",
    "refllm/mutants/planting.py": "planted bugs: a change of one is another bug",
    "refllm/mutants/profiles": "planted bugs, and a part of a page of docs/",
    "refllm/mutants/rotary.py": "planted bugs: a change of one is another bug",
    "refllm/mutants/runs.py": "makes a page of docs/",
    "refllm/mutants/validation": "makes a page of docs/",
    "refllm/opcheck/mutants_": "make a page of docs/",
    "refllm/opcheck/typical_tests.py": "tests of others, written to be weak",
    "kernels/mutants/": "planted bugs: a change of one is another bug",
    "kernels/aot/": "its tests compile for minutes",
    "kernels/tuning/": "its tests compile for minutes; timing needs a GPU",
    "refllm/strategies/": "inputs of checks: a change of one is another input",
    "golden/cases.py": "inputs of checks: a change of one is another input",
    "golden/model_cases.py": "inputs of checks: a change of one is another input",
    "golden/operator_cases.py": "inputs of checks: a change of one is another input",
    "golden/make_": "run when the embedded files are made, not when they are used",
    "golden/train_tokenizers.py": "run when the embedded files are made, not when they are used",
}
_KEPT = ("refllm/strategies/arrays.py", "refllm/strategies/call.py")
_NO_CHANGE = ("NoOp", "_Is_Eq", "_IsNot_NotEq", "_Eq_Is", "_NotEq_IsNot")


@dataclass(frozen=True)
class Mutant:
    """One change of one line. before, after: that line without its indentation."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str

    def source(self, root: Path) -> str:
        """The whole changed file."""
        changed = mutate_code((root / self.file).read_text(), _operators()[self.operator], self.occurrence)
        assert changed is not None
        return changed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def draw(root: Path, seed: int) -> Iterator[Mutant]:
    """Mutants without end, none twice: a file by its lines of code, a line of it, a kind of change, one such change."""
    rng = random.Random(seed)
    files = product(root)
    weights = [len(_code_lines(root / name)) for name in files]
    seen = set()
    while True:
        name = rng.choices(files, weights)[0]
        places = _places(root, name)
        if not places:
            continue
        kinds = places[rng.choice(sorted(places))]
        operator, occurrence = rng.choice(kinds[rng.choice(sorted(kinds))])
        found = _mutant(root, name, operator, occurrence)
        if found is not None and (name, found.line, found.after) not in seen:
            seen.add((name, found.line, found.after))
            yield found


def product(root: Path) -> list[str]:
    """The files that are mutated, by their paths from `root`."""
    names = [path.relative_to(root).as_posix() for folder in PRODUCT for path in (root / folder).rglob("*.py")]
    kept = [name for name in set(names) if not name.startswith(tuple(LEFT_OUT)) or name in _KEPT]
    return sorted(kept)


@cache
def _operators() -> dict[str, Any]:
    classes = {name: cosmic_ray.plugins.get_operator(name) for name in sorted(cosmic_ray.plugins.operator_names())}
    return {name: made() for name, made in classes.items() if not made.arguments() and not name.endswith(_NO_CHANGE)}


def _kind(operator: str) -> str:
    """ "ReplaceComparisonOperator" of "core/ReplaceComparisonOperator_Eq_Lt"."""
    return operator.partition("/")[2].partition("_")[0]


@cache
def _places(root: Path, name: str) -> dict[int, dict[str, list[tuple[str, int]]]]:
    """Line -> kind of change -> operators with their occurrence in the file."""
    source = (root / name).read_text()
    skipped = _no_code(source)
    found: dict[int, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    count: dict[str, int] = defaultdict(int)
    for node in ast_nodes(get_ast(source)):
        for operator, changes in _operators().items():
            for start, _ in changes.mutation_positions(node):
                if not any(first <= start < last for first, last in skipped):
                    found[start[0]][_kind(operator)].append((operator, count[operator]))
                count[operator] += 1
    return found


def _mutant(root: Path, name: str, operator: str, occurrence: int) -> Mutant | None:
    """None where the changed file is no Python, or says the same."""
    source = (root / name).read_text()
    changed = mutate_code(source, _operators()[operator], occurrence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    if changed is None or same:
        return None
    old, new = source.splitlines(), changed.splitlines()
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new) - 1)
    while not old[at].strip():
        at += 1  # a decorator goes with the empty lines before it
    after = new[at].strip() if len(old) == len(new) else "(removed)"
    return Mutant(name, at + 1, operator, occurrence, old[at].strip(), after)


@cache
def _code_lines(path: Path) -> set[int]:
    return {node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)}


Span = tuple[tuple[int, int], tuple[int, int]]


def _no_code(source: str) -> list[Span]:
    """Spans (line, column) of a file that are text, types, or no part of what is imported."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        parts: list[Any] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            parts += [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            parts += [node.returns, *(a.annotation for a in (arguments.vararg, arguments.kwarg) if a)]
            parts += [d for d in node.decorator_list if ast.unparse(d).split("(")[0].split(".")[-1] in _CACHES]
        elif isinstance(node, ast.AnnAssign):
            parts += [node.annotation]
        elif isinstance(node, ast.If):
            parts += [node] if ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING") else []
        elif isinstance(node, ast.JoinedStr | ast.Raise):
            parts += [node]
        spans += [_span(part, source) for part in parts if part is not None]
    return spans


_CACHES = ("cache", "lru_cache", "cached_property", "overload", "override")


def _span(node: ast.expr | ast.stmt, source: str) -> Span:
    """From the decorator's @ on: the operator that removes it stands there. Columns of ast count bytes."""
    first = source.splitlines()[node.lineno - 1]
    column = len(first.encode()[: node.col_offset].decode())
    return (node.lineno, column - first[:column].endswith("@")), (node.end_lineno or 0, node.end_col_offset or 0)
