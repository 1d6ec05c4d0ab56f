"""What a kernel is called with where its own file launches it.

The function around `kernel[grid](...)` is followed up to the launch, statement by statement, with tensors that have a
shape and no memory. What cannot be followed (what depends on data, or needs a GPU) is left out, and its names are taken
for what they are called.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch

SHAPES = {1: (1024,), 2: (256, 1024), 3: (4, 256, 1024), 4: (2, 256, 16, 64), 5: (2, 4, 256, 16, 64)}
"""Shapes of tensors of which nothing but the number of axes is known. They are small, since blocks grow with them, and
with a block the time to compile."""

_INT64 = re.compile(r"label|target|(^|_)(idx|indices|index|ids?)($|_)|input_ids|position", re.IGNORECASE)
_INT32 = re.compile(r"seqlens?|block_table|page_table|(^|_)offsets?($|_)|lengths?", re.IGNORECASE)
_BOOL = re.compile(r"mask", re.IGNORECASE)
_FLOAT32 = re.compile(r"(^|_)(lse|rstd|inv_std|var|mean|loss|z_loss|lse_\w+|logsumexp|max|sum|delta)(_ptr|$|_)", re.I)
_NUMBER = re.compile(r"eps|scale|alpha|beta|gamma|theta|(^|_)p$|prob|lr|momentum|soft_?cap|smoothing|factor", re.I)
_SIZE = re.compile(r"^[A-Z]{1,2}$|^n_|_n$|num_|size|_dim$|^dim|_len$|^n$|length|^block|stride", re.I)
_ANGLES = re.compile(r"^(cos|sin|freqs?)", re.I)
_CONTEXT = ("self", "ctx", "cls")


def dtype_named(name: str) -> torch.dtype:
    """What a tensor of that name usually holds."""
    for pattern, dtype in (
        (_INT64, torch.int64),
        (_INT32, torch.int32),
        (_BOOL, torch.bool),
        (_FLOAT32, torch.float32),
    ):
        if pattern.search(name):
            return dtype
    return torch.bfloat16


def is_number_named(name: str) -> bool:
    """Whether a scalar of that name is usually a float."""
    return bool(_NUMBER.search(name)) and not _SIZE.search(name)


def find(module: Any, kernel: str, parameters: list[str]) -> dict[str, Any]:
    """The arguments by name of the first launch of `kernel` in its module of which most can be told; {} without one."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, SyntaxError, TypeError):
        return {}
    found: dict[str, Any] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for call in _launches(function, kernel):
            arguments = _Follower(module, function, call).arguments(parameters)
            if len(arguments) > len(found):
                found = arguments
    return found


def _launches(function: ast.FunctionDef, kernel: str) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            launched = node.func.value
            if (launched.id if isinstance(launched, ast.Name) else getattr(launched, "attr", "")) == kernel:
                yield node


class _Reached(Exception):
    """The launch was reached."""


class _Follower:
    """Runs what it can of one function, up to one call in it."""

    def __init__(self, module: Any, function: ast.FunctionDef, call: ast.Call) -> None:
        self.scope, self.function, self.call = vars(module), function, call
        self.known: dict[str, Any] = {}
        self.axes = _axes(function)

    def arguments(self, parameters: list[str]) -> dict[str, Any]:
        """What of the call's arguments can be told, by the names of the kernel's parameters; its options too."""
        self._bind()
        try:
            for statement in self.function.body:
                self._follow(statement)
        except _Reached:
            pass
        found: dict[str, Any] = {}
        for name, value in zip(parameters, self.call.args, strict=False):
            self._tell(found, name, value)
        for keyword in self.call.keywords:
            if keyword.arg:
                self._tell(found, keyword.arg, keyword.value)
            elif isinstance(more := self._value(keyword.value), dict):
                found |= {name: value for name, value in more.items() if isinstance(name, str)}
        return found

    def _tell(self, found: dict[str, Any], name: str, expression: ast.expr) -> None:
        if not isinstance(expression, ast.Starred) and (value := self._value(expression)) is not Ellipsis:
            found[name] = value

    def _bind(self) -> None:
        arguments = self.function.args
        named = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(named) - len(arguments.defaults)) + list(arguments.defaults)
        pairs = [*zip(named, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        for argument, default in pairs:
            if argument.arg in _CONTEXT:
                continue
            value = Ellipsis if default is None else self._value(default)
            kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
            self.known[argument.arg] = self._named(argument.arg, kind) if value is Ellipsis else value

    def _named(self, name: str, kind: str = "") -> Any:
        """Something for a name of which only the name, and perhaps its type, is known."""
        if kind in ("int", "float", "bool", "str"):
            return {"int": self._size(name), "float": 0.5, "bool": False, "str": ""}[kind]
        if "Tensor" in kind or name in self.axes or dtype_named(name) in (torch.int64, torch.int32):
            axes = self.axes.get(name) or (1 if dtype_named(name) in (torch.int64, torch.int32) else 2)
            shape = (256, 32) if axes == 2 and _ANGLES.search(name) else SHAPES.get(axes, (2,) * axes)
            return torch.empty(shape, dtype=dtype_named(name), device="meta")
        if is_number_named(name):
            return 0.5
        return self._size(name) if _SIZE.search(name) else ...

    @staticmethod
    def _size(name: str) -> int:
        return 64 if re.search(r"head_?dim|^D$|^K$|^V$|block", name, re.I) else 1024

    def _value(self, expression: ast.expr) -> Any:
        """What an expression gives; ... if that cannot be told."""
        code = compile(ast.fix_missing_locations(ast.Expression(expression)), "", "eval")
        return self._run(code, eval)

    def _run(self, code: CodeType, how: Any) -> Any:
        try:
            return how(code, self.scope, self.known)
        except Exception:  # whatever the code of a stranger raises
            return ...

    def _follow(self, statement: ast.stmt) -> None:
        """One statement; both branches where it cannot be told which, and of a loop the first round."""
        if any(node is self.call for node in ast.walk(statement)) and not getattr(statement, "body", None):
            raise _Reached
        if isinstance(statement, ast.If):
            test = self._value(statement.test)
            for side in (statement.body, statement.orelse):
                if test is Ellipsis or bool(test) == (side is statement.body) or self._launches_in(side):
                    self._each(side)
        elif isinstance(statement, ast.For):
            first = next(iter(items), ...) if isinstance(items := self._value(statement.iter), range | list) else ...
            if isinstance(statement.target, ast.Name) and first is not Ellipsis:
                self.known[statement.target.id] = first
            self._each(statement.body)
        elif isinstance(statement, ast.With | ast.While | ast.Try):
            self._each(statement.body)
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            self._assign(statement)

    def _launches_in(self, statements: list[ast.stmt]) -> bool:
        return any(node is self.call for statement in statements for node in ast.walk(statement))

    def _each(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._follow(statement)

    def _assign(self, statement: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        code = compile(ast.fix_missing_locations(ast.Module([statement], [])), "", "exec")
        if self._run(code, exec) is not Ellipsis:
            return
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in (node for each in targets for node in ast.walk(each) if isinstance(node, ast.Name)):
            value = self._named(target.id)
            if value is not Ellipsis:
                self.known.setdefault(target.id, value)


_OF_TENSORS = (
    *("shape", "stride", "size", "dtype", "device", "contiguous", "view", "reshape", "numel", "requires_grad", "ndim"),
    *("is_contiguous", "data_ptr", "float", "to", "sum", "max", "min", "element_size"),
)


def _axes(function: ast.FunctionDef) -> dict[str, int]:
    """How many axes the names have that are used as tensors: by their unpacked shapes, and the indices into them.

    Who says `x.shape[2]` and `x.shape[-1]` means two axes by them.
    """
    found: dict[str, int] = {}
    from_behind: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in _OF_TENSORS:
            found.setdefault(node.value.id, 0)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and (name := _of_shape(node.value)):
            exact = [target for target in node.targets[0].elts if not isinstance(target, ast.Starred)]
            found[name] = max(found.get(name, 0), len(exact))
        index, name = _index(node)
        if name:
            found[name] = max(found.get(name, 0), index + 1 if index >= 0 else -index)
            from_behind |= {name} if index < 0 else set()
    return {name: axes + (axes > 2 and name in from_behind) for name, axes in found.items()}


def _of_shape(expression: ast.expr) -> str:
    """`x` of `x.shape` and `x.size()`."""
    if isinstance(expression, ast.Call):
        expression = expression.func
    if isinstance(expression, ast.Attribute) and expression.attr in ("shape", "size"):
        return expression.value.id if isinstance(expression.value, ast.Name) else ""
    return ""


def _index(node: ast.AST) -> tuple[int, str]:
    """(2, "x") of `x.shape[2]`, `x.stride(2)` and `x.size(2)`; (0, "") of anything else."""
    place: ast.expr | None = None
    if isinstance(node, ast.Subscript):
        place, value = node.slice, node.value
    elif isinstance(node, ast.Call) and len(node.args) == 1:
        place, value = node.args[0], node.func
    if place is None or not isinstance(value, ast.Attribute) or value.attr not in ("shape", "stride", "size"):
        return 0, ""
    try:
        index = ast.literal_eval(place)
    except (ValueError, SyntaxError, TypeError):
        return 0, ""
    return (index, value.value.id) if isinstance(index, int) and isinstance(value.value, ast.Name) else (0, "")
