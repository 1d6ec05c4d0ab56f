"""Orders candidates without a GPU: by what the ahead-of-time gate reports of each.

What the gate finds fault with (spills, a stack, too much shared memory, no tensor cores, no asynchronous copies, narrow
loads) is out, and so is the best of what is left if it does that in any configuration that ships. The order:

    products    numbers read per flop: the sum of 1 / size over the tile's outer fields, which are read again from
                memory, then over its inner ones too, which are read again from shared memory. It is known before
                anything is compiled, so no more is compiled than needed. Then more warps on a multiprocessor, then as
                many stages as that leaves room for, then fewer instructions per number
    the rest    bytes on their way: what all programs that run at a time have asked for. In a loop that is what a step
                reads, stages - 1 times where asynchronous copies run ahead. More than `ENOUGH` per multiprocessor does
                not count. Then fewer instructions per number

Instructions are compared to two digits; where they are equal, a program without barriers comes first.
These are reasons to expect a speed, not a measurement, and ties are broken by less shared memory.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

from refllm.kernels.aot import Report, gates
from refllm.kernels.aot.compile_code import Result, compile_launches
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target
from refllm.kernels.tuning import table
from refllm.kernels.tuning.tunables import Call, Tunable, meta_call

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""How many an A100, an H100 or H200, a B200 and an MI300X have (their data sheets)."""

ENOUGH = 32 << 10
"""Bytes on their way per multiprocessor that keep the memory busy: 4.8 TB/s x 0.8 us / 132 is 29 KiB (Little's law, an
H200's published bandwidth, and the latency of global memory as microbenchmarks of the H100 report it)."""


@dataclass(frozen=True)
class Candidate:
    """A tile with what was found out. refused: why it is out, "" if it is not. order: smaller is better.

    figures: what the order is made of, for whoever reads it.
    """

    tile: dict[str, int]
    refused: str
    order: tuple[float, ...]
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The fields of the dataclass."""
        return asdict(self)


def rank(tunable: Tunable, shape: str, target: Target) -> list[Candidate]:
    """The candidates that were compiled, in this process: the best first, refused ones last."""
    call, found = meta_call(tunable.kernel, shape), list[Candidate]()
    reads = {tile: reads_per_flop(tunable, call, tile) for tile in tunable.candidates(shape, target)}
    for _, together in groupby(sorted(reads, key=lambda tile: reads[tile]), lambda tile: reads[tile]):
        found += _compiled(tunable, call, list(together), target)
        if _settled(tunable, shape, found, target):
            break
    return found


def reads_per_flop(tunable: Tunable, call: Call, tile: Any) -> tuple[float, ...]:
    """Reads of memory and of shared memory, up to a factor of the kernel; () if products do not decide its speed."""
    if not call.work:
        return ()
    sizes = tile._asdict()
    return tuple(
        round(sum(1 / sizes[name] for name in names), 6)
        for names in (tunable.outer, (*tunable.outer, *tunable.inner))
    )  # fmt: skip


def _compiled(tunable: Tunable, call: Call, tiles: list[Any], target: Target) -> list[Candidate]:
    launches = [tunable.launch(call, target, tile)[0] for tile in tiles]
    results = compile_launches(launches, target)
    return [
        judge(tunable, call, tile, launch, result, target)
        for tile, launch, result in zip(tiles, launches, results, strict=True)
    ]


def _settled(tunable: Tunable, shape: str, found: list[Candidate], target: Target) -> bool:
    """Sorts what was found; whether the first of them is within the gates in all that ships."""
    while True:
        found.sort(key=lambda candidate: (bool(candidate.refused), candidate.order))
        if found[0].refused:
            return False
        problem = shipped_problem(tunable, shape, found[0].tile, target)
        if not problem:
            return True
        found[0] = replace(found[0], refused=problem)


def shipped_problem(tunable: Tunable, shape: str, tile: dict[str, int], target: Target) -> str:
    """The first finding of the gate in the configurations of a class that ship, in a tile; "" if there is none."""
    named = list(shipped(tunable, shape, tile, target))
    results = compile_launches([launch for _, launch in named], target)
    for (name, launch), result in zip(named, results, strict=True):
        if not isinstance(result, Report):
            return f"{name}: {result}"
        for finding in gates(launch, result, target):
            return f"{name}: {finding.sentence}"
    return ""


def shipped(tunable: Tunable, shape: str, tile: dict[str, int], target: Target) -> Iterator[tuple[str, Launch]]:
    """The configurations that ship whose tile is that of the class: the ones that another tile would change."""
    other = next(each._asdict() for each in tunable.candidates(shape, target) if each._asdict() != tile)
    unknown = [each for each in tunable.shapes if (tunable.kernel, each, target.name) not in table.entries()]
    stand_ins = {
        each: tunable.candidates(each, target)[0]._asdict() for each in unknown
    }  # for a table that is being made
    with table.instead(tunable.kernel, target, {**stand_ins, shape: other}):
        without = [_facts(launch) for _, launch in tunable.module.launches(target)]
    with table.instead(tunable.kernel, target, {**stand_ins, shape: tile}):
        named = list(tunable.module.launches(target))
    return (each for each, facts in zip(named, without, strict=True) if _facts(each[1]) != facts)


def _facts(launch: Launch) -> tuple[Any, ...]:
    return launch.constants, launch.num_warps, launch.num_stages, launch.grid


def judge(tunable: Tunable, call: Call, tile: Any, launch: Launch, result: Result, target: Target) -> Candidate:
    """One compiled candidate."""
    if not isinstance(result, Report):
        return Candidate(tile._asdict(), str(result), (), {})
    found = [finding.sentence for finding in gates(launch, result, target)]
    code, reads = result.instructions, reads_per_flop(tunable, call, tile)
    figures: dict[str, float] = {
        "registers": result.resources.registers,
        "spilled": result.resources.spill_bytes,
        "shared": result.shared,
        "warps": result.occupancy.warps,
        "instructions": code.count,
        "barriers": code.classes.get("BAR", 0) + code.classes.get("s_barrier", 0),
        "tensor": sum(code.tensor.values()),
    }
    order: tuple[float, ...]
    if reads:
        sizes = tile._asdict()
        numbers = prod(sizes[name] for name in sizes if name not in ("warps", "stages"))
        figures |= {"reads per flop": reads[0], "of shared memory": reads[1]}
        order = (*reads, -result.occupancy.warps, -launch.num_stages)
    else:
        width = call_width(call)
        numbers = _step_bytes(tunable, call, tile, launch) // width
        figures["bytes on their way"] = _on_their_way(numbers * width, launch, result, target)
        order = (-figures["bytes on their way"],)
    figures["instructions per number"] = round(code.count * launch.num_warps * target.warp_size / numbers, 3)
    instructions = figures["instructions per number"]
    order = (*order, float(f"{instructions:.2g}"), figures["barriers"] > 0, instructions, result.shared)
    return Candidate(tile._asdict(), "; ".join(found), order, figures)


def call_width(call: Call) -> int:
    """Bytes of a number of the call's first tensor."""
    return next(x for x in call.arguments if hasattr(x, "element_size")).element_size()


def _step_bytes(tunable: Tunable, call: Call, tile: Any, launch: Launch) -> int:
    """What a program has asked for before it waits: what a step reads, or without a loop its share of all inputs."""
    sizes = {**launch.constants, **tile._asdict()}
    if tunable.streamed:
        return prod(sizes[name] for name in tunable.streamed) * call_width(call)
    tensors = [x for x in call.arguments if hasattr(x, "element_size")]
    return sum(x.element_size() * x.numel() for x in tensors) // launch.grid[0]


def _on_their_way(step: int, launch: Launch, result: Report, target: Target) -> int:
    """Bytes, on all multiprocessors together."""
    units = MULTIPROCESSORS[target.name]
    running = min(result.occupancy.programs, -(-launch.grid[0] // units))
    ahead = max(1, launch.num_stages - 1) if launch.async_copies else 1
    return min(units, launch.grid[0]) * min(ENOUGH, running * ahead * step)
