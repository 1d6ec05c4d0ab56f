"""The process in which candidates run, so that one that hangs or crashes takes nobody with it.

On a CPU it is a fork of this process, which takes milliseconds and knows functions that have no name. For a GPU, which
does not survive a fork, it is a new interpreter that imports the candidate again.
"""

import time
from typing import Any, Protocol

from refllm.apart import Channel, EndedError, LateError, Process, place
from refllm.errors import InputError, RefllmError
from refllm.opcheck.autograd import Autograd
from refllm.opcheck.candidate import Candidate, find
from refllm.opcheck.observe import Observation, Task, observe

_START_SECONDS = 120.0
"""The time in which a new interpreter imports Torch and the candidate; and then a GPU's first kernel is compiled."""


_COMPILERS = ("torch/_dynamo/convert_frame.py", "triton/compiler/compiler.py", "jax/_src/compiler.py")
"""Files whose functions run while somebody's code is being compiled, and at no other time for long."""

NEVER = float("inf")


class TimeIsUpError(RefllmError):
    """The time of the whole search ended while a candidate was running, which had not reached its own limit."""


class Runner(Protocol):
    """Runs a candidate on tasks."""

    def observe(self, task: Task, limit: float, until: float = NEVER) -> Observation:
        """limit: seconds for each run of the candidate. until: when all time is up, in time.monotonic().

        Raises TimeIsUpError if that comes first.
        """

    def close(self) -> None:
        """Ends it."""


class InProcess:
    """Runs the candidate right here: fast, and as safe as the candidate is. Nothing ends a run that takes too long."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate

    def observe(self, task: Task, limit: float, until: float = NEVER) -> Observation:
        return observe(self.candidate.function, task)

    def close(self) -> None:
        pass


class Worker:
    """Runs the candidate in a process of its own, and starts another when that has died."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate, self.fork = candidate, candidate.device == "cpu"
        self._process: Process | None = None
        if not self.fork and not candidate.reference:
            raise InputError(
                f"{candidate.name}: a GPU needs a process that imports the candidate; give it as module:function or "
                "file.py:function, or check it in this process with isolate=False"
            )
        if not self.fork:
            self._start()  # what it imports is not the candidate's time

    def observe(self, task: Task, limit: float, until: float = NEVER) -> Observation:
        """A candidate that takes longer "hangs", one whose process ends "crashes"."""
        started = self._process is None
        process = self._process or self._start()
        process.send(task)
        begin, patience = time.monotonic(), _START_SECONDS if started and not self.fork else limit
        try:
            while True:
                left = until - time.monotonic()
                try:
                    word, values = process.receive(max(0.0, min(patience, left)))
                except LateError:
                    if left < patience or time.monotonic() - begin > _START_SECONDS or not _compiles(process):
                        raise
                    continue  # is no call that hangs: what it compiles is there for the next one
                if word == "seen":
                    return Observation.from_answer(values)
                patience = max(limit, _START_SECONDS if word == "first" and not self.fork else 0.0)
        except EndedError as ended:
            self.close()
            return Observation("crashes", str(ended), seconds=time.monotonic() - begin)
        except LateError:
            seconds, at = time.monotonic() - begin, place(*process.where())
            self.close()
            if left < patience:
                raise TimeIsUpError("the time is up") from None
            text = f"it did not return within {patience:.2g} s" + (f" ({at})" if at else "")
            return Observation("hangs", text, seconds=seconds)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _start(self) -> Process:
        if self.fork:
            self._process = Process.forked(lambda channel: _serve(channel, self.candidate.function))
            return self._process
        self._process = Process.fresh(f"{__name__}:serve")
        self._process.send((self.candidate.reference, self.candidate.autograd))
        try:
            said = self._process.receive(_START_SECONDS).values
        except EndedError as ended:
            said = str(ended)
        except LateError:
            said = f"no answer within {_START_SECONDS:g} s"
        if said is not None:
            self.close()
            raise InputError(f"{self.candidate.name} cannot be imported by a process of its own: {said}")
        return self._process


def _compiles(process: Process) -> bool:
    """Whether a process that still runs is compiling."""
    return any(file.replace("\\", "/").endswith(_COMPILERS) for file, _ in process.frames())


def serve(channel: Channel) -> None:
    """A new process: is told the candidate's name first."""
    for reference, autograd in channel.requests():
        try:
            candidate = find(reference)
            candidate = Autograd(autograd, candidate) if autograd else candidate
        except InputError as error:
            channel.answer("refused", str(error))
            return
        channel.answer("found")
        _serve(channel, candidate)


def _serve(channel: Channel, candidate: Any) -> None:
    """The process: takes tasks, answers with observations, until the channel closes."""
    word = "first"

    def step(name: str) -> None:
        channel.answer(word)

    for task in channel.requests():
        channel.answer("seen", observe(candidate, task, step).to_answer())
        word = "next"
