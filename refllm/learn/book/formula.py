"""Formulas that are drawn and computed from one text, so that neither can be wrong alone.

A formula is an assignment in Python's syntax, `y = w * x * r`. It is evaluated in float64 on the numbers of a small
call, and turned into LaTeX, of which latex2mathml makes MathML. Sums, means and maxima name the axis that they run
over: `mean_e(x * x)` is over the last one, `sum_n(x)` over all but the last.
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refllm.learn.book.errors import BookError

_GREEK = {"alpha", "beta", "delta", "eps", "lam", "mu", "nu", "phi", "sigma", "theta"}
_SPELLED = {"eps": r"\epsilon", "lam": r"\lambda", "inf": r"\infty"}
_REDUCTION = re.compile(r"(mean|sum|max|count)_([a-z])\Z")
_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(1, 6)  # how tightly a part of a formula binds


def evaluate(text: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The names that the formula assigns, with their values. values: everything that stands on its right side."""
    names = dict(values)
    # The text is one of this package's files, never a user's.
    exec(compile(text, "<formula>", "exec"), {**_functions(text), "inf": np.inf, **names}, names)
    return {name: names[name] for name in _assigned(text)}


def mathml(text: str, symbols: Mapping[str, str] | None = None) -> str:
    """The formula as MathML. symbols: how names are written in LaTeX where that is not plain."""
    return from_latex(latex(text, symbols))


def name_in_mathml(name: str, symbols: Mapping[str, str]) -> str:
    """A name alone, as formulas write it."""
    return from_latex(_Writer(symbols).write(ast.Name(name)))


def from_latex(text: str, display: bool = False) -> str:
    """LaTeX as MathML."""
    from latex2mathml.converter import convert

    return str(convert(text, display="block" if display else "inline"))


def latex(text: str, symbols: Mapping[str, str] | None = None) -> str:
    """The formula as LaTeX."""
    statement = ast.parse(text).body[0]
    if not isinstance(statement, ast.Assign):
        raise BookError(f"formula {text!r}: expected an assignment")
    writer = _Writer(symbols or {})
    return f"{writer.write(statement.targets[0])} = {writer.write(statement.value)}"


def _assigned(text: str) -> list[str]:
    return [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and _stored(node)]


def _stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _functions(text: str) -> dict[str, Callable[..., Any]]:
    """What formulas may call, and the reductions that this one names."""
    called = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and not _stored(node)}
    return _CALLABLE | {name: _reduction(*found.groups()) for name in called if (found := _REDUCTION.match(name))}


def _reduction(name: str, over: str) -> Callable[..., Any]:
    if over == "n":
        return lambda x: np.asarray(x).sum(axis=tuple(range(np.ndim(x) - 1)))
    if over == "h":  # the query heads that share a key/value head: of [B, H, T, D], beside [B, K, T, D]
        return lambda x, like: x.reshape(like.shape[0], like.shape[1], -1, *x.shape[2:]).sum(axis=2)
    return lambda x: getattr(np, name)(x, axis=-1, keepdims=True)


def _pairs(x: np.ndarray, cos: np.ndarray, interleaved: bool = False) -> tuple[np.ndarray, np.ndarray]:
    half = cos.shape[-1]
    return (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else (
        x[..., :half], x[..., half : 2 * half]
    )  # fmt: skip


def _joined(a: np.ndarray, b: np.ndarray, x: np.ndarray, interleaved: bool = False) -> np.ndarray:
    out, half = x.copy(), a.shape[-1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (
        slice(0, half), slice(half, 2 * half)
    )  # fmt: skip
    out[..., first], out[..., second] = a, b
    return out


def _seen(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    S, T = q.shape[-2], k.shape[-2]
    return np.arange(T) <= np.arange(S)[:, None] + T - S


def _heads(y: np.ndarray, count: int) -> np.ndarray:
    return y.reshape(*y.shape[:2], count, -1).swapaxes(1, 2)


_CALLABLE: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "sqrt": np.sqrt,
    "log": np.log,
    "max": np.maximum,
    "where": np.where,
    "transposed": lambda x: np.swapaxes(x, -1, -2),
    "shared": lambda k, q: k.repeat(q.shape[1] // k.shape[1], axis=1),
    "pairs": _pairs,
    "joined": _joined,
    "seen": _seen,
    "used": lambda k, lengths: k[:, :, : int(lengths[0])],
    "at": lambda z, labels: z[np.arange(len(labels)), labels][:, None],
    "onehot": lambda labels, z: np.eye(z.shape[-1])[labels],
    "rows": lambda table, ids: table[ids],
    "scattered": lambda dy, ids, table: np.stack([dy[ids == v].sum(axis=0) for v in range(len(table))]),
    "heads": _heads,
    "unheads": lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1),
    "part": lambda x, first, last: x[:, first:last],
    "stacked": lambda *parts: np.concatenate(parts, axis=1),
    "padded": lambda x, like: np.pad(x, [(0, 0), (0, 0), (0, like.shape[2] - x.shape[2]), (0, 0)]),
    "averaged": np.mean,
    "per_head": lambda w: w[:, None, :],
    "flat": lambda x: x[..., 0],
    "sum_over_queries": lambda x: x.sum(axis=(0, 2)),
    "rows_of": lambda x: x.reshape(-1, x.shape[-1]),
}
"""What formulas may call beside reductions."""

_WRITTEN = {
    "exp": "e^{{{0}}}",
    "sqrt": r"\sqrt{{{0}}}",
    "log": r"\ln \left({0}\right)",
    "max": r"\max \left({0},\; {1}\right)",
    "where": r"\begin{{cases}} {1} & \text{{where }} {0} \\ {2} & \text{{elsewhere}} \end{{cases}}",
    "transposed": r"{{{0}}}^{{\mathsf{{T}}}}",
    "shared": r"{0}_{{\lfloor h K / H \rfloor}}",
    "pairs": r"\operatorname{{pairs}} \left({0}\right)",
    "joined": r"\operatorname{{pairs}}^{{-1}} \left({0},\; {1}\right)",
    "seen": r"t \le T - S + s",
    "used": r"{0}_{{t < n}}",
    "at": r"{0}_{{\mathrm{{label}}}}",
    "onehot": r"\delta_{{v,\, \mathrm{{label}}}}",
    "rows": r"{0}_{{{1}}}",
    "scattered": r"\sum_{{i:\; \mathrm{{ids}}_i = v}} {0}_i",
    "heads": r"\operatorname{{heads}} \left({0}\right)",
    "unheads": r"\operatorname{{heads}}^{{-1}} \left({0}\right)",
    "part": r"{0}_{{{1}\, ..\, {2}}}",
    "padded": r"\operatorname{{padded}} \left({0}\right)",
    "averaged": r"\operatorname{{mean}}_n \left({0}\right)",
    "per_head": "{0}",
    "flat": "{0}",
    "sum_over_queries": r"\sum_{{b, s}} {0}",
    "rows_of": "{0}",
}
"""Function -> how it is written; its arguments by number."""
_LOOSE = {
    "where",
    "sum_over_queries",
    "scattered",
}  # written without an end of their own: as a factor they need brackets
_TIGHT = {"per_head", "flat", "rows_of"}  # what does not show


class _Writer:
    """Expressions to LaTeX; brackets where precedence asks for them."""

    def __init__(self, symbols: Mapping[str, str]) -> None:
        self.symbols = symbols

    def write(self, node: ast.expr, least: int = 0) -> str:
        text, binds = self._written(node)
        return text if binds >= least else rf"\left({text}\right)"

    def _written(self, node: ast.expr) -> tuple[str, int]:
        match node:
            case ast.Name(id=name):
                return self._name(name), _ATOM
            case ast.Constant(value=value):
                return str(value), _ATOM
            case ast.Tuple(elts=parts):
                return r"\left({}\right)".format(r",\; ".join(self.write(part) for part in parts)), _ATOM
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return f"-{self.write(inner, _PRODUCT)}", _SIGN if isinstance(inner, ast.Name) else _SUM
            case ast.BinOp(left=left, op=op, right=right):
                return self._operation(left, op, right)
            case ast.Compare(left=left, ops=[ast.Gt()], comparators=[right]):
                return f"{self.write(left)} > {self.write(right)}", _SUM
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self._call(name, arguments)
        raise BookError(f"formula: {ast.unparse(node)} has no sign")

    def _operation(self, left: ast.expr, op: ast.operator, right: ast.expr) -> tuple[str, int]:
        match op:
            case ast.Add():
                return f"{self.write(left, _SUM)} + {self.write(right, _SUM)}", _SUM
            case ast.Sub():
                return f"{self.write(left, _SUM)} - {self.write(right, _PRODUCT)}", _SUM
            case ast.Mult() if ast.dump(left) == ast.dump(right):
                return f"{{{self.write(left, _ATOM)}}}^{{2}}", _POWER
            case ast.Mult():
                return rf"{self.write(left, _PRODUCT)} \cdot {self.write(right, _PRODUCT)}", _PRODUCT
            case ast.MatMult():
                return rf"{self.write(left, _PRODUCT)}\, {self.write(right, _PRODUCT)}", _PRODUCT
            case ast.Div():
                return rf"\frac{{{self.write(left)}}}{{{self.write(right)}}}", _ATOM
            case ast.Pow():
                return f"{{{self.write(left, _ATOM)}}}^{{{self.write(right)}}}", _POWER
        raise BookError(f"formula: {op} has no sign")

    def _call(self, name: str, arguments: list[ast.expr]) -> tuple[str, int]:
        if found := _REDUCTION.match(name):
            kind, over = found.groups()
            inner = self.write(arguments[0], _PRODUCT if kind == "sum" else 0)
            if kind == "sum":
                return rf"\sum_{{{over}}} {inner}", _SUM
            return rf"\operatorname{{{kind}}}_{{{over}}} \left({inner}\right)", _ATOM
        if name in _TIGHT:
            return self._written(arguments[0])
        if name == "stacked":
            return r"\left[{}\right]".format(r",\; ".join(self.write(part) for part in arguments)), _ATOM
        if name not in _WRITTEN:
            raise BookError(f"formula: the function {name} has no sign")
        least = _ATOM if name in ("transposed", "shared", "used", "at", "part") else 0
        text = _WRITTEN[name].format(*(self.write(part, least) for part in arguments))
        return text, _SUM if name in _LOOSE else _ATOM

    def _name(self, name: str) -> str:
        if name in self.symbols:
            return self.symbols[name]
        base, _, index = name.partition("_")
        if index:
            return rf"{self._name(base)}_{{\mathrm{{{index}}}}}"
        if name in _SPELLED:
            return _SPELLED[name]
        if name in _GREEK:
            return f"\\{name}"
        if len(name) > 1 and name[0] == "d" and (len(name) == 2 or name[1:] in ("mu", "gate", "up", "logits", "loss")):
            return rf"\mathrm{{d}}{self._name(name[1:])}"
        return name if len(name) == 1 else rf"\mathrm{{{name}}}"
