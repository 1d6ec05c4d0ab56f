"""What `refllm bench tune` does: finds the best tile of every class of shapes and says how the table would change."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from refllm.bench.tune_rank import Candidate, rank
from refllm.errors import InputError
from refllm.kernels.targets import Target, target, target_of
from refllm.kernels.tuning import table
from refllm.kernels.tuning.table import AHEAD_OF_TIME, BY_HAND, MEASURED, Entry, entries
from refllm.kernels.tuning.tunables import Tunable, tunable, tunables
from refllm.terminal.fitted_table import Table as RichTable

MARGIN = 0.98
"""A measured tile replaces another if it takes less than this share of its time: two runs differ by a percent."""
BUDGET = 0.2
"""Seconds that a candidate is timed for."""

Step = Callable[[str, float | None, float | None], None]


@dataclass(frozen=True)
class Settings:
    """The options as typed. kernel, shape: "" for all. target: a name; "" for sm_90 or, with a device, that of the GPU.

    device: "" (nothing runs: candidates are compiled) or cuda.
    """

    kernel: str = ""
    target: str = ""
    device: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Result:
    """One class of shapes. now: its line, None if the table has none. best: the line that would replace it, with the
    same tile where only what it says of itself would change; None if the present one stays.

    candidates: the best first. note: why the present tile stays, where it does.
    """

    kernel: str
    shape: str
    target: str
    now: Entry | None
    best: Entry | None
    candidates: list[Candidate]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """kernel, shape, target, now, best (tiles), chosen, note, candidates."""
        line = self.best or self.now
        return {
            "kernel": self.kernel,
            "shape": self.shape,
            "target": self.target,
            "now": None if self.now is None else self.now.tile,
            "best": None if self.best is None else self.best.tile,
            "chosen": None if line is None else line.chosen,
            "note": self.note,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


def tune(settings: Settings, step: Step | None = None) -> Iterator[Result]:
    """A result per class, as they are found. InputError for settings that name nothing, or a GPU that is not there."""
    gpu, find = _finder(settings)
    kernels = [tunable(settings.kernel)] if settings.kernel else list(tunables().values())
    classes = [(each, shape) for each in kernels for shape in each.shapes if settings.shape in shape]
    if not classes:
        raise InputError(f"--shape {settings.shape!r} names no class; there are {', '.join(_shapes(kernels))}")
    for done, (each, shape) in enumerate(classes):
        if step is not None:
            step(f"{each.kernel}, {shape}", done, len(classes))
        yield _result(each, shape, gpu, *find(each, shape))


def _shapes(kernels: Sequence[Tunable]) -> Iterator[str]:
    yield from dict.fromkeys(repr(shape) for each in kernels for shape in each.shapes)


Find = Callable[[Tunable, str], tuple[list[Candidate], str]]


def _finder(settings: Settings) -> tuple[Target, Find]:
    """The target, and what finds candidates (the best first) and says how they were chosen."""
    if not settings.device:
        gpu = target(settings.target or "sm_90")
        return gpu, lambda each, shape: (rank(each, shape, gpu), AHEAD_OF_TIME)
    import torch

    if settings.device.partition(":")[0] != "cuda":
        raise InputError(f"--device {settings.device}: tiles are timed on a GPU; use cuda, or leave it out to compile")
    if not torch.cuda.is_available():
        raise InputError(f"--device {settings.device}: there is no GPU here; without --device candidates are compiled")
    gpu = target_of(torch.device(settings.device))
    if settings.target and settings.target != gpu.name:
        raise InputError(f"--target {settings.target}, but the GPU here takes the tiles of {gpu.name}; leave it out")
    return gpu, lambda each, shape: (measured(each, shape, gpu), MEASURED)


def measured(each: Tunable, shape: str, gpu: Target) -> list[Candidate]:
    """Candidates by their time on the GPU here, the fastest first; those with wrong results are refused."""
    from refllm.bench.timer import clock
    from refllm.bench.tune_measure import Check, seconds

    check, timer, candidates = Check(each, shape, "cuda"), clock("cuda"), []
    for tile in each.near(shape, gpu):
        try:
            refused = check.problem(tile, gpu)
            took = 0.0 if refused else seconds(each, shape, tile, gpu, timer, BUDGET)
        except Exception as error:  # out of resources, or whatever else Triton raises for a tile that does not fit
            refused, took = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 0.0
        candidates.append(Candidate(tile._asdict(), refused, (took,), {"microseconds": 1e6 * took}))
    return sorted(candidates, key=lambda candidate: (bool(candidate.refused), candidate.order))


def _result(each: Tunable, shape: str, gpu: Target, candidates: list[Candidate], chosen: str) -> Result:
    now, best = entries().get((each.kernel, shape, gpu.name)), candidates[0]
    note = _keep(now, candidates, chosen)
    new = None
    if not note or (now and now.tile == best.tile and now.chosen != BY_HAND and _says_more(now, best, chosen)):
        words = chosen, _by(chosen), version("triton"), best.figures
        new = Entry(each.kernel, shape, gpu.name, best.tile, *words)
    return Result(each.kernel, shape, gpu.name, now, new, candidates, note)


def _keep(now: Entry | None, candidates: list[Candidate], chosen: str) -> str:
    """Why the tile stays as it is; "" if it should change."""
    best = candidates[0]
    if best.refused:
        return "every candidate is refused"
    if now is None:
        return ""
    if chosen == AHEAD_OF_TIME and now.chosen == BY_HAND:
        return f"by hand: {now.by}"
    if best.tile == now.tile:
        return "the present tile is the best"
    if chosen == AHEAD_OF_TIME:
        return "the present tile was measured, which counts for more" if now.chosen == MEASURED else ""
    present = next(candidate for candidate in candidates if candidate.tile == now.tile)
    faster = present.refused or best.order[0] <= MARGIN * present.order[0]
    return "" if faster else "the best is faster by less than two runs differ"


def _says_more(now: Entry, best: Candidate, chosen: str) -> bool:
    """Whether the line of the best tile would say something else of it, and nothing weaker."""
    if now.chosen != chosen:
        return chosen == MEASURED
    return (now.triton, now.figures) != (version("triton"), best.figures)


def _by(chosen: str) -> str:
    """The command as typed, but where its JSON went."""
    where = ""
    if chosen == MEASURED:
        import torch

        where = f"{torch.cuda.get_device_name()}, "
    words = [word for before, word in zip(sys.argv, sys.argv[1:], strict=False) if "--json" not in (before, word)]
    return f"{where}{time.strftime('%Y-%m-%d')}, {shlex.join(['refllm', *words])}"


def write(result: Result) -> int:
    """Writes the line that changes into the table; how many that are: 0 or 1."""
    if result.best is None:
        return 0
    table.write([result.best])
    return 1


def show(results: Sequence[Result], ahead_of_time: bool) -> RenderableType:
    """A line per class: the present tile, the best, and why; above it how they were compared."""
    shown = RichTable(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("kernel", "shape", "target", "tile now", "better", "why"):
        shown.add_column(name)
    for result in results:
        now, best, first = result.now and result.now.tile, result.best, result.candidates[0]
        better = "-" if best is None or best.tile == now else _words(best.tile)
        why = result.note or ", ".join(f"{name} {_number(value)}" for name, value in first.figures.items())
        shown.add_row(result.kernel, result.shape, result.target, _words(now) if now else "-", better, why)
    tried = sum(len(result.candidates) for result in results)
    refused = sum(bool(candidate.refused) for result in results for candidate in result.candidates)
    how = "ahead of time, not measured" if ahead_of_time else "measured on this GPU, each checked first"
    return Group(shown, Text(f"{tried} candidates, {refused} refused; {how}"))


def _words(tile: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items())


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
