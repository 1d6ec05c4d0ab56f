"""Every hypothesis on a model, in the order in which they are tried: what goes wrong often comes first."""

from typing import Any

from refllm.hypotheses import attentions, blocks, norms, rotations, tensors
from refllm.hypotheses.hypothesis import Hypothesis

_AREAS = (rotations, attentions, norms, blocks, tensors)


def catalogue(config: Any) -> list[Hypothesis]:
    """All that may have a meaning for a model of this config; some change nothing in it, which shows when they are
    run."""
    return [hypothesis for area in _AREAS for hypothesis in area.hypotheses(config)]
