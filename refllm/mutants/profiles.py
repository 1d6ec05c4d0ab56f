"""Right ports that round elsewhere than Transformers, run without a mistake, and with one on top."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy.limits import GRANTED
from refllm.check.candidates import record
from refllm.check.chosen_embeddings import chosen
from refllm.check.inputs import Inputs, stressed
from refllm.check.oracle import Report, judge
from refllm.check.trace import Trace
from refllm.forward.model import Model
from refllm.mutants.honest import FUSED, HF, Honest
from refllm.mutants.runs import Outcome, Run, run_of

PROFILES: dict[str, Honest] = {
    "as Transformers": HF,
    "float32 inside": FUSED,
    "float32 SwiGLU": HF.but(act="once"),
    "float32 rotation": HF.but(rotation="float32"),
    "exact tables": HF.but(rotation="float32", tables="exact"),
    "norms once": HF.but(norm="once"),
    "float32 stream": HF.but(stream="float32"),
    "sums read unrounded": FUSED.but(stream="read unrounded"),
    "attention and MLP added first": HF.but(stream="together"),
    "float32 head": FUSED.but(head="float32"),
    "float32 attention": HF.but(attention="float32"),
    "scale folded into q": HF.but(attention="scale in q"),
    "scale rounded": FUSED.but(attention="scale rounded"),
    "sdpa": HF.but(attention="sdpa"),
    "exp2 frequencies": FUSED.but(tables="exp2"),
    "frequencies by products": FUSED.but(tables="products"),
    "all but attention in float32": FUSED.but(stream="float32", attention="eager"),
    "stream read unrounded, exp2": HF.but(
        attention="float32", stream="read unrounded", tables="exp2", rotation="float32"
    ),
    "sdpa, float32 stream and head": FUSED.but(attention="sdpa", stream="float32", tables="exact", head="float32"),
    "scale in q, norms twice": FUSED.but(attention="scale in q", norm="twice", tables="products"),
}
"""Places where honest stacks round, and some of them together."""

_LAYER = 1
_LENGTH = 61


class Port:
    """A right port as a candidate."""

    def __init__(self, how: Honest, folder: Path, dtype: str) -> None:
        self.how, self.folder, self.dtype = how, folder, dtype
        self.name, self.details = "port", dict[str, str]()

    def run(self, inputs: Inputs, sink: Any) -> None:
        """See `refllm.check.candidates.Candidate.run`; without a cache."""
        how = self.how.but(embeds_scale=inputs.embeds_scale or 1.0, embeds=inputs.embeds)
        forward = how.in_dtype(self.dtype)
        sink("lm_head", forward(str(self.folder), inputs.input_ids, inputs.mask, inputs.positions, sink))


# ---------------------------------------------------------------------------------------------------------- right runs


def drawn(rng: np.random.Generator, vocab_size: int) -> Inputs:
    """One or two rows of 5 to 89 random tokens: as they are, with padding on the left, or from position 4000 on."""
    B, S, kind = int(rng.integers(1, 3)), int(rng.integers(5, 90)), int(rng.integers(0, 3))
    ids, mask = rng.integers(0, vocab_size, (B, S)), np.ones((B, S), np.int64)
    if kind == 1:
        mask[0, : min(S // 3, 7)] = 0
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0) + (4000 if kind == 2 else 0)
    return Inputs(ids, mask, positions, label=("tokens", "padding", "far positions")[kind])


def right_runs(name: str, folder: Path, dtypes: tuple[str, ...], seeds: Iterable[int]) -> list[Run]:
    """Every profile in every precision, once for each seed; no policy is named."""
    return [run for dtype in dtypes for run in _right_runs(name, folder, _model(folder, dtype), seeds)]


def _right_runs(name: str, folder: Path, model: Model, seeds: Iterable[int]) -> Iterator[Run]:
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for profile, how in PROFILES.items():
            inputs = drawn(rng, model.config.vocab_size)
            as_transformers, trace = (record(Port(h, folder, model.dtype), model, inputs) for h in (HF, how))
            report = judge(model, trace)
            yield run_of(report, name, profile, threads=1, seed=seed, elsewhere=_differ(as_transformers, trace))


def _differ(one: Trace, other: Trace) -> bool:
    """Whether any value that both show differs in any bit, where no padding is."""
    common = one.taps.keys() & other.taps.keys()
    return any(not np.array_equal(_seen(one, name), _seen(other, name)) for name in common)


def _seen(trace: Trace, name: str) -> np.ndarray:
    value = trace.taps[name]
    return (value if value.ndim == 3 else value.transpose(0, 2, 1, 3))[trace.inputs.valid]


def _model(folder: Path, dtype: str) -> Model:
    import refllm

    model: Model = refllm.load(folder, head="causal_lm", dtype=dtype)
    return model


# ------------------------------------------------------------------------------------------------------------ mistakes

Change = Callable[[dict[str, Any]], None]


def _put(**changes: Callable[[Any], Any]) -> Change:
    return lambda a: a.update({name: change(a[name]) for name, change in changes.items()})


def _rounded(x: Any, times: float = 1.0) -> Any:
    """x times a factor, rounded to its format (float32 to bfloat16), and divided by it again."""
    import torch

    if x.dtype == torch.float32:
        return (x * times).to(torch.bfloat16).to(x.dtype) / times
    return (x * times).to(x.dtype) / times


def _swapped(a: dict[str, Any]) -> None:
    a["gate"], a["up"] = a["up"], a["gate"]


def _n_minus_1(a: dict[str, Any]) -> None:
    mean = a["mean"]
    a["mean"] = lambda x: mean(x) * (x.shape[-1] / (x.shape[-1] - 1))


def _one_key_more(mask: Any) -> Any:
    import torch

    return mask | torch.eye(mask.shape[-1], dtype=torch.bool).roll(1, -1)


def _last_tile_zero(x: Any) -> Any:
    import torch

    return torch.cat([x[..., :-8], 0 * x[..., -8:]], dim=-1)


def _through_float8(x: Any) -> Any:
    import torch

    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _one_stale(a: dict[str, Any]) -> None:
    flat = a["y"].view(-1)
    flat[300] = flat[299]


_NORM, _CONTEXT = "input_layernorm", "self_attn.context"
MISTAKES: dict[str, tuple[str, Change, str]] = {
    "gate and up swapped": ("act", _swapped, "mlp.act"),
    "1 / root rounded": (_NORM, _put(narrow=lambda _: _rounded), _NORM),
    "eps times 10": (_NORM, _put(eps=lambda eps: eps * 10), _NORM),
    "divided by n - 1": (_NORM, _n_minus_1, _NORM),
    "norm weight plus one": (_NORM, _put(w=lambda w: w + 1), _NORM),
    "norm's input rounded once more": (_NORM, _put(x=lambda x: _rounded(x.float(), 0.7)), _NORM),
    "q_proj bias dropped": ("q_proj", _put(b=lambda b: None), "self_attn.q_proj"),
    "o_proj 1 % too large": ("o_proj", _put(w=lambda w: w * 1.01), "self_attn.o_proj"),
    "scale 1 % too small": ("attention", _put(scale=lambda scale: scale * 0.99), _CONTEXT),
    "one key of the future seen": ("attention", _put(mask=_one_key_more), _CONTEXT),
    "v rounded once more": ("attention", _put(v=lambda v: _rounded(v, 0.7)), _CONTEXT),
    "positions one later": (
        "q_rope",
        _put(cos=lambda t: t.roll(-1, 1), sin=lambda t: t.roll(-1, 1)),
        "self_attn.q_rope",
    ),
    "last tile of down_proj dropped": ("down_proj", _put(x=_last_tile_zero), "mlp.down_proj"),
    "down_proj's input in float8": ("down_proj", _put(x=_through_float8), "mlp.down_proj"),
    "up rounded once more": ("act", _put(up=lambda up: _rounded(up, 0.7)), "mlp.act"),
    "one element stale": ("output", lambda a: _one_stale(a), ""),
}
"""Mistake -> operator of `refllm.mutants.honest` whose arguments it changes, how, and the value that it is in."""


@dataclass
class Planted:
    """A mistake on top of a profile, in one layer of one checkpoint. plain, stressed: as of other mutants; stressed
    inputs are those without a cache, and are tried only where plain ones do not suffice. changed: where neither do, the
    most elements of the value it is in that it changes to the bit in any of these runs."""

    mistake: str
    profile: str
    checkpoint: str
    dtype: str
    plain: Outcome
    stressed: Outcome | None = None
    changed: int | None = None

    @property
    def found(self) -> bool:
        return self.plain.right or (self.stressed is not None and self.stressed.right)

    @property
    def invisible(self) -> bool:
        """Whether no value says anything of it: it changes no more elements than are granted to any right code."""
        return self.changed is not None and self.changed <= GRANTED


def planted_runs(name: str, folder: Path, dtype: str, every: int = 1, turn: int = 0) -> list[Planted]:
    """Every mistake on top of every profile, of those that this checkpoint can have; of `every` pairs the `turn`-th."""
    model = _model(folder, dtype)
    mistakes = mistakes_for(model)
    pairs = [(i + j, m, p) for i, m in enumerate(mistakes) for j, p in enumerate(PROFILES)]
    return [_planted(name, folder, model, m, p) for n, m, p in pairs if n % every == turn % every]


def mistakes_for(model: Model) -> list[str]:
    """Those that a model can have."""
    return [mistake for mistake in MISTAKES if _applies(mistake, model)]


def _applies(mistake: str, model: Model) -> bool:
    if mistake == "q_proj bias dropped":
        return model.weights.get(f"layers.{_LAYER}.self_attn.q_proj.bias") is not None
    return mistake != "gate and up swapped" or bool(model.config.hidden_act == "silu")


def with_mistake(how: Honest, mistake: str) -> Honest:
    """The port with a mistake in one layer."""
    operator, change, _ = MISTAKES[mistake]

    def plant(where: str, layer: int, arguments: dict[str, Any]) -> None:
        if (where, layer) == (operator, _LAYER):
            change(arguments)

    return how.but(plant=plant)


def _planted(name: str, folder: Path, model: Model, mistake: str, profile: str) -> Planted:
    expected = f"model.layers.{_LAYER}.{MISTAKES[mistake][2]}".rstrip(".")
    right = PROFILES[profile]
    wrong = with_mistake(right, mistake)

    def traced(inputs: Inputs, how: Honest = wrong) -> Trace:
        return record(Port(how, folder, model.dtype), model, inputs)

    def outcome(inputs: Inputs) -> Outcome:
        return _outcome(judge(model, traced(inputs)), expected)

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, _LENGTH))
    case = Planted(mistake, profile, name, model.dtype, outcome(Inputs(ids)))
    if case.plain.right:
        return case
    more = [inputs for inputs in (*stressed(ids), *chosen(model, ids)) if not inputs.chunks]
    for inputs in more:
        case.stressed = outcome(inputs)
        if case.stressed.right:
            return case
    both = ((traced(inputs), traced(inputs, right)) for inputs in (Inputs(ids), *more))
    case.changed = max(int(np.sum(_seen(one, expected) != _seen(other, expected))) for one, other in both)
    return case


def _outcome(report: Report, expected: str) -> Outcome:
    first = report.first_failure
    if first is None:
        return Outcome("", False, False, [], report.inputs)
    right = first.name == expected and first.cause == "defect"
    place = f"model.layers.{_LAYER}"
    in_layer = first.name == place or first.name.startswith(f"{place}.")
    return Outcome(first.name, in_layer, right, first.broken, report.inputs, first.cause)
