"""All runs of one candidate on one checkpoint: the plain one, the stressed ones, and every row of the embedding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from refllm.check.candidates import record
from refllm.check.inputs import Inputs, every_token, stressed
from refllm.check.misbehaviour import MisbehavesError, Misbehaviour
from refllm.check.oracle import Report, judge
from refllm.check.taps import EVERYTHING, Candidate, cannot_run
from refllm.check.trace import Trace
from refllm.check.unseen import EMBEDDING, Rows, read_rows
from refllm.forward.model import Model
from refllm.precision import Policy, rounding

_FEWEST = 64  # numbers other than 0 that tell a format


@dataclass
class Runs:
    """What to run. load: dtype -> the checkpoint, with weights on the grid of that dtype. plain: the inputs.

    said: whether somebody said the candidate's dtype; if not, and it takes none, it is found in what it shows.
    recorded: called when the last run is done and not yet judged.
    """

    load: Callable[[str], Model]
    candidate: Candidate
    plain: Inputs
    policy: Policy
    checkpoint: str = ""
    stress: bool = False
    said: bool = True
    notes: list[str] = field(default_factory=list)
    step: Callable[..., None] = lambda *_: None
    recorded: Callable[[], None] = lambda: None

    def reports(self) -> Iterator[Report]:
        """A report per input, as they are done; one more if rows of the embedding are wrong that no input reads."""
        model, rows = self.load(self.candidate.dtype), Rows(0, 0)
        found = self._run(model, self.plain)
        more, skipped = self._possible()
        if isinstance(found, Trace):
            model = self._settle(model, found)
            rows = self._rows(model, found, more)
        yield from self._first(model, found, rows, skipped, last=not more)
        if isinstance(found, Misbehaviour) and found.kind == "hangs":
            return  # it would take as long again
        for inputs in more:
            found = self._run(model, inputs)
            hangs = isinstance(found, Misbehaviour) and found.kind == "hangs"
            if hangs or inputs is more[-1]:
                self.recorded()
            yield self._judged(model, inputs, found)
            if hangs:
                return

    def _first(
        self, model: Model, found: Trace | Misbehaviour, rows: Rows, skipped: list[str], last: bool
    ) -> Iterator[Report]:
        """Reports on the plain run, and on rows of the embedding."""
        if last or (isinstance(found, Misbehaviour) and found.kind == "hangs"):
            self.recorded()
        report = self._judged(model, self.plain, found, skipped)
        report.unseen += rows.sentences
        yield report
        if rows.wrong is not None:
            yield self._judged(model, rows.wrong.inputs, rows.wrong, [rows.said])

    def _run(self, model: Model, inputs: Inputs) -> Trace | Misbehaviour:
        self.step(f"{self._where(inputs)}: {self.candidate.name}")
        try:
            return record(self.candidate, model, inputs)
        except MisbehavesError as error:
            return error.found

    def _where(self, inputs: Inputs) -> str:
        return f"{self.checkpoint} {self.candidate.dtype}, {inputs.label}"

    def _possible(self) -> tuple[list[Inputs], list[str]]:
        """The stressed inputs that the candidate can run, and a sentence on those that it cannot."""
        wanted = stressed(self.plain.input_ids) if self.stress else []
        why = {inputs.label: cannot_run(self.candidate, inputs) for inputs in wanted}
        skipped = [f"{label} ({reason})" for label, reason in why.items() if reason]
        said = [f"not run: {', '.join(skipped)}"] if skipped else []
        return [inputs for inputs in wanted if not why[inputs.label]], said

    def _settle(self, model: Model, trace: Trace) -> Model:
        """The model in the precision in which the candidate computed, where it was not told one."""
        if "dtype" in getattr(self.candidate, "takes", EVERYTHING):
            return model
        shown = format_of(trace)
        if self.said:
            if shown != trace.dtype:
                note = f"it takes no dtype, and what it shows is {shown}: judged as {trace.dtype}, as --dtype says"
                self.notes = [*self.notes, note]
            return model
        self.notes = [*self.notes, f"judged as {shown}, since what it shows is that; --dtype says another"]
        self.candidate.dtype = trace.dtype = shown
        return model if shown == model.dtype else self.load(shown)

    def _rows(self, model: Model, trace: Trace, more: list[Inputs]) -> Rows:
        """See `read_rows`. Where the candidate does not show its embedding and inputs are stressed, every token goes
        through the whole model, if they are not too many: such inputs are added to `more`."""
        every = every_token(model.config.vocab_size, self.plain.input_ids.shape[1])
        if EMBEDDING not in trace.taps and self.stress and every is not None:
            more.append(every)
            return Rows(0, model.config.vocab_size)
        stress = ", or stress its inputs" if every is not None else ""
        return read_rows(self.candidate, model, trace, f"it does not show {EMBEDDING}; show it{stress}")

    def _judged(
        self, model: Model, inputs: Inputs, found: Trace | Misbehaviour, notes: list[str] | None = None
    ) -> Report:
        if isinstance(found, Misbehaviour):
            report = self._misbehaving(model, inputs, found)
        else:
            step = self._where(inputs)
            report = judge(
                model, found, self.policy, checkpoint=self.checkpoint, step=lambda text: self.step(f"{step}: {text}")
            )
        report.notes += [*(notes or []), *self.notes]
        return report

    def _misbehaving(self, model: Model, inputs: Inputs, found: Misbehaviour) -> Report:
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
            config=model.config,
            misbehaviour=found,
        )


def format_of(trace: Trace) -> str:
    """The dtype on whose grid the values lie that a candidate shows: one value in a narrow format is enough, since
    norms and logits may be wider. The embedding does not count, which is on the grid of the checkpoint."""
    for name, value in trace.taps.items():
        some = value.ravel()[: 1 << 16]
        some = some[np.isfinite(some) & (some != 0)]
        if name != EMBEDDING and some.size >= _FEWEST:
            for dtype in ("bfloat16", "float16"):  # most numbers of bfloat16 are numbers of float16 too
                if (rounding(dtype)(some) == some).all():
                    return dtype
    return "float32"
