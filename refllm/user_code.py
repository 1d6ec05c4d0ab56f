"""Functions of the user's own, by the words that name them: module:function or file.py:function."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refllm.errors import InputError


def find_function(reference: str) -> Callable[..., Any]:
    """The function that "module:function" or "file.py:function" names. Raises InputError if there is none; its cause is
    what the module raised, if it did."""
    where, _, name = reference.rpartition(":")
    try:
        module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        said = InputError(f"{where} cannot be imported: {type(error).__name__}: {error}")
        if error.name is not None and where.startswith(error.name):
            raise said from None  # there is no such module; else it lacks one itself
        raise said from error
    except SystemExit as error:  # a script that ends itself when it is imported
        raise InputError(f"{where} cannot be imported: it ends the program, with {error.code!r}") from error
    except Exception as error:  # whatever the user's module raises is the answer to the user
        missing = where.endswith(".py") and not Path(where).is_file()
        raise InputError(f"{where} cannot be imported: {type(error).__name__}: {error}") from None if missing else error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{where} has no function {name!r}")
    return function


def load_file(path: Path, name: str | None = None) -> Any:
    """The module in a file, which is executed, under the name of the file or another. Raises what it raises."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
