"""What a compiled kernel must not be: each gate looks at one figure and says in one sentence what is wrong with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from refllm.kernels.aot.compile_code import Report
from refllm.kernels.aot.machine_code import share_of_wide
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target


@dataclass(frozen=True)
class Finding:
    """gate: its name. sentence: the number, the limit, what usually helps. value, limit: the two numbers."""

    gate: str
    sentence: str
    value: float
    limit: float


def gates(launch: Launch, report: Report, target: Target) -> list[Finding]:
    """Everything that is wrong with a compiled launch; empty if nothing is."""
    return [finding for gate in _GATES for finding in gate(launch, report, target)]


THREADS = 1024
"""The most that a program may have (CUDA C++ Programming Guide, technical specifications; HIP hardware features)."""


def _threads(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    threads = launch.num_warps * target.warp_size
    if threads > THREADS:
        yield Finding(
            "threads",
            f"{threads:,} threads per program and {target.name} allows {THREADS:,}: the kernel cannot start; use at "
            f"most {THREADS // target.warp_size} warps",
            threads,
            THREADS,
        )


def _spills(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    """ptxas (seen: 12.8, 13.1) may spill with registers left, if one more program fits for it; maxnreg forbids that."""
    spilled = report.resources.spill_bytes
    if spilled:
        by_choice = not target.is_amd and report.resources.registers < 255
        unit = "scratch" if target.is_amd else "LDL and STL"
        yield Finding(
            "spills",
            f"{spilled:,} bytes are spilled beside {report.resources.registers} registers "
            f"({report.instructions.local:,} {unit} instructions), where 0 may be: use smaller tiles, or more warps "
            f"than {launch.num_warps}" + (", or options={'maxnreg': 255}" if by_choice else ""),
            spilled,
            0,
        )


def _stack(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    """Local memory that is no spill."""
    stack, instructions = report.resources.stack, report.instructions.local
    if (stack or instructions) and not report.resources.spill_bytes:
        yield Finding(
            "stack",
            f"{stack:,} bytes of stack are reserved per thread ({instructions:,} instructions use it), where 0 may be: "
            "registers are addressed by an index, or something is printed or called that was not inlined",
            stack,
            0,
        )


def _shared(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if report.shared > target.shared_bytes:
        yield Finding(
            "shared memory",
            f"{report.shared:,} bytes of shared memory are needed and {target.name} has {target.shared_bytes:,}: the "
            f"kernel cannot start; use smaller tiles, or fewer stages than {launch.num_stages}",
            report.shared,
            target.shared_bytes,
        )


TENSOR_MEMORY = 512
"""Columns of tensor memory on sm_100 (PTX ISA, "Tensor Memory")."""


def _tensor_memory(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if report.tensor_memory > TENSOR_MEMORY:
        yield Finding(
            "tensor memory",
            f"{report.tensor_memory} columns of tensor memory are needed and there are {TENSOR_MEMORY}: the kernel "
            "cannot start; use smaller accumulators",
            report.tensor_memory,
            TENSOR_MEMORY,
        )


_TENSOR_NAMES = {"sm_80": "HMMA", "sm_90": "HGMMA or HMMA", "sm_100": "UTCHMMA or HMMA", "gfx942": "v_mfma"}
_NEWEST = {"sm_90": ("HGMMA", "QGMMA", "IGMMA"), "sm_100": ("UTC",)}


def _tensor_cores(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if (launch.tensor_cores or report.dots) and not report.instructions.tensor:
        yield Finding(
            "tensor cores",
            f"0 tensor-core instructions ({_TENSOR_NAMES[target.name]}), where at least 1 must be: give tl.dot "
            "operands of bfloat16 or float16, not float32 with input_precision='ieee', and dimensions of at least 16",
            0,
            1,
        )


def _generation(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    """The newest tensor-core instructions need 64 rows and a group of 4 warps (PTX ISA: wgmma, tcgen05.mma)."""
    newest, found = _NEWEST.get(target.name), report.instructions.tensor
    large = max((dot for dot in report.dots if dot.M % 64 == 0), key=lambda dot: dot.M * dot.N, default=None)
    if not newest or not found or large is None or launch.num_warps % 4:
        return
    if not any(opcode.startswith(newest) for opcode in found):
        yield Finding(
            "tensor generation",
            f"0 {newest[0]} instructions but {sum(found.values())} of an older kind ({', '.join(found)}) for a "
            f"product of {large.M} x {large.N} x {large.K}, where at least 1 must be: use 4 or 8 warps, at least 16 "
            "in each dimension, and operands in their own dtype",
            0,
            1,
        )


def _serialized(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if report.resources.wgmma_serialized:
        yield Finding(
            "serialized",
            "ptxas waits after every wgmma, where 0 waits may be: something reads or writes the accumulator between "
            "the products; keep it in registers of its own until the loop ends",
            1,
            0,
        )


def _async_copies(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if launch.async_copies and not target.is_amd and not report.instructions.async_copies:
        yield Finding(
            "async copies",
            f"0 asynchronous copies (LDGSTS, UTMALDG) with num_stages={launch.num_stages}, where at least 1 must be: "
            "use 2 stages or more, load what tl.dot takes straight from memory, and let 16 divide its strides",
            0,
            1,
        )


def _fp64(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    found = report.instructions.fp64
    if found:
        count = sum(found.values())
        yield Finding(
            "fp64",
            f"{count} float64 instructions ({', '.join(found)}), where 0 may be: look for a constant or an argument "
            "that is float64, and a cast to tl.float64",
            count,
            0,
        )


WIDE_SHARE = 0.5
"""The least share of the bytes of a memory-bound kernel that has to come in loads of 16 bytes. Not all: the last
load of a tile and small tables beside the tensor may be narrower."""


def _wide_loads(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if launch.wide_loads:
        yield from _narrow("loads", report.instructions.loads)


def _wide_stores(launch: Launch, report: Report, target: Target) -> Iterator[Finding]:
    if launch.wide_stores:
        yield from _narrow("stores", report.instructions.stores)


def _narrow(which: str, counts: dict[int, int]) -> Iterator[Finding]:
    share = share_of_wide(counts)
    if share < WIDE_SHARE:
        widths = ", ".join(f"{count} of {width} bytes" for width, count in counts.items())
        yield Finding(
            f"wide {which}",
            f"{100 * share:.0f} % of the bytes come in {which} of 16 bytes, where {100 * WIDE_SHARE:.0f} % must (there "
            f"are {widths}): let 16 divide the sizes and strides that reach the kernel, say of a stride that is 1 "
            "that it is, and give every thread at least 16 bytes of a row",
            share,
            WIDE_SHARE,
        )


_Gate = Callable[[Launch, Report, Target], Iterator[Finding]]
_GATES: tuple[_Gate, ...] = (
    _threads,
    _spills,
    _stack,
    _shared,
    _tensor_memory,
    _tensor_cores,
    _generation,
    _serialized,
    _async_copies,
    _fp64,
    _wide_loads,
    _wide_stores,
)
