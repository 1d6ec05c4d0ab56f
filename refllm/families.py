"""The named classes, as in Transformers: one per family and head. Each is a `Model` with its page filled in."""

from refllm.config import ArceeConfig, HeliumConfig, LlamaConfig, StableLmConfig
from refllm.model import Model
from refllm.models import arcee, helium, llama, stablelm


class HeliumModel(Model):
    config_class, page, head = HeliumConfig, helium, "base"


class HeliumForCausalLM(Model):
    config_class, page, head = HeliumConfig, helium, "causal_lm"


class HeliumForSequenceClassification(Model):
    config_class, page, head = HeliumConfig, helium, "sequence_classification"


class HeliumForTokenClassification(Model):
    config_class, page, head = HeliumConfig, helium, "token_classification"


class LlamaModel(Model):
    config_class, page, head = LlamaConfig, llama, "base"


class LlamaForCausalLM(Model):
    config_class, page, head = LlamaConfig, llama, "causal_lm"


class LlamaForSequenceClassification(Model):
    config_class, page, head = LlamaConfig, llama, "sequence_classification"


class LlamaForTokenClassification(Model):
    config_class, page, head = LlamaConfig, llama, "token_classification"


class LlamaForQuestionAnswering(Model):
    config_class, page, head = LlamaConfig, llama, "question_answering"


class StableLmModel(Model):
    config_class, page, head = StableLmConfig, stablelm, "base"


class StableLmForCausalLM(Model):
    config_class, page, head = StableLmConfig, stablelm, "causal_lm"


class StableLmForSequenceClassification(Model):
    config_class, page, head = StableLmConfig, stablelm, "sequence_classification"


class StableLmForTokenClassification(Model):
    config_class, page, head = StableLmConfig, stablelm, "token_classification"


class ArceeModel(Model):
    config_class, page, head = ArceeConfig, arcee, "base"


class ArceeForCausalLM(Model):
    config_class, page, head = ArceeConfig, arcee, "causal_lm"


class ArceeForSequenceClassification(Model):
    config_class, page, head = ArceeConfig, arcee, "sequence_classification"


class ArceeForTokenClassification(Model):
    config_class, page, head = ArceeConfig, arcee, "token_classification"


class ArceeForQuestionAnswering(Model):
    config_class, page, head = ArceeConfig, arcee, "question_answering"


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
