"""The operators as Triton kernels: one file per kernel, from the formula at its top to the launch at its end.

An operator, and its backward pass, is found by its name in the files of this folder.
"""

import inspect
import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from refllm.ops.contracts import OPERATORS, contract_of, without_axes

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


_files = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]


def _found(names: Iterable[str]) -> dict[str, ModuleType]:
    return {
        name: file
        for name in names
        for file in _files
        if getattr(vars(file).get(name), "__module__", "") == file.__name__
    }


FILES = _found(OPERATORS)
"""The kernel file of each operator."""
BACKWARD_FILES = _found(f"{name}_backward" for name in OPERATORS)
"""The kernel file of each operator's backward pass, which registers it with Torch's autograd."""

KERNELS, BACKWARD_KERNELS = (tuple(dict.fromkeys(files.values())) for files in (FILES, BACKWARD_FILES))
"""The kernel files; each yields its shipped configurations from `launches(target)`."""

__all__ = [*FILES, *BACKWARD_FILES]
# After all imports, because the function rms_norm hides the module of that name in this package.
globals().update({name: vars(file)[name] for name, file in (FILES | BACKWARD_FILES).items()})


def plan(operator: str, arguments: Any, keywords: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    """What the `plan` of the operator's kernel file returns for a call: its launch or launches, then its results.

    A parameter of that function that is no argument of the operator has its default, or else is None: the residual of a
    norm alone. more: the target, the tile.
    """
    function = (FILES | BACKWARD_FILES)[operator].plan
    given = {"operator": operator, **contract_of(operator).bound(arguments, keywords)}
    parameters = inspect.signature(function).parameters.values()
    taken = [p.name for p in parameters if p.default is p.empty or without_axes(p.name) in given]
    planned: tuple[Any, ...] = function(*(given.get(without_axes(name)) for name in taken), **more)
    return planned
