"""Finds tests that can pass without having asserted anything: every assertion stands in a loop that may be empty, under
an `if`, or after an early return.

An assertion is `assert`, `pytest.raises`, `warns` and `fail`, `numpy.testing`, and a call of a function of tests/ that
itself certainly asserts (found by name). Taken to run at least once: loops over literals, over constants (names in
capitals), and over `range`; what is made of these by zip, product, sorted and the like, or by a comprehension without a
condition.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

_ASSERTING = {"raises", "warns", "fail", "deprecated_call", "assert_all", "check_grad", "opcheck", "gradcheck"}
_ALL_OF = {"zip", "product", "chain"}
_OF_FIRST = {"enumerate", "reversed", "sorted", "list", "tuple", "set", "dict", "combinations", "permutations", "cycle"}
_OF_OWNER = {"items", "keys", "values", "split"}
Known = dict[str, ast.expr]


def without(folder: Path) -> list[str]:
    """Names of such tests, as file::test."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    functions = [f for tree in trees.values() for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
    finder = _Finder(f for f in functions if not f.name.startswith("test_"))
    return [
        f"{path.name}::{f.name}"
        for path, tree in trees.items()
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and f.name.startswith("test_") and not finder.certain(f.body, {})
    ]


class _Finder:
    """helpers: functions that assert, if they certainly do; as some call others, until there are no more."""

    def __init__(self, helpers: Iterable[ast.FunctionDef]) -> None:
        left, before = list(helpers), -1
        self.asserting, self.ours = set(_ASSERTING), {f.name for f in left}
        while len(left) != before:
            before = len(left)
            # A method has a name that others may have as well: `run`, `call`.
            self.asserting |= {f.name for f in left if self.certain(f.body, {})}
            left = [f for f in left if f.name not in self.asserting]

    def certain(self, body: list[ast.stmt], known: Known) -> bool:
        """Whether these statements assert something, whatever the values are."""
        known = dict(known)
        for statement in body:
            if self._asserts(statement, known):
                return True
            if _leaves(statement) and not self._asserts_first(statement, known):
                return False
            known |= _assigned(statement)
        return False

    def _asserts(self, node: ast.stmt, known: Known) -> bool:
        match node:
            case ast.Assert():
                return True
            case ast.Raise(exc=ast.Call(func=ast.Name(id="AssertionError"))):
                return True
            case ast.If():
                return self._calls(node.test) or (self.certain(node.body, known) and self.certain(node.orelse, known))
            case ast.For():
                runs = self._runs(node.iter, known) and self.certain(node.body, known)
                return runs or self._calls(node.iter)
            case ast.While():
                return self._calls(node.test)
            case ast.With():
                return any(self._calls(item.context_expr) for item in node.items) or self.certain(node.body, known)
            case ast.Try():
                return self.certain(node.body, known) or self.certain(node.finalbody, known)
            case ast.Expr() | ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Return():
                return node.value is not None and self._calls(node.value)
        return False

    def _asserts_first(self, statement: ast.stmt, known: Known) -> bool:
        """Whether a way out of the test asserts something before it leaves."""
        match statement:
            case ast.If():
                return self.certain(statement.body, known)
            case ast.Try():
                return all(self.certain(handler.body, known) for handler in statement.handlers)
        return False

    def _calls(self, node: ast.expr) -> bool:
        """Whether an expression calls something that asserts, outside of a lambda or of a loop of its own."""
        if isinstance(node, ast.Lambda | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            return False
        if isinstance(node, ast.IfExp):
            return self._calls(node.test) or (self._calls(node.body) and self._calls(node.orelse))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in self.asserting or (name.startswith("assert_") and name not in self.ours):
                return True
        return any(self._calls(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)) or any(
            self._calls(keyword.value) for keyword in getattr(node, "keywords", [])
        )

    def _runs(self, node: ast.expr, known: Known) -> bool:
        """Whether a loop over this runs at least once."""
        match node:
            case ast.Name(id=name) if name in known:
                return self._runs(known[name], {n: value for n, value in known.items() if n != name})
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name.isupper()
            case ast.Tuple() | ast.List() | ast.Set():
                return any(not isinstance(e, ast.Starred) or self._runs(e.value, known) for e in node.elts)
            case ast.Dict():
                return bool(node.keys)
            case ast.Constant(value=str(text)):
                return bool(text)
            case ast.BinOp(op=ast.Add()):
                return self._runs(node.left, known) or self._runs(node.right, known)
            case ast.ListComp() | ast.GeneratorExp() | ast.DictComp() | ast.SetComp():
                return all(self._runs(g.iter, known) and not g.ifs for g in node.generators)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant()):
                return name.isupper()
            case ast.Call(func=ast.Name(id="range")):
                return True
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _ALL_OF:
                strict = any(k.arg == "strict" and ast.unparse(k.value) == "True" for k in node.keywords)
                return (any if strict else all)(self._runs(a, known) for a in node.args)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _OF_FIRST and node.args:
                return self._runs(node.args[0], known)
            case ast.Call(func=ast.Attribute(value=owner, attr=name)) if name in _OF_OWNER:
                return self._runs(owner, known)
        return False


def _leaves(statement: ast.stmt) -> bool:
    """Whether a statement may end what it stands in before the next one."""
    inside = [] if isinstance(statement, ast.FunctionDef | ast.ClassDef) else ast.walk(statement)
    loops = ast.Return if isinstance(statement, ast.For | ast.While) else ast.Return | ast.Continue | ast.Break
    return any(isinstance(node, loops) for node in inside)


def _assigned(statement: ast.stmt) -> Known:
    """The name that a statement assigns, with its value."""
    match statement:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.AnnAssign(target=ast.Name(id=name), value=value)
        ):
            return {} if value is None else {name: value}
    return {}
