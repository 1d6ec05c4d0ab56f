"""Parts of one check, each of some layers and judged anywhere, put together: the report is that of the whole.

A part (`refllm check --layers A:B --json part.json`) has the judgement of every operator of its layers on its own
inputs, and what was recognised of where they round. The run end to end begins with the tokens and takes the profile of
all layers; so it is made here, and needs the trace and the checkpoint that the parts are of.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from refllm.check.asked import Asked
from refllm.check.keeper import digest, take
from refllm.check.oracle import Judge, Report
from refllm.check.packing import of_text, unpacked
from refllm.check.record import Record, larger
from refllm.check.recorded import check_recorded
from refllm.check.trace import Trace
from refllm.errors import InputError
from refllm.precision import POLICIES
from refllm.storage import input_file

_LARGEST_FILE = 1 << 30
_SAME = ("digest", "version", "policy", "splits", "tf32", "dtype", "layout", "layers in all")


def check_parts(
    files: list[Path], checkpoint: Path | None, trace: Path | None, step: Callable[..., None], explain: bool | None
) -> Iterator[Report]:
    """A report for each run that the parts in these files are of. checkpoint, trace: where they are now, if they are
    not where the parts were judged. Raises InputError for parts that do not make a whole."""
    from refllm.check.run import load

    runs: dict[str, list[dict[str, Any]]] = {}
    for part in (part for file in files for part in _parts_in(file)):
        runs.setdefault(str(part["digest"]), []).append(part)
    for parts in runs.values():
        first = parts[0]
        _must_make_a_whole(parts)
        folder = _where("the CHECKPOINT", checkpoint, first["checkpoint"])
        recorded = Trace.load(_where("--trace F", trace, first["trace"]))
        policy = None if first["policy"] is None else POLICIES[first["policy"]]
        yield check_recorded(
            lambda dtype, folder=folder: load(folder, dtype),  # type: ignore[misc]
            recorded,
            Asked(policy, first["splits"], first["tf32"]),
            checkpoint=folder.name,
            dtype=first["dtype"],
            layout=first["layout"],
            step=step,
            explain=explain,
            keeper=_Together(parts),
        )


class _Together:
    """The parts, in the place of what an earlier check has kept (`refllm.check.keeper.Keeper`)."""

    def __init__(self, parts: list[dict[str, Any]]) -> None:
        self.parts = sorted(parts, key=lambda part: part["layers"])

    def load(self, judged: Judge) -> bool:
        """Takes over what the parts have judged, in the order of the layers."""
        if digest(judged.shown) != self.parts[0]["digest"]:
            raise InputError(f"{judged.trace.source}: it is another run than that of the parts")
        states = [unpacked(part["judged"], of_text(part["arrays"])) for part in self.parts]
        whole, *others = states
        for state in others:
            whole["record"] = _record(whole["record"], state["record"])
            for name, values in state["found by"].items():
                whole["found by"][name] |= values
            whole["isolated"] |= {k: v for k, v in state["isolated"].items() if k not in whole["isolated"]}
        take(judged, whole | {"reports": {}, "until": (judged.count + 1, 0), "stream": None})
        return True

    def save(self, judged: Judge) -> None:
        """The parts stay what they are."""

    def done(self) -> None:
        """The parts stay where they are."""


def _record(one: Record, other: Record) -> Record:
    """What was recognised in both; in float32 an operator has the order of sums with the largest error."""
    orders = dict(one.orders)
    for key, profile in other.orders.items():
        orders[key] = profile if key not in orders else larger(orders[key], profile)
    return replace(
        one,
        found=one.found | other.found,
        operators=one.operators | other.operators,
        orders=orders,
        reads=one.reads | other.reads,
    )


def _parts_in(file: Path) -> list[dict[str, Any]]:
    try:
        found = input_file.read_json(file, _LARGEST_FILE)
        parts = [report.get("part") for report in found["reports"]]
    except OSError as error:
        raise InputError(f"--merge {file}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        parts = [None]
    if not parts or any(not isinstance(part, dict) or {*_SAME} - {*part} for part in parts):
        raise InputError(
            f"--merge {file}: it is not the part of a check; make it of a recorded run: refllm check CHECKPOINT "
            "--trace F --layers A:B --json part.json"
        )
    return parts


def _must_make_a_whole(parts: list[dict[str, Any]]) -> None:
    for name in _SAME:
        found = {str(part[name]) for part in parts}
        if len(found) > 1:
            raise InputError(f"--merge: the parts were judged with {name} {' and '.join(sorted(found))}; expected one")
    end = 0
    for first, stop in sorted(part["layers"] for part in parts):
        if first > end:
            break
        end = max(end, stop)
    if end < parts[0]["layers in all"]:
        raise InputError(f"--merge: layer {end} is in no part; judge it with --layers {end}: and add that part")


def _where(what: str, given: Path | None, before: str) -> Path:
    path = Path(before) if given is None else given
    if not path.exists():
        raise InputError(f"--merge: {path} is not here, and the values end to end are predicted from it: give {what}")
    return path
