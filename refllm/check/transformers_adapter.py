"""Hugging Face Transformers as a candidate. Needs the packages `torch` and `transformers`."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.taps import Trace, trace_of
from refllm.errors import InputError

_AUTO_CLASS = {
    "base": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


def require_transformers() -> None:
    """Raises InputError, naming the command that helps, if Torch or Transformers is not installed."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        missing = error.name or "transformers"
        raise InputError(
            f"this needs the package {missing}, which is not installed: pip install 'refllm[witness]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class TransformersCandidate:
    """Transformers' own forward pass of a checkpoint.

    dtype: of weights and activations. attention: Transformers' `attn_implementation`; "eager" is the one whose
    rounding points are written down, "sdpa" is fused.
    """

    def __init__(self, folder: Path, *, head: str, dtype: str, attention: str = "eager") -> None:
        require_transformers()
        import torch
        import transformers

        self.name = f"transformers {transformers.__version__} {attention}"
        self.head = head
        auto_class = getattr(transformers, _AUTO_CLASS[head])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = auto_class.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
            ).eval()

    def run(self, input_ids_BS: np.ndarray) -> Trace:
        """See `Candidate.run`. Values of bfloat16 and float16 come back as float32, unchanged."""
        import torch

        with torch.inference_mode():
            outputs = self.model(
                input_ids=torch.from_numpy(np.asarray(input_ids_BS, dtype=np.int64)),
                use_cache=False,
                output_hidden_states=True,
            )
        for field in ("logits", "start_logits", "end_logits"):
            if getattr(outputs, field, None) is not None:
                setattr(outputs, field, _numpy(getattr(outputs, field)))
        return trace_of([_numpy(value) for value in outputs.hidden_states], outputs, self.head)


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
