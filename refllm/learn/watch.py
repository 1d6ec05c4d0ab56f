"""Waiting until a file is saved. It is looked at, ten times a second: that works on every disk and in every editor."""

import time
from collections.abc import Iterator
from pathlib import Path

_LOOK = 0.1
_QUIET = 0.05
"""Seconds for which a file must not change before it counts as saved: editors write in several steps."""


def saves(path: Path, until: float | None = None) -> Iterator[None]:
    """Yields at once, and then after every save. until: seconds after which it ends, None for never. A file that is
    away for a moment, as editors do it, is waited for."""
    end = None if until is None else time.monotonic() + until
    seen: tuple[int, ...] | None = None
    while end is None or time.monotonic() < end:
        now = _state(path)
        if now is not None and now != seen:
            time.sleep(_QUIET)
            if _state(path) == now:
                seen = now
                yield
                continue
        time.sleep(_LOOK)


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
