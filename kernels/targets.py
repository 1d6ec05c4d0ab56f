"""The GPUs that kernels are compiled for, and what differs between them for whoever chooses tile sizes."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from refllm.errors import InputError


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    name: as users type it. backend, arch, warp_size: what Triton's GPUTarget is made of.
    shared_bytes: shared memory (AMD: LDS) that one program may use. Source: CUDA C++ Programming Guide, table of
        technical specifications per compute capability (less the 1 KiB that is reserved); AMD CDNA3 ISA, section 2.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int

    @property
    def is_amd(self) -> bool:
        return self.backend == "hip"


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912),
        Target("sm_90", "cuda", 90, 32, 232_448),
        Target("sm_100", "cuda", 100, 32, 232_448),
        Target("gfx942", "hip", "gfx942", 64, 65_536),
    )
}
"""A100, H100 and H200, B200, MI300."""

DEFAULT = TARGETS["sm_90"]
"""Whose tile sizes the interpreter runs when nothing else is asked for."""


def target(name: str) -> Target:
    """The target of that name; InputError for another name."""
    if name not in TARGETS:
        raise InputError(f"target {name!r} is not known; use one of {', '.join(TARGETS)}")
    return TARGETS[name]


def target_of(device: Any) -> Target:
    """The target whose configurations fit `device` (a torch.device): for a GPU that is not listed the nearest older
    one, without a GPU `DEFAULT`."""
    return _target_of_gpu(device.index or 0) if device.type == "cuda" else DEFAULT


@cache
def _target_of_gpu(index: int) -> Target:
    import torch

    if torch.version.hip:
        return TARGETS["gfx942"]
    major, _ = torch.cuda.get_device_capability(index)
    return TARGETS["sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]
