"""Operators as beginners write them, each with one mistake, which its docstring names: what "looks like" is asked of.

They were written before the catalogue of hypotheses and do not know of it. A file for each kind of operator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

FILES = ("norms", "rotations", "attentions", "activations", "losses")


@dataclass(frozen=True)
class Beginner:
    """One wrong operator. arrays: what it takes. mistake: the right name, as a sentence."""

    operator: str
    function: Callable[..., Any]
    arrays: str

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    @property
    def mistake(self) -> str:
        return " ".join((self.function.__doc__ or "").split())


_ALL: list[Beginner] = []


def beginner(operator: str, arrays: str = "numpy") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters the function below as a beginner's `operator`."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _ALL.append(Beginner(operator, function, arrays))
        return function

    return enter


def every() -> list[Beginner]:
    """All of them, in the order of the files."""
    for file in FILES:
        import_module(f"{__name__}.{file}")
    return _ALL
