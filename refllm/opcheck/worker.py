"""The process in which candidates run, so that one that hangs or crashes takes nobody with it.

On a CPU it is a fork of this process, which takes milliseconds and knows functions that have no name. For a GPU, which
does not survive a fork, it is a new interpreter that imports the candidate again.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any, Protocol

from refllm.errors import InputError, RefllmError
from refllm.opcheck import forked
from refllm.opcheck.candidate import Candidate, find
from refllm.opcheck.observe import Observation, Task, observe

_START_SECONDS = 120.0
"""For a new interpreter to import Torch and the candidate; and then for a GPU to compile its first kernel."""


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
        self._process: Any = None
        self._pipe: Connection | None = None
        self._log: Any = None
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
        if started:
            self._start()
        pipe, begin = self._pipe, time.monotonic()
        assert pipe is not None
        try:
            pipe.send(task)
            patience = _START_SECONDS if started and not self.fork else limit
            while pipe.poll(max(0.0, min(patience, left := until - time.monotonic()))):
                message = pipe.recv()
                if isinstance(message, Observation):
                    return message
                patience = max(limit, _START_SECONDS if message == "first" and not self.fork else 0.0)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return Observation("crashes", self._epitaph(), seconds=time.monotonic() - begin)
        self.close()
        if left < patience:
            raise TimeIsUpError("the time is up")
        return Observation("hangs", f"it did not return within {patience:.2g} s", seconds=time.monotonic() - begin)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("fork" if self.fork else "spawn")
        self._pipe, theirs = context.Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        candidate = self.candidate.function if self.fork else self.candidate.reference
        arguments = (theirs, candidate, self._log.fileno() if self.fork else None)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with _without_main() if not self.fork else contextlib.nullcontext():
            forked.start(self._process)
        theirs.close()
        if not self.fork:
            self._wait_until_imported()

    def _wait_until_imported(self) -> None:
        assert self._pipe is not None
        try:
            said = self._pipe.recv() if self._pipe.poll(_START_SECONDS) else f"no answer within {_START_SECONDS:g} s"
        except EOFError:
            said = self._epitaph()
        if said is not None:
            self.close()
            raise InputError(f"{self.candidate.name} cannot be imported by a process of its own: {said}")

    def _epitaph(self) -> str:
        """How the process ended, and the last thing it said."""
        how = forked.how_it_ended(self._process, self._log)
        self.close()
        return how


@contextlib.contextmanager
def _without_main() -> Any:
    """A new interpreter imports the main module of this one again, unless that has no file."""
    import sys

    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        if "__file__" in kept:
            del main.__file__
        main.__spec__ = None
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def _serve(pipe: Connection, candidate: Any, log: int | None) -> None:
    """The process: takes tasks, returns observations, until the pipe closes."""
    if log is not None:
        forked.silence(log)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked ends this process
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        try:
            candidate = find(candidate)
        except InputError as error:
            pipe.send(str(error))
            return
        pipe.send(None)
    word = "first"

    def step(name: str) -> None:
        pipe.send(word)

    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(observe(candidate, task, step))
        word = "next"
