"""refllm: is this language-model implementation right, and if not, where exactly is it wrong?

    import refllm
    model = refllm.load("folder")                      # a Hugging Face checkpoint of Helium, Llama, StableLM or Arcee
    out = model(input_ids=[[1, 2, 3]])                 # out.logits: NumPy

The definitions of the operators are in `refllm.ops`, the models in `refllm/models/`, one page each.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that `import refllm` costs next to nothing.
_HOMES = {
    "refllm.models.auto": (
        "load",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    ),
    "refllm.forward.cache": ("DynamicCache", "StaticCache"),
    "refllm.config": ("ArceeConfig", "AutoConfig", "HeliumConfig", "LlamaConfig", "StableLmConfig"),
    "refllm.errors": ("CheckpointError", "ConfigError", "InputError", "RefllmError", "TokenizerError"),
    "refllm.models.families": (
        "ArceeForCausalLM",
        "ArceeForQuestionAnswering",
        "ArceeForSequenceClassification",
        "ArceeForTokenClassification",
        "ArceeModel",
        "HeliumForCausalLM",
        "HeliumForSequenceClassification",
        "HeliumForTokenClassification",
        "HeliumModel",
        "LlamaForCausalLM",
        "LlamaForQuestionAnswering",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaModel",
        "StableLmForCausalLM",
        "StableLmForSequenceClassification",
        "StableLmForTokenClassification",
        "StableLmModel",
    ),
    "refllm.generation.config": ("GenerationConfig",),
    "refllm.generation.pipelines": ("pipeline",),
    "refllm.generation.seeds": ("set_seed",),
    "refllm.generation.streamers": ("TextIteratorStreamer", "TextStreamer"),
    "refllm.text.tokenizer": ("AutoTokenizer", "BatchEncoding"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'refllm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
