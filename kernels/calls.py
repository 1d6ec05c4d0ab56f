"""Calls of every operator on real shapes, made from its record: what is timed, checked on a GPU, and compiled.

    sizes = LAYERS[0].sizes(B=1, S=2048)                  # those of one decoder layer of a published model
    arguments, keywords = call("rope", sizes, Source("bfloat16", "cuda", seed=0))

The axes of an argument say its shape and its kind says its values (`refllm.ops.contracts`), so that a new operator has
its calls as soon as it has a record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from refllm.config import published
from refllm.config.traits import TRAITS
from refllm.errors import InputError
from refllm.ops.backward_contracts import BackwardContract
from refllm.ops.contracts import CONTRACTS, ROWS, Contract, contract_of

Arguments = tuple[list[Any], dict[str, Any]]

FIRST_POSITION = 1000
"""The first position of rotary tables: position 0 hides what is wrong."""


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

    def sizes(self, **more: int) -> dict[str, int]:
        """Its sizes by axis, and others: B sequences, S tokens of each, N slots of a cache, T keys."""
        return {axis: getattr(self, axis) for axis in "EFHKDRV"} | more


def layer_of(name: str) -> Layer:
    """That of a published model."""
    cls, sizes = published.MODELS[name]
    E, F, H, K = (sizes[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    D = sizes.get("head_dim", E // H)
    R = int(D * sizes.get("partial_rotary_factor", 1))
    interleaved = next(traits.interleaved for traits in TRAITS.values() if cls.startswith(traits.class_prefix))
    return Layer(name, E, F, H, K, D, R, sizes["vocab_size"], interleaved)


LAYERS = tuple(layer_of(name) for name in published.MODELS)
REDUCED = (
    Layer("reduced", 96, 160, 4, 2, 32, 32, 300, True),
    Layer("reduced partial", 80, 72, 4, 4, 40, 20, 257, False),
)
"""Shapes that the interpreter gets through in seconds, with the same oddities."""


class Source:
    """Random tensors of one dtype, drawn on the device from one seed; on "meta" shapes without memory.

    dtype: of Torch, or its name.
    """

    def __init__(self, dtype: str | torch.dtype, device: str, seed: int) -> None:
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.device = device
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        """N(mean, scale^2). Large tensors are drawn in parts, so that their float32 form never exists as a whole."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in out.view(-1).split(1 << 26) if self._generator else ():
            drawn = torch.randn(part.shape, generator=self._generator, device=self.device)
            part.copy_(drawn.mul_(scale).add_(mean))
        return out

    def below(self, high: int, *shape: int) -> torch.Tensor:
        """Integers from 0 to high - 1."""
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def table(self, S: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [S, R/2] of default RoPE from `FIRST_POSITION` on."""
        frequency = 1e4 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angle = torch.arange(FIRST_POSITION, FIRST_POSITION + S, dtype=torch.float64)[:, None] * frequency
        return angle.cos().to(self.device, self.dtype), angle.sin().to(self.device, self.dtype)


def call(operator: str, sizes: dict[str, int], source: Source, *, bias: bool = True, **given: Any) -> Arguments:
    """The arguments and keywords of one call. sizes: by axis; see `Layer.sizes`.

    bias: with the vector that norms and projections may add. given: other values for arguments by name, such as
    eps=1e-6 or key_mask=...; what has a default and is not given is left out. Raises InputError for another operator.
    """
    known = contract_of(operator)
    values = {
        "eps": 1e-5,
        "num_heads": sizes["H"],
        "num_kv_heads": sizes["K"],
        "interleaved": False,
        "norm": "layer",
        **_arrays(known, sizes, source),
        **({"dloss": source.normal().float()} if given.get("reduction") != "none" else {}),
        **given,
    }
    if not bias:
        values |= {name: None for name in known.arguments if known.kind(name) == "bias"}
    arguments, keywords = [], {}
    for name, p in known.parameters.items():
        if p.kind is not p.KEYWORD_ONLY:
            arguments.append(values[name])
        elif p.default is p.empty or name in given:
            keywords[name] = values[name]
    return arguments, keywords


def _arrays(known: Contract, sizes: dict[str, int], source: Source) -> dict[str, Any]:
    """Every argument that is an array, by name."""
    made: dict[str, Any] = {}
    for name, axes in known.arguments.items():
        if name not in made and known.kind(name) != "mask":
            made |= _array(known.kind(name), name, _shape(axes, sizes), sizes, source)
    wide = [f"d{name}" for name in known.forward.float32] if isinstance(known, BackwardContract) else []
    return made | {name: made[name].float() for name in wide if name in made}


def _array(kind: str, name: str, shape: tuple[int, ...], sizes: dict[str, int], source: Source) -> dict[str, Any]:
    """One argument, or those that are made together. Kinds: see `Contract`."""
    if kind == "table":
        return dict(zip(("cos", "sin"), source.table(sizes["S"], sizes["R"]), strict=True))
    if kind == "halves":
        both = source.normal(*shape[:-1], 2 * shape[-1], scale=2.0)
        return dict(zip(("gate", "up"), both.split(shape[-1], dim=-1), strict=True))
    if kind == "labels":
        return {name: source.below(sizes["V"], *shape)}
    if kind == "lengths":  # all of the cache; their values count, so they are not on "meta"
        device = "cpu" if source.device == "meta" else source.device
        return {name: torch.full(shape, sizes["N"], dtype=torch.int64, device=device)}
    if kind == "heads":  # as a projection leaves them: in memory [B, S, heads, D]
        B, heads, S, D = shape
        return {name: source.normal(B, S, heads, D).transpose(1, 2)}
    scale = {"matrix": max(1, *shape[-1:]) ** -0.5, "wide": 2.0, "logits": 3.0}.get(kind, 1.0)
    return {name: source.normal(*shape, scale=scale)}


def _shape(axes: tuple[str, ...], n: dict[str, int]) -> tuple[int, ...]:
    """Rows are B sequences of S tokens: two axes where there may be any number of them, one where it is called N."""
    shape: tuple[int, ...] = ()
    for i, axis in enumerate(axes):
        if axis == ROWS:
            shape += (n["B"], n["S"])
        elif axis == "N" and i == 0:
            shape += (n["B"] * n["S"],)
        elif axis == "(H+2K)D":
            shape += ((n["H"] + 2 * n["K"]) * n["D"],)
        else:
            shape += (n["R"] // 2 if axis == "R/2" else n.get("T", n["S"]) if axis == "T" else n[axis],)
    return shape


@dataclass(frozen=True)
class Call:
    """One call: operator(*arguments, **keywords). name says what is special about it."""

    operator: str
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


MOST_WORDS = 10_001
"""The largest vocabulary of linear_cross_entropy in `calls`: the definition holds its matrix in float64."""


def calls(layer: Layer, dtype: str, device: str, *, tokens: int, seed: int = 0) -> Iterator[Call]:
    """Every operator on the sizes of `layer`, with `tokens` positions; InputError for a dtype that kernels lack."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype={dtype!r} is not a kernel's; use float32, float16 or bfloat16")
    source, T = Source(dtype, device, seed), tokens + 13
    sizes = layer.sizes(B=2, S=tokens, T=T, N=T)
    for known in CONTRACTS.values():
        words = known.product and any("V" in axes for axes in known.arguments.values())
        n = sizes | ({"V": min(layer.V, MOST_WORDS)} if words else {})
        for name, more, given in _variants(known, n, source):
            arguments, keywords = call(known.operator, n | more, source, **{"interleaved": layer.interleaved} | given)
            yield Call(known.operator, name, tuple(arguments), keywords)


def _variants(
    known: Contract, n: dict[str, int], source: Source
) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """What is asked of an operator, by the kinds of its arguments: (name, other sizes, arguments given)."""
    kinds = {kind: name for name, kind in known.kinds.items()}
    if "labels" in kinds:
        labels = source.below(n["V"], n["B"] * n["S"])
        labels[::5] = -100
        for reduction in ("mean", "none"):
            yield reduction, {}, {"labels": labels, "reduction": reduction}
        return
    if "lengths" in kinds:
        lengths = torch.tensor([n["N"], n["N"] // 3], device=source.device)
        yield "1 token", {"S": 1}, {"lengths": lengths}
        yield "3 tokens", {"S": 3}, {"lengths": lengths}
        return
    if "heads" in kinds and "table" in kinds:
        for interleaved in (True, False):
            pairs = "interleaved" if interleaved else "half-split"
            for norm in known.choices.get("norm", ("",)):
                named = {"norm": norm} if norm else {}
                yield ", ".join([*named.values(), pairs]), {}, {"interleaved": interleaved, **named}
        return
    if "bias" in kinds:
        rows = next(iter(known.arguments))
        if "table" in kinds:
            yield "1 token", {"S": 1}, {kinds["bias"]: None}
        else:
            yield "mean 1000", {}, {rows: source.normal(n["B"], n["S"], n["E"], mean=1000.0), kinds["bias"]: None}
    if "mask" in kinds:
        yield "all keys", {}, {"causal": False, "scale": 0.2}
        yield "key mask", {}, {kinds["mask"]: source.below(4, n["B"], n["T"]) > 0}
    yield "", {}, {"return_lse": True} if "lse" in known.outputs else {}
