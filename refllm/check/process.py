"""Candidates of a check in processes of their own, which cannot end this one, keep it waiting or change what it holds.

A candidate is opened there and names its values there; they come back one by one, as the bytes of arrays. The
implementations that refllm knows share one process, since a start costs them seconds; each file of somebody's has one.
A process that was ended, or ended itself, is started again for the next run.
"""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from refllm.apart import Answer, Channel, EndedError, LateError, Process, place
from refllm.check.candidates import KNOWN, must_be_known, of_object, open_candidate, run_candidate
from refllm.check.functions import imported
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import MisbehavesError, Misbehaviour, raised
from refllm.check.stacks import Opening, find_stack
from refllm.check.taps import EVERYTHING, Candidate, Sink
from refllm.errors import InputError, RefllmError
from refllm.models.own_page import current, in_use

SECONDS, SECONDS_PER_GIB = 600.0, 3600.0
"""The time for one run, and more for every GiB of weights: a plain port in NumPy on two cores takes less."""
SECONDS_TO_START = 120.0
"""What a new interpreter has beside that, to import a library or two and to open the candidate."""
_SHOWN = 1 << 14
"""Bytes that are shown of what a process prints."""


def time_limit(folder: Path) -> float:
    """Seconds for one run of a candidate on a checkpoint, where nobody says how many."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return SECONDS + SECONDS_PER_GIB * size / 2**30


class Processes:
    """Opens candidates, each in its process. A context manager.

    seconds: for each run of a candidate; None: `time_limit`. It has `SECONDS_TO_START` more to be opened.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._running: dict[str, Process] = {}
        self._opened: dict[str, ApartCandidate] = {}
        self._unusable: dict[str, Misbehaviour] = {}

    def open(self, opening: Opening, begin: bool = True) -> "ApartCandidate":
        """Begins to open a candidate in place of the one before, and does not wait; or only once it is asked for
        something. Raises InputError as `must_be_known`."""
        must_be_known(opening)
        opening = replace(opening, page=current())
        seconds = time_limit(opening.folder) if self.seconds is None else self.seconds
        candidate = ApartCandidate(self, opening, seconds)
        if begin and opening.name not in self._unusable:
            self.process(candidate)
        return candidate

    def process(self, candidate: "ApartCandidate") -> Process:
        """The process in which a candidate is open or being opened; started, and told to open it, where it is not.

        Raises MisbehavesError for a candidate that misbehaved when it was imported.
        """
        name, kind = candidate.opening.name, _kind(candidate.opening.name)
        if name in self._unusable:
            raise MisbehavesError(self._unusable[name], name)
        if kind not in self._running:
            self._running[kind] = Process.fresh(f"{__name__}:serve")
            self._running[kind].echo = _shown()
            self._opened.pop(kind, None)
        if self._opened.get(kind) is not candidate:
            self._opened[kind], candidate.ready = candidate, False
            self._running[kind].send(("open", vars(candidate.opening)))
        return self._running[kind]

    def end(self, candidate: "ApartCandidate") -> None:
        """Ends the process of a candidate, if there is one."""
        process = self._running.pop(_kind(candidate.opening.name), None)
        if process is not None:
            process.close()

    def forget(self, candidate: "ApartCandidate") -> None:
        """It is neither open nor being opened."""
        self._opened.pop(_kind(candidate.opening.name), None)

    def give_up(self, name: str, found: Misbehaviour) -> None:
        """Whatever the checkpoint is: a candidate that misbehaves when it is imported does so again."""
        self._unusable[name] = found

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        while self._running:
            self._running.popitem()[1].close()


class ApartCandidate:
    """A candidate in a process of its own: a `Candidate`. Its full name, its details and what it takes are known once
    it is open.

    ready: whether it is open, and not only being opened.
    """

    def __init__(self, processes: Processes, opening: Opening, seconds: float) -> None:
        self.opening, self.seconds, self.ready = opening, seconds, False
        self.name, self.dtype = opening.name, opening.dtype
        self.details: dict[str, str] = {}
        self.takes: tuple[str, ...] = EVERYTHING
        self.computes_in = ""
        self._processes = processes

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Raises MisbehavesError for whatever goes wrong there, InputError for wrong use."""
        self.open()
        process, end = self._processes.process(self), time.monotonic() + self.seconds
        process.send(("run", {"inputs": vars(inputs), "dtype": self.dtype}))
        keep = getattr(sink, "keep", sink)  # it was checked and copied there
        late = f"it did not return within {self.seconds:g} s"
        while (answer := self._receive(process, end, late)).word != "done":
            try:
                keep(str(answer.values["name"]), answer.values["value"])
            except BaseException:
                self._processes.end(self)  # in the middle of its run
                raise

    def close(self) -> None:
        """Ends its process, which frees what it holds. Another run starts another."""
        self._processes.end(self)

    def open(self) -> None:
        """Returns when it is open. Raises MisbehavesError for what goes wrong until then."""
        process, seconds = self._processes.process(self), self.seconds + SECONDS_TO_START
        end, late = time.monotonic() + seconds, f"it was not ready to run within {seconds:g} s"
        imported = self.opening.name in KNOWN or find_stack(self.opening.name) is not None
        try:
            while not self.ready:
                word, values = self._receive(process, end, late)
                imported = True
                if word == "opened":
                    self.name, self.details, self.ready = str(values["name"]), values["details"], True
                    self.takes, self.computes_in = tuple(values["takes"]), str(values["computes_in"])
        except MisbehavesError as error:
            if not imported:
                self._processes.give_up(self.opening.name, error.found)
            self._processes.forget(self)  # whoever asks again is answered again
            raise

    def _receive(self, process: Process, end: float, late: str) -> Answer:
        """The next answer, if it is one that a run or an opening goes on with. late: what to say if there is none."""
        try:
            answer = process.receive(max(0.0, end - time.monotonic()))
        except EndedError as ended:
            self._processes.end(self)
            text = f"it ends the process: {str(ended).removeprefix('its process ended: ')}"
            raise MisbehavesError(Misbehaviour("crashes", text, ended.file, ended.line), self.name) from None
        except LateError:
            file, line = process.where()
            self._processes.end(self)
            at = f" ({place(file, line)})" if file else ""
            found = Misbehaviour("hangs", f"{late}{at}; --time-limit gives it more", file, line)
            raise MisbehavesError(found, self.name) from None
        if answer.word == "misbehaves":
            raise MisbehavesError(Misbehaviour(**answer.values), self.name)
        if answer.word == "refused":
            raise InputError(str(answer.values))
        return answer


def _kind(name: str) -> str:
    """Candidates of one kind share a process: those that refllm knows, of one stack, of one file or module."""
    if name in KNOWN:
        return ""
    return name.partition(":")[0] if find_stack(name) is not None else name.rpartition(":")[0]


def _shown() -> Callable[[bytes], None]:
    """Shows what a process prints on standard error: the beginning."""
    left = _SHOWN

    def show(text: bytes) -> None:
        nonlocal left
        if left > 0:
            said = text[:left].decode(errors="replace") + ("\n... (cut)\n" if len(text) > left else "")
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(("\r\x1b[2K" if sys.stderr.isatty() else "") + said)
                sys.stderr.flush()
            left -= len(text)

    return show


# ----------------------------------------------------------------------------------------------- in the other process


def serve(channel: Channel) -> None:
    """Opens a candidate, runs it as often as it is asked to, then the next."""
    warnings.filterwarnings("ignore", module=r"refllm\.")  # said already where the check itself loads the checkpoint
    candidate: Candidate | None = None
    pages = contextlib.ExitStack()  # all its candidates have the same one
    for what, given in channel.requests():
        try:
            if what == "open":
                candidate = None  # before another is loaded beside it
                pages.enter_context(in_use(given["page"] or None))
                candidate = _opened(Opening(**given), channel)
                said: dict[str, object] = {"name": candidate.name, "details": candidate.details}
                said["takes"] = getattr(candidate, "takes", EVERYTHING)
                said["computes_in"] = getattr(candidate, "computes_in", "")
                channel.answer("opened", said)
            else:
                assert candidate is not None
                candidate.dtype = given["dtype"]  # as was found in what it showed
                _run(candidate, Inputs(**given["inputs"]), channel)
                channel.answer("done")
        except MisbehavesError as error:
            channel.answer("misbehaves", vars(error.found))
        except RefllmError as error:
            channel.answer("refused", str(error))
        except BaseException as error:  # KeyboardInterrupt too: nobody interrupts this process but the candidate
            channel.answer("misbehaves", vars(raised(error).found))


def _run(candidate: Candidate, inputs: Inputs, channel: Channel) -> None:
    run_candidate(candidate, inputs, lambda name, value: channel.answer("tap", {"name": name, "value": value}))


def _opened(opening: Opening, channel: Channel) -> Candidate:
    stack = find_stack(opening.name)
    where = (opening.name if stack is None else opening.given).rpartition(":")[0]
    if where:  # a function of theirs, whose file has its neighbours beside it
        sys.path.insert(0, str(Path(where).resolve().parent) if where.endswith(".py") else os.getcwd())
    if opening.name in KNOWN or stack is not None:
        return open_candidate(opening)
    function = imported(opening.name)
    channel.answer("found")
    return of_object(function, opening)
