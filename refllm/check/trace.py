"""A trace: the named values of one forward pass of any implementation, in memory or in a safetensors file."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs
from refllm.errors import CheckpointError, InputError
from refllm.storage import input_file, output_file
from refllm.storage.checkpoint_writer import header
from refllm.storage.safetensors_format import read_header

FORMAT = "refllm trace 1"
_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass
class Trace:
    """taps: name -> array, in order of computation; narrow formats are held in float32. source: who computed it.

    config_hash: of what the config says about the mathematics (`refllm.config.digest`). details: anything else worth
    keeping.
    """

    taps: dict[str, np.ndarray]
    inputs: Inputs
    source: str
    dtype: str
    head: str
    config_hash: str
    details: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write to a file. Narrow values are stored in their own dtype, two bytes each."""
        import ml_dtypes

        stored = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(self.dtype)
        tensors = {
            f"tap.{i:05d}.{name}": np.ascontiguousarray(_narrow(value, stored))
            for i, (name, value) in enumerate(self.taps.items())
        }
        for name in _INPUTS:
            value = getattr(self.inputs, name)
            if value is not None:
                tensors[f"input.{name}"] = np.ascontiguousarray(value.astype(np.int64))
        if self.inputs.embeds is not None:
            tensors["input.embeds"] = np.ascontiguousarray(self.inputs.embeds, np.float32)
        about: dict[str, Any] = {
            "source": self.source,
            "dtype": self.dtype,
            "head": self.head,
            "config_hash": self.config_hash,
        }
        about |= {"chunks": self.inputs.chunks, "embeds_scale": self.inputs.embeds_scale, "label": self.inputs.label}
        metadata = {"format": FORMAT, "about": json.dumps(about), "details": json.dumps(self.details)}
        kinds = {name: (value.shape, value.dtype.name) for name, value in tensors.items()}
        try:
            with output_file.replacing(path) as file:
                file.write(header(kinds, metadata))
                for value in tensors.values():
                    file.write(value.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from None

    @staticmethod
    def load(path: str | Path) -> "Trace":
        """Read what `save` wrote. Raises InputError, naming the file, for anything else."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file; a trace is made by refllm trace")
        try:
            input_file.must_be_regular(path)
            with open(path, "rb") as raw:
                read_header(raw, str(path))  # refuses what the library would fill the memory with
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: not a trace (its format is not {FORMAT!r}); make one with refllm trace")
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            about, details = json.loads(metadata["about"]), json.loads(metadata["details"])
            inputs = Inputs(
                tensors["input.input_ids"],
                tensors.get("input.attention_mask"),
                tensors.get("input.position_ids"),
                tuple(about["chunks"]),
                about["embeds_scale"],
                about["label"],
                embeds=tensors.get("input.embeds"),
            )
            taps = {n.split(".", 2)[2]: _wide(value) for n, value in tensors.items() if n.startswith("tap.")}
            return Trace(taps, inputs, about["source"], about["dtype"], about["head"], about["config_hash"], details)
        except CheckpointError as error:
            raise InputError(f"{error}; a trace is made by refllm trace") from None
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not readable as a trace ({error}); make it again with refllm trace") from None


def _narrow(value: np.ndarray, dtype: Any) -> np.ndarray:
    """The value in the narrow dtype if that holds it exactly (norms of a mixed-precision stack may be wider)."""
    if dtype is None:
        return value
    narrow = value.astype(dtype)
    return narrow if np.array_equal(narrow.astype(value.dtype), value, equal_nan=True) else value


def _wide(value: np.ndarray) -> np.ndarray:
    return value if value.dtype in (np.float64, np.float32) else value.astype(np.float32)
