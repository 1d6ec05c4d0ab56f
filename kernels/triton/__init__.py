"""The operators as Triton kernels: one file per kernel, from the formula at its top to the launch at its end.

An operator is found by its name in the files of this folder.
"""

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from refllm.ops.contracts import OPERATORS, contract_of, without_axes

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


_files = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
FILES: dict[str, ModuleType] = {
    name: file
    for name in OPERATORS
    for file in _files
    if getattr(vars(file).get(name), "__module__", "") == file.__name__
}
"""The kernel file of each operator."""

KERNELS = tuple(dict.fromkeys(FILES.values()))
"""The kernel files; each yields its shipped configurations from `launches(target)`."""

__all__ = [*OPERATORS]
# After all imports, because the function rms_norm hides the module of that name in this package.
globals().update({name: vars(file)[name] for name, file in FILES.items()})


def plan(operator: str, arguments: Any, keywords: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    """What the `plan` of the operator's kernel file returns for a call: its launch or launches, then its results.

    A parameter of that function that is no argument of the operator is None: the residual of a norm alone. more: the
    target, the tile.
    """
    function = FILES[operator].plan
    given = contract_of(operator).bound(arguments, keywords)
    taken = (name for name in inspect.signature(function).parameters if name not in ("target", "tile"))
    planned: tuple[Any, ...] = function(*(given.get(without_axes(name)) for name in taken), **more)
    return planned
