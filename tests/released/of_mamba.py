"""mamba: its repository on the path, as its package wants to be compiled."""

from wrapping import checkout, released

NAME, VERSION = "mamba", checkout("mamba", "mamba_ssm")

from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn  # noqa: E402
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # noqa: E402


@released(NAME, "rms_norm", "rms_norm_fn", without="empty")
def rms_norm(x, weight, eps):
    return rms_norm_fn(x, weight, None, eps=eps)


@released(NAME, "rms_norm", "layernorm_gated.rmsnorm_fn", without="empty")
def gated_rms_norm(x, weight, eps):
    return rmsnorm_fn(x, weight, None, eps=eps)


@released(NAME, "add_layer_norm", "layer_norm_fn(residual=...)", without="empty")
def add_layer_norm(x, residual, weight, bias, eps):
    return layer_norm_fn(x, weight, bias, residual, eps=eps, prenorm=True)
