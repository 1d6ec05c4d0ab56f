"""What an implementation must offer to be checked. The names of what it can show: `refllm.forward.taps`.

Rows of padding are not compared, whatever they hold.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from refllm.check.inputs import Inputs
from refllm.inputs import to_numpy

Sink = Callable[[str, Any], None]
"""Takes a tap's name and its value: an array, or a tensor of Torch on any device."""


class Candidate(Protocol):
    """An implementation under test, ready to run (weights loaded).

    name: for reports. dtype: of its weights and activations. details: versions and settings worth keeping.
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


def as_array(value: Any) -> np.ndarray:
    """A copy of a tap's value as NumPy; narrow formats become float32, which holds them exactly."""
    array = np.array(to_numpy(value))
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
