"""A kernel file of this project with its source changed, as a module of its own: what a Triton mutant is made of.

    rms_norm = changed("rms_norm", Change("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"))

The file itself stays as it is, and so does everything that is imported from it elsewhere.
"""

import functools
import importlib.util
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from refllm.errors import RefllmError
from refllm.kernels.mutants import Mutant

_KERNELS = "refllm.kernels.triton"
_REGISTERS = "@torch.library.custom_op("
ALL = ("bfloat16", "float16", "float32")
NARROW = ("bfloat16", "float16")


class StaleChangeError(RefllmError):
    """A change no longer fits the kernel file that it was written for."""


@dataclass(frozen=True)
class Change:
    """`old`, which stands exactly once in kernels/triton/<file>.py, becomes `new`. file "": the operator's own."""

    old: str
    new: str
    file: str = ""


@dataclass(frozen=True)
class ChangedKernel:
    """Builds the operator of a changed kernel file: the `build` of a mutant, and the changes for those who read it."""

    operator: str
    file: str
    changes: tuple[Change, ...]

    def __call__(self) -> Callable[..., Any]:
        """The operator, from source that is changed and executed on the first call."""
        return getattr(_module(self.file, self.changes), self.operator)


def planted(
    operator: str,
    file: str,
    name: str,
    what: str,
    source: str,
    *changes: Change | tuple[str, str],
    dtypes: tuple[str, ...] = ALL,
    equivalent: str = "",
    corner: str = "",
    place: str = "",
) -> Mutant:
    """The mutant of `operator` that is kernels/triton/`file`.py with these changes; a pair is a `Change` of that file.

    The other arguments: see `Mutant`.
    """
    made = (c if isinstance(c, Change) else Change(*c) for c in changes)
    kernel = ChangedKernel(operator, file, tuple(c if c.file else replace(c, file=file) for c in made))
    return Mutant(name, operator, "triton", what, source, kernel, dtypes, equivalent, corner, place)


def source_of(file: str) -> str:
    """The source of kernels/triton/<file>.py as it stands."""
    spec = importlib.util.find_spec(f"{_KERNELS}.{file}")
    if spec is None or spec.origin is None:
        raise StaleChangeError(f"kernels/triton/{file}.py does not exist, and a mutant changes it")
    return Path(spec.origin).read_text(encoding="utf-8")


def changed_source(file: str, changes: tuple[Change, ...]) -> str:
    """The source of that file with the changes that are its own.

    Raises StaleChangeError for a change whose old text is not found exactly once.
    """
    source = source_of(file)
    for change in changes:
        if change.file != file:
            continue
        found = source.count(change.old)
        if found != 1:
            line = change.old.strip().splitlines()[0]
            raise StaleChangeError(
                f"kernels/triton/{file}.py holds the text of a mutant {found} times, not once: {line!r}; "
                "the kernel has changed, so write the mutant anew"
            )
        source = source.replace(change.old, change.new)
    return source


@functools.cache
def _module(file: str, changes: tuple[Change, ...]) -> ModuleType:
    """The changed file as a module. Of other kernel files that are changed too, it imports the changed form."""
    source = changed_source(file, changes)
    for other in {change.file for change in changes} - {file}:
        imported = f"from {_KERNELS}.{other} import"
        if imported not in source:
            raise StaleChangeError(
                f"kernels/triton/{file}.py imports nothing from {other}.py, which its mutant changes"
            )
        source = source.replace(imported, f"from {_module(other, changes).__name__} import")
    # An operator can be registered with Torch only once; what is registered is a plain function already.
    source = source.replace(_REGISTERS, "@_unregistered(")
    for registers in ("differentiable", "only_once"):
        source = source.replace(f"\n{registers}(", "\n_unregistered(")
    return _execute(file, source)


def _execute(file: str, source: str) -> ModuleType:
    """A module of that source. Triton reads the source of kernels by inspect, which asks linecache."""
    name = f"refllm_mutant_{file}_{sum(key.startswith('refllm_mutant_') for key in sys.modules)}"
    origin = f"/{name}.py"
    module = ModuleType(name)
    module.__file__ = origin
    vars(module)["_unregistered"] = _unregistered
    linecache.cache[origin] = (len(source), None, source.splitlines(keepends=True), origin)
    sys.modules[name] = module
    exec(compile(source, origin, "exec"), vars(module))
    return module


def _unregistered(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """Stands in for torch.library.custom_op: leaves the function as it is, and drops what Torch would be told."""

    def keep(function: Any) -> Any:
        function.register_fake = lambda fake: fake
        return function

    return keep
