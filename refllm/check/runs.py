"""All runs of one candidate on one checkpoint: the plain one, the stressed ones, and every row of the embedding."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refllm.check.against import judge_against
from refllm.check.asked import Asked
from refllm.check.candidates import record
from refllm.check.chosen_embeddings import chosen
from refllm.check.explained import by_default
from refllm.check.inputs import Inputs, every_token, stressed
from refllm.check.keeper import keeper_for, part_of
from refllm.check.learning import more_runs, must_show_gradients, with_labels
from refllm.check.misbehaviour import MisbehavesError, Misbehaviour
from refllm.check.oracle import Report, judge
from refllm.check.plan import plan
from refllm.check.recorded import canonical
from refllm.check.taps import EVERYTHING, Candidate, cannot_run
from refllm.check.trace import Trace, format_of
from refllm.check.unseen import EMBEDDING, Rows, read_rows
from refllm.check.weights import Given, format_error
from refllm.check.work import Work
from refllm.config import ModelConfig
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.forward.rotary import RotaryEmbedding
from refllm.precision import Policy


@dataclass
class Runs:
    """What to run. load: dtype -> the checkpoint, with weights on the grid of that dtype. plain: the inputs.

    said: whether somebody said the candidate's dtype; if not, and it takes none, it is found in what it shows.
    layout: how the candidate's values lie, where their shapes do not tell (`refllm.check.layout.LAYOUTS`).
    against: a known-good run, the measure in place of the page; of the plain inputs. say: told what it will take,
    before it begins. recorded: called when the last run is done and not yet judged. weights: those that the candidate
    really has, where they are not the checkpoint's; it may hand them over in its first run. explain: look for what a
    wrong run did (`refllm.check.explained`); None: in the first runs that fail, until one is explained. backward:
    gradients are asked for as well. frozen: names or patterns of tensors that learn nothing. work: where what was done
    is kept.
    """

    load: Callable[[str], Model]
    candidate: Candidate
    plain: Inputs
    policy: Asked | Policy
    checkpoint: str = ""
    stress: bool = False
    said: bool = True
    layout: tuple[str, ...] = ()
    against: Trace | None = None
    notes: list[str] = field(default_factory=list)
    step: Callable[..., None] = lambda *_: None
    say: Callable[[str], None] = lambda text: None
    recorded: Callable[[], None] = lambda: None
    explain: bool | None = None
    weights: Given | None = None
    backward: bool = False
    frozen: tuple[str, ...] = ()
    work: Work | None = None

    def __post_init__(self) -> None:
        self._check_weights()
        self._model = self._load(self.candidate.dtype)
        self._is_explained = False

    def _check_weights(self) -> None:
        """Leaves out what are no weights of the checkpoint's, and says so."""
        if self.weights is not None and self.weights.own:
            self.weights, said = self.weights.checked(self.load("float64"))
            self.notes = [*self.notes, *said]

    def _load(self, dtype: str) -> Model:
        """The checkpoint in `dtype`, with the weights that the candidate has."""
        model = self.load(dtype)
        return model if self.weights is None else self.weights.in_place_of(model)

    def reports(self) -> Iterator[Report]:
        """A report per input, as they are done; one more if rows of the embedding are wrong that no input reads."""
        more: list[Inputs] = []
        yield from self._first(more)
        for inputs in more:
            found = self._run(inputs)
            self._keep(inputs, found)
            ends = _hangs(found)  # it would take as long again
            if ends or inputs is more[-1]:
                self.recorded()
            report = self._judged(inputs, found)
            del found  # a trace is large
            yield report
            if ends:
                return

    def _first(self, more: list[Inputs]) -> list[Report]:
        """Reports on the plain run, and on rows of the embedding. What else there is to run is added to `more`."""
        if self.backward:
            self._ask_for_gradients()
        elif planned := plan(self._model, self.plain, Asked.of(self.policy), self.candidate.name, self.candidate.dtype):
            self.say(f"{self._where(self.plain)}: {planned}")
        begin = time.monotonic()
        found, rows = self._run(self.plain), Rows(0, 0)
        seconds = time.monotonic() - begin
        if isinstance(found, Trace):
            self._take_weights(found)
        possible, skipped = self._possible()  # as is known now that it ran
        if isinstance(found, Trace):
            self._settle(found)
            rows = self._rows(found, possible, seconds) if self.against is None else rows
            self._keep(self.plain, found, rows)
        more += [] if _hangs(found) else possible
        if not more:
            self.recorded()
        report = self._judged(self.plain, found, skipped)
        report.unseen += rows.sentences
        self._tell_format_error(report)
        return [report, *([] if rows.wrong is None else [self._judged(rows.wrong.inputs, rows.wrong, [rows.said])])]

    def _ask_for_gradients(self) -> None:
        open_it = getattr(self.candidate, "open", None)  # what it takes is known once it is open
        if open_it is not None:
            with contextlib.suppress(MisbehavesError):  # its first run says so
                open_it()
                must_show_gradients(self.candidate)
        else:
            must_show_gradients(self.candidate)
        self.plain = with_labels(self.plain, self._model, self.candidate, self.frozen)

    def _run(self, inputs: Inputs) -> Trace | Misbehaviour:
        kept = None if self.work is None else self.work.kept(inputs)
        if kept is not None:
            self.step(f"{self._where(inputs)}: the values that are kept in {kept.file}")
            return canonical(kept, self._model, ",".join(self.layout))
        self.step(f"{self._where(inputs)}: {self.candidate.name}")
        try:
            file = None if self.work is None else self.work.file(inputs)
            return record(self.candidate, self._model, inputs, self.layout, file)
        except MisbehavesError as error:
            return error.found

    def _keep(self, inputs: Inputs, found: Trace | Misbehaviour, rows: Rows | None = None) -> None:
        """Says in the folder of the work that these values are all there. Gradients are in no file."""
        if self.work is not None and isinstance(found, Trace) and not (found.gradients or found.weights):
            self.work.complete(inputs, None if rows is None or rows.wrong is not None else rows)

    def _where(self, inputs: Inputs) -> str:
        return f"{self.checkpoint} {self.candidate.dtype}, {inputs.label}"

    def _possible(self) -> tuple[list[Inputs], list[str]]:
        """The stressed inputs that the candidate can run, and a sentence on those that it cannot."""
        ids, config = self.plain.input_ids, self._model.config
        if self.backward:
            return more_runs(self.plain, self._model, self.candidate, self.stress), []
        wanted = [*stressed(ids), *chosen(self._model, ids)] if self.stress else []
        why = {
            inputs.label: cannot_run(self.candidate, inputs)
            or changes_on_the_way(config, inputs)
            or self._has_other_rows(inputs)
            for inputs in wanted
        }
        skipped = [f"{label} ({reason})" for label, reason in why.items() if reason]
        said = [f"not run: {', '.join(skipped)}"] if skipped else []
        return [inputs for inputs in wanted if not why[inputs.label]], said

    def _has_other_rows(self, inputs: Inputs) -> str:
        """Why a candidate with weights of its own is not fed embeddings: a clause, "" if it is. They would be rows of
        the checkpoint."""
        other = self.weights is not None and inputs.embeds_scale is not None and self.weights.replaces_embedding()
        return "its embedding is not the checkpoint's" if other else ""

    def _take_weights(self, trace: Trace) -> None:
        """Takes the tensors that the candidate handed over, in the place of the checkpoint's."""
        if trace.weights and self.weights is not None:
            given = self.weights.source
            self.notes = [*self.notes, f"it hands over weights of its own, which are not read: judged with {given}"]
        elif trace.weights:
            self.weights = Given.handed(self.candidate.name, trace.weights)
            self._check_weights()
            self._model = self._load(self.candidate.dtype)

    def _tell_format_error(self, report: Report) -> None:
        """Adds what the format of the candidate's own weights costs."""
        if self.weights is None or report.misbehaviour is not None:
            return
        self.step(f"{self._where(self.plain)}: exact runs with its weights and the checkpoint's")
        report.format_error = format_error(self.load("float64"), self.weights, self.plain, report)

    def _settle(self, trace: Trace) -> None:
        """Takes the precision in which the candidate computed, where it was not told one. Raises InputError for a file
        that is in another than was said."""
        if "dtype" in getattr(self.candidate, "takes", EVERYTHING):
            return
        own = getattr(self.candidate, "computes_in", "")
        if own and self.said and own != trace.dtype:
            raise InputError(f"{self.candidate.name} is in {own}: use --dtype {own}, not {trace.dtype}")
        shown = own or format_of(trace.taps)
        if not self.said:
            why = "as it computes" if own else "since what it shows is that; --dtype says another"
            self.notes = [*self.notes, f"judged as {shown}, {why}"]
            self.candidate.dtype = trace.dtype = shown
            self._model = self._load(shown)
        elif shown != trace.dtype:
            note = f"it takes no dtype, and what it shows is {shown}: judged as {trace.dtype}, as --dtype says"
            self.notes = [*self.notes, note]

    def _rows(self, trace: Trace, more: list[Inputs], seconds: float) -> Rows:
        """See `read_rows`. Where the candidate does not show its embedding and inputs are stressed, every token goes
        through the whole model, if they are not too many: such inputs are added to `more`."""
        kept = None if self.work is None else self.work.rows(self.plain)
        if kept is not None:
            return Rows(**kept)
        vocab = self._model.config.vocab_size
        every = every_token(vocab, self.plain.input_ids.shape[1])
        if EMBEDDING not in trace.taps and self.stress and every is not None:
            more.append(every)
            return Rows(0, vocab)
        stress = ", or stress its inputs" if every is not None else ""
        otherwise = f"it does not show {EMBEDDING}; show it{stress}"
        return read_rows(self.candidate, self._model, trace, seconds, otherwise)

    def _judged(self, inputs: Inputs, found: Trace | Misbehaviour, notes: list[str] | None = None) -> Report:
        if isinstance(found, Misbehaviour):
            report = self._misbehaving(inputs, found)
        else:
            where = self._where(inputs)
            step = lambda text, *progress: self.step(f"{where}: {text}", *progress)  # noqa: E731
            report = self._measured(found, step)
        of_the_stack = [said for name, said in self.candidate.details.items() if name == "note"]
        report.notes += [*(notes or []), *self.notes, *of_the_stack]
        return report

    def _measured(self, trace: Trace, step: Callable[..., None]) -> Report:
        asked = Asked.of(self.policy)
        if self.weights is not None:
            asked = replace(asked, kinds=self.weights.kinds(self._model))
        if self.against is None:
            explain = by_default(self.explain)
            explain = False if explain is None and self._is_explained else explain
            keeper = None if self.work is None else keeper_for(trace, asked, self.work.checkpoint)
            how: dict[str, Any] = {"checkpoint": self.checkpoint, "step": step, "keeper": keeper}
            report = judge(self._model, trace, asked, explain=explain, **how)
            words, folder = ",".join(self.layout), None if self.work is None else self.work.checkpoint
            report.part = part_of(report.judged, trace, asked, trace.dtype, words, folder)
            self._is_explained |= report.explanation is not None and bool(report.explanation.causes)
            return report
        layout = ",".join(self.layout) if self.against.is_plain else ""
        good = canonical(self.against, self._model, layout)
        return judge_against(self._model, trace, good, asked, checkpoint=self.checkpoint, step=step)

    def _misbehaving(self, inputs: Inputs, found: Misbehaviour) -> Report:
        return Report(
            checkpoint=self.checkpoint,
            candidate=self.candidate.name,
            dtype=self.candidate.dtype,
            policy=self.policy.name,
            inputs=inputs.label,
            tokens=int(inputs.valid.sum()),
            taps=[],
            next_tokens=None,
            attribution={},
            config=self._model.config,
            misbehaviour=found,
        )


def _hangs(found: Trace | Misbehaviour) -> bool:
    return isinstance(found, Misbehaviour) and found.kind == "hangs"


def changes_on_the_way(config: ModelConfig, inputs: Inputs) -> str:
    """Why inputs in pieces have no one answer: a clause, "" if they have. The frequencies of some types of RoPE follow
    the length of a call, and a piece has another than the whole."""
    rotary, found = RotaryEmbedding(config, exact=True), []
    for columns in (slice(None), *inputs.pieces()):
        rotary.reset()
        rotary.tables(inputs.positions[:, columns])
        found.append(rotary.inv_freq)
    same = all(np.array_equal(found[0], frequencies) for frequencies in found)
    return "" if same else "its rotary frequencies change with the length of a call"
