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
    model.layers.{i}                        [B, S, E]     residual stream after the layer, before any norm
    model.norm                              [B, S, E]     after the final norm
    lm_head | score | qa_outputs            [B, S, n]     the head at every position

`hidden_states` of Transformers is not this vocabulary: its last entry is model.norm, and it lacks the last layer.
"""

HEAD_TAPS = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
}
