"""Checkpoints by their names on the Hugging Face hub: nothing is downloaded, but what is in its local cache is found.

The layout is that of huggingface_hub: HUB_CACHE/models--OWNER--NAME/refs/REVISION holds the name of a commit, and
snapshots/COMMIT the files of it. HUB_CACHE is $HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

HUB_NAME = re.compile(r"(?:(?:https?://)?(?:www\.)?huggingface\.co/|hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?")
KEYWORDS = frozenset(
    {"cache_dir", "revision", "subfolder", "token", "use_auth_token", "local_files_only", "force_download", "proxies"}
    | {"resume_download", "trust_remote_code", "code_revision"}
)
"""Keywords of `from_pretrained` about where a model of the hub comes from. The first three say where it lies; the
others are for downloads and for code of a checkpoint, and here nothing is downloaded and no such code runs."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def local_folder(name: str | os.PathLike[str], keywords: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """The folder of a checkpoint: `name` itself, or for a name of the hub its files in the cache, if they are there.

    keywords: those of `KEYWORDS` that were given. Where nothing is found `name` comes back, for the caller to explain.
    """
    path = Path(name)
    hub = None if os.path.lexists(path) else hub_name(path)
    if hub is not None:
        path = _snapshot(hub, keywords.get("revision") or "main", keywords.get("cache_dir")) or path
    return path / (keywords.get("subfolder") or "")


def hub_name(path: Path) -> str | None:
    """OWNER/NAME of a path that is no file or folder, but could be a model of the hub; else None."""
    hub = HUB_NAME.fullmatch(re.sub(r"^(https?|hf):/+", r"\1://", path.as_posix()))
    # In a folder that is there it is a misspelt path.
    return None if hub is None or Path(hub[1]).parent.is_dir() else hub[1]


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def _snapshot(hub: str, revision: Any, cache: Any) -> Path | None:
    folder = Path(cache or cache_folder(), f"models--{hub.replace('/', '--')}")
    revision = str(revision)
    if not _COMMIT.fullmatch(revision):
        try:
            reference = (folder / "refs").joinpath(*re.findall(r"[\w.-]*\w[\w.-]*", revision))
            revision = reference.read_bytes()[:100].decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
    snapshot = folder / "snapshots" / revision
    return snapshot if _COMMIT.fullmatch(revision) and snapshot.is_dir() else None
