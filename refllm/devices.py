"""Devices by the names that Torch has for them: which there are here, and what stands in for one that is not.

Programs name the device of the machine that they were written on ("cuda", "mps", 0). A reference that runs on any
machine takes the CPU for one that is not there, and says so once.
"""

import os
import sys
import warnings
from importlib.util import find_spec
from typing import Any

from refllm.errors import InputError

KINDS = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mlu", "musa", "xla", "tpu")
"""What a device may be called; refllm computes on the first two."""
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Files that a system with the driver of a GPU has: NVIDIA's, AMD's, and that of Windows under Linux."""

_missed: set[str] = set()


class Device(str):
    """A device by its name, "cpu" or "cuda:0", which Torch takes wherever it takes a device. A torch.device of the same
    name is equal to it."""

    @property
    def type(self) -> str:
        """The name without the number."""
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:  # type: ignore[override]  # what torch.device calls so, and not str
        """The number; None where there is none."""
        number = self.partition(":")[2]
        return int(number) if number else None

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


CPU = Device("cpu")


def found(device: Any) -> Device:
    """The device meant by a name, a torch.device or the number of a GPU (-1: the CPU), if it is here, else the CPU.

    The first time that one of its kind is not here, a warning says so, at the line that called refllm. Raises
    InputError for what is no device.
    """
    number = isinstance(device, int) and not isinstance(device, bool)
    name = ("cpu" if device < 0 else f"cuda:{device}") if number else str(device)
    meant = Device(name)
    _, colon, index = name.partition(":")
    if meant.type not in KINDS or (colon and not (index.isascii() and index.isdigit())):
        raise InputError(f"device={device!r} is no device; use cpu, cuda, cuda:0, or the number of a GPU")
    if meant.type == "cpu":
        return CPU
    if meant.type == "cuda" and (meant.index or 0) < gpus():
        return meant
    if meant.type not in _missed:
        _missed.add(meant.type)
        why = "refllm computes on the CPU and on CUDA" if meant.type != "cuda" else "Torch finds no such GPU"
        warnings.warn(
            f"device {name}: not here ({why}), so the CPU is used", UserWarning, stacklevel=_level_of_caller()
        )
    return CPU


def _level_of_caller() -> int:
    """How many frames above `found` the code is that is not of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "refllm":
        level, frame = level + 1, frame.f_back
    return level


def gpus() -> int:
    """How many GPUs Torch can use. It is not imported to be asked on a machine without the driver of one."""
    if "torch" not in sys.modules and (find_spec("torch") is None or not _has_driver()):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_driver() -> bool:
    return sys.platform == "win32" or any(map(os.path.exists, _DRIVERS))


def backend() -> str:
    """The backend that computes on a GPU here."""
    return "torch" if find_spec("triton") is None else "triton"
