"""Work in a fork of this process, so that what hangs, exits or crashes takes nobody with it.

A fork takes milliseconds and knows functions that have no name. A GPU that this process uses does not survive it.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """How a process ended that gave no answer. text: one clause. in_time: it ended itself."""

    text: str
    in_time: bool = True


def forked(work: Callable[[], T], limit: float | None = None) -> T | Ended:
    """What `work()` returns, in a process of its own; it has to pickle. What the process prints is not shown.

    limit: seconds, None for as long as it takes.
    """
    context = multiprocessing.get_context("fork")
    answers, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as log, answers:
        process = context.Process(target=_answer, args=(theirs, work, log.fileno()))
        start(process)
        theirs.close()
        try:
            if not answers.poll(limit):
                return Ended(f"no answer within {limit:g} s", in_time=False)
            answer: T = answers.recv()
        except EOFError:
            return Ended(how_it_ended(process, log))
        finally:
            process.kill()
            process.join()
        return answer


def _answer(pipe: Connection, work: Callable[[], Any], log: int) -> None:
    silence(log)
    pipe.send(work())


def start(process: Any) -> None:
    """Starts a process of `multiprocessing`."""
    with warnings.catch_warnings():  # that this process has threads: the new one uses none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()


def silence(log: int) -> None:
    """In a fork: what it writes goes to a file, by its descriptor, and its end is left to the one who asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.disable()
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(log, "w", buffering=1, closefd=False)  # noqa: SIM115 (as long as the process)
    with contextlib.suppress(ModuleNotFoundError):
        import torch

        torch.set_num_threads(1)  # the threads of the process that forked are not in this one


def how_it_ended(process: Any, log: Any) -> str:
    """How a process ended, and the last thing that it wrote into its file, as one clause."""
    process.join(5)
    code = process.exitcode
    how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
    log.seek(0)
    said = log.read()[-2000:].decode(errors="replace").strip().splitlines()
    said = [line for line in said if "Extension modules" not in line and line.strip()]
    return f"its process ended: {how}" + (f" ({said[-1].strip()[:200]})" if said else "")
