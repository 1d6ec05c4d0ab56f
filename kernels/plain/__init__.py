"""The operators in plain Torch: short, on any device, with the names, signatures and checks of the Triton forms."""

from refllm.kernels.plain.activation import relu2, swiglu
from refllm.kernels.plain.attention import attention, decode_attention
from refllm.kernels.plain.loss import cross_entropy, linear_cross_entropy
from refllm.kernels.plain.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from refllm.kernels.plain.rope import norm_rope, rms_norm_qkv_rope, rope

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "decode_attention",
    "layer_norm",
    "linear_cross_entropy",
    "norm_rope",
    "relu2",
    "rms_norm",
    "rms_norm_qkv_rope",
    "rope",
    "swiglu",
]
