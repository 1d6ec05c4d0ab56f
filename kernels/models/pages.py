"""The forward pass of every family in fused operators. What it computes is defined by the page of the same family in
refllm/models; what differs is which steps are one kernel.

    Helium, Llama, Arcee    rms_norm_qkv_rope: norm, the three projections and the rotation are one kernel
    StableLM                add_layer_norm, one product for q, k and v, norm_rope where heads are normed, else rope
    all                     add_rms_norm / add_layer_norm: the residual sum and the norm after it are one kernel

Weights: "qkv" and "gate_up" are projections stored under each other (kernels/models/weights.py).
Shape suffixes as in the reference.
"""

from refllm.config.traits import traits_of


def forward(op, c, w, x_BSE, cos, sin, masking, cache):
    """Embeddings x_BSE -> the last hidden state x_BSE, after the final norm."""
    block = layer_norm_block if traits_of(c).layer_norm else rms_norm_block
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        x_BSE = op.tap(layer, block(op.within(layer), c, w.layer(i), x_BSE, cos, sin, masking, cache.layer(i)))
    return op.tap("model.norm", _final_norm(op, c, w, x_BSE))


def rms_norm_block(op, c, w, x_BSE, cos, sin, masking, cache):
    """One decoder layer of Helium, Llama or Arcee, residual stream in and out."""
    q_BHSD, k_BKSD, v_BKSD = op.rms_norm_qkv_rope(
        x_BSE,
        w["input_layernorm.weight"],
        w["self_attn.qkv.weight"],
        w.get("self_attn.qkv.bias"),
        cos,
        sin,
        c.rms_norm_eps,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        interleaved=traits_of(c).interleaved,
        cache=cache.slots(),
    )
    a_BSE = _attend(op, w, q_BHSD, k_BKSD, v_BKSD, masking, cache)
    b_BSE, x_BSE = op.add_rms_norm(a_BSE, x_BSE, w["post_attention_layernorm.weight"], c.rms_norm_eps)
    op.tap("residual_mid", x_BSE)
    op.tap("post_attention_layernorm", b_BSE)
    mlp = gated_mlp if traits_of(c).gated else ungated_mlp
    return op.add(x_BSE, mlp(op, c, w, b_BSE))


def layer_norm_block(op, c, w, x_BSE, cos, sin, masking, cache):
    """One decoder layer of StableLM, residual stream in and out."""
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    n_BSE = op.layer_norm(x_BSE, w["input_layernorm.weight"], w["input_layernorm.bias"], c.layer_norm_eps)
    op.tap("input_layernorm", n_BSE)
    qkv_BSHD = op.linear(n_BSE, w["self_attn.qkv.weight"], w.get("self_attn.qkv.bias")).unflatten(-1, (H + 2 * K, D))
    q_BHSD, k_BKSD, v_BKSD = qkv_BSHD.transpose(1, 2).split((H, K, K), dim=1)
    for name, x_BNSD in (("q", q_BHSD), ("k", k_BKSD)):
        op.tap(f"self_attn.{name}_proj", op.merged(x_BNSD))
    if c.qk_layernorm:
        q_weight, k_weight = w["self_attn.q_layernorm.weight"], w["self_attn.k_layernorm.weight"]
        q_BHSD, k_BKSD = op.norm_rope(
            q_BHSD, k_BKSD, q_weight, k_weight, cos, sin, c.layer_norm_eps, norm="layer", interleaved=False
        )
    else:
        q_BHSD, k_BKSD = op.rope(q_BHSD, k_BKSD, cos, sin, interleaved=False)
    a_BSE = _attend(op, w, q_BHSD, k_BKSD, v_BKSD, masking, cache)
    if c.use_parallel_residual:
        b_BSE, x_BSE = n_BSE, op.add(x_BSE, a_BSE)
    else:
        weight, bias = w["post_attention_layernorm.weight"], w["post_attention_layernorm.bias"]
        b_BSE, x_BSE = op.add_layer_norm(a_BSE, x_BSE, weight, bias, c.layer_norm_eps)
        op.tap("post_attention_layernorm", b_BSE)
    op.tap("residual_mid", x_BSE)
    return op.add(x_BSE, gated_mlp(op, c, w, b_BSE))


def _attend(op, w, q_BHSD, k_BKSD, v_BKSD, masking, cache):
    """Rotated heads -> what attention adds to the residual stream [B, S, E]."""
    op.tap("self_attn.q_rope", q_BHSD)
    op.tap("self_attn.k_rope", k_BKSD)
    op.tap("self_attn.v_proj", op.merged(v_BKSD))
    o_BHSD = op.tap("self_attn.context", cache.attend(op, q_BHSD, k_BKSD, v_BKSD, masking))
    a_BSE = op.linear(op.merged(o_BHSD), w["self_attn.o_proj.weight"], w.get("self_attn.o_proj.bias"))
    return op.tap("self_attn.o_proj", a_BSE)


def gated_mlp(op, c, w, b_BSE):
    """down(act(gate(b)) * up(b))"""
    gate_BSF, up_BSF = op.gate_and_up(b_BSE, w)
    op.tap("mlp.gate_proj", gate_BSF)
    op.tap("mlp.up_proj", up_BSF)
    h_BSF = op.tap("mlp.act", op.glu(gate_BSF, up_BSF, c.hidden_act))
    return op.tap("mlp.down_proj", op.linear(h_BSF, w["mlp.down_proj.weight"], w.get("mlp.down_proj.bias")))


def ungated_mlp(op, c, w, b_BSE):
    """down(act(up(b)))"""
    up_BSF = op.tap("mlp.up_proj", op.linear(b_BSE, w["mlp.up_proj.weight"], w.get("mlp.up_proj.bias")))
    h_BSF = op.tap("mlp.act", op.activation(up_BSF, c.hidden_act))
    return op.tap("mlp.down_proj", op.linear(h_BSF, w["mlp.down_proj.weight"], w.get("mlp.down_proj.bias")))


def _final_norm(op, c, w, x_BSE):
    if traits_of(c).layer_norm:
        return op.layer_norm(x_BSE, w["norm.weight"], w["norm.bias"], c.layer_norm_eps)
    return op.rms_norm(x_BSE, w["norm.weight"], c.rms_norm_eps)
