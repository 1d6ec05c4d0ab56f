"""What an answer may use: the exercise is to write it, so what is ready-made is refused.

Before it runs, its text is read: imports of other packages, names of ready functions. While it runs, its module has
built-ins of its own, whose import is guarded, and Torch asks about every function that is called from the file.
"""

import ast
import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refllm.errors import RefllmError

PACKAGES = ("numpy", "math", "itertools", "functools", "typing", "dataclasses", "collections")
TRITON_PACKAGES = (*PACKAGES, "torch", "triton")
_FORBIDDEN_BUILTINS = ("eval", "exec", "compile", "open", "input", "breakpoint", "globals", "vars")
_READY = {"softmax", "log_softmax", "logsumexp", "layer_norm", "rms_norm", "cross_entropy", "nll_loss", "silu", "gelu",
          "scaled_dot_product_attention", "LayerNorm", "RMSNorm", "Softmax", "CrossEntropyLoss", "SiLU"}  # fmt: skip
"""Attributes that are a whole exercise by themselves."""
_MODULES = ("nn", "functional", "compile", "autograd", "jit", "library", "ops")
"""Parts of Torch that no exercise needs."""
_MAKES = ("empty", "empty_like", "empty_strided", "full", "full_like", "new_empty", "new_full", "new_ones", "new_zeros",
          "ones", "ones_like", "zeros", "zeros_like")  # fmt: skip
_MOVES = ("clone", "contiguous", "detach", "expand", "flatten", "float", "permute", "reshape", "squeeze", "to",
          "transpose", "type_as", "unsqueeze", "view")  # fmt: skip
_TELLS = ("__format__", "__get__", "__getitem__", "__hash__", "__len__", "__repr__", "data_ptr", "dim", "element_size",
          "get_device", "is_contiguous", "is_floating_point", "item", "numel", "size", "storage_offset", "stride",
          "tolist", "untyped_storage")  # fmt: skip
TORCH_MAY = frozenset((*_MAKES, *_MOVES, *_TELLS))
"""What of Torch an answer in Triton may call: memory, and how it is looked at. Nothing that computes."""


class RefusedError(RefllmError):
    """An answer uses what the exercise is to write. line: where, 0 if that is not known."""

    def __init__(self, text: str, line: int = 0) -> None:
        super().__init__(text)
        self.line = line


def read(source: str, function: str, packages: tuple[str, ...]) -> ast.Module:
    """The tree of an answer. packages: what it may import. Raises RefusedError for what it may not use, SyntaxError for
    what is no Python."""
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        for name in _imported(node):
            _check_import(name, packages, getattr(node, "lineno", 0))
        if isinstance(node, ast.Attribute) and node.attr in _READY:
            what = f"{ast.unparse(node.value)}.{node.attr}"
            raise RefusedError(f"{what} is ready-made; here it is yours to write", node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in _MODULES and ast.unparse(node.value) == "torch":
            raise RefusedError(f"torch.{node.attr} is not needed here; write {function} yourself", node.lineno)
        if isinstance(node, ast.Name) and node.id in (*_FORBIDDEN_BUILTINS, "__import__") and node.id not in own:
            raise RefusedError(f"{node.id} has no place in an answer", node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in ("__globals__", "__builtins__", "__subclasses__"):
            raise RefusedError(f"{node.attr} has no place in an answer", node.lineno)
    return tree


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or '.'}.{alias.name}" for alias in node.names]
    return []


def _check_import(name: str, packages: tuple[str, ...], line: int = 0) -> None:
    root, *rest = name.split(".")
    if root not in packages:
        why = "it has the answer" if root == "refllm" else f"it is none of {', '.join(packages)}"
        raise RefusedError(f"an answer may not import {root}: {why}", line)
    if rest and (rest[-1] in _READY or (root == "torch" and rest[0] in _MODULES)):
        raise RefusedError(f"{name} is ready-made; here it is yours to write", line)


def run_module(path: Path, tree: ast.Module, packages: tuple[str, ...]) -> dict[str, Any]:
    """The names of an answer's module, which is run with guarded built-ins. packages: what it may import."""

    def guarded_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        for one in (f"{name}.{x}" for x in fromlist or ()) if fromlist else (name,):
            _check_import(one, packages)
        return builtins.__import__(name, globals, locals, fromlist, level)

    allowed = {k: v for k, v in vars(builtins).items() if k not in _FORBIDDEN_BUILTINS}
    guarded = allowed | {"__import__": guarded_import}
    space: dict[str, Any] = {"__builtins__": guarded, "__name__": "answer", "__file__": str(path)}
    exec(builtins.compile(tree, str(path), "exec"), space)
    return space


@contextlib.contextmanager
def torch_asked(path: Path, more: tuple[str, ...] = ()) -> Iterator[None]:
    """Within it, functions of Torch that compute raise RefusedError where the file calls them. more: names that are
    allowed besides `TORCH_MAY`."""
    from torch.overrides import TorchFunctionMode

    allowed = TORCH_MAY | set(more)

    class _Asked(TorchFunctionMode):  # type: ignore[no-untyped-call, misc, unused-ignore]
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(function, "__name__", str(function))
            if name not in allowed:
                line = _called_from(path)
                if line:
                    raise RefusedError(f"{name} of Torch computes; here the kernel has to", line)
            return function(*args, **(kwargs or {}))

    with _Asked():
        yield


def _called_from(path: Path) -> int:
    """The line of the file that called Torch; 0 where something else did."""
    frame: Any = sys._getframe(2)
    while frame is not None and "/torch/" in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return frame.f_lineno if frame is not None and frame.f_code.co_filename == str(path) else 0
