"""The named classes, as in Transformers: one per family and head. Each is a `Model` with its page filled in.

    from refllm.models.families import HeliumForCausalLM          # or, shorter: from refllm import HeliumForCausalLM

They are made from the records of the families (`refllm.config.traits`): the config class and the page of that
model_type, and one class for each head that the family exists with.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from refllm.config import CONFIG_CLASSES
from refllm.config.traits import TRAITS, Traits
from refllm.forward.model import Model

SUFFIXES = {
    "base": "Model",
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""What the name of a class ends with, by its head."""


def _named(traits: Traits, head: str) -> type[Model]:
    filled_in = {
        "config_class": CONFIG_CLASSES[traits.model_type],
        "page": import_module(f"refllm.models.{traits.model_type}"),
        "head": head,
        "__module__": __name__,
    }
    return type(traits.class_prefix + SUFFIXES[head], (Model,), filled_in)


CLASSES: dict[str, type[Model]] = {
    cls.__name__: cls for cls in (_named(traits, head) for traits in TRAITS.values() for head in traits.heads)
}
"""By name."""
globals().update(CLASSES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Model]: ...


def find(model_type: str, head: str) -> type[Model] | None:
    """The class of a family ("helium", ...) and head ("base", "causal_lm", ...), or None where there is none."""
    traits = TRAITS.get(model_type)
    return CLASSES[traits.class_prefix + SUFFIXES[head]] if traits and head in traits.heads else None
