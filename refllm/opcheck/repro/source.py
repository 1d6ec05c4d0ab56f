"""The lines that make the candidate: an import, or its own source where it has no name to import it by."""

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from refllm.opcheck.candidate import Candidate


def candidate_code(candidate: Candidate) -> tuple[list[str], set[str]]:
    """Lines that make `candidate`, and the standard modules that they need."""
    where, _, name = candidate.reference.rpartition(":")
    if not where:
        return _source(inspect.unwrap(candidate.function))
    lines = []
    if where.endswith(".py"):
        path = Path(where).resolve()
        lines, where = [f"sys.path.insert(0, {str(path.parent)!r})"], path.stem
    else:
        file = getattr(sys.modules.get(where), "__file__", None)
        root = Path(file).resolve().parents[where.count(".") + (Path(file).name == "__init__.py")] if file else None
        if root is not None and not where.startswith("refllm") and root.name not in ("site-packages", "dist-packages"):
            lines = [f"sys.path.insert(0, {str(root)!r})"]
    return [*lines, f'candidate = getattr(importlib.import_module("{where}"), "{name}")'], {"importlib"}


def _source(function: Any) -> tuple[list[str], set[str]]:
    """The function itself with what it uses, if all of that can be written down; else a place to put it."""
    imports: dict[str, None] = {}
    sources: dict[str, str] = {}
    if not _gather(function, imports, sources):
        return [
            'print("put your function here, as `candidate`: it has no name by which it can be imported")',
            "sys.exit(2)",
        ], set()
    texts = [line for text in sources.values() for line in ("", "", *text.splitlines())]
    return [*imports, *texts, "", "", f"candidate = {function.__name__}"], set()


def _gather(function: Any, imports: dict[str, None], sources: dict[str, str]) -> bool:
    """Adds the source of a plain function, of the functions that it calls, and the imports and numbers they use."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return False
    if not source.startswith("def ") or function.__closure__:
        return False
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if name in ("np", "torch") or name in sources or name not in function.__globals__ or value is function:
            continue
        if inspect.ismodule(value):
            imports[_import(name, value.__name__)] = None
        elif isinstance(value, int | float | str):
            sources[name] = f"{name} = {value!r}"
        elif inspect.isfunction(value) and value.__module__ != function.__module__ and "<" not in value.__qualname__:
            imports[f"from {value.__module__} import {value.__name__} as {name}"] = None
        elif not inspect.isfunction(value) or not _gather(value, imports, sources):
            return False
    sources[function.__name__] = source.rstrip()
    return True


def _names(code: Any) -> list[str]:
    """The global names that a function uses, those of functions inside it too."""
    inner = [c for c in code.co_consts if inspect.iscode(c)]
    return list(dict.fromkeys([*code.co_names, *(name for c in inner for name in _names(c))]))


def _import(name: str, module: str) -> str:
    return f"import {module}" if name == module else f"import {module} as {name}"
