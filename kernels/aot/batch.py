"""Compiles many launches, in several processes, and judges every one."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from refllm.errors import InputError
from refllm.kernels.aot.compile_code import DoesNotCompile, Report, Result, compile_launches, specialise
from refllm.kernels.aot.gates import Finding, gates
from refllm.kernels.aot.sources import Source, kernel_name
from refllm.kernels.launch import Launch
from refllm.kernels.targets import Target, target

FEW = 8
"""Up to this many compilations are done in this process: another takes seconds to start."""

CHUNK, CHUNK_ALONE = 12, 64
"""Compilations that a process is given at a time, among others and alone: they share one start of nvdisasm, which takes
as long as a small kernel. Few enough to spread over processes, and for a progress line to move."""

Step = Callable[[str, float | None, float | None], None]


@dataclass(frozen=True)
class Configuration:
    """One named launch on one target. index: its place among those of its source. key: equal for equal results."""

    source: Source
    target: Target
    index: int
    name: str
    launch: Launch
    key: str

    @property
    def kernel(self) -> str:
        return kernel_name(self.launch.kernel)


@dataclass(frozen=True)
class Checked:
    """A configuration that was compiled, with everything that is wrong with it. report: None if it does not compile."""

    configuration: Configuration
    report: Report | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Stable shape: module, kernel, configuration, target, report (null, or as the dataclass), findings."""
        return {
            "module": self.configuration.source.module,
            "kernel": self.configuration.kernel,
            "configuration": self.configuration.name,
            "target": self.configuration.target.name,
            "num_warps": self.configuration.launch.num_warps,
            "num_stages": self.configuration.launch.num_stages,
            "report": None if self.report is None else asdict(self.report),
            "findings": [asdict(finding) for finding in self.findings],
        }


def collect(sources: Iterable[Source], targets: Sequence[Target], wanted: str = "") -> list[Configuration]:
    """Every launch of the sources on every target whose module, kernel or name contains `wanted`.

    Raises InputError if there is none, and as the sources.
    """
    found = [
        Configuration(source, gpu, index, name, launch, _key(source, gpu, name, launch))
        for source in sources
        for gpu in targets
        for index, (name, launch) in enumerate(source.launches(gpu))
        if any(wanted in text for text in (source.module, kernel_name(launch.kernel), name))
    ]
    if not found:
        raise InputError(f"no configuration's name contains {wanted!r}" if wanted else "there are no configurations")
    return found


def check(configurations: Sequence[Configuration], jobs: int = 1, step: Step | None = None) -> list[Checked]:
    """Compiles all of them (equal ones once) in `jobs` processes and judges each; in the order given.

    step: told (what, done, of how many). Raises InputError if a user's kernel does not compile.
    """
    first = {configuration.key: configuration for configuration in reversed(configurations)}
    results: dict[str, Result] = {}
    for configuration, result in _compile_all(list(first.values()), jobs):
        results[configuration.key] = result
        if step is not None:
            step(f"{configuration.kernel} for {configuration.target.name}", len(results), len(first))
    return [_judge(configuration, results[configuration.key]) for configuration in configurations]


def cores() -> int:
    """How many processes may compile at a time."""
    return len(os.sched_getaffinity(0))


def _key(source: Source, gpu: Target, name: str, launch: Launch) -> str:
    try:
        return specialise(launch, gpu).key
    except InputError:
        if not source.ours:
            raise
        return f"{source.module} {gpu.name} {name}"  # compiling it says the same, as a finding


def _judge(configuration: Configuration, result: Result) -> Checked:
    if isinstance(result, Report):
        launch = configuration.launch
        if not configuration.source.ours:
            launch = _expecting(launch, result)
        return Checked(configuration, result, tuple(gates(launch, result, configuration.target)))
    if not configuration.source.ours:
        raise result
    return Checked(configuration, None, (Finding("compiles", str(result), 0, 1),))


def _expecting(launch: Launch, report: Report) -> Launch:
    """A launch of which nobody said what to expect: a product in a loop should run ahead, and aligned tensors should be
    read and written 16 bytes at a time by a kernel without products, where that is most of what it moves."""
    tensors = [value for value in launch.arguments.values() if hasattr(value, "data_ptr")]
    of_memory = not report.dots and not launch.narrow and not any(tensor.storage_offset() for tensor in tensors)
    return replace(
        launch,
        async_copies=launch.async_copies or any(dot.pipelined for dot in report.dots),
        wide_loads=launch.wide_loads or (of_memory and report.loads_can_be_wide > 0.5),
        wide_stores=launch.wide_stores or (of_memory and report.stores_can_be_wide > 0.5),
    )


def _compile_all(configurations: list[Configuration], jobs: int) -> Iterator[tuple[Configuration, Result]]:
    if jobs <= 1 or len(configurations) <= FEW:
        for chunk in _chunks(configurations, _target_name, CHUNK_ALONE):
            results = compile_launches([configuration.launch for configuration in chunk], chunk[0].target)
            yield from zip(chunk, results, strict=True)
        return
    chunks = list(_chunks(configurations, _source_and_target, CHUNK))
    left = {configuration.key: configuration for configuration in configurations}
    for configuration, result in _in_processes(chunks, min(jobs, len(chunks))):
        del left[configuration.key]
        yield configuration, result
    for configuration in left.values():  # a compiler process died: each of the rest in a process of its own
        died = DoesNotCompile(f"{configuration.kernel} for {configuration.target.name}: the compiler crashes")
        alone = [result for _, result in _in_processes([[configuration]], 1)]
        yield configuration, alone[0] if alone else died


def _target_name(configuration: Configuration) -> str:
    return configuration.target.name


def _source_and_target(configuration: Configuration) -> tuple[str, str]:
    return configuration.source.module, configuration.target.name


def _chunks(
    configurations: Iterable[Configuration], place: Callable[[Configuration], Any], size: int
) -> Iterator[list[Configuration]]:
    """Up to `size` configurations of one place at a time."""
    for _, together in groupby(sorted(configurations, key=place), place):
        listed = list(together)
        yield from (listed[start : start + size] for start in range(0, len(listed), size))


def _in_processes(chunks: list[list[Configuration]], jobs: int) -> Iterator[tuple[Configuration, Result]]:
    """Results as they come; ends early if a process dies.

    A fork of this process would copy its threads. So the processes are forks of a server that has imported Torch and
    Triton and done nothing yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            running = {
                pool.submit(_compile_at, chunk[0].source, chunk[0].target.name, [each.index for each in chunk]): chunk
                for chunk in chunks
            }
            for future in as_completed(running):
                yield from zip(running[future], future.result(), strict=True)
        except BrokenProcessPool:
            return
        finally:
            pool.shutdown(cancel_futures=True)


def _compile_at(source: Source, target_name: str, indices: Sequence[int]) -> list[Result]:
    """The work of another process: launches cannot be sent there, so they are made again."""
    gpu = target(target_name)
    named = source.launches(gpu)
    return compile_launches([named[index][1] for index in indices], gpu)
