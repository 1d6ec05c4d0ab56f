"""`compare` and `assert_matches`: the check as a Python call and as a test."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from refllm.check.inputs import Inputs
    from refllm.check.oracle import Report
    from refllm.check.process import Processes


def compare(
    checkpoint: str | os.PathLike[str],
    candidate: Any = "transformers",
    *,
    dtype: str | None = None,
    policy: str | None = None,
    attention: str = "eager",
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    prompt: str | None = None,
    stress: bool = False,
    isolate: bool = True,
    time_limit: float | None = None,
    splits: int = 1,
    tf32: bool = False,
    page: str | os.PathLike[str] | None = None,
) -> "list[Report]":
    """Check one implementation on one checkpoint: a report per input (several only with `stress`, or where rows of the
    embedding are wrong that the input does not read).

    candidate: "transformers", "numpy", "module:function", a Transformers model object, or a function (see
    `refllm.check`). dtype: of its weights and activations; None takes that of a model, or finds that of a function that
    is not told one, else it is "float32". policy: where it has to round, "hf-eager", "hf-sdpa" or "fused"; None is
    hf-eager (or hf-sdpa) for Transformers, fused for the fast models, and for a function wherever honest code may
    round. input_ids: [S] or [B, S]; or a prompt; or neither, for a text of our own. attention_mask: of the same shape,
    1 = a token, 0 = padding, which is not compared; None is all tokens. position_ids: of the same shape; None is
    0 .. S-1, padding counted. The stressed inputs are made of input_ids alone. splits, tf32: products of so many parts,
    each rounded, and float32 products of 11-bit factors are meant. page: the file of a page of one's own, or a known
    family (`refllm.models.own_page`). Raises RefllmError for what cannot be run.

    A report fails, holds, or is incomplete, if something was not seen (`Report.unseen`), may be done on purpose only
    and was not said (`Report.unsaid`), or a wrong answer would hold as well (`TapReport.untested`).

    What a name stands for runs in a process of its own (unless isolate=False), where each run has time_limit seconds
    (None: `refllm.check.process.time_limit`). A live function or model cannot be moved: it runs in this process, on
    copies of the inputs; what it raises and inputs that it changes are findings all the same, but nothing ends it if it
    takes too long, and a crash is one of this process.
    """
    from refllm.check.process import Processes
    from refllm.models.own_page import in_use

    given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    with in_use(page), Processes(time_limit) as processes:
        return _compare(Path(checkpoint), candidate, dtype, policy, attention, given, prompt, stress,
                        processes if isolate else None, splits, tf32)  # fmt: skip


def _compare(
    folder: Path,
    candidate: Any,
    dtype: str | None,
    policy: str | None,
    attention: str,
    given: dict[str, Any],
    prompt: str | None,
    stress: bool,
    processes: "Processes | None",
    splits: int,
    tf32: bool,
) -> "list[Report]":
    from refllm.check.asked import Asked
    from refllm.check.run import close, load, rounding_of
    from refllm.check.runs import Runs

    found = _candidate(candidate, folder, dtype, attention, processes)
    inputs, notes = _inputs(folder, given, prompt)
    attention = getattr(found, "attention", attention)  # of a Transformers model object: its own
    kind = candidate if isinstance(candidate, str) else "transformers" if hasattr(found, "attention") else ""
    rules = rounding_of(kind, policy, attention if attention in ("eager", "sdpa") else "sdpa")
    runs = Runs(
        lambda dtype: load(folder, dtype),
        found,
        inputs,
        Asked(rules, splits, tf32),
        checkpoint=folder.name,
        stress=stress,
        said=dtype is not None,
        notes=notes,
        recorded=lambda: close(found),
    )
    return list(runs.reports())


def _inputs(folder: Path, given: dict[str, Any], prompt: str | None) -> "tuple[Inputs, list[str]]":
    """What to run, and notes for the reader. given: the arrays of the call, [S] or [B, S], or None."""
    from refllm.check.inputs import Inputs
    from refllm.check.run import tokens_for
    from refllm.inputs import as_integers

    arrays: dict[str, Any] = {
        name: np.atleast_2d(as_integers(name, value)) for name, value in given.items() if value is not None
    }
    notes: list[str] = []
    if "input_ids" not in arrays:
        arrays["input_ids"], notes = tokens_for(folder, {"prompt": prompt, "ids": None, "ids_file": None})
    return Inputs(**arrays), notes


def assert_matches(checkpoint: str | os.PathLike[str], candidate: Any = "transformers", **options: Any) -> None:
    """`compare`, for a test: raises AssertionError with the report of the first input on which it does not hold.

    It fails where something is wrong. It is incomplete, and the test fails too, where something was not seen: a head
    that is not shown, rows of the embedding that were never read, or values at which a trivial wrong answer would hold
    as well. Name more values in between, or use more tokens.
    """
    reports = compare(checkpoint, candidate, **options)
    for verdict in ("fails", "incomplete"):
        for report in reports:
            if report.verdict == verdict:
                raise AssertionError(_text(report))


def _candidate(candidate: Any, folder: Path, dtype: str | None, attention: str, processes: "Processes | None") -> Any:
    from refllm.check.candidates import open_candidate
    from refllm.check.functions import FunctionCandidate
    from refllm.check.run import head_of

    head = head_of(folder)
    if isinstance(candidate, str):
        open_one = open_candidate if processes is None else processes.open
        return open_one(candidate, folder, head=head, dtype=dtype or "float32", attention=attention)
    if hasattr(candidate, "named_modules"):
        from refllm.check.adapters.transformers import TransformersCandidate

        return TransformersCandidate(candidate)
    if hasattr(candidate, "run"):
        return candidate
    return FunctionCandidate(candidate, folder, head=head, dtype=dtype or "float32")


def _text(report: "Report") -> str:
    from rich.console import Console

    from refllm.check.report import show_report

    console = Console(width=110, no_color=True)
    with console.capture() as captured:
        console.print(show_report(report))
    return "\n" + captured.get()
