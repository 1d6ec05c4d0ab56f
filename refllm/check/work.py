"""A folder in which a check keeps what it has done: the values of every run, and beside them what was judged. The same
command with the same folder goes on where it was ended, and runs nothing again."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs
from refllm.check.keeper import weights_digest
from refllm.check.trace import Trace
from refllm.errors import InputError
from refllm.storage import input_file, output_file


@dataclass(frozen=True)
class Work:
    """The files of one candidate on one checkpoint in one precision. folder: where they lie; checkpoint: the folder of
    the weights."""

    folder: Path
    checkpoint: Path
    candidate: str
    dtype: str

    def file(self, inputs: Inputs) -> Path:
        """Where the values of a run are."""
        name = f"{self.checkpoint.name}-{self.candidate}-{self.dtype}-{inputs.label}"
        told = hashlib.blake2b(f"{self.checkpoint.resolve()} {self.candidate}".encode(), digest_size=4).hexdigest()
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{told}.safetensors"

    def has_any(self) -> bool:
        """Whether the values of the first run are kept, so that there may be no need to load the candidate."""
        return self.file(Inputs(np.zeros((1, 1), np.int64))).with_suffix(".json").exists()

    def kept(self, inputs: Inputs) -> Trace | None:
        """The values of a run that was ended, if they are all here, and of these inputs and weights."""
        if self._about(inputs).get("weights") != self._weights():
            return None
        try:
            trace = Trace.load(self.file(inputs))
        except InputError:
            return None
        arrays = ("input_ids", "mask", "positions")
        same = all(np.array_equal(getattr(trace.inputs, name), getattr(inputs, name)) for name in arrays)
        return trace if same and trace.inputs.chunks == inputs.chunks else None

    def rows(self, inputs: Inputs) -> dict[str, Any] | None:
        """What was found of the rows of the embedding."""
        found = self._about(inputs).get("rows")
        return found if isinstance(found, dict) else None

    def complete(self, inputs: Inputs, rows: Any = None) -> None:
        """Says that the values of a run are all here. rows: what was found of the rows of the embedding, if none of
        them is wrong."""
        about = {"weights": self._weights(), "rows": None if rows is None else asdict(rows)}
        output_file.write("--work", self._beside(inputs), json.dumps(about))

    def _about(self, inputs: Inputs) -> dict[str, Any]:
        try:
            found = input_file.read_json(self._beside(inputs))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _beside(self, inputs: Inputs) -> Path:
        return self.file(inputs).with_suffix(".json")

    def _weights(self) -> list[Any]:
        return weights_digest(self.checkpoint)
