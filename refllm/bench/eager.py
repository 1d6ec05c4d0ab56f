"""The operators as anybody would write them in Torch, one library call after the other: what a kernel has to beat.

Signatures as in `refllm.kernels`. `torch.compile` gets these functions too. They round where Torch does, after each
step, and so a little more often than the contract.
"""

from collections.abc import Callable
from typing import Any


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """torch.nn.functional.rms_norm."""
    import torch.nn.functional as F

    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    """The sum, then the norm."""
    r = residual + x
    return rms_norm(r, weight, eps), r


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """torch.nn.functional.layer_norm."""
    import torch.nn.functional as F

    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    """The sum, then the norm."""
    r = residual + x
    return layer_norm(r, weight, bias, eps), r


def rope(q: Any, k: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    """x cos + rotated(x) sin on the first R dims, with tables as wide as they are: the form of Transformers."""
    import torch

    R = 2 * cos.shape[-1]
    wide = [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)]

    def rotate(x: Any) -> Any:
        turned, rest = x[..., :R], x[..., R:]
        if interleaved:
            other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            other = torch.cat([-turned[..., R // 2 :], turned[..., : R // 2]], -1)
        return torch.cat([turned * wide[0] + other * wide[1], rest], -1)

    return rotate(q), rotate(k)


def norm_rope(
    q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float, *, norm: str, interleaved: bool
) -> Any:
    """A norm without weight, times the weight of each head, then `rope`."""
    import torch.nn.functional as F

    function = F.rms_norm if norm == "rms" else F.layer_norm
    q, k = (
        function(x, (x.shape[-1],), eps=eps) * weight[:, None, :].to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return rope(q, k, cos, sin, interleaved=interleaved)


def rms_norm_qkv_rope(
    x: Any,
    norm_weight: Any,
    w_qkv: Any,
    b_qkv: Any,
    cos: Any,
    sin: Any,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
) -> Any:
    """The norm, one product for all three projections, then `rope`."""
    import torch.nn.functional as F

    qkv = F.linear(rms_norm(x, norm_weight, eps), w_qkv, b_qkv).unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = qkv.transpose(1, 2).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return *rope(q, k, cos, sin, interleaved=interleaved), v


def swiglu(gate: Any, up: Any) -> Any:
    """silu(gate) * up."""
    import torch.nn.functional as F

    return F.silu(gate) * up


def relu2(x: Any) -> Any:
    """relu(x)^2."""
    import torch.nn.functional as F

    return F.relu(x).square()


def cross_entropy(logits: Any, labels: Any, *, reduction: str = "mean") -> Any:
    """torch.nn.functional.cross_entropy in float32, as Transformers calls it."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), labels, reduction=reduction)


def linear_cross_entropy(x: Any, weight: Any, labels: Any, *, reduction: str = "mean") -> Any:
    """The logits as a whole, then their cross-entropy."""
    import torch.nn.functional as F

    return cross_entropy(F.linear(x, weight), labels, reduction=reduction)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        rms_norm,
        add_rms_norm,
        layer_norm,
        add_layer_norm,
        rope,
        norm_rope,
        rms_norm_qkv_rope,
        swiglu,
        relu2,
        cross_entropy,
        linear_cross_entropy,
    )
}
