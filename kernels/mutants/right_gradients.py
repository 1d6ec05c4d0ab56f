"""Right gradients, written in every way that people write them: what a check of gradients must not call wrong.

    for one in right_gradients("rms_norm_backward"):
        one.function         # of the signature of the operator; of the forward operator where one.autograd

Torch's own functions and what autograd makes of a forward pass, other orders of summation, float64 inside, the loops of
a textbook, NumPy; and the forms of this project.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from refllm import ops
from refllm.kernels import plain
from refllm.kernels.mutants.changed_source import ALL, NARROW
from refllm.ops.backward_contracts import BACKWARD, forward_name
from refllm.precision import arithmetic

Tensor: TypeAlias = torch.Tensor
Function = Callable[..., Any]


@dataclass(frozen=True)
class RightGradients:
    """One implementation. operator: a backward one. dtypes: those in which it is right. autograd: it has the signature
    of the forward operator, and its gradients are what torch.autograd finds. without: what it does not offer. policy:
    the one under which it is right, "" for all."""

    operator: str
    name: str
    function: Function
    dtypes: tuple[str, ...] = ALL
    autograd: bool = False
    without: tuple[str, ...] = ()
    policy: str = ""

    @property
    def gradients(self) -> Function:
        """It as a function of the signature of the operator."""
        return by_autograd(self.function, self.operator) if self.autograd else self.function


_RIGHT: list[RightGradients] = []


def right_gradients(operator: str | None = None) -> list[RightGradients]:
    """All of them, or those of one backward operator."""
    return [one for one in _RIGHT if operator in (None, one.operator)]


def right(operator: str, name: str = "", **more: Any) -> Callable[[Function], Function]:
    """Enters the function below."""

    def enter(function: Function) -> Function:
        words = function.__name__.removeprefix(operator).strip("_").replace("_", " ")
        _RIGHT.append(RightGradients(operator, name or words, function, **more))
        return function

    return enter


# -- of this project, and of autograd ----------------------------------------------------------------------------------


def _definition(operator: str) -> Function:
    """The NumPy definition in the dtype of the call, under the policy `fused`."""
    known = BACKWARD[operator]

    def emulated(*arguments: Any, **keywords: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
        dtype = str(next(x.dtype for x in reversed(tensors) if x.dtype in _FORMATS)).removeprefix("torch.")
        given = known.bound(arguments, keywords)
        named = {"dlse_BHS" if name == "dlse" else name: _array(x) for name, x in keywords.items()}
        made = getattr(ops, operator)(*map(_array, arguments), **named, ar=arithmetic(dtype, "fused"))
        like = [given[known.like(name)] for name in known.gradient_of]
        pairs = zip(made if isinstance(made, tuple) else (made,), like, strict=True)
        got = tuple(None if x is None else torch.from_numpy(np.array(x)).to(model.dtype) for x, model in pairs)
        return got if isinstance(made, tuple) else got[0]

    return emulated


_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def _array(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return (x.float() if x.is_floating_point() else x).numpy()


def by_autograd(function: Function, operator: str) -> Function:
    """The gradients that autograd finds of a forward function, as a function of the backward signature."""
    known = BACKWARD[operator]

    def gradients(*arguments: Any, **keywords: Any) -> Any:
        given = known.bound(arguments, keywords)
        if forward_name(operator) == "rope":  # a rotation is linear: what was turned makes no difference
            given |= {"q": torch.zeros_like(given["dq"]), "k": torch.zeros_like(given["dk"])}
        leaves = {
            name: given[name].detach().clone().requires_grad_()
            for name in known.gradient_of.values()
            if given.get(name) is not None
        }
        places = [name for name, p in known.forward.parameters.items() if p.kind is not p.KEYWORD_ONLY]
        forward = [leaves.get(name, given[name]) for name in places]
        with torch.enable_grad():
            outs = function(*forward, **keywords)
        outs = outs if isinstance(outs, tuple) else (outs,)
        incoming = [given[name].to(out.dtype) for name, out in zip(known.incoming, outs, strict=False)]
        found = dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), incoming), strict=True))
        got = tuple(found.get(name) for name in known.gradient_of.values())
        return got if len(got) > 1 else got[0]

    return gradients


for _operator in plain.BACKWARD:
    _RIGHT.append(RightGradients(_operator, "plain Torch of this project", getattr(plain, _operator)))
    _RIGHT.append(RightGradients(_operator, "NumPy definition in the dtype", _definition(_operator)))
for _operator in plain.BACKWARD:
    _forward = forward_name(_operator)
    if _forward in plain.EAGER and _forward != "linear_cross_entropy":
        _left = ("tables_per_row",) if "rope" in _forward else ("mixed_dtypes",) if "layer" in _forward else ()
        # On a CPU Torch adds dw and db of a LayerNorm up row by row in the dtype of x.
        _policy = "hf-eager" if "layer_norm" in _forward else ""
        _more: dict[str, Any] = {"autograd": True, "without": _left, "policy": _policy}
        _RIGHT.append(RightGradients(_operator, "autograd of Torch's functions", plain.EAGER[_forward], **_more))
    if _forward in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "norm_rope", "swiglu", "relu2",
                    "cross_entropy"):  # fmt: skip
        _RIGHT.append(RightGradients(_operator, "autograd of the plain form", getattr(plain, _forward), autograd=True))


# -- norms -------------------------------------------------------------------------------------------------------------


@right("rms_norm_backward")
def _float64_inside(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    g, n = dy.double() * weight.double(), x.double()
    r = (n.square().mean(-1, keepdim=True) + eps).rsqrt()
    dx = r * g - r**3 * n * (g * n).mean(-1, keepdim=True)
    return dx.to(x.dtype), (dy.double() * n * r).flatten(0, -2).sum(0).to(weight.dtype)


@right("rms_norm_backward")
def _quotient_rule(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    d, z, w = dy.float(), x.float(), weight.float()
    size = torch.sqrt(z.square().mean(-1, keepdim=True) + eps)
    dx = w * d / size - z * (w * d * z).sum(-1, keepdim=True) / (x.shape[-1] * size**3)
    return dx.to(x.dtype), (d * (z / size)).flatten(0, -2).sum(0).to(weight.dtype)


@right("rms_norm_backward")
def _row_after_row(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight = torch.zeros(weight.shape)
    rows = zip(dx.view(-1, x.shape[-1]), dy.flatten(0, -2).float(), x.flatten(0, -2).float(), strict=True)
    for out, d, z in rows:
        n = z / torch.sqrt((z * z).mean() + eps)
        g = d * weight.float()
        out.copy_((g - n * (g * n).mean()) / torch.sqrt((z * z).mean() + eps))
        dweight += d * n
    return dx, dweight.to(weight.dtype)


@right("rms_norm_backward")
def _partial_sums_of_blocks(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    z, d = x.float(), dy.float()
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    n, g = z * r, d * weight.float()
    blocks = [block.sum(0) for block in (d * n).flatten(0, -2).split(16)]
    dweight = torch.stack([torch.zeros_like(weight, dtype=torch.float32), *blocks]).sum(0)
    return (r * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype), dweight.to(weight.dtype)


@right("rms_norm_backward")
def _w_dy_rounded(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    z, d = x.float(), dy.float()
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    n, g = z * r, (d * weight.float()).to(x.dtype).float()
    return (r * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype), (d * n).flatten(0, -2).sum(0).to(weight.dtype)


@right("rms_norm_backward")
def projection(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What lies along x is taken away by a matrix: (I - n n^T / E) / rms."""
    z, d = x.float(), dy.float()
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    n, g = z * r, d * weight.float()
    along = (n[..., None, :] @ g[..., None])[..., 0] / x.shape[-1]
    return (r * (g - n * along)).to(x.dtype), torch.einsum("...e,...e->e", d, n).to(weight.dtype)


@right("layer_norm_backward")
def torch_function(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
    """Torch's own backward kernel, in float32."""
    z, w, b = x.float().contiguous(), weight.float(), None if bias is None else bias.float()
    _, mean, r = torch.native_layer_norm(z, z.shape[-1:], w, b, eps)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.float().contiguous(), z, z.shape[-1:], mean, r, w, b, [True, True, bias is not None]
    )
    return dx.to(x.dtype), dw.to(weight.dtype), None if bias is None else db.to(bias.dtype)


@right("layer_norm_backward")
def _layer_norm_in_float64(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
    z, d, w = x.double(), dy.double(), weight.double()
    z = z - z.mean(-1, keepdim=True)
    r = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    g, E = d * w, x.shape[-1]
    dx = r / E * (E * g - g.sum(-1, keepdim=True) - z * r * (g * z * r).sum(-1, keepdim=True))
    dw, db = ((d * t).flatten(0, -2).sum(0) for t in (z * r, torch.ones_like(z)))
    return dx.to(x.dtype), dw.to(weight.dtype), None if bias is None else db.to(bias.dtype)


@right("add_rms_norm_backward")
def _two_steps(dy: Tensor, dsum: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    dx, dweight = plain.rms_norm_backward(dy, residual + x, weight, eps)
    dx = dx + dsum
    return dx, dx, dweight


@right("add_rms_norm_backward")
def _separate_results(dy: Tensor, dsum: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    dx, _, dweight = plain.add_rms_norm_backward(dy, dsum, x, residual, weight, eps)
    return dx, dx.clone(), dweight


@right("add_layer_norm_backward")
def _layer_norm_and_sum(
    dy: Tensor, dsum: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Any:
    dx, dweight, dbias = plain.layer_norm_backward(dy, residual + x, weight, bias, eps)
    dx = dsum + dx
    return dx, dx.clone(), dweight, dbias


# -- rotations ---------------------------------------------------------------------------------------------------------


def _sign_of_sine(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    return plain.rope(dq, dk, cos, -sin, interleaved=interleaved)


right("rope_backward", "the forward rotation with the sine negated")(_sign_of_sine)


@right("rope_backward")
def _complex_numbers(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    back = torch.complex(cos.double(), -sin.double()).unsqueeze(-3)
    R = 2 * cos.shape[-1]

    def turned(d: Tensor) -> Tensor:
        x = d[..., :R].double()
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        z = torch.complex(a.contiguous(), b.contiguous()) * back
        both = torch.stack([z.real, z.imag], -1 if interleaved else -2).flatten(-2)
        return torch.cat([both.to(d.dtype), d[..., R:]], -1).contiguous()

    return turned(dq), turned(dk)


@right("rope_backward")
def _transposed_matrices(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Any:
    half = cos.shape[-1]
    matrix = torch.zeros(*cos.shape[:-1], 2 * half, 2 * half, dtype=torch.float64)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        matrix[..., a, a] = matrix[..., b, b] = cos[..., i].double()
        matrix[..., a, b], matrix[..., b, a] = sin[..., i].double(), -sin[..., i].double()

    def turned(d: Tensor) -> Tensor:
        x = (matrix.unsqueeze(-4) @ d[..., : 2 * half, None].double())[..., 0]
        return torch.cat([x.to(d.dtype), d[..., 2 * half :]], -1).contiguous()

    return turned(dq), turned(dk)


@right("norm_rope_backward")
def turned_then_normed(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, *, norm: str, interleaved: bool,
) -> Any:  # fmt: skip
    """One head after another, through the functions of a plain norm."""
    turned = plain.rope_backward(dq.float(), dk.float(), cos.float(), sin.float(), interleaved=interleaved)
    found = []
    for d, x, weight in zip(turned, (q, k), (q_weight, k_weight), strict=True):
        heads = []
        for h in range(x.shape[1]):
            given = d[:, h], x[:, h].float(), weight[h].float()
            made = (
                plain.rms_norm_backward(*given, eps) if norm == "rms" else plain.layer_norm_backward(*given, None, eps)
            )
            heads.append(made[:2])
        found.append(torch.stack([dx for dx, _ in heads], 1).to(x.dtype))
        found.append(torch.stack([dw for _, dw in heads]).to(weight.dtype))
    return found[0], found[2], found[1], found[3]


# -- attention ---------------------------------------------------------------------------------------------------------


@right("attention_backward")
def a_row_at_a_time(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None = None, lse: Tensor | None = None, *,
    dlse: Tensor | None = None, scale: float | None = None, causal: bool = True, key_mask: Tensor | None = None,
) -> Any:  # fmt: skip
    """The loops of a textbook, in float64: every query takes the keys that it sees."""
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    factor = D**-0.5 if scale is None else scale
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    for b in range(B):
        for h in range(H):
            for s in range(S):
                keys = torch.arange(min(T, max(0, T - S + s + 1)) if causal else T)
                keys = keys if key_mask is None else keys[key_mask[b, : len(keys)]]
                if not len(keys):
                    continue
                own, kv = q[b, h, s].double(), h * K // H
                key, value, d = k[b, kv, keys].double(), v[b, kv, keys].double(), do[b, h, s].double()
                p = torch.softmax(factor * (key @ own), 0)
                dp = value @ d
                ds = p * (dp - (p * dp).sum() + (0 if dlse is None else dlse[b, h, s].double()))
                dq[b, h, s] = factor * (ds @ key)
                dk[b, kv, keys] += factor * ds[:, None] * own
                dv[b, kv, keys] += p[:, None] * d
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@right("attention_backward", dtypes=NARROW)
def weights_and_ds_rounded(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None = None, lse: Tensor | None = None, *,
    dlse: Tensor | None = None, scale: float | None = None, causal: bool = True, key_mask: Tensor | None = None,
) -> Any:  # fmt: skip
    """What kernels on tensor cores do: p and ds are rounded to the dtype before they meet another matrix."""
    (B, H, S, D), (K, T) = q.shape, k.shape[1:3]
    factor = D**-0.5 if scale is None else scale
    seen = (torch.arange(T) <= torch.arange(S)[:, None] + (T - S if causal else T)).expand(B, 1, S, T)
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    any_key = (seen.any(-2, keepdim=True).mT).expand(B, K, T, 1)
    keys, values = (torch.where(any_key, x, 0.0).float().repeat_interleave(H // K, 1) for x in (k, v))
    scores = (q.float() @ keys.mT * factor).masked_fill(~seen, float("-inf"))
    p = torch.softmax(scores, -1).masked_fill(~seen, 0.0)
    dp = do.float() @ values.mT
    shift = (p * dp).sum(-1, keepdim=True) - (0 if dlse is None else dlse[..., None])
    ds = (p * (dp - shift)).to(k.dtype).float()
    dk, dv = (
        x.unflatten(1, (K, H // K)).sum(2)
        for x in (factor * (ds.mT @ q.float()), p.to(v.dtype).float().mT @ do.float())
    )
    return (factor * (ds @ keys)).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@right("attention_backward")
def blocks_of_keys(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None = None, lse: Tensor | None = None, *,
    dlse: Tensor | None = None, scale: float | None = None, causal: bool = True, key_mask: Tensor | None = None,
) -> Any:  # fmt: skip
    """dq is added up over blocks of 16 keys, as a flash kernel does."""
    T = k.shape[2]
    if o is None or lse is None:
        o, lse = plain.attention(
            q.float(), k.float(), v.float(), scale=scale, causal=causal, key_mask=key_mask, return_lse=True
        )
    S = q.shape[2]
    dq, dk, dv = torch.zeros(q.shape), [], []
    mask = torch.ones(q.shape[0], T, dtype=torch.bool) if key_mask is None else key_mask
    limit = torch.arange(S)[:, None] + (T - S if causal else T)
    for start in range(0, T, 16):
        keys = slice(start, start + 16)
        hidden = ~((torch.arange(T)[keys] <= limit) & mask[:, None, None, keys])
        part = _block(do, q, k[:, :, keys], v[:, :, keys], o, lse, dlse, scale, hidden)
        dq += part[0]
        dk.append(part[1])
        dv.append(part[2])
    empty = [torch.zeros(k[:, :, :0].shape)]
    return dq.to(q.dtype), torch.cat(dk or empty, 2).to(k.dtype), torch.cat(dv or empty, 2).to(v.dtype)


def _block(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dlse: Any, scale: Any, hidden: Tensor
) -> Any:
    """dq, dk, dv of some keys, in float32; hidden [B, 1, S, keys]."""
    (H, D), K = (q.shape[1], q.shape[3]), k.shape[1]
    factor = D**-0.5 if scale is None else scale
    nobody = hidden.all(-2, keepdim=True).mT
    keys, values = (torch.where(nobody, 0.0, x.float()).repeat_interleave(H // K, 1) for x in (k, v))
    scores = (q.float() @ keys.mT * factor).masked_fill(hidden, float("-inf"))
    p = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0.0)
    delta = (do.float() * o.float()).sum(-1) - (0 if dlse is None else dlse)
    ds = p * (do.float() @ values.mT - delta[..., None])
    dk, dv = (x.unflatten(1, (K, H // K)).sum(2) for x in (factor * (ds.mT @ q.float()), p.mT @ do.float()))
    return factor * (ds @ keys), dk, dv


@right("decode_attention_backward")
def _one_sequence_after_another(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, o: Any = None, lse: Any = None, *, scale: Any = None
) -> Any:
    found = [torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for b, n in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        parts = a_row_at_a_time(do[row], q[row], k[row, :, :n], v[row, :, :n], scale=scale)
        found[0][row], found[1][row, :, :n], found[2][row, :, :n] = parts
    return tuple(found)


@right("softmax_backward")
def _torch_softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    return torch._softmax_backward_data(dp.float().contiguous(), p.float().contiguous(), -1, torch.float32).to(p.dtype)


@right("softmax_backward")
def _two_products(dp: Tensor, p: Tensor) -> Tensor:
    weights, through = p.double(), p.double() * dp.double()
    return (through - weights * through.sum(-1, keepdim=True)).to(p.dtype)


# -- activations -------------------------------------------------------------------------------------------------------


@right("swiglu_backward")
def _swiglu_product_rule(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    x, s = gate.float(), torch.sigmoid(gate.float())
    slope = s + x * s * (1 - s)
    return (dh.float() * up.float() * slope).to(gate.dtype).contiguous(), (dh.float() * (x * s)).to(
        up.dtype
    ).contiguous()


@right("swiglu_backward")
def _silu_backward_of_torch(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.ops.aten.silu_backward(dh.float() * up.float(), gate.float())
    return dgate.to(gate.dtype).contiguous(), (dh.float() * F.silu(gate.float())).to(up.dtype).contiguous()


@right("swiglu_backward", dtypes=NARROW)
def rounded_after_every_step(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd makes of two calls: dh up and silu(gate) are rounded."""
    inner = dh * up
    dgate = torch.ops.aten.silu_backward(inner.float(), gate.float()).to(gate.dtype)
    return dgate.contiguous(), (dh * F.silu(gate)).contiguous()


@right("relu2_backward")
def _where_positive(dy: Tensor, x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.0, 2 * x.float() * dy.float()).to(x.dtype).contiguous()


@right("relu2_backward")
def _clamped(dy: Tensor, x: Tensor) -> Tensor:
    return (x.double().clamp(min=0) * 2 * dy.double()).to(x.dtype).contiguous()


# -- losses ------------------------------------------------------------------------------------------------------------


def _of_rows(dloss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    counted = labels != ignore_index
    each = torch.where(counted, dloss.double().expand(labels.shape), 0.0)
    return each / max(1, int(counted.sum())) if reduction == "mean" else each


@right("cross_entropy_backward")
def _softmax_minus_one_hot(
    dloss: Tensor, logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    p = torch.softmax(logits.double(), -1)
    counted = labels != ignore_index
    hot = F.one_hot(torch.where(counted, labels, 0).long(), logits.shape[1])
    d = (p - hot) * _of_rows(dloss, labels, ignore_index, reduction)[:, None]
    return torch.where(counted[:, None], d, 0.0).to(logits.dtype)


@right("cross_entropy_backward")
def exponentials_of_a_row(
    dloss: Tensor, logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The loops of a kernel: a row at a time, with the log-sum-exp that the forward pass kept."""
    each = _of_rows(dloss, labels, ignore_index, reduction).float()
    out = torch.zeros(logits.shape)
    for n, label in enumerate(labels.tolist()):
        if label != ignore_index:
            row = logits[n].float()
            out[n] = torch.exp(row - torch.logsumexp(row, 0))
            out[n, label] -= 1
            out[n] *= each[n]
    return out.to(logits.dtype)


@right("linear_cross_entropy_backward")
def rows_in_chunks(
    dloss: Tensor, x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Chunks of 4 rows, dW added up in float32."""
    each = _of_rows(dloss, labels, ignore_index, reduction).float()
    dx, dweight = torch.zeros(x.shape), torch.zeros(weight.shape)
    for start in range(0, len(x), 4):
        part = slice(start, start + 4)
        d = _softmax_minus_one_hot(
            each[part], F.linear(x[part], weight).float(), labels[part], ignore_index=ignore_index, reduction="none"
        )
        dx[part] = d @ weight.float()
        dweight += d.T @ x[part].float()
    return dx.to(x.dtype), dweight.to(weight.dtype)


@right("linear_cross_entropy_backward")
def logits_and_their_gradient(
    dloss: Tensor, x: Tensor, weight: Tensor, labels: Tensor, **how: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of the logits in the dtype, then two products."""
    d = plain.cross_entropy_backward(dloss, F.linear(x, weight), labels, **how).float()
    return (d @ weight.float()).to(x.dtype), (d.T @ x.float()).to(weight.dtype)


# -- products and embeddings -------------------------------------------------------------------------------------------


@right("linear_backward")
def _einsum(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    d, z = dy.double(), x.double()
    dx, dweight = torch.einsum("...o,oi->...i", d, weight.double()), torch.einsum("...o,...i->oi", d, z)
    return dx.to(x.dtype), dweight.to(weight.dtype), None if bias is None else d.flatten(0, -2).sum(0).to(bias.dtype)


@right("embedding_backward")
def _one_hot_product(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    hot = F.one_hot(ids.flatten().long(), len(weight)).float()
    return (hot.T @ dy.flatten(0, -2).float()).to(weight.dtype)


@right("embedding_backward")
def _place_after_place(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(weight.shape)
    for place, row in zip(ids.flatten().tolist(), dy.flatten(0, -2).float(), strict=True):
        total[place] += row
    return total.to(weight.dtype)
