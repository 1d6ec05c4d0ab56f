"""One hypothesis about an operator: a small named edit of its definition's text, in every way that it is written."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refllm.hypotheses.operators.edits import Edits, changed_lines, compiled, edited
from refllm.ops.contracts import contract_of

Outputs = tuple[np.ndarray, ...]
After = Callable[..., Outputs]
"""after(outputs, value): what is made of the right results, where a mistake is no edit of the text."""
NUMBER = "NUMBER"
"""What stands in edits and in a sentence for the number of a hypothesis that has one."""


@dataclass(frozen=True)
class OpHypothesis:
    """One mistake.

    name: short, one per operator. says: what is wrong, in one clause for a report; `NUMBER` stands for its number.
    operator: which contract it breaks. codes: the ways to write it: edits of the text, or what is done to the right
    results. numbers: what `NUMBER` may be, as source text ("32", "next_power(x.shape[-1])"); () where there is none.
    solved: where the search for `NUMBER` begins, if it is solved for; it is asked when nothing else fits. source: where
    the mistake was seen, "" for one of one's own. place: honest code in a narrow format may round there, so that it is
    no mistake in one. definition: the text that it is an edit of, where that is not the operator's.
    """

    name: str
    says: str
    operator: str
    codes: tuple[Edits | After, ...]
    numbers: tuple[str, ...] = ()
    solved: tuple[float, ...] = ()
    source: str = ""
    place: bool = False
    definition: str = ""

    @property
    def text(self) -> str:
        """The definition that it is an edit of."""
        return self.definition or contract_of(self.operator).program

    @property
    def variants(self) -> list["Variant"]:
        """Every way to write it with every number; none where the number is solved for."""
        if self.solved:
            return []
        numbers: Sequence[str] = self.numbers or ("",)
        return [Variant(self, code, number) for code in self.codes for number in numbers]


@dataclass(frozen=True)
class Variant:
    """A hypothesis in one way to write it, with one number."""

    hypothesis: OpHypothesis
    code: Edits | After
    number: str = ""

    @cached_property
    def text(self) -> str:
        """The edited definition; the right one where the mistake is made afterwards. Raises NoSuchTextError."""
        if callable(self.code):
            return self.hypothesis.text
        edits = [(old, new.replace(NUMBER, self.number)) for old, new in self.code]
        return edited(self.hypothesis.text, edits)

    @property
    def says(self) -> str:
        """Its sentence."""
        return self.hypothesis.says.replace(NUMBER, self.number)

    @property
    def lines(self) -> tuple[str, str]:
        """What the definition has, and what stands there instead; "" twice where no text is edited."""
        return ("", "") if callable(self.code) else changed_lines(self.hypothesis.text, self.text)

    def at(self, number: float) -> "Variant":
        """The same with another number."""
        return Variant(self.hypothesis, self.code, repr(number))

    def __call__(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> Outputs | None:
        """The results of a call with this mistake, in float64; None where it cannot be computed."""
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # means of nothing
                out = compiled(self.text)(*arguments, **keywords)
                out = tuple(x for x in out if x is not None)  # of what has no gradient
                out = self.code(out, self.number) if callable(self.code) else out
        except (ValueError, IndexError, TypeError, ZeroDivisionError):  # of shapes that such code does not take
            return None
        return tuple(np.asarray(x, np.float64) for x in out)


def mistake(operator: str, name: str, says: str, *codes: Edits | After, **more: Any) -> OpHypothesis:
    """A hypothesis, from its edits. What counts whole tiles is written in two ways: what is shorter than a tile is
    dropped, or is kept."""
    kept = [_kept(code) for code in codes if not callable(code)]
    return OpHypothesis(name, says, operator, (*codes, *(code for code in kept if code not in codes)), **more)


def _kept(code: Edits) -> Edits:
    return tuple((old, new.replace("whole(", "whole_of_long(")) for old, new in code)
