"""Every hypothesis on a model, in the order in which they are tried: what often goes wrong comes first."""

from typing import Any

from refllm.hypotheses import attentions, blocks, norms, rotations, tensors
from refllm.hypotheses.hypothesis import Hypothesis

_AREAS = (rotations, attentions, norms, blocks, tensors)

_COMMON = (
    "rope scaling ignored",
    "theta 10000",
    "the other pairing",
    "rows of q and k: halves to pairs, as in GGUF",
    "rows of q and k: pairs to halves",
    "theta 500000",
    "theta 1e+06",
    "sign of sin",
    "no rotation",
    "v turned",
    "all dims turned",
    "first position twice",
    "position_ids ignored",
    "attention factor dropped",
    "K/V heads tiled",
    "scale missing",
    "scale twice",
    "scale from the hidden size",
    "not causal",
    "mask 1 too wide",
    "padding seen",
    "window ignored",
    "heads merged crosswise",
    "norm weight plus one",
    "norm eps 1e-05",
    "norm eps 1e-06",
    "norms swapped",
    "LayerNorm for RMSNorm",
    "RMSNorm for LayerNorm",
    "head norms of q and k skipped",
    "the last norm: skipped",
    "gate and up swapped",
    "activation silu",
    "activation gelu",
    "activation gelu_pytorch_tanh",
    "biases of q, k and v dropped",
    "biases of all dropped",
    "embedding times sqrt(E)",
    "tied head",
    "logits capped at 30",
    "log-probabilities",
    "layer 0 skipped",
    "parallel residual",
    "sequential residual",
    "BOS in front",
    "int8 weights in rows",
    "int4 weights in groups of 32",
)
"""What real ports got wrong most often, by name."""


def catalogue(config: Any) -> list[Hypothesis]:
    """All that may have a meaning for a model of this config; some change nothing in it, which shows when they are
    run."""
    found = [hypothesis for area in _AREAS for hypothesis in area.hypotheses(config)]
    rank = {name: n for n, name in enumerate(_COMMON)}
    return sorted(found, key=lambda h: rank.get(h.name, len(rank)))
