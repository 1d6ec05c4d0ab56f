"""Right implementations, written in every way that people write them: `check_op` has to pass each one.

Torch's own functions, other orders of summation, float64 inside, online softmax, splits, NumPy; the forms of this
project; Transformers' and Liger-Kernel's code is in `legitimate_libraries.py`. Each is one small function with the
signature of the operator in `refllm.kernels`. A rejected one is a bug of the check: find it there, loosen nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from refllm import kernels
from refllm.kernels import plain
from refllm.opcheck.api import check_op
from refllm.strategies import corners

ALL = ("bfloat16", "float16", "float32")
INF = float("inf")
Tensor = torch.Tensor


@dataclass(frozen=True)
class Legitimate:
    """One implementation. dtypes, policy: in and under which it is right. options: of `check_op`."""

    operator: str
    name: str
    function: Callable[..., Any]
    dtypes: tuple[str, ...] = ALL
    policy: str = "fused"
    options: dict[str, Any] = field(default_factory=dict)


RIGHT: list[Legitimate] = []


def right(operator: str, name: str = "", **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters the function below as an implementation of `operator`."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        words = function.__name__.removeprefix(operator).strip("_").replace("_", " ")
        RIGHT.append(Legitimate(operator, name or words, function, **more))
        return function

    return enter


EXAMPLES = 5
"""Drawn for each after the fixed calls, all of which it gets."""
SECONDS = 300.0
"""Enough on a machine that does other things: a search that the clock ended has not shown that anything is right."""


def must_pass(one: Legitimate, dtype: str, examples: int = EXAMPLES) -> None:
    """Raises AssertionError with the report if `check_op` rejects it, or did not examine every fixed call."""
    report = check_op(
        one.operator, one.function, dtype=dtype, policy=one.policy, level="hostile", max_examples=examples,
        shrink=False, isolate=False, seconds=SECONDS, **one.options,
    )  # fmt: skip
    assert report.verdict == "holds", f"{one.operator}, {one.name}\n{report}"
    assert not report.ended, f"{one.operator}, {one.name}: {report.ended}"
    assert report.examples >= len(corners(one.operator, dtype, one.policy))


# -- norms -------------------------------------------------------------------------------------------------------------


@right("rms_norm")
def torch_function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


@right("rms_norm", policy="hf-eager")
def torch_function_in_the_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


@right("rms_norm")
def product_with_rsqrt(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@right("rms_norm")
def sums_of_tiles(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    total = sum(part.square().sum(-1, keepdim=True) for part in x32.split(64, -1))
    return (weight.float() * (x32 / (total / x.shape[-1] + eps).sqrt())).to(x.dtype)


@right("rms_norm")
def float64_inside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x64 = x.double()
    return (weight.double() * x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


@right("rms_norm")
def a_row_at_a_time(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for y, row in zip(out.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), strict=True):
        row = row.float()
        y.copy_(weight.float() * row * (row.dot(row) / len(row) + eps).rsqrt())
    return out


@right("rms_norm", dtypes=("float32",), options={"arrays": "numpy"})
def numpy_function(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


@right("layer_norm")
def layer_norm_torch_function(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps).to(
        x.dtype
    )


@right("layer_norm", dtypes=("bfloat16", "float16"))
def layer_norm_torch_function_in_the_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if weight.dtype != x.dtype:  # float32 beside a narrow x: not a call that torch takes with a narrow bias
        return layer_norm_torch_function(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@right("layer_norm")
def two_passes(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x.float() - x.float().mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@right("layer_norm")
def welford(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x32 = x.float()
    mean, squares, count = x32.new_zeros(x.shape[:-1]), x32.new_zeros(x.shape[:-1]), 0
    for part in x32.split(32, -1):  # Chan et al. 1979: moments of parts, combined
        n = part.shape[-1]
        delta = part.mean(-1) - mean
        squares = squares + (part - part.mean(-1, keepdim=True)).square().sum(-1) + delta**2 * count * n / (count + n)
        mean, count = mean + delta * n / (count + n), count + n
    y = weight.float() * (x32 - mean[..., None]) * (squares / max(1, count) + eps).rsqrt()[..., None]
    return (y if bias is None else y + bias.float()).to(x.dtype)


@right("layer_norm")
def layer_norm_float64_inside(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    b = None if bias is None else bias.double()
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), b, eps).to(x.dtype)


@right("add_rms_norm")
def norm_of_the_rounded_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = (residual.float() + x.float()).to(x.dtype)
    return torch_function(r, weight, eps), r


@right("add_rms_norm")
def norm_of_the_unrounded_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = residual.float() + x.float()
    return torch_function(r, weight, eps).to(x.dtype), r.to(x.dtype)


@right("add_layer_norm")
def layer_norm_of_the_rounded_sum(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r = residual + x
    return layer_norm_torch_function(r, weight, bias, eps), r


@right("add_layer_norm")
def layer_norm_of_the_unrounded_sum(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r = residual.float() + x.float()
    return two_passes(r, weight, bias, eps).to(x.dtype), r.to(x.dtype)


# -- rotation ----------------------------------------------------------------------------------------------------------


def pairs(x: Tensor, R: int, interleaved: bool) -> Tensor:
    """[..., R/2, 2]: the pairs of the first R dims."""
    head = x[..., :R]
    return head.unflatten(-1, (R // 2, 2)) if interleaved else head.unflatten(-1, (2, R // 2)).mT


def joined(pairs: Tensor, rest: Tensor, interleaved: bool) -> Tensor:
    """The inverse of `pairs`, with the dims from R on."""
    return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2).to(rest.dtype), rest], -1)


@right("rope")
def complex_numbers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    R, turn = 2 * cos.shape[-1], torch.complex(cos.float(), sin.float()).unsqueeze(-3)

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(*pairs(x, R, interleaved).float().unbind(-1)) * turn
        return joined(torch.view_as_real(z), x[..., R:], interleaved)

    return turned(q), turned(k)


@right("rope")
def matrices(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    R, c, s = 2 * cos.shape[-1], cos.double(), sin.double()
    turn = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2).unsqueeze(-5)

    def turned(x: Tensor) -> Tensor:
        return joined((turn @ pairs(x, R, interleaved).double()[..., None])[..., 0], x[..., R:], interleaved)

    return turned(q), turned(k)


@right("rope")
def rotate_half_in_float32(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    R = 2 * cos.shape[-1]

    def wide(table: Tensor) -> Tensor:
        return (table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)).float().unsqueeze(-3)

    def turned(x: Tensor) -> Tensor:
        part = x[..., :R].float()
        quarter = pairs(part, R, interleaved).flip(-1) * torch.tensor([-1.0, 1.0])
        return torch.cat([(part * wide(cos) + joined(quarter, part[..., :0], interleaved) * wide(sin)).to(x.dtype),
                          x[..., R:]], -1)  # fmt: skip

    return turned(q), turned(k)


@right("norm_rope")
def norm_then_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, norm: str,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rounded after the norm, as two kernels are."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        if norm == "rms":
            y = F.rms_norm(x.float(), x.shape[-1:], None, eps)
        else:
            y = F.layer_norm(x.float(), x.shape[-1:], None, None, eps)
        return (y * weight.float()[:, None]).to(x.dtype)

    return complex_numbers(normed(q, q_weight), normed(k, k_weight), cos, sin, interleaved=interleaved)


@right("norm_rope")
def norm_and_rope_in_float64(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, norm: str,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = x.double()
        x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()[:, None]

    out = matrices(normed(q, q_weight), normed(k, k_weight), cos, sin, interleaved=interleaved)
    return out[0].to(q.dtype), out[1].to(q.dtype)


@right("rms_norm_qkv_rope")
def three_projections(
    x: Tensor, norm_weight: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *,
    num_heads: int, num_kv_heads: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed = torch_function(x, norm_weight, eps)
    D = len(w_qkv) // (num_heads + 2 * num_kv_heads)
    sizes = [num_heads * D, num_kv_heads * D, num_kv_heads * D]
    biases = b_qkv.split(sizes) if b_qkv is not None else (None,) * 3
    q, k, v = (
        F.linear(normed, w, b).unflatten(-1, (-1, D)).transpose(1, 2)
        for w, b in zip(w_qkv.split(sizes), biases, strict=True)
    )
    return *complex_numbers(q, k, cos, sin, interleaved=interleaved), v


@right("rms_norm_qkv_rope")
def scale_after_the_product(
    x: Tensor, norm_weight: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *,
    num_heads: int, num_kv_heads: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The norm's weight goes into the projection and its root behind it, all in float32; one rounding at the end."""
    D, x32 = len(w_qkv) // (num_heads + 2 * num_kv_heads), x.float()
    qkv = F.linear(x32, w_qkv.float() * norm_weight.float()) * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    qkv = qkv if b_qkv is None else qkv + b_qkv.float()
    heads = qkv.unflatten(-1, (-1, D)).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    q, k = complex_numbers(q, k, cos, sin, interleaved=interleaved)
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


# -- attention ---------------------------------------------------------------------------------------------------------


def seen(q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """bool [B, 1, S, T], True = attend: causal is aligned at the end."""
    (B, _, S, _), T = q.shape, k.shape[2]
    visible = torch.ones(B, 1, S, T, dtype=torch.bool)
    visible = visible.tril(T - S) if causal else visible
    return visible if key_mask is None else visible & key_mask[:, None, None]


def reached(x: Tensor, visible: Tensor) -> Tensor:
    """k or v with zeros where no query looks."""
    return torch.where(visible.any(2)[:, :, :, None], x, 0) if x.numel() else x


@right("attention")
def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True, key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    """Torch's, with masked keys and values made harmless, and rows without a key set to 0."""
    visible, group = seen(q, k, causal, key_mask), q.shape[1] // k.shape[1]
    k, v = (reached(x, visible).repeat_interleave(group, 1) for x in (k, v))
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for s in range(q.shape[2]) if causal and (k.isnan() | v.isnan()).any() else (slice(None),) if k.shape[2] else ():
        row = slice(s, s + 1) if isinstance(s, int) else s  # a later key that is NaN is not masked for every query
        keys = visible[:, :, row].any(2).any(1).any(0).nonzero()[:, 0]
        if len(keys):
            part = visible[:, :, row, keys]
            y = F.scaled_dot_product_attention(q[:, :, row], k[:, :, keys], v[:, :, keys], attn_mask=part, scale=scale)
            o[:, :, row] = torch.where(part.any(-1, keepdim=True), y, 0)
    if not return_lse:
        return o
    s = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return o, torch.where(visible, s, -INF).logsumexp(-1)


def online(block: int, rounded: bool = True) -> Callable[..., Any]:
    """Online softmax over tiles of keys; rounded: weights meet the values in their dtype, as tensor cores want."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
        key_mask: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        visible, group = seen(q, k, causal, key_mask), q.shape[1] // k.shape[1]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        top, total, o = torch.full(q.shape[:3], -INF), torch.zeros(q.shape[:3]), torch.zeros(q.shape)
        for start in range(0, k.shape[2], block):
            tile = slice(start, start + block)
            look = visible[..., tile]
            kt, vt = (x[:, :, tile].float().repeat_interleave(group, 1) for x in (k, v))
            s = torch.where(look, q.float() @ kt.mT * scale, -INF)
            new = torch.maximum(top, s.amax(-1))
            floor = new.nan_to_num(neginf=0.0, nan=math.nan, posinf=INF)
            p = torch.exp(s - floor[..., None])
            shrink = torch.exp(top - floor)
            weights = p.to(q.dtype).float() if rounded else p
            o = o * shrink[..., None] + product(weights, vt)
            total, top = total * shrink + p.sum(-1), new
        out = (o / total.masked_fill(total == 0, 1.0)[..., None]).to(q.dtype)
        return (out, top + total.log()) if return_lse else out

    return attention


def product(weights: Tensor, v: Tensor) -> Tensor:
    """weights v, where a weight of 0 silences NaN and infinity."""
    out = weights @ torch.where(v.isfinite(), v, 0.0)
    if v.isfinite().all():
        return out
    return out + torch.where(weights[..., None] == 0, 0.0, weights[..., None] * torch.where(
        v.isfinite(), 0.0, v)[:, :, None]).sum(3)  # fmt: skip


for _block in (1, 16, 64, 128):
    right("attention", f"online softmax, tiles of {_block}")(online(_block))
right("attention", "online softmax, weights in float32")(online(32, rounded=False))


def softmax(q: Tensor, k: Tensor, visible: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Weights that add up to 1 (0 where there is no key) and their log-sum-exp, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = torch.where(visible, s, -INF)
    if not s.shape[-1]:
        return s, torch.full(s.shape[:-1], -INF, dtype=wide)
    return torch.where(visible.any(-1, keepdim=True), s.softmax(-1), 0), s.logsumexp(-1)


def normalised_first(rounded: bool) -> Callable[..., Any]:
    """Weights are divided by their sum before they meet the values; rounded: and put into the dtype of q then."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
        key_mask: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        visible, group = seen(q, k, causal, key_mask), q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        p, lse = softmax(q, k, visible, scale)
        o = product(p.to(q.dtype).to(p.dtype) if rounded else p, v.to(p.dtype)).to(q.dtype)
        return (o, lse) if return_lse else o

    return attention


right("attention", "softmax in float32")(normalised_first(rounded=False))
right("attention", "softmax rounded, then the product", policy="hf-eager")(normalised_first(rounded=True))


@right("attention")
def attention_in_float64(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True, key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    wide = q.double(), k.double(), v.double()
    out = normalised_first(rounded=False)(*wide, scale=scale, causal=causal, key_mask=key_mask, return_lse=return_lse)
    return (out[0].to(q.dtype), out[1].float()) if return_lse else out.to(q.dtype)


@right("attention")
def a_sequence_at_a_time(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True, key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    """The keys that a sequence may see are gathered: masked ones are not there."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3], -INF)
    visible = seen(q, k, causal, key_mask)
    for b in range(len(q)):
        keys = visible[b, 0].any(0).nonzero()[:, 0]
        for s in range(q.shape[2]):
            now = keys[visible[b, 0, s, keys]]
            if len(now):
                one = online(256)(q[b : b + 1, :, s : s + 1], k[b : b + 1, :, now], v[b : b + 1, :, now], scale=scale,
                                  causal=False, return_lse=True)  # fmt: skip
                out[b, :, s], lse[b, :, s] = one[0][0, :, 0], one[1][0, :, 0]
    return (out, lse) if return_lse else out


@right("decode_attention")
def masked_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None) -> Tensor:
    """Every length its own mask, over the whole cache."""
    S, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    end = lengths[:, None] - S + 1 + torch.arange(S)
    visible = (torch.arange(N) < end[..., None])[:, None]
    p, _ = softmax(q, k.repeat_interleave(group, 1), visible, scale)
    return product(p, v.float().repeat_interleave(group, 1)).to(q.dtype)


@right("decode_attention")
def sdpa_over_the_length(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        out[one] = scaled_dot_product_attention(q[one], k[one, :, :n], v[one, :, :n], scale=scale)
    return out


def split_cache(slots: int) -> Callable[..., Tensor]:
    """Splits of the cache, combined by their log-sum-exp; some are empty."""

    def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None) -> Tensor:
        S, N = q.shape[2], k.shape[2]
        end = lengths[:, None] - S + 1 + torch.arange(S)
        outs, lses = [torch.zeros(q.shape)], [torch.full(q.shape[:3], -INF)]
        for first in range(0, N, slots):
            at = torch.arange(N)[first : first + slots]
            parts = [
                online(slots, rounded=False)(
                    q[:, :, s : s + 1].float(), k[:, :, at].float(), v[:, :, at].float(), causal=False, return_lse=True,
                    key_mask=at < end[:, s, None], scale=scale,
                )
                for s in range(S)
            ]  # fmt: skip
            outs.append(torch.cat([o for o, _ in parts], 2))
            lses.append(torch.cat([lse for _, lse in parts], 2))
        lse, o = torch.stack(lses), torch.stack(outs)
        top = lse.amax(0)
        weights = torch.exp(lse - torch.where(top == -INF, 0.0, top))
        total = weights.sum(0)
        return ((weights[..., None] * o).sum(0) / torch.where(total == 0, 1.0, total)[..., None]).to(q.dtype)

    return decode


for _slots in (16, 256):
    right("decode_attention", f"splits of {_slots} slots")(split_cache(_slots))


# -- activations -------------------------------------------------------------------------------------------------------


@right("swiglu")
def silu_in_float32(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up).to(gate.dtype)


@right("swiglu", policy="hf-eager")
def silu_in_the_dtype(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@right("swiglu")
def sigmoid_times_gate(gate: Tensor, up: Tensor) -> Tensor:
    return (gate.float() * up.float() * torch.sigmoid(gate.float())).to(gate.dtype)


@right("swiglu")
def hyperbolic_tangent(gate: Tensor, up: Tensor) -> Tensor:
    x = gate.double()
    return (x * (0.5 + 0.5 * torch.tanh(x / 2)) * up).to(gate.dtype)


@right("swiglu", dtypes=("float32",), options={"arrays": "numpy"})
def numpy_silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


@right("relu2")
def relu_squared_in_the_dtype(x: Tensor) -> Tensor:
    return F.relu(x).square()


@right("relu2")
def power_of_clamped(x: Tensor) -> Tensor:
    return (x.float().clamp(min=0) ** 2).to(x.dtype)


@right("relu2")
def where_not_negative(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0, x.double() * x.double()).to(x.dtype)


@right("relu2", dtypes=("float32",), options={"arrays": "numpy"})
def numpy_relu2(x: np.ndarray) -> np.ndarray:
    return np.square(np.maximum(x, 0))


# -- losses ------------------------------------------------------------------------------------------------------------


@right("cross_entropy")
def cross_entropy_torch_function(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction=reduction)


@right("cross_entropy")
def nll_of_log_softmax(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    return F.nll_loss(logits.float().log_softmax(-1), labels, ignore_index=ignore_index, reduction=reduction)


def reduced(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """The losses of all rows, 0 where not counted, as `reduction` says."""
    losses = torch.where(counted, losses, 0.0)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


@right("cross_entropy")
def log_sum_exp_minus_the_label(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    counted = labels != ignore_index
    z = logits.float()
    top, picked = z.amax(-1), z.gather(1, torch.where(counted, labels, 0)[:, None])[:, 0]
    return reduced((z - top[:, None]).exp().sum(-1).log() + top - picked, counted, reduction)


@right("cross_entropy")
def online_sum(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    counted = labels != ignore_index
    top, total = torch.full(labels.shape, -INF), torch.zeros(labels.shape)
    for tile in logits.float().split(64, -1):
        new = torch.maximum(top, tile.amax(-1))
        floor = torch.where(new == -INF, 0.0, new)
        total, top = total * torch.exp(top - floor) + torch.exp(tile - floor[:, None]).sum(-1), new
    picked = logits.float().gather(1, torch.where(counted, labels, 0)[:, None])[:, 0]
    return reduced(total.log() + (top - picked), counted, reduction)


@right("cross_entropy")
def cross_entropy_in_float64(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(logits.double(), labels, ignore_index=ignore_index, reduction=reduction).float()


@right("linear_cross_entropy")
def product_then_loss(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return cross_entropy_torch_function(x @ weight.T, labels, ignore_index=ignore_index, reduction=reduction)


@right("linear_cross_entropy")
def logits_never_rounded(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    z = x.float() @ weight.float().T
    return cross_entropy_torch_function(z, labels, ignore_index=ignore_index, reduction=reduction)


@right("linear_cross_entropy")
def rows_in_chunks(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    losses = [
        product_then_loss(part, weight, own, ignore_index=ignore_index, reduction="none")
        for part, own in zip(x.split(8), labels.split(8), strict=True)
    ]
    return reduced(torch.cat(losses), labels != ignore_index, reduction)


# -- the forms of this project -----------------------------------------------------------------------------------------

_SHORT = {"dtypes": ("bfloat16", "float32")}
"""The interpreter takes its time."""

for _operator in kernels.OPERATORS:
    RIGHT.append(Legitimate(_operator, "refllm.kernels.plain", getattr(plain, _operator)))
    RIGHT.append(Legitimate(_operator, "refllm.kernels, interpreted", getattr(kernels, _operator), **_SHORT))

for _operator in ("rms_norm", "swiglu"):
    _source = next(r.function for r in RIGHT if r.operator == _operator)
    RIGHT.append(Legitimate(_operator, "torch.compile, eager backend", torch.compile(_source, backend="eager")))


if __name__ == "__main__":  # every implementation in every dtype, with more examples
    import legitimate_libraries

    for _one in legitimate_libraries.RIGHT:
        for _dtype in _one.dtypes:
            must_pass(_one, _dtype, examples=100)
            print(_one.operator, _one.name, _dtype, "holds", flush=True)
