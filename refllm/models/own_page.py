"""A family from outside: a page of one's own, in a file that the user names.

    load("folder", page="mistral.py")            refllm check folder --page mistral.py

A page is written as those beside this file are, and has these names:

    TRAITS          `refllm.config.traits.Traits`: model_type, class_prefix, and what its models have
    Config          a class of `refllm.config`, whose annotated names are keys of config.json
    tensors(c)      name -> shape of every tensor of the backbone
    forward, block  the mathematics, in calls of `op`, with a name for every result
    NOT_ROUNDED     optional: where its Transformers code does not round although the policy would

Nothing of a checkpoint is executed, only this file. While a page is in use, its model_type is a family like the others.
A known family can be named instead of a file: then an unknown model_type is read as that one, where nothing differs.
"""

import dataclasses
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refllm.config import CONFIG_CLASSES, ModelConfig
from refllm.config.config import read_as, reader_of
from refllm.config.digest import config_hash
from refllm.config.traits import TRAITS, Traits
from refllm.errors import ConfigError, InputError, RefllmError
from refllm.forward.dry_run import PageError, dry_run
from refllm.models import families
from refllm.precision import POLICIES
from refllm.user_code import load_file

_NAMES = ("TRAITS", "Config", "tensors", "forward", "block")
_NORMS = ("rms", "layer")

_in_use: list[str] = []


def current() -> str:
    """The page that is in use, for another process; "" if none is."""
    return _in_use[-1] if _in_use else ""


@contextmanager
def in_use(page: str | os.PathLike[str] | None) -> Iterator[None]:
    """The family of a page is known while it is open, in the whole process. page: a file, or the name of a known family
    (`refllm.config.config.read_as`); None changes nothing.

    Raises InputError with the file and the line for a page that cannot be one.
    """
    if page is None or os.fspath(page) == current():
        yield
        return
    if page in TRAITS:
        with read_as(str(page)), _noted(str(page)):
            yield
        return
    own = _read(Path(page))
    name = own.traits.model_type
    before = TRAITS.get(name), CONFIG_CLASSES.get(name)
    TRAITS[name], CONFIG_CLASSES[name] = own.traits, own.config_class
    try:
        with _noted(os.path.abspath(page)):
            yield
    finally:
        for table, old in zip((TRAITS, CONFIG_CLASSES), before, strict=True):
            if old is None:
                del table[name]  # type: ignore[attr-defined]
            else:
                table[name] = old  # type: ignore[index]


@contextmanager
def _noted(page: str) -> Iterator[None]:
    _in_use.append(page)
    try:
        yield
    finally:
        _in_use.pop()


class OwnPage:
    """A page from outside, in the place of a module of this package: what it raises is told with its file and line."""

    def __init__(self, path: Path, module: Any) -> None:
        self.path, self._module = path, module
        self.traits: Traits = module.TRAITS
        self.NOT_ROUNDED = frozenset(getattr(module, "NOT_ROUNDED", ()))
        self.config_class = self._config_class()
        self._examined: set[str] = set()
        self._check_traits()

    def tensors(self, c: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the backbone. Of a config that it was not asked about before, the whole page
        is tried out on shapes. Raises InputError for what is wrong with it."""
        found = self._call(self._module.tensors, c)
        if not isinstance(found, Mapping) or "embed_tokens.weight" not in found:
            raise self.error("it lists no embed_tokens.weight; expected {name: shape} of the backbone", "def tensors")
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in found.items()}
        if (digest := config_hash(c)) not in self._examined:
            self._examine(c, shapes)
            self._examined.add(digest)
        return shapes

    def forward(self, *args: Any) -> Any:
        """Embeddings -> the last hidden state, after the final norm."""
        return self._call(self._module.forward, *args)

    def block(self, *args: Any) -> Any:
        """One decoder layer."""
        return self._call(self._module.block, *args)

    def error(self, clause: str, at: str = "", line: int = 0) -> InputError:
        """What is wrong, with the line, or with that of the first line of the file that begins so."""
        return InputError(f"{self.path}{_line_of(self.path, at, line)}: {clause}")

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except RefllmError:
            raise
        except Exception as error:  # whatever a page of the user's own raises is the answer to the user
            raise InputError(_told(self.path, error)) from error

    def _config_class(self) -> type[ModelConfig]:
        """The class, made a dataclass where it is none, with the family's name and record."""
        cls = self._module.Config
        if not isinstance(cls, type) or not issubclass(cls, ModelConfig):
            raise self.error(
                "Config must be a class of refllm.config, such as LlamaConfig, or one made of it", "class Config"
            )
        if cls in CONFIG_CLASSES.values():
            cls = type("Config", (cls,), {"__module__": self._module.__name__})
        cls.model_type, cls.traits = self.traits.model_type, self.traits
        if "__dataclass_fields__" not in vars(cls):
            cls = dataclasses.dataclass(init=False, kw_only=True)(cls)
        for field in dataclasses.fields(cls):
            if field.name in vars(cls).get("__annotations__", ()):
                try:
                    reader_of(field)
                except ConfigError as error:
                    raise self.error(f"Config: {error}", rf"\s+{field.name}") from None
        return cls

    def _check_traits(self) -> None:
        traits, heads = self.traits, families.SUFFIXES
        if traits.norm not in _NORMS:
            raise self.error(f"TRAITS: norm={traits.norm!r} is not known; use {' or '.join(_NORMS)}", "TRAITS")
        if unknown := [head for head in traits.heads if head not in heads]:
            raise self.error(f"TRAITS: heads has {unknown[0]!r}; use {', '.join(heads)}", "TRAITS")
        known = frozenset().union(*(policy.points for policy in POLICIES.values()))
        if unknown := sorted(map(str, self.NOT_ROUNDED - known)):
            points = ", ".join(sorted(known))
            raise self.error(f"NOT_ROUNDED: {unknown[0]!r} is no rounding point; those are {points}", "NOT_ROUNDED")
        if traits.norm == "rms" and traits.rounds_before_weight == ("rms_norm.normalized" in self.NOT_ROUNDED):
            means = "does not have" if traits.rounds_before_weight else "has"
            stated = f"TRAITS: rounds_before_weight={traits.rounds_before_weight}"
            raise self.error(f"{stated} means that NOT_ROUNDED {means} rms_norm.normalized", "TRAITS")
        if not traits.model_type or not traits.class_prefix.isidentifier():
            raise self.error("TRAITS: model_type and class_prefix must be names", "TRAITS")

    def _examine(self, c: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        op, read = self._call(dry_run, self._module.forward, c, shapes)
        unread = [name for name in shapes if name not in read and name != "embed_tokens.weight"]
        if unread:
            more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
            raise self.error(f"tensors lists {unread[0]}{more}, which forward never reads", "def tensors")
        lacking = [f"model.layers.{i}" for i in range(c.num_hidden_layers)] + ["model.norm"]
        if lacking := [name for name in lacking if name not in op.names]:
            raise self.error(f"forward names no {lacking[0]}: op.tap({lacking[0]!r}, x)", "def forward")
        said = [
            ("norm", self.traits.norm, "layer" if "layer_norm" in op.called else "rms"),
            ("interleaved", self.traits.interleaved, *op.called.get("rope", {}).get("interleaved", ())),
            ("gated", self.traits.gated, "glu" in op.called),
        ]
        for name, stated, *done in said:
            if done and stated not in done:
                raise self.error(f"TRAITS: {name}={stated!r}, but the page computes {name}={done[0]!r}", "TRAITS")


_READ: dict[tuple[str, bytes], OwnPage] = {}


def _read(path: Path) -> OwnPage:
    """The page in a file; once for the same text."""
    try:
        key = str(path.resolve()), path.read_bytes()
    except OSError as error:
        known = ", ".join(TRAITS)
        raise InputError(f"--page {path}: {error.strerror or error}; expected a file.py, or one of {known}") from None
    if key not in _READ:
        _READ[key] = _made(path)
    return _READ[key]


def _made(path: Path) -> OwnPage:
    try:
        module = load_file(path, f"refllm_page_{path.stem}")
    except Exception as error:
        raise InputError(_told(path, error)) from error
    except SystemExit as error:
        raise InputError(f"{path}: it ends the program, with {error.code!r}") from error
    if missing := [name for name in _NAMES if not hasattr(module, name)]:
        raise InputError(f"{path}: it has no {missing[0]}; a page has {', '.join(_NAMES)}")
    if not isinstance(module.TRAITS, Traits):
        raise InputError(f"{path}{_line_of(path, 'TRAITS')}: TRAITS must be a refllm.config.traits.Traits")
    page = OwnPage(path, module)
    families.BY_CONFIG[page.config_class] = families.made_of(page.traits, page.config_class, page, own=True)
    return page


def _told(path: Path, error: Exception) -> str:
    """An error of a page in one sentence: file, line, and what it was."""
    file = os.path.abspath(path)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if os.path.abspath(f.filename) == file]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    words = (str(error).strip().splitlines() or [""])[0][:300]
    said = words if isinstance(error, PageError) else f"it raises {type(error).__name__}" + f": {words}" * bool(words)
    return f"{path}{_line_of(path, line=(lines or [0])[-1] or 0)}: {said}"


def _line_of(path: Path, begins: str = "", line: int = 0) -> str:
    """ ":12", or "" where no line is known."""
    if begins and not line:
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        line = next((n for n, found in enumerate(text, 1) if re.match(rf"{begins}\b", found)), 0)
    return f":{line}" if line else ""
