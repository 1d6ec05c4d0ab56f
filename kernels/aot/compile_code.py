"""Compiles one launch for one GPU, without that GPU, and reads the result.

The specialisation is not imitated: Triton's own binder turns the arguments into types, constants and properties, as it
does at run time (an int that 16 divides is known to be, 1 and None are constants, a tensor at a multiple of 16 bytes is
known to be there). Tensors on the meta device count as aligned where they start at the beginning of their storage.
"""

import contextlib
import gc
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler.errors import CompilationError
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction, create_function_from_signature

from refllm.errors import InputError, MissingExtraError, RefllmError
from refllm.kernels.aot.disassemble import opcodes_of, tool
from refllm.kernels.aot.machine_code import (
    Dot,
    Instructions,
    Resources,
    read_amdgcn,
    read_dots,
    read_ptxas_log,
    read_sass,
    read_traffic,
)
from refllm.kernels.aot.occupancy import Occupancy, occupancy
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target


class DoesNotCompile(RefllmError):
    """Triton or the assembler refuses the kernel in this configuration; the message says where and why."""


@dataclass(frozen=True)
class Report:
    """What one configuration of a kernel became on one target.

    shared: bytes of shared memory of a program. tensor_memory: columns of it (sm_100 only, else 0).
    dots: products of narrow numbers in the program. seconds: that the compilation took. loads_can_be_wide,
    stores_can_be_wide: the shares of `machine_code.read_traffic`, for kernels of which nobody said what to expect.
    """

    kernel: str
    target: str
    num_warps: int
    resources: Resources
    instructions: Instructions
    shared: int
    tensor_memory: int
    occupancy: Occupancy
    dots: tuple[Dot, ...]
    seconds: float
    loads_can_be_wide: float = field(default=0.0, compare=False)
    stores_can_be_wide: float = field(default=0.0, compare=False)


Result = Report | DoesNotCompile | InputError
"""What one among many compilations gives: the errors are about that launch alone."""


@dataclass(frozen=True)
class Specialisation:
    """What `triton.compile` takes, as a start of the launch would hand it over. key: equal for equal results."""

    source: Any
    gpu: Any
    options: Any
    key: str


def specialise(launch: Launch, target: Target) -> Specialisation:
    """Types, constants, known divisibilities and options of a launch on `target`.

    Raises InputError if the launch has no compilable kernel or does not give the arguments that the kernel takes.
    """
    kernel, gpu = _jit_function(launch.kernel), GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.arguments, **launch.constants}
    if missing := [p.name for p in kernel.params if p.name not in given and not p.has_default]:
        raise InputError(f"{kernel.__name__} cannot be compiled without {', '.join(missing)}")
    settings = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    settings = {
        name: value for name, value in settings.items() if name not in given
    }  # a kernel may have one of its own
    try:
        bound, properties, extra = bind(**given, **settings, debug=kernel.debug or False, instrumentation_mode="")
        options, signature, constants, attributes = kernel._pack_args(backend, extra, bound, properties, extra)
    except (TypeError, KeyError, AssertionError) as error:
        raise InputError(f"{kernel.__name__}: {_first_line(error)}") from None
    source = ASTSource(kernel, signature, constants, attributes)
    return Specialisation(source, gpu, options, f"{target.name} {source.hash()} {options.hash()}")


def compile_launch(launch: Launch, target: Target) -> Report:
    """Compiles exactly what a start of `launch` on `target` would run, and reads what came out.

    Raises DoesNotCompile if Triton refuses, InputError as `specialise`, MissingExtraError without Triton's tools.
    """
    (result,) = compile_launches([launch], target)
    if isinstance(result, RefllmError):
        raise result
    return result


def compile_launches(launches: Sequence[Launch], target: Target) -> list[Result]:
    """`compile_launch` of each, in much less time than one by one; errors about a launch take its place."""
    if not target.is_amd:
        tool("ptxas_blackwell" if target.arch == 100 else "ptxas")
    with _no_garbage_collection():
        built = [_build(launch, target) for launch in launches]
    compiled = [result for result in built if isinstance(result, _Built)]
    codes = iter(_read(compiled, target))
    return [_report(result, *next(codes), target) if isinstance(result, _Built) else result for result in built]


@dataclass(frozen=True)
class _Built:
    """What is read of one compilation. code: a cubin, or the assembly for AMD. log: what was printed meanwhile."""

    launch: Launch
    kernel: str
    code: Any
    metadata: Any
    dots: tuple[Dot, ...]
    traffic: tuple[float, float]
    log: str
    seconds: float


def _build(launch: Launch, target: Target) -> _Built | DoesNotCompile | InputError:
    try:
        special = specialise(launch, target)
    except InputError as error:
        return error
    started, printed = time.perf_counter(), list[str]()
    try:
        with _fresh_cache(), _captured(printed):
            compiled = triton.compile(special.source, target=special.gpu, options=special.options.__dict__)
    except Exception as error:  # Triton raises errors of many kinds, bare ones among them
        return DoesNotCompile(_why(special.source.fn, target, error, "\n".join(printed)))
    seconds, code = time.perf_counter() - started, compiled.asm["amdgcn" if target.is_amd else "cubin"]
    dots, name = tuple(read_dots(compiled.asm["ttir"])), special.source.fn.__name__
    traffic = read_traffic(compiled.asm["ttir"], launch.num_warps * target.warp_size)
    return _Built(launch, name, code, compiled.metadata, dots, traffic, "\n".join(printed), seconds)


def _read(built: list[_Built], target: Target) -> Iterator[tuple[Resources, Instructions]]:
    if target.is_amd:
        yield from (read_amdgcn(each.code) for each in built)
        return
    for each, opcodes in zip(built, opcodes_of([each.code for each in built], target), strict=True):
        resources = read_ptxas_log(each.log)
        if resources is None:
            raise MissingExtraError(f"ptxas of triton {triton.__version__} says nothing about registers: {each.log}")
        yield resources, read_sass(opcodes)


def _report(built: _Built, resources: Resources, instructions: Instructions, target: Target) -> Report:
    metadata, warps = built.metadata, built.launch.num_warps
    columns = getattr(metadata, "tmem_size", None) or 0
    return Report(
        kernel=built.kernel,
        target=target.name,
        num_warps=warps,
        resources=resources,
        instructions=instructions,
        shared=metadata.shared,
        tensor_memory=columns,
        occupancy=occupancy(target, resources.registers, metadata.shared, warps, columns),
        dots=built.dots,
        seconds=built.seconds,
        loads_can_be_wide=built.traffic[0],
        stores_can_be_wide=built.traffic[1],
    )


def _jit_function(kernel: Any) -> JITFunction:
    """The function itself, without the autotuner or heuristics around it."""
    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, and with it nothing can be compiled; unset it")
    inner = kernel
    while isinstance(inner, Autotuner | Heuristics):
        inner = inner.fn
    if not isinstance(inner, JITFunction):
        name = getattr(kernel, "__name__", repr(kernel))
        raise InputError(f"{name} is no @triton.jit function (or interpreted just now): it cannot be compiled")
    return inner


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """A folder of its own for the compiled files: an old one would answer for code that has changed since."""
    with tempfile.TemporaryDirectory(prefix="refllm-aot-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector would walk over every object of Torch and Triton several times per compilation."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _captured(printed: list[str]) -> Iterator[None]:
    """Appends what is printed meanwhile to `printed`: the log of ptxas by Python, the errors of MLIR by C++."""
    log = io.StringIO()
    with tempfile.TemporaryFile() as errors, knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            errors.seek(0)
            printed += [log.getvalue(), errors.read().decode(errors="replace")]


def _why(kernel: Any, target: Target, error: Exception, log: str) -> str:
    """One sentence: the innermost error of the compiler, and the line of the kernel that it points at."""
    while isinstance(error.__cause__, CompilationError):
        error = error.__cause__
    start = f"{kernel.__name__} does not compile for {target.name}: "
    if isinstance(error, CompilationError):
        return start + f"{_place(kernel, error)}: {_first_line(error.error_message or error.__cause__ or error)}"
    stated = re.search(r"^(?:.*\berror: |ptxas\S* (?:fatal|error)\s*: )(.+)$", log, re.MULTILINE)
    return start + (stated.group(1).strip() if stated else f"{type(error).__name__}: {_first_line(error)}")


def _place(kernel: Any, error: CompilationError) -> str:
    """The line of source that an error points at, with its number if it is in the kernel itself."""
    line = getattr(error.node, "lineno", None)
    if error.src is None or line is None:
        return "somewhere"
    code = f"`{error.src.splitlines()[line - 1].strip()}`"
    if error.src != kernel.src:
        return code
    first = next(number for number, text in enumerate(kernel.raw_src) if re.match(r"\s*def\s", text))
    number = kernel.starting_line_number + first + line - 1
    return f"{Path(kernel.fn.__code__.co_filename).name}:{number} {code}"


def _first_line(error: object) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # str(KeyError) adds quotes
    lines = str(text).strip().splitlines()
    return lines[0] if lines else type(error).__name__
