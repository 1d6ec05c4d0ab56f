"""What an implementation must offer to be checked. The names of what it can show: `refllm.forward.taps`.

Rows of padding are not compared, whatever they hold.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from refllm.check.inputs import FAR, Inputs
from refllm.inputs import to_numpy

Sink = Callable[[str, Any], None]
"""Takes a tap's name and its value: an array, or a tensor of Torch on any device."""


class Candidate(Protocol):
    """An implementation under test, ready to run (weights loaded).

    name: for reports. dtype: of its weights and activations. details: versions and settings worth keeping, and
    under "note" a sentence for whoever reads the report. It may have an attribute `takes` (`EVERYTHING`), and
    `computes_in`, the one dtype that it has because its file is in that.
    """

    name: str
    dtype: str
    details: dict[str, str]

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Feed `inputs` and hand every value that it can name to sink, in order of computation.

        Where `inputs.chunks` says so, the pieces are fed one after another with a cache; sink then sees each name once
        per piece.
        """
        ...


def cannot_run(candidate: Candidate, inputs: Inputs) -> str:
    """Why a candidate cannot run such inputs: a clause, "" if it can. One without an attribute `takes` takes all."""
    takes, S = getattr(candidate, "takes", EVERYTHING), inputs.input_ids.shape[1]
    counted = np.cumsum(inputs.valid, axis=1) - 1
    if LENGTHS in takes and (inputs.positions == counted)[inputs.valid].all():
        takes = (*takes, "mask", "positions")
    wanted = {
        "cache": bool(inputs.chunks),
        "embeddings": inputs.feeds_embeddings,
        "mask": not inputs.valid.all(),
        "positions": bool((inputs.positions != np.arange(S)).any()),
        "batch": len(inputs.input_ids) > 1,
    }
    lacks = [what for what, needed in wanted.items() if needed and what not in takes]
    if not lacks and NEAR in takes and inputs.positions.max() >= FAR:
        return f"it has no positions from {FAR} on"
    return f"it takes no {lacks[0]}" if lacks else ""


ALWAYS = ("mask", "positions", "batch")
"""What every forward pass of somebody's own is given; an engine may lack it."""
LENGTHS = "lengths"
"""What an engine takes that knows rows of different lengths and counts the tokens of each from 0: no other mask, and no
other positions."""
NEAR = "near positions"
"""What stands in `Candidate.takes` where its tables, or its cache, end before `refllm.check.inputs.FAR`."""
GRADIENTS, MICRO_BATCHES, LOSS_SCALE = "gradients", "micro-batches", "loss scale"
"""What stands in `Candidate.takes` where a candidate shows gradients, can add those of micro-batches, and multiplies
its loss with a number before the backward pass."""
EVERYTHING = ("dtype", "cache", "embeddings", *ALWAYS)
"""What a candidate may take besides one row of ids (`Candidate.takes`)."""


def as_array(value: Any) -> np.ndarray:
    """A copy of a tap's value in float32 or float64; narrow formats become float32, which holds them exactly."""
    return wide(as_numpy(value))


def wide(array: np.ndarray) -> np.ndarray:
    """A copy in float32, or in float64 if that was its format or a wider one."""
    wider = array.dtype.kind == "f" and array.dtype.itemsize >= 8
    return np.array(array, np.float64 if wider else np.float32)


def is_array(value: Any) -> bool:
    """Whether it is an array or a tensor of some library."""
    return hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def as_numpy(value: Any) -> np.ndarray:
    """Whatever NumPy can be made of: an array, a tensor of Torch on any device, what has `__array__`, a buffer or
    DLPack, in bfloat16 too. Raises what the library raises that made it."""
    if hasattr(value, "detach"):
        return to_numpy(value)
    for make in (_from_buffer, _from_array, np.from_dlpack):
        with contextlib.suppress(TypeError, ValueError, AttributeError, RuntimeError, BufferError):
            return make(value)  # what a library does not offer, it says in one of these ways
    import torch

    return to_numpy(torch.from_dlpack(value))  # which knows formats that NumPy does not


def _from_array(value: Any) -> np.ndarray:
    if not hasattr(value, "__array__"):
        raise TypeError
    return np.asarray(value)


def _from_buffer(value: Any) -> np.ndarray:
    """The array of a bfloat16 one, which no buffer has a letter for: its bytes, two to a number."""
    if isinstance(value, np.ndarray) or "bfloat16" not in str(value.dtype):
        raise TypeError
    import ml_dtypes

    view = memoryview(value)
    return np.frombuffer(view.tobytes(), ml_dtypes.bfloat16).reshape(view.shape)
