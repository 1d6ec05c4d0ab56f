"""Do the goldens hold? First their bytes, then what the reference and the backends compute for their inputs.

The reference in float64 has to give the exact values again, up to what float64 arithmetic allows. A backend in its
dtype has to lie within the predicted error: the rules of `refllm.accuracy.judge`, for a golden of one operator those
for an operator on its own inputs, for a model those for a value end to end. A golden's inputs are fixed, and so is the
error of the reference's own emulation on them; where that is larger than predicted (errors that repeat), it counts.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy.judge import MEASURED, broken_rules
from refllm.accuracy.limits import FLOAT64_LIMIT, FLOAT64_SIGMA
from refllm.accuracy.measure import Measure, measure
from refllm.golden import manifest as manifests
from refllm.golden import run, store
from refllm.golden.cases import OperatorCase, quiet, select
from refllm.golden.exact import Golden
from refllm.golden.make_vectors import distance_in_sigma, float64_bound
from refllm.precision import largest
from refllm.precision.dtype_names import dtype_name

Step = Callable[[str], None]

_OPERATOR = {
    "error": "rms error {:.3g} sigma, limit {:.3g}; {}",
    "one row": "row {row}: rms error {:.3g} sigma, limit {:.3g}; {}",
    "one element": "one element is off by {:.3g} sigma, limit {:.3g}; {}",
}
_MODEL = {"error end to end": _OPERATOR["error"], "one element": _OPERATOR["one element"]}
"""The rules of the judge that count for a golden, and what is said of one that breaks."""

_FEW = 16


@dataclass(frozen=True)
class Finding:
    """One output that does not hold, or a file that is not as the manifest says. name: the case, or the group."""

    name: str
    problem: str

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))


@dataclass
class Verified:
    """What one backend in one dtype computed. largest, worst: the worst element in sigma, and where. ratio: the worst
    rms error over rms sigma, of outputs with more than a few elements."""

    backend: str
    dtype: str
    cases: int = 0
    ratio: float = 0.0
    largest: float = 0.0
    worst: str = ""
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"findings": [finding.to_dict() for finding in self.findings]}


def verify_files(folder: Path, manifest: dict[str, Any], names: Sequence[str] = ()) -> list[Finding]:
    """Everything that is not as the manifest says, of the groups asked for; of a manifest that was changed itself only
    that, under its own name, for then nothing that it says counts."""
    changed = manifests.changed(folder, manifest)
    if changed:
        return [Finding(manifests.MANIFEST, changed)]
    known = dict.fromkeys([*manifest["cases"], *select(())])
    groups = {name.split("/")[0] for name in select(names, list(known))}
    with quiet():
        found = [Finding(group, problem) for group, problem in store.problems(folder, manifest)]
    return [finding for finding in found if not names or finding.name in groups]


def verify(
    goldens: Iterator[Golden], backend: str, dtype: str, device: str | None = None, step: Step = lambda text: None
) -> Verified:
    """Compute every golden that has a sigma for the dtype (all in float64) again."""
    done = Verified(backend, dtype)
    for one in goldens:
        if dtype != "float64" and dtype not in one.case.dtypes:
            continue
        step(f"{backend} {dtype}: {one.case.name}")
        done.cases += 1
        try:
            with quiet():
                values = run.evaluate(one, backend, dtype, device)
        except Exception as error:  # whatever it is that a broken operator raises, it is the finding
            done.findings.append(Finding(one.case.name, f"{backend}, {dtype}: {type(error).__name__}: {error}"))
            continue
        for name, y in values.items():
            _judge(done, one, name, y)
    return done


def goldens_of(
    folder: Path, manifest: dict[str, Any], names: Sequence[str] = (), without: Container[str] = ()
) -> Iterator[Golden]:
    """The goldens asked for, group by group, from disk; without: groups to leave out, or the manifest and so all."""
    if manifests.MANIFEST in without:
        return
    chosen = select(names, list(manifest["cases"]))
    for group in dict.fromkeys(name.split("/")[0] for name in chosen):
        if group in without:
            continue
        found = store.load(folder, manifest, group)
        yield from (found[name] for name in chosen if name in found)


def _judge(done: Verified, one: Golden, name: str, y: np.ndarray) -> None:
    exact, where = one.exact[name], f"{done.backend}, {done.dtype}, output {name}"

    def finding(problem: str) -> None:
        done.findings.append(Finding(one.case.name, f"{where}: {problem}"))

    if y.shape != exact.shape:
        finding(f"shape {list(y.shape)}, expected {list(exact.shape)}")
        return
    if done.dtype == "float64":
        inside, z = distance_in_sigma(y, exact, one.sigma["float32.fused"][name], float64_bound(one, name))
        _keep_worst(done, one, name, z / FLOAT64_SIGMA, z / FLOAT64_SIGMA)
        if not inside:
            finding(
                f"not the exact value: off by up to {z:.3g} sigma of float32, float64 arithmetic allows "
                f"{FLOAT64_LIMIT * FLOAT64_SIGMA:.1g}"
            )
        return
    ratio, far, problem = judged(one, name, y, done.dtype)
    _keep_worst(done, one, name, ratio, far)
    if problem:
        finding(problem)


def _keep_worst(done: Verified, one: Golden, name: str, ratio: float, far: float) -> None:
    if far > done.largest:
        done.worst = f"{one.case.name} {name}"
    done.largest = max(done.largest, far)
    if one.exact[name].size >= _FEW:
        done.ratio = max(done.ratio, ratio)


def judged(one: Golden, name: str, y: np.ndarray, dtype: str) -> tuple[float, float, str]:
    """(rms error over rms sigma, largest |error| / sigma, what is wrong or "") of one output in a dtype."""
    exact = one.exact[name]
    variance = np.square(one.sigma[f"{dtype}.fused"][name], dtype=np.float64)
    if not exact.size:
        return 0.0, 0.0, ""
    unequal = (variance == 0) & np.isfinite(exact) & (y != exact) & (np.abs(exact) <= largest(dtype))
    rows = exact.shape if exact.ndim in (2, 3) else (-1, exact.shape[-1] if exact.ndim else 1)
    found = measure(y.reshape(rows), exact.reshape(rows), variance.reshape(rows), largest(dtype))
    if found.nonfinite:
        at = _where(found.nonfinite_at, exact)
        expected = np.copysign(np.inf, exact[at]) if abs(exact[at]) > largest(dtype) else exact[at]
        return np.inf, np.inf, f"{y[at]} at {list(at)}, expected {expected:.6g} ({found.nonfinite} such elements)"
    if unequal.any():
        at = tuple(int(i) for i in np.argwhere(unequal)[0])
        return np.inf, np.inf, f"{y[at]:.9g} at {list(at)}, expected exactly {exact[at]:.9g}"
    far = run.in_sigma(y, exact, np.sqrt(variance), dtype)[1]  # by its own sigma; found.largest has a floor under it
    return found.ratio, far, _over_a_limit(one, found, one.about["reference"][dtype][name][0], y, exact, dtype)


def _over_a_limit(one: Golden, found: Measure, reference: float, y: np.ndarray, exact: np.ndarray, dtype: str) -> str:
    """The first rule that breaks, with the place. reference: the ratio that the reference's own emulation has."""
    found = replace(found, honest=reference)
    said = _OPERATOR if isinstance(one.case, OperatorCase) else _MODEL
    at = _where(found.at, exact)
    there = f"largest at {list(at)}: {y[at]:.6g}, exact {exact[at]:.6g}"
    for rule in broken_rules(found, dtype, list(said)):
        return said[rule].format(*MEASURED[rule](found, dtype), there, row=list(found.row))
    return ""


def _where(at: tuple[int, ...], exact: np.ndarray) -> tuple[int, ...]:
    """An index into the rows that were measured as one into the output."""
    if exact.ndim in (2, 3):
        return at
    rows = (exact.size // exact.shape[-1], exact.shape[-1]) if exact.ndim else (1, 1)
    return tuple(int(i) for i in np.unravel_index(int(np.ravel_multi_index(at, rows)), exact.shape))


def combinations(backends: Sequence[str], dtypes: Sequence[str], device: str | None) -> Iterator[tuple[str, str]]:
    """(backend, dtype) in which to verify: the dtypes asked for, else all that a backend has; of the Triton kernels on
    a CPU, where they are interpreted, float32 and bfloat16."""
    for backend in backends:
        every = ["float32", "bfloat16", "float16"]
        if backend == "numpy":
            every = ["float64", *every]
        elif backend == "triton" and device in (None, "cpu"):
            every = every[:2]
        for dtype in [dtype_name(given) for given in dtypes] or every:
            run.check(backend, dtype, device)
            yield backend, dtype
