"""Every hypothesis on an operator."""

from functools import lru_cache

from refllm.hypotheses.operators import activations, attentions, constants, everywhere, losses, norms, rotations
from refllm.hypotheses.operators.hypothesis import OpHypothesis

_AREAS = (norms, rotations, attentions, activations, losses, everywhere, constants)


@lru_cache(maxsize=1)
def every() -> tuple[OpHypothesis, ...]:
    """All, operator by operator within each area."""
    return tuple(hypothesis for area in _AREAS for hypothesis in area.hypotheses())


def catalogue(operator: str) -> list[OpHypothesis]:
    """Those of one operator."""
    return [hypothesis for hypothesis in every() if hypothesis.operator == operator]
