"""`refllm train`: a checkpoint learns a text, in NumPy, Torch or Triton."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from refllm.commands.shared_options import Json, Page, console, to_stdout, write_json
from refllm.errors import InputError
from refllm.storage import output_file
from refllm.terminal.status_line import StatusLine

BACKENDS = ("numpy", "torch", "triton")


def train(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Where it begins, with a tokenizer.")],
    text: Annotated[Path, typer.Option("--text", metavar="F", help="The text that is learnt, UTF-8.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="The trained checkpoint; a run found there goes on.")
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps in all, earlier runs counted.")] = 500,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows of text per step.")] = 8,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens per window.")] = 64,
    lr: Annotated[float, typer.Option("--lr", min=0, help="The learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0, help="Of AdamW.")] = 0.01,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the windows that are drawn.")] = 0,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps from one saving to the next.")] = 100,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute layers again on the way back: less memory, more time.")
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", help="numpy (the reference), torch (its autograd) or triton (our kernels).")
    ] = "numpy",
    page: Page = None,
    json_file: Json = None,
) -> None:
    """A small model learns a text, with AdamW in float32: DIR is a checkpoint, with the curve of its loss in loss.svg.

    A run that was stopped goes on from where it last saved, and becomes what it would have been.
    """
    import refllm
    from refllm.text.token_input import TEXT_LIMIT, read_text
    from refllm.training.run import Settings, TrainingRun

    if output.resolve() == checkpoint.resolve():
        raise InputError("--output is CHECKPOINT itself, which would be written over; give another folder")
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend} is not known: use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    output_file.must_be_folder("--output", output)
    tokenizer = refllm.AutoTokenizer.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*model_max_length")  # windows are the answer to a long text
        ids = tokenizer.encode(read_text(text, TEXT_LIMIT))
    settings = Settings(batch=batch, context=context, lr=lr, weight_decay=weight_decay, seed=seed)
    with StatusLine(sys.stderr) as show:
        show("loading")
        model = refllm.load(checkpoint, head="causal_lm", dtype="float32", backend=backend)
        if checkpointing:
            model.gradient_checkpointing_enable()
        run = TrainingRun(model, ids, output, settings)
        before = len(run.losses)
        tokenizer.save_pretrained(output)
        for done, loss in run.steps(steps, save_every):
            show(f"step {done}, loss {loss:.4f}", done, steps)
    out = console(quiet=to_stdout(json_file))
    gone_on = f", {before} of them before" if before else ""
    out.print(f"{len(run.losses)} steps{gone_on}, loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}; {output}")
    write_json({"steps": len(run.losses), "steps_before": before, "losses": run.losses}, json_file)
