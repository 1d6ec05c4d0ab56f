"""What a check found about one named value, or one gradient."""

from dataclasses import dataclass, field

import numpy as np

from refllm.accuracy.judge import broken, broken_isolated
from refllm.accuracy.measure import Measure
from refllm.accuracy.verdicts import ValueVerdict

NOTHING = Measure(0, (0, 0, 0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (), 0.0, 0.0, (), 0.0, 0.0, 0)
"""The measure of what was not measured."""


@dataclass
class TapReport:
    """One named value. isolated is None where the candidate does not record an earlier value that it needs.

    Indices in the measures are [batch row, position, channel] or [batch row, position, head, channel]. zmap: where the
    error lies that the value's own operator made (`refllm.check.error_map`).
    named: a defect that predicts it to the bit, or an error that its elements share, in one clause. another: the honest
    profile that it has in this layer and not in the others. unrecognised: it rounds as no honest code does, in this
    layer. place: it is right, but does not round where the named policy says; its profile in words.
    dtype: by whose errors it is judged: that of the run, or float32 where it is shown as that.
    alone: of a context, the error in sigma of the first token of every sequence, which sees itself alone.
    overflow: the largest exact number that the format does not hold, where the candidate has an infinity. fed: an
    infinity or NaN came in. hidden: values that were not shown, between the ones before, the last of them `since`, and
    this one.
    """

    name: str
    end_to_end: Measure
    isolated: Measure | None = None
    untested: list[str] = field(default_factory=list)
    ulps: list[int] = field(default_factory=list)
    dtype: str = "float32"
    zmap: np.ndarray | None = None
    named: str = ""
    another: str = ""
    unrecognised: bool = False
    alone: float | None = None
    place: str = ""
    overflow: float = 0.0
    fed: bool = False
    hidden: tuple[str, ...] = ()
    since: str = ""
    profiled: bool = False

    @property
    def cause(self) -> str:
        """defect, place, consequence (of an infinity that came in, or of what came before), or "" where it holds."""
        if self.verdict != "fails":
            return ""
        return "defect" if self.defect_here else "place" if self.place and not self.fed else "consequence"

    @property
    def broken(self) -> list[str]:
        """The rules that this value breaks; empty if it holds."""
        return list(dict.fromkeys([*self._recognised, *broken(self.end_to_end, self.isolated, self.dtype)]))

    @property
    def _recognised(self) -> list[str]:
        rules = {
            "overflow": self.overflow,
            "named": self.named,
            "another profile": self.another,
            "unrecognised": self.unrecognised,
        }
        return [rule for rule, said in rules.items() if said]

    @property
    def verdict(self) -> ValueVerdict:
        if self.broken:
            return "fails"
        return "untested" if self.untested else "holds"

    @property
    def wrong_here(self) -> bool:
        """Whether the operator that makes this value breaks a rule, whatever it was given."""
        return self.isolated is not None and bool(self._recognised or broken_isolated(self.isolated, self.dtype))

    @property
    def defect_here(self) -> bool:
        """Whether it is wrong, and does not only round elsewhere than the named policy."""
        return self.wrong_here and not self.place and not self.fed
