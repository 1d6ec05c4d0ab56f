"""Defects and places of norms, MLPs, residual streams and heads.

Each entry: name -> the fields of `refllm.mutants.models.Mutant`. The functions that take a module return what to run
in place of its forward. Torch is imported when they run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from refllm.config.traits import traits_of
from refllm.mutants.planting import forward_of, forward_of_block, forward_of_model, layer_of, module_at, replaced

Forward = Callable[..., Any]


def layer_norms(config: Any) -> bool:
    """Whether the family has LayerNorm (the others have RMSNorm)."""
    return traits_of(config).layer_norm


def rms_norms(config: Any) -> bool:
    """Whether the family has RMSNorm."""
    return not layer_norms(config)


def gated(config: Any) -> bool:
    """Whether the MLP has a gate."""
    return traits_of(config).gated


def parallel(config: Any) -> bool:
    """Whether attention and MLP read the same norm."""
    return bool(getattr(config, "use_parallel_residual", False))


def sequential(config: Any) -> bool:
    """Whether the MLP reads the residual stream after attention."""
    return not parallel(config)


def qkv_biases(config: Any) -> bool:
    """Whether q, k and v have biases."""
    return bool(getattr(config, "attention_bias", False) or getattr(config, "use_qkv_bias", False))


def mlp_biases(config: Any) -> bool:
    """Whether the MLP has biases."""
    return bool(getattr(config, "mlp_bias", False))


def norm_per_head(config: Any) -> bool:
    """Whether queries and keys are normed head by head."""
    return bool(getattr(config, "qk_layernorm", False))


# --------------------------------------------------------------------------------------------------------------- norms


def _normed(x: Any, eps: float, *, centred: bool) -> Any:
    x = x.float()
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def _eps(norm: Any) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def _with_bias(norm: Any, y: Any) -> Any:
    bias = getattr(norm, "bias", None)
    return y if bias is None else y + bias.float()


def wrong_eps(model: Any, layer: int) -> AbstractContextManager[None]:
    """1e-6, what most code has as its default, or 1e-5 where that is further away or it is the right one."""
    norm = layer_of(model, layer).input_layernorm
    name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    return replaced(norm, name, 1e-5 if getattr(norm, name) <= 1e-6 else 1e-6)


def _other_centring(norm: Any) -> Forward:
    centred = not hasattr(norm, "eps")  # torch's LayerNorm has `eps`, and is centred when it should be
    return lambda x: _with_bias(norm, norm.weight.float() * _normed(x, _eps(norm), centred=centred)).to(x.dtype)


def _low_precision(norm: Any) -> Forward:
    def forward(x: Any) -> Any:
        import torch

        low = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
        y = x.to(low)
        y = y - y.mean(-1, keepdim=True) if hasattr(norm, "eps") else y
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + _eps(norm)) * norm.weight.to(low)
        bias = getattr(norm, "bias", None)
        return (y if bias is None else y + bias.to(low)).to(x.dtype)

    return forward


def _weight_plus_one(norm: Any) -> Forward:
    original = norm.forward
    return lambda x: original(x) + _normed(x, _eps(norm), centred=hasattr(norm, "eps")).to(x.dtype)


def _without_norm_bias(norm: Any) -> Forward:
    import torch

    return lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, None, norm.eps)


def _cast_after_weight(norm: Any) -> Forward:
    """One rounding, at the end; Llama and Arcee round before the weight too."""
    return lambda x: (norm.weight.float() * _normed(x, _eps(norm), centred=False)).to(x.dtype)


def _cast_before_weight(norm: Any) -> Forward:
    """A rounding before the weight, where there is none in Helium and in LayerNorm."""
    centred = hasattr(norm, "eps")
    return lambda x: _with_bias(norm, norm.weight.float() * _normed(x, _eps(norm), centred=centred).to(x.dtype)).to(
        x.dtype
    )


_NORM = ("input_layernorm",)

NORM: dict[str, dict[str, Any]] = {
    # eps changes a value by about eps / (2 mean(x^2)) of itself, 5e-6 here and half an ulp of bfloat16 is 4e-3.
    "wrong eps": {"taps": _NORM, "plant": wrong_eps, "dtype": "float32"},
    "RMSNorm for LayerNorm": {
        "taps": _NORM,
        "plant": forward_of("input_layernorm", _other_centring),
        "applies": layer_norms,
    },
    "LayerNorm for RMSNorm": {
        "taps": _NORM,
        "plant": forward_of("input_layernorm", _other_centring),
        "applies": rms_norms,
    },
    "norm computed in the narrow format": {"taps": _NORM, "plant": forward_of("input_layernorm", _low_precision)},
    "norm weight plus one": {
        "taps": _NORM,
        "plant": forward_of("input_layernorm", _weight_plus_one),
        "source": "linkedin/Liger-Kernel#1462",
    },
    "norm bias dropped": {
        "taps": _NORM,
        "plant": forward_of("input_layernorm", _without_norm_bias),
        "applies": layer_norms,
    },
    "rounded after the norm's weight only": {
        "taps": _NORM,
        "plant": forward_of("input_layernorm", _cast_after_weight),
        "applies": lambda config: traits_of(config).rounds_before_weight,
        "source": "vllm-project/vllm#42379",
        "place": ("once",),
    },
    "rounded before the norm's weight too": {
        "taps": _NORM,
        "plant": forward_of("input_layernorm", _cast_before_weight),
        "applies": lambda config: not traits_of(config).rounds_before_weight,
        "source": "sgl-project/sglang#22931",
        "place": ("before the weight",),
    },
}


# ----------------------------------------------------------------------------------------------------------------- MLPs


def _mlp(change: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Forward]:
    """change(mlp, gate or None, up) -> what down_proj receives."""

    def make(mlp: Any) -> Forward:
        def forward(x: Any) -> Any:
            gate = mlp.gate_proj(x) if hasattr(mlp, "gate_proj") else None
            return mlp.down_proj(change(mlp, gate, mlp.up_proj(x)))

        return forward

    return make


def _acted(mlp: Any, gate: Any, up: Any) -> Any:
    return mlp.act_fn(up) if gate is None else mlp.act_fn(gate) * up


def _gelu(mlp: Any, gate: Any, up: Any) -> Any:
    import torch

    return torch.nn.functional.gelu(gate) * up


def _silu_of_rounded_sigmoid(mlp: Any, gate: Any, up: Any) -> Any:
    return gate * gate.sigmoid() * up


def _last_row_short(mlp: Any, gate: Any, up: Any) -> Any:
    h = _acted(mlp, gate, up).clone()
    h[:, -1, -16:] = 0
    return h


def _short_product(linear: Any) -> Forward:
    import torch

    return lambda h: torch.nn.functional.linear(h[..., :-16], linear.weight[:, :-16], linear.bias)


def _product_in_two(linear: Any) -> Forward:
    """Two halves of the sum, each rounded before they are added."""
    import torch

    def forward(h: Any) -> Any:
        half = h.shape[-1] // 2
        first = torch.nn.functional.linear(h[..., :half], linear.weight[:, :half], linear.bias)
        return first + torch.nn.functional.linear(h[..., half:], linear.weight[:, half:])

    return forward


def _without_bias(linear: Any) -> Forward:
    import torch

    return lambda x: torch.nn.functional.linear(x, linear.weight)


_ACT = ("mlp.act",)

MLP: dict[str, dict[str, Any]] = {
    "gate and up swapped": {
        "taps": _ACT,
        "plant": forward_of("mlp", _mlp(lambda mlp, gate, up: mlp.act_fn(up) * gate)),
        "applies": gated,
    },
    "gelu for silu": {"taps": _ACT, "plant": forward_of("mlp", _mlp(_gelu)), "applies": gated},
    "relu without the square": {
        "taps": _ACT,
        "plant": forward_of("mlp", _mlp(lambda mlp, gate, up: up.relu())),
        "applies": lambda config: not gated(config),
    },
    "square without relu": {
        "taps": _ACT,
        "plant": forward_of("mlp", _mlp(lambda mlp, gate, up: up * up)),
        "applies": lambda config: not gated(config),
    },
    "sigmoid rounded inside silu": {
        "taps": _ACT,
        "plant": forward_of("mlp", _mlp(_silu_of_rounded_sigmoid)),
        "applies": gated,
        "place": ("sigmoid",),
    },
    "last tile of the activation zero in the last row": {
        "taps": _ACT,
        "plant": forward_of("mlp", _mlp(_last_row_short)),
    },
    "last tile of the intermediate size dropped": {
        "taps": ("mlp.down_proj",),
        "plant": forward_of("mlp.down_proj", _short_product),
        "source": "ROCm/aiter#4244",
    },
    "partial sums rounded": {
        "taps": ("mlp.down_proj",),
        "plant": forward_of("mlp.down_proj", _product_in_two),
        "place": ("2 parts, each rounded",),
        "splits": 2,
    },
    "up_proj bias dropped": {
        "taps": ("mlp.up_proj",),
        "plant": forward_of("mlp.up_proj", _without_bias),
        "applies": mlp_biases,
    },
}


# --------------------------------------------------------------------------------------------------- residual and block


def _block(change: Callable[[Any, Any, Any, Any], Any]) -> Callable[[Any], Forward]:
    """change(block, x, its norm, attention's contribution) -> the residual stream after the layer."""

    def make(block: Any) -> Forward:
        def forward(hidden_states: Any, **kwargs: Any) -> Any:
            normed = block.input_layernorm(hidden_states)
            attended, _ = block.self_attn(hidden_states=normed, **kwargs)
            return change(block, hidden_states, normed, attended)

        return forward

    return make


def _mlp_of_first_norm(block: Any, x: Any, normed: Any, attended: Any) -> Any:
    return x + attended + block.mlp(normed)


def _mlp_after_attention(block: Any, x: Any, normed: Any, attended: Any) -> Any:
    import torch

    norm, mid = block.input_layernorm, x + attended
    return mid + block.mlp(torch.nn.functional.layer_norm(mid, mid.shape[-1:], norm.weight, norm.bias, norm.eps))


def _residual_of_normed(block: Any, x: Any, normed: Any, attended: Any) -> Any:
    mid = normed + attended
    if block.post_attention_layernorm is None:
        return mid + block.mlp(normed)
    return mid + block.mlp(block.post_attention_layernorm(mid))


def _over_all_heads(norm: Any) -> Forward:
    """One mean and one variance for all heads of a position; the weights stay."""
    import torch

    def forward(x: Any) -> Any:
        B, H, S, D = x.shape
        flat = x.transpose(1, 2).reshape(B, S, H * D)
        weight = torch.cat([part.weight for part in norm.norms])
        flat = torch.nn.functional.layer_norm(flat, flat.shape[-1:], weight, None, norm.norms[0].eps)
        return flat.reshape(B, S, H, D).transpose(1, 2)

    return forward


def norm_of_q_for_k(model: Any, layer: int) -> AbstractContextManager[None]:
    """The keys' norms use the weights of the queries' norms."""
    import torch

    attention = layer_of(model, layer).self_attn
    q, k = attention.q_layernorm, attention.k_layernorm

    def forward(x: Any) -> Any:
        return torch.cat([norm(x[:, i : i + 1]) for i, norm in enumerate(list(q.norms)[: x.shape[1]])], dim=1)

    return replaced(k, "forward", forward)


def projection_of_q_for_k(model: Any, layer: int) -> AbstractContextManager[None]:
    """Keys are made with the first rows of the queries' weight."""
    import torch

    attention = layer_of(model, layer).self_attn
    q, n = attention.q_proj, attention.k_proj.weight.shape[0]
    bias = None if q.bias is None else q.bias[:n]
    return replaced(attention.k_proj, "forward", lambda x: torch.nn.functional.linear(x, q.weight[:n], bias))


def bias_of_k_for_v(model: Any, layer: int) -> AbstractContextManager[None]:
    """Values are made with the keys' bias."""
    import torch

    k, v = (module_at(model, layer, f"self_attn.{letter}_proj") for letter in "kv")
    return replaced(v, "forward", lambda x: torch.nn.functional.linear(x, v.weight, k.bias))


BLOCK: dict[str, dict[str, Any]] = {
    "sequential block run as parallel": {
        "taps": ("mlp.gate_proj", "mlp.up_proj"),
        "plant": forward_of_block(_block(_mlp_of_first_norm)),
        "applies": sequential,
    },
    "parallel block run as sequential": {
        "taps": ("mlp.gate_proj", "mlp.up_proj"),
        "plant": forward_of_block(_block(_mlp_after_attention)),
        "applies": parallel,
    },
    "residual from the normed value": {
        "taps": ("residual_mid", ""),
        "plant": forward_of_block(_block(_residual_of_normed)),
    },
    "norm per head over all heads": {
        "taps": ("self_attn.q_layernorm",),
        "plant": forward_of("self_attn.q_layernorm", _over_all_heads),
        "applies": norm_per_head,
    },
    "weight of the q norm used for k": {
        "taps": ("self_attn.k_layernorm",),
        "plant": norm_of_q_for_k,
        "applies": norm_per_head,
        "source": "ROCm/aiter#4659",
    },
    "weight of q_proj used for k": {"taps": ("self_attn.k_proj",), "plant": projection_of_q_for_k},
    "q_proj bias dropped": {
        "taps": ("self_attn.q_proj",),
        "plant": forward_of("self_attn.q_proj", _without_bias),
        "applies": qkv_biases,
    },
    "v_proj bias dropped": {
        "taps": ("self_attn.v_proj",),
        "plant": forward_of("self_attn.v_proj", _without_bias),
        "applies": qkv_biases,
    },
    "layer skipped": {
        "taps": ("",),
        "plant": forward_of_block(lambda block: lambda hidden_states, **kwargs: hidden_states),
    },
}

BIASES: dict[str, dict[str, Any]] = {
    "k_proj bias used for v": {"taps": ("self_attn.v_proj",), "plant": bias_of_k_for_v, "applies": qkv_biases},
}
"""What is planted in families from outside besides."""


# ----------------------------------------------------------------------------------------------------------------- head


def _untied(head: Any) -> Forward:
    """A head of its own, initialised at random, as a loader leaves it that does not know of tied weights."""
    import torch

    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
    weight = (0.02 * noise).to(head.weight.dtype)
    return lambda x: torch.nn.functional.linear(x, weight)


def _rounded_logits(head: Any) -> Forward:
    import torch

    original = head.forward
    return lambda x: original(x).to(torch.bfloat16).to(x.dtype)


HEAD: dict[str, dict[str, Any]] = {
    "last norm skipped": {"taps": ("model.norm",), "plant": forward_of_model("model.norm", lambda norm: lambda x: x)},
    "tied weight ignored": {
        "taps": ("lm_head",),
        "plant": forward_of_model("lm_head", _untied),
        "applies": lambda config: bool(config.tie_word_embeddings),
    },
    "logits rounded to bfloat16": {
        "taps": ("lm_head",),
        "plant": forward_of_model("lm_head", _rounded_logits),
        "dtype": "float32",
        "source": "linkedin/Liger-Kernel#1329",
    },
}
