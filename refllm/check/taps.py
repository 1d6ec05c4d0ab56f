"""The vocabulary of named values, and what an implementation must offer to be checked.

A tap is a named value of a forward pass. Names are the module paths of Transformers plus the value; `{i}` is the layer.

    model.embed_tokens                      [B, S, E]     embeddings
    model.layers.{i}.input_layernorm        [B, S, E]     norm before attention
      .self_attn.q_proj, k_proj, v_proj     [B, S, H*D]   projections, bias included, not yet split into heads
      .self_attn.q_layernorm, k_layernorm   [B, H, S, D]  per-head norms (StableLM)
      .self_attn.q_rope, k_rope             [B, H, S, D]  rotated heads; only the first R dims are needed
      .self_attn.scores                     [B, H, S, T]  scaled, before the mask
      .self_attn.probs                      [B, H, S, T]  softmax weights, normalised
      .self_attn.context                    [B, H, S, D]  weights times values, before o_proj
      .self_attn.o_proj                     [B, S, E]     attention's contribution to the residual stream
      .residual_mid                         [B, S, E]     residual stream after that contribution was added
      .post_attention_layernorm             [B, S, E]     norm before the MLP (not with a parallel residual)
      .mlp.gate_proj, up_proj               [B, S, F]
      .mlp.act                              [B, S, F]     what down_proj receives: act(gate) * up, or act(up)
      .mlp.down_proj                        [B, S, E]     the MLP's contribution to the residual stream
    model.layers.{i}                        [B, S, E]     residual stream after the layer, before any norm
    model.norm                              [B, S, E]     after the final norm
    lm_head | score | qa_outputs            [B, S, n]     the head at every position

`hidden_states` of Transformers is not this vocabulary: its last entry is model.norm, and it lacks the last layer.
Rows of padding are not compared, whatever they hold.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from refllm.check.inputs import Inputs
from refllm.inputs import to_numpy

Sink = Callable[[str, Any], None]
"""Takes a tap's name and its value: an array, or a tensor of Torch on any device."""

HEAD_TAPS = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
}


class Candidate(Protocol):
    """An implementation under test, ready to run (weights loaded).

    name: for reports. dtype: of its weights and activations. details: versions and settings worth keeping.
    """

    name: str
    dtype: str
    details: dict[str, str]

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """Feed `inputs` and hand every value that it can name to sink, in order of computation.

        Where `inputs.chunks` says so, the pieces are fed one after another with a cache; sink then sees each name once
        per piece.
        """
        ...


def as_array(value: Any) -> np.ndarray:
    """A copy of a tap's value as NumPy; narrow formats become float32, which holds them exactly."""
    array = np.array(to_numpy(value))
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
