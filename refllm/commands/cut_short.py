"""A check that is ended before all is done, by Ctrl-C or by its time: what was found until then is reported."""

import sys
from types import TracebackType
from typing import Any, Self

from refllm.terminal.interrupts import Interrupts
from refllm.terminal.status_line import StatusLine


class CutShort:
    """Says on the status line what is being done, and swallows the interruption. A context manager.

    seconds: after which it ends; None: never. why: after it, a clause on why not all was done; "" if all was. report:
    on what was being judged at that moment, as far as it was, if there is one.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.why = seconds, ""
        self.report: Any = None
        self._line, self._doing = StatusLine(sys.stderr), ""
        self._interrupts = Interrupts(seconds)

    def step(self, text: str, *progress: float | None) -> None:
        """What is being done now. Raises KeyboardInterrupt where that is over."""
        self._interrupts.ask()
        self._doing = text
        self._line(text, *progress)

    def clear(self) -> None:
        """Empties the line, for a result to be printed in its place."""
        self._line.clear()

    def to_dict(self) -> dict[str, Any]:
        """What the JSON says of it."""
        interrupted = bool(self.why) and not self._interrupts.late
        return {"interrupted": interrupted, **({"ended": self.why} if self._interrupts.late and self.why else {})}

    def __enter__(self) -> Self:
        self._interrupts.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            self._interrupts.__exit__(kind, error, trace)
        except KeyboardInterrupt as at_the_last_moment:
            error = at_the_last_moment
            self._interrupts.__exit__(kind, error, trace)
        self._line.clear()
        if not isinstance(error, KeyboardInterrupt):
            return False
        self.report = getattr(error, "report", None)
        at = f" at {self._doing}" if self._doing else ""
        self.why = f"the time of {self.seconds:g} s was up{at}" if self._interrupts.late else "it was interrupted"
        return True
