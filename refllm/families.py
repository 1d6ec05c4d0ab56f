"""The named classes, as in Transformers: one per family and head. Each is a `Model` with its page filled in."""

from refllm.config import ArceeConfig, HeliumConfig, LlamaConfig, StableLmConfig
from refllm.model import Model
from refllm.models import arcee, helium, llama, stablelm


class HeliumModel(Model):
    config_class = HeliumConfig
    page = helium
    head = "base"


class HeliumForCausalLM(Model):
    config_class = HeliumConfig
    page = helium
    head = "causal_lm"


class HeliumForSequenceClassification(Model):
    config_class = HeliumConfig
    page = helium
    head = "sequence_classification"


class HeliumForTokenClassification(Model):
    config_class = HeliumConfig
    page = helium
    head = "token_classification"


class LlamaModel(Model):
    config_class = LlamaConfig
    page = llama
    head = "base"


class LlamaForCausalLM(Model):
    config_class = LlamaConfig
    page = llama
    head = "causal_lm"


class LlamaForSequenceClassification(Model):
    config_class = LlamaConfig
    page = llama
    head = "sequence_classification"


class LlamaForTokenClassification(Model):
    config_class = LlamaConfig
    page = llama
    head = "token_classification"


class LlamaForQuestionAnswering(Model):
    config_class = LlamaConfig
    page = llama
    head = "question_answering"


class StableLmModel(Model):
    config_class = StableLmConfig
    page = stablelm
    head = "base"


class StableLmForCausalLM(Model):
    config_class = StableLmConfig
    page = stablelm
    head = "causal_lm"


class StableLmForSequenceClassification(Model):
    config_class = StableLmConfig
    page = stablelm
    head = "sequence_classification"


class StableLmForTokenClassification(Model):
    config_class = StableLmConfig
    page = stablelm
    head = "token_classification"


class ArceeModel(Model):
    config_class = ArceeConfig
    page = arcee
    head = "base"


class ArceeForCausalLM(Model):
    config_class = ArceeConfig
    page = arcee
    head = "causal_lm"


class ArceeForSequenceClassification(Model):
    config_class = ArceeConfig
    page = arcee
    head = "sequence_classification"


class ArceeForTokenClassification(Model):
    config_class = ArceeConfig
    page = arcee
    head = "token_classification"


class ArceeForQuestionAnswering(Model):
    config_class = ArceeConfig
    page = arcee
    head = "question_answering"


CLASSES: dict[str, type[Model]] = {
    name: value for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, Model)
}
del CLASSES["Model"]


def find(model_type: str, head: str) -> type[Model] | None:
    """The class of a family ("helium", ...) and head ("base", "causal_lm", ...), or None where there is none."""
    for cls in CLASSES.values():
        if cls.config_class.model_type == model_type and cls.head == head:
            return cls
    return None
