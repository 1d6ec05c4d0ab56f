"""Makes goldens: computes them, asks the witness, compares with what is there in sigma, and replaces it if told to."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy.limits import FLOAT64_LIMIT, FLOAT64_SIGMA
from refllm.errors import InputError
from refllm.golden import exact, run, store
from refllm.golden import manifest as manifests
from refllm.golden.cases import Case, all_cases, quiet, select
from refllm.golden.exact import Golden
from refllm.golden.model_cases import ModelCase, embedded

Step = Callable[[str], None]


@dataclass(frozen=True)
class Change:
    """One case, old and new.

    kind: "new", "same" (equal up to float64 rounding), "changed", "removed" (no such case any more). sigma: the largest
    change of an exact value in sigma of float32 (infinite where an input, a shape or the place of a NaN changed).
    expected: the largest relative change of a predicted sigma.
    """

    name: str
    kind: str
    sigma: float = 0.0
    expected: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Made:
    """What `make` computed: every group's goldens and manifest, and how they differ from what is on disk."""

    folder: Path
    manifest: dict[str, Any]
    groups: dict[str, list[Golden]]
    changes: list[Change]

    @property
    def differs(self) -> bool:
        """Whether there is anything to replace."""
        return any(change.kind != "same" for change in self.changes)

    def replace(self) -> None:
        """Write the files of the groups and then the manifest, each whole or not at all."""
        for group, goldens in self.groups.items():
            store.write(self.folder, group, goldens)
        store.write_manifest(self.folder, self.manifest)


def make(folder: Path, names: Sequence[str] = (), step: Step = lambda text: None) -> Made:
    """Compute the cases asked for (all if none is); the other cases of their groups stay as they are on disk.

    Raises InputError where others would stay and the manifest, which tells of them, was changed.
    """
    chosen, old = set(select(names)), _old(folder)
    changed = manifests.changed(folder, old) if old["cases"] else ""
    if changed and chosen != set(all_cases()):
        raise InputError(f"{changed}; restore it, or make all goldens again")
    groups: dict[str, list[Golden]] = {}
    changes = []
    for group in dict.fromkeys(name.split("/")[0] for name in chosen):
        before = store.load(folder, old, group) if _readable(folder, old, group) else {}
        goldens = []
        for case in (case for case in all_cases().values() if case.group == group):
            if case.name not in chosen and case.name in before:
                goldens.append(before[case.name])
                continue
            step(case.name)
            goldens.append(_with_evidence(case))
            changes.append(compare(before.get(case.name), goldens[-1]))
        groups[group] = goldens
    changes += [Change(name, "removed") for name in old["cases"] if name not in all_cases()]
    entries = {n: e for n, e in old["cases"].items() if n in all_cases()}
    entries |= {one.case.name: one.about for goldens in groups.values() for one in goldens}
    ordered = {name: entries[name] for name in all_cases() if name in entries}
    manifest = {"files": {}, "cases": ordered}
    return Made(folder, manifest, dict(sorted(groups.items())), changes)


def _old(folder: Path) -> dict[str, Any]:
    """The manifest on disk; an empty one where there is none, or one of another format."""
    try:
        return manifests.read_manifest(folder)
    except InputError:
        return {"cases": {}, "files": {}}


def _readable(folder: Path, manifest: dict[str, Any], group: str) -> bool:
    try:
        store.load(folder, manifest, group)
    except InputError:
        return False
    return True


def _with_evidence(case: Case) -> Golden:
    with quiet():
        return _computed(case)


def _computed(case: Case) -> Golden:
    one = exact.compute(case)
    about: dict[str, Any] = {"what": case.what, "seed": case.seed, **one.about}
    if isinstance(case, ModelCase):
        about["config_hash"] = store.config_hash(case)
        about["weights"] = sorted(one.weights)
        about["weights_sha256"] = store.checkpoint_hash(case.model) if embedded(case.model) else store.weights_hash(one)
    about["inputs"] = {name: list(x.shape) for name, x in one.inputs.items()}
    about["outputs"] = {name: list(x.shape) for name, x in one.exact.items()}
    about["versions"] = manifests.versions()
    about["dtypes"], about["sigma"] = list(case.dtypes), list(one.sigma)
    about["reference"], about["witness"] = exact.honest(one), _witnessed(one)
    one.about = about
    return one


def _witnessed(one: Golden) -> dict[str, Any]:
    """Who else computed it, and per output the largest difference, absolute and in sigma of float32."""
    from refllm.golden.witness import witness

    who, values = witness(one)
    differences = {name: difference(one, name, y) for name, y in values.items()}
    return {"who": who, "max_abs": {n: d[0] for n, d in differences.items()}} | {
        "max_sigma_float32": {n: d[1] for n, d in differences.items()}
    }


def difference(one: Golden, name: str, y: np.ndarray) -> tuple[float, float]:
    """The largest difference between another float64 result and the golden: absolute, and in sigma of float32."""
    sigma, y0 = one.sigma["float32.fused"][name].astype(np.float64), one.exact[name]
    same = (y == y0) | (np.isnan(y) & np.isnan(y0))
    distance = np.abs(np.where(same, 0.0, y) - np.where(same, 0.0, y0))
    if not distance.size:
        return 0.0, 0.0
    scale = np.maximum(sigma, run.rms(sigma) / 100 or np.inf)  # what is exact in float32 has no sigma of its own
    return float(f"{distance.max():.3g}"), float(f"{(distance / scale).max():.3g}")


def compare(old: Golden | None, new: Golden) -> Change:
    """The change of one case."""
    name = new.case.name
    if old is None:
        return Change(name, "new")
    if not _same_arrays(old.inputs, new.inputs) or not _same_arrays(old.weights, new.weights):
        return Change(name, "changed", float("inf"), float("inf"))
    if {n: x.shape for n, x in old.exact.items()} != {n: x.shape for n, x in new.exact.items()}:
        return Change(name, "changed", float("inf"), float("inf"))
    largest = 0.0
    within = True
    for output, y in new.exact.items():
        bound = float64_bound(old, output)
        inside, z = distance_in_sigma(y, old.exact[output], old.sigma["float32.fused"][output], bound)
        largest, within = max(largest, z), within and inside
    expected = _change_of_sigma(old, new)
    same = within and expected < 1e-3 and _told(old) == _told(new)
    return Change(name, "same" if same else "changed", largest, expected)


def _told(one: Golden) -> dict[str, Any]:
    """What the manifest says of the case, as JSON has it; without what depends on versions and their last bits."""
    told = {key: value for key, value in one.about.items() if key not in ("reference", "witness", "versions")}
    return dict(json.loads(json.dumps(told)))


def float64_bound(one: Golden, output: str) -> np.ndarray:
    """How far another float64 evaluation may be from the exact values, element by element: derived from the predicted
    float32 error. What is exact in float32 has the bound of the other elements."""
    sigma = one.sigma["float32.fused"][output].astype(np.float64) * FLOAT64_SIGMA
    return FLOAT64_LIMIT * (sigma + run.rms(sigma))


def distance_in_sigma(y: np.ndarray, old: np.ndarray, sigma: np.ndarray, bound: np.ndarray) -> tuple[bool, float]:
    """(whether every element is within its bound, the largest change in sigma); NaN and infinities must be the same."""
    same = (y == old) | (np.isnan(y) & np.isnan(old))
    if not np.isfinite(np.where(same, 0.0, y - np.where(same, 0.0, old))).all():
        return False, float("inf")
    distance = np.where(same, 0.0, np.abs(y - np.where(same, 0.0, old)))
    scale = np.maximum(sigma.astype(np.float64), run.rms(sigma) / 100)
    z = np.divide(distance, scale, out=np.zeros(distance.shape), where=distance > 0)
    return bool((distance <= bound).all()), float(z.max(initial=0.0))


def _same_arrays(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> bool:
    return old.keys() == new.keys() and all(
        np.array_equal(x, new[name].astype(x.dtype), equal_nan=x.dtype.kind == "f") for name, x in old.items()
    )


def _change_of_sigma(old: Golden, new: Golden) -> float:
    if old.sigma.keys() != new.sigma.keys():
        return float("inf")
    largest = 0.0
    for key, outputs in new.sigma.items():
        for name, x in outputs.items():
            before = old.sigma[key][name].astype(np.float64)
            scale = np.maximum(before, run.rms(before) / 100 or 1.0)
            largest = max(largest, float((np.abs(x - before) / scale).max(initial=0.0)))
    return largest
