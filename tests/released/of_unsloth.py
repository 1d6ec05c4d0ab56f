"""Unsloth: its repository on the path, beside `pip install --no-deps unsloth_zoo`."""

import os

from wrapping import checkout, released

os.environ["UNSLOTH_IS_PRESENT"] = "1"
NAME, VERSION = "Unsloth", checkout("unsloth", "unsloth", "unsloth.kernels")

from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm  # noqa: E402
from unsloth.kernels.rope_embedding import fast_rope_embedding  # noqa: E402
from unsloth.kernels.swiglu import swiglu_fg_kernel  # noqa: E402


@released(NAME, "rms_norm", "Fast_RMS_Layernorm")
def rms_norm(x, weight, eps):
    return Fast_RMS_Layernorm.apply(x, weight, eps)


@released(NAME, "swiglu", "swiglu_fg_kernel")
def swiglu(gate, up):
    return swiglu_fg_kernel(gate, up)


@released(NAME, "rope", "fast_rope_embedding", without=("interleaved", "tables_per_row", "partial_rotation"))
def rope(q, k, cos, sin, *, interleaved):
    return fast_rope_embedding(q, k, cos.repeat(1, 2), sin.repeat(1, 2))
