"""What the compiler made of every configuration that ships, kept: `refllm kernels check-aot --record F`.

A compilation has one result for one input: the source of the kernel and of all that it calls, the types and constants
that it is specialised for, its options, the target, and the version of Triton. Their digest is the key of the record.
What stands in it need not be compiled again to be judged; a kernel, tile or launch that changes is no longer in it.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from refllm.errors import InputError
from refllm.kernels.aot.batch import Checked, Configuration
from refllm.kernels.aot.compile_code import Report, specialise
from refllm.kernels.aot.machine_code import Dot, Instructions, Resources
from refllm.kernels.aot.occupancy import Occupancy
from refllm.storage import output_file

FORMAT = 1


def digest(configuration: Configuration) -> str:
    """Equal for equal inputs of the compiler, on any machine; comments and the place in the file do not count."""
    launch, source = configuration.launch, specialise(configuration.launch, configuration.target).source
    options = launch.num_warps, launch.num_stages, sorted(launch.options.items())
    parts = [configuration.target.name, *(sorted(map(str, part.items())) for part in
             (source.signature, source.constants, source.attrs)), options, _content(source.fn)]  # fmt: skip
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


@cache
def _content(kernel: JITFunction) -> str:
    """The syntax of a kernel, and after it that of the kernels and the values of the constants that it names."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.module}.{function.__name__}"
        if name in found:
            continue
        found[name] = ast.dump(function.parse())
        for expression, value in _named(function):
            if isinstance(value, JITFunction) and not value.module.startswith("triton."):
                waiting.append(value)
            elif isinstance(value, constexpr | int | float | str):
                found[f"{name}: {expression}"] = repr(value)
    return "\n".join(f"{name} = {text}" for name, text in sorted(found.items()))


def _named(function: JITFunction) -> Iterable[tuple[str, Any]]:
    """What stands outside of a function and is named in it, as `name` or `module.name`."""
    outside = function.fn.__globals__
    for node in ast.walk(function.parse()):
        if isinstance(node, ast.Name) and node.id in outside:
            yield node.id, outside[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = outside.get(node.value.id)
            if isinstance(module, ModuleType) and hasattr(module, node.attr):
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr)


def write(file: Path, checked: Iterable[Checked]) -> None:
    """Keeps the reports of all configurations that compiled. Raises InputError if the file cannot be written."""
    entries = {}
    for row in checked:
        if row.report is not None:
            entries[digest(row.configuration)] = _entry(row.report)
    lines = ",\n".join(f'"{key}": {json.dumps(entry)}' for key, entry in sorted(entries.items()))
    head = f'"format": {FORMAT}, "triton": "{triton.__version__}"'
    output_file.write("--record", file, f'{{{head}, "reports": {{\n{lines}\n}}}}\n')


def _entry(report: Report) -> dict[str, Any]:
    """What stands of a report in the record: all but what only kernels of others are judged by."""
    entry = asdict(report)
    del entry["loads_can_be_wide"], entry["stores_can_be_wide"], entry["instructions"]["stores"]
    return entry


def read(file: Path) -> dict[str, Report]:
    """Reports by digest; none where another version of Triton made them. Raises InputError if it is no such file."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError(f"format {kept['format']}")
        if kept["triton"] != triton.__version__:
            return {}
        return {key: _report(entry) for key, entry in kept["reports"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} holds no record of check-aot: {error}") from None


def _report(entry: dict[str, Any]) -> Report:
    code = entry["instructions"]
    instructions = Instructions(**code | {"loads": {int(width): count for width, count in code["loads"].items()}})
    resources, fits = Resources(**entry["resources"]), Occupancy(**entry["occupancy"])
    dots = tuple(Dot(**dot) for dot in entry["dots"])
    return Report(**entry | {"resources": resources, "instructions": instructions, "occupancy": fits, "dots": dots})
