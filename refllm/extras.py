"""Optional packages: which extra of pyproject.toml brings one, and the command that installs it into this installation.

A checkout, a wheel in a folder and a package of an index are extended by different commands; every message about a
missing package takes its command from here.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from refllm.errors import MissingExtraError

EXTRA_OF = {
    "torch": "fast",
    "triton": "fast",
    "transformers": "witness",
    "hypothesis": "check",
    "matplotlib": "bench",
    "pytest": "test",
    "liger_kernel": "test",
    "mlx": "mlx",
    "mlx_lm": "mlx",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "jax": "jax",
    "ctranslate2": "ctranslate2",
    "gguf": "gguf",
    "latex2mathml": "book",
    "markdown_it": "book",
    "pygments": "book",
    "lm_eval": "eval",
}
"""Name of an import -> the smallest extra that brings it."""

NO_EXTRA = {"litgpt": "--no-deps litgpt lightning lightning-utilities pytorch-lightning torchmetrics psutil"}
"""Name of an import -> what to install of a package that cannot be resolved beside the others."""


def install_command(*packages: str) -> str:
    """The command that adds to this installation of refllm what these packages (names of imports) belong to."""
    commands = [f"{_installer()} install {NO_EXTRA[package]}" for package in packages if package in NO_EXTRA]
    extras = ",".join(dict.fromkeys(EXTRA_OF[package] for package in packages if package not in NO_EXTRA))
    return " && ".join([*([f"{_installer()} install {_source(extras)}"] if extras else []), *commands])


def missing_extra(what: str, *packages: str) -> MissingExtraError:
    """The error for `what` ("drawing examples"), which needs packages that are not installed."""
    return MissingExtraError(needs(what, *packages))


def needs(what: str, *packages: str) -> str:
    """One sentence: that `what` needs packages that are not there, and how they are installed."""
    only = "; there is no triton for this system" if "triton" in packages and sys.platform != "linux" else ""
    missing = f"{' and '.join(packages)}, which {'is' if len(packages) == 1 else 'are'} not installed"
    return f"{what} needs {missing}; install with: {install_command(*packages)}{only}"


def require(what: str, *packages: str) -> None:
    """Raises MissingExtraError if a package that `what` needs is not installed: before the work, not in its midst."""
    if missing := not_installed(packages):
        raise missing_extra(what, *missing)


def not_installed(packages: Sequence[str]) -> list[str]:
    """Those that cannot be imported here; none of them is imported."""
    return [package for package in packages if find_spec(package) is None]


def optional_package(error: ModuleNotFoundError) -> str | None:
    """The optional package that an import did not find; None if it was no such package."""
    name = (error.name or "").partition(".")[0]
    return name if name in EXTRA_OF and not_installed([name]) else None


def _installer() -> str:
    """`pip` if that is the one of this interpreter, else the interpreter's own; `uv pip` where there is only uv."""
    here = Path(sys.executable)
    if find_spec("pip") is None and _distribution_file("INSTALLER").strip() == "uv":
        return "uv pip"
    found = shutil.which("pip")
    same = found is not None and Path(found).parent == here.parent
    return "pip" if same else f"{shlex.quote(str(here))} -m pip"


def _source(extras: str) -> str:
    """What to install, quoted for a shell: the checkout or the wheel that refllm came from, else its name."""
    origin = _origin()
    if origin is None:
        return f"'refllm[{extras}]'"
    path, editable = origin
    return f"{'-e ' if editable else ''}{shlex.quote(f'{path}[{extras}]')}"


def _origin() -> tuple[Path, bool] | None:
    """The folder or the wheel that refllm was installed from, and whether it runs in place; None if it is not there."""
    from urllib.request import url2pathname  # slow to import, as is what comes below, and rarely needed

    try:
        direct = json.loads(_distribution_file("direct_url.json") or "{}")
        url = urlsplit(direct.get("url", ""))
    except ValueError:
        return None
    checkout = Path(__file__).resolve().parent.parent
    if not direct and _is_checkout(checkout):  # run where it lies, without an installation
        return checkout, True
    path = Path(url2pathname(url.path))
    if url.scheme != "file" or not (_is_checkout(path) or path.is_file()):
        return None
    return path, bool(direct.get("dir_info", {}).get("editable"))


def _is_checkout(folder: Path) -> bool:
    try:
        text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r'^name = "refllm"$', text, re.MULTILINE) is not None


def _distribution_file(name: str) -> str:
    """A file of the metadata of the installed package, "" if there is none."""
    from importlib import metadata

    try:
        return metadata.distribution("refllm").read_text(name) or ""
    except metadata.PackageNotFoundError:
        return ""
