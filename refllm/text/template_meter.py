"""The chat template sandbox with a budget, for where no process with limits of its own can be had.

Loop steps, calls and the size of everything that is built are charged to one counter, before the memory is taken where
one step could take much, so that neither `range` loops in `range` loops nor `"x" * 10**12` nor lists that contain each
other twice, forty levels deep, hang or exhaust the process. This stops what runs away by mistake and much of what does
so on purpose, but not everything: the interpreter's own operations are too many to price them all, and a source that
is nested deeply enough overflows the stack of the compiler.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import MAX_RANGE
from jinja2.visitor import NodeTransformer

from refllm.text.template_sandbox import ChatTemplateEnvironment, strftime_now

MAX_WORK = 40_000_000
"""Loop steps plus characters and list items built by one rendering. A chat of a million characters needs about a
tenth of it; the worst template that stays below it ends within some ten seconds and a few hundred megabytes."""

MAX_INT_BITS = 4096
"""Largest integer a template may compute: far above any date or count, far below what slows the interpreter down."""

_COST_OF_A_CALL = 100  # in steps of an empty loop, measured
_COST_OF_AN_ITEM = 4
_HIDDEN_ARGUMENTS = ("_loop_vars", "_block_vars")  # jinja2 hands local variables to every call made inside a loop
_work: ContextVar[int] = ContextVar("work", default=0)


def charge(amount: int) -> None:
    """Add `amount` to the work of this rendering; SecurityError once the total passes MAX_WORK."""
    total = _work.get() + amount
    if total > MAX_WORK:
        raise SecurityError(f"it does too much work (the limit is {MAX_WORK} loop steps and characters)")
    _work.set(total)


def size(value: Any) -> int:
    """What printing `value` would cost: nested containers are counted as often as printing would visit them."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        total += _COST_OF_AN_ITEM
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item
        elif isinstance(item, int):
            total += item.bit_length() // 8
        if total + len(pending) > MAX_WORK:
            charge(MAX_WORK + 1)
    return total


def _charged(value: Any) -> Any:
    charge(size(value))
    return value


def _charged_copy(value: Any) -> Any:
    """Charges for a result that refers to what was there before: only its own items cost anything."""
    charge(len(value) if hasattr(value, "__len__") else 1)
    return value


# --- operations whose result can be much larger than their arguments: what they will produce, computed before ---------

_WIDE_FORMAT = re.compile(r"\d{5,}|%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{")  # "%99999d", "%*d", "{:{width}}"


def _format_cost(template: Any, *_: Any, **__: Any) -> int:
    if _WIDE_FORMAT.search(template.decode("latin-1") if isinstance(template, bytes) else str(template)):
        raise SecurityError("it formats with a width of five digits or a computed width")
    return 0


def _replace_cost(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    return int(text.count(old)) * len(new)


def _join_cost(separator: Any, items: Any) -> int:
    return size(separator) * len(items)


def _width_cost(value: Any, *widths: Any, **named: Any) -> int:
    numbers = [abs(width) for width in (*widths, *named.values()) if isinstance(width, int)]
    return size(value) * max(numbers, default=0)


def _small_number_cost(_: Any, *arguments: Any, **named: Any) -> int:
    if any(isinstance(number, int) and abs(number) > 64 for number in (*arguments, *named.values())):
        raise SecurityError("it asks for an indent or a precision of more than 64")
    return 0


def _reading_cost(*values: Any, **_: Any) -> int:
    return size(values)  # comparing or printing visits everything and may leave nothing that could be charged later


def _sum_cost(_: Any, attribute: Any = None, start: Any = 0) -> int:
    return 0 if isinstance(start, (int, float)) else _forbidden()  # a sum of lists copies them again and again


def _forbidden(*_: Any, **__: Any) -> int:
    raise SecurityError("it uses an operation that chat templates have no use for")


_METHOD_COST: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), _width_cost),
    **dict.fromkeys(("to_bytes", "translate"), _forbidden),
    **dict.fromkeys(("index", "count"), _reading_cost),
    "replace": _replace_cost,
    "join": _join_cost,
}

_FILTER_COST: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "indent", "batch", "slice"), _width_cost),
    **dict.fromkeys(("round", "tojson"), _small_number_cost),
    **dict.fromkeys(("sort", "unique", "min", "max", "groupby", "dictsort"), _reading_cost),
    "replace": lambda text, old, new, *_: _replace_cost(str(text), str(old), str(new)),
    "join": lambda items, d="", attribute=None: _join_cost(d, items),
    "wordwrap": lambda text, *rest, **named: size(text) * size([*rest, *named.values()]),
    "format": _format_cost,
    "sum": _sum_cost,
}

_SELECTING_FILTERS = {
    *("first", "last", "min", "max", "random", "default", "d", "attr", "list", "items", "reverse", "sort", "unique"),
    *("select", "reject", "selectattr", "rejectattr"),
}
"""Filters whose result consists of items of their argument."""

_TESTS_OF_KIND = {
    *("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "true", "false"),
    *("number", "integer", "float", "callable", "filter", "test", "sameas", "odd", "even", "divisibleby"),
}
"""Tests that do not look into containers; they cost nothing."""


def _operator_cost(operator: str, left: Any, right: Any) -> int:
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return _number_cost(operator, left, right)
    if operator == "*" and isinstance(left, int):
        left, right = right, left
    if operator == "*" and isinstance(right, int):
        return (len(left) if isinstance(left, (str, bytes)) else size(left)) * max(right, 0)
    if operator == "%":
        return _format_cost(left) + size(right)
    return size(left) + size(right)


def _number_cost(operator: str, left: float, right: float) -> int:
    if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INT_BITS:
            raise SecurityError(f"it computes an integer of more than {MAX_INT_BITS} bits")
    return 1


# --- functions and filters that are priced here, since their cost is known best before they run ----------------------


def _strftime_now(pattern: str) -> str:
    charge(_format_cost(pattern))
    return strftime_now(pattern)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if numbers[MAX_RANGE:]:  # len() itself overflows for the longest ranges
        raise SecurityError(f"it asks for a range() of more than {MAX_RANGE} numbers")
    return numbers


# --- the budget in the syntax tree and in filters ---------------------------------------------------------------------


class _Meter(NodeTransformer):
    """Routes what jinja2 lets no environment intercept through filters that charge the budget: loops, `~`, literals
    (a list of two equal lists is how data grows exponentially), comparisons and slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "charged_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "charged_concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "charged")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "charged")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "charged") if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "charged")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "charged")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "charged_copy") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _charged_loop(values: Any) -> Any:
    return _charged_copy(_listed(values))


def _listed(value: Any) -> Any:
    """Filters such as map() return generators; a list has a size that can be charged before it is used."""
    if not isinstance(value, Iterator) or isinstance(value, LoopContext):
        return value
    items = []
    for item in value:
        charge(1)
        items.append(item)
    return items


def _charged_concat(parts: list[Any]) -> str:
    return "".join([str(_charged(part)) for part in parts])


def _bounded_concat(pieces: Iterable[str]) -> str:
    return "".join([_charged(piece) for piece in pieces])


def _charged_function(
    function: Callable[..., Any], cost: Callable[..., int] | None, charged_result: Callable[[Any], Any]
) -> Callable[..., Any]:
    """A filter or test that charges its foreseeable cost and its result."""
    hidden = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2 passes the context or environment first

    @functools.wraps(function)  # copies jinja2's own markers too
    def charged(*args: Any, **kwargs: Any) -> Any:
        values = [_listed(argument) for argument in args[hidden:]]
        charge(_COST_OF_A_CALL)
        if cost is not None:
            charge(cost(*values, **kwargs))
        return charged_result(_listed(function(*args[:hidden], *values, **kwargs)))

    return charged


class MeteredEnvironment(ChatTemplateEnvironment):
    """The sandbox with a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__()
        for name in ("urlize", "xmlattr", "pprint"):  # for web pages and debugging; their cost is hard to bound
            del self.filters[name]
        for name, function in list(self.filters.items()):
            charged_result = _charged_copy if name in _SELECTING_FILTERS else _charged
            self.filters[name] = _charged_function(function, _FILTER_COST.get(name), charged_result)
        self.filters |= {
            "charged": _charged,
            "charged_copy": _charged_copy,
            "charged_loop": _charged_loop,
            "charged_concat": _charged_concat,
        }
        tests: dict[str, Any] = self.tests
        for name in {*tests} - _TESTS_OF_KIND:
            tests[name] = _charged_function(tests[name], _reading_cost, _charged)
        del self.globals["lipsum"]  # random text of any length
        self.globals |= {"strftime_now": _strftime_now, "range": _range}
        self.concat = _bounded_concat  # type: ignore[method-assign] # macros, set blocks and the output itself

    @staticmethod
    def begin() -> None:
        """Start the account of one rendering (per thread and per task: the counter is a context variable)."""
        _work.set(0)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        return tree

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`. The parser builds the key; a key that is itself a container is no JSON key."""
        if isinstance(argument, (tuple, list, dict)):
            raise SecurityError("it uses a container as a key")
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        charge(_operator_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `format_map`, which jinja2 sandboxes at attribute access: also refuse wide formats."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            charge(_format_cost(value.__self__))
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        named = {key: value for key, value in kwargs.items() if key not in _HIDDEN_ARGUMENTS}
        values = [_listed(argument) for argument in args]
        charge(_COST_OF_A_CALL)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int, list, tuple)) and (cost := _METHOD_COST.get(__obj.__name__)) is not None:
            charge(cost(owner, *values, **named))
        return _charged(super().call(__context, __obj, *values, **kwargs))
