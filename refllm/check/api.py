"""`compare` and `assert_matches`: the check as a Python call and as a test."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
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
    prompt: str | None = None,
    stress: bool = False,
    isolate: bool = True,
    time_limit: float | None = None,
) -> "list[Report]":
    """Check one implementation on one checkpoint: a report per input (several only with `stress`).

    candidate: "transformers", "numpy", "module:function", a Transformers model object, or a function (see
    `refllm.check`). dtype: of its weights and activations; None takes a model's own, else "float32". policy: where it
    is expected to round, "hf-eager", "hf-sdpa" or "fused"; None is hf-eager (or hf-sdpa) for Transformers and fused for
    a function. input_ids: [S] or [B, S]; or a prompt; or neither, for a text of our own. Raises RefllmError for what
    cannot be run.

    What a name stands for runs in a process of its own (unless isolate=False), where each run has time_limit seconds
    (None: `refllm.check.process.time_limit`). A live function or model cannot be moved: it runs in this process, on
    copies of the inputs; what it raises and inputs that it changes are findings all the same, but nothing ends it if it
    takes too long, and a crash is one of this process.
    """
    from refllm.check.process import Processes

    with Processes(time_limit) as processes:
        return _compare(Path(checkpoint), candidate, dtype, policy, attention, input_ids, prompt, stress,
                        processes if isolate else None)  # fmt: skip


def _compare(
    folder: Path,
    candidate: Any,
    dtype: str | None,
    policy: str | None,
    attention: str,
    input_ids: Any,
    prompt: str | None,
    stress: bool,
    processes: "Processes | None",
) -> "list[Report]":
    from refllm.check.inputs import Inputs, stressed
    from refllm.check.run import check_candidate, close, find_policy, prepare

    found = _candidate(candidate, folder, dtype, attention, processes)
    model, notes, ids = prepare(folder, found.dtype, {"prompt": prompt, "ids": None, "ids_file": None})
    if input_ids is not None:
        ids = np.atleast_2d(np.asarray(input_ids, np.int64))
    if policy is None:
        named = getattr(found, "attention", None if callable(candidate) else attention)
        policy = "fused" if named is None else None
        attention = named or attention
    rules = find_policy(policy, attention if attention in ("eager", "sdpa") else "sdpa")
    runs = [Inputs(ids), *(stressed(ids) if stress else [])]
    return [
        check_candidate(
            model,
            found,
            inputs,
            rules,
            folder.name,
            notes,
            recorded=(lambda: close(found)) if inputs is runs[-1] else (lambda: None),
        )
        for inputs in runs
    ]


def assert_matches(checkpoint: str | os.PathLike[str], candidate: Any = "transformers", **options: Any) -> None:
    """`compare`, for a test: raises AssertionError with the report if anything fails.

    Values at which a trivial wrong answer would hold too are no proof either way: a warning names them. Name more
    values in between, or use more tokens, and they become testable.
    """
    for report in compare(checkpoint, candidate, **options):
        if report.verdict == "fails":
            raise AssertionError(_text(report))
        untested = [tap.name for tap in report.taps if tap.untested]
        if untested:
            what = (
                f"{report.checkpoint}, {report.inputs}: untested, for want of values in between: {', '.join(untested)}"
            )
            warnings.warn(what, UserWarning, stacklevel=2)


def _candidate(candidate: Any, folder: Path, dtype: str | None, attention: str, processes: "Processes | None") -> Any:
    from refllm.check.candidates import FunctionCandidate, open_candidate
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
