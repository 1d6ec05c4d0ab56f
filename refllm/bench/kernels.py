"""`refllm bench kernels` and `refllm bench attention`: every operator on real shapes, against the machine's ceilings.

The calls that a target names come first (`plan`); torch.compile takes seconds per call, and gets one call per operator
unless it is asked for. What the time does not suffice for is named in the result, which is handed on after every call.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refllm import extras
from refllm.bench import results
from refllm.bench.ceilings import measure_ceilings
from refllm.bench.forms import ATTENTION, PEERS, Form, forms
from refllm.bench.measure import Bench, measure
from refllm.bench.targets import MANY_TOKENS, STREAMING
from refllm.bench.timer import Deadline, clock
from refllm.bench.workloads import Job, attention_jobs, operator_jobs
from refllm.errors import InputError
from refllm.precision.dtype_names import dtype_name

Step = Callable[..., None]
Save = Callable[[dict[str, Any]], None]
"""Gets the result as far as it is, after every call; `left_out` names what is still to come."""

SIZES = {"cuda": ((1, 4096), (1, 32768), (64, 1), (1, 1)), "cpu": ((1, 20), (4, 1))}
CONTEXT = {"cuda": 4096, "cpu": 64}
LENGTHS = {"cuda": (1024, 2048, 4096, 8192, 16384, 32768), "cpu": (32, 64)}
HEAD_DIMS = {"cuda": (128, 80, 160, 64), "cpu": (64, 80)}
BATCHES = {"cuda": (1, 16), "cpu": (1, 2)}
PREFILL_TOKENS = {"cuda": 16384, "cpu": 64}
ONE_HEAD_IN = {"cuda": 1, "cpu": 8}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
SECONDS = {"cuda": 0.1, "cpu": 0.05}
SLOW = ("compile",)
COMPILED = ("triton", "compile", "liger")
COMPILER_MEMORY = 0.1
"""The share of the GPU's memory that a process of `compile_ahead` may take: others work beside it."""
DEFAULT_PEERS = {"cuda": ("eager", "liger", "sdpa", "compile"), "cpu": ("plain", "eager", "sdpa")}


@dataclass(frozen=True)
class Settings:
    """What to time. Empty or None: what suits the device.

    device: "cuda" or "cpu". layers: names of `refllm.kernels.calls`. sizes: (sequences, tokens of each). lengths,
    head_dims, batches: of attention. context: slots of a cache. peers: of `forms.PEERS`. minutes: begin nothing later.
    seconds: of timing per row. scale: of the buffers for the ceilings. cache_bytes: instead of the machine's.
    """

    device: str = "cuda"
    dtype: str = ""
    layers: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    operators: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    context: int = 0
    peers: tuple[str, ...] | None = None
    minutes: float | None = None
    seconds: float = 0.0
    scale: float = 1.0
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        check_device(self.device)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in ("", "bfloat16", "float16", "float32"):
            raise InputError(f"--dtype {self.dtype} is not a kernel's: use bfloat16, float16 or float32")
        for peer in self.peers or ():
            if peer not in PEERS:
                raise InputError(f"--peers {peer} is not known: use {', '.join(PEERS)}, or none")


def check_device(device: str) -> None:
    """Raises InputError if there is no such device, or Torch is not installed."""
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device {device} is not known: use cuda or cpu")
    if device == "cuda" and not _torch().cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; --device cpu runs everything reduced, kernels untimed")


def _torch() -> Any:
    """Torch; raises MissingExtraError without it, or without Triton."""
    extras.require("this benchmark", "torch", "triton")
    import torch

    return torch


def has_gpu() -> bool:
    """Whether Torch sees one. Raises MissingExtraError without Torch."""
    return bool(_torch().cuda.is_available())


def bench_kernels(settings: Settings, step: Step = lambda *_: None, save: Save = lambda _: None) -> dict[str, Any]:
    """Every operator on the layers of published models: plain values for JSON, see `refllm.bench.results`."""
    return run("kernels", settings, kernel_jobs(settings), step, save)


def bench_attention(settings: Settings, step: Step = lambda *_: None, save: Save = lambda _: None) -> dict[str, Any]:
    """Causal attention over lengths and head sizes, and decoding over caches."""
    return run("attention", settings, head_jobs(settings), step, save)


def kernel_jobs(settings: Settings) -> list[Job]:
    """The calls of `bench_kernels`. Raises InputError for a layer or an operator that is not known."""
    device = settings.device
    return list(
        operator_jobs(
            find_layers(settings.layers, device),
            settings.sizes or SIZES[device],
            settings.operators or None,
            settings.dtype or DTYPE[device],
            device,
            settings.context or CONTEXT[device],
        )
    )


def head_jobs(settings: Settings) -> list[Job]:
    """The calls of `bench_attention`. Raises InputError for a head size that kernels do not take."""
    device = settings.device
    return list(
        attention_jobs(
            settings.head_dims or HEAD_DIMS[device],
            settings.lengths or LENGTHS[device],
            settings.batches or BATCHES[device],
            settings.dtype or DTYPE[device],
            device,
            PREFILL_TOKENS[device],
            ONE_HEAD_IN[device],
        )
    )


def find_layers(names: Sequence[str], device: str) -> list[Any]:
    """Layers by name; without names the real ones on a GPU, the reduced ones on a CPU. InputError: no such layer."""
    _torch()
    from refllm.kernels.calls import LAYERS, REDUCED

    known = {layer.name: layer for layer in (*LAYERS, *REDUCED)}
    for name in names:
        if name not in known:
            raise InputError(f"--layer {name} is not known: use {', '.join(known)}")
    return [known[name] for name in names] or list(LAYERS if device == "cuda" else REDUCED)


def run(bench_name: str, settings: Settings, jobs: Sequence[Job], step: Step, save: Save) -> dict[str, Any]:
    """Ceilings, then the rows of every job in the order of `plan`, as long as there is time."""
    deadline, device = Deadline(settings.minutes), settings.device
    watch = clock(device, settings.cache_bytes)
    step("what this machine can do at best")
    dtypes = {settings.dtype or DTYPE[device]: None} | dict.fromkeys(
        ("bfloat16", "float16") if device == "cuda" else ()
    )
    ceilings = measure_ceilings(device, tuple(dtypes), scale=settings.scale, watch=watch)
    bench = Bench(watch, ceilings, settings.seconds or SECONDS[device])
    rows: dict[int, list[results.Row]] = {}
    work = plan(jobs, device, settings.peers)

    def result() -> dict[str, Any]:
        return results.assemble(
            bench_name,
            device,
            [row for index in sorted(rows) for row in rows[index]],
            ceilings=ceilings,
            settings=asdict(settings),
            left_out=[
                f"{jobs[index].name}: {', '.join(form.name for form in chosen)}"
                for index, chosen in work
                if index not in rows
            ],
            seconds=deadline.seconds,
        )

    for number, (index, chosen) in enumerate(work):
        if deadline.passed:
            break
        step(jobs[index].name, number, len(work))
        rows[index] = list(measure(jobs[index], chosen, bench))
        save(result())
    return result()


def plan(jobs: Sequence[Job], device: str, peers: Sequence[str] | None) -> list[tuple[int, list[Form]]]:
    """(number of the job, forms), each job once: first the calls that a target names, and of these one per operator.

    peers: None for those of the device; then torch.compile gets one call per operator, and one at each size that a
    target names.
    """
    compiled: set[str] = set()
    planned: list[tuple[bool, bool, int, list[Form]]] = []
    for index, job in enumerate(jobs):
        named, once = named_by_a_target(job), f"{job.operator}, {job.group}"
        again = (once if named else job.operator) in compiled
        compiled |= {once, job.operator}
        found = forms(job.operator, device, DEFAULT_PEERS[device] if peers is None else peers)
        chosen = [form for form in found if peers is not None or not again or form.name not in SLOW]
        planned.append((not named, again, index, chosen))
    return [(index, chosen) for _, _, index, chosen in sorted(planned, key=lambda one: one[:3])]


def named_by_a_target(job: Job) -> bool:
    """Whether `refllm.bench.targets` reads a figure off this call."""
    n = job.sizes
    if job.operator in ATTENTION:
        if "E" in n:  # of `bench_kernels`: figures of attention are read off `bench_attention`
            return False
        if job.operator == "decode_attention":
            return n["N"] == 32768
        return n["S"] in (range(4096, 16385) if n["D"] == 128 else range(1024, 32769)) and n["D"] in (128, 80, 160)
    return job.operator in STREAMING and n["B"] * n["S"] >= MANY_TOKENS


def compile_ahead(settings: Settings, jobs: Sequence[Job], share: int, of: int) -> int:
    """Calls what is compiled of every `of`-th job once, from number `share` on, and returns how many calls ran.

    What Triton and torch.compile make of them stays in their caches on disk, for the process that times the same calls:
    compiling takes more time than timing, and several of these processes do it at once. What fails is for the other
    process to report.
    """
    import torch

    done = 0
    if settings.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(COMPILER_MEMORY)
    with torch.no_grad():
        for index, chosen in plan(jobs, settings.device, settings.peers)[share::of]:
            with contextlib.suppress(Exception):
                arguments, keywords = jobs[index].draw(0)
                for form in (form for form in chosen if form.name in COMPILED):
                    with contextlib.suppress(Exception):
                        form.bind(arguments, keywords)()
                        done += 1
    return done
