"""flash-attention's Triton operators: its repository on the path, as its package wants to be compiled."""

from wrapping import and_gradients, checkout, released

NAME, VERSION = "flash-attention", checkout("flash-attention", "flash_attn")

from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # noqa: E402
from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn  # noqa: E402
from flash_attn.ops.triton.rotary import apply_rotary  # noqa: E402


@and_gradients()
@released(NAME, "rms_norm", "rms_norm_fn", without="empty")
def rms_norm(x, weight, eps):
    return rms_norm_fn(x, weight, None, eps=eps)


@and_gradients()
@released(NAME, "layer_norm", "layer_norm_fn", without="empty")
def layer_norm(x, weight, bias, eps):
    return layer_norm_fn(x, weight, bias, eps=eps)


@and_gradients()
@released(NAME, "add_rms_norm", "rms_norm_fn(residual=...)", without="empty")
def add_rms_norm(x, residual, weight, eps):
    return rms_norm_fn(x, weight, None, residual, eps=eps, prenorm=True)


@released(NAME, "rope", "apply_rotary", without="tables_per_row")
def rope(q, k, cos, sin, *, interleaved):
    return tuple(apply_rotary(x.transpose(1, 2), cos, sin, interleaved=interleaved).transpose(1, 2) for x in (q, k))


@and_gradients()
@released(NAME, "cross_entropy", "cross_entropy_loss")
def cross_entropy(logits, labels, *, ignore_index=-100, reduction="mean"):
    each = cross_entropy_loss(logits, labels, ignore_index=ignore_index)[0]
    return each if reduction == "none" else each.sum() / (1 if reduction == "sum" else (labels != ignore_index).sum())
