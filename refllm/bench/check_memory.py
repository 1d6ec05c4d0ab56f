"""`refllm bench memory`, its second part: what `refllm check` takes, all its processes together, over loading the same
checkpoint in the same format and one forward pass.

Resident memory is read from outside, of a process and of all that it started. A page that several hold counts once: as
its part for each (`Pss` of Linux).
"""

import math
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refllm import bench, extras
from refllm.apart import Channel, EndedError, Process
from refllm.errors import InputError

TARGET = 3.0
"""How many times the memory of the forward pass a check may take."""
CANDIDATES = {"numpy": (), "torch": ("torch",)}
"""Those that are checked, and the packages that they need."""
_SECONDS = 0.05  # between two looks
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def bench_check(
    shape: str, tokens: int, dtype: str = "float32", step: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Peak resident bytes of a forward pass and of a check, for every candidate that is installed. InputError: unknown
    shape."""
    if shape not in bench.SHAPES:
        raise InputError(f"--check-shape {shape} is not known: use {' or '.join(bench.SHAPES)}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        from refllm.bench.memory import write_random

        step(f"writing random weights: {shape}")
        parameters = write_random(Path(folder), bench.SHAPES[shape])
        for name in (name for name, needs in CANDIDATES.items() if not extras.not_installed(needs)):
            step(f"one forward pass: {name}")
            forward, _ = _in_a_process("forward", folder, name, dtype, tokens)
            step(f"checking: {name}")
            check, verdict = _in_a_process("check", folder, name, dtype, tokens)
            found[name] = {"forward": forward, "check": check, "verdict": verdict}
    about = {"shape": shape, "parameters": parameters, "tokens": tokens, "dtype": dtype, "target": TARGET}
    return about | {"candidates": found}


def _in_a_process(what: str, *given: Any) -> tuple[int, str]:
    """The peak of a process that does it, and what it answers."""
    with Process.fresh(f"{__name__}:serve") as process, Resident(process.pid) as resident:
        process.send((what, *given))
        try:
            answer = process.receive(math.inf).values
        except EndedError as error:
            raise InputError(f"the {what} run ended: {error}") from None
    return resident.peak, str(answer)


def serve(channel: Channel) -> None:
    """What the process does."""
    for what, *given in channel.requests():
        channel.answer("done", {"forward": _forward, "check": _check}[what](*given))


def _forward(folder: str, name: str, dtype: str, tokens: int) -> str:
    import refllm

    model = refllm.load(folder, dtype=dtype, backend=name, device=None if name == "numpy" else "cpu")
    return str(model(input_ids=_ids(model.config.vocab_size, tokens)[None], use_cache=False).logits.shape)


def _check(folder: str, name: str, dtype: str, tokens: int) -> str:
    from refllm.check.run import Settings, check_all
    from refllm.config import AutoConfig

    ids = ",".join(map(str, _ids(AutoConfig.from_pretrained(folder).vocab_size, tokens)))
    settings = Settings(name, (dtype,), tokens={"prompt": None, "ids": ids, "ids_file": None})
    return ", ".join(report.verdict for report in check_all([Path(folder)], settings))


def _ids(vocab_size: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, tokens)


class Resident:
    """Watches a process and all that it started. A context manager. peak: bytes, 0 where the system does not tell."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self._stop = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS):
            self.peak = max(self.peak, sum(map(_resident, _with_descendants(self.pid))))

    def __enter__(self) -> "Resident":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def _resident(pid: int) -> int:
    try:
        found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:  # it has ended
        return 0
    return 0 if found is None else int(found[1]) * 1024


def _with_descendants(pid: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == one]
    return found


def show_check(result: dict[str, Any]) -> Any:
    """The result as a table for a terminal."""
    from refllm.bench.memory import GIB
    from refllm.terminal.fitted_table import Table

    title = f"check of {result['shape']}: {result['parameters'] / 1e6:,.1f} million parameters, {result['tokens']} "
    title += f"tokens, {result['dtype']}; resident memory of all processes, target {result['target']:g} x"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("candidate", "load and forward", "check", "over it", "verdict"):
        table.add_column(column, justify="left" if column in ("candidate", "verdict") else "right")
    for name, found in result["candidates"].items():
        over = f"{found['check'] / found['forward']:.2f} x" if found["forward"] else "-"
        peaks = (f"{found[peak] / GIB:.2f} GiB" for peak in ("forward", "check"))
        table.add_row(name, *peaks, over, found["verdict"])
    return table
