"""Standard output and error of a command that are closed, that nobody reads, or that are full."""

import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import pytest

from refllm.terminal import streams
from refllm.terminal.progress import loading_bar


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """The end of a pipe whose reader has gone away, with something left to be written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        stream.write("left")
        yield stream


class Full(io.StringIO):
    """A stream on a device that takes nothing more."""

    def __init__(self, handle: int) -> None:
        super().__init__()
        self.handle = handle

    def fileno(self) -> int:
        return self.handle

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture
def full() -> Iterator[Full]:
    with open(os.devnull, "w") as file:
        yield Full(file.fileno())


def test_what_is_closed_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    streams.prepare()
    made: Any = sys.stdin, sys.stdout, sys.stderr
    assert made[0].read() == ""
    for stream in made[1:]:
        assert stream.write("\N{SNOWMAN}") == 1
    for stream in made:
        stream.close()


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", shown[0])
    monkeypatch.setattr(sys, "stderr", shown[1])
    streams.prepare()
    for stream in shown:
        stream.write("\N{SNOWMAN}!")
        stream.seek(0)
        assert stream.read() == "?!"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_reader_that_goes_away_changes_no_exit_code(
    code: int, unread: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    assert streams.flush(code) == code
    unread.flush()  # what is left goes nowhere, and Python has nothing to complain of at its end


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_full_device_is_said_unless_a_sentence_was_said(
    code: int, full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", said)
    assert streams.flush(code) == 2
    sentence = "refllm: standard output cannot be written: No space left on device\n"
    assert said.getvalue() == ("" if code == 2 else sentence)


def test_standard_error_that_cannot_be_written_is_no_failure(
    full: Full, unread: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    for stream in (full, unread):
        monkeypatch.setattr(sys, "stderr", stream)
        assert streams.flush(1) == 1
    unread.flush()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_alone() -> None:
    with loading_bar(io.StringIO()) as progress:
        assert progress is None
    with loading_bar(terminal := Terminal(), "reading") as progress:
        assert progress is not None
        progress(3_000_000, 4_000_000)
    assert "reading" in terminal.getvalue()
    assert "3.0/4.0 MB" in terminal.getvalue()
