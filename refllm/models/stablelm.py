"""StableLM (Stability AI): LayerNorm, partial half-split RoPE, per-head norm, parallel residual, gated SiLU MLP.

    x = E[ids]
    per layer:  x = x + W_o attention(rope(h(W_q n(x))), rope(h(W_k n(x))), W_v n(x))
                x = x + W_d ( silu(W_g n(x)) * W_u n(x) )         parallel residual: both n(x) are of the first x
    x = n(x);  logits = W_lm x                                    n: LayerNorm, each with its own weight and bias
                                                                  h: LayerNorm per head (qk_layernorm), no bias

Shape suffixes: B batch, S queries, T keys, E hidden_size, F intermediate_size, H query heads, K key/value heads,
D head_dim, R rotary dims (here R = int(D * partial_rotary_factor)). Source: Transformers, models/stablelm; Bellagente
et al. 2024, "Stable LM 2 1.6B Technical Report".
"""

import numpy as np

# Where this family's Transformers code does not round although the policy would: nowhere. LayerNorm is one kernel,
# which works in float32 and rounds once.
NOT_ROUNDED: frozenset[str] = frozenset()


def tensors(c):
    """Name -> shape of every tensor of the backbone."""
    V, E, F, L = c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"embed_tokens.weight": (V, E)}
    for layer in (f"layers.{i}." for i in range(L)):
        shapes |= {
            layer + "input_layernorm.weight": (E,),
            layer + "input_layernorm.bias": (E,),
            layer + "self_attn.q_proj.weight": (Q, E),
            layer + "self_attn.k_proj.weight": (KV, E),
            layer + "self_attn.v_proj.weight": (KV, E),
            layer + "self_attn.o_proj.weight": (E, Q),
            layer + "mlp.gate_proj.weight": (F, E),
            layer + "mlp.up_proj.weight": (F, E),
            layer + "mlp.down_proj.weight": (E, F),
        }
        if not c.use_parallel_residual:
            shapes |= {layer + f"post_attention_layernorm.{name}": (E,) for name in ("weight", "bias")}
        if c.use_qkv_bias:  # q, k and v; o_proj never has a bias here
            shapes |= {layer + f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", Q), ("k", KV), ("v", KV))}
        if c.qk_layernorm:  # one tensor per head
            heads = (("q", c.num_attention_heads), ("k", c.num_key_value_heads))
            shapes |= {
                layer + f"self_attn.{name}_layernorm.norms.{j}.weight": (c.head_dim,)
                for name, n in heads
                for j in range(n)
            }
    return shapes | {"norm.weight": (E,), "norm.bias": (E,)}


def forward(op, c, w, x_BSE, cos, sin, masking, cache):
    """Embeddings x_BSE -> the last hidden state x_BSE, after the final norm."""
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        x_BSE = op.tap(layer, block(op.within(layer), c, w.layer(i), x_BSE, cos, sin, masking, cache.layer(i)))
    return op.tap("model.norm", op.layer_norm(x_BSE, w["norm.weight"], w["norm.bias"], c.layer_norm_eps))


def block(op, c, w, x_BSE, cos, sin, masking, cache):
    """One decoder layer, residual stream in and out. w: its tensors; cache: its keys and values."""

    def linear(name, x):
        return op.tap(name, op.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")))

    def norm(name, x):
        return op.tap(name, op.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.layer_norm_eps))

    def per_head_norm(name, x_BNSD):  # N heads, of queries or of keys
        w_N1D = np.stack([w[f"{name}.norms.{j}.weight"] for j in range(x_BNSD.shape[1])])[:, None, :]
        return op.tap(name, op.layer_norm(x_BNSD, w_N1D, None, c.layer_norm_eps))

    # Attention
    a_BSE = norm("input_layernorm", x_BSE)
    q_BHSD = op.split_heads(linear("self_attn.q_proj", a_BSE), c.num_attention_heads)
    k_BKSD = op.split_heads(linear("self_attn.k_proj", a_BSE), c.num_key_value_heads)
    v_BKSD = op.split_heads(linear("self_attn.v_proj", a_BSE), c.num_key_value_heads)
    if c.qk_layernorm:
        q_BHSD = per_head_norm("self_attn.q_layernorm", q_BHSD)
        k_BKSD = per_head_norm("self_attn.k_layernorm", k_BKSD)
    q_BHSD, k_BKSD = op.rope(q_BHSD, k_BKSD, cos, sin, interleaved=False)
    q_BHSD, k_BKSD = op.tap("self_attn.q_rope", q_BHSD), op.tap("self_attn.k_rope", k_BKSD)
    k_BKTD, v_BKTD = cache.append(k_BKSD, v_BKSD)
    o_BHSD = op.tap("self_attn.context", op.attention(q_BHSD, k_BKTD, v_BKTD, **masking))
    x_BSE = op.tap("residual_mid", op.add(x_BSE, linear("self_attn.o_proj", op.merge_heads(o_BHSD))))

    # MLP
    b_BSE = a_BSE if c.use_parallel_residual else norm("post_attention_layernorm", x_BSE)
    gate_BSF, up_BSF = linear("mlp.gate_proj", b_BSE), linear("mlp.up_proj", b_BSE)
    h_BSF = op.tap("mlp.act", op.glu(gate_BSF, up_BSF, c.hidden_act))
    return op.add(x_BSE, linear("mlp.down_proj", h_BSF))
