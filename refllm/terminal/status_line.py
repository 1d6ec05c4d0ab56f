"""One line on a terminal that says what is being done, with a bar where it is known how much is left.

Plain text without a thread behind it, so that it can share the terminal with results and with the bar of loading.
"""

import shutil
import time
from typing import TextIO

BAR = 30
SECONDS_BETWEEN = 0.1


class StatusLine:
    """Call it with what is being done now. A context manager; writes nothing if `stream` is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.active = stream, stream.isatty()
        self._text, self._time = "", 0.0

    def __call__(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Shows `text`, and a bar if `done` and `total` are given."""
        now = time.monotonic()
        if not self.active or (text == self._text and now - self._time < SECONDS_BETWEEN):
            return
        self._text, self._time = text, now
        line = text if done is None or not total else f"{text} {bar(done / total)}"
        self.stream.write("\r\x1b[2K" + line[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def clear(self) -> None:
        """Empties the line, for a result to be printed in its place."""
        if self.active:
            self._text = ""
            self.stream.write("\r\x1b[2K")
            self.stream.flush()

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()


def bar(share: float) -> str:
    """A bar for a share of 0 to 1."""
    full = round(BAR * min(max(share, 0.0), 1.0))
    return f"[{'#' * full}{'-' * (BAR - full)}] {100 * share:3.0f} %"
