"""What a checkpoint file and a model do not have in common: names, prefixes, shapes.

Pages name the tensors of the backbone without a prefix ("embed_tokens.weight", "layers.0...", "norm.weight"); files put
"model." before them, or "transformer." (question answering), or nothing (a bare backbone). Head tensors
("lm_head.weight", "score.weight", "qa_outputs.bias") have no prefix anywhere.

Deviation from Transformers, on purpose: there a question-answering model does not find the backbone of a causal-LM
checkpoint, nor the other way round, because the prefixes differ; a warning is all that tells. Here the prefix is
dropped before names are compared, so both load.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from refllm.errors import CheckpointError
from refllm.storage.safetensors_format import quote

Shape = tuple[int, ...]

PREFIXES = ("model.", "transformer.", "")
BACKBONE = ("embed_tokens.", "layers.", "norm.")
HEADS = ("lm_head.", "score.", "qa_outputs.")


@dataclass
class LoadReport:
    """What a checkpoint and a model do not have in common. Names are as in the file.

    missing: expected and not in the file. unexpected: in the file and not used. mismatched: name -> (expected shape,
    found shape). fresh: the missing head tensors, initialised at random. zeroed: missing LayerNorm biases, taken as
    zeros. nonfinite: name -> count of NaN and infinite numbers after rounding to the dtype of the model; with
    low_memory a tensor gets there by the first access that meets one.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    zeroed: list[str] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)


def find_prefix(names: Collection[str], where: Any = "checkpoint") -> str:
    """What the file puts before backbone names: "model.", "transformer." or "".

    Raises CheckpointError where two of them occur, because then one tensor could be meant by two names.
    """
    found = {prefix: name for name in names for prefix in PREFIXES if _is_backbone(name, prefix)}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise CheckpointError(
            f"{where}: the tensors {quote(first)} and {quote(second)} have different prefixes, expected one prefix"
        )
    return next(iter(found), "model.")


def _is_backbone(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name[len(prefix) :].startswith(BACKBONE)


def file_name(name: str, prefix: str) -> str:
    """The name in a file of a tensor that the pages call `name`: only backbone names carry the prefix."""
    return prefix + name if name.startswith(BACKBONE) else name


def compare(
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    optional_zero: Collection[str] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
    where: Any = "checkpoint",
) -> tuple[LoadReport, dict[str, str]]:
    """The report for a file with tensors of these `shapes`, and the map page name -> file name of what is usable.

    `tied` maps target to source ({"lm_head.weight": "embed_tokens.weight"}): either may stand for the other. `where`
    names the checkpoint in messages. Raises CheckpointError for backbone names with more than one prefix.
    """
    prefix = find_prefix(shapes, where)
    wanted = dict(expected)
    for target, source in tied.items():
        wanted[target] = wanted.get(target, expected[source])
    found = {name: file_name(name, prefix) for name in wanted if file_name(name, prefix) in shapes}
    report = LoadReport()
    used = set(found.values())
    report.unexpected = [name for name in shapes if name not in used and not name.endswith("rotary_emb.inv_freq")]
    for name, stored in found.items():
        if tuple(wanted[name]) != tuple(shapes[stored]):
            report.mismatched[stored] = (tuple(wanted[name]), tuple(shapes[stored]))
    partner = {**tied, **{source: target for target, source in tied.items()}}
    absent = [name for name in wanted if name not in found and partner.get(name) not in found]
    report.missing = [file_name(name, prefix) for name in absent if name in expected]
    report.fresh = [name for name in absent if name in expected and name.startswith(HEADS)]
    # A file with some of these biases and not all is damaged; a file without any was written without them.
    if not any(name in found for name in optional_zero):
        report.zeroed = [file_name(name, prefix) for name in absent if name in optional_zero]
    return report, found


def require_usable(report: LoadReport, where: Any) -> None:
    """Raises CheckpointError for wrong shapes and for missing tensors that nothing can stand in for."""
    if report.mismatched:
        lines = [
            f"{quote(name)} (expected {list(expected)}, found {list(found)})"
            for name, (expected, found) in report.mismatched.items()
        ]
        raise CheckpointError(f"{where}: wrong shape of {_listing(lines)}")
    tolerated = {*report.fresh, *report.zeroed}
    lacking = [quote(name) for name in report.missing if name not in tolerated]
    if lacking:
        raise CheckpointError(f"{where}: missing {_listing(lacking)}")


def _listing(items: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(items[:limit])
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''}: {shown}{', ...' if len(items) > limit else ''}"


def warn_about(report: LoadReport, where: Any, stacklevel: int) -> None:
    """One warning each for unexpected, for randomly initialised, and for not finite tensors."""
    if report.unexpected:
        names = [quote(name) for name in report.unexpected]
        warnings.warn(f"{where}: not used by this model: {_listing(names)}", UserWarning, stacklevel=stacklevel)
    if report.fresh:
        names = [quote(name) for name in report.fresh]
        message = f"{where}: not in the checkpoint and initialised at random, so train them: {_listing(names)}"
        warnings.warn(message, UserWarning, stacklevel=stacklevel)
    if report.nonfinite:
        lines = [f"{quote(name)} ({count})" for name, count in report.nonfinite.items()]
        message = f"{where}: NaN or infinite numbers in {_listing(lines)}"
        warnings.warn(message, UserWarning, stacklevel=stacklevel)
