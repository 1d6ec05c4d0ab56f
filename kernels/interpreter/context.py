"""`interpreted()`: within it, launches of Triton kernels on CPU tensors run on the interpreter.

Only the entries to a launch are exchanged, at the level of Triton's classes, and put back at the end. So kernels of any
library run, however they were imported, and compiling ahead of time works before, after and inside.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from refllm.kernels.interpreter.errors import KernelError
from refllm.kernels.interpreter.exchange import Exchange
from refllm.kernels.interpreter.settings import Settings

_stack: list[Settings] = []
_owner: int | None = None
_exchanged = Exchange()


def active() -> bool:
    """Whether Triton kernels currently run on the interpreter."""
    return bool(_stack)


@contextlib.contextmanager
def interpreted(
    *,
    bounds: bool | str = True,
    overflow: bool = True,
    races: bool = True,
    poison: bool = True,
    masked: str = "nan",
    tf32: bool = True,
    configs: str = "first",
) -> Iterator[None]:
    """Runs every Triton kernel that is launched on CPU tensors inside the `with` block, one program after the other.

    bounds: an access outside the storage of the argument that its pointer came from raises OutOfBoundsError. "view"
        allows only what the tensor itself spans, not the rest of its storage; False allows every argument's storage.
    overflow: int32 arithmetic that overflows raises IntegerOverflowError.
    races: two programs that store to one element, or one that loads what another stores, raise RaceError.
    poison: torch.empty and its relatives return NaN, and loading such memory before it was written raises
        UninitializedError; without it, lanes that a load masks off without `other` are 0.
    masked: what those lanes are: "nan", since they may be anything and NaN shows where a result depends on them, or
        "zero", which is what NVIDIA's code makes of them, with a MaskedOffWarning that names the line.
    tf32: tl.dot of float32 reads its operands as TF32 unless input_precision is "ieee", as on the tensor cores.
    configs: which configurations of an autotuned kernel run: "first", or "all", each on copies, to compare them.

    Contexts may be nested; the innermost decides. Raises KernelError if another thread is inside already, or if
    TRITON_INTERPRET is set, which would break ahead-of-time compilation in this process.
    """
    settings = Settings(bounds, overflow, races, poison, masked, tf32, configs)
    _enter(settings)
    try:
        yield
    finally:
        _leave()


def _enter(settings: Settings) -> None:
    global _owner
    if _stack and _owner != threading.get_ident():
        raise KernelError("interpreted: another thread is inside; the interpreter runs one thread per process")
    if not _stack:
        _owner = threading.get_ident()
        try:
            _exchange()
        except BaseException:
            _restore()
            raise
    _stack.append(settings)


def _leave() -> None:
    _stack.pop()
    if not _stack:
        _restore()


def _exchange() -> None:
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise KernelError("interpreted: unset TRITON_INTERPRET; it keeps kernels from being compiled in this process")
    import triton.language as tl
    from torch.utils._device import _device_constructors

    from refllm.kernels.interpreter import poison

    _device_constructors()  # `with torch.device(...)` remembers the functions that it finds at its first use
    _exchanged.set(JITFunction, "run", _run_jit(JITFunction.run))
    _exchanged.set(Autotuner, "run", _run_autotuner(Autotuner.run))
    _exchanged.set(tl.dtype, "to_ir", _to_ir(tl.dtype.to_ir))
    for owner, name in poison.ALLOCATORS:
        if hasattr(owner, name):
            original = getattr(owner, name)
            _exchanged.set(owner, name, _if_poison(original, poison.poisoning(original)))
    _compiler_looks_again()


def _restore() -> None:
    _exchanged.undo()
    _compiler_looks_again()


def _compiler_looks_again() -> None:
    """torch.compile keeps the functions of Torch that it found under their names, which are others now: those that
    allocate would no longer be known to it (seen in Torch 2.11). It looks them up again when it needs them."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None:
        rules.clear_lru_cache()


def _run_jit(original: Callable[..., Any]) -> Callable[..., Any]:
    from refllm.kernels.interpreter.cuda_tensors import as_they_are
    from refllm.kernels.interpreter.launch import launch

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with as_they_are():
            elsewhere = warmup or _elsewhere((*args, *kwargs.values()))
        if elsewhere:
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if threading.get_ident() != _owner:
            raise KernelError(f"{self.__name__} is launched in a second thread; the interpreter runs one per process")
        if getattr(self, "is_gluon", bool)():
            raise KernelError(f"{self.__name__} is written in Gluon, which the interpreter cannot run")
        with as_they_are():
            return launch(self, grid, args, kwargs, _stack[-1])

    return _not_traced(run)


def _elsewhere(values: tuple[Any, ...]) -> bool:
    """Whether a launch belongs to a GPU: it has tensors there, and none on the CPU."""
    devices = {v.device.type for v in values if hasattr(v, "data_ptr") and hasattr(v, "device")}
    return bool(devices) and "cpu" not in devices and "meta" not in devices


def _run_autotuner(original: Callable[..., Any]) -> Callable[..., Any]:
    from refllm.kernels.interpreter import autotune
    from refllm.kernels.interpreter.cuda_tensors import as_they_are

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with as_they_are():
            elsewhere = kwargs.get("warmup") or _elsewhere((*args, *kwargs.values()))
        if elsewhere:
            return original(self, *args, **kwargs)
        with as_they_are():
            return autotune.run(self, args, kwargs, _stack[-1].configs == "all")

    return _not_traced(run)


def _not_traced(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile calls as it is: it neither looks into it nor into what it calls.

    That is torch.compiler.disable without importing the compiler, which takes a second.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(run.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return run


def _to_ir(original: Callable[..., Any]) -> Callable[..., Any]:
    """Types for the NumPy builder are the types themselves; the compiler's builder is served as before."""
    from refllm.kernels.interpreter.builder import Builder

    def to_ir(self: Any, builder: Any) -> Any:
        return self if isinstance(builder, Builder) else original(self, builder)

    return to_ir


def _if_poison(original: Callable[..., Any], poisoning: Callable[..., Any]) -> Callable[..., Any]:
    def allocate(*args: Any, **kwargs: Any) -> Any:
        return (poisoning if _stack and _stack[-1].poison else original)(*args, **kwargs)

    return allocate
