"""The function that is checked: found by its name, or given; and what it needs to run."""

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refllm import apart
from refllm.errors import InputError
from refllm.extras import require
from refllm.opcheck.autograd import Autograd, find_differentiable
from refllm.user_code import find_function

ARRAYS = ("torch", "numpy")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Candidate:
    """name: for reports. function: takes and returns what the operator does. reference: "module:function" or
    "file.py:function" if it can be found again by it, else "". arrays: what it takes, one of `ARRAYS`. triton: whether
    it launches Triton kernels, which on a CPU run on the interpreter. autograd: the forward operator whose gradients
    are judged, of a function that autograd follows; "" for one that is judged itself.
    """

    name: str
    function: Callable[..., Any]
    reference: str
    arrays: str
    device: str
    triton: bool
    autograd: str = ""

    @property
    def interpreted(self) -> bool:
        """Whether its kernels run on the interpreter."""
        return self.triton and self.device == "cpu"


def load(candidate: Any, *, arrays: str = "torch", device: str = "cpu") -> Candidate:
    """The candidate that a name or a function means. Raises InputError for one that cannot be had."""
    if arrays not in ARRAYS:
        raise InputError(f"--arrays {arrays} is not known; use {' or '.join(ARRAYS)}")
    if device.partition(":")[0] not in DEVICES:
        raise InputError(f"--device {device} is not known; use {' or '.join(DEVICES)}")
    if arrays == "torch":
        require("a candidate that takes tensors (--arrays numpy takes NumPy arrays)", "torch")
    if device != "cpu":
        _needs_gpu(device, arrays)
    if isinstance(candidate, str):
        survive_import(candidate, find)
        function, reference = find(candidate), candidate
    elif callable(candidate):
        function, reference = candidate, _reference(candidate)
    else:
        raise InputError(
            f"a candidate is a function, or its name as module:function or file.py:function; found {candidate!r}"
        )
    name = candidate if isinstance(candidate, str) else _name(candidate)
    triton = arrays == "torch" and uses_triton(function)
    if triton and device == "cpu":
        _needs_interpreter(name)
    return Candidate(name, function, reference, arrays, device, triton)


def by_autograd(candidate: Candidate, operator: str) -> Candidate:
    """The backward operator that autograd makes of a candidate. Raises InputError where it cannot."""
    find_differentiable(operator)
    if candidate.arrays == "numpy":
        raise InputError(
            "--backward --arrays numpy: autograd follows Torch tensors; check the backward operator itself"
        )
    require("gradients by autograd (--backward)", "torch")
    return replace(candidate, function=Autograd(operator, candidate.function), autograd=operator)


def uses_triton(function: Any) -> bool:
    """Whether the module of a function has Triton kernels, or imports something of a module that has: of its own
    package, or of another one that it names itself.

    A function that has an attribute `uses_triton` says so itself.
    """
    if isinstance(getattr(function, "uses_triton", None), bool):
        return bool(function.uses_triton)
    seen: set[str] = set()
    return any(_has_triton(module) for module in _modules(_unwrapped(function), seen))


def _modules(function: Any, seen: set[str]) -> Iterator[types.ModuleType]:
    start = sys.modules.get(getattr(function, "__module__", "") or type(function).__module__)
    waiting = [start] if start is not None else []
    waiting += [m for m in (sys.modules.get(name) for name in _modules_within(function)) if m is not None]
    while waiting:
        module = waiting.pop()
        name = module.__name__
        if name in seen or name.split(".")[0] in _NOT_SEARCHED:
            continue
        seen.add(name)
        yield module
        root = name.split(".")[0]
        for value in list(vars(module).values()):
            where = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if not isinstance(where, str) or where not in sys.modules:
                continue
            other = where.split(".")[0]
            if other == root or (module is start and other not in _NOT_FOLLOWED):
                waiting.append(sys.modules[where])


def _modules_within(function: Any) -> set[str]:
    """The names of the modules of what a function holds in its closure, and of what that holds in turn: decorators need
    not say whom they wrap."""
    names, waiting, seen = set[str](), [function], set[int]()
    while waiting:
        one = _unwrapped(waiting.pop())
        if id(one) in seen:
            continue
        seen.add(id(one))
        names |= {type(one).__module__, getattr(one, "__module__", None) or ""}
        waiting += [_content(cell) for cell in getattr(one, "__closure__", None) or ()]
    return names


_NOT_SEARCHED = {"torch", "numpy", "triton", "transformers", *sys.stdlib_module_names}
_NOT_FOLLOWED = {"refllm", "pytest", "_pytest", "hypothesis"}
"""Packages that a candidate's module may name though the candidate does not run on them."""


def _has_triton(module: types.ModuleType) -> bool:
    def belongs(value: Any) -> bool:
        name = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
        return name.split(".")[0] == "triton"

    return any(belongs(value) for value in list(vars(module).values()))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__") or hasattr(function, "func"):
        function = getattr(function, "__wrapped__", None) or function.func
    return function


def find(reference: str) -> Callable[..., Any]:
    """The function that "module:function" or "file.py:function" means. Raises InputError if there is none."""
    if ":" not in reference:
        raise InputError(f"--candidate {reference}: name a function, as module:function or file.py:function")
    # Modules beside the user, as `python -m` would find them.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    folder = str(Path(reference.rpartition(":")[0]).resolve().parent)
    if reference.rpartition(":")[0].endswith(".py") and folder not in sys.path:
        sys.path.insert(0, folder)  # what a file imports from beside itself, as when it is run
    return find_function(reference)


def survive_import(reference: str, find: Callable[[str], Any]) -> None:
    """Raises InputError for a file or module whose import ends the process, as os._exit and a crash do."""
    if reference.rpartition(":")[0] in sys.modules:
        return
    with contextlib.suppress(ModuleNotFoundError):
        import torch  # noqa: F401 (once, and not in every process)

    def imported() -> None:
        with contextlib.suppress(InputError):  # is said where it is imported to stay
            find(reference)

    ended = apart.run(imported)
    if isinstance(ended, apart.Ended):
        raise InputError(f"{reference} cannot be imported: {ended.text}")


def _reference(function: Any) -> str:
    """ "module:function" if that is this function, else ""."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name or "." in name:
        return ""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception:  # whatever stands in the way, there is no such name
        return ""
    same = found is function or (getattr(found, "__qualname__", None) == name and callable(found))
    return f"{module}:{name}" if same else ""


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


def _needs_gpu(device: str, arrays: str) -> None:
    if arrays == "numpy":
        raise InputError(f"--device {device}: NumPy arrays are on the CPU; leave the option out")
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no GPU here; use cpu, where Triton kernels are interpreted")


def _needs_interpreter(name: str) -> None:
    import triton

    if triton.knobs.runtime.interpret:
        raise InputError(f"{name}: unset TRITON_INTERPRET; its kernels run on refllm's own interpreter here")
    from refllm import kernels

    with kernels.interpreted():  # imports what it needs, here and not in every process that a crash ends
        pass
