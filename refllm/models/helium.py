"""Helium (Kyutai): RMSNorm, interleaved RoPE, grouped-query attention, gated SiLU MLP.

    x = E[ids]
    per layer:  x = x + W_o attention(rope(W_q n(x)), rope(W_k n(x)), W_v n(x))
                x = x + W_d ( silu(W_g n(x)) * W_u n(x) )
    x = n(x);  logits = W_lm x                                    n: RMSNorm, each with its own weight

Shape suffixes: B batch, S queries, T keys, E hidden_size, F intermediate_size, H query heads, K key/value heads,
D head_dim, R rotary dims (here R = D). Source: Transformers, models/helium; Kyutai, "Helium 1" (2025).
"""

# Where this family's Transformers code does not round although the policy would: the norm's weight is multiplied in
# float32, before the only rounding. (Llama and Arcee round first.)
NOT_ROUNDED = frozenset({"rms_norm.normalized"})


def tensors(c):
    """Name -> shape of every tensor of the backbone."""
    V, E, F, L = c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"embed_tokens.weight": (V, E)}
    for layer in (f"layers.{i}." for i in range(L)):
        shapes |= {
            layer + "input_layernorm.weight": (E,),
            layer + "self_attn.q_proj.weight": (Q, E),
            layer + "self_attn.k_proj.weight": (KV, E),
            layer + "self_attn.v_proj.weight": (KV, E),
            layer + "self_attn.o_proj.weight": (E, Q),
            layer + "post_attention_layernorm.weight": (E,),
            layer + "mlp.gate_proj.weight": (F, E),
            layer + "mlp.up_proj.weight": (F, E),
            layer + "mlp.down_proj.weight": (E, F),
        }
        if c.attention_bias:  # q, k and v; o_proj never has a bias here
            shapes |= {layer + f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", Q), ("k", KV), ("v", KV))}
        if c.mlp_bias:
            shapes |= {layer + f"mlp.{name}_proj.bias": (n,) for name, n in (("gate", F), ("up", F), ("down", E))}
    return shapes | {"norm.weight": (E,)}


def forward(op, c, w, x_BSE, cos, sin, masking, cache):
    """Embeddings x_BSE -> the last hidden state x_BSE, after the final norm."""
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        x_BSE = op.tap(layer, block(op.within(layer), c, w.layer(i), x_BSE, cos, sin, masking, cache.layer(i)))
    return op.tap("model.norm", op.rms_norm(x_BSE, w["norm.weight"], c.rms_norm_eps))


def block(op, c, w, x_BSE, cos, sin, masking, cache):
    """One decoder layer, residual stream in and out. w: its tensors; cache: its keys and values."""

    def linear(name, x):
        return op.tap(name, op.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")))

    def norm(name, x):
        return op.tap(name, op.rms_norm(x, w[f"{name}.weight"], c.rms_norm_eps))

    # Attention
    a_BSE = norm("input_layernorm", x_BSE)
    q_BHSD = op.split_heads(linear("self_attn.q_proj", a_BSE), c.num_attention_heads)
    k_BKSD = op.split_heads(linear("self_attn.k_proj", a_BSE), c.num_key_value_heads)
    v_BKSD = op.split_heads(linear("self_attn.v_proj", a_BSE), c.num_key_value_heads)
    q_BHSD, k_BKSD = op.rope(q_BHSD, k_BKSD, cos, sin, interleaved=True)
    q_BHSD, k_BKSD = op.tap("self_attn.q_rope", q_BHSD), op.tap("self_attn.k_rope", k_BKSD)
    k_BKTD, v_BKTD = cache.append(k_BKSD, v_BKSD)
    o_BHSD = op.tap("self_attn.context", op.attention(q_BHSD, k_BKTD, v_BKTD, **masking))
    x_BSE = op.tap("residual_mid", op.add(x_BSE, linear("self_attn.o_proj", op.merge_heads(o_BHSD))))

    # MLP
    b_BSE = norm("post_attention_layernorm", x_BSE)
    gate_BSF, up_BSF = linear("mlp.gate_proj", b_BSE), linear("mlp.up_proj", b_BSE)
    h_BSF = op.tap("mlp.act", op.glu(gate_BSF, up_BSF, c.hidden_act))
    return op.add(x_BSE, linear("mlp.down_proj", h_BSF))
