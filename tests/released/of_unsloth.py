"""Unsloth: its repository on the path, beside `pip install --no-deps unsloth_zoo`."""

import os
import tempfile

from wrapping import and_gradients, checkout, released

os.environ["UNSLOTH_IS_PRESENT"] = "1"
os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()  # it would write into the working directory
NAME, VERSION = "Unsloth", checkout("unsloth", "unsloth", "unsloth.kernels")

from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm  # noqa: E402
from unsloth.kernels.rope_embedding import fast_rope_embedding  # noqa: E402
from unsloth.kernels.swiglu import swiglu_fg_kernel  # noqa: E402


@and_gradients()
@released(NAME, "rms_norm", "Fast_RMS_Layernorm")
def rms_norm(x, weight, eps):
    return Fast_RMS_Layernorm.apply(x, weight, eps)


@released(NAME, "swiglu", "swiglu_fg_kernel", without="row_axes")
def swiglu(gate, up):
    return swiglu_fg_kernel(gate[None], up[None])[0]


@and_gradients()
@released(NAME, "rope", "fast_rope_embedding", without=("interleaved", "tables_per_row", "partial_rotation"))
def rope(q, k, cos, sin, *, interleaved):
    q, k = q.clone(), k.clone()  # it may write over them
    return fast_rope_embedding(q, k, cos.repeat(1, 2), sin.repeat(1, 2))
