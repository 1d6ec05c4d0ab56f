"""All runs of one candidate on one checkpoint: the plain one, the stressed ones, and every row of the embedding."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from refllm.check.asked import Asked
from refllm.check.candidates import record
from refllm.check.chosen_embeddings import chosen
from refllm.check.inputs import Inputs, every_token, stressed
from refllm.check.misbehaviour import MisbehavesError, Misbehaviour
from refllm.check.oracle import Report, judge
from refllm.check.taps import EVERYTHING, Candidate, cannot_run
from refllm.check.trace import Trace
from refllm.check.unseen import EMBEDDING, Rows, read_rows
from refllm.config import ModelConfig
from refllm.forward.model import Model
from refllm.forward.rotary import RotaryEmbedding
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
    policy: Asked | Policy
    checkpoint: str = ""
    stress: bool = False
    said: bool = True
    notes: list[str] = field(default_factory=list)
    step: Callable[..., None] = lambda *_: None
    recorded: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._model = self.load(self.candidate.dtype)

    def reports(self) -> Iterator[Report]:
        """A report per input, as they are done; one more if rows of the embedding are wrong that no input reads."""
        more: list[Inputs] = []
        yield from self._first(more)
        for inputs in more:
            found = self._run(inputs)
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
        begin = time.monotonic()
        found, rows = self._run(self.plain), Rows(0, 0)
        seconds = time.monotonic() - begin
        possible, skipped = self._possible()  # as is known now that it ran
        if isinstance(found, Trace):
            self._settle(found)
            rows = self._rows(found, possible, seconds)
        more += [] if _hangs(found) else possible
        if not more:
            self.recorded()
        report = self._judged(self.plain, found, skipped)
        report.unseen += rows.sentences
        return [report, *([] if rows.wrong is None else [self._judged(rows.wrong.inputs, rows.wrong, [rows.said])])]

    def _run(self, inputs: Inputs) -> Trace | Misbehaviour:
        self.step(f"{self._where(inputs)}: {self.candidate.name}")
        try:
            return record(self.candidate, self._model, inputs)
        except MisbehavesError as error:
            return error.found

    def _where(self, inputs: Inputs) -> str:
        return f"{self.checkpoint} {self.candidate.dtype}, {inputs.label}"

    def _possible(self) -> tuple[list[Inputs], list[str]]:
        """The stressed inputs that the candidate can run, and a sentence on those that it cannot."""
        ids, config = self.plain.input_ids, self._model.config
        wanted = [*stressed(ids), *chosen(self._model, ids)] if self.stress else []
        why = {
            inputs.label: cannot_run(self.candidate, inputs) or changes_on_the_way(config, inputs) for inputs in wanted
        }
        skipped = [f"{label} ({reason})" for label, reason in why.items() if reason]
        said = [f"not run: {', '.join(skipped)}"] if skipped else []
        return [inputs for inputs in wanted if not why[inputs.label]], said

    def _settle(self, trace: Trace) -> None:
        """Takes the precision in which the candidate computed, where it was not told one."""
        if "dtype" in getattr(self.candidate, "takes", EVERYTHING):
            return
        shown = format_of(trace)
        if not self.said:
            self.notes = [*self.notes, f"judged as {shown}, since what it shows is that; --dtype says another"]
            self.candidate.dtype = trace.dtype = shown
            self._model = self.load(shown)
        elif shown != trace.dtype:
            note = f"it takes no dtype, and what it shows is {shown}: judged as {trace.dtype}, as --dtype says"
            self.notes = [*self.notes, note]

    def _rows(self, trace: Trace, more: list[Inputs], seconds: float) -> Rows:
        """See `read_rows`. Where the candidate does not show its embedding and inputs are stressed, every token goes
        through the whole model, if they are not too many: such inputs are added to `more`."""
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
            step = lambda text: self.step(f"{where}: {text}")  # noqa: E731
            report = judge(self._model, found, self.policy, checkpoint=self.checkpoint, step=step)
        report.notes += [*(notes or []), *self.notes]
        return report

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
