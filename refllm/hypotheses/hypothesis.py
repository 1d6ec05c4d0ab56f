"""One hypothesis: a named change of a set-up, and a sentence for the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refllm.hypotheses.setup import Setup

Change = Callable[[Setup], None]


@dataclass(frozen=True)
class Parameter:
    """A number of a hypothesis that is solved for. edit: the change with that number. grid: where the search begins.
    says: the sentence with the number. whole: it is an integer. name: of the number, in a report."""

    name: str
    edit: Callable[[Setup, float], None]
    grid: Sequence[float]
    says: Callable[[float], str]
    whole: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """says: what completes "with ... the reference gives your logits". operator: the one that it concerns. values: the
    short names of the values that it changes first (`refllm.forward.taps`). edit: the change; it raises
    DoesNotApplyError where it has no meaning.

    places: it moves roundings alone, so that it explains nothing below the limit. alone: it cannot be in one layer.
    ahead: what comes later in a sequence reaches earlier tokens. layers: those that it is in, None for all. parameter:
    what is solved for.
    """

    name: str
    says: str
    operator: str
    values: tuple[str, ...]
    edit: Change
    places: bool = False
    alone: bool = False
    ahead: bool = False
    layers: frozenset[int] | None = None
    parameter: Parameter | None = None
    value: float | None = None

    def __call__(self, setup: Setup) -> None:
        """Changes a set-up, in the layers of the hypothesis."""
        before, setup.layers = setup.layers, self.layers
        try:
            if self.parameter is not None and self.value is not None:
                self.parameter.edit(setup, self.value)
            else:
                self.edit(setup)
        finally:
            setup.layers = before

    def within(self, layers: Sequence[int]) -> "Hypothesis":
        """The same in some layers."""
        words = ", ".join(str(i) for i in layers)
        said = f"{self.says} in layer{'s' * (len(layers) > 1)} {words} alone"
        return replace(self, name=f"{self.name}, layer {words}", says=said, layers=frozenset(layers))

    def at(self, value: float, name: str = "", says: str = "") -> "Hypothesis":
        """The same with a number. name, says: of a number that has a meaning of its own."""
        assert self.parameter is not None
        name, says = name or f"{self.parameter.name} {value:g}", says or self.parameter.says(value)
        return replace(self, name=name, says=says, value=value)

    @property
    def open(self) -> bool:
        """Whether its number is still to be solved for."""
        return self.parameter is not None and self.value is None


def one_of(name: str, says: str, operator: str, values: str, edit: Change, **how: Any) -> Hypothesis:
    """A hypothesis; values: the short names with spaces between them."""
    return Hypothesis(name, says, operator, tuple(values.split()), edit, **how)


def free(
    name: str,
    operator: str,
    values: str,
    edit: Callable[[Setup, float], None],
    grid: Sequence[float],
    says: Callable[[float], str],
    **how: Any,
) -> Hypothesis:
    """A hypothesis with a number that is solved for."""
    parameter = Parameter(name, edit, tuple(grid), says, how.pop("whole", False))
    return Hypothesis(
        name, name, operator, tuple(values.split()), lambda s: edit(s, parameter.grid[0]), parameter=parameter, **how
    )


def decades(low: float, high: float, each: int = 4) -> list[float]:
    """Numbers in equal steps of their logarithm."""
    first, last = np.log10(low), np.log10(high)
    return [float(x) for x in np.logspace(first, last, max(2, round((last - first) * each) + 1))]
