"""Finding the class of a checkpoint: `load`, and the Auto classes of Transformers."""

import os
import sys
from typing import Any

from refllm.config import AutoConfig, ModelConfig, as_config
from refllm.errors import ConfigError, InputError
from refllm.forward.model import Model
from refllm.models import families
from refllm.models.heads import HEADS
from refllm.precision import Policy, check_dtype
from refllm.storage import hub_cache

BACKENDS = ("numpy", "torch", "triton")


def load(
    path: str | os.PathLike[str],
    head: str | None = None,
    dtype: str = "float32",
    backend: str = "numpy",
    device: str | None = None,
    policy: str | Policy | None = None,
    low_memory: bool = False,
    page: str | os.PathLike[str] | None = None,
) -> Model:
    """The model in a checkpoint folder. A progress bar is shown on a terminal.

    head: "base", "causal_lm", "sequence_classification", "token_classification" or "question_answering"; None takes the
    first of `architectures` in config.json. dtype, policy: see `refllm.precision.arithmetic`. low_memory: convert
    weights from the memory-mapped file layer by layer. backend: "numpy" is the reference; "torch" and "triton" are the
    fast models (`refllm.kernels.models`), on `device` ("cpu", "cuda", "cuda:1"; None: the first GPU, else the CPU).
    page: the file of a page of one's own, or a known family to read the checkpoint as (`refllm.models.own_page`).
    Raises ConfigError, CheckpointError or InputError, each with one sentence.
    """
    from refllm.models.own_page import in_use
    from refllm.terminal.progress import loading_bar

    options: dict[str, Any] = {"policy": policy, "low_memory": low_memory, "backend": backend, "device": device}
    with in_use(page), loading_bar(sys.stderr) as progress:
        cls, dtype = model_class(AutoConfig.from_pretrained(path), head), check_dtype(dtype)
        return cls.from_pretrained(path, dtype=dtype, progress=progress, **options)


def model_class(config: ModelConfig, head: str | None = None) -> type[Model]:
    """The class for a config. head None: what `architectures` names, or the causal LM if it names nothing."""
    if head is not None and head not in HEADS:
        raise InputError(f"head={head!r} is not known; use one of {', '.join(HEADS)}")
    classes = families.of_config(config)
    of_family = {cls.__name__: cls for cls in classes.values()}
    if head is None and config.architectures:
        named = config.architectures[0]
        if named not in of_family:
            raise ConfigError(
                f"config.json: architectures names {named!r}, which is no class of model_type {config.model_type!r}; "
                f"expected one of {', '.join(of_family)}, or a head given with head="
            )
        return of_family[named]
    cls = classes.get(head or "causal_lm")
    if cls is None:
        heads = ", ".join(cls.head for cls in of_family.values())
        raise InputError(f"head={head!r}: {config.model_type} has none of that kind, only {heads}")
    return cls


class _Auto:
    """`from_pretrained` and `from_config` of the class that fits the config."""

    head: str

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Model:
        """See `refllm.forward.model.Model.from_pretrained`."""
        where = {name: options[name] for name in hub_cache.KEYWORDS & options.keys()}
        config = AutoConfig.from_pretrained(folder, **where)
        return model_class(config, cls.head).from_pretrained(folder, **options)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Model:
        """See `refllm.forward.model.Model.from_config`."""
        config = as_config(cls.__name__, config)
        return model_class(config, cls.head).from_config(config, **options)


class AutoModel(_Auto):
    head = "base"


class AutoModelForCausalLM(_Auto):
    head = "causal_lm"


class AutoModelForSequenceClassification(_Auto):
    head = "sequence_classification"


class AutoModelForTokenClassification(_Auto):
    head = "token_classification"


class AutoModelForQuestionAnswering(_Auto):
    head = "question_answering"
