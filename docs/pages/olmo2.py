"""OLMo 2 (Ai2): attention and MLP read the residual stream as it is, and what they add is normed; so are q and k.

    x = E[ids]
    per layer:  x = x + n( W_o attention(rope(n(W_q x)), rope(n(W_k x)), W_v x) )       n(W_q x): of all heads together
                x = x + n( W_d ( silu(W_g x) * W_u x ) )
    x = n(x);  logits = W_lm x                                    n: RMSNorm, each with its own weight

A page of one's own: `refllm check CHECKPOINT --page olmo2.py`. Shape suffixes: as in mistral.py. Source: Transformers,
models/olmo2; OLMo team 2024, "2 OLMo 2 Furious".
"""

from refllm.config import LlamaConfig
from refllm.config.traits import Traits

TRAITS = Traits("olmo2", "Olmo2")
# Its norms multiply by the weight in float32, before the only rounding, and its rotation is in float32 throughout.
NOT_ROUNDED = frozenset({"rms_norm.normalized", "rope.table", "rope.product"})


class Config(LlamaConfig):
    """Llama's keys; defaults of OLMo 2's code."""

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5


def tensors(c):
    """Name -> shape of every tensor of the backbone."""
    V, E, F, L = c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"embed_tokens.weight": (V, E)}
    for layer in (f"layers.{i}." for i in range(L)):
        shapes |= {
            layer + "self_attn.q_proj.weight": (Q, E),
            layer + "self_attn.k_proj.weight": (KV, E),
            layer + "self_attn.v_proj.weight": (KV, E),
            layer + "self_attn.o_proj.weight": (E, Q),
            layer + "self_attn.q_norm.weight": (Q,),
            layer + "self_attn.k_norm.weight": (KV,),
            layer + "post_attention_layernorm.weight": (E,),
            layer + "mlp.gate_proj.weight": (F, E),
            layer + "mlp.up_proj.weight": (F, E),
            layer + "mlp.down_proj.weight": (E, F),
            layer + "post_feedforward_layernorm.weight": (E,),
        }
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

    q_BSE = norm("self_attn.q_norm", linear("self_attn.q_proj", x_BSE))
    k_BSE = norm("self_attn.k_norm", linear("self_attn.k_proj", x_BSE))
    q_BHSD, k_BKSD = op.split_heads(q_BSE, c.num_attention_heads), op.split_heads(k_BSE, c.num_key_value_heads)
    v_BKSD = op.split_heads(linear("self_attn.v_proj", x_BSE), c.num_key_value_heads)
    q_BHSD, k_BKSD = op.rope(q_BHSD, k_BKSD, cos, sin, interleaved=False)
    q_BHSD, k_BKSD = op.tap("self_attn.q_rope", q_BHSD), op.tap("self_attn.k_rope", k_BKSD)
    k_BKTD, v_BKTD = cache.append(k_BKSD, v_BKSD)
    o_BHSD = op.tap("self_attn.context", op.attention(q_BHSD, k_BKTD, v_BKTD, **masking))
    a_BSE = norm("post_attention_layernorm", linear("self_attn.o_proj", op.merge_heads(o_BHSD)))
    x_BSE = op.tap("residual_mid", op.add(x_BSE, a_BSE))

    gate_BSF, up_BSF = linear("mlp.gate_proj", x_BSE), linear("mlp.up_proj", x_BSE)
    h_BSF = op.tap("mlp.act", op.glu(gate_BSF, up_BSF, c.hidden_act))
    return op.add(x_BSE, norm("post_feedforward_layernorm", linear("mlp.down_proj", h_BSF)))
