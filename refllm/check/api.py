"""`compare` and `assert_matches`: the check as a Python call and as a test."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.errors import InputError

if TYPE_CHECKING:
    from refllm.check.asked import Asked
    from refllm.check.inputs import Inputs
    from refllm.check.oracle import Report
    from refllm.check.process import Processes
    from refllm.check.stacks import Opening
    from refllm.check.trace import Trace
    from refllm.check.weights import Given
    from refllm.forward.model import Model


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
    names: str | os.PathLike[str] | None = None,
    library: str | os.PathLike[str] | None = None,
    trace: Any = None,
    layout: str = "",
    against: Any = None,
    weights: Any = None,
    page: str | os.PathLike[str] | None = None,
    explain: bool | None = None,
) -> "list[Report]":
    """Check one implementation on one checkpoint: a report per input (several only with `stress`, or where rows of the
    embedding are wrong that the input does not read).

    candidate: what `--candidate` takes, "transformers", "mlx", "onnx:FILE", "module:function"; or a live model of
    Transformers or of a stack (`refllm.check.stacks`), or a function (see `refllm.check`). names, library: see
    `refllm.check.stacks.Opening`. dtype: of its weights and activations; None takes that of a model, or finds that of a
    function that is not told one, else it is "float32". policy: where it has to round, "hf-eager", "hf-sdpa" or
    "fused"; None is hf-eager (or hf-sdpa) for Transformers, fused for the fast models, and for a function wherever
    honest code may round. input_ids: [S] or [B, S]; or a prompt; or neither, for a text of our own. attention_mask: of
    the same shape, 1 = a token, 0 = padding, which is not compared; None is all tokens. position_ids: of the same
    shape; None is 0 .. S-1, padding counted. The stressed inputs are made of input_ids alone. splits, tf32: products of
    so many parts, each rounded, and float32 products of 11-bit factors are meant. Raises RefllmError for what cannot be
    run.

    trace: a recorded run to judge in place of a candidate, a file or a `refllm.check.trace.Trace` (docs/recording.md).
    layout: how the values of either lie, where their shapes do not tell ("tokens, gguf"). against: a recorded run that
    is known to be good, in the same form, the measure in place of the page; its tokens are run where none are given.
    weights: those that the candidate really has, where they are not the checkpoint's (of a quantised engine): a
    checkpoint folder, a safetensors or GGUF file, or arrays by the names of the checkpoint's tensors. It is judged with
    them, and what they cost is reported apart (`Report.format_error`). page: the file of a page of one's own, or a
    known family (`refllm.models.own_page`). explain: look for the change of the reference that gives what a wrong run
    has (`Report.explanation`), for 30 seconds at most; None does so in the first run that fails, and where a small
    model shows its last value alone.

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
    files = [None if path is None else Path(path) for path in (names, library)]
    call = _Call(Path(checkpoint), candidate, dtype, policy, attention, stress, splits, tf32, layout,
                 files[0], files[1], weights, _trace(against), explain)  # fmt: skip
    with in_use(page):
        if trace is not None:
            return [call.recorded(_trace(trace, None if input_ids is None else np.atleast_2d(input_ids)))]
        with Processes(time_limit) as processes:
            return call.reports(given, prompt, processes if isolate else None)


@dataclass(frozen=True)
class _Call:
    """What `compare` was asked for, but for the inputs; see there."""

    folder: Path
    candidate: Any
    dtype: str | None
    policy: str | None
    attention: str
    stress: bool
    splits: int
    tf32: bool
    layout: str
    names: Path | None
    library: Path | None
    weights: Any
    against: "Trace | None"
    explain: bool | None

    def recorded(self, trace: "Trace | None") -> "Report":
        """The report on a recorded run."""
        from refllm.check.recorded import check_recorded
        from refllm.precision.dtype_names import dtype_name

        if self.stress or self.candidate != "transformers" or self.names or self.library:
            raise InputError("trace= is judged as it was recorded: leave out candidate, stress, names and library")
        assert trace is not None
        return check_recorded(
            self._load,
            trace,
            self._asked("", self.attention),
            checkpoint=self.folder.name,
            dtype=None if self.dtype is None else dtype_name(self.dtype),
            layout=self.layout,
            against=self.against,
            weights=self._weights(),
            explain=self.explain,
        )

    def reports(self, given: dict[str, Any], prompt: str | None, processes: "Processes | None") -> "list[Report]":
        """A report per input. given: arrays by name, or None for those that were not. processes: where a name's
        candidate runs; None: in this one."""
        from refllm.check.candidates import weights_of
        from refllm.check.layout import words_of
        from refllm.check.run import close
        from refllm.check.runs import Runs

        if self.against is not None and self.stress:
            raise InputError("against= has the values of one run, so leave out stress")
        found = self._open(processes)
        inputs, notes = _inputs(self.folder, given, prompt, self.against)
        attention = getattr(found, "attention", self.attention)  # of a Transformers model object: its own
        name = self.candidate if isinstance(self.candidate, str) else ""
        runs = Runs(
            self._load,
            found,
            inputs,
            self._asked(name or ("transformers" if hasattr(found, "attention") else ""), attention),
            checkpoint=self.folder.name,
            stress=self.stress,
            said=self.dtype is not None,
            layout=words_of(self.layout, "layout"),
            against=self.against,
            notes=notes,
            recorded=lambda: close(found),
            weights=weights_of(self._opening()) if self.weights is None else self._weights(),
            explain=self.explain,
        )
        return list(runs.reports())

    def _asked(self, kind: str, attention: str) -> "Asked":
        from refllm.check.asked import Asked
        from refllm.check.run import rounding_of

        rules = rounding_of(kind, self.policy, attention if attention in ("eager", "sdpa") else "sdpa")
        return Asked(rules, self.splits, self.tf32)

    def _load(self, dtype: str) -> "Model":
        from refllm.check.run import load

        return load(self.folder, dtype)

    def _weights(self) -> "Given | None":
        from refllm.check.weights import Given

        return None if self.weights is None else Given.open(self.weights)

    def _open(self, processes: "Processes | None") -> Any:
        from refllm.check.candidates import of_object, open_candidate

        opening = self._opening()
        if not opening.name:
            return of_object(self.candidate, opening)
        return open_candidate(opening) if processes is None else processes.open(opening)

    def _opening(self) -> "Opening":
        from refllm.check.run import head_of
        from refllm.check.stacks import Opening
        from refllm.precision.dtype_names import dtype_name

        name = self.candidate if isinstance(self.candidate, str) else ""
        dtype, head = dtype_name(self.dtype or "float32"), head_of(self.folder)
        return Opening(name, self.folder, head, dtype, self.attention, self.names, self.library)


def _trace(given: Any, input_ids: Any = None) -> "Trace | None":
    """A recorded run by its file, or as it is."""
    from refllm.check.trace import Trace

    return given if given is None or isinstance(given, Trace) else Trace.load(given, input_ids)


def _inputs(
    folder: Path, given: dict[str, Any], prompt: str | None, good: "Trace | None"
) -> "tuple[Inputs, list[str]]":
    """What to run, and notes for the reader. given: the arrays of the call, [S] or [B, S], or None. good: a run whose
    tokens are taken where none are given."""
    from refllm.check.inputs import Inputs
    from refllm.check.run import inputs_for
    from refllm.inputs import as_integers

    arrays: dict[str, Any] = {
        name: np.atleast_2d(as_integers(name, value)) for name, value in given.items() if value is not None
    }
    notes: list[str] = []
    if "input_ids" not in arrays:
        found, notes = inputs_for(folder, {"prompt": prompt, "ids": None, "ids_file": None}, good)
        return replace(found, **arrays), notes
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


def _text(report: "Report") -> str:
    from rich.console import Console

    from refllm.check.report import show_report

    console = Console(width=110, no_color=True)
    with console.capture() as captured:
        console.print(show_report(report))
    return "\n" + captured.get()
