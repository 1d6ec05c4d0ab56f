"""Every hypothesis on an operator."""

from dataclasses import replace
from functools import lru_cache

from refllm.hypotheses.operators import (
    activations,
    attentions,
    constants,
    everywhere,
    gradients,
    losses,
    norms,
    rotations,
)
from refllm.hypotheses.operators.hypothesis import OpHypothesis

_AREAS = (norms, rotations, attentions, activations, losses, everywhere, constants, gradients)


_SOURCES = {
    "eps outside the root": "allenai/OLMo#281",
    "multiplied by the root": "rasbt/LLMs-from-scratch#871",
    "divided by E - 1": "harvardnlp/annotated-transformer#119",
    "unbiased variance": "harvardnlp/annotated-transformer#119",
    "unbiased variance, eps outside the root": "harvardnlp/annotated-transformer#119",
    "mean over the padded row": "Dao-AILab/quack 9310d47",
    "padding in the variance": "Dao-AILab/quack 9310d47",
    "root rounded": "pytorch/helion#2273",
    "pairs over the whole head": "vllm-project/vllm#43676",
    "other pairs": "sgl-project/sglang#30342",
    "always half-split": "sgl-project/sglang#30342",
    "table of the first sequence": "linkedin/Liger-Kernel#477",
    "padding in the denominator": "flashinfer-ai/flashinfer#3717",
    "padding in the sum": "flashinfer-ai/flashinfer#3717",
    "finite sentinel": "flashinfer-ai/flashinfer#4401",
    "last keys left out": "ROCm/aiter#4673",
    "first dims alone": "triton-lang/triton#621",
    "dims left out of the scores": "triton-lang/triton#621",
    "window": "huggingface/transformers#39408",
    "maximum not subtracted": "vllm-project/vllm#56578",
    "LSE of no keys": "Dao-AILab/flash-attention#2842",
    "NaN for no keys": "Dao-AILab/flash-attention#2842",
    "loss in bfloat16": "linkedin/Liger-Kernel#950",
    "copied from the first row": "vllm-project/flash-attention#176",
}
"""Where some of them were seen, by their names."""


@lru_cache(maxsize=1)
def every() -> tuple[OpHypothesis, ...]:
    """All, operator by operator within each area."""
    found = (hypothesis for area in _AREAS for hypothesis in area.hypotheses())
    return tuple(replace(hypothesis, source=_SOURCES.get(hypothesis.name, "")) for hypothesis in found)


def catalogue(operator: str) -> list[OpHypothesis]:
    """Those of one operator."""
    return [hypothesis for hypothesis in every() if hypothesis.operator == operator]
