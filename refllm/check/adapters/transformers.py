"""Hugging Face Transformers as a candidate. Needs the packages `torch` and `transformers`."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.adapters.torch_backward import gradient_of, run_backward, tensor
from refllm.check.adapters.transformers_taps import ShownOnce, following, hooks, tap_path
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import must_not_have_changed
from refllm.check.taps import EVERYTHING, GRADIENTS, LOSS_SCALE, MICRO_BATCHES, Sink
from refllm.check.trace import FLOAT32_INSIDE
from refllm.errors import MissingExtraError

_AUTO_CLASS = {
    "base": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


_INSIDE = "Transformers computes norms, softmax, tables and losses in float32 in every format: judged by its errors"


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

    attention: what it runs, "eager" or "sdpa"; only eager attention shows its weights. own: nobody else has the model,
    so that it may be told which tensors are frozen.
    """

    takes: tuple[str, ...] = (*EVERYTHING, GRADIENTS, MICRO_BATCHES, LOSS_SCALE)

    def __init__(self, model: Any, attention: str | None = None, own: bool = False) -> None:
        transformers = quiet_transformers()
        import torch

        self.model, self._own = model.eval(), own
        self.attention = attention or getattr(model.config, "_attn_implementation", "eager")
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.name = f"transformers {transformers.__version__} {self.attention}"
        self.details = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
        }
        if self.dtype == "float64":
            self.details |= {FLOAT32_INSIDE: "norms, softmax and tables", "note": _INSIDE}

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
        return cls(model, attention, own=True)

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`."""
        import torch

        if inputs.learning is not None:
            self._backward(inputs, sink)
            return
        device = next(self.model.parameters()).device
        cache, weight = None, self.model.get_input_embeddings().weight
        for piece in inputs.pieces():
            given = {
                "attention_mask": inputs.mask[:, : piece.stop],
                "position_ids": inputs.positions[:, piece],
                "input_ids": inputs.input_ids[:, piece],
            }
            tensors = {name: tensor(value, device) for name, value in given.items()}
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

    def _backward(self, inputs: Inputs, sink: Sink) -> None:
        """Values and gradients; the loss is that of the model's own head."""
        learning, device = inputs.learning, next(self.model.parameters()).device
        assert learning is not None
        items = {"num_items_in_batch": tensor(np.array(learning.items), device)} if learning.micro_batches > 1 else {}

        def loss(show: ShownOnce, given: dict[str, Any], targets: dict[str, Any]) -> Any:
            with following(self.model, show):
                return self.model(**given, **targets, **items, use_cache=False).loss

        if self._own:
            freeze(self.model, learning.frozen)
        run_backward(self.model, inputs, sink, loss, _head_of(self.model))
        for name, parameter in self.model.named_parameters():
            gradient = gradient_of(parameter)
            if gradient is not None:
                sink(f"grad:{tensor_name(name)}", gradient)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()


def freeze(model: Any, frozen: Collection[str]) -> None:
    """Those of its parameters, by their names in a checkpoint, learn nothing, and all others do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tensor_name(name) not in frozen)


def _head_of(model: Any) -> str:
    """The head by the name of the class."""
    name = type(model).__name__
    suffixes = {head: auto.removeprefix("AutoModel") for head, auto in _AUTO_CLASS.items()}
    return next((head for head, suffix in suffixes.items() if suffix and name.endswith(suffix)), "base")


def tensor_name(name: str) -> str:
    """The name in a checkpoint of a parameter."""
    path, _, last = name.rpartition(".")
    return f"{tap_path(path)}.{last}"
