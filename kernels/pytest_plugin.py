"""Runs the Triton kernels of any project in its own tests on the CPU. Loaded by pytest as soon as refllm is installed.

    pytest --triton-interpret                          # every test runs inside refllm.kernels.interpreted()

    @pytest.mark.triton_interpreted(races=False)       # one test, with the arguments of interpreted()
    def test_mine(): ...

    def test_other(triton_interpreter):                # from here on; triton_interpreter(bounds="view") is a context
        ...

It does nothing, and imports neither Torch nor Triton, unless one of the three is used. Tests run in one thread per
process; pytest-xdist works.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

MARKER = "triton_interpreted"
_ENTERED = pytest.StashKey[contextlib.ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --triton-interpret."""
    parser.getgroup("refllm").addoption(
        "--triton-interpret",
        action="store_true",
        help="run Triton kernels on the CPU, on refllm's interpreter, in every test",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker; refuses --triton-interpret where Torch or Triton is missing."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(**arguments): run this test inside refllm.kernels.interpreted(**arguments), on the CPU",
    )
    if config.getoption("--triton-interpret"):
        from refllm import extras

        missing = extras.not_installed(("torch", "triton"))
        if missing:
            raise pytest.UsageError(extras.needs("--triton-interpret", *missing))


def pytest_report_header(config: pytest.Config) -> str | None:
    """One line at the top of the report if every test runs on the interpreter."""
    if not config.getoption("--triton-interpret"):
        return None
    from importlib.metadata import version

    return f"triton {version('triton')}: kernels run on the CPU, on the interpreter of refllm {version('refllm')}"


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Switches the interpreter on before the first fixture of an affected test."""
    marker = item.get_closest_marker(MARKER)
    if marker is not None or item.config.getoption("--triton-interpret"):
        if marker is not None and marker.args:
            pytest.fail(f"the marker {MARKER} takes keywords only, those of refllm.kernels.interpreted()", False)
        stack = item.stash[_ENTERED] = contextlib.ExitStack()
        stack.enter_context(_interpreted(**(marker.kwargs if marker else {})))
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Switches it off after the last fixture."""
    try:
        return (yield)
    finally:
        item.stash.get(_ENTERED, contextlib.ExitStack()).close()


@pytest.fixture
def triton_interpreter() -> Iterator[Callable[..., contextlib.AbstractContextManager[None]]]:
    """Runs the test on the interpreter; its value is `interpreted`, for a part of the test with other arguments."""
    with _interpreted():
        yield _interpreted


def _interpreted(**arguments: Any) -> contextlib.AbstractContextManager[None]:
    from refllm import extras

    if missing := extras.not_installed(("torch", "triton")):
        pytest.fail(extras.needs("Triton's interpreter", *missing), False)
    from refllm.kernels.interpreter import interpreted

    return interpreted(**arguments)
