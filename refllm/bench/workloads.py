"""The calls that are timed: operators on the layers of published models, and attention by head size and length.

A call is drawn as often as the clock asks for (`Job.draw`), each time with other random numbers in memory of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from refllm.bench.traffic import Traffic, traffic
from refllm.errors import InputError
from refllm.ops.contracts import OPERATORS, contract_of

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
"""Heads by head size: StableLM-2-1.6B, StableLM-3B, Helium-1-preview, StableLM-2-12B."""


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


def operator_jobs(
    layers: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    operators: Sequence[str] | None,
    dtype: str,
    device: str,
    context: int = CONTEXT,
) -> Iterator[Job]:
    """A job per size, layer and operator, in this order, so that the first size is done first everywhere.

    layers: of `refllm.kernels.calls`. sizes: pairs (sequences, tokens of each). operators: None for those that the
    model of a layer runs. One token per sequence attends to `context` slots. Raises InputError for an unknown operator.
    """
    for name in operators or ():
        if name not in OPERATORS:
            raise InputError(f"--operator {name} is not known: use one of {', '.join(OPERATORS)}")
    for B, S in sizes:
        for layer in layers:
            for operator in operators or USED.get(layer.name, OPERATORS):
                if operator == ("attention" if S == 1 else "decode_attention"):
                    continue
                numbers = layer.sizes(B=B, S=S, **({"N": context} if operator == "decode_attention" else {}))
                draw = partial(_draw, operator, numbers, dtype, device, interleaved=layer.interleaved)
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
                draw = partial(_draw, "attention", numbers, dtype, device)
                yield Job("attention", panel, f"{numbers['B']} x {length} tokens", dtype, numbers, draw)
                continue
            for B in batches:
                numbers = {"B": B, "S": 1, "N": length, **heads}
                draw = partial(_draw, "decode_attention", numbers, dtype, device)
                yield Job("decode_attention", panel, f"{B} x {length} slots", dtype, numbers, draw)


def traffic_of(job: Job, call: Arguments) -> Traffic:
    """Bytes and flops of a drawn call."""
    return traffic(job.operator, *call)


def _draw(
    operator: str, sizes: dict[str, int], dtype: str, device: str, seed: int, interleaved: bool = False
) -> Arguments:
    from refllm.kernels import calls

    given = {"reduction": "none"} if "labels" in contract_of(operator).arguments else {}
    bias = operator != "rms_norm_qkv_rope"  # those of the layers have none
    return calls.call(operator, sizes, calls.Source(dtype, device, seed), bias=bias, interleaved=interleaved, **given)
