"""What a check has not seen, in sentences: a verdict counts it, since nothing is known of it."""

import re
import time
from dataclasses import dataclass, replace

import numpy as np

from refllm.check.candidates import record
from refllm.check.inputs import ALL_AT_MOST, Inputs, in_rows
from refllm.check.misbehaviour import MisbehavesError
from refllm.check.taps import EVERYTHING, Candidate
from refllm.check.trace import Trace
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.forward.taps import HEAD_TAPS
from refllm.storage.load_report import HEADS

EMBEDDING = "model.embed_tokens"
_AT_ONCE = 1 << 25  # numbers of the embedding that a candidate shows at once: 128 MiB of float32
_NAMED = 6  # kinds of tensors in a sentence
_SHOWN = 8  # wrong rows of which the values are measured


def never_shown(head: str, trace: Trace) -> list[str]:
    """A sentence where the last value of a model was not shown: what comes after the last shown one was not judged.

    Values between two that are shown are judged with the later one.
    """
    last = HEAD_TAPS.get(head, "model.norm")
    if last in trace.taps or trace.inputs.until:
        return []
    return [f"{last} was never shown, so that nothing after {list(trace.taps)[-1]} was judged"]


def never_read(model: Model) -> list[str]:
    """A sentence where the checkpoint has tensors that the page never reads, other than those of another head and
    stored rotary tables: what they do is not judged."""
    names = [name for name in model.weights.report.unexpected if not name.startswith(HEADS)]
    if not names:
        return []
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    which = ", ".join(kinds[:_NAMED]) + (", ..." if len(kinds) > _NAMED else "")
    many = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
    return [f"{many} of the checkpoint never read by the page of {model.config.model_type}: {which}"]


@dataclass(frozen=True)
class Rows:
    """The rows of the embedding that a candidate did not read. unread: how many, of how many. why: not, in a clause.

    wrong: a trace of rows that are not those of the checkpoint, None if there are none; said: which they are.
    """

    unread: int
    of: int
    why: str = ""
    wrong: Trace | None = None
    said: str = ""

    @property
    def sentences(self) -> list[str]:
        """What was not seen."""
        if not self.unread:
            return []
        return [f"{self.unread:,} of {self.of:,} rows of the embedding were never read: {self.why}"]


def read_rows(candidate: Candidate, model: Model, trace: Trace, seconds: float, otherwise: str) -> Rows:
    """Every row of the embedding that the run of `trace` did not read, read now, if the candidate shows its embedding:
    its runs end there, and cost no forward pass. One that computes everything before it shows anything pays for it, and
    is spared if the rows are many.

    seconds: that the run of `trace` took. otherwise: what helps where the embedding is not shown.
    """
    vocab, width = model.config.vocab_size, model.config.hidden_size
    valid = trace.inputs.valid
    read = trace.inputs.input_ids[valid]
    unread = np.setdiff1d(np.arange(vocab), read)
    if not unread.size or EMBEDDING not in trace.taps:
        return Rows(len(unread), vocab, otherwise)
    if _wrong(model, read, trace.taps[EMBEDDING][valid]).any():
        return Rows(len(unread), vocab, "those that were read are wrong")
    length, rows = valid.shape[1], 1
    most = max(1, _AT_ONCE // (length * width)) if "batch" in getattr(candidate, "takes", EVERYTHING) else 1
    ids, values = [np.empty(0, int)], [np.empty((0, width), np.float32)]
    while unread.size:
        some, unread = np.split(unread, [rows * length])
        inputs = Inputs(in_rows(some, length), label="every token id", until=EMBEDDING)
        begin = time.monotonic()
        try:
            shown = record(candidate, model, inputs).taps[EMBEDDING].reshape(-1, width)[: len(some)]
        except (MisbehavesError, InputError, KeyError, ValueError) as error:
            said = str(error).removeprefix(f"{candidate.name}: ")
            shape = " x ".join(str(n) for n in inputs.input_ids.shape)
            return Rows(len(some) + len(unread), vocab, f"given {shape} ids, {said}")
        wrong = _wrong(model, some, shown)
        ids.append(some[wrong])
        values.append(shown[wrong][:_SHOWN])
        if time.monotonic() - begin < seconds / 2:
            rows = min(8 * rows, most)
        elif len(unread) > ALL_AT_MOST:
            return Rows(len(unread), vocab, f"it computes everything before it shows {EMBEDDING}")
    return _found(trace, np.concatenate(ids), np.concatenate(values), vocab)


def _found(trace: Trace, wrong: np.ndarray, values: np.ndarray, vocab: int) -> Rows:
    """All rows were read. wrong: the ids of those that are; values: of some of them, in this order."""
    if not wrong.size:
        return Rows(0, vocab)
    few = values[None, :_SHOWN]
    inputs = Inputs(wrong[None, : few.shape[1]], label="every token id", until=EMBEDDING)
    said = f"{len(wrong):,} of {vocab:,} rows of the embedding are not those of the checkpoint: ids {_spans(wrong)}"
    return Rows(0, vocab, wrong=replace(trace, taps={EMBEDDING: few}, inputs=inputs), said=said)


def _wrong(model: Model, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n] bool: which rows [n, E] are not those of the table for these ids [n], to the bit."""
    table = model.weights.rows("embed_tokens.weight", ids)
    return np.asarray(((rows != table) & ~(np.isnan(rows) & np.isnan(table))).any(axis=-1))


def _spans(ids: np.ndarray) -> str:
    """ "3, 620 to 639 and more" for ids in ascending order."""
    parts = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    words = [str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts[:3]]
    return ", ".join(words) + (" and more" if len(parts) > 3 else "")
