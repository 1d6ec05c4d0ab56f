"""Calls of every operator on real shapes: the layers of Helium-1-preview, Helium-1-2b, StableLM and AFM-4.5B.

Used where every operator is run once more against its definition: on a GPU (`make gpu`), and reduced in the tests.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from refllm import published
from refllm.errors import InputError


@dataclass(frozen=True)
class Case:
    """One call: operator(*arguments, **keywords). name says what is special about it."""

    operator: str
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """The sizes of one decoder layer; interleaved: rotary pairs lie side by side."""

    name: str
    E: int
    F: int
    H: int
    K: int
    D: int
    R: int
    V: int
    interleaved: bool


def layer_of(name: str) -> Layer:
    """That of a published model."""
    cls, sizes = published.MODELS[name]
    E, F, H, K = (sizes[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    D = sizes.get("head_dim", E // H)
    R = int(D * sizes.get("partial_rotary_factor", 1))
    return Layer(name, E, F, H, K, D, R, sizes["vocab_size"], cls.startswith("Helium"))


LAYERS = tuple(layer_of(name) for name in published.MODELS)
REDUCED = (
    Layer("reduced", 96, 160, 4, 2, 32, 32, 300, True),
    Layer("reduced partial", 80, 72, 4, 4, 40, 20, 257, False),
)
"""Shapes that the interpreter gets through in seconds, with the same oddities."""


class Draw:
    """Random tensors of one dtype on one device, from one seed."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=self._generator) * scale + mean
        return x.to(device=self.device, dtype=self.dtype)

    def below(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def table(self, S: int, R: int, theta: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [S, R/2] of default RoPE, from position 1000 on: position 0 hides what is wrong."""
        frequency = theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angle = torch.arange(1000, 1000 + S, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        return cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)


def _norms(draw: Draw, c: Layer, S: int) -> Iterator[Case]:
    x, residual, weight, bias = draw.normal(2, S, c.E), draw.normal(2, S, c.E), draw.normal(c.E), draw.normal(c.E)
    far = draw.normal(2, S, c.E, mean=1000.0)
    yield Case("rms_norm", "", (x, weight, 1e-6), {})
    yield Case("add_rms_norm", "", (x, residual, weight, 1e-6), {})
    yield Case("layer_norm", "bias", (x, weight, bias, 1e-5), {})
    yield Case("layer_norm", "mean 1000", (far, weight, None, 1e-5), {})
    yield Case("add_layer_norm", "", (x, residual, weight, None, 1e-5), {})


def _rotations(draw: Draw, c: Layer, S: int) -> Iterator[Case]:
    cos, sin = draw.table(S, c.R)
    q, k = (draw.normal(2, S, heads, c.D).transpose(1, 2) for heads in (c.H, c.K))
    weights = draw.normal(c.H, c.D), draw.normal(c.K, c.D)
    for interleaved in (True, False):
        name = "interleaved" if interleaved else "half-split"
        yield Case("rope", name, (q, k, cos, sin), {"interleaved": interleaved})
        for norm in ("rms", "layer"):
            keywords = {"norm": norm, "interleaved": interleaved}
            yield Case("norm_rope", f"{norm}, {name}", (q, k, *weights, cos, sin, 1e-5), keywords)


def _projection(draw: Draw, c: Layer, S: int) -> Iterator[Case]:
    w_qkv = draw.normal((c.H + 2 * c.K) * c.D, c.E, scale=c.E**-0.5)
    heads = {"num_heads": c.H, "num_kv_heads": c.K, "interleaved": c.interleaved}
    for length, bias in ((1, None), (S, draw.normal(len(w_qkv)))):
        x, weight, (cos, sin) = draw.normal(2, length, c.E), draw.normal(c.E), draw.table(length, c.R)
        yield Case("rms_norm_qkv_rope", f"{length} tokens", (x, weight, w_qkv, bias, cos, sin, 1e-6), heads)


def _attention(draw: Draw, c: Layer, S: int) -> Iterator[Case]:
    T = S + 13
    q, k, v = draw.normal(2, c.H, S, c.D), draw.normal(2, c.K, T, c.D), draw.normal(2, c.K, T, c.D)
    key_mask = draw.below(4, 2, T) > 0
    yield Case("attention", "causal", (q, k, v), {"return_lse": True})
    yield Case("attention", "all keys", (q, k, v), {"causal": False, "scale": 0.2})
    yield Case("attention", "key mask", (q, k, v), {"key_mask": key_mask})
    lengths = torch.tensor([T, T // 3], device=draw.device)
    for steps in (1, 3):
        yield Case("decode_attention", f"{steps} tokens", (q[:, :, :steps], k, v, lengths), {})


def _activations(draw: Draw, c: Layer, S: int) -> Iterator[Case]:
    both = draw.normal(2, S, 2 * c.F, scale=4.0)
    yield Case("swiglu", "halves of one tensor", (both[..., : c.F], both[..., c.F :]), {})
    yield Case("relu2", "", (both[..., : c.F],), {})


def _losses(draw: Draw, c: Layer, S: int) -> Iterator[Case]:
    labels = draw.below(c.V, S)
    labels[::5] = -100
    logits = draw.normal(S, c.V, scale=5.0)
    for reduction in ("mean", "none"):
        yield Case("cross_entropy", reduction, (logits, labels), {"reduction": reduction})
    V = min(c.V, 10_001)  # the definition holds this matrix in float64
    x, weight = draw.normal(S, c.E), draw.normal(V, c.E, scale=c.E**-0.5)
    yield Case("linear_cross_entropy", "none", (x, weight, labels % V), {"reduction": "none"})
    yield Case("linear_cross_entropy", "mean", (x, weight, labels.clamp(max=V - 1)), {})


_FAMILIES: tuple[Callable[[Draw, Layer, int], Iterator[Case]], ...] = (
    _norms,
    _rotations,
    _projection,
    _attention,
    _activations,
    _losses,
)


def cases(layer: Layer, dtype: str, device: str, *, tokens: int, seed: int = 0) -> Iterator[Case]:
    """Every operator on the sizes of `layer`, with `tokens` positions; InputError for a dtype that kernels lack."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype={dtype!r} is not a kernel's; use float32, float16 or bfloat16")
    draw = Draw(getattr(torch, dtype), device, seed)
    for family in _FAMILIES:
        yield from family(draw, layer, tokens)
