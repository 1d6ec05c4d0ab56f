"""Ctrl-C that is not lost."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """Remembers Ctrl-C while it is in use, as a context manager of the main thread.

    Python raises KeyboardInterrupt wherever it is at that moment. In a destructor or a callback of the garbage
    collector (Hypothesis has one) it prints the exception and goes on, so whoever works in steps asks between them.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def ask(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came."""
        if self.came:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
