"""What a path is that is no checkpoint folder, and what would be right: people give files, archives and hub names.

Nothing is opened but the first bytes of a regular file, and nothing is unpacked, unpickled or downloaded.
"""

import json
import os
import stat
from pathlib import Path

from refllm.storage.hub_cache import cache_folder, hub_name

WANTED = "a folder with config.json and safetensors files"
_BEGINNINGS = (
    (
        b"GGUF",
        "a GGUF file, the form of llama.cpp; give the checkpoint that it was made from (check --weights takes this)",
    ),
    (b"ggml", "a GGML file of an old llama.cpp; give the checkpoint that it was made from"),
    (b"lmgg", "a GGML file of an old llama.cpp; give the checkpoint that it was made from"),
    (b"PK\x03\x04", "a zip archive; one of PyTorch holds a pickle, which can run code: save the model as safetensors"),
    (b"\x80", "a Python pickle, which can run code when it is opened; save the model as safetensors"),
    (b"\x1f\x8b", "a gzip archive; unpack it and give the folder"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it and give the folder"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it and give the folder"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them; save the model as safetensors"),
    (b"\x93NUMPY", "a NumPy array; a checkpoint holds safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"),
    (b"<", "a web page or XML, not the file that it links to; download the file itself"),
)
"""First bytes of a file, and what it is."""
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_OTHER_JSON = {
    "weight_map": "the index of a checkpoint in several files",
    "added_tokens": "a tokenizer",
    "tokenizer_class": "the configuration of a tokenizer",
    "transformers_version": "a configuration for generation",
}
"""A key of a JSON file beside config.json, and what that file is."""


def explain(path: str | os.PathLike[str]) -> str:
    """One clause, to be put behind the path and a colon: what is there, and what is expected instead."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return _nothing_there(path)
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        return f"this is not a regular file; expected {WANTED}"
    return f"this is {_file(path)}"


def no_config(path: Path) -> str | None:
    """The clause of `explain` for a path that is no configuration and no folder with one; None for one that may be."""
    if path.is_dir():
        there = os.path.lexists(path / "config.json") or any(path.glob("model*.safetensors"))
        return None if there else explain(path)
    if path.suffix == ".json" and path.is_file():
        with open(path, "rb") as file:
            if path.name == "config.json" or b'"model_type"' in file.read(1 << 20):
                return None
    return explain(path)


def _nothing_there(path: Path) -> str:
    name = hub_name(path)
    if name is None:
        return f"there is no such folder or file; expected {WANTED}"
    return (
        f"there is no such folder, it is not in the Hugging Face cache ({cache_folder()}), and nothing is downloaded: "
        f"if this is a model of the hub, 'hf download {name}' puts it into the cache"
    )


def _folder(path: Path) -> str:
    """A folder without config.json."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    inner = [name for name in names if (path / name / "config.json").is_file()]
    snapshots = sorted((path / "snapshots").glob("*/config.json"))
    if inner or snapshots:
        return f"there is no config.json here, but in {path / inner[0] if inner else snapshots[-1].parent}; give that"
    said = f"there is no config.json in this folder; expected {WANTED}"
    for name, what in (
        (
            "adapter_config.json",
            "an adapter of PEFT without the model that it changes: merge the two and save that",
        ),
        ("model_index.json", "a pipeline of diffusers"),
        ("params.json", "a checkpoint in its maker's own format: convert it for Transformers first"),
    ):
        if name in names:
            return f"{said} (this is {what})"
    found = {Path(name).suffix for name in names}
    if ".gguf" in found:
        return f"{said} (there are GGUF files of llama.cpp: give the checkpoint that they were made from)"
    if found & _PICKLES:
        return f"{said} (there are pickles, which can run code: save the model as safetensors)"
    return said


def _file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            begin = file.read(1 << 16)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    if not begin:
        return f"an empty file; expected {WANTED}"
    for start, what in _BEGINNINGS:
        if begin.startswith(start):
            return what
    if path.suffix == ".safetensors" or begin[8:10] == b'{"':
        beside = (path.parent / "config.json").is_file()
        where = path.parent if beside else "that holds its config.json too"
        return f"a safetensors file, the weights alone; give the folder {where}"
    if path.suffix in _PICKLES:
        return "by its name a pickle, which can run code when it is opened; save the model as safetensors"
    if begin.lstrip().startswith(b"{"):
        return _json(path)
    return f"no file of a checkpoint; expected {WANTED}"


def _json(path: Path) -> str:
    if path.name == "config.json":
        return f"a configuration without weights; expected {WANTED}"
    text = path.read_bytes()[: 1 << 24]
    what = next((what for key, what in _OTHER_JSON.items() if json.dumps(key).encode() in text), "a JSON file")
    beside = (path.parent / "config.json").is_file()
    return f"{what}, not config.json; give the folder {path.parent if beside else 'of the checkpoint'}"
