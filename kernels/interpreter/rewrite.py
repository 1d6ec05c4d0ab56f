"""Turns the source of a jit function into a Python function that means what the compiler would make of it.

Python's own operators would act on Triton's tensors without the interpreter, or wrongly (`2 <= i < 5`, `if block:`).
So every operator, call, condition and attribute becomes a call of `operations`; the rest of the function stays as it
is, with its own line numbers. Neither the module of the kernel nor the Triton language is changed.
"""

import ast
import functools
import types
from typing import Any

from refllm.kernels.interpreter import operations
from refllm.kernels.interpreter.errors import KernelError

_OPERATIONS = "_refllm_operations_"
_MAKER = "_refllm_maker_"

_OPERATORS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.LShift: "lshift",
    ast.RShift: "rshift",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Is: "is_",
    ast.IsNot: "is_not",
    ast.USub: "neg",
    ast.UAdd: "pos",
    ast.Not: "not_",
    ast.Invert: "invert",
    ast.And: "both",
    ast.Or: "either",
}
"""The name in `operations` of each operator."""


def rewrite(jit: Any) -> types.FunctionType:
    """The interpreted form of a jit function (a `triton.JITFunction`): same globals, closure and defaults.

    Raises KernelError if the source uses something that the compiler refuses and Python would misread.
    """
    function = jit.fn
    free = function.__code__.co_freevars
    scope = jit.get_capture_scope()
    plain = frozenset(name for name, value in scope.items() if isinstance(value, bool | int | float | str))
    code = _moved(_compiled(jit.__name__, jit.src, free, plain), function.__code__.co_filename, _first_line(jit) - 1)
    cells = dict(zip(free, function.__closure__ or (), strict=True)) | {_OPERATIONS: types.CellType(operations)}
    rewritten = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, tuple(cells[n] for n in code.co_freevars)
    )
    rewritten.__kwdefaults__ = function.__kwdefaults__
    return rewritten


@functools.lru_cache(maxsize=1024)
def _compiled(name: str, source: str, free: tuple[str, ...], plain: frozenset[str]) -> types.CodeType:
    """The code of a rewritten function, as of a file that begins with it. Copies of a kernel's file share it."""
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    _Rewriter(name, definition, plain).visit(definition)
    maker = ast.parse(f"def {_MAKER}({', '.join([*free, _OPERATIONS])}): pass").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [definition]
    tree.body = [maker]
    ast.fix_missing_locations(tree)
    return _nested(_nested(compile(tree, "", "exec"), _MAKER), definition.name)


def _moved(code: types.CodeType, file: str, lines: int) -> types.CodeType:
    """Code at the place of the file where it stands."""
    constants = tuple(_moved(c, file, lines) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_filename=file, co_firstlineno=code.co_firstlineno + lines, co_consts=constants)


def _first_line(jit: Any) -> int:
    """The line of `def` in the file: the source that Triton keeps starts there, below the decorators."""
    decorators = next(i for i, line in enumerate(jit.raw_src) if line.lstrip().startswith("def "))
    return int(jit.starting_line_number) + decorators


def _nested(code: types.CodeType, name: str) -> types.CodeType:
    return next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, kernel: str, definition: ast.FunctionDef, plain: frozenset[str]) -> None:
        self.kernel = kernel
        arguments = definition.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self.locals = {argument.arg for argument in every if argument} | {
            node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }

        self.plain = plain - self.locals

    def _call(self, node: ast.AST, operation: str, *arguments: ast.expr) -> ast.expr:
        function = ast.Attribute(ast.Name(_OPERATIONS, ast.Load()), operation, ast.Load())
        return ast.copy_location(ast.Call(function, list(arguments), []), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            argument.annotation = None
        # The defaults are those of the original function object; only their number has to fit.
        arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
        node.body = [self.visit(statement) for statement in node.body]
        return node

    # -- operators -------------------------------------------------------------------------------------------------

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        operation = _OPERATORS.get(type(node.op))
        if operation is None:
            raise KernelError(f"{self.kernel}: Triton has no operator for `{ast.unparse(node)}`")
        return self._call(node, operation, self.visit(node.left), self.visit(node.right))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        return self._call(node, _OPERATORS[type(node.op)], self.visit(node.operand))

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) > 1:
            return self._chain(node)
        operation = _OPERATORS.get(type(node.ops[0]))
        if operation is None:
            raise KernelError(f"{self.kernel}: Triton has no comparison for `{ast.unparse(node)}`")
        return self._call(node, operation, self.visit(node.left), self.visit(node.comparators[0]))

    def _chain(self, node: ast.Compare) -> ast.AST:
        if not operations.CHAINED_COMPARISONS:
            first, last = ast.unparse(node.left), ast.unparse(ast.Compare(*_tail(node)))
            raise KernelError(
                f"{self.kernel}: this version of Triton does not compile the chained comparison `{ast.unparse(node)}`; "
                f"write ({first} {_symbol(node.ops[0])} {ast.unparse(node.comparators[0])}) & ({last})"
            )
        names = ast.Tuple([ast.Constant(_OPERATORS[type(op)]) for op in node.ops], ast.Load())
        return self._call(node, "chain", names, *[self._thunk(v) for v in (node.left, *node.comparators)])

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        # Later operands are evaluated only if the earlier ones leave the question open, hence the lambdas.
        return self._call(node, _OPERATORS[type(node.op)], *[self._thunk(value) for value in node.values])

    def _thunk(self, value: ast.expr) -> ast.expr:
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        return ast.copy_location(ast.Lambda(nothing, self.visit(value)), value)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.plain:
            return node
        # An error only where it is read: the compiler does not look into a branch that is switched off.
        return self._call(node, "plain_global", ast.Constant(node.id), node)

    # -- calls, attributes, indices --------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> ast.AST:
        call = self._call(node, "call", self.visit(node.func), *[self.visit(a) for a in node.args])
        assert isinstance(call, ast.Call)
        call.keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
        return call

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        value = self.visit(node.value)
        of_a_module = isinstance(root, ast.Name) and root.id not in self.locals
        if of_a_module or not isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Attribute(value, node.attr, node.ctx), node)
        return self._call(node, "attribute", value, ast.Constant(node.attr))

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if not isinstance(node.ctx, ast.Load):
            raise KernelError(f"{self.kernel}: Triton cannot assign to `{ast.unparse(node)}`; use tl.where or tl.store")
        return self._call(node, "subscript", self.visit(node.value), self.visit(node.slice))

    def visit_Slice(self, node: ast.Slice) -> ast.AST:
        parts = [self.visit(p) if p else ast.Constant(None) for p in (node.lower, node.upper, node.step)]
        return self._call(node, "slice_", *parts)

    # -- statements ------------------------------------------------------------------------------------------------

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if len(node.targets) > 1:
            raise KernelError(f"{self.kernel}: Triton does not compile the double assignment `{ast.unparse(node)}`")
        target = self._target(node.targets[0])
        return ast.copy_location(ast.Assign([target], self._call(node, "assigned", self.visit(node.value))), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        is_constant = ast.unparse(node.annotation).split(".")[-1] == "constexpr"
        value = self._call(node, "constant" if is_constant else "assigned", self.visit(node.value))
        return ast.copy_location(ast.Assign([self._target(node.target)], value), node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            raise KernelError(f"{self.kernel}: Triton cannot assign to `{ast.unparse(node.target)}`")
        read = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        value = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
        return self.visit(ast.copy_location(ast.Assign([node.target], value), node))

    def _target(self, target: ast.expr) -> ast.expr:
        if isinstance(target, ast.Subscript | ast.Attribute):
            raise KernelError(
                f"{self.kernel}: Triton cannot assign to `{ast.unparse(target)}`; use tl.where or tl.store"
            )
        return target

    def visit_If(self, node: ast.If) -> ast.AST:
        test = self._call(node.test, "truth", self.visit(node.test))
        body, orelse = ([self.visit(s) for s in statements] for statements in (node.body, node.orelse))
        return ast.copy_location(ast.If(test, body, orelse), node)

    def visit_While(self, node: ast.While) -> ast.AST:
        test = self._call(node.test, "truth", self.visit(node.test))
        return ast.copy_location(ast.While(test, [self.visit(s) for s in node.body], []), node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        test = self._call(node.test, "truth", self.visit(node.test))
        return ast.copy_location(ast.IfExp(test, self.visit(node.body), self.visit(node.orelse)), node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        message = self.visit(node.msg) if node.msg else ast.Constant("")
        call = self._call(node, "device_assert", self.visit(node.test), message)
        return ast.copy_location(ast.Expr(call), node)


def _tail(node: ast.Compare) -> tuple[ast.expr, list[ast.cmpop], list[ast.expr]]:
    return node.comparators[0], node.ops[1:], node.comparators[1:]


def _symbol(operator: ast.cmpop) -> str:
    one = ast.Name("_")
    return ast.unparse(ast.Compare(one, [operator], [one])).strip("_ ")
