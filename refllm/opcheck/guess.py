"""Which known bug a wrong result looks like: the mutant whose own result is far nearer to it than the truth is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refllm.accuracy.expected import Expected, remembered
from refllm.inputs import to_numpy
from refllm.opcheck.examine import Finding
from refllm.opcheck.shrink import axis_lengths, resized
from refllm.strategies.call import Call

_NEARER = 0.25
"""A mutant is named if it is this much nearer than the truth: what two roundings differ by is then no accident."""
_CLIP = 1e4
"""Sigmas beyond which wrong is wrong; also what a NaN or an infinity of one's own counts."""


RAGGED = 769
"""Three tiles of 256 and one element, and 255 short of the next power of two (the row length of quack 9310d47)."""


@dataclass(frozen=True)
class Guess:
    """what: the kind of bug in one clause. source: where it was seen. name: of the mutant."""

    name: str
    what: str
    source: str

    @property
    def text(self) -> str:
        return f"{self.what} ({self.source})"


def ragged(call: Call) -> Call | None:
    """The call with a long axis of `RAGGED`, where tiles of every usual size end alike; None if it has no such axis."""
    axis = next((axis for axis in ("E", "V", "T") if axis in axis_lengths(call)), None)
    return None if axis is None else resized(call, {axis: RAGGED})


def guess(findings: Sequence[Finding], policy: str, probe: Finding | None = None) -> list[Guess]:
    """The nearest mutants: none, one, or several that cannot be told apart.

    findings: failing calls, with the candidate's results on them; a mutant has to be near on all. probe: the same on a
    call as `ragged` makes it; to be near there is enough, as a mutant has tiles of its own and not the candidate's.
    """
    findings = [f for f in findings if _has_values(f)]
    probes = [] if probe is None or not _has_values(probe) else [probe]
    if not findings:
        return []
    try:
        from refllm.kernels.mutants import catalogue

        mutants = catalogue(findings[0].call.operator, form="torch")
    except ModuleNotFoundError:
        return []  # without Torch there are none
    scored = []
    for mutant in mutants:
        shares = [_nearness(mutant, finding, policy) for finding in findings]
        if max(shares) > _NEARER and probes:
            shares = [_nearness(mutant, probes[0], policy) + _NEARER] * len(shares)  # second to those near everywhere
        if max(shares) <= (2 * _NEARER if probes else _NEARER):
            scored.append((sum(shares), mutant))
    best = min((share for share, _ in scored), default=0.0)
    near = [m for share, m in scored if share <= 1.02 * best + 1e-6]
    return [Guess(m.name, m.what, m.source) for m in near[:3]]


@cache
def _function(mutant: Any) -> Callable[..., Any]:
    """Made once: most are compiled from a changed source."""
    made: Callable[..., Any] = mutant.function()
    return made


def _has_values(finding: Finding) -> bool:
    """Whether a mutant's result on the same call can be compared: that of a row alone is one of another call."""
    known = finding.property in ("value", "NaN pattern", "invariance") and bool(finding.results)
    return known and finding.row_alone is None


def _nearness(mutant: Any, finding: Finding, policy: str) -> float:
    """Distance of the candidate from the mutant over its distance from the truth."""
    import torch

    expected = remembered(finding.call, policy)
    if len(expected) != len(finding.results):
        return np.inf
    arguments, keywords = finding.call.tensors()
    try:
        with torch.no_grad():
            out = _function(mutant)(*arguments, **keywords)
    except Exception:  # a mutant that cannot do this call is not what the candidate is
        return np.inf
    outputs = [to_numpy(x) for x in (out if isinstance(out, tuple) else (out,))]
    values = [result.value for result in finding.results]
    if [x.shape for x in outputs] != [x.shape for x in values]:
        return np.inf
    truth = _distance(values, [e.contract for e in expected], expected)
    return _distance(values, outputs, expected) / truth if truth else np.inf


def _distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray], expected: Sequence[Expected]) -> float:
    """Root mean square over all elements of all outputs, in sigma."""
    squares = [np.square(_apart(x, y, e)).ravel() for x, y, e in zip(a, b, expected, strict=True)]
    together = np.concatenate(squares)
    return float(np.sqrt(together.mean())) if together.size else 0.0


def _apart(a: Any, b: Any, e: Expected) -> np.ndarray:
    sigma = np.sqrt(e.variance + np.square(e.inner))
    sigma = np.maximum(sigma, sigma.max(initial=0.0) * 1e-3 + np.finfo(np.float32).tiny)
    with np.errstate(invalid="ignore"):  # memory that nobody wrote may hold NaN that signal
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        z = np.minimum(np.abs(a - b) / sigma, _CLIP)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.where(np.isnan(z), _CLIP, z))
