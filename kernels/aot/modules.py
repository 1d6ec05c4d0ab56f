"""Imports the module that a kernel stands in: by a dotted name, or a file, also one inside a package."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from triton import knobs
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from refllm.errors import InputError


@cache
def load(module: str) -> Any:
    """The module of a dotted name or a path that ends in .py, imported. Raises InputError if that fails."""
    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, and with it nothing can be compiled; unset it")
    if module.endswith(".py") and not Path(module).is_file():
        raise InputError(f"no such file: {module}")
    try:
        return _load_file(Path(module).resolve()) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises is the answer to the user
        found = _without_a_gpu(Path(module).resolve()) if module.endswith(".py") else None
        if found is None:
            raise InputError(f"{module} cannot be imported: {said(error)}") from None
        return found


def said(error: Exception) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _load_file(path: Path) -> Any:
    if not (path.parent / "__init__.py").is_file():
        return _alone(path)
    root = path.parent
    while (root.parent / "__init__.py").is_file():
        root = root.parent
    dotted = [root.name, *path.relative_to(root).with_suffix("").parts]
    dotted = dotted[:-1] if dotted[-1] == "__init__" else dotted
    before, reason = set(sys.modules), None
    if root.name not in sys.modules or _is_at(sys.modules[root.name], root):
        try:
            with _first_on_the_path(root.parent):
                return importlib.import_module(".".join(dotted))
        except Exception as error:  # a package may need more than the one file that is asked for
            reason = error
            for name in [n for n in sys.modules if n not in before and n.split(".")[0] == root.name]:
                del sys.modules[name]
    try:
        return _without_packages(root, dotted)
    except Exception as error:
        raise reason or error from None


def _is_at(package: ModuleType, root: Path) -> bool:
    return any(Path(place).resolve() == root for place in getattr(package, "__path__", ()))


def _without_packages(root: Path, dotted: list[str]) -> Any:
    """The module with packages around it whose __init__.py was not run: what it imports from beside it is found."""
    taken = root.name in sys.modules
    names = [f"_user_kernels_{root.name}" if taken else root.name, *dotted[1:]]
    for depth in range(1, len(names)):
        package = ModuleType(".".join(names[:depth]))
        package.__path__ = [str(root.joinpath(*dotted[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    with _first_on_the_path(root.parent):
        return importlib.import_module(".".join(names))


def _alone(path: Path, part_of_it: bool = False) -> Any:
    """The module of a file; with `part_of_it` what it had defined when it failed."""
    name = f"_user_kernels_{path.stem}"  # not the stem alone: a file may be called torch.py
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with _first_on_the_path(path.parent):  # as for a script: its neighbours can be imported
        try:
            spec.loader.exec_module(module)
        except Exception:
            if not part_of_it:
                raise
    return module


def _without_a_gpu(path: Path) -> Any:
    """What a script defines before it needs a GPU for more than to ask for it; None if that is no kernel.

    Tutorials ask for the device in their first lines, and measure in their last.
    """
    from refllm.kernels.interpreter import cuda_stand_in
    from refllm.kernels.interpreter.cuda_answers import needs_gpu
    from refllm.kernels.interpreter.exchange import Exchange

    exchanged = Exchange()
    with cuda_stand_in():
        exchanged.set(JITFunction, "run", needs_gpu("a launch when a file is imported"))
        try:
            module = _alone(path, part_of_it=True)
        except Exception:
            return None
        finally:
            exchanged.undo()
    return module if any(isinstance(value, _KERNELS) for value in vars(module).values()) else None


_KERNELS = (JITFunction, Autotuner, Heuristics)


@contextlib.contextmanager
def _first_on_the_path(folder: Path) -> Iterator[None]:
    """Only meanwhile: other processes inherit the path, and are to find the real torch."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
