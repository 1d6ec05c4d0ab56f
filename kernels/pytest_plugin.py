"""Runs the Triton kernels of any project in its own tests on the CPU. Loaded by pytest as soon as refllm is installed.

    pytest --triton-interpret                          # every test runs inside refllm.kernels.interpreted()
    pytest --triton-interpret --triton-setting races=false --triton-setting masked=zero
    pytest --triton-interpret --cuda-stand-in          # and "cuda" means the interpreter, from the first import on

    @pytest.mark.triton_interpreted(races=False)       # one test, with the arguments of interpreted()
    def test_mine(): ...

    def test_other(triton_interpreter):                # from here on; triton_interpreter(bounds="view") is a context
        ...

It does nothing, and imports neither Torch nor Triton, unless one of these is used. Tests run in one thread per process;
pytest-xdist works.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

MARKER = "triton_interpreted"
_ENTERED = pytest.StashKey[contextlib.ExitStack]()
_SETTINGS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --triton-interpret, --triton-setting, --cuda-stand-in and --cuda-stand-in-target."""
    group = parser.getgroup("refllm")
    group.addoption(
        "--triton-interpret",
        action="store_true",
        help="run Triton kernels on the CPU, on refllm's interpreter, in every test",
    )
    group.addoption(
        "--triton-setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of refllm.kernels.interpreted(), such as races=false, bounds=view, masked=zero or "
        "configs=all; a marker overrides it; repeat for more",
    )
    group.addoption(
        "--cuda-stand-in",
        action="store_true",
        help='with --triton-interpret: device="cuda" and torch.cuda mean the interpreter, from the first import on',
    )
    group.addoption(
        "--cuda-stand-in-target",
        metavar="NAME",
        help="the GPU that is stood in for: sm_80, sm_90 (when nothing is said) or sm_100",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Reads the options and lets CUDA be stood in for, before a conftest.py can import what asks for it."""
    options = early_config.known_args_namespace
    settings = early_config.stash[_SETTINGS] = _settings(options)
    if options.cuda_stand_in:
        from refllm.kernels.interpreter.cuda_stand_in import cuda_stand_in

        target = {"target": options.cuda_stand_in_target} if options.cuda_stand_in_target else {}
        with _a_mistake_is_one_of_use():
            stack = early_config.stash[_ENTERED] = contextlib.ExitStack()
            stack.enter_context(cuda_stand_in(**target, **settings))


def _settings(options: Any) -> dict[str, Any]:
    """The arguments of interpreted() that the options give. Raises UsageError for options that need another one."""
    given = (options.triton_setting, options.cuda_stand_in, options.cuda_stand_in_target)
    names = ("--triton-setting", "--cuda-stand-in", "--cuda-stand-in-target")
    if alone := next((name for name, value in zip(names, given, strict=True) if value), None):
        needed = "--cuda-stand-in" if alone == names[2] else "--triton-interpret"
        if not getattr(options, needed.strip("-").replace("-", "_")):
            raise pytest.UsageError(f"{alone} needs {needed}")
    if not options.triton_interpret:
        return {}
    from refllm import extras

    missing = extras.not_installed(("torch", "triton"))
    if missing:
        raise pytest.UsageError(extras.needs("--triton-interpret", *missing))
    from refllm.kernels.interpreter import settings

    with _a_mistake_is_one_of_use():
        return settings.read(options.triton_setting)


@contextlib.contextmanager
def _a_mistake_is_one_of_use() -> Iterator[None]:
    from refllm.errors import RefllmError

    try:
        yield
    except RefllmError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(**arguments): run this test inside refllm.kernels.interpreted(**arguments), on the CPU",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """Puts back what --cuda-stand-in exchanged."""
    config.stash.get(_ENTERED, contextlib.ExitStack()).close()


def pytest_report_header(config: pytest.Config) -> str | None:
    """One line at the top of the report if every test runs on the interpreter."""
    if not config.getoption("--triton-interpret"):
        return None
    from importlib.metadata import version

    words = [f"{name}={value}" for name, value in config.stash[_SETTINGS].items()]
    words += ["in place of cuda"] if config.getoption("--cuda-stand-in") else []
    where = f"kernels run on the CPU, on the interpreter of refllm {version('refllm')}"
    return f"triton {version('triton')}: {where}{', ' if words else ''}{', '.join(words)}"


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Switches the interpreter on before the first fixture of an affected test."""
    marker = item.get_closest_marker(MARKER)
    if marker is not None or item.config.getoption("--triton-interpret"):
        if marker is not None and marker.args:
            pytest.fail(f"the marker {MARKER} takes keywords only, those of refllm.kernels.interpreted()", False)
        stack = item.stash[_ENTERED] = contextlib.ExitStack()
        settings = item.config.stash.get(_SETTINGS, {})
        stack.enter_context(_interpreted(**{**settings, **(marker.kwargs if marker else {})}))
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Switches it off after the last fixture."""
    try:
        return (yield)
    finally:
        item.stash.get(_ENTERED, contextlib.ExitStack()).close()


@pytest.fixture
def triton_interpreter(request: pytest.FixtureRequest) -> Iterator[Callable[..., contextlib.AbstractContextManager]]:
    """Runs the test on the interpreter; its value is `interpreted`, for a part of the test with other arguments."""
    with _interpreted(**request.config.stash.get(_SETTINGS, {})):
        yield _interpreted


def _interpreted(**arguments: Any) -> contextlib.AbstractContextManager[None]:
    from refllm import extras

    if missing := extras.not_installed(("torch", "triton")):
        pytest.fail(extras.needs("Triton's interpreter", *missing), False)
    from refllm.kernels.interpreter import interpreted

    return interpreted(**arguments)
