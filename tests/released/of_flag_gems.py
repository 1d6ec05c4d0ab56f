"""FlagGems: `pip install --no-deps flag-gems` (it pins an older NumPy); GEMS_VENDOR says which GPU it is for."""

import os

from wrapping import and_gradients, installed, released

os.environ.setdefault("GEMS_VENDOR", "nvidia")

import flag_gems

NAME, VERSION = "FlagGems", installed("flag-gems")


@and_gradients()
@released(NAME, "rms_norm", "rms_norm")
def rms_norm(x, weight, eps):
    return flag_gems.rms_norm(x, x.shape[-1:], weight, eps)


@released(NAME, "layer_norm", "layer_norm")
def layer_norm(x, weight, bias, eps):
    return flag_gems.layer_norm(x, x.shape[-1:], weight, bias, eps)[0]


@released(NAME, "add_rms_norm", "fused_add_rms_norm")
def add_rms_norm(x, residual, weight, eps):
    y, total = x.clone(), residual.clone()  # both are written over
    flag_gems.fused_add_rms_norm(y, total, x.shape[-1:], weight, eps)
    return y, total


@and_gradients()
@released(NAME, "swiglu", "silu_and_mul")
def swiglu(gate, up):
    return flag_gems.silu_and_mul(gate, up)


@released(NAME, "rope", "apply_rotary_pos_emb", without=("tables_per_row", "partial_rotation", "strides"))
def rope(q, k, cos, sin, *, interleaved):
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    rotated = flag_gems.apply_rotary_pos_emb(q, k, cos, sin, None, interleaved)
    return tuple(x.transpose(1, 2) for x in rotated)


@released(NAME, "cross_entropy", "cross_entropy_loss", convention="torch")
def cross_entropy(logits, labels, *, ignore_index=-100, reduction="mean"):
    return flag_gems.cross_entropy_loss(logits, labels, None, reduction, ignore_index)
