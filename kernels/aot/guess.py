"""The command that compiles a kernel of which the user has not said everything.

What the kernel's own file calls it with comes first (call_sites.py), then annotations, defaults, and what the names and
the kernel's code suggest. The guess is compiled; where the compiler refuses, what was only suggested is varied.
"""

import ast
import enum
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from refllm.kernels.aot import call_sites

OPTIONS = ("num_warps", "num_stages")
_USUAL = {"num_warps": "4", "num_stages": "3"}
TRIES = 40
"""Compilations that a guess may take. One that fails takes a tenth of the time of one that does not."""


@dataclass(frozen=True)
class Guess:
    """What one parameter is taken for.

    text: as `--arg` or `--constant` takes it. others: what it may be instead; none where its file says what it is.
    """

    name: str
    constant: bool
    text: str
    others: tuple[str, ...] = ()

    def words(self) -> str:
        """The option of the command line."""
        return f"{'--constant' if self.constant else '--arg'} {shlex.quote(f'{self.name}={self.text}')}"


def guesses(module: Any, kernel: str, function: JITFunction, missing: list[Any]) -> tuple[list[Guess], dict[str, int]]:
    """(a guess for every missing parameter, the options of the launch in the same file)."""
    called = call_sites.find(module, kernel, [parameter.name for parameter in function.params])
    reads = _Reads(function)
    found = [_guess(parameter, called, reads) for parameter in missing]
    options = {name: called[name] for name in OPTIONS if isinstance(called.get(name), int)}
    return found, options


def compiling(
    function: JITFunction, found: list[Guess], refused: Callable[[list[Guess]], str]
) -> tuple[list[Guess], str]:
    """(guesses that compile, "") by changing one after the other; or (those that came, what the compiler says).

    refused: what the compiler says of guesses; "" if it takes them.
    """
    behind = _Behind(function)
    first = reason = refused(found)
    current, left = found, TRIES
    while reason and left:
        for other in _one_changed(current, behind.names_in(reason)):
            left -= 1
            said = refused(other)
            better = not said or _line(said) > _line(reason)
            if better:
                current, reason = other, said
            if better or not left:
                break
        else:
            break
    return (found, first) if reason else (current, "")


def _line(reason: str) -> int:
    """The line of the kernel's file that the compiler came to."""
    line = re.search(r"\.py:(\d+) `", reason)
    return int(line[1]) if line else 0


def _one_changed(found: list[Guess], named: set[str]) -> Iterator[list[Guess]]:
    """The guesses with one of them changed: what the line is about that the compiler stopped at first. Before that, all
    tensors of bfloat16 as another kind of number: a kernel may have its own written into it."""
    for text in ("*fp16", "*fp32"):
        yield [replace(each, text=text) if each.text == "*bf16" else each for each in found]
    for guess in sorted(found, key=lambda guess: (guess.name not in named, not guess.constant)):
        for index, text in enumerate(guess.others):
            changed = replace(guess, text=text, others=guess.others[index + 1 :])
            yield [changed if each is guess else each for each in found]


def _guess(parameter: Any, called: dict[str, Any], reads: "_Reads") -> Guess:
    name, constant = parameter.name, parameter.is_constexpr
    as_called = _text(called[name], constant) if name in called else ""
    surely = not constant and name in reads.pointers and not isinstance(called.get(name), torch.Tensor | None)
    if as_called and not surely:
        return Guess(name, constant, as_called, _other_tensors(as_called) if as_called.startswith("*") else ())
    if constant:
        return Guess(name, True, *reads.constant(name))
    annotated = parameter.annotation_type or ""
    if annotated.startswith("*") or name in reads.pointers:
        text = annotated or "*" + _NAMES[call_sites.dtype_named(name)]
        others = (as_called,) if as_called else ()
        return Guess(name, False, text, () if annotated else others + _other_tensors(text))
    if annotated:
        return Guess(name, False, annotated)
    if call_sites.is_number_named(name):
        return Guess(name, False, "fp32", ("i32",))
    return Guess(name, False, "i32:16" if "stride" in name else "i32", ("fp32", *_other_tensors("")))


def _other_tensors(text: str) -> tuple[str, ...]:
    return tuple(other for other in ("*bf16", "*fp32", "*fp16", "*i32", "*i64") if other != text)


_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64", torch.bool: "i1"}
_NAMES |= {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
_NAMES |= {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}
_LANGUAGE = {
    getattr(tl, name): name for name in ("bfloat16", "float16", "float32", "float64", "int32", "int64", "int8")
}


def _text(value: Any, constant: bool) -> str:
    """A value as the command line takes it; "" if it cannot."""
    if isinstance(value, tl.constexpr):
        value = value.value
    if isinstance(value, tl.dtype):
        return f"tl.{_LANGUAGE[value]}" if value in _LANGUAGE else ""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, torch.Tensor):
        return "" if constant or value.dtype not in _NAMES else f"*{_NAMES[value.dtype]}"
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and not constant and value not in (0, 1):
        return "i64" if abs(value) >= 2**31 else "i32" if value % 16 else "i32:16"
    if isinstance(value, int | float):
        return "fp32" if isinstance(value, float) and not constant else str(value)
    return value if isinstance(value, str) and constant and value else ""


_MEMORY = ("load", "store", "atomic_add", "atomic_max", "atomic_cas", "make_block_ptr", "make_tensor_descriptor")


class _Behind:
    """What the variables of a kernel are made of."""

    def __init__(self, function: JITFunction) -> None:
        self.made_of: dict[str, set[str]] = {}
        for node in ast.walk(function.parse()):
            if isinstance(node, ast.Assign | ast.AugAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in _names(*targets):
                    self.made_of.setdefault(name, set()).update(_names(node.value))

    def names_in(self, text: str) -> set[str]:
        """The names in what the compiler says, and those that they are made of."""
        found: set[str] = set()
        new = set(re.findall(r"\w+", text))
        while new:
            found |= new
            new = {behind for name in new for behind in self.made_of.get(name, ())} - found
        return found


def _names(*nodes: ast.AST) -> set[str]:
    return {each.id for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name)}


class _Reads:
    """What the code of a kernel does with its parameters."""

    def __init__(self, function: JITFunction) -> None:
        self.tree = function.parse()
        self.pointers = self._pointers() | {p.name for p in function.params if _POINTER.search(p.name)}
        self.dtypes = set(self._dtypes())
        self.sizes = set(self._sizes())
        self.compared = dict(self._compared(function.fn.__globals__))
        self.switches = set(self._switches()) - self.sizes

    def constant(self, name: str) -> tuple[str, tuple[str, ...]]:
        """A tl.constexpr, and what else it may be."""
        if name in self.compared:
            return self.compared[name], ()
        if name in _USUAL:
            return _USUAL[name], ()
        if name in self.dtypes:
            return "tl.float32", ("tl.bfloat16",)
        if name in self.switches:
            return "False", ("True", "None", "0")
        return "128", ("64", "16", "1", "None", "tl.float32")

    def _pointers(self) -> set[str]:
        """The names that loads and stores start from, through assignments: `p = x + row`, `tl.load(p + columns)`."""
        starts: dict[str, set[str]] = {}
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                starts.setdefault(node.targets[0].id, set()).add(_leftmost(node.value))
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                starts.setdefault(node.target.id, set()).add(node.target.id)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _MEMORY:
                first = node.args[:1] or [k.value for k in node.keywords if k.arg in ("base", "pointer")]
                found |= {_leftmost(each) for each in first}
        for _ in range(len(starts)):
            found |= {start for name in found for start in starts.get(name, ())}
        return found

    def _dtypes(self) -> Iterator[str]:
        """Names that a number is converted to: `x.to(T)`, `tl.zeros(shape, T)`, `tl.dot(a, b, out_dtype=T)`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                given = [k.value for k in node.keywords if k.arg in ("dtype", "out_dtype")]
                called = getattr(node.func, "attr", "")
                given += node.args[:1] if called == "to" else []
                given += node.args[1:] if called in ("zeros", "full", "cast") else []
                yield from (each.id for each in given if isinstance(each, ast.Name))

    def _sizes(self) -> Iterator[str]:
        """Names in ranges, shapes and arithmetic."""
        for node in ast.walk(self.tree):
            parts: list[ast.AST] = []
            if isinstance(node, ast.BinOp):
                parts = [node.left, node.right]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _SIZED:
                parts = [part for each in node.args for part in ast.walk(each)]
            yield from (part.id for part in parts if isinstance(part, ast.Name))

    def _compared(self, outside: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Names that are compared with a constant, `mode == "mean"`, and that constant; of several the first."""
        for node in reversed(list(ast.walk(self.tree))):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and isinstance(node.ops[0], ast.Eq):
                right = node.comparators[0]
                value = outside.get(right.id) if isinstance(right, ast.Name) else getattr(right, "value", None)
                if value is not None and (text := _text(value, True)):
                    yield node.left.id, text

    def _switches(self) -> Iterator[str]:
        """Names that `if` asks for."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.If | ast.IfExp):
                test = node.test
                tests = test.values if isinstance(test, ast.BoolOp) else [test]
                tests = [t.operand if isinstance(t, ast.UnaryOp) else t for t in tests]
                yield from (t.id for t in tests if isinstance(t, ast.Name))


_POINTER = re.compile(r"ptr", re.IGNORECASE)
_SIZED = ("arange", "zeros", "full", "range", "static_range", "cdiv", "make_block_ptr", "reshape")


def _leftmost(expression: ast.expr) -> str:
    while True:
        if isinstance(expression, ast.BinOp):
            expression = expression.left
        elif isinstance(expression, ast.Call) and getattr(expression.func, "attr", "") in ("to", "advance"):
            expression = expression.func.value  # type: ignore[attr-defined]
        elif isinstance(expression, ast.IfExp):
            expression = expression.body
        else:
            return expression.id if isinstance(expression, ast.Name) else ""
