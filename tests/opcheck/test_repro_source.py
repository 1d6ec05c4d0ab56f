"""The source of a candidate that has no name to be imported by: what is written down runs, and computes the same."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from refllm.opcheck.repro.source import _gather

MODULE = """
import math as m
import os.path
from textwrap import dedent as cut
from json import dumps

SIZE, RATIO, WORD = 3, 0.5, "x"
TABLE = {"a": 1}


def helper(x):
    return x * SIZE


def twice(x):
    return helper(helper(x))


def plain(x):
    def inner(y):
        return y + RATIO
    return inner(twice(x)) + m.sqrt(4.0) + len(cut(WORD) + dumps(None) + os.path.join("a", "b"))


def recursive(x):
    return 0 if x <= 0 else 1 + recursive(x - 1)


def with_a_table(x):
    return TABLE["a"] + x


def with_a_lambda(x):
    return short(x)


def made(n):
    def inside(x):
        return x + n
    return inside


short = lambda x: x
closure = made(2)


@(lambda f: f)
def decorated(x):
    return x


class Callee:
    def __call__(self, x):
        return x


instance = Callee()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "gathered_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("gathered_here")
    del sys.modules["gathered_here"]


def run_alone(function: Callable[..., Any]) -> Any:
    imports: dict[str, None] = {}
    sources: dict[str, str] = {}
    assert _gather(function, imports, sources)
    names: dict[str, Any] = {}
    exec("\n".join([*imports, *sources.values()]), names)
    return names[function.__name__]


def test_what_is_gathered_computes_the_same_without_its_module(module: Any) -> None:
    for function in (module.plain, module.recursive, module.helper):
        alone = run_alone(function)
        assert alone.__globals__ is not module.__dict__
        assert [alone(x) for x in (0, 1, 5)] == [function(x) for x in (0, 1, 5)]


def test_only_what_is_used_is_gathered_and_each_once(module: Any) -> None:
    imports: dict[str, None] = {}
    sources: dict[str, str] = {}
    assert _gather(module.plain, imports, sources)
    assert set(imports) == {
        "import math as m",
        "import os",
        "from textwrap import dedent as cut",
        "from json import dumps as dumps",
    }
    assert {*sources} == {"SIZE", "helper", "twice", "RATIO", "WORD", "plain"}
    assert [name for name in sources if name in ("helper", "twice", "plain")] == ["helper", "twice", "plain"]
    assert sources["SIZE"] == "SIZE = 3"
    assert sources["WORD"] == "WORD = 'x'"


@pytest.mark.parametrize("name", ["with_a_table", "with_a_lambda", "short", "closure", "decorated", "instance"])
def test_what_cannot_be_written_down_is_left(name: str, module: Any) -> None:
    assert not _gather(getattr(module, name), {}, {})
