"""How far measured over predicted error lies from 1 by chance: a short run has few independent errors.

The positions of a run err independently of each other, more or less, so how much they differ says what another run of
that length would have (`Measure.scatter`). If the prediction is right, runs scatter by that around the RMS over them,
and that RMS lies within the aim; nothing here is fitted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refllm.mutants.validation_page import HIGH, LOW, operator, table

if TYPE_CHECKING:
    from refllm.mutants.runs import Run

LOW_FLOAT32 = 0.55
"""The lower end of the aim where the order of float32 sums counts, which is not known."""
_LENGTHS = (12, 30)


@dataclass(frozen=True)
class Alike:
    """The values of one operator in one format, in runs of similar lengths. ratios, scatters: of each, isolated."""

    length: str
    dtype: str
    operator: str
    ratios: np.ndarray
    scatters: np.ndarray

    @property
    def pooled(self) -> float:
        """The RMS over the runs, which has many errors."""
        return float(np.sqrt(np.mean(np.square(self.ratios))))


def alike(runs: Iterable["Run"]) -> list[Alike]:
    """The values of all runs by length, format and operator."""
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        for name, (_, isolated) in run.ratios.items():
            key = _length(run.tokens), run.dtype, operator(name)
            found[key].append((isolated, run.scatters.get(name, 0.0)))
    return [Alike(*key, *np.array(both).T) for key, both in sorted(found.items())]


def _length(tokens: int) -> str:
    low, high = _LENGTHS
    return f"under {low}" if tokens < low else f"{low} to {high - 1}" if tokens < high else f"{high} and more"


def aim(dtype: str) -> tuple[float, float]:
    """The bounds of measured over predicted error."""
    return (LOW_FLOAT32 if dtype == "float32" else LOW), HIGH


def beyond(groups: Iterable[Alike]) -> Iterator[tuple[str, float, float]]:
    """(operator, ratio, how many standard errors of chance it is past the aim) of every value outside."""
    for group in groups:
        low, high = aim(group.dtype)
        for ratio, scatter in zip(group.ratios, group.scatters, strict=True):
            past = max(low - ratio, ratio - high)
            if past > 0:
                yield group.operator, float(ratio), float(past / scatter) if scatter else np.inf


def rows(runs: Iterable["Run"]) -> list[tuple[str, str, str]]:
    """The aims about the isolated error of right ports: (in words, aim, measured)."""
    groups, found = alike(runs), []
    for words, dtypes in (("bfloat16 and float16", ("bfloat16", "float16")), ("float32", ("float32",))):
        these = [group for group in groups if group.dtype in dtypes]
        if not these:
            continue
        low, high = aim(dtypes[0])
        ratios, pooled = np.concatenate([g.ratios for g in these]), [g.pooled for g in these]
        outside = [past for _, _, past in beyond(these)]
        far = f", by {max(outside):.1f} standard errors of chance at most" if outside else ""
        said = f"{ratios.min():.2f} to {ratios.max():.2f}; {len(outside)} of {len(ratios)} outside{far}"
        about = f"measured over predicted error of these ports, isolated, {words}"
        found.append((f"{about}: RMS over runs alike", f"{low} to {high}", f"{min(pooled):.2f} to {max(pooled):.2f}"))
        found.append((f"{about}: every value", f"{low} to {high}, but for chance", said))
    return found


def lines(runs: Iterable["Run"]) -> list[str]:
    """The scatter of short and long runs, and what chance makes."""
    groups = alike(runs)
    by_kind: dict[tuple[str, str], list[Alike]] = defaultdict(list)
    for group in groups:
        by_kind[group.length, group.dtype].append(group)
    return [
        "A short run has few independent errors, and its ratio scatters by chance. How much it does follows from the",
        "run itself: its positions err independently, and how they differ gives the standard error of their RMS.",
        "*RMS*: over all runs alike (of an operator, a format and a length), least and most, isolated. *scatter*: of",
        "single values around that. *by chance*: the RMS of the standard errors. What float32 scatters more, are",
        "differences of checkpoints and profiles, which are pooled here: their sums have other lengths and orders.",
        "",
        *table(
            ("tokens", "format", "values", "RMS", "single values", "scatter", "by chance"),
            (_row(*kind, these) for kind, these in sorted(by_kind.items(), key=_by_length)),
        ),
        "",
        *(
            f"- outside the aim: {name}, {ratio:.2f}, {past:.1f} standard errors of chance past it"
            for name, ratio, past in sorted(beyond(groups))
        ),
        "",
    ]


def _by_length(entry: tuple[tuple[str, str], list[Alike]]) -> tuple[bool, str, str]:
    (length, dtype), _ = entry
    return not length.startswith("under"), length, dtype


def _row(length: str, dtype: str, these: list[Alike]) -> tuple[str, ...]:
    ratios = np.concatenate([group.ratios for group in these])
    off = np.concatenate([group.ratios - group.pooled for group in these])
    chance = np.concatenate([group.scatters for group in these])
    pooled = [group.pooled for group in these]
    scatters = (f"{np.sqrt(np.mean(np.square(values))):.3f}" for values in (off, chance))
    spans = (f"{min(values):.2f} to {max(values):.2f}" for values in (pooled, ratios))
    return (length, dtype, str(len(ratios)), *spans, *scatters)
