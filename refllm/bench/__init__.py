"""`refllm bench cpu`: speed and memory of the reference against Transformers, on the same weights and threads.

Both sides run in the same dtype, each in a process of its own, and take turns, so that neither is favoured by what the
machine does meanwhile. Our side is the reference (NumPy) or the torch backend. Their outputs are compared before any
time counts. Figures are medians; the spread is shown.
"""

import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.apart import EndedError, Process
from refllm.errors import InputError, RefllmError
from refllm.precision.dtype_names import dtype_name

# Shapes to fill with random weights: Helium-1-preview-2b, narrower and less deep (226.7 million parameters), and tiny.
SHAPES: dict[str, dict[str, int]] = {
    "helium-220m": {
        "vocab_size": 48000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "helium-1m": {
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}

# Logits of two right implementations differ by a few roundings: in float32 far less than this, in bfloat16 by a few
# times 2^-8. Any defect: far more.
AGREEMENT = {"float32": 1e-5, "bfloat16": 0.05}
BACKENDS = ("numpy", "torch")
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class BenchError(RefllmError):
    """The two sides do not compute the same, or one of them ended: there is nothing to time."""


@dataclass(frozen=True)
class Settings:
    """What is timed: one prompt, then `new_tokens` single tokens; `repeats` times each, the sides taking turns."""

    prompt_tokens: int = 512
    new_tokens: int = 32
    threads: int = 2
    repeats: int = 5
    backend: str = "numpy"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.backend not in BACKENDS:
            raise InputError(f"--backend {self.backend} is not timed on a CPU: use {' or '.join(BACKENDS)}")
        if self.dtype not in AGREEMENT or (self.backend == "numpy" and self.dtype != "float32"):
            raise InputError(f"--dtype {self.dtype} is not timed: use float32, or bfloat16 with --backend torch")


@dataclass(frozen=True)
class Timing:
    """Seconds of one side's repeats."""

    median: float
    best: float
    worst: float


def timing(seconds: list[float]) -> Timing:
    """Median and range of the repeats."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def write_shape(shape: str, folder: Path, seed: int = 0) -> None:
    """Writes a checkpoint (bfloat16, one of `SHAPES`) with random weights to `folder`."""
    import refllm

    config = refllm.HeliumConfig(**SHAPES[shape])
    refllm.HeliumForCausalLM.from_config(config, seed=seed).save_pretrained(folder, dtype="bfloat16")


class Worker:
    """A process that runs `refllm.bench.worker`. A context manager."""

    def __init__(self, side: str, folder: Path, first_number: int, settings: Settings) -> None:
        self.side = side
        self.process = self.start(dict.fromkeys(THREAD_VARIABLES, str(settings.threads)))
        numbers = (first_number, settings.new_tokens, settings.threads)
        self.ready = self.ask(side, str(folder), *numbers, settings.dtype, settings.backend)

    @staticmethod
    def start(environment: dict[str, str]) -> Process:
        """The process, before it loads anything."""
        return Process.fresh("refllm.bench.worker:serve", environment)

    def ask(self, *request: str | int) -> dict[str, Any]:
        """Sends one request and waits for its answer. Raises BenchError if there is none."""
        self.process.send(request)
        try:
            return dict(self.process.receive(math.inf).values)
        except EndedError as error:
            self.process.close()
            raise BenchError(f"the {self.side} side of the benchmark ended: {error}") from None

    def seconds(self, *command: str | int) -> float:
        """The time that one job took, after a pause in which the other sides' threads fall asleep."""
        time.sleep(0.1)
        return float(self.ask(*command)["seconds"])

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.close()


def bench_checkpoint_or_shape(
    checkpoint: Path | None, shape: str, settings: Settings, step: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """`bench_cpu` on a checkpoint, or on random weights of a shape in a temporary folder. InputError: no such shape."""
    if checkpoint is not None:
        return {"checkpoint": checkpoint.name} | bench_cpu(checkpoint, settings, step)
    if shape not in SHAPES:
        raise InputError(f"--shape {shape} is not known: use {' or '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as folder:
        step(f"writing random weights: {shape}")
        write_shape(shape, Path(folder))
        return {"checkpoint": f"{shape} (random weights)"} | bench_cpu(Path(folder), settings, step)


def bench_cpu(folder: Path, settings: Settings, step: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Times prefill and decode of both sides on one checkpoint.

    step: called with what is being done, for a progress display. Returns plain values for JSON, see `summary`. Raises
    BenchError if the outputs disagree by more than `AGREEMENT` (relative rms).
    """
    context = settings.prompt_tokens + settings.new_tokens // 2
    weights = weight_bytes(folder, settings.dtype) | {"cache": cache_bytes(folder, context, settings.dtype)}
    step("loading refllm")
    with Worker("refllm", folder, settings.prompt_tokens, settings) as ours:
        step("loading transformers")
        with Worker("transformers", folder, settings.prompt_tokens, settings) as theirs:
            step("comparing outputs")
            difference, peaks = compare_outputs(ours, theirs)
            require_agreement("the sides", difference, settings.dtype)
            read = weights["read_per_token"] + weights["cache"]
            with Worker("memory", folder, read, settings) as memory:
                times = take_turns(ours, theirs, memory, settings.repeats, step)
    return summary(settings, weights, times, difference, {"refllm": ours.ready, "transformers": theirs.ready}, peaks)


def compare_outputs(ours: Worker, theirs: Worker) -> tuple[float, dict[str, int]]:
    """Relative rms difference of the logits (this also warms both sides up), and each side's peak memory meanwhile."""
    answers = [worker.ask("outputs") for worker in (ours, theirs)]
    a, b = (answer["logits"].astype(np.float64) for answer in answers)
    peaks = {side.side: int(answer["peak_bytes"]) for side, answer in zip((ours, theirs), answers, strict=True)}
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))), peaks


def require_agreement(who: str, difference: float, dtype: str) -> None:
    """Raises BenchError for a difference (relative rms) of more than `AGREEMENT`."""
    limit = AGREEMENT[dtype]
    if not difference <= limit:
        raise BenchError(f"{who} disagree by {difference:.2e} (relative rms, limit {limit:.0e}): not timed")


def take_turns(
    ours: Worker, theirs: Worker, memory: Worker, repeats: int, step: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of every job and side, run alternately: within each repeat every job runs once on each side."""
    times: dict[str, list[float]] = {}
    memory.ask("read")
    for repeat in range(repeats):
        for job in ("prefill", "decode"):
            step(f"{job}, repeat {repeat + 1} of {repeats}")
            pair = (ours, theirs) if repeat % 2 == 0 else (theirs, ours)
            for worker in pair:
                times.setdefault(f"{job} {worker.side}", []).append(worker.seconds(job))
        times.setdefault("products", []).append(ours.seconds("products"))
        times.setdefault("read", []).append(memory.seconds("read"))
    return times


def weight_bytes(folder: Path, dtype: str = "float32") -> dict[str, int]:
    """Bytes of all weights in `dtype`, and of those that one decode step reads (of the embedding table: one row)."""
    from refllm.storage.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    size = NUMBER_BYTES[dtype]
    sizes = {name: size * int(np.prod(checkpoint.shape(name))) for name in checkpoint.names}
    checkpoint.close()
    tied = "lm_head.weight" not in sizes
    table = 0 if tied else sizes.get("model.embed_tokens.weight", 0)
    return {"total": sum(sizes.values()), "read_per_token": sum(sizes.values()) - table}


def cache_bytes(folder: Path, context: int, dtype: str) -> int:
    """Bytes of the keys and values of `context` tokens in `dtype`: what a decode step reads beside the weights."""
    import refllm

    c = refllm.AutoConfig.from_pretrained(folder)
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * context * NUMBER_BYTES[dtype]


def summary(
    settings: Settings,
    weights: dict[str, int],
    times: dict[str, list[float]],
    difference: float,
    loads: dict[str, dict[str, Any]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    """The figures: per job both sides' timings and the ratio ours / theirs; prefill also against its own matrix
    products alone, decode against reading weights and cache once."""
    from refllm.bench.results import describe_machine, installed_versions

    values: dict[str, Any] = {
        "settings": asdict(settings),
        "machine": describe_machine("cpu"),
        "versions": installed_versions(),
        "weights": weights,
        "output_difference": difference,
    }
    for job in ("prefill", "decode"):
        ours, theirs = timing(times[f"{job} refllm"]), timing(times[f"{job} transformers"])
        values[job] = {"refllm": asdict(ours), "transformers": asdict(theirs), "ratio": ours.median / theirs.median}
    products, read = timing(times["products"]), timing(times["read"])
    read_bytes = weights["read_per_token"] + weights["cache"]
    values["products"] = asdict(products)
    values["read"] = asdict(read) | {"bytes": read_bytes, "bytes_per_second": read_bytes / read.median}
    values["prefill"]["ratio_to_products"] = values["prefill"]["refllm"]["median"] / products.median
    values["decode"]["ratio_to_read"] = values["decode"]["refllm"]["median"] / read.median
    values["memory"] = {
        side: {
            "load_peak": load["load_peak_bytes"] - load["before_bytes"],
            "run_peak": peaks[side] - load["before_bytes"],
        }
        for side, load in loads.items()
    }
    values["load_seconds"] = {side: load["load_seconds"] for side, load in loads.items()}
    return values


def processor_name() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def numpy_blas() -> str | None:
    """What computes NumPy's matrix products in this process: "openblas 0.3.31, SkylakeX kernels".

    None without threadpoolctl. OpenBLAS picks its kernels by the processor, or as OPENBLAS_CORETYPE says: those of an
    older processor take 1.5 times as long.
    """
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        return None
    # Torch brings a BLAS of its own, in a folder of its own.
    found = [
        lib for lib in threadpool_info() if lib["user_api"] == "blas" and "torch" not in Path(lib["filepath"]).parts
    ]
    if not found:
        return None
    name = f"{found[0]['internal_api']} {found[0]['version']}"
    return f"{name}, {found[0]['architecture']} kernels" if found[0].get("architecture") else name
