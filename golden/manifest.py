"""manifest.json: what it must hold, the hash of its own that protects it, and the versions that it tells of.

It holds the hashes of the files, and of every golden the ratio by which its limits may grow: whoever changes it changes
verdicts. So it is sealed with the sha256 of everything else in it, and taken for what it says only as it was sealed.
"""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from refllm import __version__
from refllm.errors import InputError
from refllm.storage import input_file

FORMAT = "refllm golden 1"
MANIFEST = "manifest.json"
AGAIN = "make it again with: refllm golden make"
_PACKAGES = ("numpy", "torch", "transformers", "safetensors")

Fields = dict[str, type | tuple[type, ...]]
_TOP: Fields = {"files": dict, "cases": dict}
_FILE: Fields = {"sha256": str, "bytes": int}
_CASE: Fields = {
    "what": str, "seed": int, "kind": str, "inputs": dict, "outputs": dict, "versions": dict, "dtypes": list,
    "sigma": list, "reference": dict, "witness": dict,
}  # fmt: skip
_WITNESS: Fields = {"who": str, "max_abs": dict, "max_sigma_float32": dict}
_KINDS: dict[str, Fields] = {
    "operator": {"operator": str, "arguments": list, "keywords": dict},
    "model": {
        "class": str, "head": str, "model": str, "checkpoint": (str, type(None)), "config": (dict, type(None)),
        "config_hash": str, "weights": list, "weights_sha256": str, "chunks": list, "taps": list,
    },
}  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises InputError if there is none, it is not readable, of another format, or lacks something."""
    path = folder / MANIFEST
    try:
        manifest = input_file.read_json(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {AGAIN}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {AGAIN}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: its format is {found!r}, this refllm reads {FORMAT!r}; {AGAIN}")
    lacking = _lacking(manifest)
    if lacking:
        raise InputError(f"{path}: {lacking}; {AGAIN}")
    return manifest


def _lacking(manifest: dict[str, Any]) -> str:
    """The first thing that is missing or of another type, in one clause; else ""."""
    found = _unlike("", manifest, _TOP)
    if found:
        return found
    for name, entry in manifest["files"].items():
        found = found or _unlike(name, entry, _FILE)
    for name, entry in manifest["cases"].items():
        found = found or _unlike(name, entry, _CASE) or _unlike_its_kind(name, entry)
    return found


def _unlike_its_kind(name: str, entry: dict[str, Any]) -> str:
    kind = entry["kind"]
    if kind not in _KINDS:
        return f"{name}: its kind is {kind!r}, expected {' or '.join(_KINDS)}"
    found = _unlike(name, entry, _KINDS[kind]) or _unlike(f"{name}: witness", entry["witness"], _WITNESS)
    for dtype in entry["dtypes"]:
        outputs = entry["reference"].get(dtype)
        found = found or _unlike(f"{name}: reference {dtype}", outputs, dict.fromkeys(entry["outputs"], list))
        found = found or next((f"{name}: reference {dtype}: {o} is {x}" for o, x in outputs.items() if len(x) != 2), "")
    return found


def _unlike(where: str, entry: Any, fields: Fields) -> str:
    """ "" if the entry has these fields, of these types."""
    at = f"{where}: " if where else ""
    if not isinstance(entry, dict):
        return f"{at}expected names and values, found {json.dumps(entry)[:40]}"
    missing = next((name for name in fields if name not in entry), None)
    if missing is not None:
        return f"{at}{missing} is missing"
    wrong = next((name for name, kind in fields.items() if not isinstance(entry[name], kind)), None)
    return "" if wrong is None else f"{at}{wrong} cannot be {json.dumps(entry[wrong])[:40]}"


# ---------------------------------------------------------------------------------------------------------------- seal


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of everything else in it."""
    return {"format": FORMAT, "sha256": _digest(manifest)} | {name: manifest[name] for name in _TOP}


def changed(folder: Path, manifest: dict[str, Any]) -> str:
    """A sentence if it is not as it was sealed; else ""."""
    found, stated = _digest(manifest), str(manifest.get("sha256"))
    if found == stated:
        return ""
    return f"{folder / MANIFEST}: changed; the sha256 of its content is {found[:16]}..., it says {stated[:16]}..."


def _digest(manifest: dict[str, Any]) -> str:
    """The digest of format, files and cases, however they are laid out."""
    body = json.dumps({name: manifest[name] for name in _TOP}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{FORMAT}\n{body}".encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ versions


def versions() -> dict[str, str]:
    """The versions of what computes goldens and their witnesses."""
    found = {"refllm": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def other_versions(manifest: dict[str, Any]) -> str:
    """A sentence that names the packages of which other versions made the goldens than are here; "" if none did.

    What follows a plus (2.13.0+cpu) says how a package was built, and counts for nothing.
    """
    here, other = versions(), []
    for package, own in here.items():
        made = dict.fromkeys(str(entry["versions"].get(package)) for entry in manifest["cases"].values())
        different = [number for number in made if number.partition("+")[0] != own.partition("+")[0]]
        if different:
            other.append(f"{package} {' and '.join(different)} (here {own})")
    return f"made with {', '.join(other)}" if other else ""
