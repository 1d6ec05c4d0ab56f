"""Runs something in a process of its own, with limits: on its time, on what it prints, and on how it may end.

    with Process.forked(serve) as process:              # a function of this process, which a fork keeps
    with Process.fresh("package.module:serve") as ...:  # a new interpreter, which imports it

        process.send(request)
        answer = process.receive(seconds)

    Process.program(arguments)                          # a Python that is trusted less, and speaks bytes alone
    Batch(arguments, seconds).wait()                    # a Python that is asked nothing: it runs to its end

`serve(channel)` takes `channel.requests()` and gives `channel.answer(word, values)` as often as it likes for each. A
fork takes milliseconds and knows functions that have no name; but a GPU that this process uses does not survive it, nor
do the threads of a library that has computed already. For those there is the new interpreter.

Requests are pickled, since the one who asks is trusted. Answers are not: they are JSON and the bytes of arrays, so that
nothing that comes from the process is executed here. They carry the number of their request, so that a late one is
never taken for the next. The process leads a session of its own, which ends with it: what it started is killed as well.
It ends with this process too. What it prints goes through a pipe, of which the last lines are kept and nothing is
stored.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import importlib.util
import json
import math
import os
import pickle
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from refllm.errors import RefllmError

_TAIL = 1 << 14
"""Bytes that are kept of what a process prints."""
_LOOK = 0.1
"""Seconds after which the process itself is looked at: its children may hold its end of the channel open."""
_TO_END = 5.0
"""Seconds that a process has to end once it has closed its channel."""
_TO_TELL = 0.5
"""Seconds that a process has to say where it is."""
SECONDS_TO_TIDY_UP = 10.0
"""The time between asking a `Batch` to end and killing it: pytest writes its report, Python its last lines."""
_HEAD = struct.Struct("<QQ")
_LARGEST = 1 << 28
"""Bytes of an answer, its arrays not counted."""
_KINDS = "biuf"
"""NumPy's kinds of the arrays that can be sent."""
_WHERE = getattr(signal, "SIGUSR2", 0)  # Windows, which has no forks either, can import this file
_PR_SET_PDEATHSIG = 1


class NoAnswerError(RefllmError):
    """A process gave no answer. The text is one clause."""


class EndedError(NoAnswerError):
    """It ended before it answered. file, line: of whose code it had reached, "" and 0 where that is not known. code:
    its exit code, negative for a signal; None where it goes on, but answers no more."""

    def __init__(self, text: str, file: str = "", line: int = 0, code: int | None = None) -> None:
        super().__init__(text)
        self.file, self.line, self.code = file, line, code


class LateError(NoAnswerError):
    """It still runs, but its time is over."""


class Answer(NamedTuple):
    """word: what kind of answer. values: plain values of JSON, with arrays in them."""

    word: str
    values: Any


@dataclass(frozen=True)
class Ended:
    """How a process ended that gave no answer. text: one clause. in_time: it ended itself."""

    text: str
    in_time: bool


def run(work: Callable[[], Any], limit: float | None = None, echo: Callable[[bytes], None] | None = None) -> Any:
    """What `work()` returns, from a fork of this process, as JSON gives it back (tuples as lists); or `Ended`.

    limit: seconds, None for as long as it takes. echo: told what the process prints, which is not shown.
    """

    def serve(channel: Channel) -> None:
        for request in channel.requests():
            channel.answer(request, work())

    with Process.forked(serve) as process:
        process.echo = echo or process.echo
        process.send("work")
        try:
            return process.receive(math.inf if limit is None else limit).values
        except EndedError as ended:
            return Ended(str(ended), in_time=True)
        except LateError:
            return Ended(f"no answer within {limit:g} s", in_time=False)


class Process:
    """A process that answers. A context manager; `close` ends the process and all that it started.

    echo: told what the process prints, as it comes, while an answer is waited for.
    """

    def __init__(self, child: Any, channel: socket.socket, output: int, faults: Any) -> None:
        self.echo: Callable[[bytes], None] = lambda text: None
        self._child, self._socket, self._output, self._faults = child, channel, output, faults
        self._number, self._owner, self._said = 0, os.getpid(), b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._selector.register(output, selectors.EVENT_READ)
        atexit.register(self.close)

    @classmethod
    def forked(cls, serve: Callable[["Channel"], None]) -> "Process":
        """A fork of this process that runs `serve`."""
        with _ends() as (ours, theirs, output, printed, faults):
            sys.stdout.flush()
            sys.stderr.flush()
            with warnings.catch_warnings():  # that this process has threads: the new one uses none of theirs
                warnings.simplefilter("ignore", DeprecationWarning)
                child = _Fork(os.fork())
            if child.pid == 0:
                _be_the_process(serve, theirs, printed, faults.fileno(), fork=True)
        return cls(child, ours, output, faults)

    @classmethod
    def fresh(cls, serve: str, environment: dict[str, str] | None = None) -> "Process":
        """A new interpreter that runs the function "module:name", with the import path and arguments of this one.

        environment: what it has beside that of this process.
        """
        start = "import json, sys; sys.path[:], sys.argv[:], serve, *fds = json.loads(sys.argv[1])"
        start += "; from refllm.apart import be_fresh; be_fresh(serve, *fds)"

        def arguments(*fds: int) -> list[str]:
            return ["-P", "-c", start, json.dumps([sys.path, sys.argv, serve, *fds])]

        return cls.program(arguments, environment)

    @classmethod
    def program(
        cls, arguments: Callable[[int, int], list[str]], environment: dict[str, str] | None = None
    ) -> "Process":
        """A new interpreter with the arguments that the function gives for two file numbers: of its end of the channel,
        and of the file for what `faulthandler` says. Raises OSError if it does not start."""
        with _ends() as (ours, theirs, output, printed, faults):
            fds = (theirs.fileno(), faults.fileno())
            child = _python(
                arguments(*fds), environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, pass_fds=fds
            )
        return cls(child, ours, output, faults)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return int(self._child.pid)

    def send(self, request: Any) -> None:
        """Hands over a request, which has to pickle. Earlier ones are answered no more."""
        self._send(pickle.dumps(request), None)

    def receive(self, limit: float) -> Answer:
        """The next answer to the last request. limit: seconds. Raises EndedError or LateError."""
        deadline = time.monotonic() + limit
        while True:
            number, text = self._message(deadline, _LARGEST)
            try:
                word, values, kinds = json.loads(text)
                arrays = [self._array(dtype, shape, deadline) for dtype, shape in kinds]
                answer = Answer(str(word), _joined(values, arrays))
            except (ValueError, TypeError, LookupError, MemoryError) as error:
                if isinstance(error, NoAnswerError):
                    raise
                raise EndedError("its process sent what is no answer") from None
            if number == self._number:
                return answer

    def ask(self, request: bytes | None, limit: float, most: int) -> bytes:
        """The answer of a `program` to these bytes; None: to no request. limit: seconds, for both. most: bytes of the
        answer. Raises EndedError or LateError."""
        deadline = time.monotonic() + limit
        if request is not None:
            self._send(request, limit)
        number, answer = self._message(deadline, most)
        if number != self._number:
            raise EndedError("its process sent what is no answer")
        return bytes(answer)

    def _send(self, data: bytes, limit: float | None) -> None:
        """Hands over the bytes under the next number. limit: seconds until LateError."""
        self._number += 1
        self._socket.settimeout(limit)
        try:
            self._socket.sendall(_HEAD.pack(self._number, len(data)) + data)
        except TimeoutError:
            raise LateError("no answer in time") from None
        except OSError:  # it has ended, as will be said to the one who waits for the answer
            pass

    def _message(self, deadline: float, most: int) -> tuple[int, bytearray]:
        """The next message: the number of its request, and its bytes."""
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head), deadline)
        number, size = _HEAD.unpack(head)
        if size > most:
            raise EndedError(f"its process sent an answer of {size} bytes")
        text = bytearray(size)
        self._fill(memoryview(text), deadline)
        return number, text

    def where(self) -> tuple[str, int]:
        """Which file and line a process that still runs has reached; "" and 0 if it cannot tell."""
        return theirs(self.frames())

    def frames(self) -> list[tuple[str, int]]:
        """Files and lines of the calls that a process which still runs is in, innermost first; [] if it cannot tell."""
        before = os.fstat(self._faults.fileno()).st_size
        with contextlib.suppress(OSError):
            os.kill(self._child.pid, _WHERE)
        end = time.monotonic() + _TO_TELL
        while not (told := self._fault(before)).endswith("\n") and time.monotonic() < end:
            time.sleep(0.005)
        return _frames_of(told)

    def close(self) -> None:
        """Ends the process and its session at once; may be called again. In a fork, which has this object too, it lets
        go of the process, since that is not the fork's own."""
        if self._child is None:
            return
        atexit.unregister(self.close)
        if os.getpid() == self._owner:
            kill_group(self._child.pid)
            self._child.wait()
        else:
            self._child.returncode = 0
        self._child = None
        self._selector.close()
        self._socket.close()
        self._faults.close()
        os.close(self._output)

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _array(self, dtype: str, shape: list[int], deadline: float) -> np.ndarray:
        if np.dtype(dtype).kind not in _KINDS:
            raise TypeError(dtype)
        array = np.empty(shape, dtype)
        if array.size:
            self._fill(memoryview(array.reshape(-1).view(np.uint8)), deadline)  # type: ignore[arg-type]
        return array

    def _fill(self, view: memoryview, deadline: float) -> None:
        """Reads so many bytes of the channel."""
        while view:
            self._wait(deadline)
            try:
                count = self._socket.recv_into(view)
            except ConnectionResetError:
                count = 0
            if not count:
                raise self._how_it_ended()
            view = view[count:]

    def _wait(self, deadline: float) -> None:
        """Waits until there is something to read from the channel; what is printed meanwhile is taken."""
        while True:
            left = deadline - time.monotonic()
            ready = {key.fileobj for key, _ in self._selector.select(max(0.0, min(left, _LOOK)))}
            if self._output in ready:
                self._take_output()
            if self._socket in ready:
                return
            if left <= 0:
                raise LateError("no answer in time")
            if not ready and self._child.poll() is not None:
                raise self._how_it_ended()

    def _take_output(self) -> None:
        text = os.read(self._output, 1 << 16)
        if not text:
            self._selector.unregister(self._output)
        self._said = (self._said + text)[-_TAIL:]
        self.echo(text)

    def _how_it_ended(self) -> EndedError:
        """How it ended, where that is known, and the last thing that it printed."""
        end = time.monotonic() + _TO_END
        while self._child.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        code = self._child.poll()
        how = "its process answers no more" if code is None else f"its process ended: {_code(code)}"
        while self._output in {key.fileobj for key, _ in self._selector.select(0)}:
            self._take_output()
        lines = [line.strip() for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        file, line = _line_of(self._fault())
        told = [*[said[:200] for said in lines[-1:]], *filter(None, [place(file, line)])]
        return EndedError(how + (f" ({'; '.join(told)})" if told else ""), file, line, code)

    def _fault(self, start: int = 0) -> str:
        """What the interpreter wrote when the process crashed, or was asked where it is. start: bytes before that."""
        return os.pread(self._faults.fileno(), _TAIL, start).decode(errors="replace")


class Channel:
    """The process's end."""

    def __init__(self, channel: socket.socket) -> None:
        self._socket, self._home, self._number = channel, os.getpid(), 0

    def requests(self) -> Iterator[Any]:
        """What is asked, until the one who asks is gone."""
        while head := self._read(_HEAD.size):
            self._number, size = _HEAD.unpack(head)
            yield pickle.loads(self._read(size))
            self._at_home()

    def answer(self, word: str, values: Any = None) -> None:
        """values: of JSON, with arrays of numbers in them. Raises TypeError for others."""
        self._at_home()
        arrays: list[np.ndarray] = []
        values = _parted(values, arrays)
        kinds = [(array.dtype.str, array.shape) for array in arrays]
        text = json.dumps([word, values, kinds]).encode()
        self._socket.sendall(_HEAD.pack(self._number, len(text)) + text)
        for array in arrays:
            if array.size:
                self._socket.sendall(memoryview(array.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]

    def _at_home(self) -> None:
        """Ends a fork of this process that came back from the work in its place."""
        if os.getpid() != self._home:
            os._exit(0)

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                return b""
            view = view[count:]
        return bytes(data)


def be_fresh(serve: str, channel: int, faults: int) -> None:
    """A new interpreter becomes the process that it was started for."""
    module, _, name = serve.partition(":")

    def work(channel: Channel) -> None:
        getattr(importlib.import_module(module), name)(channel)

    _be_the_process(work, socket.socket(fileno=channel), None, faults, fork=False)


def _be_the_process(
    serve: Callable[[Channel], None], channel: socket.socket, printed: int | None, faults: int, *, fork: bool
) -> None:
    """Serves, and ends this process."""
    code = 1
    try:
        if fork:
            os.setsid()
            _speak_into(printed)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked ends this process
        _die_first()
        faulthandler.enable(faults, all_threads=False)
        faulthandler.register(_WHERE, faults, all_threads=False)
        serve(Channel(channel))
        code = 0
    except BaseException:  # whatever it is, nobody is left to hear of it but the one who asked
        traceback.print_exc()
    finally:
        os._exit(code)


def _speak_into(printed: int | None) -> None:
    """A fork is made to read nothing, and what it writes, by whichever way, goes to the one who asked."""
    assert printed is not None
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # the threads of the process that forked are not in this one


def _die_first() -> None:
    """Where memory is out, this process ends and not the one who asked; and it ends with that one. Linux alone."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Fork:
    """A forked process, as `subprocess.Popen` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None if pid else 0

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, how)
            except ChildProcessError:  # somebody else of this process has waited for it
                pid, status = self.pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _python(arguments: Sequence[str], environment: dict[str, str] | None, **streams: Any) -> Any:
    """A new interpreter that leads a session of its own, so that Ctrl-C is for this process, which ends the other."""
    return subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, **(environment or {})}, start_new_session=True, **streams
    )


@contextlib.contextmanager
def _ends() -> Iterator[tuple[socket.socket, socket.socket, int, int, Any]]:
    """Both ends of a channel and of a pipe, and a file for faults; the process's ends are closed here at the end."""
    ours, theirs = socket.socketpair()
    output, printed = os.pipe()
    faults = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
    try:
        yield ours, theirs, output, printed, faults
    except BaseException:
        ours.close()
        os.close(output)
        faults.close()
        raise
    finally:
        theirs.close()
        os.close(printed)


def kill_group(pid: int) -> None:
    """Ends the process that leads a group, and the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)  # it may not have come to lead one


def _code(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _parted(values: Any, arrays: list[np.ndarray]) -> Any:
    """`values` with {"array": its number} in place of every array, which goes to the list."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in _KINDS:
            raise TypeError(f"an array of {values.dtype} cannot be sent")
        arrays.append(np.ascontiguousarray(values).reshape(values.shape))
        return {"array": len(arrays) - 1}
    if isinstance(values, dict):
        return {key: _parted(value, arrays) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_parted(value, arrays) for value in values]
    return values


def _joined(values: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(values, dict):
        if values.keys() == {"array"}:
            return arrays[values["array"]]
        return {key: _joined(value, arrays) for key, value in values.items()}
    if isinstance(values, list):
        return [_joined(value, arrays) for value in values]
    return values


# -------------------------------------------------------------------------------------------- what runs to its own end


class Batch:
    """Starts `python -P ARGUMENTS`. seconds: until it is ended, by force if need be, with everything that it started.

    environment: what it has beside that of this process. After `wait`: code (None if its time was over), output and
    errors as texts, seconds that it took.
    """

    def __init__(self, arguments: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> None:
        self._start, self._limit = time.monotonic(), seconds
        # Files and not pipes: a full pipe stops a process that nobody reads from yet.
        self._files = contextlib.ExitStack()
        self._streams = [self._files.enter_context(_stream()) for _ in range(2)]
        self._process = _python(
            ["-P", *arguments],
            environment,
            stdout=self._streams[0],
            stderr=self._streams[1],
            preexec_fn=_hear_interrupts,
        )
        atexit.register(self._kill)
        self.code: int | None = None
        self.output, self.errors, self.seconds = "", "", 0.0

    def wait(self) -> "Batch":
        """Returns when it has ended, or was ended."""
        left = self._limit - (time.monotonic() - self._start)
        try:
            self.code = self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self.end()
        self._kill()  # what it left behind would compute on while others are timed
        atexit.unregister(self._kill)
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
                self._kill()
                self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # its number may be another's by now, that of its session not
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def last_line(self) -> str:
        """The last line of its errors: what most programs end with when they fail."""
        return (self.errors.strip().splitlines() or ["no message"])[-1]


def _hear_interrupts() -> None:
    """A shell starts what it puts into the background deaf to Ctrl-C, and its children would be so too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stream() -> Any:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read().strip())


# ------------------------------------------------------------------------------------------------------- where it was


_FRAME = re.compile(r'^  File "(.+)", line (\d+) in ', re.MULTILINE)
_OURS = str(Path(__file__).resolve().parent)
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def in_one_line(error: BaseException) -> tuple[str, str, int]:
    """An error in one line; and the file and the line of whose code raised it, "" and 0 if there is none."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an error that cannot be told
        lines = []
    said = type(error).__name__ + (f": {lines[0][:300]}" if lines else "")
    frames = [(f.filename, f.lineno or 0) for f in reversed(traceback.extract_tb(error.__traceback__))]
    if isinstance(error, SyntaxError) and error.filename:
        frames = [(error.filename, error.lineno or 0)]
    return said, *theirs(frames)


def theirs(frames: list[tuple[str, int]]) -> tuple[str, int]:
    """The first of (file, line) that is of nobody's library, else the first that is not of this package, else the first
    in a part of it that computes on tensors, else none."""
    outside = [(file, line) for file, line in frames if not file.startswith((_OURS, "<frozen")) and file != "<string>"]
    foreign = [(file, line) for file, line in outside if not file.startswith(_elsewhere())]
    own = [(file, line) for file, line in foreign if not file.startswith(_LIBRARIES)]
    return next(iter(own or foreign or outside), ("", 0))


@functools.cache
def _elsewhere() -> tuple[str, ...]:
    """The folders of this package that may lie beside it."""
    found = [importlib.util.find_spec(name) for name in ("refllm.kernels", "refllm.golden")]
    return tuple(str(Path(spec.origin).resolve().parent) + os.sep for spec in found if spec and spec.origin)


def place(file: str, line: int) -> str:
    """A line of a file, as "file.py:3"; "" for none."""
    return f"{os.path.basename(file)}:{line}" if file else ""


def _line_of(fault: str) -> tuple[str, int]:
    """The file and line in what the interpreter wrote: the newest frame comes first."""
    return theirs(_frames_of(fault))


def _frames_of(fault: str) -> list[tuple[str, int]]:
    return [(file, int(line)) for file, line in _FRAME.findall(fault)]
