"""The definitions: one pure function of arrays per operator. What they compute is what every kernel must compute.

Called directly they are exact: inputs are taken as float64 and nothing is rounded. Called with `ar=` (a
`refllm.precision.Arithmetic`) they emulate another precision. Model pages call them through
`refllm.forward.operators.Operators`, which fixes `ar` once.

Shape suffixes name the axes: B batch, S query positions, T key positions, E hidden_size, F intermediate_size, H query
heads, K key/value heads, D head_dim, R rotary dims, V vocabulary, L layers, C classes, N rows of any kind.
"""

from refllm.ops.activation import ACTIVATIONS, activation, glu, relu2, swiglu
from refllm.ops.attention import attention, decode_attention, softmax
from refllm.ops.linear import add, embedding, linear, merge_heads, split_heads
from refllm.ops.loss import (
    IGNORE_INDEX,
    binary_cross_entropy,
    cross_entropy,
    linear_cross_entropy,
    mean_squared_error,
)
from refllm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from refllm.ops.rope import norm_rope, rms_norm_qkv_rope, rope

__all__ = [
    "ACTIVATIONS",
    "IGNORE_INDEX",
    "activation",
    "add",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "binary_cross_entropy",
    "cross_entropy",
    "decode_attention",
    "embedding",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mean_squared_error",
    "merge_heads",
    "norm_rope",
    "relu2",
    "rms_norm",
    "rms_norm_qkv_rope",
    "rope",
    "softmax",
    "split_heads",
    "swiglu",
]
