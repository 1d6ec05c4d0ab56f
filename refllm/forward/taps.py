"""The vocabulary of named values.

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
      .self_attn.q_norm, k_norm             [B, H, S, D]  norms of heads, or [B, S, H*D] of all (other families)
      .pre_, .post_feedforward_layernorm    [B, S, E]     norms before and after the MLP (other families)
    model.layers.{i}                        [B, S, E]     residual stream after the layer, before any norm
    model.norm                              [B, S, E]     after the final norm
    lm_head | score | qa_outputs            [B, S, n]     the head at every position

`hidden_states` of Transformers is not this vocabulary: its last entry is model.norm, and it lacks the last layer.
"""

import re
from typing import Any

from refllm.config import ModelConfig
from refllm.config.traits import traits_of

HEAD_TAPS = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
}


def axes_of_values(config: ModelConfig, head: str) -> dict[str, str]:
    """The name of every value of a model, in order of computation, and its axes: "B S E", "B S (H D)" for heads side by
    side, "B K S D" for key/value heads apart; T counts keys, C the outputs of a head."""
    c: Any = config
    found = {"model.embed_tokens": "B S E"}
    for layer in range(c.num_hidden_layers):
        found |= {f"model.layers.{layer}{suffix}": axes for suffix, axes in _of_a_layer(c)}
    found["model.norm"] = "B S E"
    last = HEAD_TAPS.get(head)
    if last is not None:
        found[last] = "B S V" if last == "lm_head" else "B S C"
    known = {"B", "S", "T", *sizes_of_axes(config, head)}
    return {name: axes for name, axes in found.items() if set(re.findall(r"\w", axes)) <= known}


def sizes_of_axes(config: ModelConfig, head: str) -> dict[str, int]:
    """How long the axes of `axes_of_values` are that do not depend on the tokens, as far as a config of any family says
    it by the usual names."""
    found = {axis: getattr(config, name) for axis, name in _SIZES.items() if hasattr(config, name)}
    return found | ({"C": 2} if head == "question_answering" else {})


_SIZES = {
    "E": "hidden_size",
    "F": "intermediate_size",
    "V": "vocab_size",
    "C": "num_labels",
    "H": "num_attention_heads",
    "K": "num_key_value_heads",
    "D": "head_dim",
}


def _of_a_layer(c: Any) -> list[tuple[str, str]]:
    """What follows the name of a layer, and the axes."""
    normed = [(f".self_attn.{x}_layernorm", f"B {heads} S D") for x, heads in (("q", "H"), ("k", "K"))]
    of_mlp = ("gate_proj", "up_proj", "act") if traits_of(c).gated else ("up_proj", "act")
    parallel = getattr(c, "use_parallel_residual", False)
    return [
        (".input_layernorm", "B S E"),
        (".self_attn.q_proj", "B S (H D)"),
        (".self_attn.k_proj", "B S (K D)"),
        (".self_attn.v_proj", "B S (K D)"),
        *(normed if getattr(c, "qk_layernorm", False) else []),
        (".self_attn.q_rope", "B H S D"),
        (".self_attn.k_rope", "B K S D"),
        (".self_attn.scores", "B H S T"),
        (".self_attn.probs", "B H S T"),
        (".self_attn.context", "B H S D"),
        (".self_attn.o_proj", "B S E"),
        (".residual_mid", "B S E"),
        *([] if parallel else [(".post_attention_layernorm", "B S E")]),
        *((f".mlp.{name}", "B S F") for name in of_mlp),
        (".mlp.down_proj", "B S E"),
        ("", "B S E"),
    ]
