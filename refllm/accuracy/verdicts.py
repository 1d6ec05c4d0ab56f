"""The words of every verdict, in reports, in their JSON and behind the exit codes; and how parts make a whole.

A candidate `holds` where nothing is wrong, `fails` where something is, and is `incomplete` where nothing was found, but
something was not looked at. A single value at which a wrong answer would hold as well is `untested`.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

Verdict = Literal["holds", "fails", "incomplete"]
ValueVerdict = Literal["holds", "fails", "untested"]
_Either = TypeVar("_Either", Verdict, ValueVerdict)

SCHEMA = 2
"""The number that JSON with a verdict has under "schema". 1 is what had none, and other words in places."""


def verdict(wrong: Any, missing: Any = False) -> Verdict:
    """The verdict of a whole. wrong: whether something is wrong; missing: whether something was not looked at."""
    return "fails" if wrong else "incomplete" if missing else "holds"


def worst(verdicts: Iterable[_Either]) -> _Either:
    """The verdict over several: that of the worst of them; they hold where there are none."""
    return min(verdicts, key=("fails", "incomplete", "untested", "holds").index, default="holds")
