"""Processes with limits: answers belong to their requests, nothing of them is executed, nobody is left behind."""

import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm import apart
from refllm.apart import Answer, Channel, EndedError, LateError, Process


def answering(work: Callable[[Any], Any]) -> Callable[[Channel], None]:
    """A process that answers every request with what work(request) returns."""

    def serve(channel: Channel) -> None:
        for request in channel.requests():
            channel.answer("done", work(request))

    return serve


@contextlib.contextmanager
def forked(work: Callable[[Any], Any]) -> Iterator[Process]:
    with Process.forked(answering(work)) as process:
        yield process


def ask(process: Process, request: Any, limit: float = 20.0) -> Any:
    process.send(request)
    return process.receive(limit).values


def is_there(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while is_there(pid) and time.monotonic() < end:
        time.sleep(0.005)
    return not is_there(pid)


ARRAYS = [
    np.array([1.5, -0.0, np.nan, np.inf], np.float32),
    np.arange(24, dtype=np.float64).reshape(2, 3, 4)[:, ::-1, ::2],
    np.array(7, np.int64),
    np.zeros((0, 5), np.uint8),
    np.array([[True], [False]]),
]


def test_answers_hold_plain_values_and_arrays_to_the_bit() -> None:
    with forked(
        lambda request: {"given": request, "arrays": ARRAYS, "nested": [{"x": ARRAYS[0]}, None, 3, "ü\ud800"]}
    ) as p:
        found = ask(p, (1, "two"))
    assert found["given"] == [1, "two"]
    assert found["nested"][1:] == [None, 3, "ü\ud800"]
    for array, again in zip([*ARRAYS, ARRAYS[0]], [*found["arrays"], found["nested"][0]["x"]], strict=True):
        assert (again.dtype, again.shape) == (array.dtype, array.shape)
        assert again.tobytes() == array.tobytes()


@pytest.mark.parametrize("value", [np.array([None]), np.array(["x"]), np.array([1j]), np.zeros(2, "V2")])
def test_only_arrays_of_numbers_can_be_sent(value: np.ndarray) -> None:
    with forked(lambda request: value) as process, pytest.raises(EndedError, match="cannot be sent"):
        ask(process, None)


def test_a_late_answer_is_not_that_of_the_next_request() -> None:
    with forked(lambda request: time.sleep(request[0]) or request[1]) as process:
        with pytest.raises(LateError):
            ask(process, (0.1, "late"), limit=0.01)
        assert ask(process, (0, "next")) == "next"


def test_a_fork_that_comes_back_does_not_answer() -> None:
    with forked(lambda request: (os.fork(), request)[1]) as process:
        assert [ask(process, i) for i in range(20)] == list(range(20))


class Executed:
    """Unpickling it makes a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (self.file,)


HOSTILE: dict[str, Callable[[str], bytes]] = {
    "a pickle": lambda file: pickle.dumps(Executed(file)),
    "an answer that is no JSON": lambda file: b"{",
    "an array of objects": lambda file: b'[1, "done", {"array": 0}, [["|O", [1]]]] ',
    "an array that is too large": lambda file: b'[1, "done", {"array": 0}, [["<f4", [4611686018427387904]]]]',
    "an array that is not there": lambda file: b'["done", {"array": 5}, []]',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_answer_is_refused_and_not_executed(kind: str, tmp_path: Path) -> None:
    data = HOSTILE[kind](str(tmp_path / "made"))

    def serve(channel: Channel) -> None:
        for _ in channel.requests():
            channel._socket.sendall(apart._HEAD.pack(1, len(data)) + data + bytes(64))

    with Process.forked(serve) as process, pytest.raises(EndedError, match="sent what is no answer"):
        ask(process, None)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Executed(str(tmp_path / "made"))))
    assert (tmp_path / "made").exists()  # as it would have been


def test_a_process_that_somebody_else_has_waited_for_has_ended() -> None:
    with forked(os._exit) as process:
        pid = process._child.pid
        process.send(3)
        assert os.waitpid(pid, 0)[0] == pid
        with pytest.raises(EndedError, match="its process ended: exit code 0"):  # its own is known to nobody any more
            process.receive(20.0)
        assert process._child.poll() == process._child.wait() == 0


def test_an_answer_that_stops_half_way_is_late() -> None:
    def serve(channel: Channel) -> None:
        for _ in channel.requests():
            channel._socket.sendall(apart._HEAD.pack(1, 100) + b"[")
            time.sleep(60)

    with Process.forked(serve) as process, pytest.raises(LateError):
        ask(process, None, limit=0.05)


def test_everything_that_it_started_ends_with_it() -> None:
    def work(request: str) -> Any:
        if request == "fork" and (child := os.fork()):
            return child
        if request == "fork":
            time.sleep(600)
        return subprocess.Popen(["sleep", "600"]).pid

    with forked(work) as process:
        children = [ask(process, "fork"), ask(process, "start")]
        assert all(map(is_there, children))
    assert all(map(gone, children))


def test_its_end_is_seen_though_its_children_hold_the_channel() -> None:
    def work(request: Any) -> Any:
        if os.fork() == 0:
            time.sleep(600)
        os._exit(4)

    start = time.monotonic()
    with forked(work) as process, pytest.raises(EndedError, match="exit code 4"):
        ask(process, None)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_it_ends_when_the_one_who_asked_is_killed() -> None:
    def work(request: Any) -> Any:
        inner = Process.forked(answering(lambda _: time.sleep(600)))
        inner.send(None)
        return inner._child.pid

    with forked(work) as process:
        pid = ask(process, None)
        assert is_there(pid)
        os.kill(process._child.pid, signal.SIGKILL)
        assert gone(pid)


def test_what_it_prints_is_cut_and_stored_nowhere() -> None:
    shown: list[int] = []
    with forked(lambda request: sum(os.write(1, b"x" * (1 << 20)) for _ in range(20))) as process:
        process.echo = lambda text: shown.append(len(text))
        assert ask(process, None) == 20 << 20
        assert sum(shown) > (20 << 20) - (1 << 17)  # the rest is on its way
        assert len(process._said) <= apart._TAIL
        open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_link(fd)]
        assert not any(
            os.path.exists(file) and os.path.getsize(file) > 1 << 20 for file in open_files if "/tmp" in file
        )


def is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def test_the_line_that_it_has_reached_is_known_where_it_hangs_and_where_it_crashes() -> None:
    def spin(request: Any) -> Any:
        while True:
            math.sqrt(2)

    with forked(spin) as process:
        process.send(None)
        with pytest.raises(LateError):
            process.receive(0.05)
        file, line = process.where()
    assert file == __file__
    assert spin.__code__.co_firstlineno < line <= spin.__code__.co_firstlineno + 2

    def crash(request: Any) -> Any:
        print("a last word", flush=True)
        os.abort()

    with forked(crash) as process, pytest.raises(EndedError) as ended:
        ask(process, None)
    line = crash.__code__.co_firstlineno + 2
    assert (ended.value.file, ended.value.line) == (__file__, line)
    assert str(ended.value) == f"its process ended: SIGABRT (a last word; test_apart.py:{line})"


def test_closing_twice_or_in_a_fork_harms_nobody() -> None:
    process = Process.forked(answering(lambda request: request))
    assert apart.run(process.close) is None
    assert ask(process, 3) == 3
    process.close()
    process.close()


def serve_fresh(channel: Channel) -> None:
    """What the new interpreter runs: it says what it has."""
    for request in channel.requests():
        channel.answer("done", [request, sys.argv, sys.path, "pytest" in sys.modules, sys.stdin.read()])


def test_a_new_interpreter_has_the_path_and_the_arguments_and_nothing_else() -> None:
    with Process.fresh(f"{__name__}:serve_fresh") as process:
        request, argv, path, tested, read = ask(process, {"a": 1})
    assert (request, argv, path, read) == ({"a": 1}, sys.argv, sys.path, "")
    assert tested  # this file imports it
    assert isinstance(Answer("word", 1).values, int)


def test_a_new_interpreter_that_cannot_begin_says_why() -> None:
    with Process.fresh("no_such_module:serve") as process:
        process.send(None)
        with pytest.raises(EndedError, match="No module named 'no_such_module'"):
            process.receive(20)
