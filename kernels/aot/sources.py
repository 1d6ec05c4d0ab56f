"""Where launches come from: the kernels here, a user's file that carries its configurations, or the command line.

A source can be pickled, so that a process that compiles can make the same launches again.
"""

import ast
import inspect
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from refllm.errors import InputError, RefllmError
from refllm.kernels.aot import guess
from refllm.kernels.aot.modules import load, said
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
            raise InputError(f"launches of {self.module} fail on {target.name}: {said(error)}") from None
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
        self._complete(kernel, given, constants, target)
        try:
            configurations = list(_configurations(kernel, {**given, **constants}))
        except Exception as error:  # a heuristic of the user's
            raise InputError(f"the heuristics of {self.kernel} fail: {said(error)}") from None
        return [self._launch(kernel, given, constants, *each) for each in configurations]

    def _launch(
        self, kernel: Any, given: dict[str, Any], constants: dict[str, Any], values: dict[str, Any], config: Any
    ) -> Named:
        warps, stages = (config.num_warps, config.num_stages) if config else (self.num_warps, self.num_stages)
        name = " ".join(f"{key}={value}" for key, value in {**constants, **values}.items())
        launch = Launch(_innermost(kernel), (1,), given, {**constants, **values}, warps, stages)
        return f"{name} warps={warps} stages={stages}".strip(), launch

    def _complete(self, kernel: Any, given: dict[str, Any], constants: dict[str, Any], target: Target) -> None:
        """Raises InputError, with a command that compiles if one can be guessed, where something is missing."""
        function, said_of = _innermost(kernel), {*given, *constants, *_decided_by(kernel)}
        names = [parameter.name for parameter in function.params]
        if unknown := sorted(said_of - set(names)):
            raise InputError(f"{self.kernel} has no parameter {unknown[0]!r}; it has {', '.join(names)}")
        missing = [p for p in function.params if p.name not in said_of and not p.has_default]
        if not missing:
            return
        found, options = guess.guesses(load(self.module), self.kernel, function, missing)
        usual = {"num_warps": self.num_warps, "num_stages": self.num_stages} | options
        source = replace(self, num_warps=usual["num_warps"], num_stages=usual["num_stages"])
        found, refused = guess.compiling(function, found, lambda each: source._with(each)._refused(target))
        words = ["refllm kernels check-aot", shlex.quote(f"{self.module}:{self.kernel}")]
        words += [f"--arg {shlex.quote(f'{name}={text}')}" for name, text in self.arguments]
        words += [f"--constant {shlex.quote(f'{name}={text}')}" for name, text in self.constants]
        words += [each.words() for each in found]
        words += [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
        how = f"which do not compile yet ({refused})" if refused else "which compile"
        raise InputError(
            f"{self.kernel} cannot be compiled without {', '.join(p.name for p in missing)}; correct the guesses in "
            f"this, {how}, or give the file a list LAUNCHES: {' '.join(words)}"
        )

    def _with(self, guesses: list[guess.Guess]) -> "CommandSource":
        more = {kind: tuple((g.name, g.text) for g in guesses if g.constant == kind) for kind in (False, True)}
        return replace(self, arguments=self.arguments + more[False], constants=self.constants + more[True])

    def _refused(self, target: Target) -> str:
        """What the compiler says against the first configuration; "" if nothing."""
        from refllm.kernels.aot.compile_code import compile_launches

        try:
            (result,) = compile_launches([self.launches(target)[0][1]], target)
        except InputError as error:
            return str(error)
        return str(result) if isinstance(result, RefllmError) else ""


Source = FileSource | CommandSource


def our_sources() -> list[FileSource]:
    """One source per kernel file of refllm."""
    from refllm.kernels.triton import BACKWARD_KERNELS, KERNELS

    return [FileSource(module.__name__, ours=True) for module in (*KERNELS, *BACKWARD_KERNELS)]


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


def _split(reference: str) -> tuple[str, str | None]:
    where, colon, kernel = reference.rpartition(":")
    return (where, kernel) if colon else (reference, None)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{text!r}: expected NAME=VALUE")
    return name.strip(), value.strip()


def first_line(value: Any) -> str:
    """The first line of what a module or function says about itself."""
    return (inspect.getdoc(value) or "").strip().split("\n")[0]
