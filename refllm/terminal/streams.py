"""Standard output and error of a command: there, able to show any text, and closed without a traceback."""

import contextlib
import os
import sys
from typing import Any


def prepare() -> None:
    """Called first. What the terminal's encoding cannot show is replaced; a stream that is closed takes everything.

    Without a stream, Python has None, and the first file that is opened would get its number and what is written to it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            stream = os.fdopen(handle, "r" if name == "stdin" else "w", encoding="utf-8")
            setattr(sys, name, stream)
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")


def flush(code: int) -> int:
    """Called last: what is left is written now, where it can still be said that it was not. Returns the exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it any more; what was found remains
        _to_nowhere(sys.stdout)
    except OSError as error:
        _to_nowhere(sys.stdout)
        if code != 2:  # else a sentence has been said, this one or an earlier one
            with contextlib.suppress(OSError):
                print(f"refllm: standard output cannot be written: {error.strerror or error}", file=sys.stderr)
        code = 2
    try:
        sys.stderr.flush()
    except OSError:
        _to_nowhere(sys.stderr)
    return code


def _to_nowhere(stream: Any) -> None:
    """Python flushes once more at its end, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
