"""flash-linear-attention: `pip install flash-linear-attention`."""

from fla.modules.activations.ops import SwiGLUFunction
from fla.modules.fused_cross_entropy.ops import cross_entropy_loss
from fla.modules.fused_linear_cross_entropy.ops import fused_linear_cross_entropy_loss
from fla.modules.norm import layernorm
from fla.modules.rotary.ops import rotary_embedding
from fla.ops.attn.parallel import parallel_attn
from wrapping import and_gradients, installed, released

NAME, VERSION = "flash-linear-attention", installed("fla-core", "flash-linear-attention")


@and_gradients()
@released(NAME, "rms_norm", "rms_norm")
def rms_norm(x, weight, eps):
    return layernorm.rms_norm(x, weight, None, eps=eps)


@and_gradients()
@released(NAME, "layer_norm", "layer_norm")
def layer_norm(x, weight, bias, eps):
    return layernorm.layer_norm(x, weight, bias, eps=eps)


@and_gradients()
@released(NAME, "add_rms_norm", "rms_norm(residual=...)")
def add_rms_norm(x, residual, weight, eps):
    return layernorm.rms_norm(x, weight, None, residual, eps, True)


@and_gradients()
@released(NAME, "add_layer_norm", "layer_norm(residual=...)")
def add_layer_norm(x, residual, weight, bias, eps):
    return layernorm.layer_norm(x, weight, bias, residual, eps, True)


@and_gradients()
@released(NAME, "rope", "rotary_embedding", without=("tables_per_row", "mixed_dtypes"))
def rope(q, k, cos, sin, *, interleaved):
    return tuple(rotary_embedding(x.transpose(1, 2), cos, sin, interleaved).transpose(1, 2) for x in (q, k))


@and_gradients()
@released(NAME, "swiglu", "SwiGLUFunction")
def swiglu(gate, up):
    return SwiGLUFunction.apply(gate, up)


@and_gradients()
@released(NAME, "cross_entropy", "cross_entropy_loss")
def cross_entropy(logits, labels, *, ignore_index=-100, reduction="mean"):
    each = cross_entropy_loss(logits, labels, ignore_index=ignore_index)[0]
    return each if reduction == "none" else each.sum() / (1 if reduction == "sum" else (labels != ignore_index).sum())


_OFFERS = ("reduction", "empty", "nothing_counted")


@and_gradients()
@released(NAME, "linear_cross_entropy", "fused_linear_cross_entropy_loss", without=_OFFERS)
def linear_cross_entropy(x, weight, labels, *, ignore_index=-100, reduction="mean"):
    return fused_linear_cross_entropy_loss(x, labels, weight, ignore_index=ignore_index, reduction=reduction)


@and_gradients()
@released(NAME, "attention", "parallel_attn", without=("key_mask", "return_lse", "causal"), sizes="S==T")
def attention(q, k, v, *, scale=None, causal=True):
    return parallel_attn(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)
