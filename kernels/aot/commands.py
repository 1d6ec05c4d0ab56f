"""What `refllm kernels list` and `refllm kernels check-aot` do, as functions that return values."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from refllm.accuracy.verdicts import SCHEMA, verdict
from refllm.kernels.aot import batch
from refllm.kernels.aot.batch import Checked, check, collect
from refllm.kernels.aot.sources import first_line, kernel_name, load, our_sources, user_source
from refllm.kernels.targets import TARGETS, Target, target
from refllm.kernels.triton import BACKWARD_FILES, FILES


@dataclass(frozen=True)
class Settings:
    """What to compile and for whom, as typed.

    targets: names, separated by commas; "" means all. kernel: only what has this in its name.
    file: a user's kernel ("file.py:kernel"); None means those of refllm. arguments, constants: its NAME=VALUE texts.
    jobs: processes; 0 means one per core.
    """

    targets: str = ""
    kernel: str = ""
    file: str | None = None
    arguments: Sequence[str] = ()
    constants: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    jobs: int = 0


@dataclass(frozen=True)
class Outcome:
    """checked: every configuration. compiled: how many were different. seconds: that all of it took."""

    checked: list[Checked]
    compiled: int
    seconds: float

    @property
    def holds(self) -> bool:
        return not any(row.findings for row in self.checked)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: schema, verdict, triton (version), compiled, seconds, and all configurations."""
        return {
            "schema": SCHEMA,
            "verdict": verdict(not self.holds),
            "triton": triton.__version__,
            "compiled": self.compiled,
            "seconds": self.seconds,
            "configurations": [row.to_dict() for row in self.checked],
        }


def check_aot(settings: Settings, step: batch.Step | None = None) -> Outcome:
    """Compiles and judges. Raises InputError for settings that name nothing, DoesNotCompile for a user's kernel."""
    started, targets = time.perf_counter(), read_targets(settings.targets)
    if settings.file is None:
        sources: Sequence[Any] = our_sources()
    else:
        words = settings.arguments, settings.constants, settings.num_warps, settings.num_stages
        sources = [user_source(settings.file, *words)]
    configurations = collect(sources, targets, settings.kernel)
    checked = check(configurations, settings.jobs or batch.cores(), step)
    return Outcome(checked, len({c.key for c in configurations}), time.perf_counter() - started)


def keep(file: Path, outcome: Outcome) -> None:
    """Writes the record of `refllm.kernels.aot.record`. InputError if that is not possible."""
    from refllm.kernels.aot import record

    record.write(file, outcome.checked)


def read_targets(names: str) -> list[Target]:
    """The targets of a list separated by commas; all of them for "". Raises InputError for an unknown one."""
    return [target(name.strip()) for name in names.split(",")] if names else list(TARGETS.values())


def describe() -> list[dict[str, Any]]:
    """Every kernel file: operators, file, kernels, configurations (names by target), about (its first line)."""
    return [_describe(load(source.module), {gpu.name: source.launches(gpu) for gpu in TARGETS.values()})
            for source in our_sources()]  # fmt: skip


def _describe(module: Any, launches: dict[str, list[Any]]) -> dict[str, Any]:
    kernels = dict.fromkeys(kernel_name(launch.kernel) for named in launches.values() for _, launch in named)
    return {
        "operators": [name for name, file in (FILES | BACKWARD_FILES).items() if file is module],
        "file": "/".join(Path(module.__file__).parts[-3:]),
        "kernels": list(kernels),
        "configurations": {gpu: [name for name, _ in named] for gpu, named in launches.items()},
        "about": first_line(module),
    }
