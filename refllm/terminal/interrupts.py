"""Ctrl-C that is not lost, and a time after which the same happens by itself."""

import signal
import threading
from _thread import interrupt_main
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """Remembers Ctrl-C while it is in use, as a context manager of the main thread.

    Python raises KeyboardInterrupt wherever it is at that moment. In a destructor or a callback of the garbage
    collector (Hypothesis has one) it prints the exception and goes on, so whoever works in steps asks between them.

    seconds: after so many it comes as if somebody had pressed Ctrl-C; None: never. late: whether it came for that.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.came = self.late = False
        self._before: Any = None
        self._timer = None if seconds is None else threading.Timer(seconds, self._time_is_up)

    def ask(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came, or the time is up."""
        if self.came:
            raise KeyboardInterrupt

    def over(self) -> None:
        """All is done in time: from now on it only comes if somebody presses Ctrl-C."""
        if self._timer is not None:
            self._timer.cancel()

    def _time_is_up(self) -> None:
        self.late = True
        kill = getattr(signal, "pthread_kill", None)  # a real signal ends what waits for another process
        if kill is None:
            interrupt_main()
        else:
            kill(threading.main_thread().ident, signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over()
        signal.signal(signal.SIGINT, self._before)
