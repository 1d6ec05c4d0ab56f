"""Backward passes that are checked for docs/gradients.md: right ones, and ones with a bug planted in them."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refllm.check.adapters.transformers import TransformersCandidate
from refllm.check.asked import Asked
from refllm.check.backward import judge_alone, tables_on_grid
from refllm.check.candidates import record
from refllm.check.inputs import Inputs
from refllm.check.learning import more_runs, with_labels
from refllm.check.oracle import Report, judge
from refllm.check.trace import Trace
from refllm.forward.model import Model
from refllm.forward.rotary import RotaryEmbedding
from refllm.golden.witness import to_torch
from refllm.mutants.gradients import GradientMutant, catalogue
from refllm.precision import HF_EAGER, HF_SDPA
from refllm.strategies.small_models import EVERY_FLAG, build, model_class, small_config

POLICIES = {"eager": HF_EAGER, "sdpa": HF_SDPA}
SEEDS = {"float32": 8}
"""Runs of one case, else 4, and 2 of 24 layers; every second is a padded batch in micro-batches. In float32 the errors
of few numbers (a bias, the norm of a head) scatter more."""
TOKENS = 45
"""No multiple of a block of the attention kernel."""
LAYERS = {"llama": 0, "helium": 0, "arcee": 0, "stablelm": 0, "stablelm parallel": 1}
"""Kind of model -> which of `EVERY_FLAG` it has."""


@dataclass(frozen=True)
class Case:
    """Some runs of one right implementation. how: "Transformers", "checkpointed", or "compiled" (norms, rotation and
    activations by torch.compile, judged wherever honest code may round)."""

    model: str
    layers: int
    dtype: str
    attention: str
    how: str = "Transformers"

    @property
    def key(self) -> str:
        """What it is called in the results."""
        return f"{self.model}, {self.layers} layers, {self.dtype}, {self.attention}, {self.how}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case. runs: how many; alarms: "input: value: rules" of those that do not hold. ratios: parameter
    -> measured over predicted error, end to end, pooled over the runs; alone: the least and the largest of any gradient
    on its own inputs."""

    runs: int
    alarms: list[str]
    ratios: dict[str, float]
    alone: tuple[float, float]


def cases() -> list[Case]:
    """All right implementations that are run."""
    found = [Case(m, 2, d, a) for m in LAYERS for d in ("bfloat16", "float16", "float32") for a in POLICIES]
    found += [Case(m, 2, d, "sdpa", "checkpointed") for m in LAYERS for d in ("bfloat16", "float32")]
    found += [Case(m, 2, "bfloat16", "eager", "compiled") for m in ("llama", "arcee")]
    return found + [Case(m, n, d, a) for n in (8, 24) for m in ("llama", "stablelm") for d, a in _DEEP]


_DEEP = (("bfloat16", "eager"), ("float16", "sdpa"))


@cache
def pair(model: str, layers: int, dtype: str, attention: str) -> tuple[Model, Any]:
    """A random model of ours, and Transformers' with the same weights."""
    family = model.partition(" ")[0]
    flags = EVERY_FLAG[family][LAYERS[model]]
    sizes = {"num_hidden_layers": layers, "vocab_size": 128, "tie_word_embeddings": model in ("helium", "stablelm")}
    ours = build(model_class(family), small_config(family, **{**flags, **sizes}), 7, dtype=dtype)
    return ours, to_torch(ours, dtype=dtype, attention=attention)


def run_case(case: Case) -> Outcome:
    """Checks a case."""
    squares: dict[str, list[float]] = {}
    alarms, alone, runs = list[str](), [np.inf, 0.0], 2 if case.layers > 8 else SEEDS.get(case.dtype, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = pair(case.model, case.layers, case.dtype, case.attention)
        with _as_it_runs(case, theirs):
            for seed in range(runs):
                report = _report(case, ours, theirs, seed)
                first = report.first_failure
                if report.verdict != "holds":
                    why = "; ".join([*report.unseen, *report.unsaid]) if first is None else ""
                    why = why or (f"{first.name}: {', '.join(first.broken)}" if first else "untested values")
                    alarms.append(f"{report.inputs}, seed {seed}: {why}")
                for tap in report.taps:
                    if tap.name.startswith("grad:") and tap.isolated is not None and tap.isolated.rms_sigma > 0:
                        alone = [min(alone[0], tap.isolated.ratio), max(alone[1], tap.isolated.ratio)]
                    if tap.name.startswith("grad:") and tap.name.endswith((".weight", ".bias")):
                        squares.setdefault(tap.name[5:], []).append(tap.end_to_end.ratio**2)
    ratios = {name: round(float(np.sqrt(np.mean(values))), 3) for name, values in squares.items()}
    return Outcome(runs, alarms, ratios, (round(alone[0], 3), round(alone[1], 3)))


def _report(case: Case, ours: Model, theirs: Any, seed: int) -> Report:
    candidate = TransformersCandidate(theirs, case.attention)
    inputs = inputs_of(ours, candidate, seed, micro_batches=bool(seed % 2))
    asked = Asked() if case.how == "compiled" else Asked(POLICIES[case.attention])
    return judge(ours, record(candidate, ours, inputs), asked)


def inputs_of(ours: Model, candidate: Any, seed: int, micro_batches: bool) -> Inputs:
    """Random tokens with labels: one row, or a padded batch in two micro-batches."""
    ids = np.random.default_rng(seed).integers(0, ours.config.vocab_size, (1, TOKENS))
    plain = with_labels(Inputs(ids), ours, candidate)
    return more_runs(plain, ours, candidate, stress=False)[0] if micro_batches else plain


def _as_it_runs(case: Case, model: Any) -> AbstractContextManager[None]:
    return {"checkpointed": _checkpointed, "compiled": _compiled}.get(case.how, lambda _: nullcontext())(model)


@contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def _compiled(model: Any) -> Iterator[None]:
    """Norms, activations and the rotation as torch.compile makes them of Transformers' own code."""
    import sys

    import torch

    modeling: Any = sys.modules[type(model).__module__]
    norm = type(model.model.norm)
    kept = norm.forward, modeling.apply_rotary_pos_emb, [layer.mlp.act_fn for layer in model.model.layers]
    norm.forward, modeling.apply_rotary_pos_emb = (torch.compile(f, dynamic=True) for f in kept[:2])
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.compile(layer.mlp.act_fn, dynamic=True)
    try:
        yield
    finally:
        norm.forward, modeling.apply_rotary_pos_emb = kept[:2]
        for layer, act in zip(model.model.layers, kept[2], strict=True):
            layer.mlp.act_fn = act


# -------------------------------------------------------------------------------------------------------------- planted


@dataclass(frozen=True)
class Found:
    """What the check says of one planted bug. reported: the first gradient that fails on its own inputs, "" for none;
    visible: whether any gradient differs from those of the right run at all."""

    mutant: str
    model: str
    dtype: str
    reported: str
    right: bool
    visible: bool


def planted(model: str, dtype: str) -> Iterator[Found]:
    """Every bug that a kind of model can have, in its last layer."""
    ours, theirs = pair(model, 2, dtype, "eager")
    candidate = TransformersCandidate(theirs, "eager")
    inputs = inputs_of(ours, candidate, 0, micro_batches=True)
    without = record(candidate, ours, inputs)
    for mutant in catalogue():
        if mutant.applies(ours.config):
            yield found_of(mutant, ours, candidate, inputs, without)


def found_of(mutant: GradientMutant, ours: Model, candidate: Any, inputs: Inputs, without: Trace | None) -> Found:
    """One of them. without: the run without a bug, to see whether the bug changes anything."""
    layer = 1
    if mutant.frozen:
        inputs = with_labels(inputs, ours, candidate, mutant.frozen)
    with mutant.plant(candidate.model, layer):
        trace = record(candidate, ours, inputs)
    tables = tables_on_grid(*RotaryEmbedding(ours.config, exact=False).tables(inputs.positions), trace.dtype, True)
    policy = HF_EAGER
    wrong = [tap for tap in judge_alone(ours, trace, Asked(policy), tables, policy) if tap.defect_here]
    first = wrong[0].name if wrong else ""
    before = {} if without is None else without.gradients
    same = bool(before) and all(
        np.array_equal(trace.gradients[n], g) for n, g in before.items() if n in trace.gradients
    )
    model = f"{ours.config.model_type}{' parallel' * bool(getattr(ours.config, 'use_parallel_residual', False))}"
    right = first in mutant.expected_at(layer, ours.config)
    return Found(mutant.name, model, trace.dtype, first, right, not same or bool(mutant.frozen))
