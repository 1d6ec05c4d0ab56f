"""A process that ends: by itself, or by force when its time is over, with everything that it started."""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

SECONDS_TO_TIDY_UP = 10.0
"""The time between asking a process to end and killing it: pytest writes its report, Python its last lines."""


class LimitedProcess:
    """Starts `python -P ARGUMENTS` in a group of its own. seconds: until it is ended. environment: beside this one's.

    After `wait`: code (None if its time was over), output and errors as texts, seconds that it took.
    """

    def __init__(self, arguments: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> None:
        self._start, self._limit = time.monotonic(), seconds
        # Files and not pipes: a full pipe stops a process that nobody reads from yet.
        self._files = contextlib.ExitStack()
        self._streams = [self._files.enter_context(_stream()) for _ in range(2)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdout=self._streams[0],
            stderr=self._streams[1],
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_hears_interrupts,
        )
        atexit.register(self._kill_group)  # Ctrl-C does not reach another group
        self.code: int | None = None
        self.output, self.errors, self.seconds = "", "", 0.0

    def wait(self) -> "LimitedProcess":
        """Returns when it has ended, or was ended."""
        left = self._limit - (time.monotonic() - self._start)
        try:
            self.code = self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self.end()
        self._kill_group()  # what it left behind would compute on while others are timed
        atexit.unregister(self._kill_group)
        self.seconds = time.monotonic() - self._start
        self.output, self.errors = map(_read, self._streams)
        self._files.close()
        return self

    def end(self) -> None:
        """Asks it to end, as Ctrl-C does, and kills it if it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(SECONDS_TO_TIDY_UP)
            except subprocess.TimeoutExpired:
                self._kill_group()
                self._process.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def last_line(self) -> str:
        """The last line of its errors: what most programs end with when they fail."""
        return (self.errors.strip().splitlines() or ["no message"])[-1]


def _hears_interrupts() -> None:
    """A shell starts what it puts into the background deaf to Ctrl-C, and its children would be so too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stream() -> Any:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read().strip())
