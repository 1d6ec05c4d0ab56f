"""What is to be shown, and the lines that every program has: how the candidate is called."""

from dataclasses import dataclass

import numpy as np

from refllm.opcheck import inputs
from refllm.opcheck.candidate import Candidate
from refllm.opcheck.examine import Finding
from refllm.strategies.call import Call

_OUTRIGHT = ("raises", "bounds", "race", "overflow", "configurations")
"""Shown by the exception alone."""
WIDTH = 118


@dataclass(frozen=True)
class Shown:
    """A finding, the candidate, the policy under which it was judged, and the seconds after which it hangs."""

    finding: Finding
    candidate: Candidate
    policy: str
    limit: float

    @property
    def call(self) -> Call:
        return self.finding.call

    @property
    def numpy(self) -> bool:
        """Whether the candidate takes NumPy arrays."""
        return self.candidate.arrays == "numpy"

    @property
    def alone(self) -> bool:
        """Whether it is one row computed by itself that fails."""
        return self.finding.row_alone is not None

    @property
    def way(self) -> str:
        """How it is shown: by an exception ("outright"), two runs that differ ("pair"), or as its property needs."""
        p = self.finding.property
        if p in _OUTRIGHT or (p == "unwritten" and self.finding.where is None):
            return "outright"
        if p in ("determinism", "unwritten") or (p == "invariance" and not self.alone):
            return "pair"
        return p

    @property
    def fills(self) -> bool:
        """Whether it shows with what new memory holds, which the program then has to set."""
        return self.finding.property == "unwritten" and self.way == "pair"

    @property
    def whole(self) -> bool:
        """Whether no element alone shows it, so that the whole result has to be computed."""
        judgement = self.finding.judgement
        return judgement is not None and not any(f.rule in ("element", "not finite") for f in judgement.faults)

    def called(self) -> list[str]:
        """Lines that set `got` to the tuple of what the candidate returns."""
        lines = ["got = candidate(*arguments, **keywords)"]
        if self.candidate.device != "cpu":
            lines.append("torch.cuda.synchronize()  # until then a kernel may not have run")
        if self.candidate.interpreted:
            every = 'configs="all"' if self.finding.property == "configurations" else ""
            lines = [f"with interpreted({'poison=False' if self.fills else every}):", *indented(lines)]
        return [*lines, "got = got if isinstance(got, (tuple, list)) else (got,)"]

    def read(self, x: str) -> str:
        """An expression for the values of the result `x` in float64."""
        return f"np.array({x}, np.float64)" if self.numpy else f"{x}.detach().double().cpu().numpy()"


def made(shown: Shown) -> list[str]:
    """Lines that make `arguments` and `keywords`; one row of them where that is what fails."""
    lines, row = shown.call.code(shown.candidate.device, shown.numpy), shown.finding.row_alone
    if row is not None:
        arguments = shown.call.placed()[0]
        cut = inputs.row_alone(shown.call, arguments, {}, row)[0]
        which = [i for i, (a, b) in enumerate(zip(arguments, cut, strict=True)) if a is not b]
        lines += [
            f"whole, cut = list(arguments), {which}",
            f"arguments = [x[{row}:{row + 1}] if i in cut else x for i, x in enumerate(whole)]  # one row alone",
        ]
        if any(n == "key_mask" and v is not None for n, v in shown.call.keywords):
            lines.append(f'keywords = {{**keywords, "key_mask": keywords["key_mask"][{row}:{row + 1}]}}')
    return lines


def indented(lines: list[str]) -> list[str]:
    """Lines as the body of something."""
    return [f"    {line}" if line else "" for line in lines]


def listed(name: str, items: list[str]) -> list[str]:
    """Lines that set `name` to a list: one line, or as many as it has items."""
    line = f"{name} = [{', '.join(items)}]"
    return [line] if len(line) <= WIDTH else [f"{name} = [", *(f"    {item}," for item in items), "]"]


def number(x: float) -> str:
    """A number as source."""
    return repr(x) if np.isfinite(x) else f'float("{x}")'
