"""How a released kernel is entered into the trial: a wrapper of a few lines with the operator's signature.

    @released("Liger-Kernel", "rms_norm", "LigerRMSNormFunction")
    def rms_norm(x, weight, eps): ...

The wrappers take no detours around what a kernel does not offer: that is said by the options of `check_op`.
"""

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Kernel:
    """One kernel. library, kernel: its names. operator: whose contract it is held to. options: of `check_op`; with
    `backward` among them its gradients are judged, as autograd finds them, and not its results."""

    library: str
    operator: str
    kernel: str
    function: Callable[..., Any]
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lines(self) -> int:
        """How many lines the wrapper has, its signature included."""
        source = inspect.getsource(self.function).splitlines()
        first = next(i for i, line in enumerate(source) if line.startswith("def "))
        return len(source) - first


CHECKOUTS = Path(os.environ.get("REFLLM_CHECKOUTS", "."))
"""The folder that has the checkouts of libraries that cannot be installed, under the names of their repositories."""
KERNELS: list[Kernel] = []


def released(library: str, operator: str, kernel: str, dtype: str = "bfloat16", **options: Any) -> Callable[..., Any]:
    """Enters the function below."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        function.uses_triton = True  # type: ignore[attr-defined]
        KERNELS.append(Kernel(library, operator, kernel, function, dtype, options))
        return function

    return enter


def and_gradients(**options: Any) -> Callable[..., Any]:
    """Enters the gradients of the function below, which `released` has entered already, with its options and these."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        last = KERNELS[-1]
        own = {name: value for name, value in last.options.items() if name != "level"} | options | {"backward": True}
        KERNELS.append(Kernel(last.library, last.operator, last.kernel, function, last.dtype, own))
        return function

    return enter


def installed(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    raise ModuleNotFoundError(packages[0])


def checkout(repository: str, *packages: str) -> str:
    """Puts a folder of `CHECKOUTS` on the path, and gives its commit, or "" where it is none. packages: those of which
    the modules are imported one by one, as their own `__init__` wants compiled extensions, or a GPU."""
    folder = CHECKOUTS / repository
    if not folder.is_dir():
        raise ModuleNotFoundError(f"there is no {folder}")
    sys.path.insert(0, str(folder))
    for package in packages:
        spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(folder / package.replace(".", "/"))]
        bare = importlib.util.module_from_spec(spec)
        sys.modules[package] = bare
        parent, _, name = package.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, bare)
    asked = ["git", "-C", str(folder), "rev-parse", "--short=9", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


class _Driver:
    """What Triton is told of the GPU."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class _Device(contextlib.nullcontext[None]):
    """The GPU as the current one."""

    idx = 0


def answer_for_a_gpu() -> None:
    """Libraries ask for the GPU when they are imported, and make it the current one at every launch: they are told of
    an A100, and go on with the tensors that they are given, which lie on the CPU."""
    import triton

    properties = types.SimpleNamespace(
        name="NVIDIA A100",
        major=8,
        minor=0,
        warp_size=32,
        multi_processor_count=108,
        total_memory=40 << 30,
        shared_memory_per_block_optin=166912,
        max_threads_per_multi_processor=2048,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (8, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "current_stream": types.SimpleNamespace(cuda_stream=0, device=0),
        "device": _Device(),
        "stream": contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    triton.runtime.driver.set_active(_Driver())
