"""Whether a patched Transformers model trains right: its gradients at points of a run, against what is predicted.

    python -m refllm.mutants.patched_training docs/training.md

A model of the shape of an embedded checkpoint learns the corpus from fresh weights: these are float32, and stepped with
the gradients of a patched model in bfloat16 that has the same weights, rounded. At every point the gradients of all values and parameters of that model are
judged as `refllm check --backward` does, operator by operator and end to end, at the weights that it has there.
Needs Torch and Transformers.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm import golden
from refllm.check.asked import Asked
from refllm.check.candidates import record
from refllm.check.inputs import Inputs
from refllm.check.learning import with_labels
from refllm.check.oracle import Report, judge
from refllm.models.auto import load
from refllm.storage import output_file
from refllm.text.tokenizer import Tokenizer

CHECKPOINT, DTYPE = "llama-tiny", "bfloat16"
TOKENS, ROWS, RATE = 48, 8, 1e-3
POINTS, STEPS_EACH = 50, 4
"""Points of the page, and steps between two of them."""
BEGIN, END = "<!-- patched training: measured -->", "<!-- patched training: end -->"
"""Between these lines of the page stands what was measured."""


@dataclass(frozen=True)
class Point:
    """One point of a run. loss: of the rows that are judged there. ratio: measured over predicted error of all
    parameters' gradients, end to end; worst: the largest of one of them, and its name. verdict: of the check; why: the
    first value that fails or is untested, "" if none."""

    step: int
    loss: float
    ratio: float
    worst: float
    name: str
    verdict: str
    why: str


def points(
    count: int, steps_each: int = STEPS_EACH, checkpoint: str = CHECKPOINT, backend: str | None = "torch", **how: Any
) -> Iterator[Point]:
    """Trains, and yields a point before every `steps_each` steps, the first before any step.

    checkpoint: name of an embedded one, with a causal language model. backend, how: as `refllm.kernels.patch`.
    """
    import torch

    from refllm import kernels
    from refllm.check.adapters.transformers import quiet_transformers

    transformers, folder = quiet_transformers(), golden.checkpoints()[checkpoint]
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    master = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE))
    windows = _windows(folder)
    optimiser = torch.optim.AdamW(master.parameters(), lr=RATE)
    with kernels.patch(model, backend=backend, **how):
        for step in range(count * steps_each):
            _hand_down(master, model)
            if step % steps_each == 0:
                yield _point(step, model, windows[np.arange(-2, 0) - 2 * (step // steps_each) % (len(windows) - 1)])
            batch = torch.from_numpy(windows[np.arange(step * ROWS, (step + 1) * ROWS) % len(windows)])
            model.zero_grad(set_to_none=True)
            model.train()
            model(batch, labels=batch).loss.backward()
            for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
                ours.grad = None if theirs.grad is None else theirs.grad.float()
            optimiser.step()


def _windows(folder: Path) -> np.ndarray:
    """[N, TOKENS]: the corpus."""
    ids = Tokenizer.from_pretrained(folder, model_max_length=None).encode(golden.corpus())
    return np.asarray(ids[: len(ids) // TOKENS * TOKENS], np.int64).reshape(-1, TOKENS)


def _hand_down(master: Any, model: Any) -> None:
    """The weights of the model are those of the master, rounded."""
    import torch

    with torch.no_grad():
        for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)


def _point(step: int, model: Any, rows: np.ndarray) -> Point:
    import torch

    report = _judged(model, rows)
    ratios = {
        tap.name: tap.end_to_end.ratio
        for tap in report.taps
        if tap.name.startswith("grad:") and tap.name.endswith((".weight", ".bias"))
    }
    worst = max(ratios, key=lambda name: ratios[name])
    first = report.first_failure
    untested = next((f"{tap.name}: {', '.join(tap.untested)}" for tap in report.taps if tap.untested), "")
    with_loss = model(input_ids=torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss.detach()
    return Point(
        step,
        round(float(with_loss), 3),
        round(float(np.sqrt(np.mean(np.square(list(ratios.values()))))), 3),
        round(ratios[worst], 3),
        worst.removeprefix("grad:"),
        report.verdict,
        untested if first is None else first.name,
    )


def _judged(model: Any, rows: np.ndarray) -> Report:
    """The report on a backward pass of the model over a few rows, against a model of ours with its weights."""
    from refllm.check.adapters.transformers import TransformersCandidate

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = load(folder, head="causal_lm", dtype=DTYPE)
    candidate = TransformersCandidate(model, "sdpa")
    trace = record(candidate, ours, with_labels(Inputs(rows), ours, candidate))
    return judge(ours, trace, Asked())


def table(found: Sequence[Point]) -> str:
    """What was measured, as Markdown: a sentence, then a line for some of the points."""
    right, blunt = (
        sum(point.verdict != "fails" for point in found),
        sum(point.verdict == "incomplete" for point in found),
    )
    pooled = np.sqrt(np.mean([point.ratio**2 for point in found]))
    worst = max(found, key=lambda point: point.worst)
    lines = [
        f"{CHECKPOINT}, {DTYPE}: at {right} of {len(found)} points of {found[-1].step + 1} steps, in which the loss "
        f"falls from {found[0].loss:.2f} to {found[-1].loss:.2f}, every gradient is within the prediction (at {blunt} "
        "of them a trivial wrong answer for some value would be, too: incomplete). Measured over predicted error of "
        f"all parameters, pooled: {pooled:.2f}; of a single one at a single point at most {worst.worst:.2f} "
        f"({worst.name}, step {worst.step}).",
        "",
        "| step | loss | measured / predicted, all parameters | worst of one parameter | verdict |",
        "|---|---|---|---|---|",
    ]
    for point in found[:: max(1, len(found) // 10)]:
        lines.append(
            f"| {point.step} | {point.loss:.2f} | {point.ratio:.2f} | {point.worst:.2f} {point.name} | "
            f"{' '.join([point.verdict, point.why]).strip()} |"
        )
    return "\n".join(lines)


def write(page: Path, found: Sequence[Point]) -> None:
    """Puts the table between the two lines of the page that say where it belongs."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    output_file.replace(page, f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}")


def main() -> int:
    """The command. Exit code 1 where a gradient fails."""
    parser = argparse.ArgumentParser(description="Check the gradients of a patched model while it trains.")
    parser.add_argument("markdown", type=Path, help="the page")
    parser.add_argument("--points", type=int, default=POINTS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # products this small take longer on several
    found = []
    for point in points(arguments.points):
        found.append(point)
        print(f"step {point.step}: loss {point.loss}, ratio {point.ratio}, {point.verdict} {point.why}", flush=True)
    write(arguments.markdown, found)
    return int(any(point.verdict == "fails" for point in found))


if __name__ == "__main__":
    raise SystemExit(main())
