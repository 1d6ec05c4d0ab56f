"""Is the check sharp, and does it raise no false alarm? `python -m refllm.mutants.validation` measures both.

*Sharpness*: every defect of `refllm.mutants.models` is planted in the middle layer of every embedded checkpoint that
can host it, in a Transformers model; the check must report it, in that layer and at that operator. Every place is
planted in all layers; the check must hold and say so, and report it where a policy was named. *False alarms*: runs
without a defect, over prompts, precisions, attention implementations, threads and stressed inputs, and right ports that
round elsewhere (`refllm.mutants.profiles`); every one must hold. *Mistakes on top*: planted into those ports.
*Calibration*: over the same runs, the measured error over the predicted one, value by value.

With `--weights trained` all this is measured on the checkpoints that have learnt a text, and on words of that text:
weights as training leaves them, where designed ones have nothing idle and no outliers.

Needs Torch and Transformers. The results are committed as docs/validation.md, docs/validation.json and, of trained
weights, docs/validation-trained.json.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm.accuracy.verdicts import verdict
from refllm.check.adapters.transformers import TransformersCandidate
from refllm.check.asked import Asked
from refllm.check.candidates import record
from refllm.check.chosen_embeddings import chosen
from refllm.check.inputs import Inputs, stressed
from refllm.check.losses import MUTANTS as LOSS_MUTANTS
from refllm.check.losses import compare_loss, correct
from refllm.check.oracle import Report, judge
from refllm.check.trace import Trace
from refllm.forward.model import Model
from refllm.mutants.models import Mutant, catalogue
from refllm.mutants.profiles import Planted, planted_runs, right_runs
from refllm.mutants.runs import Outcome, Run, run_of
from refllm.ops import IGNORE_INDEX
from refllm.precision import HF_EAGER, HF_SDPA
from refllm.storage import output_file

TOKENS = 61
"""Length of the plain inputs: no multiple of a tile, since tails are where kernels go wrong."""
DTYPES = ("bfloat16", "float16", "float32")
POLICY = {"eager": HF_EAGER, "sdpa": HF_SDPA}
Log = Callable[[str], None]


@dataclass
class Case:
    """One mutant in one checkpoint. kind: defect, place or equivalent. layer: where it is planted; a place is in all.
    plain, stressed: what is said where no policy is named. named: plain inputs, where the model's own policy is named.
    """

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
    kind: str
    named: Outcome
    stressed: Outcome | None = None
    result_holds: bool | None = None
    """Whether the logits are within the predicted error, for equivalent mutants."""

    @property
    def found(self) -> bool:
        if self.kind == "place":
            return self.plain.right and self.named.right
        return self.plain.right or (self.stressed is not None and self.stressed.right)


class Pair:
    """A checkpoint as the exact model and as a Transformers model, in one precision."""

    def __init__(self, folder: Path, dtype: str, attention: str) -> None:
        import refllm

        self.attention, self.text = attention, _text(folder)
        self.model: Model = refllm.load(folder, head="causal_lm", dtype=dtype)
        self.candidate = TransformersCandidate.load(folder, head="causal_lm", dtype=dtype, attention=attention)

    def check(self, inputs: Inputs) -> Report:
        """The report on the Transformers model as it is now, which has to round where its policy says."""
        return judge(self.model, self.trace(inputs), POLICY[self.attention])

    def trace(self, inputs: Inputs) -> Trace:
        """The values of the Transformers model as it is now."""
        return record(self.candidate, self.model, inputs)

    def tokens(self, seed: int, batch: int = 1, length: int = TOKENS) -> np.ndarray:
        """Ids [batch, length]: random ones, for a checkpoint that has learnt a text words of it."""
        rng = np.random.default_rng(seed)
        if self.text is None:
            return rng.integers(0, self.model.config.vocab_size, (batch, length))
        return self.text[rng.integers(0, len(self.text) - length, (batch, 1)) + np.arange(length)]


def _text(folder: Path) -> np.ndarray | None:
    """The tokens that an embedded checkpoint was trained on, if it was."""
    from refllm import golden
    from refllm.golden.train_checkpoints import documents
    from refllm.text.tokenizer import Tokenizer

    return documents(Tokenizer.from_pretrained(folder)) if folder in golden.trained().values() else None


# ----------------------------------------------------------------------------------------------------------- sharpness


def sharpness(
    folders: dict[str, Path], mutants: list[Mutant], log: Log = lambda text: None, by_policy: bool = True
) -> list[Case]:
    """Every mutant in every checkpoint where it changes anything. by_policy: whether each is judged by the named policy
    as well, and not only those that this is about, which are places; else what it says is what is said without."""
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
                cases.append(_case(name, mutant, pairs[key], by_policy))
        log(f"{name}: {sum(case.checkpoint == name for case in cases)} mutants")
    return cases


def _case(checkpoint: str, mutant: Mutant, pair: Pair, by_policy: bool) -> Case:
    layer = pair.model.config.num_hidden_layers // 2
    ids = pair.tokens(seed=0)

    def traced(inputs: Inputs) -> Trace:
        model = pair.candidate.model
        with mutant.everywhere(model) if mutant.place else mutant.planted(model, layer):
            return pair.trace(inputs)

    def judged(trace: Trace) -> tuple[Outcome, Report]:
        report = judge(pair.model, trace, Asked(splits=mutant.splits))
        return _outcome(mutant, layer, report), report

    trace = traced(Inputs(ids))
    plain, report = judged(trace)
    named = plain
    if by_policy or mutant.place:
        named = _outcome(mutant, layer, judge(pair.model, trace, POLICY[pair.attention]))
    case = Case(
        mutant=mutant.name,
        area=mutant.area,
        source=mutant.source,
        checkpoint=checkpoint,
        layer=layer,
        dtype=mutant.dtype,
        attention=mutant.attention,
        expected=mutant.reported_at(0 if mutant.place else layer),
        equivalent=mutant.equivalent,
        kind=mutant.kind,
        plain=plain,
        named=named,
    )
    if mutant.equivalent:
        case.result_holds = _result_holds(report)
    elif not (plain.right or mutant.place):
        for inputs in (*stressed(ids), *chosen(pair.model, ids)):
            case.stressed, _ = judged(traced(inputs))
            if case.stressed.right:
                break
    return case


def _outcome(mutant: Mutant, layer: int, report: Report) -> Outcome:
    """What a report says of a mutant. A place is in every layer, so the first one is where it has to be reported."""
    layer = 0 if mutant.place else layer
    expected, place = mutant.reported_at(layer), f"model.layers.{layer}"
    first = report.first_failure
    name, rules, cause = ("", [], "") if first is None else (first.name, first.broken, first.cause)
    in_layer = name == place or name.startswith(f"{place}.")
    right_layer = name in expected or (in_layer and expected[0].startswith(place))
    right = name in expected
    elsewhere = [habit for habit in report.habits if habit.expected]
    said = [str(habit) for habit in elsewhere if any(words in habit.words for words in mutant.place)]
    if mutant.place and report.policy is None:
        right = report.verdict == "holds" and bool(said)
    elif mutant.place:
        right = right and cause == "place"
    return Outcome(name, right_layer, right, rules, report.inputs, cause, said)


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
                            for inputs in [Inputs(ids), *stressed(ids), *chosen(pair.model, ids)]
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
    return run_of(pair.check(inputs), name, pair.attention, threads=threads, seed=seed)


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

NAMED_FIRST = 0.97
"""The share of the mistakes on top of profiles that plain inputs have to name."""
PLAIN = 0.95
"""The same of the catalogue in Transformers models."""


@dataclass
class Validation:
    """Everything that was measured. ports: right ones that round elsewhere. planted: mistakes on top of them. asked:
    the options, that say how much was drawn."""

    cases: list[Case]
    losses: list[dict[str, Any]]
    runs: list[Run]
    seconds: float
    versions: dict[str, str]
    ports: list[Run] = field(default_factory=list)
    planted: list[Planted] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)
    weights: str = "designed"

    @property
    def false_alarms(self) -> list[Run]:
        return [run for run in [*self.runs, *self.ports] if run.verdict != "holds"]

    @property
    def defects(self) -> list[Case]:
        """Cases whose mutant is one that has to be reported."""
        return [case for case in self.cases if case.kind == "defect"]

    @property
    def places(self) -> list[Case]:
        """Cases whose mutant has to be said, and is a finding under a named policy only."""
        return [case for case in self.cases if case.kind == "place"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Of the runs only the extremes of each operator are kept, and what failed."""
        from refllm.mutants.validation_page import calibration_rows, closest_rows

        return {
            "weights": self.weights,
            "versions": self.versions,
            "seconds": round(self.seconds),
            "asked": self.asked,
            "mutants": [asdict(case) for case in self.cases],
            "losses": self.losses,
            "runs": len(self.runs),
            "ports": len(self.ports),
            "ports_that_round_elsewhere": sum(run.elsewhere for run in self.ports),
            "false_alarms": [asdict(run) for run in self.false_alarms],
            "planted": len(self.planted),
            "planted_not_named_by_plain_inputs": [asdict(case) for case in self.planted if not case.plain.right],
            "closest_to_limits": closest_rows(self.runs),
            "calibration": calibration_rows(self.runs),
            "calibration_of_ports": calibration_rows(self.ports),
        }

    @property
    def holds(self) -> bool:
        """No false alarm, every mutant found or said, nearly all by plain inputs, every loss judged rightly."""
        plain = sum(case.plain.right for case in self.defects)
        on_top = sum(case.plain.right for case in self.planted)
        return (
            not self.false_alarms
            and all(case.found for case in self.cases if case.kind != "equivalent")
            and plain >= PLAIN * len(self.defects)
            and all(case.found or case.invisible for case in self.planted)
            and on_top >= NAMED_FIRST * len(self.planted)
            and all(case.result_holds for case in self.cases if case.equivalent)
            and all(row["holds"] == (row["loss"] == "correct") for row in self.losses)
        )


def validate(
    seeds: int = 2,
    port_seeds: int = 2,
    every: int = 1,
    jobs: int = 1,
    log: Log = lambda text: None,
    weights: str = "designed",
) -> Validation:
    """All measurements on the embedded checkpoints, in so many processes. seeds: prompts of Transformers runs.
    port_seeds: of every right port. every: of so many pairs of a mistake and a port, one is planted. weights: of the
    checkpoints, designed or trained; random models of 24 layers go with the designed ones."""
    import torch
    import transformers

    from refllm import golden

    start = time.perf_counter()
    folders = golden.checkpoints() if weights == "designed" else golden.trained()
    found = Validation([], [], [], 0.0, {"torch": torch.__version__, "transformers": transformers.__version__})
    found.weights = weights
    found.versions["numpy"] = np.__version__
    found.asked = {"seeds": seeds, "port_seeds": port_seeds, "every": every}
    parts = ["sharpness", "losses", "legitimate", "deep", "ports", "planted"]
    if weights != "designed":
        parts.remove("deep")
    tasks = [(part, turn) for part in parts for turn in range(1 if part in ("losses", "deep") else len(folders))]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_part, part, turn, folders, found.asked) for part, turn in tasks]
        for (part, _), future in zip(tasks, done, strict=True):
            where, values, said = future.result()
            getattr(found, where).extend(values)
            log(f"{time.perf_counter() - start:.0f} s, {part}: {said}")
    return replace(found, seconds=time.perf_counter() - start)


def _part(part: str, turn: int, folders: dict[str, Path], asked: dict[str, int]) -> tuple[str, list[Any], str]:
    """One of the measurements, of one checkpoint where it goes by checkpoints: (its field of `Validation`, what was
    found, in words)."""
    from refllm.check.adapters.transformers import quiet_transformers

    quiet_transformers()
    name, said = list(folders)[turn], list[str]()
    one = {name: folders[name]}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary, _threads(1):
        warnings.simplefilter("ignore")
        if part == "sharpness":
            return "cases", sharpness(one, catalogue(), said.append), said[0]
        if part == "losses":
            rows = loss_cases(folders)
            return "losses", rows, f"{len(rows)} losses"
        if part == "legitimate":
            return "runs", legitimate(one, asked["seeds"], said.append), said[0]
        if part == "deep":
            return "runs", deep(Path(temporary), said.append), said[0]
        if part == "ports":
            runs = right_runs(name, folders[name], DTYPES, range(asked["port_seeds"]))
            return "ports", runs, f"{name}: {len(runs)} right ports"
        planted = planted_runs(name, folders[name], "bfloat16", asked["every"], turn)
        return "planted", planted, f"{name}: {len(planted)} mistakes on top of profiles"


def _files(arguments: argparse.Namespace, found: Validation) -> Iterator[tuple[Path, str]]:
    from refllm.mutants.validation_page import joined, page

    if arguments.json:
        yield arguments.json, json.dumps(found.to_dict(), indent=1) + "\n"
    if arguments.markdown:
        before = arguments.markdown.read_text(encoding="utf-8") if arguments.markdown.exists() else ""
        yield arguments.markdown, joined(before, page(found))


def main() -> int:
    """The command. Exit code 1 where the check misses a mutant or raises a false alarm."""
    parser = argparse.ArgumentParser(description="Measure how sharp the check is, and that it raises no false alarm.")
    parser.add_argument("--seeds", type=int, default=2, help="prompts per checkpoint, precision and attention")
    parser.add_argument("--port-seeds", type=int, default=2, help="inputs per checkpoint, precision and right port")
    parser.add_argument("--every", type=int, default=1, help="plant one of so many pairs of a mistake and a port")
    parser.add_argument("--weights", choices=("designed", "trained"), default="designed", help="of the checkpoints")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on tiny products its threads wait longer than they work
    numbers = (arguments.seeds, arguments.port_seeds, arguments.every, arguments.jobs)
    found = validate(*numbers, log=lambda text: print(text, flush=True), weights=arguments.weights)
    for path, text in _files(arguments, found):
        path.parent.mkdir(parents=True, exist_ok=True)
        output_file.replace(path, text)
    print(verdict(not found.holds))
    return 0 if found.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
