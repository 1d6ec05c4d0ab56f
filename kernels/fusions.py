"""Which fused operators a model's forward pass uses under `backend="torch"` and `"triton"`, and what falls back.

Nothing falls back silently: this is what `refllm info` prints. Importable without Torch.
"""

from dataclasses import dataclass
from typing import Any

from refllm.config.traits import traits_of


@dataclass(frozen=True)
class Fusion:
    """One fused operator. fuses: the steps that it does at once. instead: what is done in its place, if anything."""

    operator: str
    fuses: str
    instead: str = ""


def fusions(config: Any) -> list[Fusion]:
    """The fused operators of one decoder layer of a model with this config, in the order of the forward pass."""
    found = [*_before_attention(config)]
    found.append(Fusion("attention", "scores, softmax and values; decode_attention for a few tokens after a cache"))
    if not traits_of(config).layer_norm:
        found.append(Fusion("add_rms_norm", "residual sum and the norm before the MLP"))
    elif config.use_parallel_residual:
        found.append(
            Fusion("add_layer_norm", "residual sum and norm", "a plain sum: a parallel residual has no norm after it")
        )
    else:
        found.append(Fusion("add_layer_norm", "residual sum and the norm before the MLP"))
    return [*found, _activation(config)]


def _before_attention(config: Any) -> list[Fusion]:
    if not traits_of(config).layer_norm:
        return [Fusion("rms_norm_qkv_rope", "norm, the three projections and the rotation")]
    norm = Fusion("layer_norm", "norm before attention; the projections are one product of Torch")
    if config.qk_layernorm:
        return [norm, Fusion("norm_rope", "norm of each head and its rotation")]
    return [norm, Fusion("rope", "rotation of queries and keys")]


def _activation(config: Any) -> Fusion:
    act = config.hidden_act
    if not traits_of(config).gated:
        return Fusion("relu2", "max(x, 0)^2", "" if act == "relu2" else f"Torch's {act}: only relu2 has a kernel")
    fused = act in ("silu", "swish")
    return Fusion("swiglu", "silu(gate) * up", "" if fused else f"Torch's {act} and a product: only silu has a kernel")


ALWAYS_IN_STEPS = {
    "attention masks of pairs of positions (4-D masks, packed sequences)": "scores and weights as whole tensors",
    "output_attentions": "scores and weights as whole tensors",
}
"""What a call may ask for that no kernel does, and how it is computed then."""
