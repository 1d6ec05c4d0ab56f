"""Is the whole of a timed output right? Held against library calls of Torch, element by element, on the device.

The definition in float64 gets through a few rows (`refllm.bench.probes`); a tile that is wrong elsewhere, or in another
set of inputs than the first, it does not see. A witness does: the functions of `refllm.kernels.plain.EAGER` on float32
copies of the inputs, for attention a backend of Torch's. It has to satisfy the definition on those rows itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from refllm.bench.forms import ATTENTION, Form, sdpa_form
from refllm.bench.probes import PEER_LIMITS, Checker
from refllm.bench.workloads import Arguments

ELEMENT = 5
"""A single element may differ by so many times the relative rms error that a form may have: eager bfloat16 rotations of
2e8 normal numbers reach 4 times."""
BLOCK = 1 << 26
"""Elements compared at a time, so that their float32 copies stay small."""


class Witness:
    """The outputs of an accepted form for every set of inputs of one job, computed as they are asked for.

    said: what was compared with whom, or why nothing was.
    """

    def __init__(self, operator: str, calls: Sequence[Arguments], checker: Checker) -> None:
        self._calls = calls
        self._outputs: dict[int, tuple[Any, ...]] = {}
        self._limit = ELEMENT * PEER_LIMITS[str(calls[0][0][0].dtype).removeprefix("torch.")]
        self._form: Form | None = None
        reasons = []
        for form in _candidates(operator):
            try:
                self._outputs[0] = _tuple(form.bind(*calls[0])())
                problem = checker.judge(self._outputs[0], ours=False).problem
            except Exception as error:  # memory, or a backend that does not take the call: the next one may
                problem = type(error).__name__
            if not problem:
                self._form = form
                break
            reasons.append(f"{form.name}: {problem}")
        sets = f"every element of {len(calls)} sets of inputs"
        self.said = f"{sets} against {self._form.name}" if self._form else f"the rest unseen ({'; '.join(reasons)})"

    def differs(self, results: Any, index: int) -> str:
        """What is wrong with the `results` of set `index`, as a clause; "" if nothing is, or there is no witness."""
        import torch

        if self._form is None:
            return ""
        if index not in self._outputs:
            try:
                self._outputs[index] = _tuple(self._form.bind(*self._calls[index])())
            except torch.OutOfMemoryError:
                self._form, self.said = None, f"the rest unseen from set {index} on (not enough memory)"
                return ""
        for number, (got, expected) in enumerate(zip(_tuple(results), self._outputs[index], strict=True)):
            if count := far_elements(got, expected, self._limit):
                return f"{count} elements of output {number}, set {index}, are not those of {self._form.name}"
        return ""


def far_elements(got: Any, expected: Any, limit: float) -> int:
    """How many elements differ by more than `limit` of their size and the rms of their row; all of another shape."""
    if got.shape != expected.shape:
        return int(expected.numel())
    rows = [x.reshape(1, -1) if x.ndim == 1 else x.reshape(-1, x.shape[-1]) for x in (got, expected)]
    size, found = max(1, BLOCK // max(1, rows[0].shape[-1])), 0
    for a, b in zip(*(x.split(size) for x in rows), strict=True):
        b = b.float()
        allowed = b.abs().add_(b.square().mean(-1, keepdim=True).sqrt()).mul_(limit)
        found += int((~((a.float() - b).abs() <= allowed)).sum())  # so written, a NaN is far
    return found


def _candidates(operator: str) -> Iterator[Form]:
    if operator in ATTENTION:
        yield from (sdpa_form(operator, name) for name in ("efficient", "flash", "math"))
        return
    from refllm.kernels import plain

    function = plain.EAGER[operator]
    yield Form("eager float32", False, lambda a, k: lambda: function(*map(_wide, a), **k))


def _wide(x: Any) -> Any:
    return x.float() if hasattr(x, "is_floating_point") and x.is_floating_point() else x


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
