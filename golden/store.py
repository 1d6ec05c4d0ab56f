"""Goldens on disk: vectors/<group>.safetensors, and whether they are what the manifest says.

One file per operator or family. A tensor is called case/part/name: "mean-1000/input/x", "mean-1000/exact/y",
"mean-1000/sigma.bfloat16.fused/y"; the weights of small models "weights/llama-small/norm.weight".
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refllm import golden
from refllm.errors import InputError
from refllm.golden.cases import all_cases
from refllm.golden.exact import Golden
from refllm.golden.manifest import AGAIN, FORMAT, MANIFEST, sealed
from refllm.golden.model_cases import ModelCase
from refllm.storage import output_file

VECTORS = "vectors"


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoint_hash(name: str) -> str:
    """The digest of what a checkpoint computes with: config.json and all weight files."""
    folder = golden.path(name)
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()


def problems(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(group, sentence) for everything that is not as the manifest says: a file that is missing, changed, or too many,
    a checkpoint whose config or weights changed, a case that is missing or that nobody knows."""
    files = manifest["files"]
    for name, entry in files.items():
        path, group = folder / name, Path(name).stem
        if not path.is_file():
            yield group, f"{path}: missing; the manifest lists it with {entry['bytes']} bytes"
        elif (found := sha256(path)) != entry["sha256"]:
            size = path.stat().st_size
            yield (
                group,
                (
                    f"{path}: changed; its sha256 is {found[:16]}... ({size} bytes), the manifest has "
                    f"{entry['sha256'][:16]}... ({entry['bytes']} bytes)"
                ),
            )
    for path in sorted((folder / VECTORS).glob("*")):
        # What a writer that was killed has left unfinished is no golden, and goes with the next one that is written.
        if f"{VECTORS}/{path.name}" not in files and not output_file.is_unfinished(path.name):
            yield path.stem, f"{path}: not in the manifest; remove it, or {AGAIN}"
    for name, entry in manifest["cases"].items():
        yield from ((name.split("/")[0], f"{folder / MANIFEST}: {name}: {text}") for text in _changed(name, entry))
    for name in all_cases():
        if name not in manifest["cases"]:
            yield name.split("/")[0], f"{folder / MANIFEST}: {name} is missing; {AGAIN} {name}"


def _changed(name: str, entry: dict[str, Any]) -> Iterator[str]:
    case = all_cases().get(name)
    if case is None:
        yield f"this refllm has no such case; {AGAIN}"
    elif case.seed != entry["seed"]:
        yield f"its seed is {entry['seed']}, expected {case.seed}"
    elif (entry["what"], entry["dtypes"]) != (case.what, list(case.dtypes)):
        yield f"it is told as {entry['what']!r} in {', '.join(entry['dtypes'])}; {AGAIN} {name}"
    elif isinstance(case, ModelCase):
        found = config_hash(case)
        if found != entry["config_hash"]:
            made = entry["config_hash"]
            yield f"made with config {made}, that of {case.model} is now {found}; restore it or {AGAIN}"
        elif entry["checkpoint"] and (weights := checkpoint_hash(case.model)) != entry["weights_sha256"]:
            made = entry["weights_sha256"]
            yield (
                f"made with weights {made[:16]}..., those of {case.model} are now {weights[:16]}...; restore them or "
                f"{AGAIN}"
            )


def config_hash(case: ModelCase) -> str:
    """The digest of what the config of the case says about the mathematics, 16 hexadecimal digits."""
    from refllm.config.digest import config_hash
    from refllm.golden.model_cases import config_of

    return config_hash(config_of(case.model))


def weights_hash(one: Golden) -> str:
    """The digest of the weights of a small model: names, shapes and values."""
    digest = hashlib.sha256()
    for name, x in sorted(one.weights.items()):
        digest.update(f"{name} {x.shape}".encode() + np.ascontiguousarray(x, np.float32).tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def load(folder: Path, manifest: dict[str, Any], group: str) -> dict[str, Golden]:
    """The goldens of one operator or family, by name. Raises InputError for a file that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / VECTORS / f"{group}.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error}); {AGAIN} {group}") from None
    found = {}
    for name, entry in manifest["cases"].items():
        if name.split("/")[0] == group and name in all_cases():
            found[name] = _assemble(name, entry, tensors, path)
    return found


def _assemble(name: str, entry: dict[str, Any], tensors: dict[str, np.ndarray], path: Path) -> Golden:
    case = all_cases()[name]
    one = Golden(case, {}, {}, {}, about=entry)
    for key, x in tensors.items():
        short, part, rest = key.split("/", 2)
        if short == "weights" and part == entry.get("model"):
            one.weights[rest] = x.astype(np.float32)
        if short != case.short:
            continue
        if part == "input":
            one.inputs[rest] = x
        elif part == "exact":
            one.exact[rest] = x
        else:
            one.sigma.setdefault(part.removeprefix("sigma."), {})[rest] = x
    for what, found, told in (("outputs", one.exact, entry["outputs"]), ("sigma of", one.sigma, entry["sigma"])):
        if sorted(found) != sorted(told):
            raise InputError(f"{path}: {name} has the {what} {sorted(found)}, the manifest {sorted(told)}")
    one.weights = {n: x for n, x in one.weights.items() if n in entry.get("weights", [])}
    return one


# ------------------------------------------------------------------------------------------------------------- writing


def tensors_of(goldens: list[Golden]) -> dict[str, np.ndarray]:
    """What a group's file holds. Weights that lie on the grid of float16 are stored in it."""
    tensors: dict[str, np.ndarray] = {}
    for one in goldens:
        short = one.case.short
        parts = {"input": one.inputs, "exact": one.exact} | {
            f"sigma.{key}": values for key, values in one.sigma.items()
        }
        for part, values in parts.items():
            tensors |= {f"{short}/{part}/{name}": np.array(x, order="C") for name, x in values.items()}
        for name, x in one.weights.items():
            half = x.astype(np.float16)
            assert (half == x).all(), f"{one.case.name}: {name} is not on the grid of float16"
            tensors[f"weights/{one.about['model']}/{name}"] = half
    return tensors


def write(folder: Path, group: str, goldens: list[Golden]) -> None:
    """A group's file, whole or not at all."""
    from safetensors.numpy import save

    (folder / VECTORS).mkdir(parents=True, exist_ok=True)
    # One entry of metadata: the order of several is not fixed, and the file would differ from run to run.
    content = save(tensors_of(goldens), metadata={"format": FORMAT})
    output_file.replace(folder / VECTORS / f"{group}.safetensors", content)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest, last of all, with the hashes of the files as they lie there and its own."""
    files = sorted((folder / VECTORS).glob("*.safetensors"))
    manifest["files"] = {f"{VECTORS}/{f.name}": {"sha256": sha256(f), "bytes": f.stat().st_size} for f in files}
    output_file.replace(folder / MANIFEST, json.dumps(sealed(manifest), indent=1, ensure_ascii=False) + "\n")
