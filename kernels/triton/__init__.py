"""The operators as Triton kernels: one file per kernel, from the formula at its top to the launch at its end."""

import importlib

from refllm.kernels.triton.attention import attention
from refllm.kernels.triton.cross_entropy import cross_entropy
from refllm.kernels.triton.decode_attention import decode_attention
from refllm.kernels.triton.layer_norm import add_layer_norm, layer_norm
from refllm.kernels.triton.linear_cross_entropy import linear_cross_entropy
from refllm.kernels.triton.norm_rope import norm_rope
from refllm.kernels.triton.relu2 import relu2
from refllm.kernels.triton.rms_norm import add_rms_norm, rms_norm
from refllm.kernels.triton.rms_norm_qkv_rope import rms_norm_qkv_rope
from refllm.kernels.triton.rope import rope
from refllm.kernels.triton.swiglu import swiglu

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

# By import_module, because the function rms_norm hides the module of that name in this package.
KERNELS = tuple(
    importlib.import_module(f"{__name__}.{name}")
    for name in (
        "rms_norm",
        "layer_norm",
        "rope",
        "norm_rope",
        "swiglu",
        "relu2",
        "rms_norm_qkv_rope",
        "attention",
        "decode_attention",
        "cross_entropy",
        "linear_cross_entropy",
    )
)
"""The kernel files; each yields its shipped configurations from `launches(target)`."""
