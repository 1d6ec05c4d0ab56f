"""What was judged so far, kept in a file beside the trace: a check that was killed goes on from there.

The file is written after a layer, if the last time is long enough ago, and takes its place in one piece. It says what
it is of (the trace, the checkpoint, what was asked, the version), and is of no use to any other check.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refllm.accuracy.propagation import Uncertain
from refllm.check.asked import Asked, Layers
from refllm.check.packing import as_text, packed, unpacked
from refllm.check.record import Record
from refllm.check.tap_report import TapReport
from refllm.check.trace import Trace, write_tensors
from refllm.check.values import raw_of
from refllm.errors import CheckpointError, InputError
from refllm.storage.checkpoint import Checkpoint, MappedFile

SUFFIX = ".judged"
SECONDS_BETWEEN = 10.0
"""The time from one writing of the file to the next; a check that takes less writes none."""
_FORMAT = "refllm judged 1"
_LOOKED_AT = 1 << 12  # bytes of every value that tell one run from another


class Judged(Protocol):
    """What of a judgement is kept (`refllm.check.oracle.Judge`)."""

    isolated: dict[str, TapReport]
    reports: dict[str, TapReport]
    record: Record
    alone_until: int
    in_line_until: int
    stream: Uncertain | None
    found_by: dict[str, Any]
    layers: Layers
    count: int


def state_of(judged: Judged) -> dict[str, Any]:
    """All that another process needs to go on."""
    return {
        "isolated": judged.isolated,
        "reports": judged.reports,
        "record": judged.record,
        "until": (judged.alone_until, judged.in_line_until),
        "stream": judged.stream,
        "found by": judged.found_by,
    }


def take(judged: Judged, state: Mapping[str, Any]) -> None:
    """Makes of a judgement that has not begun the one whose `state_of` this is."""
    judged.isolated = state["isolated"]
    judged.reports = {name: judged.isolated.get(name, report) for name, report in state["reports"].items()}
    judged.record = replace(state["record"], kinds=judged.record.kinds)
    judged.alone_until, judged.in_line_until = state["until"]
    judged.stream = state["stream"]
    for name, value in state["found by"].items():
        judged.found_by[name].clear()
        judged.found_by[name].update(value)


class Keeper:
    """The file of one check. of: what tells it from others (`digest`)."""

    def __init__(self, path: Path, of: str) -> None:
        self.path, self.of, self._last = path, of, time.monotonic()

    def load(self, judged: Judged) -> bool:
        """Takes over what was judged before, if that is kept here."""
        try:
            mapped = MappedFile(self.path)
            if mapped.metadata.get("format") != _FORMAT or mapped.metadata.get("of") != self.of:
                return False
            arrays = {name: np.array(mapped.view(name)) for name in mapped.tensors}
            take(judged, unpacked(json.loads(mapped.metadata["state"]), arrays))
        except (OSError, CheckpointError, LookupError, TypeError, ValueError):
            return False  # there is none, or it is not of this check
        return True

    def save(self, judged: Judged) -> None:
        """Writes what was judged, if the last time was `SECONDS_BETWEEN` ago. Where that is not possible it is lost."""
        if time.monotonic() - self._last < SECONDS_BETWEEN:
            return
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps(packed(state_of(judged), arrays))
        with contextlib.suppress(InputError, CheckpointError):
            whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
            write_tensors(self.path, whole, {"format": _FORMAT, "of": self.of, "state": text})
        self._last = time.monotonic()

    def done(self) -> None:
        """Removes the file: all is judged."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def part_of(
    judged: Judged | None, trace: Trace, asked: Asked, dtype: str | None, layout: str, checkpoint: Path | None
) -> dict[str, Any] | None:
    """What a report says of a part, to be merged with others (`refllm.check.merged`); None of a whole, and of a run
    that is in no file. dtype, layout: as they were said."""
    from refllm import __version__

    if judged is None or asked.last is not None or asked.kinds or trace.file is None or checkpoint is None:
        return None
    arrays: dict[str, np.ndarray] = {}
    state = packed(state_of(judged) | {"stream": None}, arrays)
    stop = judged.count if judged.layers.stop is None else judged.layers.stop
    return {
        "layers": [judged.layers.first, stop],
        "layers in all": judged.count,
        "checkpoint": str(checkpoint.resolve()),
        "trace": str(trace.file.resolve()),
        "digest": digest(trace),
        "version": __version__,
        "policy": asked.name,
        "splits": asked.splits,
        "tf32": asked.tf32,
        "dtype": dtype,
        "layout": layout,
        "judged": state,
        "arrays": as_text(arrays),
    }


def digest(trace: Trace) -> str:
    """What tells one run from another: names, shapes, tokens, and the beginning of every value."""
    found = hashlib.blake2b(digest_size=16)
    about = [trace.source, trace.dtype, trace.config_hash, trace.inputs.label]
    found.update(json.dumps(about).encode())
    for array in (trace.inputs.input_ids, trace.inputs.mask, trace.inputs.positions):
        found.update(np.ascontiguousarray(array).tobytes())
    for name, value in raw_of(trace.taps).items():
        found.update(f"{name}{value.shape}{value.dtype}".encode())
        found.update(np.ascontiguousarray(value.ravel()[:_LOOKED_AT]).tobytes())
    return found.hexdigest()


def keeper_for(trace: Trace, asked: Asked, checkpoint: Path | None) -> Keeper | None:
    """That of a run whose values lie in a file; None of another. checkpoint: the folder of the weights."""
    from refllm import __version__

    if trace.file is None or checkpoint is None:
        return None
    about: list[Any] = [digest(trace), __version__, asked.name, asked.splits, asked.tf32, str(asked.layers), asked.last]
    about += [sorted(asked.kinds.items()), weights_digest(checkpoint)]
    of = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
    return Keeper(trace.file.with_name(trace.file.name + SUFFIX), of)


def weights_digest(folder: Path) -> list[Any]:
    """What tells the weights in a folder from others that may have been written there."""
    try:
        files = Checkpoint.open(folder).files
    except CheckpointError:
        return []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def in_words_of_time(seconds: float) -> str:
    """ "40 s", "3 min", "2 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
