"""GGUF files, the form of llama.cpp, read with the package `gguf`: their tensors dequantised, under the names and in
the order of rows of a Hugging Face checkpoint.

    file = GgufFile.open("model-q8_0.gguf")
    file.names                                   ("model.embed_tokens.weight", ...)
    file.read("model.layers.0.mlp.up_proj.weight")   float32 [out, in]
    file.kinds                                   name -> "Q8_0"

Of the families here, llama.cpp knows llama, stablelm and arcee. In files of llama and arcee the rows of every head of q
and k are interleaved, since llama.cpp rotates pairs (2i, 2i+1) where the checkpoint has (i, i + D/2); here they are put
back.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from refllm import extras
from refllm.errors import CheckpointError
from refllm.storage.safetensors_format import quote

MAGIC = b"GGUF"
PAIRED = ("llama", "arcee")
"""Architectures whose files hold the rows of q and k in pairs."""
ARCHITECTURES = ("llama", "stablelm", "arcee")
_MODULES = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_layernorm", "k_layernorm")),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)
_NO_WEIGHTS = ("rope_freqs.weight",)
"""Tensors of a file that are tables: a checkpoint has its config for them."""


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that begins as GGUF files do."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def in_pairs(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows [heads * D, ...] of q or k from the order of a checkpoint into that of a GGUF file: i, i + D/2 of every head
    become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def in_halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `in_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class GgufFile:
    """A GGUF file of a model. metadata: its keys, without the lists of a tokenizer. kinds: name -> how it is stored."""

    def __init__(self, path: Path, reader: Any) -> None:
        """Use `GgufFile.open`. reader: a `gguf.GGUFReader`."""
        self.path = path
        self.metadata = dict(_scalars(reader))
        self.architecture = str(self._key("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{path}: this is a GGUF file of a {self.architecture} model; expected one of {known}"
            )
        self.layers, self.heads = (self._count(key) for key in ("block_count", "attention.head_count"))
        self.kv_heads = self._count("attention.head_count_kv", self.heads)
        self.tables: tuple[str, ...] = ()
        self._stored: dict[str, Any] = {}
        self._part: dict[str, int | None] = {}
        modules = self._modules()
        for tensor in reader.tensors:
            for name, part in self._names(tensor, modules):
                self._stored[name], self._part[name] = tensor, part

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The file at `path`. Raises CheckpointError for what is no GGUF file of a family here, MissingExtraError
        without the package."""
        extras.require("reading a GGUF file", "gguf")
        import gguf

        if os.path.isfile(path) and not is_gguf(path):
            raise CheckpointError(f"{path}: this is no GGUF file; such a file begins with {MAGIC.decode()}")
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # it says in many ways what is wrong with a file
            raise CheckpointError(f"{path}: this is a GGUF file that cannot be read: {error}") from None
        return cls(Path(path), reader)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, as a checkpoint has them."""
        return tuple(self._stored)

    @property
    def kinds(self) -> dict[str, str]:
        """Name -> how the tensor is stored: "F32", "Q8_0", "Q4_K"."""
        return {name: tensor.tensor_type.name for name, tensor in self._stored.items()}

    def bits(self, name: str) -> float:
        """How many bits a number of the tensor takes, those of its block's scales included."""
        tensor = self._stored[name]
        return 8 * float(tensor.n_bytes) / float(tensor.n_elements)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(n) for n in reversed(self._stored[name].shape))
        return shape if self._part[name] is None else shape[1:]

    def read(self, name: str, dtype: Any = np.float32) -> NDArray[Any]:
        """The tensor, dequantised as the package `gguf` does, in the order of rows of a checkpoint."""
        from gguf.quants import dequantize

        tensor, part = self._stored[name], self._part[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: tensor {quote(tensor.name)} cannot be dequantised: {error}") from None
        values = np.asarray(values, dtype) if part is None else np.asarray(values[part], dtype)
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2], 0)
        return in_halves(values, heads) if heads and self.architecture in PAIRED else values.reshape(self.shape(name))

    def _names(self, tensor: Any, modules: dict[str, str]) -> Iterator[tuple[str, int | None]]:
        """The names of what a tensor holds, and which part of it each is: None for all of it."""
        if tensor.name in _NO_WEIGHTS:
            self.tables += (tensor.name,)
            return
        path, _, kind = tensor.name.rpartition(".")
        module = modules.get(path)
        if module is None or kind not in ("weight", "bias"):
            raise CheckpointError(f"{self.path}: {quote(tensor.name)} is no tensor of a {self.architecture} model")
        if module.endswith(("q_layernorm", "k_layernorm")):  # one tensor per head in a checkpoint
            yield from ((f"{module}.norms.{head}.{kind}", head) for head in range(int(tensor.shape[-1])))
        else:
            yield f"{module}.{kind}", None

    def _modules(self) -> dict[str, str]:
        """Name of a module in the file -> in a checkpoint."""
        import gguf

        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.layers)
        paths = ["model.embed_tokens", "model.norm", "lm_head"]
        paths += [f"model.layers.{i}.{module}" for i in range(self.layers) for module in _MODULES]
        return {name: path for path in paths if (name := known.get_name(path))}

    def _key(self, key: str) -> Any:
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the GGUF file has no key {key}; it is damaged or no language model")
        return self.metadata[key]

    def _count(self, key: str, default: int | None = None) -> int:
        key = f"{self.architecture}.{key}"
        found = self.metadata.get(key, default) if default is not None else self._key(key)
        if not isinstance(found, int) or found < 1:
            raise CheckpointError(f"{self.path}: {key} is {quote(found)}, expected a number of 1 or more")
        return found


def _scalars(reader: Any) -> Iterator[tuple[str, Any]]:
    for name, field in reader.fields.items():
        if len(field.types) == 1:
            value = field.contents()
            yield name, value.item() if isinstance(value, np.generic) else value
