"""Checkpoints whose weights are quantised: they load as what they stand for, each weight dequantised when it is read.

A page per format says what its numbers mean (`bitsandbytes_8bit`, `bitsandbytes_4bit`, `gptq`, `awq`,
`compressed_tensors`, `fp8_blocks`):

    TITLE, MARKS, PARTS          its name; stored parts that mark a quantised weight; all parts of one
    settings(config)             what it needs of quantization_config
    shape(parts, settings)       [out, in]
    dequantize(parts, settings)  the weight in float64: the exact value but for what its page says
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.errors import CheckpointError
from refllm.storage import input_file
from refllm.storage.checkpoint import Checkpoint
from refllm.storage.quantized import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    compressed_tensors,
    fp8_blocks,
    gptq,
)
from refllm.storage.quantized.parts import Parts
from refllm.storage.safetensors_format import quote

_PAGES: dict[str, Any] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8_blocks,
}
METHODS = ("bitsandbytes", *_PAGES)
_MOST = 1 << 24  # bytes of a config.json


def page_of(config: Any) -> Any:
    """The page of a quantization_config. Raises CheckpointError for a format that has none, and for wrong fields."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config is {quote(config)}, expected an object")
    method = config.get("quant_method")
    if method == "bitsandbytes":
        page = bitsandbytes_4bit if config.get("load_in_4bit") else bitsandbytes_8bit
    elif method in _PAGES:
        page = _PAGES[method]
    else:
        raise CheckpointError(
            f"quantization_config: quant_method is {quote(method)}; refllm reads {', '.join(METHODS)}"
        )
    page.settings(config)
    return page


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a folder, as `Checkpoint.open`; a quantised one as one of dequantised weights."""
    path = Path(folder)
    config = quantization_of(path)
    found = Checkpoint.open(path)
    return found if config is None else DequantizedCheckpoint(found, config)


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """quantization_config of the folder's config.json; None where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(input_file.read_bytes(file, _MOST))
    except ValueError:
        return None  # is said where the config is read
    found = values.get("quantization_config") if isinstance(values, dict) else None
    return found or None


class DequantizedCheckpoint(Checkpoint):
    """The tensors of a checkpoint with every quantised weight under its plain name; what it is made of is not listed.

    title: of the format. quantized: the names of the weights that are dequantised.
    """

    def __init__(self, stored: Checkpoint, config: Mapping[str, Any]) -> None:
        super().__init__(stored._files, stored.path)
        self._page = page_of(config)
        self._settings = self._page.settings(config)
        self.title = str(self._page.TITLE)
        self._parts: dict[str, dict[str, str]] = {}
        for name in super().names:
            for mark in self._page.MARKS:
                if name.endswith(f".{mark}"):
                    stem = name.removesuffix(mark)
                    parts = {part: stem + part for part in self._page.PARTS if stem + part in self._owner}
                    self._parts[f"{stem}weight"] = parts
        made_of = {stored for parts in self._parts.values() for stored in parts.values()}
        plain = [name for name in super().names if name not in made_of]
        self._listed = tuple(dict.fromkeys([*plain, *self._parts]))

    @property
    def in_words(self) -> str:
        """The format and its settings."""
        said = [f"{key} {value}" for key, value in self._settings.items() if value]
        return ", ".join([self.title, *said])

    @property
    def quantized(self) -> tuple[str, ...]:
        return tuple(self._parts)

    @property
    def names(self) -> tuple[str, ...]:
        return self._listed

    def __contains__(self, name: object) -> bool:
        return name in self._parts or super().__contains__(name)

    def __len__(self) -> int:
        return len(self._listed)

    def makes(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return super().shape(name)
        return tuple(int(n) for n in self._page.shape(self._of(name), self._settings))

    def dtype(self, name: str) -> str:
        """ "float32" or "float64" for a weight that is made: whichever holds it."""
        return "float64" if name in self._parts else super().dtype(name)

    def stored_as(self, name: str) -> str:
        """How a tensor lies in the file: its dtype, or the title of the format."""
        return self.title if name in self._parts else super().dtype(name)

    def view(self, name: str) -> NDArray[Any]:
        """The stored numbers, or a new array of a weight that is made."""
        if name not in self._parts:
            return super().view(name)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is counted where it is read
            made: NDArray[Any] = self._page.dequantize(self._of(name), self._settings)
        return made

    def must_be_as_opened(self, name: str) -> None:
        for part in self._stored(name):
            super().must_be_as_opened(part)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if name not in self._parts:
            super().release(name, start, stop)
            return
        for part in self._stored(name):
            super().release(part)

    def _stored(self, name: str) -> list[str]:
        return list(self._parts[name].values()) if name in self._parts else [name]

    def _of(self, name: str) -> Parts:
        where = f"{self.path}: {quote(name)} ({self.title})"
        return Parts(where, {part: Checkpoint.view(self, stored) for part, stored in self._parts[name].items()})
