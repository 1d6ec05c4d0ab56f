"""Orders candidates without a GPU: by what the ahead-of-time gate reports of each.

What the gate finds fault with (spills, a stack, too much shared memory, no tensor cores, no asynchronous copies, narrow
loads) is out. The others are ordered by the figure that limits the kernel:

    products            numbers read again per flop: the sum of 1 / size over the tile's outer fields. Then more warps
                        on a multiprocessor, then fewer instructions per number of the tile
    few rows, a loop    bytes on their way: what all programs that run at a time have asked for of the large operand, in
                        stages - 1 steps ahead. More than `ENOUGH` per multiprocessor does not count
    no loop             instructions of all programs together: nothing is executed twice, so they are what is issued

These are reasons to expect a speed, not a measurement, and ties are broken by less shared memory.
"""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from refllm.kernels.aot import Report, gates
from refllm.kernels.aot.compile_code import Result, compile_launches
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target
from refllm.kernels.tuning.tunables import Call, Tunable

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Of an A100, H100 or H200, B200 and MI300X (their data sheets)."""

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
        """As the dataclass."""
        return asdict(self)


def rank(tunable: Tunable, call: Call, tiles: list[Any], target: Target) -> list[Candidate]:
    """All candidates, the best first, refused ones last. Compiles them in this process."""
    launches = [tunable.launch(call, target, tile)[0] for tile in tiles]
    results = compile_launches(launches, target)
    judged = [
        judge(tunable, call, tile, launch, result, target)
        for tile, launch, result in zip(tiles, launches, results, strict=True)
    ]
    return sorted(judged, key=lambda candidate: (bool(candidate.refused), candidate.order))


def judge(tunable: Tunable, call: Call, tile: Any, launch: Launch, result: Result, target: Target) -> Candidate:
    """One compiled candidate."""
    if not isinstance(result, Report):
        return Candidate(tile._asdict(), str(result), (), {})
    found = [finding.sentence for finding in gates(launch, result, target)]
    code = result.instructions
    figures = {
        "registers": result.resources.registers,
        "spilled": result.resources.spill_bytes,
        "shared": result.shared,
        "warps": result.occupancy.warps,
        "instructions": code.count,
        "barriers": code.classes.get("BAR", 0) + code.classes.get("s_barrier", 0),
        "tensor": sum(code.tensor.values()),
    }
    order: tuple[float, ...]
    if call.work:
        sizes = tile._asdict()
        figures["read per flop"] = sum(1 / sizes[name] for name in tunable.outer)
        numbers = prod(sizes[name] for name in sizes if name not in ("warps", "stages"))
        order = (figures["read per flop"], -result.occupancy.warps, code.count * launch.num_warps / numbers)
    elif "numbers" in tile._asdict():
        figures["instructions in all"] = code.count * launch.num_warps * launch.grid[0]
        order = (figures["instructions in all"], -result.occupancy.warps)
    else:
        figures["bytes on their way"] = _on_their_way(tunable, tile, launch, result, target)
        order = (-figures["bytes on their way"], code.count * launch.num_warps)
    return Candidate(tile._asdict(), "; ".join(found), (*order, result.shared), figures)


def _on_their_way(tunable: Tunable, tile: Any, launch: Launch, result: Report, target: Target) -> int:
    """On all multiprocessors together."""
    units, sizes = MULTIPROCESSORS[target.name], tile._asdict()
    running = min(result.occupancy.programs, -(-launch.grid[0] // units))
    step = prod(sizes.get(name, launch.constants.get(name, 1)) for name in tunable.streamed)
    width = next(x for x in launch.arguments.values() if isinstance(x, torch.Tensor)).element_size()
    ahead = max(1, launch.num_stages - 1)
    return min(units, launch.grid[0]) * min(ENOUGH, running * ahead * step * width)
