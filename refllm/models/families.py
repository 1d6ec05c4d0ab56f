"""The named classes, as in Transformers: one per family and head. Each is a `Model` with its page filled in.

    from refllm.models.families import HeliumForCausalLM          # or, shorter: from refllm import HeliumForCausalLM

They are made from the records of the families (`refllm.config.traits`): the config class and the page of that
model_type, and one class for each head that the family exists with.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refllm.config import CONFIG_CLASSES
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


def _named(traits: Traits, head: str) -> type[Model]:
    filled_in = {
        "config_class": CONFIG_CLASSES[traits.model_type],
        "page": import_module(f"refllm.models.{traits.model_type}"),
        "heads": heads,
        "head": head,
        "fast_class": classmethod(_fast_class),
        "__module__": __name__,
    }
    return type(traits.class_prefix + SUFFIXES[head], (Model,), filled_in)


CLASSES: dict[str, type[Model]] = {
    cls.__name__: cls for cls in (_named(traits, head) for traits in TRAITS.values() for head in traits.heads)
}
"""Every class of every family, by name."""
globals().update(CLASSES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Model]: ...


def find(model_type: str, head: str) -> type[Model] | None:
    """The class of a family ("helium", ...) and head ("base", "causal_lm", ...), or None where there is none."""
    traits = TRAITS.get(model_type)
    return CLASSES[traits.class_prefix + SUFFIXES[head]] if traits and head in traits.heads else None
