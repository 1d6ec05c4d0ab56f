"""Recorded runs: values that any program wrote to a file, on any machine, judged as if it ran here."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.check.against import judge_against
from refllm.check.asked import Asked
from refllm.check.blamed_ranks import blamed, note, splits_of
from refllm.check.explained import by_default
from refllm.check.functions import DTYPES
from refllm.check.keeper import keeper_for, part_of
from refllm.check.layout import laid_out, words_of
from refllm.check.oracle import Report, judge
from refllm.check.plan import plan
from refllm.check.ranks import Ranks
from refllm.check.trace import Trace
from refllm.check.values import like, raw_of
from refllm.check.weights import Given, format_error, handed_over
from refllm.errors import InputError
from refllm.forward.model import Model

if TYPE_CHECKING:
    from refllm.check.run import Settings

Step = Callable[..., None]


def check_files(
    folder: Path | None,
    files: list[Path],
    settings: "Settings",
    step: Step = lambda *_: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Report]:
    """A report per file. settings: dtypes, at most one; tokens, for files that do not hold theirs; layout; and where
    the run had to round."""
    from refllm.check.run import folders_to_check, load
    from refllm.config import AutoConfig
    from refllm.text.token_input import read_tokens

    if folder is None:
        raise InputError("--trace needs the CHECKPOINT that was run: refllm check CHECKPOINT --trace F")
    if len(settings.dtypes) > 1:
        raise InputError(f"--dtype {' and '.join(settings.dtypes)}: a run that was recorded has one")
    folders_to_check(folder)
    given = read_tokens(folder, AutoConfig.from_pretrained(folder).vocab_size, **settings.tokens)
    dtype, words, good = next(iter(settings.dtypes), None), settings.layout, settings.against
    how: dict[str, Any] = {"dtype": dtype, "layout": words, "against": good, "step": step, "say": say}
    how["explain"] = settings.explain
    how["weights"] = None if settings.weights is None else Given.open(settings.weights)
    for file in files:
        if file.is_dir():
            ranks = Ranks.load(file, given)
            yield check_ranks(lambda of: load(folder, of), ranks, settings.rounding, folder.name, **how)
            continue
        trace = Trace.load(file, given)
        yield check_recorded(
            lambda of: load(folder, of), trace, settings.rounding, checkpoint=folder.name, folder=folder, **how
        )


def check_recorded(
    load: Callable[[str], Model],
    trace: Trace,
    asked: Asked,
    *,
    checkpoint: str = "",
    dtype: str | None = None,
    layout: str = "",
    against: Trace | None = None,
    step: Step = lambda *_: None,
    weights: Given | None = None,
    explain: bool | None = None,
    folder: Path | None = None,
    keeper: Any = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """The report on a recorded run. load: dtype -> the checkpoint, with weights on the grid of that dtype.

    dtype: in which it computed; None takes what the trace says, or shows. layout: how its values lie, in place of what
    the trace says (`refllm.check.layout.LAYOUTS`). against: a known-good run, the measure in place of the page.
    weights: those that it computed with, where they are not the checkpoint's; the file may hold them, as
    `weights.<tensor>`. explain: see `judge`; None: `explained.by_default`. folder: of the checkpoint; then what was
    judged so far is kept beside the trace. keeper: who has that instead. say: told what it will take. Raises InputError
    for a trace that is not of this checkpoint.
    """
    format_ = dtype or trace.dtype
    if format_ not in DTYPES:
        raise InputError(f"{trace.source}: {format_} cannot be checked: say --dtype with one of {', '.join(DTYPES)}")
    step(f"{checkpoint}: loading")
    taps, tensors = handed_over(trace.taps)
    weights, said_of_weights = weights or Given.handed(trace.source, tensors), list[str]()
    if weights is not None:
        weights, said_of_weights = weights.checked(load("float64"))
    model = load(format_) if weights is None else weights.in_place_of(load(format_))
    trace = canonical(replace(trace, dtype=format_, taps=taps), model, layout)
    where = f"{checkpoint} {format_}, {trace.inputs.label}"
    how: dict[str, Any] = {"checkpoint": checkpoint}
    how["step"] = lambda text, *progress: step(f"{where}: {text}", *progress)
    if planned := plan(model, trace.inputs, asked, "", format_):
        say(f"{where}: {planned}")
    if weights is not None:
        asked = replace(asked, kinds=weights.kinds(model))
    if against is not None:
        return judge_against(model, trace, canonical(against, model, layout if against.is_plain else ""), asked, **how)
    keeper = keeper or keeper_for(trace, asked, folder)
    report = judge(model, trace, asked, explain=by_default(explain), keeper=keeper, **how)
    report.part = part_of(report.judged, trace, asked, dtype, layout, folder)
    if weights is not None:
        report.format_error = format_error(load("float64"), weights, trace.inputs, report)
    report.notes += said_of_weights
    said = "dtype" in trace.details or dtype is not None
    report.notes += (
        [] if said or not trace.is_plain else [f"judged as {format_}, as its values are; --dtype says another"]
    )
    report.notes.append(_what_was_run(model, trace))
    return report


def check_ranks(load: Callable[[str], Model], ranks: Ranks, asked: Asked, checkpoint: str = "", **how: Any) -> Report:
    """The report on a run that was split over ranks, each of which wrote its values; the rest as `check_recorded`.

    Products whose input is cut over ranks are sums of as many parts, unless `asked` says another number. Where copies
    of one value differ and those of the first ranks hold, the report is on those of the last ranks.
    """
    splits = asked.splits if asked.splits > 1 else splits_of(ranks)
    whole, differ = ranks.whole()
    report = check_recorded(load, whole, replace(asked, splits=splits), checkpoint=checkpoint, **how)
    if differ and report.first_failure is None:
        whole, _ = ranks.whole(last_copies=True)
        report = check_recorded(load, whole, replace(asked, splits=splits), checkpoint=checkpoint, **how)
    report.copies = [one.text for one in differ]
    if report.first_failure is not None:
        model = load(report.dtype)
        report.blamed = blamed(report, canonical(whole, model, how.get("layout", "")), ranks, model)
    report.notes.append(note(ranks, splits))
    return report


def canonical(trace: Trace, model: Model, layout: str = "") -> Trace:
    """The trace with its values in the shapes of the vocabulary, and what is said of that. Raises InputError for values
    of another model."""
    if trace.head and trace.head != model.head:
        raise InputError(f"{trace.source}: its head is {trace.head!r}, the checkpoint's {model.head!r}")
    if int(trace.inputs.input_ids.max()) >= model.config.vocab_size:
        largest = int(trace.inputs.input_ids.max())
        raise InputError(f"{trace.source}: token id {largest} is outside the vocabulary of {model.config.vocab_size}")
    words = words_of(layout, "--layout") or trace.layout
    laid = laid_out(raw_of(trace.taps), model.config, model.head, trace.inputs, words, trace.source)
    return replace(
        trace,
        taps=like(trace.taps, laid.taps),
        layout=(),
        notes=[*trace.notes, *laid.notes],
        doubts=[*trace.doubts, *laid.doubts],
        last_alone=laid.last_alone,
    )


def _what_was_run(model: Model, trace: Trace) -> str:
    """Nobody can run it on more tokens, so that the verdict is on what was recorded."""
    vocab = model.config.vocab_size
    read = len(np.unique(trace.inputs.input_ids[trace.inputs.valid]))
    return f"a recorded run: the verdict is on its tokens, which read {read:,} of {vocab:,} rows of the embedding"


def refuse(given: dict[str, Any]) -> None:
    """Raises InputError for options of `refllm check` that ask a recorded run to be run."""
    why = {
        "--candidate": "it was run already",
        "--stress": "other inputs cannot be run; record those that refllm trace --inputs-only --stress writes",
        "--time-limit": "nothing is run",
        "--names": "nothing is run",
        "--library": "nothing is run",
        "--backward": "a file has the values of a forward pass",
        "--work": "the values are in a file already, and what was judged is kept beside it",
    }
    for option, value in given.items():
        if value:
            raise InputError(f"--trace judges what was recorded, so leave out {option}: {why[option]}")
