"""Right implementations of other libraries for `legitimate.RIGHT`: Transformers' modules and functions, and
Liger-Kernel's kernels on the repaired interpreter.

Transformers' eager code rounds as the policy `hf-eager` says; where a function of it rounds once only it is right under
`fused` too. Liger rounds twice in three places, which `hf-eager` allows.
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from legitimate import RIGHT, Tensor, right, seen
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy
from transformers.models.arcee import modeling_arcee
from transformers.models.helium import modeling_helium
from transformers.models.llama import modeling_llama
from transformers.models.stablelm import modeling_stablelm

__all__ = ["RIGHT", "liger_cross_entropy", "liger_linear_cross_entropy", "liger_relu2"]

EAGER: dict[str, Any] = {"policy": "hf-eager"}


def module_with(module: Any, **weights: Tensor | None) -> Any:
    """The module with its parameters replaced."""
    for name, value in weights.items():
        if value is not None:
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return module


# -- Transformers: norms -----------------------------------------------------------------------------------------------


def rms_norm_of(kind: type) -> Callable[..., Tensor]:
    """An RMSNorm module as a function."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return module_with(kind(x.shape[-1], eps), weight=weight)(x).to(x.dtype)

    return rms_norm


right("rms_norm", "HeliumRMSNorm")(rms_norm_of(modeling_helium.HeliumRMSNorm))
right("rms_norm", "HeliumRMSNorm, hf-eager", **EAGER)(rms_norm_of(modeling_helium.HeliumRMSNorm))
right("rms_norm", "LlamaRMSNorm", **EAGER)(rms_norm_of(modeling_llama.LlamaRMSNorm))
right("rms_norm", "ArceeRMSNorm", **EAGER)(rms_norm_of(modeling_arcee.ArceeRMSNorm))


@right("layer_norm", "torch.nn.LayerNorm, as StableLM has it", **EAGER)
def stablelm_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    norm = torch.nn.LayerNorm(x.shape[-1], eps=eps, bias=bias is not None)
    return module_with(norm, weight=weight.to(x.dtype), bias=None if bias is None else bias.to(x.dtype))(x)


@right("add_rms_norm", "LlamaRMSNorm after the sum", **EAGER)
def llama_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = residual + x
    return rms_norm_of(modeling_llama.LlamaRMSNorm)(r, weight, eps), r


@right("add_layer_norm", "torch.nn.LayerNorm after the sum", **EAGER)
def stablelm_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    r = residual + x
    return stablelm_layer_norm(r, weight, bias, eps), r


# -- Transformers: rotation --------------------------------------------------------------------------------------------


def table(angles: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """[B, S, R] in `dtype`, as the models' rotary modules return it: every angle twice."""
    wide = torch.cat([angles, angles], -1).to(dtype)
    return wide if wide.ndim == 3 else wide.expand(batch, *wide.shape)


def rope_of(kind: Any, pairing: bool) -> Callable[..., Any]:
    """apply_rotary_pos_emb of a model, whose pairing is fixed; for the other one dims are put in its order."""

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Any:
        R = 2 * cos.shape[-1]
        order = torch.arange(R)
        if interleaved != pairing:
            order = order.view(2, -1).T.flatten() if pairing else order.view(-1, 2).T.flatten()
        tables = table(cos, len(q), q.dtype), table(sin, len(q), q.dtype)
        rotated = kind.apply_rotary_pos_emb(q[..., :R][..., order], k[..., :R][..., order], *tables)
        back = order.argsort()
        return tuple(torch.cat([y[..., back], x[..., R:]], -1) for y, x in zip(rotated, (q, k), strict=True))

    return rope


for _name, _kind, _pairing in (
    ("helium", modeling_helium, True),
    ("llama", modeling_llama, False),
    ("stablelm", modeling_stablelm, False),
    ("arcee", modeling_arcee, False),
):
    right("rope", f"apply_rotary_pos_emb of {_name}", **EAGER)(rope_of(_kind, _pairing))


@right("norm_rope", "StableLmLayerNormPerHead, then apply_rotary_pos_emb", **EAGER)
def stablelm_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, norm: str,
    interleaved: bool,
) -> Any:  # fmt: skip
    def per_head(x: Tensor, weight: Tensor) -> Tensor:
        if norm == "layer":
            heads = modeling_stablelm.StableLmLayerNormPerHead(x.shape[-1], x.shape[1], eps=eps)
            for own, one in zip(heads.norms, weight.to(x.dtype), strict=True):
                module_with(own, weight=one)
            return heads(x)
        llama = rms_norm_of(modeling_llama.LlamaRMSNorm)
        return torch.cat([llama(x[:, h : h + 1], weight[h], eps) for h in range(x.shape[1])], 1)

    rope = rope_of(modeling_stablelm, False)
    return rope(per_head(q, q_weight), per_head(k, k_weight), cos, sin, interleaved=interleaved)


@right("rms_norm_qkv_rope", "LlamaRMSNorm, nn.Linear, apply_rotary_pos_emb", **EAGER)
def llama_projection(
    x: Tensor, norm_weight: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *,
    num_heads: int, num_kv_heads: int, interleaved: bool,
) -> Any:  # fmt: skip
    D = len(w_qkv) // (num_heads + 2 * num_kv_heads)
    normed = rms_norm_of(modeling_llama.LlamaRMSNorm)(x, norm_weight, eps)
    sizes = [num_heads * D, num_kv_heads * D, num_kv_heads * D]
    biases = (None,) * 3 if b_qkv is None else b_qkv.split(sizes)
    q, k, v = (
        F.linear(normed, w, b).unflatten(-1, (-1, D)).transpose(1, 2)
        for w, b in zip(w_qkv.split(sizes), biases, strict=True)
    )
    return *rope_of(modeling_llama, False)(q, k, cos, sin, interleaved=interleaved), v


# -- Transformers: attention -------------------------------------------------------------------------------------------


def eager_attention_of(kind: Any) -> Callable[..., Any]:
    """eager_attention_forward of a model."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
        key_mask: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        groups = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
        visible = seen(q, k, causal, key_mask)
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
        o, _ = kind.eager_attention_forward(groups, q, k, v, mask, scale)
        if not return_lse:
            return o.transpose(1, 2)
        scores = q @ modeling_llama.repeat_kv(k, groups.num_key_value_groups).mT * scale
        return o.transpose(1, 2), (scores + mask).float().logsumexp(-1)

    return attention


for _name, _kind in (
    ("helium", modeling_helium),
    ("llama", modeling_llama),
    ("stablelm", modeling_stablelm),
    ("arcee", modeling_arcee),
):
    right("attention", f"eager_attention_forward of {_name}", **EAGER)(eager_attention_of(_kind))


@right("decode_attention", "eager_attention_forward of llama, each sequence by itself", **EAGER)
def eager_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None) -> Tensor:
    eager, out = eager_attention_of(modeling_llama), torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, n in enumerate(lengths.tolist()):
        out[b] = eager(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], scale=scale)[0]
    return out


# -- Transformers: activations and losses ------------------------------------------------------------------------------


@right("swiglu", "the gate's product of LlamaMLP", **EAGER)
def llama_mlp(gate: Tensor, up: Tensor) -> Tensor:
    return ACT2FN["silu"](gate) * up


right("relu2", "the act_fn of ArceeMLP")(lambda x: ACT2FN["relu2"](x))
right("relu2", "the act_fn of ArceeMLP, hf-eager", **EAGER)(lambda x: ACT2FN["relu2"](x))


@right("cross_entropy", "fixed_cross_entropy and ForCausalLMLoss")
def causal_lm_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    if reduction == "mean":
        vocabulary = logits.shape[-1]
        return ForCausalLMLoss(logits, None, vocabulary, ignore_index=ignore_index, shift_labels=labels)
    if reduction == "sum":
        return fixed_cross_entropy(logits.float(), labels, num_items_in_batch=1, ignore_index=ignore_index)
    return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")


@right("linear_cross_entropy", "nn.Linear and ForCausalLMLoss", **EAGER)
def head_and_loss(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return causal_lm_loss(F.linear(x, weight), labels, ignore_index=ignore_index, reduction=reduction)


# -- Liger-Kernel ------------------------------------------------------------------------------------------------------


def liger_relu2(x: Tensor) -> Tensor:
    """Liger's squared ReLU: right but for a NaN, which becomes 0 where torch.relu keeps it."""
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    if not x.numel():
        return torch.zeros_like(x)
    return LigerReLUSquaredFunction.apply(x.contiguous().view(-1, x.shape[-1])).view(x.shape)


def liger_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Liger's cross entropy: right but for a mean over no row, which is 0 where torch has NaN, and for its loss, which
    is in the dtype of the logits and not in float32."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    if not labels.numel():
        return torch.zeros(() if reduction != "none" else (0,))
    rows = logits.clone(memory_format=torch.contiguous_format)  # it writes the gradient over them
    return LigerCrossEntropyFunction.apply(rows, labels.contiguous(), None, ignore_index, 0.0, 0.0, reduction)[0]


def liger_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Liger's linear cross entropy, which has the same two deviations."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if not labels.numel():
        return torch.zeros(() if reduction != "none" else (0,))
    given = (x.contiguous(), weight.contiguous(), labels.contiguous(), None, None, ignore_index, 0.0, 0.0, reduction)
    return LigerFusedLinearCrossEntropyFunction.apply(*given)[0]


for _deviating in (liger_relu2, liger_cross_entropy, liger_linear_cross_entropy):
    # For `check_op`: their modules are only imported inside.
    _deviating.uses_triton = True  # type: ignore[attr-defined]


def enter_liger() -> None:
    """Liger-Kernel's forward kernels, if it is installed. It launches no empty grids: such calls do not reach it.

    Not here: its squared ReLU, which turns a NaN into 0 (`liger_relu2`), and its losses, as they are
    (`liger_cross_entropy`, `liger_linear_cross_entropy`). In float32, and where some label counts, those are right.
    """
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    dtypes = {"dtypes": ("bfloat16", "float32")}

    def rms_norm(mode: str) -> Callable[..., Any]:
        def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            if not x.numel():
                return torch.zeros_like(x)
            return LigerRMSNormFunction.apply(x.contiguous(), weight.contiguous(), eps, 0.0, mode, False)

        return liger_rms_norm

    right("rms_norm", "LigerRMSNormFunction, gemma", **dtypes)(rms_norm("gemma"))
    right("rms_norm", "LigerRMSNormFunction, llama", **dtypes, **EAGER)(rms_norm("llama"))

    @right("layer_norm", "LigerLayerNormFunction", **dtypes)
    def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if not x.numel():
            return torch.zeros_like(x)
        bias = torch.zeros_like(weight) if bias is None else bias
        return LigerLayerNormFunction.apply(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)

    @right("add_rms_norm", "LigerFusedAddRMSNormFunction, gemma", **dtypes)
    def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        if not x.numel():
            return torch.zeros_like(x), torch.zeros_like(x)
        # Liger may sum into its arguments.
        return LigerFusedAddRMSNormFunction.apply(
            x.clone(memory_format=torch.contiguous_format), residual.clone(memory_format=torch.contiguous_format),
            weight.contiguous(), eps, 0.0, "gemma", False,
        )  # fmt: skip

    @right("rope", "LigerRopeFunction", **dtypes, **EAGER)
    def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Any:
        """Half-split and whole heads only: other calls are put in that form, or past it."""
        R = 2 * cos.shape[-1]
        if not q.numel() or not k.numel():
            return torch.zeros_like(q), torch.zeros_like(k)
        order = torch.arange(R).view(-1, 2).T.flatten() if interleaved else torch.arange(R)
        tables = (table(t, len(q), q.dtype).contiguous() for t in (cos, sin))
        # As a projection lays them out: of dense [B, H, 1, D] it takes a head for a row.
        rows = (x[..., :R][..., order].transpose(1, 2) for x in (q, k))
        inside = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in rows)
        rotated = LigerRopeFunction.apply(*inside, *tables)
        back = order.argsort()
        return tuple(torch.cat([y[..., back], x[..., R:]], -1) for y, x in zip(rotated, (q, k), strict=True))

    @right("swiglu", "LigerSiLUMulFunction", **dtypes, **EAGER)
    def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
        if not gate.numel():
            return torch.zeros_like(gate)
        # One row at least: it views its argument as rows.
        a, b = (x.clone(memory_format=torch.contiguous_format).view(-1, x.shape[-1]) for x in (gate, up))
        return LigerSiLUMulFunction.apply(a, b).view(gate.shape)

    def where_a_label_counts(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def with_mean(*given: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
            if reduction == "mean" and (given[-1] == ignore_index).all():
                return torch.tensor(float("nan"))
            return loss(*given, ignore_index=ignore_index, reduction=reduction)

        with_mean.uses_triton = True  # type: ignore[attr-defined]
        return with_mean

    for operator, loss in (
        ("cross_entropy", liger_cross_entropy),
        ("linear_cross_entropy", liger_linear_cross_entropy),
    ):
        right(operator, "Liger's, where a label counts", dtypes=("float32",))(where_a_label_counts(loss))


with contextlib.suppress(ModuleNotFoundError):  # the rest stands without it
    enter_liger()
