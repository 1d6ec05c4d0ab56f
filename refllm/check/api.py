"""`compare` and `assert_matches`: the check as a Python call and as a test."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from refllm.check.oracle import Report


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
) -> "list[Report]":
    """Check one implementation on one checkpoint: a report per input (several only with `stress`).

    candidate: "transformers", "numpy", "module:function", a Transformers model object, or a function (see
    `refllm.check`). dtype: of its weights and activations; None takes a model's own, else "float32". policy: where it
    is expected to round, "hf-eager", "hf-sdpa" or "fused"; None is hf-eager (or hf-sdpa) for Transformers and fused for
    a function. input_ids: [S] or [B, S]; or a prompt; or neither, for a text of our own. Raises RefllmError for what
    cannot be run.
    """
    from refllm.check.inputs import Inputs, stressed
    from refllm.check.run import check_candidate, find_policy, prepare

    folder = Path(checkpoint)
    found = _candidate(candidate, folder, dtype, attention)
    model, notes, ids = prepare(folder, found.dtype, {"prompt": prompt, "ids": None, "ids_file": None})
    if input_ids is not None:
        ids = np.atleast_2d(np.asarray(input_ids, np.int64))
    if policy is None:
        named = getattr(found, "attention", None if callable(candidate) else attention)
        policy = "fused" if named is None else None
        attention = named or attention
    rules = find_policy(policy, attention if attention in ("eager", "sdpa") else "sdpa")
    runs = [Inputs(ids), *(stressed(ids) if stress else [])]
    return [check_candidate(model, found, inputs, rules, folder.name, notes) for inputs in runs]


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


def _candidate(candidate: Any, folder: Path, dtype: str | None, attention: str) -> Any:
    from refllm.auto import model_class
    from refllm.check.candidates import FunctionCandidate, open_candidate
    from refllm.config import AutoConfig

    head = model_class(AutoConfig.from_pretrained(folder)).head
    if isinstance(candidate, str):
        return open_candidate(candidate, folder, head=head, dtype=dtype or "float32", attention=attention)
    if hasattr(candidate, "named_modules"):
        from refllm.check.transformers_adapter import TransformersCandidate

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
