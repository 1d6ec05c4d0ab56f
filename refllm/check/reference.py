"""The reference itself behind the interface of a candidate: the exact run and the yardstick are made with it."""

from typing import Any

import numpy as np

from refllm.check.taps import Trace, trace_of


class ReferenceCandidate:
    """A model of refllm, in whatever precision it was loaded."""

    def __init__(self, model: Any) -> None:
        self.name = f"refllm {model.dtype}" + (f" {model.policy}" if model.policy else "")
        self.model = model

    def run(self, input_ids_BS: np.ndarray) -> Trace:
        """See `Candidate.run`."""
        outputs = self.model(input_ids=input_ids_BS, use_cache=False, output_hidden_states=True)
        return trace_of(outputs.hidden_states, outputs, self.model.head)
