"""The status line: silent off a terminal, and gone when it is done."""

import io

from hypothesis import given
from hypothesis import strategies as st

from refllm.terminal.status_line import StatusLine, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_written_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with StatusLine(stream) as step:
        step("loading", 1, 2)
        step.clear()
    assert stream.getvalue() == ""


def test_line_is_emptied_at_the_end_and_never_broken() -> None:
    stream = Terminal()
    with StatusLine(stream) as step:
        step("scoring", 1, 2)
        step("x" * 10_000)
    assert "scoring [###############---------------]  50 %" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[2K")
    assert "\n" not in stream.getvalue()
    assert max(map(len, stream.getvalue().split("\r"))) < 500


def test_same_step_is_not_redrawn_at_once() -> None:
    stream = Terminal()
    step = StatusLine(stream)
    for done in range(1000):
        step("scoring", done, 1000)
    assert stream.getvalue().count("\r") < 20


@given(st.floats(-1, 2))
def test_bar_has_one_width(share: float) -> None:
    assert len(bar(share).split("]")[0]) == len(bar(0.0).split("]")[0])


def test_another_step_is_shown_at_once_whatever_it_is_called() -> None:
    stream = Terminal()
    step = StatusLine(stream)
    for text in ("b", "c", "a", "a"):
        step(text)
    assert [part.removeprefix("\x1b[2K") for part in stream.getvalue().split("\r")[1:]] == ["b", "c", "a"]
