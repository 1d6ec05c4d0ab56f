"""The calls that are timed: operators on the layers of published models, and attention by head size and length.

A call is drawn as often as the clock asks for (`Job.draw`), each time with other random numbers in memory of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from refllm.bench.traffic import Traffic, traffic
from refllm.errors import InputError

Arguments = tuple[list[Any], dict[str, Any]]

CONTEXT = 4096
"""Slots of the cache that a call of one token per sequence attends to, where nothing else is asked for."""

# Operators that a model of each layer's family runs; the others are timed on it only if they are asked for.
RMS = ("rms_norm", "add_rms_norm", "rms_norm_qkv_rope", "rope", "attention", "decode_attention")
LOSSES = ("cross_entropy", "linear_cross_entropy")
LAYER_NORM = ("layer_norm", "add_layer_norm", "rope", "attention", "decode_attention", "swiglu", *LOSSES)
USED = {
    "helium-1-preview-2b": (*RMS, "swiglu", *LOSSES),
    "helium-1-2b": (*RMS, "swiglu", *LOSSES),
    "stablelm-3b-4e1t": LAYER_NORM,
    "stablelm-2-12b": ("norm_rope", *(name for name in LAYER_NORM if name != "rope")),
    "afm-4.5b": (*RMS, "relu2", *LOSSES),
}

# Query heads, key/value heads and head size of published models.
HEADS = {64: (32, 32), 80: (32, 32), 128: (20, 20), 160: (32, 8)}
"""By head size: StableLM-2-1.6B, StableLM-3B, Helium-1-preview, StableLM-2-12B."""


@dataclass(frozen=True)
class Job:
    """A call to be timed. panel, group: see `refllm.bench.results.Row`. draw(seed): arguments and keywords."""

    operator: str
    panel: str
    group: str
    dtype: str
    sizes: dict[str, int]
    draw: Callable[[int], Arguments]

    @property
    def name(self) -> str:
        """One phrase for messages."""
        return f"{self.operator}, {self.panel}, {self.group}, {self.dtype}"


class Source:
    """Random normal tensors of one dtype, drawn on the device from one seed; on "meta" shapes without memory."""

    def __init__(self, dtype: str, device: str, seed: int) -> None:
        import torch

        self._torch = torch
        self.dtype, self.device = getattr(torch, dtype), device
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """N(0, scale^2). Large tensors are drawn in parts, so that their float32 form never exists as a whole."""
        out = self._torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in out.view(-1).split(1 << 26) if self._generator else ():
            drawn = self._torch.randn(part.shape, generator=self._generator, device=self.device)
            part.copy_(drawn.mul_(scale))
        return out

    def labels(self, V: int, N: int) -> Any:
        """N labels below V."""
        return self._torch.randint(V, (N,), generator=self._generator, device=self.device)

    def table(self, S: int, R: int) -> tuple[Any, Any]:
        """cos and sin [S, R/2] of default RoPE from position 1000 on."""
        torch = self._torch
        frequency = 1e4 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angle = torch.arange(1000, 1000 + S, dtype=torch.float64)[:, None] * frequency
        return angle.cos().to(self.device, self.dtype), angle.sin().to(self.device, self.dtype)

    def lengths(self, B: int, N: int) -> Any:
        """All of the cache, for each sequence."""
        device = "cpu" if self.device == "meta" else self.device  # their values count: `traffic` adds them up
        return self._torch.full((B,), N, dtype=self._torch.int64, device=device)


def operator_jobs(
    layers: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    operators: Sequence[str] | None,
    dtype: str,
    device: str,
    context: int = CONTEXT,
) -> Iterator[Job]:
    """A job per size, layer and operator, in this order, so that the first size is done first everywhere.

    layers: of `refllm.kernels.cases`. sizes: pairs (sequences, tokens of each). operators: None for those that the
    model of a layer runs. One token per sequence attends to `context` slots. Raises InputError for an unknown operator.
    """
    from refllm.kernels import OPERATORS

    for name in operators or ():
        if name not in OPERATORS:
            raise InputError(f"--operator {name} is not known: use one of {', '.join(OPERATORS)}")
    for B, S in sizes:
        for layer in layers:
            for operator in operators or USED.get(layer.name, OPERATORS):
                if operator == ("attention" if S == 1 else "decode_attention"):
                    continue
                numbers = {"B": B, "S": S, "E": layer.E, "F": layer.F, "H": layer.H, "K": layer.K}
                numbers |= {"D": layer.D, "R": layer.R, "V": layer.V}
                if operator == "decode_attention":
                    numbers["N"] = context
                draw = partial(_DRAWN[operator], layer, B, S, dtype, device, context)
                yield Job(operator, layer.name, f"{B} x {S} tokens", dtype, numbers, draw)


def attention_jobs(
    head_dims: Sequence[int],
    lengths: Sequence[int],
    batches: Sequence[int],
    dtype: str,
    device: str,
    tokens: int,
    one_in: int = 1,
) -> Iterator[Job]:
    """Causal prefill of `tokens` in all (at least one sequence) at each length, then decoding over caches as long.

    batches: sequences per decoding step. one_in: of so many heads of the model one is taken. Raises InputError for a
    head size outside 8..256.
    """
    for D in head_dims:
        if not 8 <= D <= 256:
            raise InputError(f"--head-dim {D} is outside 8..256")
    for kind, length in [*(("prompt", S) for S in lengths), *(("cache", N) for N in lengths)]:
        for D in head_dims:
            H, K = (max(1, heads // one_in) for heads in HEADS.get(D, (32, 32)))
            panel, heads = f"D {D}, {H} heads over {K}", {"H": H, "K": K, "D": D}
            if kind == "prompt":
                numbers = {"B": max(1, tokens // length), "S": length, **heads}
                draw = partial(_draw_prefill, numbers, dtype, device)
                yield Job("attention", panel, f"{numbers['B']} x {length} tokens", dtype, numbers, draw)
                continue
            for B in batches:
                numbers = {"B": B, "S": 1, "N": length, **heads}
                draw = partial(_draw_decoding, numbers, dtype, device)
                yield Job("decode_attention", panel, f"{B} x {length} slots", dtype, numbers, draw)


def traffic_of(job: Job, call: Arguments) -> Traffic:
    """Bytes and flops of a drawn call."""
    return traffic(job.operator, *call)


def _norms(count: int, bias: bool) -> Callable[..., Arguments]:
    def draw(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
        source = Source(dtype, device, seed)
        inputs = [source.normal(B, S, layer.E) for _ in range(count)]
        vectors = [source.normal(layer.E)] + ([source.normal(layer.E)] if bias else [])
        return [*inputs, *vectors, 1e-5], {}

    return draw


def _heads(source: Source, layer: Any, B: int, S: int) -> tuple[Any, Any]:
    """q and k as projections leave them: [B, H, S, D], in memory [B, S, H, D]."""
    q, k = (source.normal(B, S, heads, layer.D).transpose(1, 2) for heads in (layer.H, layer.K))
    return q, k


def _rope(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    return [*_heads(source, layer, B, S), *source.table(S, layer.R)], {"interleaved": layer.interleaved}


def _norm_rope(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    q, k = _heads(source, layer, B, S)
    weights = source.normal(layer.H, layer.D), source.normal(layer.K, layer.D)
    return [q, k, *weights, *source.table(S, layer.R), 1e-5], {"norm": "layer", "interleaved": layer.interleaved}


def _qkv(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    w_qkv = source.normal((layer.H + 2 * layer.K) * layer.D, layer.E, scale=layer.E**-0.5)
    heads = {"num_heads": layer.H, "num_kv_heads": layer.K, "interleaved": layer.interleaved}
    x, weight = source.normal(B, S, layer.E), source.normal(layer.E)
    return [x, weight, w_qkv, None, *source.table(S, layer.R), 1e-5], heads


def _attention(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    return _draw_prefill({"B": B, "S": S, "H": layer.H, "K": layer.K, "D": layer.D}, dtype, device, seed)


def _decode_attention(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    numbers = {"B": B, "S": S, "N": context, "H": layer.H, "K": layer.K, "D": layer.D}
    return _draw_decoding(numbers, dtype, device, seed)


def _draw_prefill(n: dict[str, int], dtype: str, device: str, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    q = source.normal(n["B"], n["S"], n["H"], n["D"]).transpose(1, 2)
    k, v = (source.normal(n["B"], n["K"], n["S"], n["D"]) for _ in range(2))
    return [q, k, v], {}


def _draw_decoding(n: dict[str, int], dtype: str, device: str, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    q = source.normal(n["B"], n["S"], n["H"], n["D"]).transpose(1, 2)
    k, v = (source.normal(n["B"], n["K"], n["N"], n["D"]) for _ in range(2))
    return [q, k, v, source.lengths(n["B"], n["N"])], {}


def _swiglu(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    both = Source(dtype, device, seed).normal(B, S, 2 * layer.F, scale=2.0)
    return [both[..., : layer.F], both[..., layer.F :]], {}


def _relu2(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    return [Source(dtype, device, seed).normal(B, S, layer.F, scale=2.0)], {}


def _cross_entropy(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    return [source.normal(B * S, layer.V, scale=3.0), source.labels(layer.V, B * S)], {"reduction": "none"}


def _linear_cross_entropy(layer: Any, B: int, S: int, dtype: str, device: str, context: int, seed: int) -> Arguments:
    source = Source(dtype, device, seed)
    x, weight = source.normal(B * S, layer.E), source.normal(layer.V, layer.E, scale=layer.E**-0.5)
    return [x, weight, source.labels(layer.V, B * S)], {"reduction": "none"}


_DRAWN: dict[str, Callable[..., Arguments]] = {
    "rms_norm": _norms(1, False),
    "add_rms_norm": _norms(2, False),
    "layer_norm": _norms(1, True),
    "add_layer_norm": _norms(2, True),
    "rope": _rope,
    "norm_rope": _norm_rope,
    "rms_norm_qkv_rope": _qkv,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "swiglu": _swiglu,
    "relu2": _relu2,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
