"""Gradients with one fault each, and right ones as people write them: what the search for gradients is asked about."""

import torch
import torch.nn.functional as F

from refllm.kernels import plain


def no_second_term(dy, x, weight, eps):
    """A norm's gradient without the term that takes away what lies along x."""
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    dweight = (dy.float() * n).reshape(-1, x.shape[-1]).sum(0)
    return (r * weight.float() * dy.float()).to(x.dtype), dweight.to(weight.dtype)


def not_linear(dy, x, weight, eps):
    dx, dweight = plain.rms_norm_backward(dy, x, weight, eps)
    return (dx.float() * (1 + 0.1 * dy.float())).to(dx.dtype), dweight


def read_as_dense(dy, x, weight, eps):
    """dy by the strides that it would have if it were dense."""
    strides = torch.empty(dy.shape).stride()
    last = sum((n - 1) * s for n, s in zip(dy.shape, strides, strict=True)) if dy.numel() else -1
    enough = dy.untyped_storage().nbytes() > (dy.storage_offset() + last) * dy.element_size()
    return plain.rms_norm_backward(dy.as_strided(dy.shape, strides) if enough else dy, x, weight, eps)


def last_row_of_many_left_out(dy, x, weight, eps):
    dx, dweight = plain.rms_norm_backward(dy, x, weight, eps)
    if x.ndim == 2 and len(x) > 1:
        dweight = plain.rms_norm_backward(dy[:-1], x[:-1], weight, eps)[1]
    return dx, dweight


def writes_into_the_gradient(dy, x, weight, eps):
    dx, dweight = plain.rms_norm_backward(dy, x, weight, eps)
    if dy.numel() and all(dy.stride()):
        dy.copy_(dx)
    return dx, dweight


def nothing_for_the_weight(dy, x, weight, eps):
    return plain.rms_norm_backward(dy, x, weight, eps)[0], None


def workspace_not_written(dy, x, weight, eps):
    dx, dweight = plain.rms_norm_backward(dy, x, weight, eps)
    out = torch.empty_like(dweight)
    out[: len(out) // 2 * 2] = dweight[: len(out) // 2 * 2]
    return dx, out


def other_bits_each_time(dy, x, weight, eps):
    dx, dweight = plain.rms_norm_backward(dy, x, weight, eps)
    return dx, (dweight.float() * (1 + 0.002 * torch.rand(dweight.shape))).to(dweight.dtype)


def masked_keys_have_a_gradient(do, q, k, v, o=None, lse=None, *, key_mask=None, **how):
    dq, dk, dv = plain.attention_backward(do, q, k, v, o, lse, key_mask=key_mask, **how)
    return dq, dk if key_mask is None else dk + 0.01 * (~key_mask)[:, None, :, None].to(dk.dtype), dv


def sum_in_the_narrow_format(dy, ids, weight):
    """torch's CPU kernel, which adds one after the other in the format of the table."""
    return torch.ops.aten.embedding_dense_backward(dy, ids, len(weight), -1, False)


def first_gradient_for_all(dloss, logits, labels, **how):
    return plain.cross_entropy_backward(dloss.reshape(-1)[:1].expand(labels.shape) if dloss.ndim else dloss, logits,
                                        labels, **how)  # fmt: skip


def no_gradient_of_the_loss(dloss, logits, labels, **how):
    return plain.cross_entropy_backward(torch.ones_like(dloss), logits, labels, **how)


# ----------------------------------------------------------------------------------------------- forward, by autograd


def eager_rms_norm(x, weight, eps):
    """As Transformers writes it."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (weight * y.to(x.dtype)).to(x.dtype)


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def cross_entropy(logits, labels, **how):
    return F.cross_entropy(logits, labels, **how)


def swiglu(gate, up):
    return F.silu(gate) * up


def eager_attention(q, k, v, *, scale=None, causal=True, key_mask=None, return_lse=False):
    g, (S, T) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    scores = (q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)).float()
    seen = torch.ones(S, T, dtype=torch.bool).tril(T - S) if causal else torch.ones(S, T, dtype=torch.bool)
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    o = torch.softmax(scores, -1).to(q.dtype) @ v
    return (o, torch.logsumexp(scores, -1)) if return_lse else o


def detached(x, weight, eps):
    return eager_rms_norm(x, weight.detach(), eps)


def forgets_where_gate_is_up(gate, up):
    return F.silu(gate) * (up.detach() if gate is up else up)


def other_state_when_run_again(gate, up):
    again = torch._C._current_graph_task_id() != -1
    return F.silu(gate) * (1.5 * up if again else up)


class _Overwrites(torch.autograd.Function):
    """relu2, whose backward pass writes into what the forward pass kept."""

    @staticmethod
    def forward(ctx, x):
        kept = torch.relu(x)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    def backward(ctx, dy):
        (kept,) = ctx.saved_tensors
        return kept.mul_(2 * dy).clone()


def overwrites_what_it_kept(x):
    return _Overwrites.apply(x)


class _Linear(torch.autograd.Function):
    """A product that does not ask who needs a gradient, or asks for the wrong tensor."""

    @staticmethod
    def forward(ctx, x, weight, bias, asks):
        ctx.save_for_backward(x, weight)
        ctx.asks, ctx.with_bias = asks, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, given = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        wanted = ctx.needs_input_grad[0] if ctx.asks else True
        dweight = rows.T @ given if wanted else None
        return dy @ weight, dweight, rows.sum(0) if ctx.with_bias else None, None


def weight_is_never_frozen(x, weight, bias):
    return _Linear.apply(x, weight, bias, False)


def weight_hangs_on_x(x, weight, bias):
    return _Linear.apply(x, weight, bias, True)
