"""Chat templates in a process of their own, with limits that the operating system keeps.

However a template hangs, grows or crashes, it ends at the latest its own process. The process is started when the first
template is rendered (about a tenth of a second), answers one rendering after another (in less than a millisecond on
top of the template's own time), and ends with this one. It is a limit of time and memory and no further wall: what
keeps a template from files is jinja2's sandbox.
"""

from __future__ import annotations

import functools
import importlib.util
import marshal
import os
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refllm.apart import EndedError, LateError, NoAnswerError, Process
from refllm.errors import InputError, TokenizerError
from refllm.text import template_worker

_START_SECONDS = 60.0  # bounds the wait for a program that is no Python; a busy machine may need several
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE", "SIGTRAP")


@dataclass(frozen=True)
class Limits:
    """What one rendering may take; a chat of a million characters takes hundredths of it.

    cpu_seconds: when the template is interrupted; where it cannot be, its process ends at 1.25 times that.
    wall_seconds: for a machine that has no time for the process. memory: bytes of address space, the interpreter's
    25 million included. text: bytes of UTF-8 that come out.
    """

    cpu_seconds: float = 1.0
    wall_seconds: float = 10.0
    memory: int = 400_000_000
    text: int = 64_000_000


class NoProcessError(Exception):
    """No process for templates can be had; the message says why, as a clause."""


class TemplateProcess:
    """Renders chat templates, from any number of threads and in any fork.

    `unavailable` says why there can be no process here; it is empty where there may be one.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._worker: Process | None = None
        self.unavailable = "" if os.name == "posix" and sys.executable else "this system has none"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text. variables: plain data, no instances of subclasses.

        Raises TokenizerError with a sentence for whatever the template does wrong or too much of, InputError for
        data that is nested too deeply, NoProcessError where nothing was rendered.
        """
        if self.unavailable:
            raise NoProcessError(self.unavailable)
        try:
            request = marshal.dumps((self.limits.cpu_seconds, template, variables))
        except ValueError:
            raise InputError("the messages or variables of the chat template are nested too deeply") from None
        with self._lock:
            answer = self._ask(request)
        text = answer[2:].decode("utf-8", "surrogatepass")
        if answer[:1] == template_worker.FAULT:
            raise TokenizerError(text)
        return text

    def end(self) -> None:
        """Ends the process. The next rendering starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _forget(self) -> None:
        self._lock = threading.Lock()  # perhaps held, by a thread that is not in this process
        self.end()

    def _ask(self, request: bytes) -> bytes:
        """The answer. A process that somebody else ended, at work or before, is replaced once."""
        fault = self._try(request)
        if isinstance(fault, str):
            fault = self._try(request)
        if isinstance(fault, str):
            raise TokenizerError(f"chat template: {fault}")
        return fault

    def _try(self, request: bytes) -> bytes | str:
        """The answer, or how a process ended that somebody else ended. Raises TokenizerError."""
        try:
            answer = self._running().ask(request, self.limits.wall_seconds, self.limits.text + 2)
        except EndedError as ended:
            self.end()
            return self._ended(ended)
        except LateError:
            self.end()
            raise TokenizerError(f"chat template: it was not done after {self.limits.wall_seconds:g} s") from None
        except BaseException:  # an answer that nobody waited for would be taken for the next one
            self.end()
            raise
        if answer[1:2] != template_worker.REUSABLE:
            self.end()
        return answer

    def _ended(self, ended: EndedError) -> str:
        """How a process ended that somebody else ended. Raises TokenizerError where its template did."""
        limits, code = self.limits, ended.code
        if code is None:
            raise TokenizerError(f"chat template: {ended}") from None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if name == "SIGPROF":
            raise TokenizerError(f"chat template: it takes more than {limits.cpu_seconds:g} s of CPU time")
        if code == template_worker.EXIT_NO_MEMORY:
            raise TokenizerError(f"chat template: it needs more than {limits.memory // 1_000_000} MB of memory")
        if name in _CRASHES:
            raise TokenizerError(f"chat template: it crashes the interpreter ({name}), as what is nested deeply does")
        return f"its process was ended ({name})"

    def _running(self) -> Process:
        if self._worker is None:
            self._worker = self._started()
        return self._worker

    def _started(self) -> Process:
        folders = {_folder(name) for name in ("refllm", "jinja2", "markupsafe")}
        program = f"import sys; sys.path += {sorted(folders)!r}; from refllm.text.template_worker import main; "

        def arguments(channel: int, _: int) -> list[str]:
            return ["-I", "-S", "-c", f"{program}main({channel}, {self.limits.memory}, {self.limits.text})"]

        try:
            worker = Process.program(arguments)
        except OSError as error:  # perhaps for now only
            raise NoProcessError(f"it does not start ({error.strerror or error})") from None
        try:
            hello = worker.ask(None, _START_SECONDS, most=1)
        except NoAnswerError as error:
            worker.close()
            self.unavailable = f"Python does not start there ({error})"
            raise NoProcessError(self.unavailable) from None
        except BaseException:
            worker.close()
            raise
        if hello == template_worker.METERED:
            warn_of_weaker_limits("this system does not limit the memory of one")
        return worker


def _folder(package: str) -> str:
    """Where a package is found, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise NoProcessError(f"{package} is not found")
    return str(Path(spec.origin).absolute().parents[1])


@functools.cache
def warn_of_weaker_limits(reason: str) -> None:
    """Says, once for each reason, that templates are bounded by counting their work."""
    warnings.warn(
        f"chat templates do not run in a process with limits of its own: {reason}. Their work is counted instead, "
        "which stops most that run away, but not all: render only templates whose origin you trust.",
        stacklevel=2,
    )
