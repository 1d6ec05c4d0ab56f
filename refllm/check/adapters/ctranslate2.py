"""A model that CTranslate2's converter made, as a candidate on a CPU. Needs the package `ctranslate2`.

It shows its logits and nothing else. Rows may have different lengths; their tokens are counted from 0, and there is no
other way to say a position or a mask.
"""

from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.inputs import Inputs
from refllm.check.stacks import Opening
from refllm.check.taps import LENGTHS, Sink, cannot_run
from refllm.errors import InputError
from refllm.forward.taps import HEAD_TAPS


def open_candidate(opening: Opening) -> "CTranslate2Candidate":
    """The model in a folder. Raises InputError for what is none."""
    import ctranslate2

    folder = Path(opening.given)
    if not (folder / "model.bin").is_file():
        raise InputError(f"{folder} has no model.bin: expected a folder that ct2-transformers-converter made")
    try:
        model = ctranslate2.Generator(str(folder), device="cpu", compute_type=opening.dtype)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: CTranslate2 does not load it: {str(error).splitlines()[0]}") from None
    return CTranslate2Candidate(model, opening, folder.name)


def wrap(model: Any, opening: Opening) -> "CTranslate2Candidate":
    """A `ctranslate2.Generator`. Raises InputError for one that computes in another format than float32."""
    if getattr(model, "compute_type", None) != "float32":
        kind = getattr(model, "compute_type", type(model).__name__)
        raise InputError(f"{kind} cannot be checked: make a ctranslate2.Generator with compute_type='float32'")
    return CTranslate2Candidate(model, opening, "")


class CTranslate2Candidate:
    """A `ctranslate2.Generator`. takes: rows of different lengths."""

    def __init__(self, model: Any, opening: Opening, folder: str) -> None:
        import ctranslate2

        if opening.head != "causal_lm":
            raise InputError(f"CTranslate2 has no {opening.head} head, only one for the next token")
        self.model, self.dtype, self.computes_in = model, opening.dtype, "float32"
        self.name = f"ctranslate2 {ctranslate2.__version__} {folder}".strip()
        self.details = {"ctranslate2": ctranslate2.__version__, "threads": "as CTranslate2 chooses"}
        self.takes = (LENGTHS, "batch")

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Rows are packed to the left: padding is not seen, so it does not matter where it is."""
        import ctranslate2

        if reason := cannot_run(self, inputs):
            raise InputError(f"{self.name}: {inputs.label}: {reason}")
        valid, lengths = inputs.valid, inputs.valid.sum(axis=1)
        packed = np.zeros((len(lengths), lengths.max()), np.int32)
        to_the_left = np.arange(lengths.max()) < lengths[:, None]
        packed[to_the_left] = inputs.input_ids[valid]
        given = ctranslate2.StorageView.from_array(packed)
        sizes = ctranslate2.StorageView.from_array(lengths.astype(np.int32))
        found = np.array(self.model.forward_batch(given, sizes))
        logits = np.zeros((*valid.shape, found.shape[-1]), found.dtype)
        logits[valid] = found[to_the_left]
        sink(HEAD_TAPS["causal_lm"], logits)
