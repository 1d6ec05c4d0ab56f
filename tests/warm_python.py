"""New interpreters as forks of the test process: an import of Torch and Transformers takes seconds of each of them."""

import faulthandler
import os
import runpy
import signal
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Sequence
from typing import Any

_FLAGS = {"-P": 1, "-u": 1, "-W": 2}
"""Options of the interpreter that need nothing here -> how many words they are."""


class WarmPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen`, but `python -c`, `python -m` and `python FILE` run in a fork of this process.

    What was imported here is there already; everything else (arguments, streams, environment, folder, session, exit
    code) is as in a new interpreter. Other commands are started as ever.
    """

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, *rest: Any) -> None:  # fmt: skip
        words = [os.fspath(word) for word in args] if not isinstance(args, str) else []
        if shell or words[:1] != [sys.executable]:
            return super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *rest
            )
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, new_session, _ = rest
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # that this process has threads: the new one uses none of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            try:
                if new_session:
                    os.setsid()
                _take_streams((p2cread, c2pwrite, errwrite), pass_fds)
                if cwd is not None:
                    os.chdir(cwd)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                if preexec_fn is not None:
                    preexec_fn()
                if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                code = _run(words[1:])
            except BaseException:
                traceback.print_exc()
                code = 1
            os._exit(code)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        return None


def _take_streams(given: Sequence[int], keep: Sequence[int]) -> None:
    """The streams become 0, 1 and 2, and nothing else stays open but `keep`: an end of a pipe that stays open in
    another process never ends."""
    faulthandler.disable()
    taken = [os.dup(fd) if fd >= 0 else fd for fd in given]
    for number, fd in enumerate(taken):
        if fd >= 0:
            os.dup2(fd, number)
    start = 3
    for fd in sorted(keep):
        os.closerange(start, fd)
        os.set_inheritable(fd, True)
        start = fd + 1
    os.closerange(start, 4096)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115


def _run(words: list[str]) -> int:
    """What the interpreter does with its arguments; its exit code."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
    while words[0] in _FLAGS:
        words = words[_FLAGS[words[0]] :]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif words[0] == "-m":
            sys.argv = words[1:]
            loaded = sys.modules.get(words[1])
            if loaded is not None and not hasattr(loaded.__loader__, "get_code"):  # by pytest, which rewrote it
                del sys.modules[words[1]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return (code or 0) & 0xFF
