"""The named classes, as in Transformers: one per family and head. Each is a `Model` with its page filled in.

    from refllm.models.families import HeliumForCausalLM          # or, shorter: from refllm import HeliumForCausalLM

They are made from the records of the families (`refllm.config.traits`): the config class and the page of that
model_type, and one class for each head that the family exists with. Those of a page from outside are made when it is
taken into use (`refllm.models.own_page`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refllm.config import CONFIG_CLASSES, ModelConfig
from refllm.config.traits import TRAITS, Traits
from refllm.errors import InputError
from refllm.extras import require
from refllm.forward.model import Model
from refllm.models import heads
from refllm.precision import Policy

SUFFIXES = {
    "base": "Model",
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""What the name of a class ends with, by its head."""


def _fast_class(cls: type[Model], backend: str, policy: str | Policy | None, low_memory: bool) -> Any:
    """The fast class of the same name, for a backend other than NumPy. Raises InputError for what it does not offer."""
    if backend not in ("torch", "triton"):
        raise InputError(f"backend={backend!r} is not known; use one of numpy, torch, triton")
    if policy is not None and (policy if isinstance(policy, str) else policy.name) != "fused":
        raise InputError(f"backend={backend!r} rounds as its kernels do (policy fused); leave policy out")
    if low_memory:
        raise InputError(f"low_memory is the NumPy backend's; backend={backend!r} holds its weights on the device")
    from refllm import kernels

    require(f"backend={backend!r}", *(("torch", "triton") if backend == "triton" else ("torch",)))
    return kernels.fast_class(cls)


def _not_fast(cls: type[Model], backend: str, policy: str | Policy | None, low_memory: bool) -> Any:
    """What a page from outside has in the place of `_fast_class`. Raises InputError."""
    raise InputError(f"backend={backend!r} computes the families that it knows; a page of your own runs on numpy")


def made_of(traits: Traits, config_class: type[ModelConfig], page: Any, *, own: bool = False) -> dict[str, type[Model]]:
    """Head -> the class of a family. own: whether its page is one from outside."""

    def named(head: str) -> type[Model]:
        filled_in = {
            "config_class": config_class,
            "page": page,
            "heads": heads,
            "head": head,
            "fast_class": classmethod(_not_fast if own else _fast_class),
            "__module__": __name__,
        }
        return type(traits.class_prefix + SUFFIXES[head], (Model,), filled_in)

    return {head: named(head) for head in traits.heads}


BY_CONFIG: dict[type[ModelConfig], dict[str, type[Model]]] = {
    CONFIG_CLASSES[name]: made_of(traits, CONFIG_CLASSES[name], import_module(f"refllm.models.{name}"))
    for name, traits in TRAITS.items()
}
"""Config class -> head -> class. Those of pages from outside stay, for the models that were made of them."""

CLASSES: dict[str, type[Model]] = {cls.__name__: cls for family in BY_CONFIG.values() for cls in family.values()}
"""Every class of every family that is known, by name."""
globals().update(CLASSES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Model]: ...


def find(model_type: str, head: str) -> type[Model] | None:
    """The class of a family ("helium", ...) and head ("base", "causal_lm", ...), or None where there is none."""
    config_class = CONFIG_CLASSES.get(model_type)
    return BY_CONFIG[config_class].get(head) if config_class else None


def of_config(config: ModelConfig) -> dict[str, type[Model]]:
    """Head -> class of the family of a config."""
    return next(BY_CONFIG[cls] for cls in type(config).__mro__ if cls in BY_CONFIG)
