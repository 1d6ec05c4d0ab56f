"""What `torch.cuda` and Triton's driver answer where the CPU stands in for a GPU.

Questions about the device get the answers of the GPU that is stood in for. Streams and events order nothing, since a
call has ended when it returns. Whatever measures or drives a real GPU raises NeedsGpuError with its name.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from refllm.kernels.interpreter.cuda_tensors import CUDA, asks_for_gpu
from refllm.kernels.interpreter.errors import NeedsGpuError
from refllm.kernels.targets import Target

VERSION = "13.0"
"""The version of CUDA where this build of Torch has none: that of Torch 2.11 to 2.13 on PyPI."""


@dataclass(frozen=True)
class Properties:
    """The part of torch.cuda.get_device_properties() that a program may depend on.

    Source: CUDA C++ Programming Guide, technical specifications per compute capability; NVIDIA's data sheets.
    """

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int
    L2_cache_size: int
    shared_memory_per_block: int = 49_152
    regs_per_multiprocessor: int = 65_536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    gcnArchName: str = ""


_GPUS = {
    "sm_80": ("A100", 8, 108, 80, 164, 40),
    "sm_90": ("H100", 9, 132, 80, 228, 50),
    "sm_100": ("B200", 10, 148, 180, 228, 126),
}
"""Name, major, multiprocessors, memory in GiB, shared memory of a multiprocessor in KiB, L2 cache in MiB."""


def properties(target: Target) -> Properties:
    """Those of the GPU that a target is named after."""
    name, major, count, memory, shared, cache = _GPUS[target.name]
    name = f"NVIDIA {name} (refllm's interpreter stands in)"
    return Properties(name, major, 0, count, memory << 30, shared << 10, target.shared_bytes, cache << 20)


def needs_gpu(name: str, instead_of: Any = None) -> Any:
    """What raises NeedsGpuError when it is called; a class in place of a class, which annotations may name."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise NeedsGpuError(f"{name} needs a GPU, and here refllm's interpreter stands in for one")

    refuse.__name__ = refuse.__qualname__ = name.rsplit(".", 1)[-1]
    return type(refuse.__name__, (), {"__new__": refuse}) if isinstance(instead_of, type) else refuse


class Event:
    """A moment, as torch.cuda.Event: recorded when everything before it has ended."""

    cuda_event = 0

    def __init__(self, enable_timing: bool = False, *_: Any, **__: Any) -> None:
        self._at: float | None = None

    def record(self, stream: Any = None) -> None:
        """Keeps the time."""
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of the interpreter up to another event. Raises NeedsGpuError if one was not recorded."""
        if self._at is None or end._at is None:
            raise NeedsGpuError("Event.elapsed_time: both events must be recorded before")
        return 1000 * (end._at - self._at)

    def query(self) -> bool:
        """True: what was asked for has been done."""
        return True

    def wait(self, stream: Any = None) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""


class Stream:
    """An order of work, as torch.cuda.Stream: there is only one order here."""

    cuda_stream, stream_id, priority = 0, 0, 0
    device, device_index, device_type = CUDA, 0, 1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        """True: what was asked for has been done."""
        return True

    def synchronize(self) -> None:
        """Returns at once."""

    def wait_event(self, event: Any) -> None:
        """Returns at once."""

    def wait_stream(self, stream: Any) -> None:
        """Returns at once."""

    def record_event(self, event: Any = None) -> Any:
        """An event, recorded."""
        event = Event() if event is None else event
        event.record()
        return event

    def __enter__(self) -> "Stream":
        _streams.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _streams.pop()


_streams = [Stream()]


class StreamContext:
    """`with torch.cuda.stream(one)`: it is the current one meanwhile."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        _streams.append(self.stream or _streams[-1])

    def __exit__(self, *_: Any) -> None:
        _streams.pop()


class Device:
    """`with torch.cuda.device(0)`: there is no other. Raises KernelError for another."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0
        asks_for_gpu(device)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def cuda(target: Target) -> dict[str, Any]:
    """Every public function and class of torch.cuda by name: an answer, or a refusal."""
    about, arch = properties(target), f"sm_{target.arch}"
    answers: dict[str, Any] = {
        name: needs_gpu(f"torch.cuda.{name}", getattr(torch.cuda, name)) for name in torch.cuda.__all__
        if callable(there := getattr(torch.cuda, name)) and not (isinstance(there, type) and name.endswith(_TYPES))
    }  # fmt: skip
    answers |= {"_lazy_init": needs_gpu("what was called"), "Event": Event, "Stream": Stream, "ExternalStream": Stream}
    answers |= {"device": Device, "device_of": Device, "stream": StreamContext, "StreamContext": StreamContext}
    answers |= dict.fromkeys(_TRUE, lambda *_, **__: True) | dict.fromkeys(_FALSE, lambda *_, **__: False)
    answers |= dict.fromkeys(_NOTHING, lambda *_, **__: None)
    answers |= {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: about.name,
        "get_device_capability": lambda device=None: (about.major, about.minor),
        "get_device_properties": lambda device=None: about,
        "get_arch_list": lambda: [arch],
        "current_stream": lambda device=None: _streams[-1],
        "default_stream": lambda device=None: _streams[0],
        "set_device": asks_for_gpu,
        "manual_seed": lambda seed: _seed(seed),
        "manual_seed_all": lambda seed: _seed(seed),
        "seed": torch.default_generator.seed,
        "seed_all": torch.default_generator.seed,
        "initial_seed": torch.default_generator.initial_seed,
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "get_rng_state_all": lambda: [torch.default_generator.get_state()],
        "set_rng_state": lambda state, device=None: _set_state(state),
        "set_rng_state_all": lambda states: _set_state(*states),
        "default_generators": (torch.default_generator,),
    }
    return answers


_TYPES = ("Storage", "Tensor", "Error")
_TRUE = ("is_available", "is_initialized", "is_bf16_supported", "is_tf32_supported", "has_half")
_FALSE = ("is_current_stream_capturing", "can_device_access_peer", "_is_in_bad_fork")
_NOTHING = (
    *("synchronize", "init", "empty_cache", "ipc_collect", "set_stream", "set_sync_debug_mode", "check_error"),
    *("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"),
    *("reset_accumulated_memory_stats", "set_per_process_memory_fraction"),
)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _set_state(state: torch.Tensor) -> None:
    torch.default_generator.set_state(state)


def accelerator() -> dict[str, Any]:
    """What torch.accelerator answers."""
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "current_stream": lambda device=None: _streams[-1],
        "synchronize": lambda device=None: None,
        "set_device_index": asks_for_gpu,
    }


class _Utils:
    """The part of the driver that knows the device and loads kernels."""

    def __init__(self, target: Target) -> None:
        self._about = properties(target)

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        """The names and numbers of Triton's own."""
        return {
            "max_shared_mem": self._about.shared_memory_per_block_optin,
            "max_num_regs": self._about.regs_per_multiprocessor,
            "multiprocessor_count": self._about.multi_processor_count,
            "warpSize": self._about.warp_size,
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return needs_gpu(f"{name} of Triton's driver")


class Driver:
    """The driver that Triton finds active: it knows the target, and can start nothing."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self.utils = _Utils(target)

    def get_current_target(self) -> Any:
        """What Triton compiles for."""
        return self._target

    def get_current_device(self) -> int:
        """0: there is one."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Does nothing: there is one."""

    def get_current_stream(self, device: Any = None) -> int:
        """0: there is one."""
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """(9, 0) of an H100."""
        return self.utils._about.major, self.utils._about.minor

    def get_device_interface(self) -> Any:
        """torch.cuda, as it answers now."""
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        """cuda:0."""
        return CUDA

    def is_active(self) -> bool:
        """True."""
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return needs_gpu(f"{name} of Triton's driver")
