"""How many programs run on one multiprocessor (AMD: compute unit) at a time, from what each of them takes."""

from dataclasses import dataclass

from refllm.kernels.targets import Target


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor share.

    registers: of 32 bits, per scheduler and lane (NVIDIA: 16,384 / 32 lanes; AMD: 512); granule: how many a warp is
        given at a time. schedulers: each has its own registers and warps.
    warps: at most, per scheduler. programs: at most. shared_bytes: in all; reserved_bytes: of it, by each program.
    tensor_memory: columns, where there is such a memory.
    """

    registers: int
    granule: int
    schedulers: int
    warps: int
    programs: int
    shared_bytes: int
    reserved_bytes: int
    tensor_memory: int = 0


# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability; granule: cuda_occupancy.h (256
# registers per warp, 8 per lane); tensor memory: PTX ISA, "Tensor Memory" (512 columns).
# AMD: LLVM, AMDGPUUsage and AMDGPUBaseInfo for gfx90a and later (512 vector registers per lane in granules of 8,
# 8 waves per SIMD); CDNA3 ISA section 2 (4 SIMDs and 64 KiB of LDS per compute unit).
_LIMITS = {
    "sm_80": Multiprocessor(512, 8, 4, 16, 32, 167_936, 1024),
    "sm_90": Multiprocessor(512, 8, 4, 16, 32, 233_472, 1024),
    "sm_100": Multiprocessor(512, 8, 4, 16, 32, 233_472, 1024, 512),
    "gfx942": Multiprocessor(512, 8, 4, 8, 32, 65_536, 0),
}


@dataclass(frozen=True)
class Occupancy:
    """programs: how many run at a time on one multiprocessor. warps: in all of them. limit: what there is too little
    of for one more: "registers", "shared memory", "warps", "programs" or "tensor memory"."""

    programs: int
    warps: int
    limit: str


def occupancy(target: Target, registers: int, shared_bytes: int, num_warps: int, tensor_memory: int = 0) -> Occupancy:
    """registers: per thread. shared_bytes, num_warps, tensor_memory (columns): per program."""
    unit = _LIMITS[target.name]
    granted = -(-max(registers, 1) // unit.granule) * unit.granule
    fits = {
        "programs": unit.programs,
        "warps": unit.schedulers * unit.warps // num_warps,
        "registers": unit.schedulers * min(unit.registers // granted, unit.warps) // num_warps,
        "shared memory": unit.shared_bytes // max(shared_bytes + unit.reserved_bytes, 1),
    }
    if tensor_memory:
        fits["tensor memory"] = unit.tensor_memory // tensor_memory
    limit = min(fits, key=lambda name: fits[name])
    return Occupancy(fits[limit], fits[limit] * num_warps, limit)
