"""Names of intermediate values, and what an implementation must offer to be checked.

A tap is a named value of a forward pass. The names are the module paths of Transformers:

    model.embed_tokens   [B, S, E]  embeddings
    model.layers.{i}     [B, S, E]  residual stream after layer i, before any norm
    model.norm           [B, S, E]  after the final norm
    lm_head              [B, S, V]  logits (score: [B, C] or [B, S, C]; qa_outputs: [B, S, 2])

`hidden_states` of Transformers holds the embeddings, the residual stream after every layer but the last, and the value
after the final norm; the residual stream after the last layer is not in it, so it is no tap here.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Trace = dict[str, np.ndarray]

HEAD_TAP = {
    "base": None,
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
}


class Candidate(Protocol):
    """An implementation under test, ready to run (weights loaded)."""

    name: str

    def run(self, input_ids_BS: np.ndarray) -> Trace:
        """One forward pass without a cache over int64 token ids; every tap of `hidden_taps` plus the head's."""
        ...


def hidden_taps(num_layers: int) -> list[str]:
    """Tap names of `hidden_states`, in its order: num_layers + 1 of them."""
    return ["model.embed_tokens", *(f"model.layers.{i}" for i in range(num_layers - 1)), "model.norm"]


def trace_of(hidden_states: Sequence[np.ndarray], outputs: Any, head: str) -> Trace:
    """Names the `hidden_states` and the head's output of one forward pass.

    outputs: has the fields of the Transformers output of that head, as NumPy arrays.
    """
    trace = dict(zip(hidden_taps(len(hidden_states) - 1), hidden_states, strict=True))
    tap = HEAD_TAP[head]
    if head == "question_answering":
        trace["qa_outputs"] = np.stack([outputs.start_logits, outputs.end_logits], axis=-1)
    elif tap is not None:
        trace[tap] = outputs.logits
    return trace
