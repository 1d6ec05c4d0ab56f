"""What an operator's result is, computed in float64 by the shortest loops there are, and by nothing of refllm (which
pairs arguments and gradients by their names): the
verdicts of `check_op` on released kernels are compared with it.

    wanted, got = right("rms_norm", arguments, keywords), kernel(*arguments, **keywords)
    far_off(got, wanted)        # in units of the last place of each row's size
"""

import math
from typing import Any

import torch

from refllm.kernels.mutants.right_gradients import by_autograd

Tensor = torch.Tensor


def _norm(x: Tensor, weight: Tensor, bias: Any, eps: float, centred: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centred else x
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, weight, None, eps, False)


def layer_norm(x: Tensor, weight: Tensor, bias: Any, eps: float) -> Tensor:
    return _norm(x, weight, bias, eps, True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x + residual, weight, None, eps, False), x + residual


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Any, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x + residual, weight, bias, eps, True), x + residual


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        y = x.clone()
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[..., None, :, i], sin[..., None, :, i]
            y[..., a], y[..., b] = x[..., a] * c - x[..., b] * s, x[..., b] * c + x[..., a] * s
        return y

    return turned(q), turned(k)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: Any = None, causal: bool = True, key_mask: Any = None
) -> Tensor:
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    o = torch.zeros(B, H, S, v.shape[-1], dtype=torch.float64)
    for b, h, s in ((b, h, s) for b in range(B) for h in range(H) for s in range(S)):
        keys = [t for t in range(T) if not (causal and t > s + T - S) and (key_mask is None or key_mask[b, t])]
        if keys:
            scores = [q[b, h, s] @ k[b, h * K // H, t] * (D**-0.5 if scale is None else scale) for t in keys]
            weights = [torch.exp(score - max(scores)) for score in scores]
            rows = zip(weights, keys, strict=True)
            o[b, h, s] = sum(w * v[b, h * K // H, t] for w, t in rows) / sum(weights)
    return o


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: Any = None) -> Tensor:
    rows = [
        attention(q[b : b + 1], k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n], scale=scale)
        for b, n in enumerate(lengths.long().tolist())
    ]
    return torch.cat(rows)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def relu2(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, torch.where(x.isnan(), x, 0.0))


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    each = []
    for row, label in zip(logits, labels.long().tolist(), strict=True):
        top = row.max()
        nothing = 0 * row.nan_to_num(0.0, 0.0, 0.0).sum()
        own = torch.log(torch.exp(row - top).sum()) + top - row[label] if label != ignore_index else nothing
        each.append(own)
    counted = int((labels != ignore_index).sum())
    losses = torch.stack(each) if each else logits.reshape(-1)[:0]
    if reduction == "none":
        return losses
    return losses.sum() / (counted if counted and reduction == "mean" else 1) + (
        0.0 if counted or reduction == "sum" else math.nan
    )


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, **how: Any) -> Tensor:
    return cross_entropy(x @ weight.T, labels, **how)


def right(operator: str, arguments: list[Any], keywords: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results in float64 of what a kernel is given, whatever the dtype of that; without a log-sum-exp."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    keywords = {name: wide(x) for name, x in keywords.items() if name != "return_lse"}
    made = globals()[operator](*map(wide, arguments), **keywords)
    return made if isinstance(made, tuple) else (made,)


def right_gradients(operator: str, arguments: list[Any], keywords: dict[str, Any]) -> tuple[Tensor, ...]:
    """The gradients in float64 of a call of a backward operator: autograd through the loops above."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    function = by_autograd(globals()[operator.removesuffix("_backward")], operator)
    made = function(*map(wide, arguments), **{name: wide(x) for name, x in keywords.items()})
    return tuple(x for x in (made if isinstance(made, tuple) else (made,)) if x is not None)


def far_off(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> tuple[float, tuple[int, ...]]:
    """How far the worst element is off, and where it is: in units in the last place of `dtype` at the largest number of
    its row. An element that is finite on one side only, or NaN, is infinitely far off."""
    got = got.double()
    both = (got == wanted) | (got.isnan() & wanted.isnan())
    size = wanted.abs().nan_to_num(0.0, 0.0, 0.0)
    size = size.amax(-1, keepdim=True) if size.ndim else size
    info = torch.finfo(dtype)
    spacing = torch.exp2(torch.floor(torch.log2(size.clamp(min=info.tiny)))) * info.eps
    off = torch.where(both, 0.0, ((got - wanted).abs() / spacing).nan_to_num(math.inf, math.inf, math.inf))
    if not off.numel():
        return 0.0, ()
    place = int(off.argmax())
    return float(off.flatten()[place]), tuple(int(i) for i in torch.unravel_index(torch.tensor(place), off.shape))
