"""Hugging Face Transformers as a candidate. Needs the packages `torch` and `transformers`."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.adapters.transformers_taps import hooks
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import must_not_have_changed
from refllm.check.taps import Sink
from refllm.errors import MissingExtraError

_AUTO_CLASS = {
    "base": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


def quiet_transformers() -> Any:
    """The package, which says no more than errors. Raises MissingExtraError without it, without Torch, and where it is
    there but cannot be imported."""
    what = "a candidate of Transformers"
    extras.require(what, "torch", "transformers")
    try:
        import transformers
    except ImportError as error:
        again = extras.install_command("transformers")
        raise MissingExtraError(f"{what}: transformers cannot be imported ({error}); install again: {again}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class TransformersCandidate:
    """A Transformers model of any class, recorded by hooks (`refllm.check.adapters.transformers_taps`).

    attention: what it runs, "eager" or "sdpa"; only eager attention shows its weights.
    """

    def __init__(self, model: Any, attention: str | None = None) -> None:
        transformers = quiet_transformers()
        import torch

        self.model = model.eval()
        self.attention = attention or getattr(model.config, "_attn_implementation", "eager")
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.name = f"transformers {transformers.__version__} {self.attention}"
        self.details = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
        }

    @classmethod
    def load(cls, folder: Path, *, head: str, dtype: str, attention: str = "eager") -> "TransformersCandidate":
        """The model in a checkpoint folder. attention: Transformers' `attn_implementation`."""
        transformers = quiet_transformers()
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, _AUTO_CLASS[head]).from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
            )
        return cls(model, attention)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`."""
        import torch

        device = next(self.model.parameters()).device
        cache, weight = None, self.model.get_input_embeddings().weight
        for piece in inputs.pieces():
            given = {
                "attention_mask": inputs.mask[:, : piece.stop],
                "position_ids": inputs.positions[:, piece],
                "input_ids": inputs.input_ids[:, piece],
            }
            tensors = {name: _tensor(value, device) for name, value in given.items()}
            arguments: dict[str, Any] = {**tensors, "past_key_values": cache, "use_cache": bool(inputs.chunks)}
            ids = arguments.pop("input_ids")
            with torch.inference_mode(), hooks(self.model, sink):
                if not inputs.feeds_embeddings:
                    arguments["input_ids"] = ids
                else:
                    rows = torch.from_numpy(inputs.embedded(lambda ids: weight[ids].float().cpu().numpy()))
                    arguments["inputs_embeds"] = rows[:, piece].to(weight)
                    sink("model.embed_tokens", arguments["inputs_embeds"])
                out = self.model(**arguments)
            must_not_have_changed(given, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})
            cache = out.past_key_values if inputs.chunks else None


def _tensor(array: np.ndarray, device: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array, np.int64)).to(device)
