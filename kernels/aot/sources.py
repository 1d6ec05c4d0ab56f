"""Where launches come from: the kernels here, a user's file that carries its configurations, or the command line.

A source can be pickled, so that a process that compiles can make the same launches again.
"""

import ast
import importlib
import importlib.util
import inspect
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from refllm.errors import InputError
from refllm.kernels.launch import Launch
from refllm.kernels.targets import DEFAULT, Target

Named = tuple[str, Launch]


@dataclass(frozen=True)
class FileSource:
    """The launches that a module carries: what its `launches(target)` yields, or what its `LAUNCHES` holds.

    module: a dotted name or the path of a .py file. kernel: only the launches of this one; None means all.
    ours: whether it is part of refllm: then a compile error is a finding about it and no mistake of the user's.
    """

    module: str
    kernel: str | None = None
    ours: bool = False

    def launches(self, target: Target) -> list[Named]:
        """Names and launches for `target`. Raises InputError if the module's own code fails."""
        module = load(self.module)
        carried: Any = getattr(module, "launches", None) or getattr(module, "LAUNCHES", ())
        try:
            named = list(carried(target) if callable(carried) else carried)
        except Exception as error:  # the module's own code: whatever it raises is the answer to its author
            raise InputError(f"launches of {self.module} fail on {target.name}: {_said(error)}") from None
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Launch) for pair in named):
            raise InputError(f"launches of {self.module} must be pairs (name, refllm.kernels.launch.Launch)")
        return [(name, launch) for name, launch in named if self.kernel in (None, kernel_name(launch.kernel))]


@dataclass(frozen=True)
class CommandSource:
    """One kernel of a user's file with what the command line says that it is called with.

    arguments, constants: (name, text) as typed: `x_ptr=*bf16`, `n=4096`, `BLOCK=128`.
    """

    module: str
    kernel: str
    arguments: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, str], ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    ours: bool = False

    def launches(self, target: Target) -> list[Named]:
        """One launch, or one per configuration if the kernel is autotuned.

        Raises InputError, with the command line that would do, if a parameter of the kernel was given nothing.
        """
        kernel = find_kernel(load(self.module), self.module, self.kernel)
        given = {name: read_argument(name, text) for name, text in self.arguments}
        constants = {name: read_constant(text) for name, text in self.constants}
        self._complete(_innermost(kernel), {*given, *constants, *_decided_by(kernel)})
        try:
            configurations = list(_configurations(kernel, {**given, **constants}))
        except Exception as error:  # a heuristic of the user's
            raise InputError(f"the heuristics of {self.kernel} fail: {_said(error)}") from None
        return [self._launch(kernel, given, constants, *each) for each in configurations]

    def _launch(
        self, kernel: Any, given: dict[str, Any], constants: dict[str, Any], values: dict[str, Any], config: Any
    ) -> Named:
        warps, stages = (config.num_warps, config.num_stages) if config else (self.num_warps, self.num_stages)
        name = " ".join(f"{key}={value}" for key, value in {**constants, **values}.items())
        launch = Launch(_innermost(kernel), (1,), given, {**constants, **values}, warps, stages)
        return f"{name} warps={warps} stages={stages}".strip(), launch

    def _complete(self, function: JITFunction, given: set[str]) -> None:
        names = [parameter.name for parameter in function.params]
        if unknown := sorted(given - set(names)):
            raise InputError(f"{self.kernel} has no parameter {unknown[0]!r}; it has {', '.join(names)}")
        missing = [p for p in function.params if p.name not in given and not p.has_default]
        if not missing:
            return
        words = ["refllm kernels check-aot", shlex.quote(f"{self.module}:{self.kernel}")]
        words += [f"--arg {shlex.quote(f'{name}={text}')}" for name, text in self.arguments]
        words += [f"--constant {shlex.quote(f'{name}={text}')}" for name, text in self.constants]
        words += [_guess(parameter, _pointers(function)) for parameter in missing]
        raise InputError(
            f"{self.kernel} cannot be compiled without {', '.join(p.name for p in missing)}; correct the guesses in "
            f"this, or give the file a list LAUNCHES: {' '.join(words)}"
        )


Source = FileSource | CommandSource


def our_sources() -> list[FileSource]:
    """One source per kernel file of refllm."""
    from refllm.kernels.triton import KERNELS

    return [FileSource(module.__name__, ours=True) for module in KERNELS]


def user_source(
    reference: str, arguments: Iterable[str], constants: Iterable[str], num_warps: int, num_stages: int
) -> Source:
    """The source that "file.py", "file.py:kernel" or "package.module:kernel" names. The file is imported.

    With arguments or constants it is the kernel called with those, otherwise the launches that the module carries.
    Raises InputError if there is no such file or kernel, or if a text among them has no "=".
    """
    where, kernel = _split(reference)
    module = load(where)
    if kernel:
        find_kernel(module, where, kernel)
    typed = tuple(map(_assignment, arguments)), tuple(map(_assignment, constants))
    carried = FileSource(where, kernel)
    if not any(typed) and carried.launches(DEFAULT):
        return carried
    names = kernels_in(module)
    if kernel is None and len(names) != 1:
        listed = f"the kernels {', '.join(names)}" if names else "no @triton.jit function"
        raise InputError(f"{where} has {listed}; name one as {where}:{names[0] if names else 'kernel'}")
    return CommandSource(where, kernel or names[0], *typed, num_warps, num_stages)


@cache
def load(module: str) -> Any:
    """The module of a dotted name or a path that ends in .py, imported. Raises InputError if that fails."""
    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, and with it nothing can be compiled; unset it")
    if module.endswith(".py") and not Path(module).is_file():
        raise InputError(f"no such file: {module}")
    try:
        return _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises is the answer to the user
        raise InputError(f"{module} cannot be imported: {_said(error)}") from None


def _load_file(path: Path) -> Any:
    name = f"_user_kernels_{path.stem}"  # not the stem alone: a file may be called torch.py
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as for a script: its neighbours can be imported
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)  # only meanwhile: other processes inherit the path, and are to find the real torch
    return module


def kernels_in(module: Any) -> list[str]:
    """Names of the kernels that a module defines: @triton.jit functions that none of the others calls."""
    own = {name: _innermost(value) for name, value in vars(module).items() if _is_kernel(value)}
    own = {name: function for name, function in own.items() if function.module == module.__name__}
    called = {name for function in own.values() for name in _names_in(function) if name != function.__name__}
    return [name for name in own if name not in called] or list(own)


def _names_in(function: JITFunction) -> set[str]:
    return {node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}


def find_kernel(module: Any, where: str, name: str) -> Any:
    """The kernel of that name. Raises InputError if the module has none, or something else of that name."""
    value = getattr(module, name, None)
    if _is_kernel(value):
        return value
    there = ", ".join(kernels_in(module)) or "none"
    if value is None:
        raise InputError(f"{where} has no kernel {name!r}; its @triton.jit functions: {there}")
    raise InputError(f"{name} in {where} is not decorated with @triton.jit; those that are: {there}")


def kernel_name(kernel: Any) -> str:
    """The name of a kernel as it was defined."""
    return str(_innermost(kernel).__name__)


def _is_kernel(value: Any) -> bool:
    return isinstance(value, JITFunction | Autotuner | Heuristics)


def _innermost(kernel: Any) -> Any:
    while isinstance(kernel, Autotuner | Heuristics):
        kernel = kernel.fn
    return kernel


def _decided_by(kernel: Any) -> set[str]:
    """Names of the parameters that an autotuner or heuristics around a kernel fill in."""
    if isinstance(kernel, Autotuner):
        return {name for config in kernel.configs for name in config.kwargs} | _decided_by(kernel.fn)
    return set(kernel.values) | _decided_by(kernel.fn) if isinstance(kernel, Heuristics) else set()


def _configurations(kernel: Any, given: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """(constants, triton.Config or None) for every configuration: one, or as many as the autotuner has."""
    if isinstance(kernel, Autotuner):
        for config in kernel.configs:
            for values, _ in _configurations(kernel.fn, {**given, **config.kwargs}):
                yield {**config.kwargs, **values}, config
    elif isinstance(kernel, Heuristics):
        decided = {name: decide({**given}) for name, decide in kernel.values.items()}
        for values, config in _configurations(kernel.fn, {**given, **decided}):
            yield {**decided, **values}, config
    else:
        yield {}, None


_FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_INTS = {"i1": torch.bool, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64}
_INTS |= {"u8": torch.uint8}
_DTYPES = {**_FLOATS, **_INTS}


def read_argument(name: str, text: str) -> Any:
    """What stands for a run-time argument: `*bf16` a tensor as Torch allocates it (`*bf16:1`: not aligned), `i32` an
    int of which nothing is known (`i32:16`: 16 divides it), `i64`, `fp32`, or a value: `4096`, `1e-5`, `True`, `None`.

    Raises InputError for anything else.
    """
    kind, _, divisor = text.partition(":")
    known = divisor or ("16" if kind.startswith("*") else "1")
    if kind.startswith("*") and kind[1:] in _DTYPES and known in ("1", "16"):
        tensor = torch.empty(2, dtype=_DTYPES[kind[1:]], device="meta")
        return tensor if known == "16" else tensor[1:]
    if kind in ("i32", "i64") and known in ("1", "16"):
        return (0 if kind == "i32" else 2**31) + (16 if known == "16" else 17)
    if kind in ("fp32", "i1") and not divisor:
        return 0.5 if kind == "fp32" else True
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if value is None or isinstance(value, int | float):
        return value
    raise InputError(
        f"--arg {name}={text}: give a type such as *bf16 or *bf16:1 (a tensor; not aligned), i32, i32:16 (16 divides "
        f"it), i64 or fp32, or a value; tensors may hold {', '.join(_DTYPES)}"
    )


def read_constant(text: str) -> Any:
    """The value of a tl.constexpr: Python's notation, `tl.bfloat16`, or text as it stands."""
    if text.startswith("tl.") and hasattr(tl, text[3:]):
        return getattr(tl, text[3:])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _guess(parameter: Any, pointers: set[str]) -> str:
    """An option for a parameter that nothing was said about; a guess to be corrected."""
    name = parameter.name
    if parameter.is_constexpr:
        return f"--constant {name}=128"
    if name in pointers:
        return f"--arg '{name}=*bf16'"
    floating = any(word in name for word in ("eps", "scale", "alpha", "beta"))
    return f"--arg {name}={'fp32' if floating else 'i32:16' if 'stride' in name else 'i32'}"


_MEMORY = ("load", "store", "atomic_add", "atomic_max", "atomic_cas", "make_block_ptr", "make_tensor_descriptor")


def _pointers(function: JITFunction) -> set[str]:
    """The names that loads and stores start from, through assignments: `p = x_ptr + row`, `tl.load(p + columns)`."""
    starts: dict[str, set[str]] = {}
    found: set[str] = set()
    for node in ast.walk(function.parse()):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            starts.setdefault(node.targets[0].id, set()).add(_leftmost(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _MEMORY and node.args:
            found.add(_leftmost(node.args[0]))
    for _ in range(len(starts)):
        found |= {start for name in found for start in starts.get(name, ())}
    return found | {parameter.name for parameter in function.params if "ptr" in parameter.name.lower()}


def _leftmost(expression: ast.expr) -> str:
    while isinstance(expression, ast.BinOp):
        expression = expression.left
    return expression.id if isinstance(expression, ast.Name) else ""


def _split(reference: str) -> tuple[str, str | None]:
    where, colon, kernel = reference.rpartition(":")
    return (where, kernel) if colon else (reference, None)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{text!r}: expected NAME=VALUE")
    return name.strip(), value.strip()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def first_line(value: Any) -> str:
    """The first line of what a module or function says about itself."""
    return (inspect.getdoc(value) or "").strip().split("\n")[0]
