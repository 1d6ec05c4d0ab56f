"""One record per family: what its models have that those of other families have not.

    traits_of(config).interleaved            # of our config, of Transformers' one, or of a model_type

The math of a family is its page in refllm/models; this is what everything beside the page (formulas in reports, fused
steps, planted bugs, class names) has to know of it.
"""

from dataclasses import dataclass
from typing import Any

from refllm.errors import InputError

_COMMON = ("base", "causal_lm", "sequence_classification", "token_classification")


@dataclass(frozen=True)
class Traits:
    """A family of models.

    model_type: as in config.json, and the name of its page in refllm/models. class_prefix: what the names of its
    classes begin with, here and in Transformers. norm: "rms" or "layer". rounds_before_weight: a norm rounds what it
    normalized before the weight is multiplied, too. interleaved: rotary pairs are (2i, 2i+1) instead of (i, i + R/2).
    gated: the MLP multiplies act(gate) by up. heads: those that it exists with.
    """

    model_type: str
    class_prefix: str
    norm: str = "rms"
    rounds_before_weight: bool = False
    interleaved: bool = False
    gated: bool = True
    heads: tuple[str, ...] = _COMMON

    @property
    def layer_norm(self) -> bool:
        """Whether its norms are LayerNorms."""
        return self.norm == "layer"


TRAITS = {
    traits.model_type: traits
    for traits in (
        Traits("helium", "Helium", interleaved=True),
        Traits("llama", "Llama", rounds_before_weight=True, heads=(*_COMMON, "question_answering")),
        Traits("stablelm", "StableLm", norm="layer"),
        Traits("arcee", "Arcee", rounds_before_weight=True, gated=False, heads=(*_COMMON, "question_answering")),
    )
}
"""The record of every family, by model_type."""


def traits_of(family: Any) -> Traits:
    """The record of a family: of a model_type, or of anything that has one. Raises InputError for another.

    The config of a page from outside has its record with it.
    """
    own = getattr(type(family), "traits", None)
    if isinstance(own, Traits):
        return own
    model_type = family if isinstance(family, str) else getattr(family, "model_type", None)
    if model_type not in TRAITS:
        raise InputError(f"model_type {model_type!r} is not known; use one of {', '.join(TRAITS)}")
    return TRAITS[model_type]
