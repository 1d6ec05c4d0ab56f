"""`refllm bench kernels` and `refllm bench attention`: every operator on real shapes, against the machine's ceilings.

The most telling rows come first (`plan`); torch.compile takes seconds per call and gets mostly what is left.
What the time does not suffice for is named in the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refllm.bench import results
from refllm.bench.ceilings import measure_ceilings
from refllm.bench.forms import PEERS, Form, forms
from refllm.bench.measure import Bench, measure
from refllm.bench.timer import Deadline, clock
from refllm.bench.workloads import Job, attention_jobs, operator_jobs
from refllm.errors import InputError

Step = Callable[..., None]

SIZES = {"cuda": ((1, 4096), (64, 1), (1, 1), (1, 32768)), "cpu": ((1, 20), (4, 1))}
CONTEXT = {"cuda": 4096, "cpu": 64}
LENGTHS = {"cuda": (4096, 8192, 16384, 1024, 2048, 32768), "cpu": (32, 64)}
"""Of attention; the ones that a target names come first."""
HEAD_DIMS = {"cuda": (128, 80, 160, 64), "cpu": (64, 80)}
BATCHES = {"cuda": (1, 16), "cpu": (1, 2)}
PREFILL_TOKENS = {"cuda": 16384, "cpu": 64}
ONE_HEAD_IN = {"cuda": 1, "cpu": 8}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
SECONDS = {"cuda": 0.1, "cpu": 0.05}
SLOW = ("compile",)
DEFAULT_PEERS = {"cuda": ("eager", "liger", "sdpa", "compile"), "cpu": ("plain", "eager", "sdpa")}


@dataclass(frozen=True)
class Settings:
    """What to time. Empty or None: what suits the device.

    device: "cuda" or "cpu". layers: names of `refllm.kernels.cases`. sizes: (sequences, tokens of each). lengths,
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
    """Torch; raises MissingExtraError without it."""
    from refllm.errors import MissingExtraError

    try:
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        command = "pip install 'refllm[fast]'"
        raise MissingExtraError(f"this benchmark needs {error.name}; install it with: {command}") from error
    return torch


def has_gpu() -> bool:
    """Whether Torch sees one. Raises MissingExtraError without Torch."""
    return bool(_torch().cuda.is_available())


def bench_kernels(settings: Settings, step: Step = lambda *_: None) -> dict[str, Any]:
    """Every operator on the layers of published models: plain values for JSON, see `refllm.bench.results`."""
    device = settings.device
    jobs = operator_jobs(
        find_layers(settings.layers, device),
        settings.sizes or SIZES[device],
        settings.operators or None,
        settings.dtype or DTYPE[device],
        device,
        settings.context or CONTEXT[device],
    )
    return run("kernels", settings, list(jobs), step)


def bench_attention(settings: Settings, step: Step = lambda *_: None) -> dict[str, Any]:
    """Causal attention over lengths and head sizes, and decoding over caches."""
    device = settings.device
    jobs = attention_jobs(
        settings.head_dims or HEAD_DIMS[device],
        settings.lengths or LENGTHS[device],
        settings.batches or BATCHES[device],
        settings.dtype or DTYPE[device],
        device,
        PREFILL_TOKENS[device],
        ONE_HEAD_IN[device],
    )
    return run("attention", settings, list(jobs), step)


def find_layers(names: Sequence[str], device: str) -> list[Any]:
    """Layers by name; without names the real ones on a GPU, the reduced ones on a CPU. InputError: no such layer."""
    _torch()
    from refllm.kernels.cases import LAYERS, REDUCED

    known = {layer.name: layer for layer in (*LAYERS, *REDUCED)}
    for name in names:
        if name not in known:
            raise InputError(f"--layer {name} is not known: use {', '.join(known)}")
    return [known[name] for name in names] or list(LAYERS if device == "cuda" else REDUCED)


def run(bench_name: str, settings: Settings, jobs: Sequence[Job], step: Step) -> dict[str, Any]:
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
    left_out: list[str] = []
    work = plan(jobs, device, DEFAULT_PEERS[device] if settings.peers is None else settings.peers)
    for number, (index, chosen) in enumerate(work):
        if deadline.passed:
            left_out.append(f"{jobs[index].name}: {', '.join(form.name for form in chosen)}")
            continue
        step(jobs[index].name, number, len(work))
        rows.setdefault(index, []).extend(measure(jobs[index], chosen, bench))
    ordered = [row for index in sorted(rows) for row in rows[index]]
    return results.assemble(
        bench_name,
        device,
        ordered,
        ceilings=ceilings,
        settings=asdict(settings),
        left_out=left_out,
        seconds=deadline.seconds,
    )


def plan(jobs: Sequence[Job], device: str, peers: Sequence[str]) -> list[tuple[int, list[Form]]]:
    """(number of the job, forms), the most telling first: a short time should not be spent on one size of one layer.

    Quick forms of the first size; the slow ones there, of each operator once; quick forms of the other sizes; the rest.
    """
    stages: list[list[tuple[int, list[Form]]]] = [[], [], [], []]
    compiled: set[str] = set()
    for index, job in enumerate(jobs):
        first = (job.sizes["B"], job.sizes["S"]) == (jobs[0].sizes["B"], jobs[0].sizes["S"])
        found = list(forms(job.operator, device, peers))
        slow = [form for form in found if form.name in SLOW]
        stages[0 if first else 2].append((index, [form for form in found if form.name not in SLOW]))
        if slow:
            stages[1 if first and job.operator not in compiled else 3].append((index, slow))
            compiled.add(job.operator)
    return [one for stage in stages for one in stage]
