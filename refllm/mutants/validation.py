"""Is the check sharp, and does it raise no false alarm? `python -m refllm.mutants.validation` measures both.

*Sharpness*: every defect of `refllm.mutants.models` is planted in the middle layer of every embedded checkpoint that
can host it, in a Transformers model; the check must report it, in that layer and at that operator. *False alarms*: runs
without a defect, over prompts, precisions, attention implementations, threads and stressed inputs; every one must hold.
*Calibration*: over the same runs, the measured error over the predicted one, value by value.

Needs Torch and Transformers. The results are committed as docs/validation.md and docs/validation.json.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.measure import Measure
from refllm.accuracy.verdicts import verdict
from refllm.check.adapters.transformers import TransformersCandidate
from refllm.check.candidates import record
from refllm.check.inputs import Inputs, stressed
from refllm.check.losses import MUTANTS as LOSS_MUTANTS
from refllm.check.losses import compare_loss, correct
from refllm.check.oracle import Report, judge
from refllm.forward.model import Model
from refllm.mutants.models import Mutant, catalogue
from refllm.ops import IGNORE_INDEX
from refllm.precision import HF_EAGER, HF_SDPA
from refllm.storage import output_file

TOKENS = 61
"""Length of the plain inputs: no multiple of a tile, since tails are where kernels go wrong."""
DTYPES = ("bfloat16", "float16", "float32")
POLICY = {"eager": HF_EAGER, "sdpa": HF_SDPA}
Log = Callable[[str], None]


@dataclass
class Outcome:
    """What the check said of one mutant. reported: the first failure, "" if everything held. right: it is one of those
    expected. inputs: the input that showed it (stressed inputs are tried only where the plain one does not)."""

    reported: str
    layer_right: bool
    right: bool
    rules: list[str]
    inputs: str


@dataclass
class Case:
    """One mutant in one checkpoint."""

    mutant: str
    area: str
    source: str
    checkpoint: str
    layer: int
    dtype: str
    attention: str
    expected: tuple[str, ...]
    equivalent: str
    plain: Outcome
    stressed: Outcome | None = None
    result_holds: bool | None = None
    """Whether the logits are within the predicted error, for equivalent mutants."""

    @property
    def found(self) -> bool:
        return self.plain.right or (self.stressed is not None and self.stressed.right)


@dataclass
class Run:
    """One run without a defect. ratios: value -> (end to end, isolated), where an error is predicted. closest: rule ->
    the largest share of its limit that any value reached."""

    model: str
    dtype: str
    attention: str
    inputs: str
    threads: int
    seed: int
    verdict: str
    reported: str
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    closest: dict[str, float] = field(default_factory=dict)


class Pair:
    """A checkpoint as the exact model and as a Transformers model, in one precision."""

    def __init__(self, folder: Path, dtype: str, attention: str) -> None:
        import refllm

        self.attention = attention
        self.model: Model = refllm.load(folder, head="causal_lm", dtype=dtype)
        self.candidate = TransformersCandidate.load(folder, head="causal_lm", dtype=dtype, attention=attention)

    def check(self, inputs: Inputs) -> Report:
        """The report on the Transformers model as it is now."""
        trace = record(self.candidate, self.model, inputs)
        return judge(self.model, trace, POLICY[self.attention])

    def tokens(self, seed: int, batch: int = 1, length: int = TOKENS) -> np.ndarray:
        """Random ids [batch, length]."""
        return np.random.default_rng(seed).integers(0, self.model.config.vocab_size, (batch, length))


# ----------------------------------------------------------------------------------------------------------- sharpness


def sharpness(folders: dict[str, Path], mutants: list[Mutant], log: Log = lambda text: None) -> list[Case]:
    """Every mutant in every checkpoint where it changes anything."""
    from refllm.config import AutoConfig

    cases = []
    for name, folder in folders.items():
        config = AutoConfig.from_pretrained(folder)
        pairs: dict[tuple[str, str], Pair] = {}
        for mutant in mutants:
            if mutant.applies(config):
                key = (mutant.dtype, mutant.attention)
                if key not in pairs:
                    pairs[key] = Pair(folder, *key)
                cases.append(_case(name, mutant, pairs[key]))
        log(f"{name}: {sum(case.checkpoint == name for case in cases)} mutants")
    return cases


def _case(checkpoint: str, mutant: Mutant, pair: Pair) -> Case:
    layer = pair.model.config.num_hidden_layers // 2
    ids = pair.tokens(seed=0)
    expected = mutant.reported_at(layer)

    def outcome(inputs: Inputs) -> tuple[Outcome, Report]:
        with mutant.planted(pair.candidate.model, layer):
            report = pair.check(inputs)
        first = report.first_failure
        name = "" if first is None else first.name
        place = f"model.layers.{layer}"
        in_layer = name == place or name.startswith(f"{place}.")
        right_layer = name in expected or (in_layer and expected[0].startswith(place))
        return Outcome(name, right_layer, name in expected, [] if first is None else first.broken, inputs.label), report

    plain, report = outcome(Inputs(ids))
    case = Case(
        mutant=mutant.name,
        area=mutant.area,
        source=mutant.source,
        checkpoint=checkpoint,
        layer=layer,
        dtype=mutant.dtype,
        attention=mutant.attention,
        expected=expected,
        equivalent=mutant.equivalent,
        plain=plain,
    )
    if mutant.equivalent:
        case.result_holds = _result_holds(report)
    elif not plain.right:
        for inputs in stressed(ids):
            case.stressed, _ = outcome(inputs)
            if case.stressed.right:
                break
    return case


def _result_holds(report: Report) -> bool:
    logits = next(tap for tap in report.taps if tap.name == "lm_head")
    return not logits.broken and not (report.next_tokens and report.next_tokens.defects)


def loss_cases(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Every mutated loss, and the correct one, on the logits of every checkpoint."""
    import torch

    rows = []
    for name, folder in folders.items():
        pair = Pair(folder, "bfloat16", "eager")
        ids = pair.tokens(seed=0, batch=2)
        labels = np.where(np.random.default_rng(1).random(ids.shape) < 0.2, IGNORE_INDEX, ids)
        with torch.inference_mode():
            logits = pair.candidate.model(torch.from_numpy(ids)).logits.float()
            for mutant, loss in {"correct": correct, **LOSS_MUTANTS}.items():
                found = compare_loss(logits.numpy(), labels, float(loss(logits, torch.from_numpy(labels))))
                rows.append({"loss": mutant, "checkpoint": name, "sigmas": found.sigmas, "holds": found.holds})
    return rows


# --------------------------------------------------------------------------------------- false alarms and calibration


def legitimate(folders: dict[str, Path], seeds: int, log: Log = lambda text: None) -> list[Run]:
    """Runs without a defect. Each seed draws a batch, a length and token ids; odd seeds use two threads."""
    runs = []
    for name, folder in folders.items():
        for dtype in DTYPES:
            for attention in POLICY:
                pair = Pair(folder, dtype, attention)
                for seed in range(seeds):
                    rng = np.random.default_rng(seed)
                    ids = pair.tokens(seed, batch=int(rng.integers(1, 3)), length=int(rng.integers(5, 90)))
                    with _threads(1 + seed % 2) as threads:
                        runs += [
                            _run(name, pair, inputs, threads=threads, seed=seed)
                            for inputs in [Inputs(ids), *stressed(ids)]
                        ]
        log(f"{name}: {sum(run.model == name for run in runs)} runs without a defect")
    return runs


def deep(folder: Path, log: Log = lambda text: None) -> list[Run]:
    """The same for random models of 24 layers, written to `folder`."""
    runs = []
    for name in ("llama", "stablelm"):
        path = folder / f"{name}-24"
        deep_model(name).save_pretrained(path, dtype="float32")
        for dtype in DTYPES:
            for attention in POLICY:
                pair = Pair(path, dtype, attention)
                runs.append(_run(f"{name}, 24 layers", pair, Inputs(pair.tokens(0, length=128)), threads=1, seed=0))
    log(f"24 layers: {len(runs)} runs without a defect")
    return runs


def deep_model(family: str) -> Model:
    """A random model of 24 layers, its weights scaled as those of the embedded checkpoints."""
    from refllm.config import AutoConfig
    from refllm.golden.make_checkpoints import weight
    from refllm.models import families
    from refllm.precision import arithmetic
    from refllm.storage.weights import Weights

    config = AutoConfig.for_model(
        family,
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    cls = families.find(family, "causal_lm")
    assert cls is not None
    shapes = cls.tensors(config)
    tensors = {name: weight(f"{family}-24", name, shape, config).astype(np.float32) for name, shape in shapes.items()}
    return cls(config, Weights(shapes, tensors, tied=cls.tied(config)), arithmetic("float32"))


def _run(name: str, pair: Pair, inputs: Inputs, *, threads: int, seed: int) -> Run:
    report = pair.check(inputs)
    first = report.first_failure
    said = "" if first is None else f"{first.name}: {', '.join(first.broken)}"
    run = Run(name, report.dtype, pair.attention, inputs.label, threads, seed, report.verdict, said)
    for tap in report.taps:
        if tap.isolated is not None and tap.end_to_end.rms_sigma > 0 and tap.isolated.rms_sigma > 0:
            run.ratios[tap.name] = (tap.end_to_end.ratio, tap.isolated.ratio)
        if tap.isolated is not None:
            for rule, share in _shares_of_limits(tap.end_to_end, tap.isolated, tap.dtype):
                run.closest[rule] = max(run.closest.get(rule, 0.0), share)
    flips = report.next_tokens.flips if report.next_tokens else []
    run.closest["next token"] = max((flip.sigmas / limits.FLIP for flip in flips), default=0.0)
    return run


def _shares_of_limits(end_to_end: Measure, isolated: Measure, dtype: str) -> Iterator[tuple[str, float]]:
    yield "error end to end", end_to_end.ratio / limits.end_to_end_limit(end_to_end)
    yield "error", isolated.ratio / limits.isolated_limit(isolated, dtype)
    yield "one row", isolated.row_ratio / limits.row_limit(isolated, dtype)
    yield "rounding points", isolated.misrounded / limits.misrounded_limit(isolated.elements)


class _threads:
    """Torch uses `count` threads inside."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> int:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)
        return self.count

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self.before)


# ------------------------------------------------------------------------------------------------------------- command


@dataclass
class Validation:
    """Everything that was measured."""

    cases: list[Case]
    losses: list[dict[str, Any]]
    runs: list[Run]
    seconds: float
    versions: dict[str, str]

    @property
    def false_alarms(self) -> list[Run]:
        return [run for run in self.runs if run.verdict != "holds"]

    @property
    def defects(self) -> list[Case]:
        """Cases whose mutant is no equivalent one."""
        return [case for case in self.cases if not case.equivalent]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Of the runs only the extremes of each operator are kept, and what failed."""
        from refllm.mutants.validation_page import calibration_rows, closest_rows

        return {
            "versions": self.versions,
            "seconds": round(self.seconds),
            "mutants": [asdict(case) for case in self.cases],
            "losses": self.losses,
            "runs": len(self.runs),
            "false_alarms": [asdict(run) for run in self.false_alarms],
            "closest_to_limits": closest_rows(self.runs),
            "calibration": calibration_rows(self.runs),
        }

    @property
    def holds(self) -> bool:
        """No false alarm, every mutant found and named, 95 % of them by plain inputs, every loss judged rightly."""
        plain = sum(case.plain.right for case in self.defects)
        return (
            not self.false_alarms
            and all(case.found for case in self.defects)
            and plain >= 0.95 * len(self.defects)
            and all(case.result_holds for case in self.cases if case.equivalent)
            and all(row["holds"] == (row["loss"] == "correct") for row in self.losses)
        )


def validate(seeds: int = 2, log: Log = lambda text: None) -> Validation:
    """All three measurements on the embedded checkpoints."""
    import torch
    import transformers

    from refllm import golden
    from refllm.check.adapters.transformers import quiet_transformers

    quiet_transformers()
    start = time.perf_counter()
    folders = {name: Path(path) for name, path in golden.checkpoints().items()}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary, _threads(1):
        warnings.simplefilter("ignore")
        cases = sharpness(folders, catalogue(), log)
        losses = loss_cases(folders)
        runs = [*legitimate(folders, seeds, log), *deep(Path(temporary), log)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return Validation(cases, losses, runs, time.perf_counter() - start, versions)


def _files(arguments: argparse.Namespace, found: Validation) -> Iterator[tuple[Path, str]]:
    from refllm.mutants.validation_page import page

    if arguments.json:
        yield arguments.json, json.dumps(found.to_dict(), indent=1) + "\n"
    if arguments.markdown:
        yield arguments.markdown, page(found)


def main() -> int:
    """The command. Exit code 1 where the check misses a mutant or raises a false alarm."""
    parser = argparse.ArgumentParser(description="Measure how sharp the check is, and that it raises no false alarm.")
    parser.add_argument("--seeds", type=int, default=2, help="prompts per checkpoint, precision and attention")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    found = validate(arguments.seeds, log=lambda text: print(text, flush=True))
    for path, text in _files(arguments, found):
        path.parent.mkdir(parents=True, exist_ok=True)
        output_file.replace(path, text)
    print(verdict(not found.holds))
    return 0 if found.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
