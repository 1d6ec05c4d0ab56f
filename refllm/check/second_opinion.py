"""What an honest run reaches end to end, where the prediction alone would call a value wrong.

The prediction takes errors of different positions as independent. Where attention spreads over hundreds of keys, and
the residual stream of those positions is alike, they are not: roundings of nearly equal numbers are equal, and a mean
over them does not average them out. So before a value is called wrong for what came before it, the reference runs once
in the candidate's precision under the same policy, and its own error there is the measure.
"""

from dataclasses import replace

import numpy as np

from refllm.accuracy.measure import Measure
from refllm.accuracy.propagation import Uncertain
from refllm.check.candidates import ReferenceCandidate
from refllm.check.inputs import Inputs
from refllm.check.taps import as_array
from refllm.forward.model import Model
from refllm.precision import Arithmetic, Policy


def honest_ratios(
    model: Model, inputs: Inputs, dtype: str, policy: Policy, end_to_end: dict[str, Measure]
) -> dict[str, float]:
    """Name -> rms error of the reference's emulated run / rms of the predicted sigma, for the names in `end_to_end`.

    model: its weights lie on the grid of `dtype`. Costs one emulated and one exact forward pass.
    """
    from refllm.check.oracle import predict

    emulated = type(model)(model.config, model.weights, Arithmetic(dtype, replace(policy, torch_order=False)))
    kept: dict[str, np.ndarray] = {}

    def keep(name: str, value: np.ndarray) -> None:
        if name in end_to_end:
            kept[name] = as_array(value)

    ReferenceCandidate(emulated).run(replace(inputs, chunks=()), keep)
    ratios: dict[str, float] = {}

    def compare(name: str, x: Uncertain) -> Uncertain:
        if name in kept and end_to_end[name].rms_sigma:
            by_position = [a if a.ndim == 3 else a.transpose(0, 2, 1, 3) for a in (kept.pop(name), x.value)]
            error = (by_position[0] - by_position[1])[inputs.valid]
            finite = error[np.isfinite(error)]
            ratios[name] = float(np.sqrt(np.mean(finite**2)) / end_to_end[name].rms_sigma) if finite.size else 0.0
        return x

    predict(model, inputs, dtype, policy, compare)
    return ratios
