"""One launch of one kernel, interpreted: binds the arguments, runs every program of the grid, places the errors."""

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from refllm.kernels.interpreter import compatibility, cuda_tensors, formats, operations
from refllm.kernels.interpreter.builder import BUILDER, pointer
from refllm.kernels.interpreter.errors import KernelError
from refllm.kernels.interpreter.memory import Memory
from refllm.kernels.interpreter.semantic import SEMANTIC, Tensor, make
from refllm.kernels.interpreter.settings import Settings

OPTIONS = compatibility.launch_options()
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
"""Largest grid along x, y and z (CUDA C++ Programming Guide, technical specifications per compute capability)."""


class Launched:
    """What a launch returns, where a GPU's gives the compiled kernel: it can be launched again, on another grid.

    name: the kernel's. What only a compiled kernel has (registers, machine code) is told so.
    """

    def __init__(self, jit: Any, bound: dict[str, Any], again: Callable[..., "Launched"]) -> None:
        self.name = jit.__name__
        self._names, self._constants, self._again = list(bound), {p.name for p in jit.params if p.is_constexpr}, again
        self._bound = bound

    def __getitem__(self, grid: Any) -> Callable[..., "Launched"]:
        """A launch on that grid: of all arguments in order, or without those that are tl.constexpr."""

        def run(*args: Any, stream: Any = None) -> "Launched":
            names = self._names
            if len(args) == len(names) - len(self._constants):
                names = [name for name in names if name not in self._constants]
            if len(args) != len(names):
                raise KernelError(f"{self.name}: {len(args)} arguments for {', '.join(self._names)}")
            fixed = {name: value for name, value in self._bound.items() if name in self._constants}
            return self._again(grid, (), fixed | dict(zip(names, args, strict=True)))

        return run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise KernelError(f"{self.name}: a launch on the interpreter has no `{name}`: nothing was compiled")


def launch(jit: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings) -> Launched:
    """Runs `jit[grid](*args, **kwargs)` on CPU tensors.

    Raises KernelError for a launch that a GPU would refuse, and for whatever goes wrong inside the kernel.
    """
    __tracebackhide__ = True  # pytest shows the line that launched the kernel
    name = jit.__name__
    for hook in jit.pre_run_hooks:
        hook(*args, **kwargs)
    bound = _bind(jit, args, kwargs)
    sizes = _grid(name, grid(dict(bound)) if callable(grid) else grid)
    memory = Memory(settings)
    memory.grid = sizes
    parameters = {p.name: p for p in jit.params}
    converter = _Converter(name, memory)
    function = operations.twin(jit)
    previous, BUILDER.memory = BUILDER.memory, memory
    BUILDER.grid_idx, BUILDER.grid_dim = (0, 0, 0), sizes
    asked = {n: int(operations.unwrap(kwargs[n])) for n in ("num_warps", "num_ctas", "num_stages") if kwargs.get(n)}
    BUILDER.options = dataclasses.replace(BUILDER.options, **{"num_warps": 4, "num_ctas": 1, "num_stages": 3} | asked)
    try:
        with np.errstate(all="ignore"):
            converted = {n: converter.argument(parameters[n], value) for n, value in bound.items()}
            _run(function, converted, memory)
    except KernelError as error:
        raise _placed(name, error) from None
    except Exception as error:
        raise _placed(name, error) from error
    finally:
        BUILDER.memory = previous
    return Launched(jit, bound, lambda on, values, named: launch(jit, on, values, named, settings))


def _run(function: Callable[..., Any], arguments: dict[str, Any], memory: Memory) -> None:
    x, y, z = BUILDER.grid_dim
    for i in range(x):
        for j in range(y):
            for k in range(z):
                BUILDER.grid_idx = (i, j, k)
                memory.program = (i * y + j) * z + k
                function(**arguments)
    BUILDER.grid_idx = ()
    memory.finish()


# -- arguments ---------------------------------------------------------------------------------------------------------


def _bind(jit: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults included, without the launch options."""
    names = set(jit.arg_names)
    unknown = [k for k in kwargs if k not in names and k not in OPTIONS]
    if unknown:
        raise KernelError(
            f"{jit.__name__} has no argument `{unknown[0]}`, and it is no launch option either; its arguments are "
            f"{', '.join(jit.arg_names)}"
        )
    try:
        bound = jit.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
    except TypeError as error:
        raise KernelError(f"{jit.__name__}: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _grid(name: str, grid: Any) -> tuple[int, int, int]:
    sizes = [int(n) for n in (grid if isinstance(grid, tuple | list) else (grid,))]
    if not 1 <= len(sizes) <= 3:
        raise KernelError(f"{name}: a grid has 1 to 3 axes, not {len(sizes)}")
    for axis, (size, limit) in enumerate(zip(sizes, GRID_LIMITS, strict=False)):
        if not 0 <= size <= limit:
            raise KernelError(f"{name}: {size} programs along axis {axis} of the grid; a GPU allows 0 to {limit:,}")
    sizes += [1] * (3 - len(sizes))
    return sizes[0], sizes[1], sizes[2]


class _Converter:
    """Turns the arguments of a launch into what the kernel sees."""

    def __init__(self, kernel: str, memory: Memory) -> None:
        self.kernel, self.memory = kernel, memory

    def argument(self, parameter: Any, value: Any) -> Any:
        if parameter.is_constexpr:
            return operations.unwrap(value)
        annotated = parameter.annotation_type if isinstance(parameter.annotation_type, str) else ""
        return self.value(parameter.name, value, annotated)

    def value(self, name: str, value: Any, annotated: str = "") -> Any:
        if isinstance(value, bool | int | float):
            return _scalar(value, annotated)
        if isinstance(value, tuple | list):
            items = [self.value(f"{name}[{i}]", item) for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, TensorDescriptor):
            return self._descriptor(name, value)
        if hasattr(value, "data_ptr"):
            return self._tensor(name, value)
        if isinstance(value, np.generic):
            raise KernelError(f"`{name}` is a numpy.{type(value).__name__}; a launch takes numbers of Python")
        return operations.unwrap(value)

    def _tensor(self, name: str, value: Any) -> Any:
        base = _tensor_in(value.base if isinstance(value, TensorWrapper) else value)
        if base is None:
            where = (
                f"is on {value.device}" if hasattr(value, "device") else "has a data_ptr and no tensor of Torch in it"
            )
            raise KernelError(f"{self.kernel}: `{name}` {where}; the interpreter runs on tensors of the CPU")
        if cuda_tensors.is_on_host(base):
            raise KernelError(f"{self.kernel}: `{name}` was never moved to cuda, and a GPU cannot reach it on the CPU")
        dtype = tl.str_to_ty(triton.runtime.jit.mangle_type(value), None)
        return Tensor(pointer(value.data_ptr(), dtype, self.memory.add(name, base)), dtype)

    def _descriptor(self, name: str, value: TensorDescriptor) -> Any:
        strides = [_scalar(int(s), "") for s in value.strides[:-1]] + [tl.constexpr(value.strides[-1])]
        return SEMANTIC.make_tensor_descriptor(
            self._tensor(name, value.base),
            [_scalar(int(s), "") for s in value.shape],
            strides,
            [tl.constexpr(int(b)) for b in value.block_shape],
            value.padding,
        )


def _tensor_in(value: Any) -> torch.Tensor | None:
    """The tensor on the CPU that a value is, or that an object keeps the memory of its `data_ptr()` in."""
    if isinstance(value, torch.Tensor):
        return value if value.device.type == "cpu" else None
    address = value.data_ptr()
    kept = [*getattr(value, "__dict__", {}).values(), *(getattr(value, n, None) for n in _slots(type(value)))]
    for tensor in (t for t in kept if isinstance(t, torch.Tensor) and t.device.type == "cpu"):
        start = tensor.untyped_storage().data_ptr()
        if start <= address < start + max(1, tensor.untyped_storage().nbytes()):
            return tensor
    return None


def _slots(kind: type) -> list[str]:
    each = [getattr(cls, "__slots__", ()) for cls in kind.__mro__]
    return [name for names in each for name in ((names,) if isinstance(names, str) else names)]


def _scalar(value: bool | int | float, annotated: str) -> Any:
    """A number as a launch passes it: float32, int1, or the narrowest of int32, int64 and uint64 that holds it."""
    if annotated:
        dtype = tl.str_to_ty(annotated, None)
    elif isinstance(value, bool):
        dtype = tl.int1
    elif isinstance(value, float):
        dtype = tl.float32
    else:
        dtype = tl.int32 if -(2**31) <= value < 2**31 else tl.int64 if value < 2**63 else tl.uint64
    if dtype.is_floating():
        data = np.array([value], np.float64)
        with np.errstate(all="ignore"):
            data = formats.narrow(data, dtype)
    else:
        data = np.array([value]).astype(formats.numpy_type(dtype))
    return make(data, dtype, scalar=True)


# -- errors ------------------------------------------------------------------------------------------------------------


def _placed(kernel: str, error: Exception) -> KernelError:
    """The error with the kernel, the program and the line in front."""
    grid = BUILDER.grid_dim
    program = BUILDER.grid_idx[: 3 if grid[2] > 1 else 2 if grid[1] > 1 else 1]
    place = kernel
    if program:
        place += f", program {program[0] if len(program) == 1 else program}{_line(error)}"
    if isinstance(error, KernelError):
        return type(error)(f"{place}: {error}")
    reason = " ".join(str(error).split())
    return KernelError(f"{place}: {type(error).__name__}{f': {reason}' if reason else ''}")


def _line(error: Exception) -> str:
    """The deepest line of a kernel that is not part of the Triton language itself."""
    language = tl.__path__[0]
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if "_refllm_operations_" in code.co_freevars and not code.co_filename.startswith(language):
            found = f", {code.co_filename.rsplit('/', 1)[-1]}:{line}"
    return found
