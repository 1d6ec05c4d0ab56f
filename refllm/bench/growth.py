"""`refllm bench growth`: how time grows with the prompt, with the context and with the number of layers, on this CPU.

    prefill    seconds for a prompt of n tokens
    decode     seconds per token behind n tokens
    check      seconds of `refllm check` on a model of n layers

for the NumPy reference, the torch backend and Transformers. Through the points goes t = c n^p, a straight line in
logarithms, fitted by least squares; p says whether twice as much takes twice as long (1) or four times (2). The slope
between the last two points is given too: what grows like n^2 shows late. A point is the median of several passes over
all of them, with its range; what is timed has been compared with the reference before.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm import bench
from refllm.bench import results
from refllm.errors import InputError

Step = Callable[[str], None]
Times = dict[int, list[float]]
"""Point -> seconds of every pass."""

SIDES = ("numpy", "torch", "transformers")
MEASURES = ("prefill", "decode", "check")
COMMANDS = {"prefill": "prefill_of", "decode": "decode_at"}
"""What `refllm.bench.worker` calls them."""
TOKENS = (128, 256, 512, 1024, 2048, 4096)
LAYERS = (1, 2, 4, 8, 16)
REPEATS = 3
ENOUGH_SECONDS = 2.0
"""A point is timed in `REPEATS` passes, but not again once it has taken so long."""


@dataclass(frozen=True)
class Settings:
    """What to measure. shape: of `bench.SHAPES`; its number of layers is what `check` varies, on check_shape.

    tokens: lengths of prompts and of contexts, growing. layers: of the models that are checked. new_tokens: decoded at
    each context. threads: of either side.
    """

    shape: str = "helium-220m"
    check_shape: str = "helium-1m"
    tokens: tuple[int, ...] = TOKENS
    layers: tuple[int, ...] = LAYERS
    new_tokens: int = 8
    threads: int = 2
    sides: tuple[str, ...] = SIDES
    measures: tuple[str, ...] = MEASURES

    def __post_init__(self) -> None:
        for option, name in (("--shape", self.shape), ("--check-shape", self.check_shape)):
            if name not in bench.SHAPES:
                raise InputError(f"{option} {name} is not known: use {' or '.join(bench.SHAPES)}")
        for option, numbers in (("--tokens", self.tokens), ("--layers", self.layers)):
            if len(numbers) < 2 or any(b <= a for a, b in zip((0, *numbers), numbers, strict=False)):
                raise InputError(f"{option} {','.join(map(str, numbers))}: at least two numbers that grow are needed")
        for option, names, known in (("--side", self.sides, SIDES), ("--measure", self.measures, MEASURES)):
            for name in names:
                if name not in known:
                    raise InputError(f"{option} {name} is not known: use {', '.join(known)}")


def bench_growth(settings: Settings, step: Step = lambda text: None) -> dict[str, Any]:
    """Series of times with their exponents, as plain values for JSON. Raises BenchError for a side that is wrong."""
    start, series = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if {"prefill", "decode"} & set(settings.measures):
            step(f"writing random weights: {settings.shape}")
            bench.write_shape(settings.shape, path / "model")
            for side in settings.sides:
                series += _lengths(side, path / "model", settings, step)
        if "check" in settings.measures:
            _write_layers(path, settings, step)
            series += [_check(side, path, settings, step) for side in settings.sides]
    return {
        **results.stamp("growth"),
        "machine": results.describe_machine("cpu"),
        "versions": results.installed_versions(),
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - start, 1),
        "series": sorted(series, key=lambda one: (MEASURES.index(one["what"]), SIDES.index(one["side"]))),
    }


def _lengths(side: str, folder: Path, settings: Settings, step: Step) -> list[dict[str, Any]]:
    """prefill and decode of one side, in processes of its own: a cache is filled from the start in each pass."""
    measures = [what for what in ("prefill", "decode") if what in settings.measures]
    times: dict[str, Times] = {what: {n: [] for n in settings.tokens} for what in measures}
    for number in range(REPEATS):
        with _worker(side, folder, settings) as worker:
            if number == 0 and side != "numpy":
                step(f"{side}: whether its outputs are those of the reference")
                _compare(side, worker, folder, settings)
            worker.seconds("decode")  # what the first use of anything costs is not counted
            for what in measures:
                _pass(times[what], _asking(worker, COMMANDS[what]), f"{side}: {what}", step)
    return [series_of(what, side, times[what]) for what in measures]


def _worker(side: str, folder: Path, settings: Settings) -> bench.Worker:
    backend = side if side in bench.BACKENDS else "numpy"
    first = settings.tokens[0]
    how = bench.Settings(first, settings.new_tokens, settings.threads, repeats=1, backend=backend)
    return bench.Worker("transformers" if side == "transformers" else "refllm", folder, first, how)


def _asking(worker: bench.Worker, command: str) -> Callable[[int], float]:
    return lambda n: worker.seconds(command, n)


def _compare(side: str, worker: bench.Worker, folder: Path, settings: Settings) -> None:
    """Prefill and decoding of a side, held against the NumPy reference's. Raises BenchError."""
    with _worker("numpy", folder, settings) as reference:
        difference, _ = bench.compare_outputs(reference, worker)
    bench.require_agreement(f"{side} and the reference", difference, "float32")


def _pass(times: Times, seconds: Callable[[int], float], what: str, step: Step) -> None:
    """One more time for every point that has not taken long enough already."""
    for n, found in times.items():
        if sum(found) < ENOUGH_SECONDS:
            step(f"{what}, {n}")
            found.append(seconds(n))


def _write_layers(folder: Path, settings: Settings, step: Step) -> None:
    import refllm

    for layers in settings.layers:
        step(f"writing random weights: {layers} layers")
        config = refllm.HeliumConfig(**bench.SHAPES[settings.check_shape] | {"num_hidden_layers": layers})
        refllm.HeliumForCausalLM.from_config(config, seed=0).save_pretrained(folder / str(layers), dtype="bfloat16")


def _check(side: str, folder: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Seconds of a check of one side on every number of layers. Raises BenchError if it fails."""
    from refllm.check.api import compare

    ids = np.random.default_rng(0).integers(5, bench.SHAPES[settings.check_shape]["vocab_size"], 64)
    compare(folder / str(settings.layers[0]), side, dtype="float32", input_ids=ids)  # imports, and first uses

    def seconds(layers: int) -> float:
        start = time.perf_counter()
        reports = compare(folder / str(layers), side, dtype="float32", input_ids=ids)
        took = time.perf_counter() - start
        if any(report.verdict == "fails" for report in reports):
            raise bench.BenchError(f"the check of {side} on {layers} layers fails: not timed")
        return took

    times: Times = {layers: [] for layers in settings.layers}
    for _ in range(REPEATS):
        _pass(times, seconds, f"{side}: check of layers", step)
    return series_of("check", side, times)


def series_of(what: str, side: str, times: Times) -> dict[str, Any]:
    """One line of the plot, with the exponents of t = c n^p: of all points, and between the last two.

    times: per point the seconds of every pass. Of each point the median counts; lowest and highest show its range.
    """
    n, seconds = list(times), [float(np.median(found)) for found in times.values()]
    slope, offset = np.polyfit(np.log(n), np.log(seconds), 1)
    last = np.log(seconds[-1] / seconds[-2]) / np.log(n[-1] / n[-2])
    return {
        "what": what,
        "side": side,
        "n": n,
        "seconds": seconds,
        "lowest": [min(found) for found in times.values()],
        "highest": [max(found) for found in times.values()],
        "passes": [len(found) for found in times.values()],
        "exponent": float(slope),
        "factor": float(np.exp(offset)),
        "exponent_at_the_end": float(last),
    }


def show_growth(result: dict[str, Any]) -> Any:
    """The series as tables for a terminal."""
    from rich.console import Group

    from refllm.terminal.fitted_table import Table

    labels = {"prefill": "prefill, tokens", "decode": "decode, per token behind", "check": "check, layers"}
    tables: list[Any] = []
    for what in MEASURES:
        lines = [one for one in result["series"] if one["what"] == what]
        if not lines:
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(labels[what])
        for heading in [*map(str, lines[0]["n"]), "exponent", "at the end"]:
            table.add_column(heading, justify="right")
        for one in lines:
            exponents = f"{one['exponent']:.2f}", f"{one['exponent_at_the_end']:.2f}"
            table.add_row(one["side"], *map(results.span, one["seconds"]), *exponents)
        tables += [table, ""]
    settings, machine = result["settings"], result["machine"]
    tables.append(
        f"{settings['shape']} ({settings['check_shape']} for check), float32, {settings['threads']} threads, "
        f"{machine['processor']}; {result['seconds']} s in all"
    )
    return Group(*tables)
